//! What the agent still waits for before it may be called ready.
//!
//! Being ready says nothing about being alive: a living agent may be unready for long, for
//! example while discovery has no first answer.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The tasks that must be done. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    pending: Arc<Mutex<Pending>>,
}

/// Tasks by number, with their names.
#[derive(Debug, Default)]
struct Pending {
    next: u64,
    tasks: BTreeMap<u64, &'static str>,
}

impl Readiness {
    /// Adds a task that is pending. Two tasks may have one name.
    pub fn register(&self, name: &'static str) -> ReadinessTask {
        let number = self.with(|pending| {
            let number = pending.next;
            pending.next += 1;
            pending.tasks.insert(number, name);
            number
        });
        ReadinessTask {
            readiness: self.clone(),
            name,
            number,
        }
    }

    /// Names of the pending tasks, oldest first. Empty: ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.with(|pending| pending.tasks.values().copied().collect())
    }

    fn with<T>(&self, change: impl FnOnce(&mut Pending) -> T) -> T {
        // No change leaves the map half done, so a panic elsewhere doesn't spoil it.
        change(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One thing that readiness waits for. Dropping it changes nothing: a task that ended without
/// being done keeps the agent unready, which is true.
#[derive(Debug)]
pub struct ReadinessTask {
    readiness: Readiness,
    name: &'static str,
    number: u64,
}

impl ReadinessTask {
    /// Readiness no longer waits for this.
    pub fn done(&self) {
        self.readiness
            .with(|pending| pending.tasks.remove(&self.number));
    }

    /// Readiness waits for this again.
    pub fn undo(&self) {
        self.readiness
            .with(|pending| pending.tasks.insert(self.number, self.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_ready_when_every_task_is_done_and_not_after_one_is_undone() {
        let readiness = Readiness::default();
        let discovery = readiness.register("discovery");
        let identity = readiness.register("identity");
        assert_eq!(readiness.pending(), ["discovery", "identity"]);
        identity.done();
        discovery.done();
        assert!(readiness.pending().is_empty());
        discovery.undo();
        assert_eq!(readiness.pending(), ["discovery"]);
    }

    #[test]
    fn a_task_that_ends_undone_keeps_the_agent_unready() {
        let readiness = Readiness::default();
        drop(readiness.register("steering"));
        assert_eq!(readiness.pending(), ["steering"]);
    }
}
