//! Whether pods are steered as they should be.

use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};

use super::metrics::{register, valid};

/// Metrics of the control side's steering.
#[derive(Debug)]
pub struct SteeringMetrics {
    pods_degraded: IntGaugeVec,
    cgroup_left: IntGauge,
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
