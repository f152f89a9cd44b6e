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
