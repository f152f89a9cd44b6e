//! Socket acceleration: when this kernel may do it, and its programs while this agent does.
//!
//! Nothing is loaded until a workload asks for it. Then the programs are tried in the background,
//! between two sockets of the agent's own, and only what has proved right is done with apps. What
//! is done is kept in the pod's entry (the app's socket) and in [`Tags`] (the agent's): turning it
//! off stops adding connections, and leaves those that live as they are.
//!
//! Unlike steering, none of it outlives the agent on purpose, so nothing is pinned.

mod joins;
mod programs;
mod queues;
mod self_test;
mod verdict;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use aya::maps::{MapData, SkStorage};
use malla_common::acceleration::{Event, Tag};
use socket2::Socket;

pub use self::{
    joins::Join,
    queues::{Credit, Queues},
    verdict::{InForce, Verdict},
};
use self::{programs::AccelerationPrograms, verdict::Cache};
use super::{netns::Netns, on_blocking_thread};
use crate::{
    ledger::Entry,
    model::{Accelerate, Node},
};

/// Acceleration on one node.
pub struct Acceleration {
    node: Accelerate,
    folders: Folders,
    cache: Cache,
    state: Mutex<State>,
    tags: Arc<Tags>,
    queues: Arc<Queues>,
}

/// What the programs are loaded and attached with.
#[derive(Debug, Clone)]
struct Folders {
    maps: PathBuf,
    /// The agent's own cgroup, and the one that all are below.
    own_cgroup: PathBuf,
    all_cgroups: PathBuf,
}

enum State {
    /// No workload has asked for it.
    Unasked,
    Testing,
    Settled {
        verdict: Verdict,
        programs: Option<Box<AccelerationPrograms>>,
    },
}

impl Acceleration {
    pub(super) fn new(
        node: &Node,
        mode: Accelerate,
        maps: &Path,
        own_cgroup: &Path,
        home: Arc<Netns>,
    ) -> Self {
        Self {
            node: mode,
            folders: Folders {
                maps: maps.to_owned(),
                own_cgroup: own_cgroup.to_owned(),
                all_cgroups: super::cgroup::root_above(&node.cgroup),
            },
            cache: Cache::new(&node.runtime),
            state: Mutex::new(State::Unasked),
            tags: Arc::default(),
            queues: Arc::new(Queues::new(home)),
        }
    }

    pub(super) fn tags(&self) -> Arc<Tags> {
        Arc::clone(&self.tags)
    }

    pub(super) fn queues(&self) -> Arc<Queues> {
        Arc::clone(&self.queues)
    }

    /// Finds out what this kernel may do, if a workload asks for `modes` that hang on it, and loads
    /// the programs. At most once; off this thread.
    pub fn prepare(self: &Arc<Self>, mut modes: impl Iterator<Item = Accelerate>) {
        let is_asked = |mode| matches!(self.asked(mode), Accelerate::Safe | Accelerate::Full);
        if !matches!(*self.state(), State::Unasked) || !modes.any(is_asked) {
            return;
        }
        *self.state() = State::Testing;
        let this = Arc::clone(self);
        tokio::spawn(on_blocking_thread(move || {
            let (verdict, programs) = this.settle();
            tracing::info!(
                verdict = verdict.as_str(),
                reason = verdict.failure.as_deref(),
                limits = verdict.limits.join(" "),
                "socket acceleration was tried"
            );
            *this.state() = State::Settled { verdict, programs };
        }));
    }

    fn settle(&self) -> (Verdict, Option<Box<AccelerationPrograms>>) {
        let loaded = AccelerationPrograms::load(&self.folders.maps);
        let mut programs = match loaded {
            Ok(programs) => programs,
            Err(error) => return (Verdict::failed(error.to_string()), None),
        };
        let refuses_splices = programs.refuse_splices();
        let known = self.cache.read(refuses_splices);
        let verdict = known.unwrap_or_else(|| {
            let verdict = self_test::run(&mut programs, &self.folders.own_cgroup);
            self.cache.write(&verdict, refuses_splices);
            verdict
        });
        if verdict.failure.is_some() {
            return (verdict, None);
        }
        let attached = programs.attach(&self.folders.all_cgroups);
        match attached.and_then(|()| Ok((programs.tags()?, programs.queues()?))) {
            Ok((tags, maps)) => {
                // Before the first connection is.
                self.queues.fill(maps, verdict.tells_memory);
                *self.tags.map() = Some(tags);
                (verdict, Some(Box::new(programs)))
            }
            Err(error) => (Verdict::failed(error.to_string()), None),
        }
    }

    /// What a workload that is set to `mode` gets now.
    pub fn in_force(&self, mode: Accelerate) -> InForce {
        match &*self.state() {
            State::Unasked | State::Testing => verdict::decide(self.asked(mode), None),
            State::Settled { verdict, .. } => verdict::decide(self.asked(mode), Some(verdict)),
        }
    }

    /// The verdict on this kernel, where there is one yet.
    pub fn verdict(&self) -> Option<Verdict> {
        match &*self.state() {
            State::Settled { verdict, .. } => Some(verdict.clone()),
            State::Unasked | State::Testing => None,
        }
    }

    /// What the programs have counted.
    pub fn events(&self) -> Vec<(Event, u64)> {
        match &*self.state() {
            State::Settled {
                programs: Some(programs),
                ..
            } => programs.events(),
            _ => Vec::new(),
        }
    }

    /// Adds no connection from now on: another agent does that.
    pub(super) fn stop(&self) {
        if let State::Settled {
            programs: Some(programs),
            ..
        } = &mut *self.state()
        {
            programs.stop_adding();
        }
    }

    /// The node's own mode counts for who leaves it open, and `off` for all.
    fn asked(&self, mode: Accelerate) -> Accelerate {
        match (self.node, mode) {
            (Accelerate::Off, _) => Accelerate::Off,
            (node, Accelerate::Auto) => node,
            (_, mode) => mode,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the kernel which of the agent's sockets are accelerated.
#[derive(Debug, Default)]
pub(super) struct Tags(Mutex<Option<(SkStorage<MapData, u32>, Entry)>>);

impl Tags {
    /// Before the socket opens, or for what a listener accepts from now on.
    pub(super) fn set(&self, socket: &impl std::os::fd::AsRawFd, tag: Tag) {
        if let Some((map, _)) = &mut *self.map() {
            // Without it the connection stays plain.
            let _ = map.insert(socket, tag as u32, 0);
        }
    }

    fn map(&self) -> MutexGuard<'_, Option<(SkStorage<MapData, u32>, Entry)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tag of a pod's dials.
#[derive(Debug)]
pub(super) struct DialTag {
    tags: Arc<Tags>,
    tag: AtomicU32,
}

impl DialTag {
    pub(super) fn new(tags: Arc<Tags>) -> Self {
        let tag = AtomicU32::new(Tag::Plain as u32);
        Self { tags, tag }
    }

    pub(super) fn change(&self, tag: Tag) {
        self.tag.store(tag as u32, Ordering::Relaxed);
    }

    pub(super) fn tags(&self) -> &Tags {
        &self.tags
    }

    /// Tags a socket that is about to be connected to the app. Whether it is to be accelerated.
    pub(super) fn put_on(&self, socket: &Socket) -> bool {
        let tag = self.tag.load(Ordering::Relaxed);
        let mut known = [Tag::Receives, Tag::Both].into_iter();
        let Some(known) = known.find(|known| *known as u32 == tag) else {
            return false;
        };
        self.tags.set(socket, known);
        true
    }
}
