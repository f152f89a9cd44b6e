//! The workers: threads that each run one `current_thread` runtime and own their connections.

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
    thread,
    time::Duration,
};

use anyhow::Context;
use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use malla_common::{Flow, Reason, WorkerLoad};
use tokio::{
    runtime::{self, LocalOptions, LocalRuntime},
    sync::{mpsc, oneshot, watch},
    task::spawn_local,
};

use super::{
    accept,
    balance::{Balance, Balancer},
    buffers::Buffers,
    ended::{Ended, LastEnded},
    handshakes::Handshakes,
    load::{self, Board, InboundTunnels},
    neighbours::Neighbours,
    pod::{PodConnections, PodContext},
    pool::Pool,
    refusals::Refusals,
    tunnels::{Tunnel, Tunnels},
    turns::Turns,
    witness::Witnesses,
};
use crate::{
    identity::Certificates,
    model::{Mesh, Workload, WorkloadId},
    steer::{OwnDial, Pod, PodListeners, WorkerHandles},
    telemetry::{Direction, Metrics, Role, WorkerMetrics},
};

/// Commands that wait for a worker.
const QUEUE: usize = 1024;

/// What every worker needs, made once.
#[derive(Clone)]
pub struct Shared {
    pub mesh: watch::Receiver<Arc<Mesh>>,
    pub certificates: Arc<Certificates>,
    pub metrics: Arc<Metrics>,
    pub witnesses: Arc<Witnesses>,
    pub balance: Balance,
}

/// The running workers. Dropping them ends their threads and with them every connection.
pub struct Workers {
    commands: Vec<mpsc::Sender<Command>>,
    threads: Vec<thread::JoinHandle<()>>,
    live: Arc<AtomicU32>,
}

enum Command {
    Add {
        pod: Arc<Pod>,
        workload: Arc<Workload>,
        listeners: PodListeners,
        counts: PodConnections,
    },
    Update {
        workload: Arc<Workload>,
    },
    Remove {
        pod: u32,
        done: oneshot::Sender<()>,
    },
    HandOver {
        pod: u32,
    },
    Relisten {
        pod: u32,
        listeners: PodListeners,
    },
    Leave {
        grace: Duration,
    },
    ListTunnels {
        told: oneshot::Sender<Vec<Tunnel>>,
    },
    ListEnded {
        told: oneshot::Sender<Vec<Ended>>,
    },
}

impl Workers {
    pub fn start(
        shared: &Shared,
        handles: impl IntoIterator<Item = WorkerHandles>,
    ) -> anyhow::Result<Self> {
        let live = Arc::new(AtomicU32::new(0));
        let mut workers = Self {
            commands: Vec::new(),
            threads: Vec::new(),
            live,
        };
        let handles: Vec<WorkerHandles> = handles.into_iter().collect();
        let board = Arc::new(Board::new(handles.len()));
        let (started, starts) = std::sync::mpsc::channel();
        for (index, handles) in handles.into_iter().enumerate() {
            let (sender, receiver) = mpsc::channel(QUEUE);
            let (shared, live) = (shared.clone(), Arc::clone(&workers.live));
            let (board, started) = (Arc::clone(&board), started.clone());
            let thread = thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let (runtime, result) = match make_runtime() {
                        Ok(runtime) => (Some(runtime), Ok(())),
                        Err(error) => (None, Err(error)),
                    };
                    let _ = started.send(result);
                    if let Some(runtime) = runtime {
                        run(&runtime, index, shared, board, handles, live, receiver);
                    }
                })
                .context("can't start a worker thread")?;
            workers.commands.push(sender);
            workers.threads.push(thread);
        }
        // An agent is not ready before all its workers are.
        for _ in &workers.threads {
            starts
                .recv()?
                .context("can't start the runtime of a worker")?;
        }
        Ok(workers)
    }

    /// Serves a pod: worker N takes the Nth set of listeners.
    pub async fn add(
        &self,
        pod: &Arc<Pod>,
        workload: &Arc<Workload>,
        listeners: Vec<PodListeners>,
    ) -> PodConnections {
        let counts = PodConnections::default();
        for (worker, listeners) in self.commands.iter().zip(listeners) {
            let (pod, workload) = (Arc::clone(pod), Arc::clone(workload));
            let counts = counts.clone();
            let _ = worker
                .send(Command::Add {
                    pod,
                    workload,
                    listeners,
                    counts,
                })
                .await;
        }
        counts
    }

    /// Puts a workload's changed settings in force for its next connections.
    pub async fn update(&self, workload: &Arc<Workload>) {
        for worker in &self.commands {
            let _ = worker
                .send(Command::Update {
                    workload: Arc::clone(workload),
                })
                .await;
        }
    }

    /// Ends a pod's listeners, tunnels and connections. When this returns they are over, and their
    /// apps have been told.
    pub async fn remove(&self, pod: &Pod) {
        let mut ends = Vec::new();
        for worker in &self.commands {
            let (done, end) = oneshot::channel();
            let _ = worker.send(Command::Remove { pod: pod.id, done }).await;
            ends.push(end);
        }
        for end in ends {
            // A worker that has ended holds nothing.
            let _ = end.await;
        }
    }

    /// Asks a pod's peers to open no more streams to it here.
    pub async fn hand_over(&self, pod: &Pod) {
        for worker in &self.commands {
            let _ = worker.send(Command::HandOver { pod: pod.id }).await;
        }
    }

    /// Accepts a pod's connections on new listeners from now on, which have taken the place of dead
    /// ones: worker N takes the Nth set.
    pub async fn relisten(&self, pod: &Pod, listeners: Vec<PodListeners>) {
        for (worker, listeners) in self.commands.iter().zip(listeners) {
            let pod = pod.id;
            let _ = worker.send(Command::Relisten { pod, listeners }).await;
        }
    }

    /// Closes all listeners after `grace`, and asks peers to open no more streams; what is
    /// connected goes on.
    pub async fn leave(&self, grace: Duration) {
        for worker in &self.commands {
            let _ = worker.send(Command::Leave { grace }).await;
        }
    }

    /// The tunnels that are open, over all workers.
    pub fn tunnels(&self) -> impl Future<Output = Vec<Tunnel>> + Send + use<> {
        self.ask(|told| Command::ListTunnels { told })
    }

    /// The last connections that ended or were refused, over all workers.
    pub fn ended(&self) -> impl Future<Output = Vec<Ended>> + Send + use<> {
        self.ask(|told| Command::ListEnded { told })
    }

    fn ask<T: Send + 'static>(
        &self,
        command: fn(oneshot::Sender<Vec<T>>) -> Command,
    ) -> impl Future<Output = Vec<T>> + Send + use<T> {
        let workers = self.commands.clone();
        async move {
            let mut all = Vec::new();
            for worker in workers {
                let (told, tells) = oneshot::channel();
                // Fails only with the worker, which then has none.
                let _ = worker.send(command(told)).await;
                all.extend(tells.await.unwrap_or_default());
            }
            all
        }
    }

    /// Connections that live, over all workers.
    pub fn live_connections(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.commands.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

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
            Command::ListEnded { told } => drop(told.send(self.ended.list())),
        }
    }
}

fn make_runtime() -> std::io::Result<LocalRuntime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        // How long tasks run before sockets are looked at is for `turns` to say.
        .event_interval(1)
        .build_local(LocalOptions::default())
}

fn run(
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
        buffers: Buffers::default(),
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
