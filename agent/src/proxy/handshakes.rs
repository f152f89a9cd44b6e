//! Limits on TLS handshakes, which cost a stranger nothing and the agent much.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
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
    by_source: RefCell<HashMap<IpAddr, usize>>,
}

/// One handshake in flight.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    handshakes: &'a Handshakes,
    source: IpAddr,
}

impl Handshakes {
    /// A place for one more handshake with `source`. None when a limit is reached.
    pub(super) fn begin(&self, source: IpAddr) -> Option<Slot<'_>> {
        let mut by_source = self.by_source.borrow_mut();
        let from_source = by_source.get(&source).copied().unwrap_or(0);
        if self.in_flight.get() >= MAX_IN_FLIGHT || from_source >= MAX_FROM_SOURCE {
            return None;
        }
        by_source.insert(source, from_source + 1);
        self.in_flight.set(self.in_flight.get() + 1);
        Some(Slot {
            handshakes: self,
            source,
        })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.handshakes
            .in_flight
            .set(self.handshakes.in_flight.get() - 1);
        let mut by_source = self.handshakes.by_source.borrow_mut();
        match by_source.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_can_not_take_every_place() {
        let handshakes = Handshakes::default();
        let flood = IpAddr::from([10, 0, 0, 1]);
        let taken: Vec<_> = (0..100).map_while(|_| handshakes.begin(flood)).collect();
        assert_eq!(taken.len(), MAX_FROM_SOURCE);
        assert!(handshakes.begin(IpAddr::from([10, 0, 0, 2])).is_some());
        drop(taken);
        assert!(handshakes.begin(flood).is_some());
        assert!(
            handshakes.by_source.borrow().is_empty(),
            "a source that ended is forgotten"
        );
    }

    #[test]
    fn many_sources_meet_the_workers_limit() {
        let handshakes = Handshakes::default();
        let taken: Vec<_> = (0..=255)
            .filter_map(|last| handshakes.begin(IpAddr::from([10, 0, 0, last])))
            .collect();
        assert_eq!(taken.len(), MAX_IN_FLIGHT);
        drop(taken);
        assert_eq!(handshakes.in_flight.get(), 0);
    }
}
