//! Good files, merged settings, and what holds for files of any kind.

mod refusals;

use std::{fmt::Write as _, path::Path, time::Duration};

use super::*;
use crate::model::{
    Accelerate, Ask, EgressMode, EndpointState, FailMode, InterfaceMode, MtlsMode, NestedMode,
    PortRange, Probe,
};

/// Every field of the format.
const FULL: &str = r#"
trustDomain: example.org
identity:
  directory: /var/lib/malla/other
  certificateLifetime: 12h
nodes:
  - name: node-a
    addresses: [10.0.0.1, "fd00::1"]
    cgroup: /sys/fs/cgroup/malla/node-a
    bpffs: /sys/fs/bpf/malla/node-a
    runtime: /run/other/node-a
settings: {mtls: permissive}
namespaces:
  - name: emojivoto
    settings: {mtls: strict}
workloads:
  - name: web-1
    namespace: emojivoto
    serviceAccount: web
    node: node-a
    netns: /run/netns/web
    addresses: [10.1.0.2, "fd01::2"]
    ports: [{name: http, port: 8080}, {port: 9090}]
    probes:
      - httpGet: {path: "/healthz?x=1", port: http}
      - httpGet: {path: "/healthz?x=1", port: 8080}
      - httpGet: {port: 9090}
      - tcpSocket: {port: 5432}
      - grpc: {port: http, service: ready}
      - grpc: {port: 8080}
    labels: {app: web}
    mesh: enabled
    settings:
      mtls: strict
      mtlsByPort: [{ports: 80, mode: permissive}, {ports: 80-81, mode: permissive}]
      egress: mesh-only
      egressAllowSubnets: [10.8.0.0/16]
      failMode: open
      nested: allow
      interfaces: allow
      accelerate: full
      skipOutboundPorts: [4567, "3000-3010"]
      skipInboundPorts: [25]
      skipOutboundSubnets: [10.9.0.0/16]
      skipInboundSubnets: ["fd09::/16"]
      dialPorts: "16000-32000"
      meshConnectTimeout: 2s
      connectTimeout: 500ms
      idleTimeout: 1h
      maxConnections: 300
    ready: true
    serving: true
services:
  - name: web
    namespace: emojivoto
    addresses: [10.96.0.1, "fd96::1"]
    headless: false
    ports: [{name: http, port: 80, targetPort: http, appProtocol: http}, {name: admin, port: 9090}]
    selector: {app: web}
    publishNotReadyAddresses: true
    trafficDistribution: PreferClose
    sessionAffinity: ClientIP
    sessionAffinityTimeout: 10m
  - name: database
    addresses: [10.96.0.2]
    ports: [{port: 5432}]
    endpoints: [{addresses: [10.5.0.1], ready: false, serving: true}, {addresses: [10.1.0.2]}]
"#;

const NODE: &str = "nodes:
- {name: a, addresses: [10.0.0.1], cgroup: /a, bpffs: /a}
";

fn mesh(text: &str) -> Mesh {
    check(Path::new("mesh.yaml"), text).unwrap()
}

fn refusal(text: &str) -> String {
    check(Path::new("mesh.yaml"), text).unwrap_err().to_string()
}

fn workload<'a>(mesh: &'a Mesh, namespace: &str, name: &str) -> &'a Workload {
    &mesh.workloads[&WorkloadId {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }]
}

#[test]
fn the_example_for_users_is_a_good_file() {
    let text = include_str!("../../../../../deploy/mesh.yaml");
    let mesh = check(Path::new("deploy/mesh.yaml"), text).unwrap();
    assert_eq!(mesh.workloads.len(), 3);
}

#[test]
fn every_field_of_the_format_is_taken() {
    let mesh = mesh(FULL);

    assert_eq!(mesh.trust_domain, "example.org");
    assert_eq!(mesh.identity.directory, Path::new("/var/lib/malla/other"));
    assert_eq!(mesh.identity.certificate_lifetime, Duration::from_hours(12));
    let node = &mesh.nodes["node-a"];
    assert_eq!(
        node.addresses,
        ["10.0.0.1", "fd00::1"].map(|a| a.parse::<IpAddr>().unwrap())
    );
    assert_eq!(node.cgroup, Path::new("/sys/fs/cgroup/malla/node-a"));
    assert_eq!(node.bpffs, Path::new("/sys/fs/bpf/malla/node-a"));
    assert_eq!(node.runtime, Path::new("/run/other/node-a"));
    let web = workload(&mesh, "emojivoto", "web-1");
    assert_eq!(
        web.identity.to_string(),
        "spiffe://example.org/ns/emojivoto/sa/web"
    );
    assert_eq!(web.node, "node-a");
    assert_eq!(web.netns.as_deref(), Some(Path::new("/run/netns/web")));
    assert_eq!(web.ports[0].name.as_deref(), Some("http"));
    assert_eq!(
        web.ports.iter().map(|p| p.port).collect::<Vec<_>>(),
        [8080, 9090]
    );
    let probe = |port, ask| Probe { port, ask };
    let get = |path: &str| Ask::HttpGet { path: path.into() };
    let grpc = |service: &str| Ask::Grpc {
        service: service.into(),
    };
    assert_eq!(web.probes.from, node.addresses);
    assert_eq!(
        web.probes.list,
        [
            probe(8080, get("/healthz?x=1")),
            probe(9090, get("/")),
            probe(5432, Ask::TcpSocket),
            probe(8080, grpc("ready")),
            probe(8080, grpc("")),
        ]
    );
    assert_eq!(web.labels, [("app".to_owned(), "web".to_owned())]);
    assert!(web.is_enrolled());
    let range = |first, last| PortRange { first, last };
    assert_eq!(
        web.settings,
        Settings {
            mtls: MtlsMode::Strict,
            mtls_by_port: vec![
                (range(80, 80), MtlsMode::Permissive),
                (range(80, 81), MtlsMode::Permissive),
            ],
            egress: EgressMode::MeshOnly,
            egress_allow_subnets: vec!["10.8.0.0/16".parse().unwrap()],
            fail_mode: FailMode::Open,
            nested: NestedMode::Allow,
            interfaces: InterfaceMode::Allow,
            accelerate: Accelerate::Full,
            skip_outbound_ports: vec![range(4567, 4567), range(3000, 3010)],
            skip_inbound_ports: vec![range(25, 25)],
            skip_outbound_subnets: vec!["10.9.0.0/16".parse().unwrap()],
            skip_inbound_subnets: vec!["fd09::/16".parse().unwrap()],
            dial_ports: range(16_000, 32_000),
            mesh_connect_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_millis(500),
            idle_timeout: Some(Duration::from_hours(1)),
            max_connections: 300,
        }
    );
    assert_eq!(
        mesh.workload_at("fd01::2".parse().unwrap()).unwrap().id,
        web.id
    );
}

#[test]
fn what_is_left_out_has_its_default() {
    let mesh = mesh(&format!(
        "{NODE}workloads: [{{name: web, node: a, netns: /w, addresses: [10.1.0.1]}}]"
    ));
    let web = workload(&mesh, "default", "web");
    assert_eq!(mesh.identity, IdentityConfig::default());
    assert_eq!(
        web.identity.to_string(),
        "spiffe://cluster.local/ns/default/sa/default"
    );
    assert_eq!(web.settings, Settings::default());
    assert!(web.is_enrolled());
}

#[test]
fn an_unmeshed_workload_and_one_of_no_node_are_peers_that_nobody_enrols() {
    let mesh = mesh(
        "{nodes: [], workloads: [{name: plain, addresses: [10.1.0.1], mesh: disabled}, \
         {name: far, addresses: [10.1.0.2]}]}",
    );
    let plain = workload(&mesh, "default", "plain");
    let far = workload(&mesh, "default", "far");
    assert!(!plain.meshed && !plain.is_enrolled());
    assert!(far.meshed && !far.is_enrolled());
}

#[test]
fn each_setting_comes_from_the_narrowest_level_that_has_it() {
    let mesh = mesh(
        "nodes: []
settings: {mtls: strict, connectTimeout: 7s, idleTimeout: 1h, skipInboundPorts: [1]}
namespaces:
- {name: one, settings: {connectTimeout: 8s, skipInboundPorts: [2]}}
- {name: bare}
workloads:
- {name: own, namespace: one, addresses: [10.1.0.1],
   settings: {mtls: permissive, idleTimeout: never, skipInboundPorts: []}}
- {name: plain, namespace: one, addresses: [10.1.0.2]}
- {name: other, namespace: bare, addresses: [10.1.0.3]}
- {name: other, addresses: [10.1.0.4]}
",
    );
    let picked = |namespace, name| {
        let settings = &workload(&mesh, namespace, name).settings;
        (
            settings.mtls,
            settings.connect_timeout.as_secs(),
            settings.idle_timeout.is_some(),
            settings.skip_inbound_ports.first().map(|range| range.first),
        )
    };
    assert_eq!(picked("one", "own"), (MtlsMode::Permissive, 8, false, None));
    assert_eq!(picked("one", "plain"), (MtlsMode::Strict, 8, true, Some(2)));
    assert_eq!(
        picked("bare", "other"),
        (MtlsMode::Strict, 7, true, Some(1))
    );
    assert_eq!(
        picked("default", "other"),
        (MtlsMode::Strict, 7, true, Some(1))
    );
}

#[test]
fn a_report_has_an_end() {
    let bad = "- {name: X, addresses: [10.1.0.1], mesh: disabled}\n".repeat(100);
    let said = refusal(&format!("{NODE}workloads:\n{bad}"));
    assert_eq!(said.lines().count(), 51);
    // Each is misnamed; each but the first repeats a name and an address.
    assert!(said.ends_with("\nmesh.yaml: and 248 more"), "{said}");
}

#[test]
fn a_big_mesh_is_no_problem() {
    let mut text = format!("{NODE}workloads:\n");
    for index in 0..10_000_u32 {
        let address = IpAddr::from((0x0a10_0000 + index).to_be_bytes());
        let _ = writeln!(
            text,
            "- {{name: w{index}, node: a, netns: /w{index}, addresses: [{address}], \
             ports: [{{port: 80}}], labels: {{app: w, tier: x}}, settings: {{mtls: strict}}}}"
        );
    }
    assert_eq!(mesh(&text).workloads.len(), 10_000);
}

#[test]
fn no_mutation_of_a_good_file_makes_the_check_panic() {
    const BYTES: &[u8] = b"\0\t\n -:[]{}\"'&*!|>%@#,?0x.~<\xc3\xff9a";
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..5_000 {
        let mut bytes = FULL.as_bytes().to_vec();
        for _ in 0..random.usize(1..6) {
            let at = random.usize(..bytes.len());
            let end = random.usize(at..=bytes.len().min(at + 12));
            match random.u8(..4) {
                0 => bytes[at] = BYTES[random.usize(..BYTES.len())],
                1 => bytes.insert(at, BYTES[random.usize(..BYTES.len())]),
                2 => drop(bytes.drain(at..end)),
                _ => {
                    let copy = bytes[at..end].to_vec();
                    let to = random.usize(..bytes.len());
                    bytes.splice(to..to, copy);
                }
            }
            if bytes.is_empty() {
                break;
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Err(error) = check(Path::new("mesh.yaml"), &text) {
            assert!(
                error.to_string().starts_with("mesh.yaml:"),
                "{error}\n{text}"
            );
        }
    }
}

#[test]
fn services_know_their_endpoints() {
    let mesh = mesh(FULL);
    let service = |address: &str| mesh.service_at(address.parse().unwrap()).unwrap();
    let web = service("fd96::1");
    assert_eq!(web.host, "web.emojivoto.svc.cluster.local");
    assert_eq!(web.client_ip_affinity, Some(Duration::from_mins(10)));
    let [endpoint] = &web.endpoints[..] else {
        panic!("{:?}", web.endpoints);
    };
    assert_eq!(endpoint.node, "node-a");
    assert_eq!(endpoint.ports, [Some(8080), Some(9090)]);
    let target = |port, v4| web.port(port).unwrap().targets(v4)[0].address.to_string();
    assert_eq!(target(80, true), "10.1.0.2:8080");
    assert_eq!(target(9090, false), "[fd01::2]:9090");

    let database = service("10.96.0.2");
    let states: Vec<_> = database.endpoints.iter().map(|e| e.state).collect();
    assert_eq!(states, [EndpointState::Serving, EndpointState::Ready]);
    let targets = database.port(5432).unwrap().targets(true);
    // Who only serves takes nothing while another one is ready.
    assert_eq!(targets.len(), 1);
    assert_eq!(targets[0].address.to_string(), "10.1.0.2:5432");
    assert!(database.port(80).is_none());
}

#[test]
fn a_selector_chooses_by_all_its_labels_in_its_namespace() {
    use EndpointState::{NotReady, Ready};

    let mesh = mesh(&format!(
        "{NODE}workloads:
- {{name: one, addresses: [10.1.0.1], labels: {{app: web, track: new}}}}
- {{name: two, addresses: [10.1.0.2], labels: {{app: web}}}}
- {{name: three, namespace: other, addresses: [10.1.0.3], labels: {{app: web}}}}
- {{name: four, addresses: [10.1.0.4], labels: {{app: web}}, ready: false}}
services:
- {{name: all, headless: true, selector: {{app: web}}}}
- {{name: new, headless: true, selector: {{track: new, app: web}}}}
- {{name: none, headless: true}}
"
    ));
    let endpoints = |name: &str| {
        let id = ServiceId {
            namespace: "default".to_owned(),
            name: name.to_owned(),
        };
        let endpoints = mesh.services[&id].endpoints.iter();
        let named = endpoints.map(|e| (e.workload.clone().unwrap().name, e.state));
        named.collect::<Vec<_>>()
    };
    let [one, two, four] = ["one", "two", "four"].map(str::to_owned);
    let all = [(one.clone(), Ready), (two, Ready), (four, NotReady)];
    assert_eq!(endpoints("all"), all);
    assert_eq!(endpoints("new"), [(one, Ready)]);
    assert_eq!(endpoints("none"), []);
}
