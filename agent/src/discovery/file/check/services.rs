//! Services: their own fields, and which endpoints they have.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    time::Duration,
};

use super::{Checker, Owner, values};
use crate::{
    discovery::file::schema::{
        At, EndpointEntry, PortText, ServiceEntry, ServicePortEntry, SessionAffinity,
    },
    model::{Endpoint, EndpointState, Service, ServiceId, ServicePort, TargetPort, Workload},
};

/// Kubernetes' own default.
const DEFAULT_AFFINITY: Duration = Duration::from_hours(3);

/// The Services of the file. Addresses come first: none may be an endpoint's.
pub(super) fn check(
    checker: &mut Checker,
    entries: &[At<ServiceEntry>],
    workloads: &[Workload],
) -> Vec<Service> {
    let mut lines = HashMap::new();
    let mut services = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        services.push(service(
            checker,
            entry,
            &format!("services[{index}]"),
            &mut lines,
        ));
    }
    let known = Known::new(workloads);
    let with_endpoints = services.into_iter().zip(entries).enumerate();
    with_endpoints
        .map(|(index, (service, entry))| {
            let path = format!("services[{index}]");
            let endpoints = if entry.value.endpoints.is_empty() {
                selected(&service, &entry.value.selector, &known)
            } else {
                explicit(checker, &service, &entry.value, &path, &known)
            };
            service.with_endpoints(endpoints)
        })
        .collect()
}

fn service(
    checker: &mut Checker,
    At { value: entry, line }: &At<ServiceEntry>,
    path: &str,
    lines: &mut HashMap<ServiceId, u64>,
) -> Service {
    let name_field = format!("{path}.name");
    checker.valid(&entry.name, &name_field, values::label);
    let namespace = checker.name_or_default(
        entry.namespace.as_ref(),
        &format_args!("{path}.namespace"),
        values::label,
    );
    let name = entry.name.value.clone();
    let id = ServiceId { namespace, name };
    if let Some(first) = lines.insert(id.clone(), entry.name.line) {
        let reason = format!("there is a Service {id} already (line {first})");
        checker.problem(entry.name.line, &name_field, reason);
    }
    let owner = Owner::Service(id.clone());
    let field = format_args!("{path}.addresses");
    let addresses = checker.own_addresses(&entry.addresses, &field, &owner);
    if entry.headless && !entry.addresses.is_empty() {
        let reason = "a headless Service has no address; take out this or `headless`";
        checker.problem(*line, &field, reason.to_owned());
    }
    if !entry.headless && entry.addresses.is_empty() {
        let reason = "is missing: write the Service's cluster addresses, or `headless: true`";
        checker.problem(*line, &field, reason.to_owned());
    }
    if !entry.headless && entry.ports.is_empty() {
        let reason = "is missing: write at least one port";
        checker.problem(*line, &format_args!("{path}.ports"), reason.to_owned());
    }
    if let Some(endpoint) = entry.endpoints.first()
        && !entry.selector.is_empty()
    {
        let reason = "stands beside `selector`, which chooses the endpoints; take out one of them";
        let field = format_args!("{path}.endpoints");
        checker.problem(endpoint.line, &field, reason.to_owned());
    }
    Service {
        host: format!("{}.{}.svc.cluster.local", id.name, id.namespace),
        id,
        addresses,
        ports: ports(checker, &entry.ports, path),
        publish_not_ready_addresses: entry.publish_not_ready_addresses,
        traffic_distribution: entry.traffic_distribution,
        client_ip_affinity: affinity(checker, entry, path),
        endpoints: Vec::new(),
    }
}

fn affinity(checker: &mut Checker, entry: &ServiceEntry, path: &str) -> Option<Duration> {
    let field = format_args!("{path}.sessionAffinityTimeout");
    let timeout = checker.optional(entry.session_affinity_timeout.as_ref(), &field, |text| {
        values::duration(&text.0)
    });
    match (entry.session_affinity, &entry.session_affinity_timeout) {
        (SessionAffinity::ClientIP, _) => Some(timeout.unwrap_or(DEFAULT_AFFINITY)),
        (SessionAffinity::None, None) => None,
        (SessionAffinity::None, Some(timeout)) => {
            let reason = "means nothing without `sessionAffinity: ClientIP`";
            checker.problem(timeout.line, &field, reason.to_owned());
            None
        }
    }
}

fn ports(checker: &mut Checker, entries: &[At<ServicePortEntry>], path: &str) -> Vec<ServicePort> {
    let (mut numbers, mut names) = (HashMap::new(), HashMap::new());
    let mut ports = Vec::with_capacity(entries.len());
    for (index, At { value: entry, line }) in entries.iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        let (field, port) = (format_args!("{path}.port"), &entry.port);
        if port.value == 0 {
            let reason = "port 0 stands for no port; write 1 to 65535";
            checker.problem(port.line, &field, reason.to_owned());
        } else if let Some(first) = numbers.insert(port.value, port.line) {
            let reason = format!("port {} is declared already (line {first})", port.value);
            checker.problem(port.line, &field, reason);
        }
        let field = format_args!("{path}.name");
        match &entry.name {
            Some(name) => {
                checker.valid(name, &field, values::label);
                if let Some(first) = names.insert(&name.value, name.line) {
                    let reason = format!("there is a port {} already (line {first})", name.value);
                    checker.problem(name.line, &field, reason);
                }
            }
            None if entries.len() > 1 => {
                let reason = "is missing: each port of a Service with several has a name";
                checker.problem(*line, &field, reason.to_owned());
            }
            None => {}
        }
        let field = format_args!("{path}.targetPort");
        let target = checker.optional(entry.target_port.as_ref(), &field, target_port);
        ports.push(ServicePort::new(
            entry.name.as_ref().map(|name| name.value.clone()),
            port.value,
            target.unwrap_or(TargetPort::Number(port.value)),
            entry.app_protocol.clone(),
        ));
    }
    ports
}

fn target_port(PortText(text): &PortText) -> Result<TargetPort, String> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        values::label(text)?;
        return Ok(TargetPort::Name(text.clone()));
    }
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is no port; write 1 to 65535")),
        Ok(port) => Ok(TargetPort::Number(port)),
    }
}

/// The file's workloads, by what Services look for.
struct Known<'a> {
    by_address: HashMap<IpAddr, &'a Workload>,
    /// By namespace, and key and value of a label.
    by_label: HashMap<(&'a str, &'a str, &'a str), Vec<&'a Workload>>,
}

impl<'a> Known<'a> {
    fn new(workloads: &'a [Workload]) -> Self {
        let mut known = Self {
            by_address: HashMap::new(),
            by_label: HashMap::new(),
        };
        for workload in workloads {
            for address in &workload.addresses {
                known.by_address.insert(*address, workload);
            }
            for (key, value) in &workload.labels {
                let label = (workload.id.namespace.as_str(), key.as_str(), value.as_str());
                known.by_label.entry(label).or_default().push(workload);
            }
        }
        known
    }

    /// The workloads of a namespace that have all labels of `selector`; none for none.
    fn with_labels(
        &self,
        namespace: &'a str,
        selector: &'a BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'a Workload> {
        let lists = selector.iter().map(|(key, value)| {
            let list = self.by_label.get(&(namespace, key, value));
            list.map_or(&[][..], Vec::as_slice)
        });
        let shortest = lists.min_by_key(|list| list.len()).unwrap_or_default();
        let has = |workload: &Workload, (key, value): (&String, &String)| {
            let mut labels = workload.labels.iter();
            labels.any(|(k, v)| (k, v) == (key, value))
        };
        let chosen = shortest.iter().copied();
        chosen.filter(move |workload| selector.iter().all(|label| has(workload, label)))
    }
}

fn selected(
    service: &Service,
    selector: &BTreeMap<String, String>,
    known: &Known<'_>,
) -> Vec<Endpoint> {
    let workloads = known.with_labels(&service.id.namespace, selector);
    workloads
        .map(|workload| Endpoint {
            addresses: workload.addresses.clone(),
            workload: Some(workload.id.clone()),
            node: workload.node.clone(),
            state: state(service, workload.ready, workload.serving),
            ports: endpoint_ports(service, Some(workload)),
        })
        .collect()
}

fn explicit(
    checker: &mut Checker,
    service: &Service,
    entry: &ServiceEntry,
    path: &str,
    known: &Known<'_>,
) -> Vec<Endpoint> {
    let mut lines = HashMap::new();
    let mut endpoints = Vec::with_capacity(entry.endpoints.len());
    for (index, At { value, line }) in entry.endpoints.iter().enumerate() {
        let path = format!("{path}.endpoints[{index}]");
        let addresses = endpoint_addresses(checker, &value.addresses, &path, &mut lines);
        let mut owners = addresses
            .iter()
            .map(|address| known.by_address.get(address));
        let workload = owners.next().flatten().copied();
        if owners.any(|other| other.map(|other| &other.id) != workload.map(|first| &first.id)) {
            let reason = "are of several workloads; write an endpoint for each";
            let field = format_args!("{path}.addresses");
            checker.problem(value.addresses.line, &field, reason.to_owned());
        }
        let ports = endpoint_ports(service, workload);
        let undefined = service.ports.iter().zip(&ports);
        for (port, _) in undefined.filter(|(_, number)| number.is_none()) {
            let owner = workload.map_or("no workload".to_owned(), |w| w.id.to_string());
            let reason = format!(
                "has no port named {}, which is the Service's target: {owner} is at this address; \
                 declare the port there, or write a number as `targetPort`",
                port.target
            );
            checker.problem(*line, &path, reason);
        }
        let (ready, serving) = flags(value, workload);
        endpoints.push(Endpoint {
            addresses,
            workload: workload.map(|workload| workload.id.clone()),
            node: workload.map_or_else(String::new, |workload| workload.node.clone()),
            state: state(service, ready, serving),
            ports,
        });
    }
    endpoints
}

/// The addresses of one endpoint, at most one of each family, and none of another endpoint or of a
/// Service.
fn endpoint_addresses(
    checker: &mut Checker,
    list: &At<Vec<At<String>>>,
    path: &str,
    lines: &mut HashMap<IpAddr, u64>,
) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(list.value.len());
    if list.value.is_empty() {
        let reason = "has no address; at least one is needed";
        checker.problem(
            list.line,
            &format_args!("{path}.addresses"),
            reason.to_owned(),
        );
    }
    for (index, entry) in list.value.iter().enumerate() {
        let field = format_args!("{path}.addresses[{index}]");
        let Some(address) = checker.parsed(entry, &field, |text| values::address(text)) else {
            continue;
        };
        let of_service = match checker.addresses.get(&address) {
            Some((owner @ Owner::Service(_), _)) => Some(owner.to_string()),
            _ => None,
        };
        let same = |other: &IpAddr| other.is_ipv4() == address.is_ipv4();
        let reason = if let Some(owner) = of_service {
            format!("{address} belongs to {owner}; an endpoint is no Service")
        } else if addresses.iter().any(same) {
            "is a second one of this family; write an endpoint for each".to_owned()
        } else if let Some(first) = lines.insert(address, entry.line) {
            format!("{address} is an endpoint already (line {first})")
        } else {
            addresses.push(address);
            continue;
        };
        checker.problem(entry.line, &field, reason);
    }
    addresses
}

fn flags(entry: &EndpointEntry, workload: Option<&Workload>) -> (bool, bool) {
    let own = |workload: &Workload| (workload.ready, workload.serving);
    let (ready, serving) = match (entry.ready, workload) {
        (Some(ready), _) => (ready, ready),
        (None, workload) => workload.map_or((true, true), own),
    };
    (ready, entry.serving.unwrap_or(serving))
}

fn state(service: &Service, ready: bool, serving: bool) -> EndpointState {
    if ready || service.publish_not_ready_addresses {
        EndpointState::Ready
    } else if serving {
        EndpointState::Serving
    } else {
        EndpointState::NotReady
    }
}

/// Where each port of the Service leads. An endpoint without a named port is none for it.
fn endpoint_ports(service: &Service, workload: Option<&Workload>) -> Vec<Option<u16>> {
    let number = |port: &ServicePort| match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => {
            let mut ports = workload?.ports.iter();
            let named = ports.find(|port| port.name.as_ref() == Some(name));
            named.map(|port| port.port)
        }
    };
    service.ports.iter().map(number).collect()
}
