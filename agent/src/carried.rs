//! The connections of an agent that takes no more: whose pods they are, and how long they go on.
//!
//! Another agent is in charge of the pods, or none is. What it lets pass of a pod that leaves the mesh, this
//! one goes on to carry, for as long as it would if it were in charge still.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    discovery::Changes,
    model::{Workload, WorkloadId},
    proxy::Workers,
    steer::{Pod, Record},
};

/// Pods whose connections live here.
pub struct Carried {
    pods: HashMap<WorkloadId, CarriedPod>,
    withdraw_limit: Duration,
}

/// One of them.
pub struct CarriedPod {
    pub workload: Arc<Workload>,
    pub pod: Arc<Pod>,
    pub record: Record,
    /// When its connections end at the latest, where it leaves the mesh.
    pub ends: Option<Instant>,
}

impl Carried {
    pub fn new(pods: impl Iterator<Item = CarriedPod>, withdraw_limit: Duration) -> Self {
        Self {
            pods: pods.map(|pod| (pod.workload.id.clone(), pod)).collect(),
            withdraw_limit,
        }
    }

    /// Heeds what has changed of the node's pods.
    pub async fn apply(&mut self, changes: Changes, workers: &Workers) {
        for workload in changes.removed {
            if let Some(pod) = self.pods.get_mut(&workload.id) {
                let limit = Instant::now() + self.withdraw_limit;
                pod.ends.get_or_insert(limit);
            }
        }
        let come_back = changes.added.into_iter();
        let others = changes.reenrolled.into_iter().map(|changed| changed.new);
        for workload in come_back.chain(others) {
            let Some(pod) = self.pods.get_mut(&workload.id) else {
                continue;
            };
            if pod.workload.has_same_enrolment(&workload) {
                pod.ends = None;
            } else {
                // Of another netns or identity: nothing of it may go on.
                workers.remove(&pod.pod).await;
                self.pods.remove(&workload.id);
            }
        }
    }

    /// Ends what pods have that are gone, or have left the mesh for long enough.
    pub async fn end_withdrawals(&mut self, workers: &Workers) {
        let now = Instant::now();
        let is_over = |pod: &CarriedPod| {
            pod.ends
                .is_some_and(|end| now >= end || !pod.record.netns_is_there())
        };
        let over = self.pods.extract_if(|_, pod| is_over(pod));
        let over: Vec<CarriedPod> = over.map(|(_, pod)| pod).collect();
        for pod in over {
            workers.remove(&pod.pod).await;
        }
    }
}
