//! Which connections are accelerated, and whether this kernel may do it.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use super::metrics::{register, valid};

/// Metrics of socket acceleration.
#[derive(Debug)]
pub struct AccelerationMetrics {
    pods: IntGaugeVec,
    verdict: IntGaugeVec,
    directions: IntCounterVec,
}

impl AccelerationMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let gauges = |name, help, labels: &[&str]| {
            register(
                registry,
                valid(IntGaugeVec::new(Opts::new(name, help), labels)),
            )
        };
        Self {
            pods: gauges(
                "malla_acceleration_pods",
                "Enrolled pods by how new connections between app and agent are accelerated, and \
                 why so.",
                &["mode", "reason"],
            ),
            verdict: gauges(
                "malla_acceleration_verdict",
                "1 for what the self-test has found this kernel to be: transparent, limited (apps \
                 may notice), refused, or untried.",
                &["verdict"],
            ),
            directions: register(
                registry,
                valid(IntCounterVec::new(
                    Opts::new(
                        "malla_acceleration_directions_total",
                        "Directions of accelerated connections that began redirected, that began \
                         by TCP (no_peer), or went over to it (no_credit, peer_gone); and how often \
                         one between two apps of this node went on without the agent (joined).",
                    ),
                    &["event"],
                )),
            ),
        }
    }

    /// Mode, reason, and how many pods have it.
    pub fn set_pods(&self, pods: impl Iterator<Item = (&'static str, &'static str, usize)>) {
        self.pods.reset();
        for (mode, reason, count) in pods {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.pods.with_label_values(&[mode, reason]).set(count);
        }
    }

    /// None: nobody has asked for it.
    pub fn set_verdict(&self, verdict: Option<&'static str>) {
        self.verdict.reset();
        let verdict = verdict.unwrap_or("untried");
        self.verdict.with_label_values(&[verdict]).set(1);
    }

    /// What the kernel has counted up to now.
    pub fn set_directions(&self, directions: impl Iterator<Item = (&'static str, u64)>) {
        for (event, count) in directions {
            let counter = self.directions.with_label_values(&[event]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::telemetry::Metrics;

    #[test]
    fn a_scrape_has_the_modes_the_verdict_and_what_the_kernel_counted() {
        let metrics = Metrics::new();
        let acceleration = metrics.acceleration();
        acceleration.set_verdict(None);
        acceleration.set_verdict(Some("limited"));
        acceleration.set_pods([("off", "default", 2)].into_iter());
        acceleration.set_pods([("full", "configured", 1)].into_iter());
        acceleration.set_directions([("redirected", 3)].into_iter());
        acceleration.set_directions([("redirected", 5)].into_iter());
        let text = metrics.scrape().unwrap();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("malla_acceleration"))
            .collect();
        assert_eq!(
            lines,
            [
                "malla_acceleration_directions_total{event=\"redirected\"} 5",
                "malla_acceleration_pods{mode=\"full\",reason=\"configured\"} 1",
                "malla_acceleration_verdict{verdict=\"limited\"} 1",
            ]
        );
    }
}
