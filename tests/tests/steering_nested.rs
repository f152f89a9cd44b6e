//! Packets that a pod forwards for network namespaces inside it, as containers in containers do, or
//! that no socket of its kernel has sent.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{sync::Arc, time::Duration};

use malla_testbed::{
    Caller, Capture, EchoApp, Fate, Metrics, Netns, Node, Pod, PodSpec, Testbed,
    packet::{self, TcpPacket},
    same_family,
};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;
const SECRET: &[u8] = b"plaintext that must not be seen";

/// A meshed client on node `a`, and a meshed server with an echoing app on node `b`.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    b: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    app: EchoApp,
}

impl Scene {
    fn new(client_settings: &str, server_settings: &str) -> Self {
        let mut bed = Testbed::new("nested").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = PodSpec::new("client").settings(client_settings);
        let client = bed.pod(&a, client).unwrap();
        let server = PodSpec::new("server").port(PORT).settings(server_settings);
        let server = bed.pod(&b, server).unwrap();
        let app = server.echo(PORT).unwrap();
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            b,
            client,
            server,
            app,
        }
    }

    fn metrics(&self, node: &Node) -> Metrics {
        self.bed.agent(node).metrics().unwrap()
    }
}

/// SYNs from the client's own addresses that no socket of the client's kernel has sent.
fn send_unowned_syns(scene: &Scene) {
    let sender = scene.client.raw_sender().unwrap();
    for to in scene.server.addresses() {
        let from = same_family(scene.client.addresses(), *to).unwrap();
        let syn = TcpPacket::syn((from, 1234).into(), (*to, PORT).into(), 1);
        sender.send(&syn.to_bytes()).unwrap();
    }
}

#[test]
fn a_syn_without_a_socket_is_refused_by_default() {
    let scene = Scene::new("", "");
    let interface = scene.client.capture().unwrap();
    send_unowned_syns(&scene);
    let refused = scene.metrics(&scene.a);
    let refused = refused.syns("outbound", "refused", "forwarded");
    assert!(refused >= 2.0, "{refused}");
    let packets = interface.tcp();
    assert!(
        packets.iter().all(|p| p.flags & packet::RST != 0),
        "{packets:?}"
    );
}

#[test]
fn a_syn_without_a_socket_is_steered_where_nested_ones_are_allowed() {
    let scene = Scene::new("nested: allow", "");
    let loopback = Capture::start(scene.client.netns(), "lo").unwrap();
    send_unowned_syns(&scene);
    let answers = |packets: &[TcpPacket]| {
        let both = packet::SYN | packet::ACK;
        let answers = packets.iter().filter(|p| p.flags & both == both);
        answers
            .filter(|p| p.from.port() == PORT && p.to.port() == 1234)
            .count()
    };
    let what = "the agent's answers for both families";
    loopback
        .wait_for(what, LIMIT, |packets| answers(packets) >= 2)
        .unwrap();
    let steered = scene.metrics(&scene.a);
    assert!(steered.syns("outbound", "steered", "meshed") >= 2.0);
}

/// A network namespace inside a pod, whose packets the pod forwards under its own address.
fn nest(scene: &Scene) -> Netns {
    let pod = &scene.client;
    let netns = scene.bed.extra_netns("inner").unwrap();
    pod.netns()
        .sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])
        .unwrap();
    pod.netns()
        .ip(&format!(
            "link add inner type veth peer name eth0 netns {}\n\
             addr add 172.30.0.1/24 dev inner\n\
             addr add fd30::1/64 dev inner nodad\n\
             link set inner up\n",
            netns.name()
        ))
        .unwrap();
    netns
        .ip("addr add 172.30.0.2/24 dev eth0\n\
             addr add fd30::2/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 172.30.0.1\n\
             route add default via fd30::1\n")
        .unwrap();
    let masquerade = "table inet nested { chain out { type nat hook postrouting priority 100;\n\
                      oifname eth0 masquerade\n}\n}\n";
    pod.command(["nft", "-f", "-"])
        .input(masquerade)
        .run()
        .unwrap();
    netns
}

#[test]
fn a_nested_namespaces_connections_are_refused_by_default() {
    let scene = Scene::new("", "");
    let nested = nest(&scene);
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    for to in scene.server.addresses() {
        let caller = Caller::new(&nested).saying(SECRET);
        assert_eq!(caller.call((*to, PORT)), Fate::Refused, "{to}");
    }
    let metrics = scene.metrics(&scene.a);
    let refused = metrics.syns("outbound", "refused", "forwarded");
    assert!(refused >= 2.0, "{refused}");
    assert_eq!(scene.app.accepted(), 0);
    assert!(!wire.contains(SECRET));
}

/// README: the pod's connection tracking meets a steered and rewritten connection twice, so it can
/// not be carried. What holds is that nothing of it leaves.
#[test]
fn a_nested_namespaces_rewritten_connection_never_leaves_in_plaintext() {
    let scene = Scene::new("nested: allow", "mtls: strict");
    let nested = nest(&scene);
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    for to in scene.server.addresses() {
        let caller = Caller::new(&nested).patience(Duration::from_secs(2));
        let _fate = caller.saying(SECRET).call((*to, PORT));
    }
    let steered = scene.metrics(&scene.a);
    assert!(steered.syns("outbound", "steered", "meshed") >= 2.0);
    assert!(!wire.contains(SECRET));
}
