//! The tunnels of one worker in both directions, for who wants to know.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use super::worker::Worker;
use crate::{model::SpiffeId, telemetry::Direction};

/// A tunnel as it was when somebody asked.
#[derive(Debug, Clone)]
pub struct Tunnel {
    pub direction: Direction,
    /// The number of the pod on this node.
    pub pod: u32,
    /// The other end.
    pub peer: SocketAddr,
    /// What the other end has proved to be.
    pub identity: Arc<SpiffeId>,
    /// Connections in it.
    pub streams: usize,
    pub age: Duration,
}

/// What is told of a tunnel while it is open.
pub(super) struct TunnelState {
    direction: Direction,
    pod: u32,
    peer: SocketAddr,
    identity: Arc<SpiffeId>,
    pub(super) streams: Cell<usize>,
    opened: Instant,
}

/// A worker's tunnels.
#[derive(Default)]
pub(super) struct Tunnels {
    open: RefCell<HashMap<u64, Rc<TunnelState>>>,
    next: Cell<u64>,
}

impl Tunnels {
    pub(super) fn list(&self) -> Vec<Tunnel> {
        let open = self.open.borrow();
        let told = open.values().map(|tunnel| Tunnel {
            direction: tunnel.direction,
            pod: tunnel.pod,
            peer: tunnel.peer,
            identity: Arc::clone(&tunnel.identity),
            streams: tunnel.streams.get(),
            age: tunnel.opened.elapsed(),
        });
        told.collect()
    }
}

/// Keeps a tunnel among its worker's.
pub(super) struct OpenTunnel {
    worker: Rc<Worker>,
    number: u64,
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.worker.tunnels.open.borrow_mut().remove(&self.number);
    }
}

impl TunnelState {
    /// A tunnel that has just been opened, and what keeps it among its worker's.
    pub(super) fn open(
        worker: &Rc<Worker>,
        direction: Direction,
        pod: u32,
        peer: SocketAddr,
        identity: Arc<SpiffeId>,
    ) -> (Rc<Self>, OpenTunnel) {
        let state = Rc::new(Self {
            direction,
            pod,
            peer,
            identity,
            streams: Cell::new(0),
            opened: Instant::now(),
        });
        let tunnels = &worker.tunnels;
        let number = tunnels.next.get();
        tunnels.next.set(number + 1);
        tunnels.open.borrow_mut().insert(number, Rc::clone(&state));
        let worker = Rc::clone(worker);
        (state, OpenTunnel { worker, number })
    }

    /// Counts a connection in it until the value is dropped.
    pub(super) fn stream(self: &Rc<Self>) -> Stream {
        self.streams.set(self.streams.get() + 1);
        Stream(Rc::clone(self))
    }
}

/// A connection in a tunnel.
pub(super) struct Stream(Rc<TunnelState>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}
