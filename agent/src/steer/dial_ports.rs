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
/// gone as can be. From the second round on, and as soon as a client has used a port of the range
/// itself, the kernel is asked whether the app's side of a tuple is free: a connection that is
/// closed on one side, or a client's own, would answer the SYN in the app's stead.
#[derive(Debug)]
pub struct DialPorts {
    range: PortRange,
    ports: Vec<u16>,
    next: AtomicU32,
    /// Ports that haven't been used yet.
    first_round: AtomicU32,
    /// Whether clients use ports of the range themselves.
    overlaps: AtomicBool,
    diag: SocketDiag,
}

impl DialPorts {
    /// The ports of `range` but those in `taken`. To be made in the pod's netns.
    pub fn new(range: PortRange, taken: impl Fn(u16) -> bool) -> io::Result<Self> {
        let ports: Vec<u16> = (range.first..=range.last)
            .filter(|port| !taken(*port))
            .collect();
        let first_round = u32::try_from(ports.len()).unwrap_or(0);
        Ok(Self {
            range,
            ports,
            next: AtomicU32::new(fastrand::u32(..)),
            first_round: AtomicU32::new(first_round),
            overlaps: AtomicBool::new(false),
            diag: SocketDiag::open()?,
        })
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
        let turn = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        self.ports.get(turn.checked_rem(self.ports.len())?).copied()
    }

    /// Whether a connection at the app's end is in the way of this tuple, which has been announced
    /// already, so that none can come from now on. A connection that was the agent's and is over
    /// is in nobody's way (RFC 6191); one that may have been the client's, whose clock is another,
    /// is, unless there is nothing better (`pressed`).
    pub(super) fn is_blocked(&self, source: SocketAddr, app: SocketAddr, pressed: bool) -> bool {
        let overlaps = self.overlaps();
        let first_round = |left: u32| left.checked_sub(1);
        let first =
            self.first_round
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, first_round);
        if first.is_ok() && !overlaps {
            return false;
        }
        match self.holder(source, app) {
            Held::No => false,
            Held::TimeWait => overlaps && !pressed,
            Held::Answered | Held::Connection => true,
        }
    }

    /// What at the app's end has this tuple.
    pub(super) fn holder(&self, source: SocketAddr, app: SocketAddr) -> Held {
        self.diag.find(app, source)
    }
}
