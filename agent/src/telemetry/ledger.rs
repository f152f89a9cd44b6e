//! What the agent has open, and where the kernel disagrees.

use std::time::Duration;

use prometheus::{Gauge, IntGauge, IntGaugeVec, Opts, Registry};

use super::metrics::{register, valid};

/// Metrics of the ledger, as the last look found it.
#[derive(Debug)]
pub struct LedgerMetrics {
    descriptors: IntGaugeVec,
    tasks: IntGauge,
    kernel_sockets: IntGaugeVec,
    differences: IntGaugeVec,
    look: Gauge,
}

impl LedgerMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(
                registry,
                valid(IntGaugeVec::new(Opts::new(name, help), labels)),
            )
        };
        Self {
            descriptors: gauges(
                "malla_ledger_descriptors",
                "Descriptors that the agent believes to have open, by what they are for.",
                &["kind"],
            ),
            tasks: register(
                registry,
                valid(IntGauge::new(
                    "malla_ledger_tasks",
                    "Tasks of listeners, connections and tunnels.",
                )),
            ),
            kernel_sockets: gauges(
                "malla_ledger_kernel_sockets",
                "The agent's sockets in the pods' network namespaces, as the kernel lists them; \
                 closed: over for the kernel, but with something left to deliver.",
                &["state"],
            ),
            differences: gauges(
                "malla_ledger_differences",
                "Descriptors in which the ledger and the kernel have differed for 10 s.",
                &["difference", "kind"],
            ),
            look: register(
                registry,
                valid(Gauge::new(
                    "malla_ledger_look_cpu_seconds",
                    "Processor time of the last comparison of the ledger with the kernel.",
                )),
            ),
        }
    }

    /// How many descriptors are entered as `kind`.
    pub fn set_descriptors(&self, kind: &'static str, count: usize) {
        self.descriptors.with_label_values(&[kind]).set(int(count));
    }

    pub fn set_tasks(&self, count: usize) {
        self.tasks.set(int(count));
    }

    /// How many of the agent's sockets the kernel lists.
    pub fn set_kernel_sockets(&self, state: &'static str, count: usize) {
        self.kernel_sockets
            .with_label_values(&[state])
            .set(int(count));
    }

    /// What has differed for long, in place of what did before: difference, kind, how many.
    pub fn set_differences<'a>(
        &self,
        differences: impl Iterator<Item = (&'static str, &'a str, usize)>,
    ) {
        self.differences.reset();
        for (difference, kind, count) in differences {
            self.differences
                .with_label_values(&[difference, kind])
                .set(int(count));
        }
    }

    pub fn set_look(&self, took: Duration) {
        self.look.set(took.as_secs_f64());
    }
}

fn int(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use crate::telemetry::Metrics;

    #[test]
    fn what_no_longer_differs_is_no_longer_told() {
        let metrics = Metrics::new();
        let ledger = metrics.ledger();
        ledger.set_descriptors("handshake", 3);
        ledger.set_differences([("unaccounted", "connection", 2)].into_iter());
        let told = metrics.scrape().unwrap();
        let difference =
            "malla_ledger_differences{difference=\"unaccounted\",kind=\"connection\"} 2";
        assert!(told.contains("malla_ledger_descriptors{kind=\"handshake\"} 3"));
        assert!(told.contains(difference), "{told}");
        ledger.set_differences([].into_iter());
        assert!(!metrics.scrape().unwrap().contains(difference));
    }
}
