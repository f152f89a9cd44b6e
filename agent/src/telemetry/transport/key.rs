//! The labels of a series as text.

use prometheus::proto::LabelPair;

use super::{ConnectionLabels, NoTls, Peer, Security};
use crate::{
    model::{Service, SpiffeId, Workload},
    telemetry::{Direction, collector::label},
};

/// The labels that every TCP family has, sorted.
pub(super) const LABELS: &[&str] = &[
    "client_id",
    "direction",
    "dst_namespace",
    "dst_pod",
    "dst_service",
    "dst_serviceaccount",
    "namespace",
    "no_tls_reason",
    "peer",
    "pod",
    "server_id",
    "serviceaccount",
    "src_namespace",
    "src_pod",
    "src_serviceaccount",
    "target_port",
    "tls",
];

/// Namespace, pod and service account of one end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct End([String; 3]);

impl End {
    fn of(workload: &Workload) -> Self {
        Self([
            workload.id.namespace.clone(),
            workload.id.name.clone(),
            workload.identity.service_account.clone(),
        ])
    }

    /// An end that discovery doesn't know. Behind a Service, it has that one's namespace.
    fn of_stranger(identity: Option<&SpiffeId>, service: Option<&Service>) -> Self {
        identity.map_or_else(
            || {
                let namespace = service.map(|service| service.id.namespace.as_str());
                Self([namespace.unwrap_or("unknown"), "unknown", "unknown"].map(str::to_owned))
            },
            |identity| {
                Self([
                    identity.namespace.clone(),
                    String::new(),
                    identity.service_account.clone(),
                ])
            },
        )
    }
}

/// A workload that reports connections, and their direction.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ReporterKey {
    pub(super) direction: Direction,
    reporter: End,
}

impl ReporterKey {
    /// Namespace and name.
    pub(super) fn pod(&self) -> (&str, &str) {
        let End([namespace, pod, _]) = &self.reporter;
        (namespace, pod)
    }
}

/// All that tells a series from others.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    direction: Direction,
    reporter: End,
    remote: End,
    /// The Service's name; empty without one.
    service: String,
    /// Absent: summed over ports.
    target_port: Option<u16>,
    /// The other end's identity, if it has shown one.
    identity: Option<String>,
    /// `None`: mutual TLS.
    no_tls: Option<NoTls>,
}

impl Key {
    pub(super) fn of(labels: &ConnectionLabels) -> Self {
        let (identity, no_tls) = match &labels.security {
            Security::MutualTls(identity) => (Some(&**identity), None),
            Security::None(why) => (None, Some(*why)),
        };
        Self {
            direction: labels.direction,
            reporter: End::of(&labels.reporter),
            remote: labels.remote.as_ref().map_or_else(
                || End::of_stranger(identity, labels.service.as_deref()),
                |workload| End::of(workload),
            ),
            service: labels
                .service
                .as_ref()
                .map_or_else(String::new, |service| service.id.name.clone()),
            target_port: Some(labels.target_port),
            identity: identity.map(SpiffeId::to_string),
            no_tls,
        }
    }

    pub(super) fn reporter(&self) -> ReporterKey {
        ReporterKey {
            direction: self.direction,
            reporter: self.reporter.clone(),
        }
    }

    /// The same, summed over other ends, Services and ports.
    pub(super) fn summed(self) -> Self {
        Self {
            remote: End(["other"; 3].map(str::to_owned)),
            service: String::new(),
            target_port: None,
            identity: None,
            ..self
        }
    }

    pub(super) fn labels(&self, peer: Peer) -> Vec<LabelPair> {
        let outbound = self.direction == Direction::Outbound;
        let (src, dst) = if outbound {
            (&self.reporter, &self.remote)
        } else {
            (&self.remote, &self.reporter)
        };
        let leg_to_app = outbound == (peer == Peer::Src);
        let (no_tls, identity) = if leg_to_app {
            (Some(NoTls::Loopback), "")
        } else {
            (self.no_tls, self.identity.as_deref().unwrap_or_default())
        };
        let (client_id, server_id) = if outbound {
            ("", identity)
        } else {
            (identity, "")
        };
        let [src_namespace, src_pod, src_account] = &src.0;
        let [dst_namespace, dst_pod, dst_account] = &dst.0;
        let [namespace, pod, account] = &self.reporter.0;
        let port = self.target_port.map(|port| port.to_string());
        let values = [
            client_id,
            self.direction.as_str(),
            dst_namespace,
            dst_pod,
            &self.service,
            dst_account,
            namespace,
            no_tls.map_or("", NoTls::as_str),
            peer.as_str(),
            pod,
            server_id,
            account,
            src_namespace,
            src_pod,
            src_account,
            port.as_deref().unwrap_or_default(),
            if no_tls.is_some() {
                "no_identity"
            } else {
                "true"
            },
        ];
        let pairs = LABELS.iter().zip(values);
        pairs.map(|(name, value)| label(name, value)).collect()
    }
}
