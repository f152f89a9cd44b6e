//! Refused connections: each is counted, and of a flood of them a few are written to the log.
//!
//! A stranger can make refusals as fast as it can connect. One line for each reason and peer in an
//! interval says all that a reader needs; the others are counted in the next line.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::Hash,
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use malla_common::Reason;

use crate::telemetry::{Direction, Role, write_refusal};

/// Lines that say the same are this far apart.
const INTERVAL: Duration = Duration::from_secs(10);
/// Reasons and peers that are told apart at once. What comes beyond goes without a line.
const MOST: usize = 128;

/// When lines that say the same were written.
#[derive(Debug)]
pub(super) struct Throttle<K> {
    said: HashMap<K, Said>,
    /// Those that there was no room for.
    untold: u64,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

impl<K> Default for Throttle<K> {
    fn default() -> Self {
        Self {
            said: HashMap::new(),
            untold: 0,
        }
    }
}

impl<K: Hash + Eq + Clone> Throttle<K> {
    /// Whether a line is due now, and how many like it were left out before. `None`: leave it out.
    pub(super) fn say(&mut self, key: &K, now: Instant) -> Option<u64> {
        if let Some(said) = self.said.get_mut(key) {
            if now - said.at < INTERVAL {
                said.left_out += 1;
                return None;
            }
            said.at = now;
            return Some(std::mem::take(&mut said.left_out));
        }
        if self.said.len() >= MOST {
            self.untold += 1;
            return None;
        }
        let (at, left_out) = (now, 0);
        self.said.insert(key.clone(), Said { at, left_out });
        Some(0)
    }

    /// What was left out and would never be told, and forgets what is over.
    fn overdue(&mut self, now: Instant) -> Vec<(K, u64)> {
        let mut overdue = Vec::new();
        self.said.retain(|key, said| {
            let is_over = now - said.at >= INTERVAL;
            if is_over && said.left_out > 0 {
                overdue.push((key.clone(), said.left_out));
            }
            !is_over
        });
        overdue
    }
}

/// Who is refused, and why.
type Refused = (Direction, IpAddr, Reason);

/// The refusals of one worker.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    throttle: RefCell<Throttle<Refused>>,
    accept_errors: RefCell<Throttle<(Role, Option<i32>)>>,
    summed_up: Cell<Option<Instant>>,
}

impl Refusals {
    /// Writes a refusal, or leaves it out.
    pub(super) fn write(
        &self,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        reason: Reason,
    ) {
        let key = (direction, source.ip(), reason);
        let due = self.throttle.borrow_mut().say(&key, Instant::now());
        if let Some(left_out) = due {
            write_refusal(direction, source, destination, reason, left_out);
        }
    }

    /// Writes that no connection could be accepted, or leaves it out.
    pub(super) fn accept_failed(&self, role: Role, error: &io::Error) {
        let key = (role, error.raw_os_error());
        let due = self.accept_errors.borrow_mut().say(&key, Instant::now());
        if let Some(left_out) = due {
            let role = role.as_str();
            tracing::warn!(role, %error, left_out, "can't accept connections: they wait");
        }
    }

    /// Tells what no later line would tell. To be called now and then.
    pub(super) fn sum_up(&self) {
        let now = Instant::now();
        let mut throttle = self.throttle.borrow_mut();
        for ((direction, peer, reason), left_out) in throttle.overdue(now) {
            tracing::warn!(
                %peer,
                direction = direction.as_str(),
                error = reason.as_str(),
                left_out,
                "connections failed that have no line of their own"
            );
        }
        let summed_up = self.summed_up.get();
        if summed_up.is_some_and(|at| now - at < INTERVAL) {
            return;
        }
        self.summed_up.set(Some(now));
        // Each of these is tried again and again, so that the next line tells of the last ones.
        self.accept_errors.borrow_mut().overdue(now);
        let untold = std::mem::take(&mut throttle.untold);
        if untold > 0 {
            tracing::warn!(left_out = untold, "connections of too many peers failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_an_interval_that_says_how_many_were_left_out() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        assert_eq!(throttle.say(&"flood", now), Some(0));
        for _ in 0..1_000 {
            assert_eq!(throttle.say(&"flood", now), None);
        }
        assert_eq!(throttle.say(&"another", now), Some(0));
        assert_eq!(throttle.say(&"flood", now + INTERVAL), Some(1_000));
        assert_eq!(throttle.say(&"flood", now + INTERVAL), None);
    }

    #[test]
    fn what_was_left_out_is_told_when_the_flood_is_over() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        for _ in 0..3 {
            throttle.say(&"flood", now);
        }
        throttle.say(&"single", now);
        assert_eq!(throttle.overdue(now), []);
        assert_eq!(throttle.overdue(now + INTERVAL), [("flood", 2)]);
        assert!(throttle.said.is_empty());
    }

    #[test]
    fn too_many_peers_take_no_more_memory() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        let told = (0..100_000_u32).filter(|peer| throttle.say(peer, now).is_some());
        assert_eq!(told.count(), MOST);
        assert_eq!(
            (throttle.said.len(), throttle.untold),
            (MOST, 100_000 - MOST as u64)
        );
    }
}
