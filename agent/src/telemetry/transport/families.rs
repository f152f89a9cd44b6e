//! The families of connections, under Linkerd's names where it has them.

use prometheus::proto::MetricType;

use super::{key::LABELS, reporter, routes};
use crate::telemetry::collector::Family;

const CLOSE_LABELS: &[&str] = &[
    "client_id",
    "direction",
    "dst_namespace",
    "dst_pod",
    "dst_service",
    "dst_serviceaccount",
    "errno",
    "namespace",
    "no_tls_reason",
    "peer",
    "pod",
    "reason",
    "server_id",
    "serviceaccount",
    "src_namespace",
    "src_pod",
    "src_serviceaccount",
    "target_port",
    "tls",
];

const RETRY_LABELS: &[&str] = &[
    "dst_namespace",
    "dst_pod",
    "dst_service",
    "dst_serviceaccount",
    "namespace",
    "pod",
    "reason",
    "serviceaccount",
    "src_namespace",
    "src_pod",
    "src_serviceaccount",
    "target_port",
];

pub(super) const RETRIES: Family = Family {
    name: "malla_outbound_tcp_retries_total",
    help: "Connections to a Service that failed at this endpoint, and then were tried at another one.",
    kind: MetricType::COUNTER,
    labels: RETRY_LABELS,
};

const ALLOW_LABELS: &[&str] = &[
    "authz_group",
    "authz_kind",
    "authz_name",
    "client_id",
    "namespace",
    "no_tls_reason",
    "pod",
    "serviceaccount",
    "src_namespace",
    "src_pod",
    "src_serviceaccount",
    "srv_group",
    "srv_kind",
    "srv_name",
    "srv_port",
    "target_port",
    "tls",
];

const DENY_LABELS: &[&str] = ALLOW_LABELS.split_at(3).1;

pub(super) const AUTHORIZATION: [Family; 2] = [
    Family {
        name: "inbound_tcp_authz_allow_total",
        help: "Connections to the pod that its mTLS mode let in.",
        kind: MetricType::COUNTER,
        labels: ALLOW_LABELS,
    },
    Family {
        name: "inbound_tcp_authz_deny_total",
        help: "Connections to the pod that its mTLS mode refused.",
        kind: MetricType::COUNTER,
        labels: DENY_LABELS,
    },
];

pub(super) const FAMILIES: [Family; 5] = [
    Family {
        name: "tcp_open_total",
        help: "Transports opened.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
    Family {
        name: "tcp_close_total",
        help: "Transports closed. In good order: errno and reason are empty.",
        kind: MetricType::COUNTER,
        labels: CLOSE_LABELS,
    },
    Family {
        name: "tcp_open_connections",
        help: "Transports that are open now.",
        kind: MetricType::GAUGE,
        labels: LABELS,
    },
    Family {
        name: "tcp_read_bytes_total",
        help: "Bytes read from transports.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
    Family {
        name: "tcp_write_bytes_total",
        help: "Bytes written to transports.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
];

/// Every family that [`Transports::families`](super::series::Transports::families) may have.
pub(in crate::telemetry) fn described() -> Vec<Family> {
    [
        &FAMILIES[..],
        &[RETRIES],
        &AUTHORIZATION,
        &routes::FAMILIES,
        &reporter::FAMILIES,
    ]
    .concat()
}
