//! A worker: a thread that runs one `current_thread` runtime and owns its connections.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use malla_common::{Flow, Reason, WorkerLoad};
use tokio::{
    runtime::{self, LocalOptions, LocalRuntime},
    sync::{mpsc, oneshot},
    task::spawn_local,
};

use super::{
    accept,
    balance::Balancer,
    buffers::Buffers,
    ended::LastEnded,
    handshakes::Handshakes,
    load::{self, Board, InboundTunnels},
    neighbours::Neighbours,
    pod::PodContext,
    pool::Pool,
    refusals::Refusals,
    tunnels::Tunnels,
    turns::Turns,
    witness::Witnesses,
    workers::{Command, Shared},
};
use crate::{
    identity::Certificates,
    model::{Mesh, WorkloadId},
    steer::{OwnDial, WorkerHandles},
    telemetry::{Direction, Metrics, Role, WorkerMetrics},
};

/// One worker's world. Single-threaded: cells, no locks.
pub(super) struct Worker {
    shared: Shared,
    mesh: RefCell<Arc<Mesh>>,
    pub(super) own_dial: RefCell<OwnDial>,
    pub(super) scopes: RefCell<BpfHashMap<MapData, Flow, u32>>,
    loads: RefCell<Array<MapData, WorkerLoad>>,
    pub(super) series: RefCell<WorkerMetrics>,
    pub(super) buffers: Buffers,
    pub(super) balancer: Balancer,
    pub(super) pool: Pool,
    pub(super) neighbours: Neighbours,
    pub(super) handshakes: Handshakes,
    pub(super) inbound_tunnels: InboundTunnels,
    pub(super) tunnels: Tunnels,
    pub(super) board: Arc<Board>,
    refusals: Refusals,
    pub(super) ended: Rc<LastEnded>,
    turns: Turns,
    pods: RefCell<HashMap<u32, Rc<PodContext>>>,
    /// The pods by what discovery calls them.
    enrolled: RefCell<HashMap<WorkloadId, Rc<PodContext>>>,
    connections: Cell<u32>,
    live: Arc<AtomicU32>,
    leaving: Cell<bool>,
}

/// A connection that is counted as this worker's load while it lives.
pub(super) struct Live {
    worker: Rc<Worker>,
}

impl Live {
    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.worker
            .connections
            .set(self.worker.connections.get() - 1);
        self.worker.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    /// The mesh as discovery last told it.
    pub(super) fn mesh(&self) -> Arc<Mesh> {
        Arc::clone(&self.mesh.borrow())
    }

    pub(super) fn certificates(&self) -> &Certificates {
        &self.shared.certificates
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    pub(super) fn witnesses(&self) -> &Arc<Witnesses> {
        &self.shared.witnesses
    }

    /// A pod that this agent serves.
    pub(super) fn enrolled(&self, workload: &WorkloadId) -> Option<Rc<PodContext>> {
        self.enrolled.borrow().get(workload).map(Rc::clone)
    }

    pub(super) fn count_live(self: &Rc<Self>) -> Live {
        self.connections.set(self.connections.get() + 1);
        self.live.fetch_add(1, Ordering::Relaxed);
        Live {
            worker: Rc::clone(self),
        }
    }

    /// Connections of this worker that live.
    pub(super) fn connections(&self) -> u32 {
        self.connections.get()
    }

    /// Counts and writes that a connection was refused before anything but its ends was known.
    pub(super) fn refuse(
        &self,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        reason: Reason,
    ) {
        self.metrics().refused(direction, reason);
        self.ended.add(direction, source, destination, Some(reason));
        self.refusals.write(direction, source, destination, reason);
    }

    /// Counts and writes that no connection could be accepted.
    pub(super) fn accept_failed(&self, role: Role, error: &io::Error) {
        self.metrics().accept_error(role, error);
        self.refusals.accept_failed(role, error);
    }

    /// Tells the kernel how loaded this worker is, for the choice of the next connection's worker.
    pub(super) fn tell_kernel(&self, index: usize, load: WorkerLoad) -> bool {
        // At most `MAX_WORKERS`.
        let slot = u32::try_from(index).unwrap_or(0);
        self.loads.borrow_mut().set(slot, load, 0).is_ok()
    }

    /// What is done now and then.
    pub(super) fn at_interval(&self) {
        self.pool.sweep();
        self.refusals.sum_up();
        self.buffers.joined.sweep();
    }

    /// Whether it takes no new connections from now on.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    fn leave(self: &Rc<Self>, grace: Duration) {
        self.leaving.set(true);
        self.inbound_tunnels.hand_over_all_of(None);
        let worker = Rc::clone(self);
        spawn_local(async move {
            tokio::time::sleep(grace).await;
            for pod in worker.pods.borrow().values() {
                pod.accepting().cancel();
            }
        });
    }

    fn remove(&self, pod: u32, done: oneshot::Sender<()>) {
        if let Some(context) = self.pods.borrow_mut().remove(&pod) {
            context.withdrawn.set(true);
            self.turns.remove(&context.tasks);
            self.enrolled
                .borrow_mut()
                .retain(|_, enrolled| !Rc::ptr_eq(enrolled, &context));
        }
        self.pool.remove_pod(pod);
        // What other pods of this node have open to it are tasks of theirs.
        let cut = self.neighbours.remove_pod(pod, Reason::Withdrawn);
        spawn_local(async move {
            for pair in cut {
                pair.ended().await;
            }
            // Who asked may be gone.
            let _ = done.send(());
        });
    }

    fn obey(self: &Rc<Self>, command: Command) {
        match command {
            Command::Add {
                pod,
                workload,
                listeners,
                counts,
            } => {
                let id = pod.id;
                let name = workload.id.clone();
                let context = PodContext::new(pod, workload, self.turns.add(), counts);
                accept::serve(self, &context, listeners);
                self.enrolled.borrow_mut().insert(name, Rc::clone(&context));
                if let Some(old) = self.pods.borrow_mut().insert(id, context) {
                    old.accepting().cancel();
                }
            }
            Command::Update { workload } => {
                for pod in self.pods.borrow().values() {
                    if pod.workload().id == workload.id {
                        pod.update(&workload);
                    }
                }
            }
            Command::Remove { pod, done } => self.remove(pod, done),
            Command::HandOver { pod } => {
                if let Some(context) = self.pods.borrow().get(&pod) {
                    context.leaving.set(true);
                }
                self.inbound_tunnels.hand_over_all_of(Some(pod));
            }
            Command::Relisten { pod, listeners } => {
                if let Some(context) = self.pods.borrow().get(&pod) {
                    context.accepting.take().cancel();
                    accept::serve(self, context, listeners);
                }
            }
            Command::Leave { grace } => self.leave(grace),
            // Who asked may be gone.
            Command::ListTunnels { told } => drop(told.send(self.tunnels.list())),
            Command::ListNeighbours { told } => drop(told.send(self.neighbours.list())),
            Command::ListEnded { told } => drop(told.send(self.ended.list())),
        }
    }
}

pub(super) fn make_runtime() -> std::io::Result<LocalRuntime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
}

pub(super) fn run(
    runtime: &LocalRuntime,
    index: usize,
    shared: Shared,
    board: Arc<Board>,
    handles: WorkerHandles,
    live: Arc<AtomicU32>,
    mut commands: mpsc::Receiver<Command>,
) {
    let mesh = Arc::clone(&shared.mesh.borrow());
    let worker = Rc::new(Worker {
        mesh: RefCell::new(mesh),
        own_dial: RefCell::new(handles.own_dial),
        scopes: RefCell::new(handles.scopes),
        loads: RefCell::new(handles.loads),
        series: RefCell::new(shared.metrics.worker()),
        buffers: Buffers::new(handles.queues),
        balancer: Balancer::new(shared.balance.clone()),
        pool: Pool::default(),
        neighbours: Neighbours::default(),
        handshakes: Handshakes::default(),
        inbound_tunnels: InboundTunnels::default(),
        tunnels: Tunnels::default(),
        board,
        refusals: Refusals::default(),
        ended: Rc::default(),
        turns: Turns::default(),
        pods: RefCell::default(),
        enrolled: RefCell::default(),
        connections: Cell::new(0),
        live,
        leaving: Cell::new(false),
        shared,
    });
    runtime.spawn_local(follow_mesh(Rc::clone(&worker)));
    runtime.spawn_local(load::watch(Rc::clone(&worker), index));
    let driven = Rc::clone(&worker);
    runtime.spawn_local(async move { driven.turns.run().await });
    runtime.block_on(async {
        while let Some(command) = commands.recv().await {
            worker.obey(command);
        }
        // They hold the worker that holds them.
        worker.turns.clear();
    });
}

async fn follow_mesh(worker: Rc<Worker>) {
    let mut mesh = worker.shared.mesh.clone();
    while mesh.changed().await.is_ok() {
        *worker.mesh.borrow_mut() = Arc::clone(&mesh.borrow_and_update());
        worker.series.borrow_mut().forget();
        worker.balancer.forget();
    }
}
