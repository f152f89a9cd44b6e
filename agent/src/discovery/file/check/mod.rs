//! Text to a checked [`Mesh`], or every problem that the text has.
//!
//! Pure: reads no file and no clock. A text that isn't a mesh file at all has one problem, the
//! first; of one that is, all mistakes are told at once, in the order in which they are checked.

mod probes;
mod services;
mod settings;
mod values;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    error::{Error, Problem},
    parse,
    schema::{At, MeshFile, MeshMode, NamespaceEntry, NodeEntry, PortEntry, WorkloadEntry},
};
use crate::model::{
    IdentityConfig, Mesh, Node, RUNTIME_FOLDERS, ServiceId, Settings, SpiffeId, Workload,
    WorkloadId, WorkloadPort,
};

const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_NAME: &str = "default";

/// The mesh that `text` describes. `path` is only what errors call the file.
pub fn check(path: &Path, text: &str) -> Result<Mesh, Error> {
    mesh(path, &parse(path, text)?)
}

/// The shape of `text`.
pub(super) fn parse(path: &Path, text: &str) -> Result<MeshFile, Error> {
    parse::parse(text).map_err(|problem| Error::Invalid {
        path: path.to_owned(),
        problems: vec![problem],
    })
}

/// The mesh that `file` describes.
pub(super) fn mesh(path: &Path, file: &MeshFile) -> Result<Mesh, Error> {
    let mut checker = Checker::default();
    let mesh = checker.mesh(file);
    if checker.problems.is_empty() {
        Ok(mesh)
    } else {
        Err(Error::Invalid {
            path: path.to_owned(),
            problems: checker.problems,
        })
    }
}

/// Collects problems, and what must be unique over the whole file.
///
/// Where a value has a problem, its method goes on with a stand-in: the mesh is thrown away.
#[derive(Default)]
struct Checker {
    problems: Vec<Problem>,
    addresses: HashMap<IpAddr, (Owner, u64)>,
    workloads: HashMap<WorkloadId, u64>,
    /// By node and path.
    netns: HashMap<(String, PathBuf), (WorkloadId, u64)>,
}

/// Whose an address is.
#[derive(Clone, PartialEq, Eq)]
enum Owner {
    Node(String),
    Workload(WorkloadId),
    Service(ServiceId),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Workload(id) => id.fmt(f),
            Self::Service(id) => write!(f, "Service {id}"),
        }
    }
}

impl Checker {
    fn mesh(&mut self, file: &MeshFile) -> Mesh {
        let trust_domain = self
            .optional(file.trust_domain.as_ref(), &"trustDomain", |text| {
                values::trust_domain(text).map(|()| text.clone())
            })
            .unwrap_or_else(|| DEFAULT_TRUST_DOMAIN.to_owned());
        let identity = self.identity(file);
        let nodes = self.nodes(&file.nodes);
        let by_name = nodes.iter().map(|node| (&*node.name, &*node.addresses));
        let by_name: HashMap<&str, &[IpAddr]> = by_name.collect();
        let base = settings::resolve(
            self,
            file.settings.as_ref(),
            &"settings",
            &Settings::default(),
        );
        let namespaces = self.namespaces(&file.namespaces, &base);
        let workloads: Vec<Workload> = file
            .workloads
            .iter()
            .enumerate()
            .map(|(index, entry)| {
                let context = Context {
                    trust_domain: &trust_domain,
                    nodes: &by_name,
                    namespaces: &namespaces,
                    base: &base,
                };
                self.workload(entry, &format!("workloads[{index}]"), &context)
            })
            .collect();
        let services = services::check(self, &file.services, &workloads);
        Mesh::new(trust_domain, identity, nodes, workloads, services)
    }

    fn identity(&mut self, file: &MeshFile) -> IdentityConfig {
        let default = IdentityConfig::default();
        let directory = self.optional(
            file.identity.directory.as_ref(),
            &"identity.directory",
            |text| values::absolute_path(text),
        );
        let lifetime = self.optional(
            file.identity.certificate_lifetime.as_ref(),
            &"identity.certificateLifetime",
            |text| values::duration(&text.0),
        );
        IdentityConfig {
            directory: directory.unwrap_or(default.directory),
            certificate_lifetime: lifetime.unwrap_or(default.certificate_lifetime),
        }
    }

    fn nodes(&mut self, entries: &[At<NodeEntry>]) -> Vec<Node> {
        let mut lines = HashMap::new();
        let mut nodes = Vec::with_capacity(entries.len());
        for (index, At { value: entry, .. }) in entries.iter().enumerate() {
            let path = format!("nodes[{index}]");
            let At { value: name, line } = &entry.name;
            self.valid(&entry.name, &format_args!("{path}.name"), values::subdomain);
            if let Some(first) = lines.insert(name.clone(), *line) {
                self.problem(
                    *line,
                    &format_args!("{path}.name"),
                    format!("there is a node {name} already (line {first})"),
                );
            }
            nodes.push(Node {
                name: name.clone(),
                addresses: self.addresses(&entry.addresses, &path, &Owner::Node(name.clone())),
                cgroup: self.path(&entry.cgroup, &format_args!("{path}.cgroup")),
                bpffs: self.path(&entry.bpffs, &format_args!("{path}.bpffs")),
                runtime: match &entry.runtime {
                    Some(folder) => self.path(folder, &format_args!("{path}.runtime")),
                    None => Path::new(RUNTIME_FOLDERS).join(name),
                },
            });
        }
        nodes
    }

    /// The settings of each namespace that has an entry.
    fn namespaces(
        &mut self,
        entries: &[At<NamespaceEntry>],
        base: &Settings,
    ) -> HashMap<String, Settings> {
        let mut lines = HashMap::new();
        let mut namespaces = HashMap::new();
        for (index, At { value: entry, .. }) in entries.iter().enumerate() {
            let path = format!("namespaces[{index}]");
            let At { value: name, line } = &entry.name;
            self.valid(&entry.name, &format_args!("{path}.name"), values::label);
            if let Some(first) = lines.insert(name.clone(), *line) {
                self.problem(
                    *line,
                    &format_args!("{path}.name"),
                    format!("there is a namespace {name} already (line {first})"),
                );
            }
            let own = settings::resolve(
                self,
                entry.settings.as_ref(),
                &format_args!("{path}.settings"),
                base,
            );
            namespaces.insert(name.clone(), own);
        }
        namespaces
    }

    fn workload(
        &mut self,
        At { value: entry, line }: &At<WorkloadEntry>,
        path: &str,
        context: &Context<'_>,
    ) -> Workload {
        self.valid(&entry.name, &format_args!("{path}.name"), values::subdomain);
        let namespace = self.name_or_default(
            entry.namespace.as_ref(),
            &format_args!("{path}.namespace"),
            values::label,
        );
        let service_account = self.name_or_default(
            entry.service_account.as_ref(),
            &format_args!("{path}.serviceAccount"),
            values::subdomain,
        );
        let id = WorkloadId {
            namespace: namespace.clone(),
            name: entry.name.value.clone(),
        };
        if let Some(first) = self.workloads.insert(id.clone(), entry.name.line) {
            self.problem(
                entry.name.line,
                &format_args!("{path}.name"),
                format!("there is a workload {id} already (line {first})"),
            );
        }
        if let Some(node) = &entry.node
            && !context.nodes.contains_key(node.value.as_str())
        {
            self.problem(
                node.line,
                &format_args!("{path}.node"),
                format!("there is no node {} in this file", node.value),
            );
        }
        let ports = self.ports(&entry.ports, path);
        let wider = context.namespaces.get(&namespace).unwrap_or(context.base);
        Workload {
            identity: Arc::new(SpiffeId {
                trust_domain: context.trust_domain.to_owned(),
                namespace,
                service_account,
            }),
            node: entry
                .node
                .as_ref()
                .map_or_else(String::new, |node| node.value.clone()),
            netns: self.netns(entry, *line, path, &id),
            addresses: self.addresses(&entry.addresses, path, &Owner::Workload(id.clone())),
            probes: probes::probes(self, entry, path, &ports, context),
            ports,
            labels: entry
                .labels
                .iter()
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
            meshed: entry.mesh == MeshMode::Enabled,
            ready: entry.ready.unwrap_or(true),
            serving: entry.serving.or(entry.ready).unwrap_or(true),
            settings: settings::resolve(
                self,
                entry.settings.as_ref(),
                &format_args!("{path}.settings"),
                wider,
            ),
            id,
        }
    }

    fn netns(
        &mut self,
        entry: &WorkloadEntry,
        line: u64,
        path: &str,
        id: &WorkloadId,
    ) -> Option<PathBuf> {
        let field = format_args!("{path}.netns");
        let Some(netns) = &entry.netns else {
            if entry.mesh == MeshMode::Enabled && entry.node.is_some() {
                self.problem(
                    line,
                    &field,
                    "is missing: the agent enters a meshed pod's network namespace; write its \
                     path, or `mesh: disabled`"
                        .to_owned(),
                );
            }
            return None;
        };
        let Some(node) = &entry.node else {
            self.problem(
                netns.line,
                &field,
                "stands without `node`: a path means nothing without the node that it is on"
                    .to_owned(),
            );
            return None;
        };
        let netns_path = self.parsed(netns, &field, |text| values::absolute_path(text))?;
        let key = (node.value.clone(), netns_path.clone());
        if let Some((other, first)) = self.netns.get(&key) {
            let reason = format!(
                "{} belongs to {other} on the same node already (line {first})",
                netns.value
            );
            self.problem(netns.line, &field, reason);
        } else {
            self.netns.insert(key, (id.clone(), netns.line));
        }
        Some(netns_path)
    }

    fn addresses(&mut self, list: &At<Vec<At<String>>>, path: &str, owner: &Owner) -> Vec<IpAddr> {
        let field = format_args!("{path}.addresses");
        if list.value.is_empty() {
            self.problem(
                list.line,
                &field,
                "has no address; at least one is needed".to_owned(),
            );
        }
        self.own_addresses(&list.value, &field, owner)
    }

    /// Addresses that are nobody else's.
    fn own_addresses(
        &mut self,
        list: &[At<String>],
        field: &dyn fmt::Display,
        owner: &Owner,
    ) -> Vec<IpAddr> {
        let mut addresses = Vec::with_capacity(list.len());
        for (index, entry) in list.iter().enumerate() {
            let field = format_args!("{field}[{index}]");
            let Some(address) = self.parsed(entry, &field, |text| values::address(text)) else {
                continue;
            };
            if let Some((other, first)) = self.addresses.get(&address) {
                let reason = format!("{address} belongs to {other} already (line {first})");
                self.problem(entry.line, &field, reason);
            } else {
                self.addresses.insert(address, (owner.clone(), entry.line));
                addresses.push(address);
            }
        }
        addresses
    }

    fn ports(&mut self, entries: &[PortEntry], path: &str) -> Vec<WorkloadPort> {
        let mut numbers = HashMap::new();
        let mut names = HashMap::new();
        let mut ports = Vec::with_capacity(entries.len());
        for (index, PortEntry { name, port }) in entries.iter().enumerate() {
            let field = format_args!("{path}.ports[{index}].port");
            if port.value == 0 {
                let reason = "port 0 stands for no port; write 1 to 65535";
                self.problem(port.line, &field, reason.to_owned());
            } else if let Some(first) = numbers.insert(port.value, port.line) {
                let reason = format!("port {} is declared already (line {first})", port.value);
                self.problem(port.line, &field, reason);
            }
            if let Some(name) = name {
                let field = format_args!("{path}.ports[{index}].name");
                self.valid(name, &field, values::label);
                if let Some(first) = names.insert(&name.value, name.line) {
                    let reason = format!("there is a port {} already (line {first})", name.value);
                    self.problem(name.line, &field, reason);
                }
            }
            ports.push(WorkloadPort {
                name: name.as_ref().map(|name| name.value.clone()),
                port: port.value,
            });
        }
        ports
    }

    fn name_or_default(
        &mut self,
        name: Option<&At<String>>,
        field: &dyn fmt::Display,
        check: impl FnOnce(&str) -> Result<(), String>,
    ) -> String {
        name.map_or_else(
            || DEFAULT_NAME.to_owned(),
            |name| {
                self.valid(name, field, check);
                name.value.clone()
            },
        )
    }

    fn path(&mut self, text: &At<String>, field: &dyn fmt::Display) -> PathBuf {
        self.parsed(text, field, |text| values::absolute_path(text))
            .unwrap_or_default()
    }

    fn valid(
        &mut self,
        text: &At<String>,
        field: &dyn fmt::Display,
        check: impl FnOnce(&str) -> Result<(), String>,
    ) {
        if let Err(reason) = check(&text.value) {
            self.problem(text.line, field, reason);
        }
    }

    fn optional<T, R>(
        &mut self,
        value: Option<&At<T>>,
        field: &dyn fmt::Display,
        parse: impl FnOnce(&T) -> Result<R, String>,
    ) -> Option<R> {
        value.and_then(|value| self.parsed(value, field, parse))
    }

    fn list<T, R>(
        &mut self,
        list: &[At<T>],
        field: &dyn fmt::Display,
        parse: impl Fn(&T) -> Result<R, String>,
    ) -> Vec<R> {
        list.iter()
            .enumerate()
            .filter_map(|(index, entry)| {
                self.parsed(entry, &format_args!("{field}[{index}]"), &parse)
            })
            .collect()
    }

    fn parsed<T, R>(
        &mut self,
        value: &At<T>,
        field: &dyn fmt::Display,
        parse: impl FnOnce(&T) -> Result<R, String>,
    ) -> Option<R> {
        parse(&value.value)
            .map_err(|reason| self.problem(value.line, field, reason))
            .ok()
    }

    fn problem(&mut self, line: u64, field: &dyn fmt::Display, reason: String) {
        self.problems.push(Problem {
            line: Some(line),
            field: field.to_string(),
            reason,
        });
    }
}

/// What the entry of a workload refers to.
struct Context<'a> {
    trust_domain: &'a str,
    /// Addresses of the nodes by their name.
    nodes: &'a HashMap<&'a str, &'a [IpAddr]>,
    /// Settings by namespace.
    namespaces: &'a HashMap<String, Settings>,
    /// Settings of namespaces without an entry.
    base: &'a Settings,
}
