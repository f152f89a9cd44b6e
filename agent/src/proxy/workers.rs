//! The workers as the rest of the agent has them: started, told, asked and ended together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    balance::Balance, ended::Ended, load::Board, neighbours::Neighbour, pod::PodConnections,
    tunnels::Tunnel, witness::Witnesses, worker,
};
use crate::{
    identity::Certificates,
    model::{Mesh, Workload},
    steer::{Pod, PodListeners, WorkerHandles},
    telemetry::Metrics,
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

pub(super) enum Command {
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
    ListNeighbours {
        told: oneshot::Sender<Vec<Neighbour>>,
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
                    let (runtime, result) = match worker::make_runtime() {
                        Ok(runtime) => (Some(runtime), Ok(())),
                        Err(error) => (None, Err(error)),
                    };
                    let _ = started.send(result);
                    if let Some(runtime) = runtime {
                        worker::run(&runtime, index, shared, board, handles, live, receiver);
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

    /// The pairs of pods that speak through memory, over all workers.
    pub fn neighbours(&self) -> impl Future<Output = Vec<Neighbour>> + Send + use<> {
        self.ask(|told| Command::ListNeighbours { told })
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
