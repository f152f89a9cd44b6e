//! The ends of a connection, as a user names them.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context, bail};

use crate::model::{Mesh, Service, ServiceId, Workload};

/// One end: a pod or a Service of the mesh file, or an address that it doesn't know.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) workload: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    /// The name of the node that it is.
    node: Option<String>,
    /// All of them; never empty.
    pub(super) addresses: Vec<IpAddr>,
}

impl End {
    /// From an address, `NAME` or `NAMESPACE/NAME`.
    pub(super) fn parse(mesh: &Mesh, text: &str) -> anyhow::Result<Self> {
        if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
            let address = address.to_canonical();
            return Ok(Self {
                workload: mesh.workload_at(address).cloned(),
                service: mesh.service_at(address).cloned(),
                node: None,
                addresses: vec![address],
            });
        }
        let fits = |workload: &&Arc<Workload>| match text.split_once('/') {
            Some((namespace, name)) => {
                workload.id.namespace == namespace && workload.id.name == name
            }
            None => workload.id.name == text,
        };
        let mut fitting: Vec<_> = mesh.workloads.values().filter(fits).collect();
        fitting.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        match &fitting[..] {
            [workload] if workload.addresses.is_empty() => {
                bail!("pod {} has no address in the mesh file", workload.id)
            }
            [workload] => Ok(Self {
                workload: Some(Arc::clone(workload)),
                service: None,
                node: None,
                addresses: workload.addresses.clone(),
            }),
            [] => bail!(
                "no pod of the mesh file is named `{text}`: give its address, NAME or \
                 NAMESPACE/NAME"
            ),
            several => {
                let ids: Vec<String> = several.iter().map(|pod| pod.id.to_string()).collect();
                bail!(
                    "several pods are named `{text}`: say which of {}",
                    ids.join(", ")
                )
            }
        }
    }

    /// The node that `pod` is on, where its probes come from.
    pub(super) fn node_of(mesh: &Mesh, pod: &Self) -> anyhow::Result<Self> {
        let node = pod.workload.as_ref().map(|pod| pod.node.as_str());
        let node = node.and_then(|name| mesh.nodes.get(name));
        let node = node.with_context(|| {
            let name = pod.name();
            format!(
                "`node` stands for the node of the pod that is called, and {name} is no pod that \
                 has one in the mesh file (a pod of this name is called NAMESPACE/node)"
            )
        })?;
        Ok(Self {
            workload: None,
            service: None,
            node: Some(node.name.clone()),
            addresses: node.addresses.clone(),
        })
    }

    /// A Service that clients call by its own address: from `NAME`, `NAMESPACE/NAME` or its name in
    /// the cluster's DNS. None where none is named so.
    fn service(mesh: &Mesh, text: &str) -> anyhow::Result<Option<Self>> {
        let fits = |service: &&Arc<Service>| match text.split_once('/') {
            Some((namespace, name)) => service.id.namespace == namespace && service.id.name == name,
            None => service.id.name == text || service.host == text,
        };
        let services = mesh.services.values().filter(fits);
        let mut fitting: Vec<_> = services.filter(|s| !s.addresses.is_empty()).collect();
        fitting.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        match &fitting[..] {
            [] => Ok(None),
            [service] => Ok(Some(Self {
                workload: None,
                service: Some(Arc::clone(service)),
                node: None,
                addresses: service.addresses.clone(),
            })),
            several => {
                let ids: Vec<String> = several.iter().map(|s| s.id.to_string()).collect();
                bail!(
                    "several Services are named `{text}`: say which of {}",
                    ids.join(", ")
                )
            }
        }
    }

    /// A destination, with a port after the last colon. A name is a Service's first, as in the
    /// cluster's DNS, then a pod's.
    pub(super) fn parse_with_port(mesh: &Mesh, text: &str) -> anyhow::Result<(Self, u16)> {
        let split = text.rsplit_once(':');
        let (host, port) = split
            .filter(|(host, _)| !host.is_empty())
            .with_context(|| {
                format!("`{text}` isn't of the form DST:PORT, such as voting:8080 or [fd01::2]:80")
            })?;
        let Ok(port @ 1..) = port.parse() else {
            bail!("`{port}` in `{text}` isn't a port, 1 to 65535");
        };
        let end = match Self::service(mesh, host)? {
            Some(service) => service,
            None => Self::parse(mesh, host)?,
        };
        Ok((end, port))
    }

    /// The Service that is meant, if one is.
    pub(super) fn service_id(&self) -> Option<&ServiceId> {
        self.service.as_ref().map(|service| &service.id)
    }

    /// How this end is called in output.
    pub(super) fn name(&self) -> String {
        match (&self.workload, &self.service) {
            (Some(workload), _) => workload.id.to_string(),
            (None, Some(service)) => service.id.to_string(),
            (None, None) => match &self.node {
                Some(node) => format!("node {node}"),
                None => self.addresses[0].to_string(),
            },
        }
    }

    /// Whether a connection to this end's `port` is one to `place`: of a Service, to an endpoint too.
    pub(super) fn is_at(&self, place: SocketAddr, port: u16) -> bool {
        let own = place.port() == port && self.addresses.contains(&place.ip());
        let service = self.service.as_ref().and_then(|service| service.port(port));
        own || service.is_some_and(|port| {
            let mut targets = port.targets(place.is_ipv4()).iter();
            targets.any(|target| target.address == place)
        })
    }
}

/// The addresses of both that a connection between them has: of one family, where they have one in
/// common.
pub(super) fn pair(source: &End, destination: &End, port: u16) -> (IpAddr, SocketAddr) {
    let same = |to: &IpAddr| {
        let mut from = source.addresses.iter();
        from.find(|from| from.is_ipv4() == to.is_ipv4()).copied()
    };
    let found = destination
        .addresses
        .iter()
        .find_map(|to| Some((same(to)?, *to)));
    let (from, to) = found.unwrap_or((source.addresses[0], destination.addresses[0]));
    (from, SocketAddr::new(to, port))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::discovery::file;

    fn mesh() -> Mesh {
        let text = "nodes: []\nworkloads:\n\
            - {name: web, namespace: a, addresses: [10.1.0.2, 'fd01::2']}\n\
            - {name: web, namespace: b, addresses: [10.1.0.3]}\n\
            - {name: db, namespace: a, addresses: ['fd01::9', 10.1.0.9]}\n\
            services:\n\
            - name: web\n  namespace: a\n  addresses: [10.96.0.1]\n  ports: [{port: 80, targetPort: 8080}]\n  \
            endpoints: [{addresses: [10.1.0.2]}]\n";
        file::check(Path::new("mesh.yaml"), text).unwrap()
    }

    #[test]
    fn an_end_is_an_address_or_a_pods_name() {
        let mesh = mesh();
        let name = |text| End::parse(&mesh, text).map(|end| end.name());
        assert_eq!(name("db").unwrap(), "a/db");
        assert_eq!(name("b/web").unwrap(), "b/web");
        assert_eq!(name("10.1.0.3").unwrap(), "b/web");
        assert_eq!(name("::ffff:10.1.0.3").unwrap(), "b/web");
        assert_eq!(name("192.0.2.1").unwrap(), "192.0.2.1");
        let several = name("web").unwrap_err().to_string();
        assert!(several.contains("a/web, b/web"), "{several}");
        assert!(name("nobody").unwrap_err().to_string().contains("`nobody`"));
    }

    #[test]
    fn a_port_comes_after_the_last_colon() {
        let mesh = mesh();
        let parse = |text| End::parse_with_port(&mesh, text);
        let (db, port) = parse("[fd01::9]:80").unwrap();
        assert_eq!((db.name().as_str(), port), ("a/db", 80));
        for text in ["db", ":80", "db:0", "db:http", "db:99999"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_destinations_name_is_a_services_first_and_leads_to_its_endpoints() {
        let mesh = mesh();
        for text in [
            "web:80",
            "a/web:80",
            "web.a.svc.cluster.local:80",
            "10.96.0.1:80",
        ] {
            let (web, port) = End::parse_with_port(&mesh, text).unwrap();
            assert_eq!(web.name(), "a/web", "{text}");
            let is_at = |place: &str| web.is_at(place.parse().unwrap(), port);
            assert!(is_at("10.96.0.1:80") && is_at("10.1.0.2:8080"), "{text}");
            assert!(!is_at("10.1.0.2:80") && !is_at("10.96.0.1:8080"), "{text}");
        }
        let (pod, port) = End::parse_with_port(&mesh, "b/web:80").unwrap();
        assert_eq!(pod.name(), "b/web");
        assert!(pod.is_at("10.1.0.3:80".parse().unwrap(), port));
    }

    #[test]
    fn the_node_is_that_of_the_pod_that_is_called() {
        let text = "nodes: [{name: a, addresses: [10.0.0.1], cgroup: /c/a, bpffs: /b/a}]\n\
            workloads:\n\
            - {name: web, node: a, netns: /n/web, addresses: [10.1.0.2]}\n\
            - {name: outside, addresses: [10.1.0.3]}\n";
        let mesh = file::check(Path::new("mesh.yaml"), text).unwrap();
        let pod = |name| End::parse(&mesh, name).unwrap();
        let node = End::node_of(&mesh, &pod("web")).unwrap();
        assert_eq!(node.name(), "node a");
        assert_eq!(node.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        for other in ["outside", "192.0.2.1"] {
            let error = End::node_of(&mesh, &pod(other)).unwrap_err().to_string();
            assert!(error.contains("`node` stands for"), "{error}");
        }
    }

    #[test]
    fn both_ends_are_of_one_family() {
        let mesh = mesh();
        let [web, other, db] =
            ["a/web", "b/web", "db"].map(|text| End::parse(&mesh, text).unwrap());
        let (from, to) = pair(&web, &db, 80);
        assert_eq!((from.is_ipv6(), to.is_ipv6()), (true, true));
        let (from, to) = pair(&other, &db, 80);
        assert_eq!((from.is_ipv4(), to.is_ipv4()), (true, true));
    }
}
