//! The connections of an agent that takes no more: whose pods they are, and how long they go on.
//!
//! Another agent is in charge of the pods, or none is. What it lets pass of a pod that leaves the mesh, this
//! one goes on to carry, for as long as it would if it were in charge still.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    model::{Mesh, Workload, WorkloadId},
    proxy::{PodConnections, Workers},
    reconcile::Served,
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
    pub connections: PodConnections,
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

    /// The pods, as a look at the ledger needs them.
    pub fn served(&self) -> Vec<Served> {
        let served = |pod: &CarriedPod| Served {
            workload: pod.workload.id.clone(),
            pod: Arc::clone(&pod.pod),
            tasks: pod.connections.tasks(),
        };
        self.pods.values().map(served).collect()
    }

    /// Heeds what the mesh is now, whatever it was before: the agent may have missed a change while it
    /// came to this.
    pub async fn follow(&mut self, mesh: &Mesh, node: &str, workers: &Workers) {
        let end = Instant::now() + self.withdraw_limit;
        let mut others = Vec::new();
        for pod in self.pods.values_mut() {
            let present = mesh.workloads.get(&pod.workload.id);
            match present.filter(|now| now.node == node && now.is_enrolled()) {
                None => {
                    pod.ends.get_or_insert(end);
                }
                Some(now) if now.has_same_enrolment(&pod.workload) => pod.ends = None,
                // Of another netns or identity: nothing of it may go on.
                Some(now) => others.push(now.id.clone()),
            }
        }
        for id in others {
            if let Some(pod) = self.pods.remove(&id) {
                workers.remove(&pod.pod).await;
            }
        }
    }

    /// Ends what pods have that are gone, or have left the mesh for long enough.
    pub async fn end_withdrawals(&mut self, workers: &Workers) {
        let now = Instant::now();
        let is_over = |pod: &CarriedPod| {
            pod.ends.is_some_and(|end| now >= end) || !pod.record.netns_is_there()
        };
        let over = self.pods.extract_if(|_, pod| is_over(pod));
        let over: Vec<CarriedPod> = over.map(|(_, pod)| pod).collect();
        for pod in over {
            workers.remove(&pod.pod).await;
        }
    }
}
