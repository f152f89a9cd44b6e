//! What the tests of this module share.

use crate::model::{Probes, Settings, SpiffeId, Workload, WorkloadId};

/// A pod of that name, with a service account of the same name.
pub(super) fn workload(name: &str) -> Workload {
    Workload {
        id: WorkloadId {
            namespace: "emojivoto".to_owned(),
            name: name.to_owned(),
        },
        identity: format!("spiffe://cluster.local/ns/emojivoto/sa/{name}")
            .parse::<SpiffeId>()
            .unwrap()
            .into(),
        node: "node-a".to_owned(),
        netns: None,
        addresses: Vec::new(),
        ports: Vec::new(),
        probes: Probes::default(),
        labels: Vec::new(),
        meshed: true,
        ready: true,
        serving: true,
        settings: Settings::default(),
    }
}
