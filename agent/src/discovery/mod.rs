//! Where the mesh comes from: a source that is watched becomes snapshots of [`Mesh`].
//!
//! A source hands out a [`Discovery`]. What it has accepted stays in force until it has accepted
//! something else; a state that it refuses changes nothing but [`Status`]. Discovery decides
//! nothing about connections and touches no pod: [`changes`] tells whoever does what to touch.

mod diff;
pub mod file;

use std::sync::Arc;

use tokio::{sync::watch, task::JoinHandle};

use crate::model::Mesh;

pub use diff::{Changes, changes};

/// A running source. Dropping it ends the watching; receivers keep their last snapshot.
#[derive(Debug)]
pub struct Discovery {
    mesh: watch::Receiver<Arc<Mesh>>,
    status: watch::Receiver<Status>,
    task: JoinHandle<()>,
}

impl Discovery {
    /// Snapshots: the current one at once, then each that differs from the one before. What didn't
    /// change from one to the next is the same `Arc`.
    pub fn mesh(&self) -> watch::Receiver<Arc<Mesh>> {
        self.mesh.clone()
    }

    /// How the source's reloads went.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How reloads went since the first load.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Status {
    /// States of the source that became the mesh in force, those without a difference included.
    pub accepted: u64,
    /// States of the source that were refused whole.
    pub refused: u64,
    /// How often watching the source failed, and it was asked instead.
    pub watch_failures: u64,
    /// Why the source's present state isn't in force. `None`: it is.
    pub refusal: Option<Refusal>,
}

/// Why a state of the source was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One word for metrics.
    pub label: &'static str,
    /// The problems, one a line.
    pub report: Arc<str>,
}
