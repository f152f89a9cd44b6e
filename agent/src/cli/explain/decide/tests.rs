use std::path::Path;

use super::*;
use crate::discovery::file;

const WEB: &str = "10.1.0.2";
const STRANGER: &str = "10.1.0.9";

/// What becomes of a connection between pods with these settings, while these nodes' agents are
/// dead.
fn decide(
    web: &str,
    db: &str,
    from: &str,
    to: &str,
    dead: &[&str],
) -> (Outcome, Option<&'static str>) {
    let mesh = format!(
        "nodes:\n\
         - {{name: a, addresses: [10.0.0.1], cgroup: /c/a, bpffs: /b/a}}\n\
         - {{name: b, addresses: [10.0.0.2], cgroup: /c/b, bpffs: /b/b}}\n\
         workloads:\n\
         - {{name: web, node: a, netns: /n/web, addresses: [{WEB}], settings: {{{web}}}}}\n\
         - {{name: stranger, node: a, mesh: disabled, addresses: [{STRANGER}]}}\n\
         - {{name: db, node: b, netns: /n/db, addresses: [10.1.1.3], settings: {{{db}}}}}\n"
    );
    let mesh = file::check(Path::new("mesh.yaml"), &mesh).unwrap();
    let agents = |node: &str| {
        if dead.contains(&node) {
            AgentState::Dead
        } else {
            AgentState::Answers
        }
    };
    let address: IpAddr = from.parse().unwrap();
    let source = Source {
        workload: mesh.workload_at(address).cloned(),
        address,
    };
    let world = World {
        mesh: &mesh,
        agents: &agents,
    };
    let decision = world.decide(&source, to.parse().unwrap());
    assert!(!decision.rules.is_empty());
    (decision.outcome, decision.reason)
}

#[test]
fn a_meshed_client_is_carried_refused_or_let_pass_by_its_own_rules() {
    use Outcome::{Direct, Meshed, Plaintext, Refused, Reset};
    const DB: &str = "10.1.1.3:8080";
    const OUTSIDE: &str = "192.0.2.1:443";
    for (web, db, to, dead, expected) in [
        ("", "", DB, &[][..], (Meshed, None)),
        ("", "mtls: strict", DB, &[], (Meshed, None)),
        ("", "", DB, &["a"], (Refused, Some("no_agent"))),
        ("", "", DB, &["b"], (Reset, Some("connect_refused"))),
        (
            "failMode: open",
            "",
            DB,
            &["a"],
            (Plaintext, Some("no_tls_from_remote")),
        ),
        (
            "failMode: open",
            "mtls: strict",
            DB,
            &["a"],
            (Reset, Some("plaintext_refused")),
        ),
        (
            "failMode: open",
            "",
            OUTSIDE,
            &["a"],
            (Direct, Some("fail_open")),
        ),
        (
            "skipOutboundPorts: [8080]",
            "mtls: strict",
            DB,
            &[],
            (Reset, Some("plaintext_refused")),
        ),
        (
            "skipOutboundPorts: [443]",
            "",
            OUTSIDE,
            &[],
            (Direct, Some("port_skipped")),
        ),
        (
            "skipOutboundSubnets: [192.0.2.0/24]",
            "",
            OUTSIDE,
            &[],
            (Direct, Some("subnet_skipped")),
        ),
        (
            "",
            "skipInboundPorts: [8080]",
            DB,
            &[],
            (Plaintext, Some("port_skipped")),
        ),
        (
            "",
            "",
            OUTSIDE,
            &[],
            (Plaintext, Some("not_provided_by_service_discovery")),
        ),
        (
            "egress: mesh-only",
            "",
            OUTSIDE,
            &[],
            (Reset, Some("egress_refused")),
        ),
        ("", "", "10.1.1.3:15008", &[], (Reset, Some("own_listener"))),
        ("", "", "10.1.0.2:80", &[], (Direct, None)),
    ] {
        assert_eq!(
            decide(web, db, WEB, to, dead),
            expected,
            "{web:?} {db:?} {to} {dead:?}"
        );
    }
}

#[test]
fn a_client_outside_the_mesh_meets_the_destinations_rules() {
    use Outcome::{Direct, Plaintext, Refused, Reset};
    for (db, port, dead, expected) in [
        ("", 8080, &[][..], (Plaintext, Some("no_tls_from_remote"))),
        (
            "mtls: strict",
            8080,
            &[],
            (Reset, Some("plaintext_refused")),
        ),
        (
            "skipInboundPorts: [8080]",
            8080,
            &[],
            (Direct, Some("port_skipped")),
        ),
        (
            "skipInboundSubnets: [10.1.0.0/24]",
            8080,
            &[],
            (Direct, Some("subnet_skipped")),
        ),
        ("", 8080, &["b"], (Refused, Some("no_agent"))),
        ("failMode: open", 8080, &["b"], (Direct, Some("fail_open"))),
        (
            "failMode: open, mtls: strict",
            8080,
            &["b"],
            (Refused, Some("no_agent")),
        ),
        ("", 15008, &[], (Reset, Some("no_certificate"))),
    ] {
        let to = format!("10.1.1.3:{port}");
        assert_eq!(
            decide("", db, STRANGER, &to, dead),
            expected,
            "{db:?} {port} {dead:?}"
        );
    }
    let nobody = decide("", "", STRANGER, "192.0.2.1:80", &[]);
    assert_eq!(nobody, (Direct, None));
}

const PLAIN: Option<&str> = Some("no_tls_from_remote");
const NODE: &str = "10.0.0.1";

/// A probed pod's settings, the port, who calls, whether the agent is dead: what becomes of what isn't
/// declared, and how many declared probes pass all the same.
type ProbedCase = (
    &'static str,
    u16,
    &'static str,
    bool,
    (Outcome, Option<&'static str>, usize),
);

const PROBED: [ProbedCase; 16] = [
    (
        "mtls: strict",
        80,
        NODE,
        false,
        (Outcome::Reset, Some("probe_undeclared"), 1),
    ),
    (
        "mtls: strict",
        81,
        NODE,
        false,
        (Outcome::Dropped, Some("probe_payload"), 1),
    ),
    (
        "mtls: strict",
        82,
        NODE,
        false,
        (Outcome::Reset, Some("probe_undeclared"), 2),
    ),
    (
        "mtls: strict",
        83,
        NODE,
        false,
        (Outcome::Reset, Some("probe_undeclared"), 1),
    ),
    (
        "mtls: strict",
        90,
        NODE,
        false,
        (Outcome::Reset, Some("plaintext_refused"), 0),
    ),
    (
        "mtls: strict",
        80,
        STRANGER,
        false,
        (Outcome::Reset, Some("plaintext_refused"), 0),
    ),
    (
        "mtls: strict",
        80,
        "10.0.0.2",
        false,
        (Outcome::Reset, Some("plaintext_refused"), 0),
    ),
    ("", 80, NODE, false, (Outcome::Plaintext, PLAIN, 0)),
    (
        "mtlsByPort: [{ports: 80, mode: strict}]",
        82,
        NODE,
        false,
        (Outcome::Plaintext, PLAIN, 0),
    ),
    (
        "skipInboundPorts: [80], mtls: strict",
        80,
        NODE,
        false,
        (Outcome::Direct, Some("port_skipped"), 0),
    ),
    (
        "mtls: strict",
        80,
        NODE,
        true,
        (Outcome::Dropped, Some("probe_payload"), 1),
    ),
    (
        "",
        81,
        NODE,
        true,
        (Outcome::Dropped, Some("probe_payload"), 1),
    ),
    (
        "failMode: open",
        80,
        NODE,
        true,
        (Outcome::Direct, Some("probe_without_agent"), 0),
    ),
    (
        "failMode: open, mtls: strict",
        80,
        NODE,
        true,
        (Outcome::Dropped, Some("probe_payload"), 1),
    ),
    (
        "mtls: strict",
        83,
        NODE,
        true,
        (Outcome::Direct, Some("probe_without_agent"), 0),
    ),
    (
        "mtls: strict",
        90,
        NODE,
        true,
        (Outcome::Refused, Some("no_agent"), 0),
    ),
];

#[test]
fn from_where_probes_come_from_a_probed_port_takes_what_is_declared() {
    for (settings, port, from, dead, expected) in PROBED {
        let mesh = format!(
            "nodes:\n\
             - {{name: a, addresses: [10.0.0.1], cgroup: /c/a, bpffs: /b/a}}\n\
             - {{name: b, addresses: [10.0.0.2], cgroup: /c/b, bpffs: /b/b}}\n\
             workloads:\n\
             - name: db\n  node: a\n  netns: /n/db\n  addresses: [10.1.1.3]\n  \
             settings: {{{settings}}}\n  probes:\n  \
             - httpGet: {{path: /healthz, port: 80}}\n  - tcpSocket: {{port: 81}}\n  \
             - httpGet: {{path: /healthz, port: 82}}\n  - tcpSocket: {{port: 82}}\n  \
             - grpc: {{port: 83, service: ready}}\n"
        );
        let mesh = file::check(Path::new("mesh.yaml"), &mesh).unwrap();
        let agents = |_: &str| {
            if dead {
                AgentState::Dead
            } else {
                AgentState::Answers
            }
        };
        let world = World {
            mesh: &mesh,
            agents: &agents,
        };
        let source = Source {
            workload: None,
            address: from.parse().unwrap(),
        };
        let decision = world.decide(&source, format!("10.1.1.3:{port}").parse().unwrap());
        let told = (decision.outcome, decision.reason, decision.probes.len());
        assert_eq!(told, expected, "{settings:?} {port} {from} {dead}");
        let comes_from_node = decision.rules[0].says.starts_with("node ");
        assert_eq!(comes_from_node, from != STRANGER);
    }
}
