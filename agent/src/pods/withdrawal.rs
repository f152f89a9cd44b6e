//! The end of a pod, and what is left of those that went before.
//!
//! A pod that leaves the mesh is withdrawn in two steps: its new connections pass at once, and what
//! lives goes on until its end or a limit; only then is what was set up taken away. A pod whose
//! netns is gone has nothing to wait for. What lives may be another agent's, which this one has taken
//! over from: while the kernel has one of such an agent in the pod's netns, what it needs stays.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Enrolled, Pods};
use crate::{
    model::{Mesh, Workload, WorkloadId},
    steer::Record,
};

/// How long other agents' connections in a pod's netns aren't asked for again: each question walks the
/// kernel's whole table.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// A pod that is being withdrawn.
pub(super) struct Leaving {
    pub(super) pod: Enrolled,
    /// When its connections end at the latest.
    pub(super) end: Instant,
    /// Whether they have been ended, so that only other agents' go on.
    is_cut: bool,
    /// When the kernel is asked again whether other agents have some.
    ask_at: Instant,
}

impl Pods {
    /// Takes away what earlier agents left of workloads that aren't this node's any more, as soon as
    /// nobody has connections that need it. What another workload is to have must go before.
    pub async fn remove_leftovers(&mut self, mesh: &Mesh) {
        let now = Instant::now();
        if !self.has_leftovers || now < self.ask_at || self.steering.has_successor() {
            return;
        }
        self.ask_at = now + ASK_AGAIN;
        let present = || mesh.enrolled_on(&self.node);
        let ids: HashSet<&WorkloadId> = present().map(|workload| &workload.id).collect();
        let keep = |id: &WorkloadId| ids.contains(id) || self.leaving.contains_key(id);
        let may_stay = |record: &Record| !present().any(|w| w.netns.as_ref() == Some(&record.path));
        self.has_leftovers = !self.steering.remove_leftovers(keep, may_stay).await;
    }

    /// Takes back a withdrawal that hasn't ended. Whether there was one: of another netns or
    /// identity nothing may go on.
    pub(super) async fn resume(&mut self, workload: &Arc<Workload>) -> bool {
        let Some(leaving) = self.leaving.remove(&workload.id) else {
            return false;
        };
        let (mut pod, is_cut) = (leaving.pod, leaving.is_cut);
        let is_same = pod.workload.has_same_enrolment(workload);
        if !is_same || !pod.enrolment.netns_is_there() {
            self.end(pod).await;
            return false;
        }
        if is_cut {
            // Another agent's connections go on, and need what is there.
            self.steering.let_go(pod.enrolment);
            return false;
        }
        pod.workload = Arc::clone(workload);
        self.enrolled.insert(workload.id.clone(), pod);
        self.count();
        tracing::info!(workload = %workload.id, "enrolled again, before its withdrawal has ended");
        self.update(workload).await;
        true
    }

    /// Lets a pod's new connections pass, and those that live go on for a while.
    pub(super) async fn withdraw(&mut self, workload: &Arc<Workload>) {
        self.failed.remove(&workload.id);
        let Some(pod) = self.enrolled.remove(&workload.id) else {
            // Its enrolment failed, but an earlier agent may have enrolled it.
            self.has_leftovers |= !self.steering.remove(&workload.id).await;
            self.release(workload);
            return;
        };
        self.count();
        if let Err(error) = pod.enrolment.let_pass() {
            tracing::error!(workload = %workload.id, %error, "can't withdraw a pod without a cut");
            return self.end(pod).await;
        }
        tracing::info!(workload = %workload.id, connections = pod.connections.count(), "leaves the mesh");
        let handed_over = Arc::clone(pod.enrolment.pod());
        let leaving = Leaving {
            pod,
            end: Instant::now() + self.withdraw_limit,
            ask_at: Instant::now(),
            is_cut: false,
        };
        self.leaving.insert(workload.id.clone(), leaving);
        self.workers.hand_over(&handed_over).await;
    }

    pub(super) async fn end_withdrawals(&mut self) {
        // One that takes over does it from what is recorded, and may have begun.
        if self.steering.is_yielding() {
            return;
        }
        let now = Instant::now();
        let mut over = Vec::new();
        for (id, leaving) in &mut self.leaving {
            let (pod, is_late) = (&leaving.pod, now >= leaving.end);
            if pod.enrolment.netns_is_there() {
                if (!is_late && pod.connections.count() > 0) || now < leaving.ask_at {
                    continue;
                }
                let steered = pod.enrolment.pod();
                if self.steering.others_carry(&steered.netns).await {
                    leaving.ask_at = now + ASK_AGAIN;
                    if is_late && !std::mem::replace(&mut leaving.is_cut, true) {
                        self.workers.remove(steered).await;
                    }
                    continue;
                }
            }
            over.push(id.clone());
        }
        for id in over {
            if let Some(leaving) = self.leaving.remove(&id) {
                self.end(leaving.pod).await;
            }
        }
    }

    /// Ends a pod's connections and takes away what was set up for it, at once.
    pub(super) async fn cut(&mut self, workload: &Arc<Workload>) {
        self.failed.remove(&workload.id);
        match self.enrolled.remove(&workload.id) {
            Some(pod) => self.end(pod).await,
            None => self.has_leftovers |= !self.steering.remove(&workload.id).await,
        }
        self.count();
    }

    async fn end(&mut self, pod: Enrolled) {
        self.workers.remove(pod.enrolment.pod()).await;
        self.steering.withdraw(pod.enrolment).await;
        self.release(&pod.workload);
        tracing::info!(workload = %pod.workload.id, "withdrawn");
    }

    /// Forgets a certificate that no other workload uses.
    fn release(&self, gone: &Workload) {
        let identity = &gone.identity;
        let mesh = self.shared.mesh.borrow();
        if !mesh
            .enrolled_on(&self.node)
            .any(|w| w.identity == *identity)
        {
            self.shared.certificates.release(identity);
        }
    }
}
