//! A pod as one worker serves it, and what all workers count of it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use futures_util::FutureExt;
use malla_common::Reason;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::turns::Tasks;
use crate::{model::Workload, steer::Pod};

/// What lives of a pod, on all workers.
#[derive(Debug, Clone, Default)]
pub struct PodConnections(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Connections and tunnels that were accepted.
    open: AtomicU32,
    tasks: AtomicU32,
}

impl PodConnections {
    /// Connections and tunnels that were accepted.
    pub fn count(&self) -> u32 {
        self.0.open.load(Ordering::Relaxed)
    }

    /// Tasks: one for each listener, and those of connections and tunnels.
    pub fn tasks(&self) -> u32 {
        self.0.tasks.load(Ordering::Relaxed)
    }
}

/// A pod as one worker serves it.
pub(super) struct PodContext {
    pub(super) pod: Arc<Pod>,
    workload: RefCell<Arc<Workload>>,
    /// Ends the listeners.
    pub(super) accepting: RefCell<CancellationToken>,
    /// Listeners, connections and tunnels. Dropped when the pod is withdrawn: a token would have to
    /// be looked at whenever one of them wakes.
    pub(super) tasks: Tasks,
    counts: PodConnections,
    pub(super) withdrawn: Cell<bool>,
    /// It leaves the mesh, or has left.
    pub(super) leaving: Cell<bool>,
}

impl PodContext {
    pub(super) fn new(
        pod: Arc<Pod>,
        workload: Arc<Workload>,
        tasks: Tasks,
        counts: PodConnections,
    ) -> Rc<Self> {
        Rc::new(Self {
            pod,
            workload: RefCell::new(workload),
            accepting: RefCell::default(),
            tasks,
            counts,
            withdrawn: Cell::new(false),
            leaving: Cell::new(false),
        })
    }

    /// The workload with the settings that are in force now.
    pub(super) fn workload(&self) -> Arc<Workload> {
        Arc::clone(&self.workload.borrow())
    }

    /// What ends the listeners that serve it now.
    pub(super) fn accepting(&self) -> CancellationToken {
        self.accepting.borrow().clone()
    }

    /// Puts changed settings in force, of a pod that is in the mesh.
    pub(super) fn update(&self, workload: &Arc<Workload>) {
        *self.workload.borrow_mut() = Arc::clone(workload);
        self.leaving.set(false);
    }

    /// Runs a connection or tunnel of this pod, until its end or the pod's.
    /// None where the pod has gone already.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) -> Option<AbortHandle> {
        let counted = CountedTask::new(&self.counts);
        // No async block, which would hold the task twice.
        self.tasks.spawn(task.map(move |()| drop(counted)))
    }

    /// A place for one more connection or tunnel. None when the pod has as many as it may have.
    pub(super) fn admit(&self) -> Option<Admitted> {
        let limit = self.workload.borrow().settings.max_connections;
        let admitted = Admitted(self.counts.clone());
        // Counts itself, and goes again where that is one too many.
        (self.counts.0.open.fetch_add(1, Ordering::Relaxed) < limit).then_some(admitted)
    }

    /// Whether its peers are to open no more streams here.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Why a connection of this pod that is cut ends.
    pub(super) fn cause_of_cut(&self) -> Reason {
        if self.withdrawn.get() {
            Reason::Withdrawn
        } else {
            Reason::Shutdown
        }
    }
}

/// One of the connections and tunnels that a pod may have.
pub(super) struct Admitted(PodConnections);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A task that is counted until it ends or is dropped.
struct CountedTask(PodConnections);

impl CountedTask {
    fn new(counts: &PodConnections) -> Self {
        counts.0.tasks.fetch_add(1, Ordering::Relaxed);
        Self(counts.clone())
    }
}

impl Drop for CountedTask {
    fn drop(&mut self) {
        self.0.0.tasks.fetch_sub(1, Ordering::Relaxed);
    }
}
