//! Fills the document: what the main task knows at once, and what has to be asked for.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use malla_common::Reason;
use tokio::{task::JoinError, time::Instant};

use super::{
    acceleration::Acceleration,
    document::{
        Audit, AuthorityPart, Certificate, Certificates, Degraded, Descriptors, Difference,
        Document, Ended, Interface, Ledger, ListenerPorts, MeshFile, Neighbour, Refusal, Refused,
        Service, Sockets, SocketsDifference, Tunnel, Workload, WorkloadLedger,
    },
};
use crate::{
    discovery::Status,
    identity,
    ledger::{self, Account, PodAccount},
    model::WorkloadId,
    pods::Pods,
    proxy,
    reconcile::Served,
};

/// How the mesh file was read, with the times.
#[derive(Debug, Clone)]
pub struct MeshStatus {
    told: MeshFile,
    accepted: u64,
    refused: u64,
}

impl MeshStatus {
    /// The file at `path` has just been read, and was good.
    pub fn new(path: PathBuf) -> Self {
        let told = MeshFile {
            path,
            in_force: true,
            last_good: SystemTime::now(),
            last_refusal: None,
        };
        Self {
            told,
            accepted: 0,
            refused: 0,
        }
    }

    /// Takes in what discovery says of its last reload.
    pub fn heard(&mut self, status: &Status) {
        let now = SystemTime::now();
        if status.accepted > self.accepted {
            self.told.last_good = now;
        }
        if let Some(refusal) = &status.refusal
            && status.refused > self.refused
        {
            self.told.last_refusal = Some(Refusal {
                at: now,
                reason: refusal.label,
                report: refusal.report.to_string(),
            });
        }
        self.told.in_force = status.refusal.is_none();
        (self.accepted, self.refused) = (status.accepted, status.refused);
    }
}

/// What the workers carry and remember.
#[derive(Debug)]
pub struct Carried {
    pub tunnels: Vec<proxy::Tunnel>,
    pub neighbours: Vec<proxy::Neighbour>,
    pub ended: Vec<proxy::Ended>,
}

/// What is known at once.
pub struct Sections {
    pub node: String,
    pub mesh: MeshStatus,
    pub certificates: Certificates,
    pub audit: Audit,
    acceleration: Acceleration,
    workloads: Vec<Workload>,
    refused: Vec<Refused>,
    served: Vec<Served>,
}

impl Sections {
    pub fn new(
        node: String,
        mesh: MeshStatus,
        certificates: Certificates,
        audit: Audit,
        pods: &Pods,
        served: Vec<Served>,
    ) -> Self {
        let refused = pods.refused().map(|(workload, why)| Refused {
            workload: workload.clone(),
            why: why.to_owned(),
        });
        let mut sections = Self {
            node,
            mesh,
            certificates,
            audit,
            acceleration: pods.steering.acceleration().verdict().into(),
            workloads: workloads(pods),
            refused: refused.collect(),
            served,
        };
        sections.workloads.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        sections
            .refused
            .sort_unstable_by(|a, b| a.workload.cmp(&b.workload));
        sections
    }

    /// The whole document. `age` says how long a difference has been there.
    pub fn complete(
        self,
        carried: &Carried,
        account: Result<io::Result<Account>, JoinError>,
        age: impl Fn(&ledger::Difference) -> Duration,
        services: Vec<Service>,
    ) -> Document {
        let account = account.unwrap_or_else(|error| Err(io::Error::other(error)));
        let tunnels = carried.tunnels.iter();
        let mut tunnels: Vec<Tunnel> = tunnels.map(|told| tunnel(told, &self.served)).collect();
        tunnels.sort_by(|a, b| (&a.workload, a.peer).cmp(&(&b.workload, b.peer)));
        let neighbours = carried.neighbours.iter();
        let mut neighbours: Vec<Neighbour> = neighbours
            .map(|told| neighbour(told, &self.served))
            .collect();
        neighbours.sort_by(|a, b| {
            let key = |pair: &Neighbour| (pair.source.clone(), pair.address);
            key(a).cmp(&key(b))
        });
        Document {
            node: self.node,
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            mesh: self.mesh.told,
            workloads: self.workloads,
            refused: self.refused,
            services,
            tunnels,
            neighbours,
            ended: last_ended(&carried.ended),
            certificates: self.certificates,
            ledger: match account {
                Ok(account) => ledger_section(&account, &self.served, age),
                Err(error) => Ledger {
                    descriptors: Descriptors::default(),
                    workloads: Vec::new(),
                    differences: Vec::new(),
                    failure: Some(error.to_string()),
                },
            },
            audit: self.audit,
            acceleration: self.acceleration,
        }
    }
}

fn workloads(pods: &Pods) -> Vec<Workload> {
    let now = Instant::now();
    pods.all()
        .map(|pod| {
            let netns = pod.enrolment.pod();
            let asked = pod.workload.settings.accelerate;
            let accelerated = pods.steering.acceleration().in_force(asked);
            let mut addresses = netns.addresses();
            addresses.sort_unstable();
            Workload {
                id: pod.workload.id.clone(),
                identity: pod.workload.identity.to_string(),
                number: netns.id,
                netns: pod.workload.netns.clone().unwrap_or_default(),
                netns_inode: netns.netns.id().inode,
                addresses,
                interfaces: interfaces(pod.enrolment.interfaces()),
                listener_ports: ListenerPorts {
                    outbound: netns.listener_ports.outbound,
                    inbound: netns.listener_ports.inbound,
                    mesh: netns.listener_ports.mesh,
                },
                settings: (&pod.workload.settings).into(),
                probes: pod.workload.probes.list.iter().map(Into::into).collect(),
                probes_from: pod.workload.probes.from.clone(),
                acceleration: accelerated.into(),
                degraded: pod
                    .enrolment
                    .degradations()
                    .into_iter()
                    .map(|(reason, what)| Degraded {
                        reason: reason.as_str(),
                        what,
                    })
                    .collect(),
                connections: pod.connections.count(),
                leaving_within_seconds: pod.leaves.map(|end| (end - now).as_secs()),
            }
        })
        .collect()
}

/// From index, name, and why it isn't steered.
fn interfaces(found: Vec<(u32, String, Option<String>)>) -> Vec<Interface> {
    let mut interfaces: Vec<_> = found
        .into_iter()
        .map(|(index, name, failure)| Interface {
            index,
            name,
            steered: failure.is_none(),
            failure,
        })
        .collect();
    interfaces.sort_unstable_by_key(|interface| interface.index);
    interfaces
}

fn name(number: u32, served: &[Served]) -> Option<&WorkloadId> {
    let found = served.iter().find(|served| served.pod.id == number)?;
    Some(&found.workload)
}

fn tunnel(told: &proxy::Tunnel, served: &[Served]) -> Tunnel {
    Tunnel {
        direction: told.direction.as_str(),
        workload: name(told.pod, served).map(ToString::to_string),
        peer: told.peer,
        identity: told.identity.to_string(),
        streams: told.streams,
        age_seconds: told.age,
    }
}

fn neighbour(told: &proxy::Neighbour, served: &[Served]) -> Neighbour {
    let name = |pod| name(pod, served).map(ToString::to_string);
    Neighbour {
        source: name(told.source),
        destination: name(told.destination),
        address: told.address,
        network: told.network,
        takes_connections: told.takes,
        connections: told.connections,
    }
}

/// Those of all workers together: what ended alike on several is told once.
fn last_ended(ended: &[proxy::Ended]) -> Vec<Ended> {
    let mut together: HashMap<_, proxy::Ended> = HashMap::new();
    for one in ended {
        let key = (one.direction, one.source, one.destination, one.reason);
        together
            .entry(key)
            .and_modify(|sum| {
                sum.at = sum.at.max(one.at);
                sum.times += one.times;
            })
            .or_insert(*one);
    }
    let mut together: Vec<_> = together.into_values().collect();
    together.sort_unstable_by_key(|one| std::cmp::Reverse(one.at));
    together
        .iter()
        .map(|one| Ended {
            at: one.at,
            direction: one.direction.as_str(),
            source: one.source,
            destination: one.destination,
            reason: one.reason.map(Reason::as_str),
            times: one.times,
        })
        .collect()
}

/// The ends of what the node's identities hang on.
pub fn certificates(certificates: &identity::Certificates) -> Certificates {
    let mut workloads: Vec<_> = certificates
        .expirations()
        .into_iter()
        .map(|(identity, expires)| Certificate {
            identity: identity.to_string(),
            expires,
        })
        .collect();
    workloads.sort_unstable_by(|a, b| a.identity.cmp(&b.identity));
    let authority = certificates.authority();
    let parts = authority.expiries.iter().map(|expiry| AuthorityPart {
        object: expiry.object,
        subject: expiry.subject.clone(),
        path: expiry.path.clone(),
        begins: expiry.begins.into(),
        expires: expiry.ends.into(),
    });
    Certificates {
        workloads,
        authority: parts.collect(),
    }
}

fn ledger_section(
    account: &Account,
    served: &[Served],
    age: impl Fn(&ledger::Difference) -> Duration,
) -> Ledger {
    let mut workloads: Vec<_> = served
        .iter()
        .map(|served| workload_ledger(served, account.pods.get(&served.pod.id)))
        .collect();
    workloads.sort_unstable_by(|a, b| a.workload.cmp(&b.workload));
    let differences = account.differences.iter().map(|difference| Difference {
        how: difference.kind.as_str(),
        kind: difference.what.clone(),
        workload: difference
            .pod
            .and_then(|pod| Some(name(pod, served)?.to_string())),
        descriptor: difference.descriptor,
        identity: difference.identity.clone(),
        local: difference.ends.map(|(local, _)| local),
        remote: difference.ends.map(|(_, remote)| remote),
        for_seconds: age(difference),
    });
    let entered = account.entered.iter();
    Ledger {
        descriptors: Descriptors {
            open: account.open,
            entered: entered.map(|(kind, n)| (kind.as_str(), *n)).collect(),
            from_start: account.from_start.clone(),
        },
        workloads,
        differences: differences.collect(),
        failure: None,
    }
}

fn workload_ledger(served: &Served, account: Option<&PodAccount>) -> WorkloadLedger {
    let unknown = PodAccount::default();
    let account = account.unwrap_or(&unknown);
    let believed = Sockets {
        listeners: account.listeners(),
        connections: account.connections(),
    };
    let sockets: BTreeMap<_, _> = account
        .believed
        .iter()
        .map(|(kind, count)| (kind.as_str(), *count))
        .collect();
    let more = |kernel: usize, believed: usize| {
        i64::try_from(kernel).unwrap_or(i64::MAX) - i64::try_from(believed).unwrap_or(i64::MAX)
    };
    let closed = account.kernel.map_or(0, |kernel| kernel.closed);
    WorkloadLedger {
        workload: served.workload.clone(),
        tasks: served.tasks,
        sockets,
        believed,
        kernel: account.kernel.map(|kernel| Sockets {
            listeners: kernel.listeners,
            connections: kernel.connections,
        }),
        closed,
        difference: account.kernel.map(|kernel| SocketsDifference {
            listeners: more(kernel.listeners, believed.listeners),
            connections: more(kernel.connections + closed, believed.connections),
        }),
    }
}
