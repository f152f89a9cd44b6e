//! Source ports of the agent towards the app of one pod.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use super::diag::{Held, SocketDiag};
use crate::model::PortRange;

/// Source ports towards the app of one pod, shared by all workers.
///
/// They go round the whole range before one comes again, so that its last connection is as long
/// gone as can be. A SYN to a connection that the app's side of a tuple still has isn't let through
/// (`ebpf/loopback.rs`). As soon as a client has used a port of the range itself, the kernel is asked
/// before: it may have left a connection in `TIME_WAIT`, whose clock is another.
#[derive(Debug)]
pub struct DialPorts {
    range: PortRange,
    /// Ports of the range that something else has, in order.
    taken: Vec<u16>,
    next: AtomicU32,
    /// Whether clients use ports of the range themselves.
    overlaps: AtomicBool,
    diag: SocketDiag,
}

impl DialPorts {
    /// The ports of `range` but those in `taken`. To be made in the pod's netns.
    pub fn new(range: PortRange, taken: impl Fn(u16) -> bool) -> io::Result<Self> {
        let taken = (range.first..=range.last).filter(|port| taken(*port));
        Ok(Self {
            range,
            taken: taken.collect(),
            next: AtomicU32::new(fastrand::u32(..)),
            overlaps: AtomicBool::new(false),
            diag: SocketDiag::open()?,
        })
    }

    /// How many ports it has.
    fn free(&self) -> u32 {
        let all = u32::from(self.range.last) + 1 - u32::from(self.range.first);
        // No more than all of the range.
        all - u32::try_from(self.taken.len()).unwrap_or(all)
    }

    /// Tells that a client connects to this pod with a source port of its own choice.
    pub fn met_client(&self, port: u16) {
        if self.range.contains(port) {
            self.overlaps.store(true, Ordering::Relaxed);
        }
    }

    /// Whether clients use ports of the range themselves.
    pub(super) fn overlaps(&self) -> bool {
        self.overlaps.load(Ordering::Relaxed)
    }

    /// The next port. None when the range is empty.
    pub(super) fn next(&self) -> Option<u16> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let mut port = u32::from(self.range.first) + turn.checked_rem(self.free())?;
        for taken in &self.taken {
            if u32::from(*taken) > port {
                break;
            }
            port += 1;
        }
        u16::try_from(port).ok()
    }

    /// Whether a connection at the app's end is in the way of this tuple, which has been announced
    /// already, so that none can come from now on. Asked of the kernel where clients use such ports: one
    /// that is over may have been the client's, and is in the way unless there is nothing better
    /// (`pressed`). One that was the agent's is in nobody's way (RFC 6191).
    pub(super) fn is_blocked(&self, source: SocketAddr, app: SocketAddr, pressed: bool) -> bool {
        self.overlaps()
            && match self.holder(source, app) {
                Held::No => false,
                Held::TimeWait => !pressed,
                Held::Answered | Held::Connection => true,
            }
    }

    /// What at the app's end has this tuple.
    pub(super) fn holder(&self, source: SocketAddr, app: SocketAddr) -> Held {
        self.diag.find(app, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_free_port_comes_once_a_round() {
        let range = PortRange {
            first: 10,
            last: 20,
        };
        let ports = DialPorts::new(range, |port| [10, 13, 14, 20].contains(&port)).unwrap();
        for _ in 0..3 {
            let mut round: Vec<u16> = (0..7).map(|_| ports.next().unwrap()).collect();
            round.sort_unstable();
            assert_eq!(round, [11, 12, 15, 16, 17, 18, 19]);
        }
        let none = DialPorts::new(range, |_| true).unwrap();
        assert_eq!(none.next(), None);
    }
}
