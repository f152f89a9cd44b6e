//! Whether pods are steered as they should be.

use std::time::{Duration, SystemTime};

use prometheus::{Gauge, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::metrics::{register, valid};

/// Metrics of the control side's steering.
#[derive(Debug)]
pub struct SteeringMetrics {
    pods_degraded: IntGaugeVec,
    cgroup_left: IntGauge,
    audit_differences: IntCounterVec,
    audit_duration: Gauge,
    audit_end: Gauge,
}

impl SteeringMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            pods_degraded: register(
                registry,
                valid(IntGaugeVec::new(
                    Opts::new(
                        "malla_pods_degraded",
                        "Enrolled pods that aren't served as they should be, by cause.",
                    ),
                    &["reason"],
                )),
            ),
            cgroup_left: register(
                registry,
                valid(IntGauge::new(
                    "malla_agent_cgroup_left",
                    "1 while the agent isn't in its own cgroup, so that its packets are taken \
                     for an app's.",
                )),
            ),
            audit_differences: register(
                registry,
                valid(IntCounterVec::new(
                    Opts::new(
                        "malla_audit_differences_total",
                        "Differences between the kernel's state and what the agent believes, by \
                         kind and whether they could be put right.",
                    ),
                    &["kind", "outcome"],
                )),
            ),
            audit_duration: register(
                registry,
                valid(Gauge::new(
                    "malla_audit_duration_seconds",
                    "How long the last whole audit took.",
                )),
            ),
            audit_end: register(
                registry,
                valid(Gauge::new(
                    "malla_audit_last_timestamp_seconds",
                    "When the last whole audit ended.",
                )),
            ),
        }
    }

    /// One difference that was found.
    pub fn audit_difference(&self, kind: &'static str, healed: bool) {
        let outcome = if healed { "healed" } else { "failed" };
        let labels = [kind, outcome];
        self.audit_differences.with_label_values(&labels).inc();
    }

    /// The end of an audit of everything, which took so long.
    pub fn audited(&self, duration: Duration) {
        self.audit_duration.set(duration.as_secs_f64());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.audit_end.set(now.unwrap_or_default().as_secs_f64());
    }

    /// Tells of a kind before the first difference, so that a rate over it has a beginning.
    pub fn describe_audit(&self, kinds: impl Iterator<Item = &'static str>) {
        for kind in kinds {
            for outcome in ["healed", "failed"] {
                let _ = self.audit_differences.with_label_values(&[kind, outcome]);
            }
        }
    }

    /// How many enrolled pods are degraded for `reason` now.
    pub fn set_pods_degraded(&self, reason: &'static str, pods: usize) {
        self.pods_degraded
            .with_label_values(&[reason])
            .set(i64::try_from(pods).unwrap_or(i64::MAX));
    }

    /// Whether the agent is in another cgroup than its own.
    pub fn set_cgroup_left(&self, left: bool) {
        self.cgroup_left.set(i64::from(left));
    }
}
