//! What the commands read of `/config`. An agent of another version may say more, or less.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Config {
    pub(super) node: String,
    pub(super) version: String,
    pub(super) mesh: MeshFile,
    pub(super) workloads: Vec<Workload>,
    pub(super) refused: Vec<Refused>,
    pub(super) ended: Vec<Ended>,
    pub(super) services: Vec<Service>,
    pub(super) certificates: Certificates,
    pub(super) ledger: Ledger,
    pub(super) audit: Audit,
    pub(super) acceleration: Acceleration,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct MeshFile {
    pub(super) path: PathBuf,
    pub(super) in_force: bool,
    pub(super) last_refusal: Option<Refusal>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Refusal {
    pub(super) report: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Workload {
    /// Namespace and name.
    #[serde(rename = "workload")]
    pub(super) id: String,
    pub(super) identity: String,
    pub(super) degraded: Vec<Degraded>,
    pub(super) settings: Settings,
    pub(super) acceleration: AccelerationInForce,
    pub(super) leaving_within_seconds: Option<u64>,
}

/// Of a workload's settings.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Settings {
    pub(super) accelerate: String,
}

/// How a workload's new connections are accelerated, and why so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct AccelerationInForce {
    pub(super) mode: String,
    pub(super) reason: String,
    pub(super) why: String,
}

/// Whether the kernel may accelerate connections.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Acceleration {
    /// None: nobody has asked.
    pub(super) verdict: Option<String>,
    pub(super) failure: Option<String>,
    pub(super) limits: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Degraded {
    pub(super) reason: String,
    pub(super) what: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Refused {
    pub(super) workload: String,
    pub(super) why: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Ended {
    /// RFC 3339.
    pub(super) at: String,
    pub(super) direction: String,
    pub(super) source: String,
    pub(super) destination: String,
    /// None: in good order.
    pub(super) reason: Option<String>,
    pub(super) times: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Service {
    /// Namespace and name.
    #[serde(rename = "service")]
    pub(super) id: String,
    pub(super) endpoints: Vec<Endpoint>,
}

impl Service {
    pub(super) fn namespace(&self) -> &str {
        self.id
            .split_once('/')
            .map_or("", |(namespace, _)| namespace)
    }

    pub(super) fn name(&self) -> &str {
        self.id.split_once('/').map_or(&self.id, |(_, name)| name)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Endpoint {
    pub(super) addresses: Vec<String>,
    pub(super) workload: Option<String>,
    pub(super) state: String,
    /// For each port of the Service; None: the endpoint hasn't it.
    pub(super) ports: Vec<Option<u16>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Certificates {
    pub(super) workloads: Vec<Certificate>,
    pub(super) authority: Vec<AuthorityPart>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Certificate {
    pub(super) identity: String,
    /// RFC 3339.
    pub(super) expires: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct AuthorityPart {
    pub(super) object: String,
    pub(super) subject: String,
    pub(super) path: PathBuf,
    /// RFC 3339.
    pub(super) begins: String,
    /// RFC 3339.
    pub(super) expires: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Audit {
    pub(super) last_whole: Option<WholeAudit>,
    pub(super) unhealed: usize,
    pub(super) recent: Vec<AuditDifference>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WholeAudit {
    /// RFC 3339.
    pub(super) ended: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct AuditDifference {
    pub(super) workload: Option<String>,
    pub(super) kind: String,
    pub(super) what: String,
    pub(super) failure: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Ledger {
    pub(super) descriptors: Descriptors,
    pub(super) workloads: Vec<WorkloadLedger>,
    pub(super) differences: Vec<Difference>,
    pub(super) failure: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Descriptors {
    pub(super) open: usize,
    pub(super) entered: BTreeMap<String, usize>,
    pub(super) from_start: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkloadLedger {
    pub(super) workload: String,
    pub(super) tasks: u32,
    pub(super) believed: Sockets,
    pub(super) kernel: Option<Sockets>,
    pub(super) closed: usize,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Sockets {
    pub(super) listeners: usize,
    pub(super) connections: usize,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Difference {
    #[serde(rename = "difference")]
    pub(super) how: String,
    pub(super) kind: String,
    pub(super) workload: Option<String>,
    pub(super) descriptor: i32,
    pub(super) for_seconds: u64,
}
