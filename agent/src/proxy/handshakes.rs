//! Limits on TLS handshakes, which cost a stranger nothing and the agent much.
//!
//! The worker's places are shared by the pods that are dialled: a pod may hold as many as are free.
//! So a flood of handshakes with one pod leaves half of the places to the others, with two of them
//! a third, and so on: the last place goes to a pod that has none.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    net::IpAddr,
    time::Duration,
};

/// Handshakes in flight, a worker.
const MAX_IN_FLIGHT: usize = 64;
/// Handshakes in flight from one source address, a worker.
const MAX_FROM_SOURCE: usize = 16;
/// How long a handshake may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// The handshakes that one worker has in flight.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    in_flight: Cell<usize>,
    by_pod: Counts<u32>,
    by_source: Counts<IpAddr>,
}

/// How many of each there are; none of what isn't there.
#[derive(Debug)]
struct Counts<K>(RefCell<HashMap<K, usize>>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<K: Hash + Eq + Copy> Counts<K> {
    fn of(&self, key: K) -> usize {
        self.0.borrow().get(&key).copied().unwrap_or(0)
    }

    fn add(&self, key: K) {
        *self.0.borrow_mut().entry(key).or_default() += 1;
    }

    fn remove(&self, key: K) {
        if let Entry::Occupied(mut count) = self.0.borrow_mut().entry(key) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// One handshake in flight.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    handshakes: &'a Handshakes,
    pod: u32,
    source: IpAddr,
}

impl Handshakes {
    /// A place for one more handshake of `source` with `pod`. None when a limit is reached.
    pub(super) fn begin(&self, pod: u32, source: IpAddr) -> Option<Slot<'_>> {
        let free = MAX_IN_FLIGHT - self.in_flight.get();
        if self.by_pod.of(pod) >= free || self.by_source.of(source) >= MAX_FROM_SOURCE {
            return None;
        }
        self.by_pod.add(pod);
        self.by_source.add(source);
        self.in_flight.set(self.in_flight.get() + 1);
        Some(Slot {
            handshakes: self,
            pod,
            source,
        })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.handshakes
            .in_flight
            .set(self.handshakes.in_flight.get() - 1);
        self.handshakes.by_pod.remove(self.pod);
        self.handshakes.by_source.remove(self.source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> impl Iterator<Item = IpAddr> {
        (0..=255).map(|last| IpAddr::from([10, 0, 0, last]))
    }

    #[test]
    fn one_source_can_not_take_every_place() {
        let handshakes = Handshakes::default();
        let flood = IpAddr::from([10, 0, 0, 1]);
        let taken: Vec<_> = (0..100).map_while(|_| handshakes.begin(1, flood)).collect();
        assert_eq!(taken.len(), MAX_FROM_SOURCE);
        assert!(handshakes.begin(1, IpAddr::from([10, 0, 0, 2])).is_some());
        drop(taken);
        assert!(handshakes.begin(1, flood).is_some());
        assert!(
            handshakes.by_source.0.borrow().is_empty(),
            "a source that ended is forgotten"
        );
    }

    #[test]
    fn a_flood_on_one_pod_leaves_places_to_the_others() {
        let handshakes = Handshakes::default();
        let flood = |pod| sources().map_while(move |source| Some((pod, source)));
        let mut taken = Vec::new();
        let mut take = |pod| {
            let before = taken.len();
            taken.extend(flood(pod).filter_map(|(pod, from)| handshakes.begin(pod, from)));
            taken.len() - before
        };
        assert_eq!([take(1), take(2), take(3)], [32, 16, 8]);
        assert_eq!(take(1), 0);
    }

    #[test]
    fn every_place_can_be_taken_and_no_more() {
        let handshakes = Handshakes::default();
        let taken: Vec<_> = sources()
            .zip(0..)
            .filter_map(|(source, pod)| handshakes.begin(pod, source))
            .collect();
        assert_eq!(taken.len(), MAX_IN_FLIGHT);
        drop(taken);
        assert_eq!(handshakes.in_flight.get(), 0);
        assert!(handshakes.by_pod.0.borrow().is_empty());
    }
}
