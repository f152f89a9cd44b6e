//! A worker's tunnels, one pool for each pair of source pod and destination.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    net::IpAddr,
    rc::Rc,
    time::Duration,
};

use http::Request;
use malla_common::Reason;
use tokio::sync::oneshot;

use super::{
    hbone,
    pod::PodContext,
    tunnel::{self, Lease, OpenError, Requested, Tunnel},
    worker::Worker,
};
use crate::model::SpiffeId;

/// A tunnel that no stream uses for so long is closed.
const UNUSED_LIMIT: Duration = Duration::from_mins(5);
/// `sweep` looks at every this many calls.
const SWEEP_EVERY: u32 = 50;

/// Who speaks to whom: a tunnel proves both identities, so it serves no other pair.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Pair {
    pod: u32,
    destination: IpAddr,
    identity: SpiffeId,
}

struct Tunnels {
    open: Vec<Rc<Tunnel>>,
    /// Streams that a new tunnel is filled with: what the peer said in others, since its SETTINGS
    /// come after the first streams.
    limit: usize,
    /// Tunnels that are being opened.
    opening: usize,
    waiting: VecDeque<Waiting>,
}

/// A request that no tunnel has room for yet.
struct Waiting {
    request: Request<()>,
    requested: oneshot::Sender<Result<Requested, OpenError>>,
}

impl Default for Tunnels {
    fn default() -> Self {
        Self {
            open: Vec::new(),
            limit: hbone::FIRST_STREAMS,
            opening: 0,
            waiting: VecDeque::new(),
        }
    }
}

impl Tunnels {
    fn lease(&mut self) -> Option<Lease> {
        self.open.retain(|tunnel| !tunnel.is_ended());
        let said = self.open.iter().map(|tunnel| tunnel.max_streams()).min();
        // A peer that allows none for now is asked all the same: it may again.
        self.limit = self.limit.min(said.unwrap_or(self.limit)).max(1);
        self.open.iter().find_map(|tunnel| tunnel.lease(self.limit))
    }
}

/// All pools of one worker.
#[derive(Default)]
pub(super) struct Pool {
    pairs: RefCell<HashMap<Pair, Rc<RefCell<Tunnels>>>>,
    sweeps: Cell<u32>,
}

impl Pool {
    /// Drops what nobody uses any more.
    pub(super) fn sweep(&self) {
        self.sweeps.set(self.sweeps.get() + 1);
        if !self.sweeps.get().is_multiple_of(SWEEP_EVERY) {
            return;
        }
        self.pairs.borrow_mut().retain(|_, tunnels| {
            let mut tunnels = tunnels.borrow_mut();
            tunnels
                .open
                .retain(|tunnel| !tunnel.is_ended() && !tunnel.is_unused_for(UNUSED_LIMIT));
            !tunnels.open.is_empty() || tunnels.opening > 0 || !tunnels.waiting.is_empty()
        });
    }

    /// Forgets the tunnels of a pod that was withdrawn.
    pub(super) fn remove_pod(&self, pod: u32) {
        self.pairs.borrow_mut().retain(|pair, _| pair.pod != pod);
    }
}

/// Opens a stream from `pod` to `identity` at `destination`, in a tunnel that is there or in a new
/// one. Who waits for a new one holds up nobody else, and isn't overtaken by who comes later.
pub(super) async fn request(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    destination: IpAddr,
    identity: &SpiffeId,
    request: Request<()>,
) -> Result<Requested, OpenError> {
    let pair = Pair {
        pod: pod.pod.id,
        destination,
        identity: identity.clone(),
    };
    let tunnels = Rc::clone(worker.pool.pairs.borrow_mut().entry(pair).or_default());
    let waiting = {
        let mut pool = tunnels.borrow_mut();
        if pool.waiting.is_empty()
            && let Some(lease) = pool.lease()
        {
            return lease.request(request);
        }
        let (requested, receiver) = oneshot::channel();
        pool.waiting.push_back(Waiting { request, requested });
        receiver
    };
    open_for_waiting(worker, pod, destination, identity, &tunnels);
    waiting
        .await
        .unwrap_or_else(|_| Err(OpenError::Failed(Reason::TunnelLost.into())))
}

/// Opens as many tunnels as those that wait will fill.
fn open_for_waiting(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    destination: IpAddr,
    identity: &SpiffeId,
    tunnels: &Rc<RefCell<Tunnels>>,
) {
    let mut pool = tunnels.borrow_mut();
    let needed = pool.waiting.len().div_ceil(pool.limit);
    while pool.opening < needed {
        pool.opening += 1;
        let (worker, opener, identity) = (Rc::clone(worker), Rc::clone(pod), identity.clone());
        let tunnels = Rc::clone(tunnels);
        pod.spawn(async move {
            let pod = opener;
            let result = tunnel::open(&worker, &pod, destination, &identity).await;
            let mut pool = tunnels.borrow_mut();
            pool.opening -= 1;
            match result {
                Ok(tunnel) => {
                    pool.open.push(tunnel);
                    serve_waiting(&mut pool);
                    drop(pool);
                    open_for_waiting(&worker, &pod, destination, &identity, &tunnels);
                }
                Err(failure) => {
                    serve_waiting(&mut pool);
                    // Those that no tunnel has room for, and none is being opened for, share the
                    // failure; the next one tries anew.
                    if pool.opening == 0 {
                        for waiting in pool.waiting.drain(..) {
                            let _ = waiting.requested.send(Err(OpenError::Failed(failure)));
                        }
                    }
                }
            }
        });
    }
}

/// Makes the requests of those that wait, in their order: one that did so itself, once woken, would
/// come behind those that have come meanwhile.
fn serve_waiting(pool: &mut Tunnels) {
    while let Some(waiting) = pool.waiting.pop_front() {
        if waiting.requested.is_closed() {
            continue;
        }
        let Some(lease) = pool.lease() else {
            pool.waiting.push_front(waiting);
            return;
        };
        // The stream is reset where the connection is gone meanwhile.
        let _ = waiting.requested.send(lease.request(waiting.request));
    }
}
