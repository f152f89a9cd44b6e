//! What the agent looks at and tells each second: certificates, degraded pods, its own cgroup.
//!
//! A state is logged when it begins and when it ends; the metrics have it all the time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::SystemTime,
};

use crate::{
    identity::Certificates,
    model::WorkloadId,
    steer::{Degradation, Enrolment, Steering},
    telemetry::{Metrics, Readiness, ReadinessTask},
};

/// What was told last.
pub struct Report {
    metrics: Arc<Metrics>,
    degraded: HashMap<WorkloadId, BTreeMap<Degradation, String>>,
    own_cgroup: ReadinessTask,
    foreign_cgroup: Option<String>,
}

impl Report {
    pub fn new(metrics: Arc<Metrics>, readiness: &Readiness) -> Self {
        let own_cgroup = readiness.register("cgroup");
        own_cgroup.done();
        Self {
            metrics,
            degraded: HashMap::new(),
            own_cgroup,
            foreign_cgroup: None,
        }
    }

    pub fn certificates(&self, certificates: &Certificates) {
        let expirations = certificates.expirations();
        let first: Option<SystemTime> = expirations.into_iter().map(|(_, end)| end).min();
        let metrics = self.metrics.identity();
        metrics.set_expiration(first);
        let refreshes = certificates.refreshes();
        metrics.set_refreshes(refreshes.ok, refreshes.failed);
        let authority = certificates.authority();
        let ends = authority.expiries.iter();
        metrics.set_authority_expirations(
            ends.map(|expiry| (expiry.object, expiry.subject.clone(), expiry.ends.into())),
        );
        for reloads in &authority.reloads {
            metrics.set_authority_reloads(reloads.object, reloads.accepted, reloads.refused);
        }
    }

    pub fn degraded<'a>(&mut self, enrolments: impl Iterator<Item = &'a Enrolment>) {
        let mut before = std::mem::take(&mut self.degraded);
        for enrolment in enrolments {
            let workload = enrolment.workload();
            let now = enrolment.degradations();
            let old = before.remove(workload).unwrap_or_default();
            for (reason, what) in now.iter().filter(|(reason, _)| !old.contains_key(reason)) {
                let reason = reason.as_str();
                tracing::error!(%workload, reason, what, "a pod is degraded");
            }
            for reason in old.keys().filter(|reason| !now.contains_key(reason)) {
                let reason = reason.as_str();
                tracing::info!(%workload, reason, "a pod is no longer degraded");
            }
            if !now.is_empty() {
                self.degraded.insert(workload.clone(), now);
            }
        }
        for reason in Degradation::ALL {
            let pods = self.degraded.values();
            let count = pods.filter(|found| found.contains_key(&reason)).count();
            self.metrics
                .steering()
                .set_pods_degraded(reason.as_str(), count);
        }
    }

    /// Outside its cgroup the agent steers its own packets back to itself: it must not get new
    /// work.
    pub fn cgroup(&mut self, steering: &Steering) {
        let now = steering.foreign_cgroup();
        if now == self.foreign_cgroup {
            return;
        }
        if let Some(cgroup) = &now {
            tracing::error!(
                cgroup,
                "the agent was moved to a cgroup that isn't its own: its new connections are taken \
                 for an app's; move it back, or start it again"
            );
            self.own_cgroup.undo();
        } else {
            tracing::info!("the agent is in its own cgroup again");
            self.own_cgroup.done();
        }
        self.metrics.steering().set_cgroup_left(now.is_some());
        self.foreign_cgroup = now;
    }
}
