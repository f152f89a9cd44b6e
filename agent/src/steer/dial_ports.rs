//! Source ports of the agent towards the app of one pod.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use super::diag::{Held, SocketDiag};
use crate::model::PortRange;

/// Ports that are looked at for one connection before it is given up: every one of them was held by
/// a connection of the same client to the same address.
const PORT_TRIES: u32 = 64;

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

    /// A port for a connection of `client` to `app` whose tuple no connection of the pod's netns
    /// holds. One that was the agent's and is over may be used again (RFC 6191); one that may have
    /// been the client's, whose clock is another, only when there is no better.
    pub(super) fn next(&self, client: IpAddr, app: SocketAddr) -> Option<u16> {
        let mut over = None;
        for _ in 0..PORT_TRIES {
            let turn = self.next.fetch_add(1, Ordering::Relaxed) as usize;
            let port = *self.ports.get(turn.checked_rem(self.ports.len())?)?;
            let overlaps = self.overlaps.load(Ordering::Relaxed);
            let first_round = |left: u32| left.checked_sub(1);
            let first =
                self.first_round
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, first_round);
            if first.is_ok() && !overlaps {
                return Some(port);
            }
            match self.diag.find(app, SocketAddr::new(client, port)) {
                Held::No => return Some(port),
                Held::TimeWait if !overlaps => return Some(port),
                Held::TimeWait => over = over.or(Some(port)),
                Held::Connection => {}
            }
        }
        over
    }

    /// Whether a connection at the app's end has this tuple.
    pub(super) fn is_held(&self, client: IpAddr, port: u16, app: SocketAddr) -> bool {
        self.diag.find(app, SocketAddr::new(client, port)) == Held::Connection
    }
}
