//! Opt-outs in both directions, and settings that change while connections go on.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Capture, EchoApp, Fate, Metrics, Node, PORT, Pod, PodSpec, SECRET, Testbed, eventually, say,
};

const LIMIT: Duration = Duration::from_secs(10);
const SKIPPED: u16 = 9090;
/// A change takes effect within 100 ms; a busy machine gets five times that.
const LIVE: Duration = Duration::from_millis(500);

/// A meshed client on node `a`, a meshed server on node `b` with an app on each of two ports, and
/// a stranger on node `a`.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    b: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    app: EchoApp,
    skipped: EchoApp,
}

impl Scene {
    fn new(client_settings: &str, server_settings: &str) -> Self {
        let mut bed = Testbed::new("settings").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = PodSpec::new("client").settings(client_settings);
        let client = bed.pod(&a, client).unwrap();
        let stranger = bed.pod(&a, PodSpec::new("stranger").unmeshed()).unwrap();
        let server = PodSpec::new("server").port(PORT).settings(server_settings);
        let server = bed.pod(&b, server).unwrap();
        let (app, skipped) = (server.echo(PORT).unwrap(), server.echo(SKIPPED).unwrap());
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            b,
            client,
            server,
            stranger,
            app,
            skipped,
        }
    }

    fn metrics(&self, node: &Node) -> Metrics {
        self.bed.agent(node).metrics().unwrap()
    }

    /// Calls a port of the server by both families. Whether the wire shows what was said.
    fn call_is_seen(&self, from: &Pod, port: u16) -> bool {
        let seen = self.server.addresses().iter().map(|to| {
            let wire: Capture = self.bed.capture_wire(&self.a, &self.b).unwrap();
            let fate = from.caller().saying(SECRET).call((*to, port));
            assert_eq!(fate, Fate::Echoed, "{to}:{port}");
            assert_eq!(wire.missed().unwrap(), 0);
            wire.contains(SECRET)
        });
        let seen: Vec<bool> = seen.collect();
        assert!(seen.iter().all(|one| *one == seen[0]), "{seen:?}");
        seen[0]
    }

    fn addresses(&self, port: u16) -> Vec<SocketAddr> {
        let addresses = self.server.addresses().iter();
        addresses.map(|address| (*address, port).into()).collect()
    }
}

#[test]
fn a_port_that_the_client_skips_is_called_in_plaintext() {
    let scene = Scene::new("skipOutboundPorts: [9000-9099]", "");
    assert!(scene.call_is_seen(&scene.client, SKIPPED));
    assert!(!scene.call_is_seen(&scene.client, PORT));
    let metrics = scene.metrics(&scene.a);
    assert!(metrics.syns("outbound", "passed", "port_skipped") >= 2.0);
    assert!(metrics.syns("outbound", "steered", "meshed") >= 2.0);
}

#[test]
fn a_network_that_the_client_skips_is_called_in_plaintext() {
    let subnets = "skipOutboundSubnets: [\"10.102.0.0/16\", \"fd66::/64\"]";
    let scene = Scene::new(subnets, "");
    assert!(scene.call_is_seen(&scene.client, PORT));
    let metrics = scene.metrics(&scene.a);
    assert!(metrics.syns("outbound", "passed", "subnet_skipped") >= 2.0);

    // One family's network says nothing about the other's.
    let only_v4 = "skipOutboundSubnets: [\"10.102.0.0/16\"]";
    scene.bed.change_settings(&scene.client, only_v4).unwrap();
    let called = |to: IpAddr| {
        let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
        let caller = scene.client.caller().saying(SECRET);
        assert_eq!(caller.call((to, PORT)), Fate::Echoed);
        wire.contains(SECRET)
    };
    eventually("IPv6 to be meshed", LIVE, || {
        !called(scene.server.v6().into())
    })
    .unwrap();
    assert!(called(scene.server.v4().into()));
}

#[test]
fn a_port_that_the_server_skips_is_open_to_strangers_in_strict_mode() {
    let scene = Scene::new("", "mtls: strict\nskipInboundPorts: [9090]");
    assert!(scene.call_is_seen(&scene.stranger, SKIPPED));
    // A meshed client knows of it, and doesn't ask for the mesh there.
    assert!(scene.call_is_seen(&scene.client, SKIPPED));
    assert!(!scene.call_is_seen(&scene.client, PORT));
    for to in scene.addresses(PORT) {
        assert_eq!(scene.stranger.caller().call(to), Fate::Reset);
    }
    let metrics = scene.metrics(&scene.b);
    assert!(metrics.syns("inbound", "passed", "port_skipped") >= 4.0);
    let strangers = scene.skipped.peers();
    let ips = strangers.iter().map(SocketAddr::ip);
    assert_eq!(
        ips.filter(|ip| scene.stranger.addresses().contains(ip))
            .count(),
        2
    );
}

#[test]
fn a_network_that_the_server_skips_reaches_a_strict_app() {
    let settings = "mtls: strict\nskipInboundSubnets: [\"10.101.0.0/16\", \"fd65::/64\"]";
    let scene = Scene::new("", settings);
    assert!(scene.call_is_seen(&scene.stranger, PORT));
    let metrics = scene.metrics(&scene.b);
    assert!(metrics.syns("inbound", "passed", "subnet_skipped") >= 2.0);
    assert_eq!(scene.app.accepted(), 2);
}

#[test]
fn an_opt_out_holds_while_no_agent_lives() {
    let scene = Scene::new("skipOutboundPorts: [9090]", "skipInboundPorts: [9090]");
    scene.bed.agent(&scene.a).kill9();
    scene.bed.agent(&scene.b).kill9();
    assert!(scene.call_is_seen(&scene.client, SKIPPED));
    assert!(scene.call_is_seen(&scene.stranger, SKIPPED));
    for to in scene.addresses(PORT) {
        assert_eq!(scene.client.caller().call(to), Fate::Refused);
        assert_eq!(scene.stranger.caller().call(to), Fate::Refused);
    }
}

#[test]
fn an_opt_out_beats_a_refusal() {
    const MESH_PORT: u16 = 15008;
    let mut bed = Testbed::new("beats").unwrap();
    let node = bed.node("a").unwrap();
    let client = PodSpec::new("client").settings("skipOutboundPorts: [15008]");
    let client = bed.pod(&node, client).unwrap();
    let other = bed.pod(&node, PodSpec::new("other")).unwrap();
    bed.start_agents().unwrap();
    for to in client.addresses().iter().chain(other.addresses()) {
        if client.addresses().contains(to) {
            continue;
        }
        // The mesh listener takes it; what isn't TLS ends there.
        client.caller().connect((*to, MESH_PORT).into()).unwrap();
    }
    for to in client.addresses() {
        assert_eq!(other.caller().call((*to, MESH_PORT)), Fate::Refused);
    }
    let metrics = bed.agent(&node).metrics().unwrap();
    assert!(metrics.syns("outbound", "passed", "port_skipped") >= 2.0);
    assert!(metrics.syns("outbound", "refused", "own_listener") >= 2.0);
}

#[test]
fn changed_settings_hold_for_the_next_connection() {
    let scene = Scene::new("", "mtls: permissive");
    let to: SocketAddr = (scene.server.v4(), PORT).into();
    let skipped: SocketAddr = (scene.server.v6(), SKIPPED).into();
    let stranger = |to| scene.stranger.caller().patience(LIVE).call(to);
    let becomes = |settings: &str, to, expected| {
        scene.bed.change_settings(&scene.server, settings).unwrap();
        let changed = Instant::now();
        eventually(settings, LIVE, || stranger(to) == expected).unwrap();
        assert!(
            changed.elapsed() < LIVE,
            "{settings}: {:?}",
            changed.elapsed()
        );
    };
    // Connections from before go on, whatever new ones meet.
    let meshed = scene.client.caller().connect(to);
    let plain = scene.stranger.caller().connect(to);
    let mut before = [meshed, plain].map(|stream| stream.unwrap());
    for _ in 0..3 {
        assert_eq!(stranger(to), Fate::Echoed);
        becomes("mtls: strict", to, Fate::Reset);
        assert_eq!(stranger(skipped), Fate::Reset);
        becomes(
            "mtls: strict\nskipInboundPorts: [9090]",
            skipped,
            Fate::Echoed,
        );
        assert_eq!(stranger(to), Fate::Reset);
        becomes("mtls: strict", skipped, Fate::Reset);
        becomes("mtls: permissive", to, Fate::Echoed);
        for stream in &mut before {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        assert_eq!(scene.client.caller().call(to), Fate::Echoed);
    }
}

#[test]
fn skipped_ports_of_a_client_change_live() {
    let scene = Scene::new("", "");
    let is_plain = || {
        let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
        let caller = scene.client.caller().saying(SECRET);
        assert_eq!(caller.call((scene.server.v4(), PORT)), Fate::Echoed);
        wire.contains(SECRET)
    };
    assert!(!is_plain());
    // Connections stay what they were when they were opened.
    let connect = || {
        scene
            .client
            .caller()
            .connect((scene.server.v4(), PORT).into())
    };
    let mut meshed = connect().unwrap();
    for _ in 0..3 {
        let skip = "skipOutboundPorts: [8080]";
        scene.bed.change_settings(&scene.client, skip).unwrap();
        eventually("the port to be skipped", LIVE, is_plain).unwrap();
        let mut plain = connect().unwrap();
        assert_eq!(say(&mut meshed, b"hello"), Fate::Echoed);
        scene.bed.change_settings(&scene.client, "").unwrap();
        eventually("the port to be meshed", LIVE, || !is_plain()).unwrap();
        assert_eq!(say(&mut plain, b"hello"), Fate::Echoed);
        assert_eq!(say(&mut meshed, b"hello"), Fate::Echoed);
    }
}

#[test]
fn a_syn_that_is_sent_again_meets_the_decision_about_the_first_one() {
    const SKIP: &str = "skipOutboundPorts: [8080]";
    for (first, then, is_plain) in [(SKIP, "", true), ("", SKIP, false)] {
        let scene = Scene::new(first, "");
        let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
        // The pod's kernel sends again what is lost: on the wire, or on the way to the agent.
        let (deaf, interface) = if is_plain {
            (&scene.server, "eth0")
        } else {
            (&scene.client, "lo")
        };
        let rules = format!(
            "table inet deaf {{ chain input {{ type filter hook input priority 0;\n\
             iif {interface} tcp dport {PORT} counter drop\n}}\n}}\n"
        );
        let nft = deaf.command(["nft", "-f", "-"]);
        nft.input(rules).run().unwrap();
        let lost = || {
            let list = ["nft", "list", "table", "inet", "deaf"];
            !deaf.run(list).unwrap().stdout.contains("packets 0")
        };
        thread::scope(|scope| {
            let call = scope.spawn(|| {
                let caller = scene.client.caller().saying(SECRET);
                caller.call((scene.server.v4(), PORT))
            });
            eventually("a SYN to be lost", LIMIT, lost).unwrap();
            scene.bed.change_settings(&scene.client, then).unwrap();
            let said = || scene.bed.agent(&scene.a).log();
            eventually("the change to be told", LIMIT, || {
                said().contains("settings changed")
            })
            .unwrap();
            let nft = ["nft", "delete", "table", "inet", "deaf"];
            deaf.run(nft).unwrap();
            assert_eq!(call.join().unwrap(), Fate::Echoed);
        });
        assert_eq!(wire.contains(SECRET), is_plain);
        assert_eq!(scene.call_is_seen(&scene.client, PORT), !is_plain);
    }
}

#[test]
fn the_fail_mode_changes_live() {
    let scene = Scene::new("", "");
    let open = "failMode: open";
    scene.bed.change_settings(&scene.client, open).unwrap();
    let said = || scene.bed.agent(&scene.a).log();
    eventually("the change to be told", LIMIT, || {
        said().contains("settings changed")
    })
    .unwrap();
    scene.bed.agent(&scene.a).kill9();
    assert!(scene.call_is_seen(&scene.client, PORT));
}
