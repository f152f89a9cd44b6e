//! What `malla explain` foretells is what happens, and what happened is what it tells.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use malla_testbed::{Fate, Node, PORT, Pod, PodSpec, Scene, Testbed, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// What `malla explain` foretells must be what happens.
#[test]
fn explain_foretells_what_happens_and_says_why_it_did() {
    let scene = Scene::new("", "").unwrap();
    let (a, to) = (&scene.a, (scene.server.v4(), PORT));
    for (client, server, outcome, reason) in [
        ("", "mtls: strict", "meshed", None),
        (
            "",
            "skipInboundPorts: [8080]",
            "plaintext",
            Some("port_skipped"),
        ),
        (
            "skipOutboundPorts: [8080]",
            "",
            "plaintext",
            Some("no_tls_from_remote"),
        ),
        (
            "skipOutboundPorts: [8080]",
            "mtls: strict",
            "reset",
            Some("plaintext_refused"),
        ),
        (
            "egress: mesh-only",
            "skipInboundPorts: [8080]",
            "reset",
            Some("egress_refused"),
        ),
    ] {
        scene.bed.change_settings(&scene.client, client).unwrap();
        scene.bed.change_settings(&scene.server, server).unwrap();
        let expected = match outcome {
            "reset" => Fate::Reset,
            _ => Fate::Echoed,
        };
        let what = format!("{client:?} to {server:?} to be {outcome}");
        let mut told = Value::Null;
        let happens = eventually(&what, LIMIT, || {
            let fate = scene.client.caller().call(to);
            told = scene
                .bed
                .ask_json(a, &["explain", "client", "server:8080"])
                .unwrap();
            let mut past = told["past"].as_array().unwrap().iter();
            let is_told =
                |reason| past.any(|past| past["result"] == reason && past["last"].is_string());
            // What was reset has its reason among the last ones.
            fate == expected && (expected == Fate::Echoed || reason.is_none_or(is_told))
        });
        happens.unwrap_or_else(|error| panic!("{error}: {told:#}"));
        assert_eq!(told["outcome"], outcome, "{what}: {told:#}");
        assert_eq!(told["reason"].as_str(), reason, "{what}: {told:#}");
    }
}

#[test]
fn explain_tells_of_a_strangers_refused_connections_with_the_reason_in_words() {
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    let a = Arc::clone(&scene.a);
    let stranger = PodSpec::new("stranger").unmeshed();
    let stranger = scene.bed.pod(&a, stranger).unwrap();
    let explain = ["explain", "stranger", "default/server:8080"];
    let before = scene.bed.ask(&a, &explain).unwrap();
    assert!(before.contains("× a connection would be opened, then reset: plaintext_refused\n"));
    assert!(
        before.contains("A strict pod takes no plaintext."),
        "{before}"
    );
    assert!(
        before.contains("remembers a connection between the two"),
        "{before}"
    );
    for _ in 0..3 {
        let to = (scene.server.v4(), PORT);
        assert_eq!(stranger.caller().call(to), Fate::Reset);
    }
    let after = scene.bed.ask(&a, &explain).unwrap();
    let row = after.lines().find(|line| line.starts_with("b ")).unwrap();
    let row: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(row[..3], ["b", "inbound", "3"], "{after}");
    assert_eq!(row[4], "plaintext_refused", "{after}");
    // By addresses, and from the agent alone, it is the same.
    let socket = scene.b.config_socket().display().to_string();
    let [from, to] = [&*stranger, &*scene.server].map(|pod| pod.v4().to_string());
    let named = ["explain", &from, &format!("{to}:8080"), "--socket", &socket];
    let named = scene.b.malla(&named).unwrap().succeeded().unwrap();
    assert!(named.contains("plaintext_refused"), "{named}");
}

#[test]
fn explain_answers_for_a_dead_agent_from_the_mesh_file_and_fails() {
    let mut scene = Scene::new("", "").unwrap();
    let (a, to) = (Arc::clone(&scene.a), (scene.server.v4(), PORT));
    scene.bed.agent(&a).kill9();
    let output = scene
        .bed
        .try_ask(&a, &["explain", "client", "server:8080"])
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let refused = "× a connection would be refused at once (ECONNREFUSED): no_agent\n";
    assert!(output.stdout.contains(refused), "{}", output.stdout);
    assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    assert!(
        output.stderr.contains("malla agent --config"),
        "{}",
        output.stderr
    );
    assert_eq!(scene.client.caller().call(to), Fate::Refused);
    // The kernel counts while no agent lives.
    scene.bed.start_agent(&a).unwrap();
    let told = scene
        .bed
        .ask_json(&a, &["explain", "client", "server:8080"])
        .unwrap();
    let kernel = told["kernelRefused"].as_array().unwrap().iter();
    let mut same = kernel.filter(|refused| refused["reason"] == "no_agent");
    let same = same.next().unwrap_or_else(|| panic!("{told:#}"));
    assert_eq!(
        (&same["node"], &same["direction"]),
        (&"a".into(), &"outbound".into())
    );
    assert_eq!(told["outcome"], "meshed");
}

/// What the kubelet sends to a port that httpGet probes.
const PROBE: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
const HTTP: u16 = 8080;
const TCP: u16 = 5432;
const BOTH: u16 = 8081;
const GRPC: u16 = 9090;
/// Probed by nobody.
const OTHER: u16 = 7070;

/// Asks what becomes of a connection from the node to each port, and tries it.
fn assert_foretold(
    bed: &Testbed,
    node: &Node,
    server: &Pod,
    foretold: [(u16, &str, &str, Option<Fate>); 5],
) {
    for (port, outcome, reason, probe) in foretold {
        let to = SocketAddr::from((server.v4(), port));
        let command = ["explain", "node", &format!("server:{port}"), "-o", "json"];
        // That an agent is dead is told, and is a failure of the command.
        let told = bed.try_ask(node, &command).unwrap().stdout;
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["source"]["name"], "node a");
        assert_eq!(told["outcome"], outcome, "{port}: {told:#}");
        assert_eq!(told["reason"], reason, "{port}: {told:#}");
        let caller = node.caller(to.ip()).patience(Duration::from_secs(1));
        let fate = caller.clone().saying(b"no probe").call(to);
        let expected = match outcome {
            "reset" => Fate::Reset,
            "dropped" => Fate::Silence,
            "refused" => Fate::Refused,
            _ => Fate::Echoed,
        };
        assert_eq!(fate, expected, "{port}: {told:#}");
        let probes = told["probes"].as_array().unwrap();
        if let Some(fate) = probe {
            assert_eq!(probes[0]["asks"], "GET /healthz (httpGet)", "{told:#}");
            assert_eq!(caller.clone().saying(PROBE).call(to), fate, "{port}");
        }
        let asks_socket = |probe: &Value| probe["asks"].as_str().unwrap().contains("(tcpSocket)");
        if probes.iter().any(asks_socket) {
            drop(caller.connect(to).unwrap());
        }
    }
}

/// What explain says of the node and a probed port must be what happens there.
#[test]
fn explain_foretells_what_passes_from_the_node_to_a_probed_port() {
    let mut bed = Testbed::new("explain-probes").unwrap();
    let a = bed.node("a").unwrap();
    let server = PodSpec::new("server")
        .settings("mtls: strict")
        .probe("httpGet: {path: /healthz, port: 8080}")
        .probe("tcpSocket: {port: 5432}")
        .probe("httpGet: {path: /healthz, port: 8081}")
        .probe("tcpSocket: {port: 8081}")
        .probe("grpc: {port: 9090}");
    let server = bed.pod(&a, server).unwrap();
    let _apps = [HTTP, TCP, BOTH, GRPC, OTHER].map(|port| server.echo(port).unwrap());
    bed.start_agents().unwrap();
    let passes = Some(Fate::Echoed);
    let strict = [
        (HTTP, "reset", "probe_undeclared", passes),
        (TCP, "dropped", "probe_payload", None),
        (BOTH, "reset", "probe_undeclared", passes),
        (GRPC, "reset", "probe_undeclared", None),
        (OTHER, "reset", "plaintext_refused", None),
    ];
    assert_foretold(&bed, &a, &server, strict);

    // By its address it is the same, and the table says what a newcomer needs.
    let [v4, _] = a.addresses().map(|address| address.to_string());
    let told = bed.ask(&a, &["explain", &v4, "server:8080"]).unwrap();
    for line in [
        "× a connection would be opened, then reset: probe_undeclared\n",
        "but a declared probe passes:\n",
        "GET /healthz (httpGet)   carried in plaintext: no_tls_from_remote\n",
        // Those of before.
        "what became of the last ones:\n",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }

    // The same of a pod that takes plaintext, when the agents have heard of it.
    bed.change_settings(&server, "mtls: permissive").unwrap();
    let to = SocketAddr::from((server.v4(), HTTP));
    let takes = || a.caller(to.ip()).saying(b"no probe").call(to) == Fate::Echoed;
    eventually("the permissive pod", LIMIT, takes).unwrap();
    let plain =
        [HTTP, TCP, BOTH, GRPC, OTHER].map(|port| (port, "plaintext", "no_tls_from_remote", None));
    assert_foretold(&bed, &a, &server, plain);
    bed.change_settings(&server, "mtls: strict").unwrap();
    eventually("the strict pod", LIMIT, || !takes()).unwrap();

    // And while no agent lives, when it is the kernel's to say.
    bed.agent(&a).kill9();
    let dead = [
        (HTTP, "dropped", "probe_payload", passes),
        (TCP, "dropped", "probe_payload", None),
        (BOTH, "dropped", "probe_payload", passes),
        (GRPC, "direct", "probe_without_agent", None),
        (OTHER, "refused", "no_agent", None),
    ];
    assert_foretold(&bed, &a, &server, dead);
}
