//! The last connections of a worker that have ended or were refused, for who asks why.
//!
//! Bounded, and no log: connections that ended alike (from one address, to one address and port, for
//! one reason) share an entry, so that a flood of them pushes nothing else out.

use std::{
    cell::RefCell,
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use malla_common::Reason;

use crate::telemetry::Direction;

/// Entries of connections that were refused or reset.
const FAILED: usize = 128;
/// Entries of connections that ended in good order.
const IN_ORDER: usize = 32;

/// Connections that have ended alike.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// The last one's end.
    pub at: SystemTime,
    pub direction: Direction,
    pub source: IpAddr,
    /// What the client dialled.
    pub destination: SocketAddr,
    /// Why; `None`: in good order.
    pub reason: Option<Reason>,
    pub times: u64,
}

impl Ended {
    fn is_like(&self, other: &Self) -> bool {
        self.direction == other.direction
            && self.source == other.source
            && self.destination == other.destination
            && self.reason == other.reason
    }
}

/// A worker's.
#[derive(Debug, Default)]
pub(super) struct LastEnded {
    failed: RefCell<VecDeque<Ended>>,
    in_order: RefCell<VecDeque<Ended>>,
}

impl LastEnded {
    pub(super) fn add(
        &self,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        reason: Option<Reason>,
    ) {
        let ended = Ended {
            at: SystemTime::now(),
            direction,
            source: source.ip(),
            destination,
            reason,
            times: 1,
        };
        let (entries, most) = match reason {
            Some(_) => (&self.failed, FAILED),
            None => (&self.in_order, IN_ORDER),
        };
        push(&mut entries.borrow_mut(), ended, most);
    }

    /// All of them.
    pub(super) fn list(&self) -> Vec<Ended> {
        let failed = self.failed.borrow();
        let in_order = self.in_order.borrow();
        failed.iter().chain(in_order.iter()).copied().collect()
    }
}

fn push(entries: &mut VecDeque<Ended>, ended: Ended, most: usize) {
    // What ends in masses ended a moment ago: the newest are the first to look at.
    let like = entries.iter_mut().rev().find(|old| old.is_like(&ended));
    if let Some(old) = like {
        (old.at, old.times) = (ended.at, old.times + 1);
        return;
    }
    if entries.len() >= most {
        let oldest = (0..entries.len()).min_by_key(|index| entries[*index].at);
        entries.remove(oldest.unwrap_or_default());
    }
    entries.push_back(ended);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_flood_from_one_client_is_one_entry_that_counts() {
        let last = LastEnded::default();
        let to = address("10.1.1.3:8080");
        let reason = Some(Reason::PlaintextRefused);
        last.add(Direction::Inbound, address("10.1.0.9:5"), to, None);
        for port in 1..1_000 {
            let from = SocketAddr::new("10.1.0.2".parse().unwrap(), port);
            last.add(Direction::Inbound, from, to, reason);
        }
        let listed = last.list();
        assert_eq!(listed.len(), 2);
        assert_eq!((listed[0].times, listed[0].reason), (999, reason));
        assert_eq!((listed[1].times, listed[1].reason), (1, None));
    }

    #[test]
    fn the_oldest_end_makes_room_and_what_goes_on_ending_stays() {
        let last = LastEnded::default();
        let from = address("10.1.0.2:5");
        let scan = |port| {
            let to = SocketAddr::new("10.1.1.3".parse().unwrap(), port);
            last.add(Direction::Outbound, from, to, Some(Reason::ConnectRefused));
        };
        for port in 1..=10_000 {
            scan(port);
            scan(1);
        }
        let listed = last.list();
        assert_eq!(listed.len(), FAILED);
        let first = listed.iter().find(|ended| ended.destination.port() == 1);
        assert_eq!(first.map(|ended| ended.times), Some(10_001));
    }
}
