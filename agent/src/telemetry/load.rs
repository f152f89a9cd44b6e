//! Metrics of the workers' load, and of what a limit refuses.

use malla_common::Reason;
use prometheus::{
    Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::{
    Direction, Metrics,
    metrics::{counters, register, valid},
};

#[derive(Debug)]
pub(super) struct LoadMetrics {
    tunnels_handed_over: IntCounter,
    refused: IntCounterVec,
    worker_busy: GaugeVec,
    worker_connections: IntGaugeVec,
}

impl LoadMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            tunnels_handed_over: register(
                registry,
                valid(IntCounter::new(
                    "malla_tunnels_handed_over_total",
                    "Inbound tunnels that an overloaded worker asked to take no more streams.",
                )),
            ),
            refused: counters(
                registry,
                "malla_connections_refused_total",
                "Connections and tunnels refused before anything but their ends was known.",
                &["direction", "reason"],
            ),
            worker_busy: register(
                registry,
                valid(GaugeVec::new(
                    Opts::new(
                        "malla_worker_busy_ratio",
                        "Share of the last 100 ms that a worker ran or waited for a processor.",
                    ),
                    &["worker"],
                )),
            ),
            worker_connections: register(
                registry,
                valid(IntGaugeVec::new(
                    Opts::new(
                        "malla_worker_connections",
                        "Connections that live on a worker now.",
                    ),
                    &["worker"],
                )),
            ),
        }
    }
}

impl Metrics {
    /// An overloaded worker has asked a tunnel to take no more streams.
    pub fn tunnel_handed_over(&self) {
        self.load.tunnels_handed_over.inc();
    }

    /// A connection or tunnel was refused before anything but its ends was known.
    pub fn refused(&self, direction: Direction, reason: Reason) {
        let labels = [direction.as_str(), reason.as_str()];
        self.load.refused.with_label_values(&labels).inc();
    }

    /// What a worker tells its load with.
    pub fn worker_gauges(&self, worker: usize) -> WorkerGauges {
        let labels = [worker.to_string()];
        WorkerGauges {
            busy: self.load.worker_busy.with_label_values(&labels),
            connections: self.load.worker_connections.with_label_values(&labels),
        }
    }
}

/// The load of one worker.
#[derive(Debug)]
pub struct WorkerGauges {
    busy: Gauge,
    connections: IntGauge,
}

impl WorkerGauges {
    /// `busy` is in per cent.
    pub fn tell(&self, busy: u32, connections: u32) {
        self.busy.set(f64::from(busy) / 100.0);
        self.connections.set(connections.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_tells_its_load_and_what_it_refused() {
        let metrics = Metrics::new();
        metrics.worker_gauges(1).tell(25, 7);
        metrics.refused(Direction::Inbound, Reason::ConnectionLimit);
        metrics.tunnel_handed_over();
        let text = metrics.scrape().unwrap();
        for line in [
            "malla_worker_busy_ratio{worker=\"1\"} 0.25",
            "malla_worker_connections{worker=\"1\"} 7",
            "malla_connections_refused_total\
             {direction=\"inbound\",reason=\"connection_limit\"} 1",
            "malla_tunnels_handed_over_total 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
