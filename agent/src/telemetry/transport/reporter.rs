//! What is counted once for each workload that reports connections, whatever their other ends.

use std::sync::atomic::{AtomicU64, Ordering};

use malla_common::Reason;
use prometheus::{
    Histogram, HistogramOpts,
    core::Collector,
    proto::{LabelPair, Metric, MetricFamily, MetricType},
};

use crate::telemetry::{
    Direction,
    collector::{Family, label},
    metrics::valid,
};

/// Upper ends of the buckets, in seconds: from one request to a connection of hours.
const BUCKETS: [f64; 8] = [0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0];

/// The lines that a reporter has in a scrape, with those of two kinds of error: a bucket each and
/// `+Inf`, sum and count.
pub(super) const LINES: usize = BUCKETS.len() + 3 + 2;

const LABELS: &[&str] = &["direction", "namespace", "pod"];
const ERROR_LABELS: &[&str] = &["error", "namespace", "pod"];

pub(super) const FAMILIES: [Family; 3] = [
    Family {
        name: "malla_tcp_connection_duration_seconds",
        help: "How long connections lived, from when the agent knew their ends until both had ended.",
        kind: MetricType::HISTOGRAM,
        labels: LABELS,
    },
    Family {
        name: "inbound_tcp_errors_total",
        help: "Connections to the pod that failed, by Linkerd's word for the cause.",
        kind: MetricType::COUNTER,
        labels: ERROR_LABELS,
    },
    Family {
        name: "outbound_tcp_errors_total",
        help: "Connections from the pod that failed, by Linkerd's word for the cause.",
        kind: MetricType::COUNTER,
        labels: ERROR_LABELS,
    },
];

/// Linkerd's words for the cause of a failure.
const ERRORS: [&str; 4] = ["i/o", "identity required", "loadshed", "unexpected"];

/// The place in [`ERRORS`] of a reason. `None`: a refusal by policy, which is no error.
const fn error(reason: Reason) -> Option<usize> {
    match reason {
        Reason::PlaintextRefused | Reason::EgressRefused | Reason::ProbeUndeclared => None,
        Reason::ConnectRefused
        | Reason::ConnectTimeout
        | Reason::ConnectFailed
        | Reason::DialPortsExhausted
        | Reason::PeerRefused
        | Reason::TunnelLost
        | Reason::ClientReset
        | Reason::ServerReset
        | Reason::IdleTimeout => Some(0),
        Reason::NoIdentity
        | Reason::NoCertificate
        | Reason::IdentityMismatch
        | Reason::CertificateExpired
        | Reason::UntrustedCertificate
        | Reason::ForeignTrustDomain
        | Reason::CertificateRevoked
        | Reason::TlsFailed => Some(1),
        Reason::HandshakeLimit | Reason::ConnectionLimit => Some(2),
        _ => Some(3),
    }
}

/// One workload's connections in one direction.
#[derive(Debug)]
pub(super) struct Reporter {
    durations: Histogram,
    errors: [AtomicU64; ERRORS.len()],
}

impl Default for Reporter {
    fn default() -> Self {
        let [durations, ..] = &FAMILIES;
        let options = HistogramOpts::new(durations.name, durations.help).buckets(BUCKETS.into());
        Self {
            durations: valid(Histogram::with_opts(options)),
            errors: Default::default(),
        }
    }
}

impl Reporter {
    pub(super) fn ended(&self, seconds: f64, failure: Option<Reason>) {
        self.durations.observe(seconds);
        if let Some(place) = failure.and_then(error) {
            self.errors[place].fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn sample(
        &self,
        direction: Direction,
        namespace: &str,
        pod: &str,
        into: &mut [Vec<Metric>; 3],
    ) {
        let labels = |first: LabelPair| {
            let rest = [label("namespace", namespace), label("pod", pod)];
            [first].into_iter().chain(rest).collect::<Vec<_>>()
        };
        let [durations, inbound, outbound] = into;
        for mut family in self.durations.collect() {
            for mut metric in family.take_metric() {
                metric.set_label(labels(label("direction", direction.as_str())));
                durations.push(metric);
            }
        }
        let [_, inbound_errors, outbound_errors] = &FAMILIES;
        let (family, errors) = match direction {
            Direction::Inbound => (inbound_errors, inbound),
            Direction::Outbound => (outbound_errors, outbound),
        };
        for (word, count) in ERRORS.iter().zip(&self.errors) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                errors.push(family.sample(labels(label("error", *word)), count));
            }
        }
    }
}

/// The families of `samples`.
pub(super) fn families(samples: [Vec<Metric>; 3]) -> impl Iterator<Item = MetricFamily> {
    let families = FAMILIES.iter().zip(samples);
    families.map(|(family, samples)| family.with(samples))
}
