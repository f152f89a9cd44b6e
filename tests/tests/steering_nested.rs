//! Packets that a pod forwards for network namespaces inside it, as containers in containers do, or
//! that no socket of its kernel has sent.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::time::Duration;

use malla_testbed::{
    Caller, Capture, Fate, Netns, PORT, Pod, PodSpec, RawSender, SECRET, Scene, eventually,
    packet::{self, TcpPacket},
    same_family,
};

const LIMIT: Duration = Duration::from_secs(10);

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
    let scene = Scene::new("", "").unwrap();
    let interface = scene.client.capture().unwrap();
    send_unowned_syns(&scene);
    let refused = scene.metrics(&scene.a).unwrap();
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
    let scene = Scene::new("nested: allow", "").unwrap();
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
    let steered = scene.metrics(&scene.a).unwrap();
    assert!(steered.syns("outbound", "steered", "meshed") >= 2.0);
}

/// A network namespace inside a pod, whose packets the pod forwards.
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
    netns
}

/// Gives what the pod forwards the pod's own address.
fn masquerade(pod: &Pod) {
    let masquerade = "table inet nested { chain out { type nat hook postrouting priority 100;\n\
                      oifname eth0 masquerade\n}\n}\n";
    pod.command(["nft", "-f", "-"])
        .input(masquerade)
        .run()
        .unwrap();
}

#[test]
fn a_nested_namespaces_connections_are_refused_by_default() {
    let scene = Scene::new("", "").unwrap();
    let nested = nest(&scene);
    masquerade(&scene.client);
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    for to in scene.server.addresses() {
        let caller = Caller::new(&nested).saying(SECRET);
        assert_eq!(caller.call((*to, PORT)), Fate::Refused, "{to}");
    }
    let metrics = scene.metrics(&scene.a).unwrap();
    let refused = metrics.syns("outbound", "refused", "forwarded");
    assert!(refused >= 2.0, "{refused}");
    assert_eq!(scene.app.accepted(), 0);
    assert!(!wire.contains(SECRET));
}

/// README: the pod's connection tracking meets a steered and rewritten connection twice, so it can
/// not be carried. What holds is that nothing of it leaves.
#[test]
fn a_nested_namespaces_rewritten_connection_never_leaves_in_plaintext() {
    let scene = Scene::new("nested: allow", "mtls: strict").unwrap();
    let nested = nest(&scene);
    masquerade(&scene.client);
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    for to in scene.server.addresses() {
        let caller = Caller::new(&nested).patience(Duration::from_secs(2));
        let _fate = caller.saying(SECRET).call((*to, PORT));
    }
    let steered = scene.metrics(&scene.a).unwrap();
    assert!(steered.syns("outbound", "steered", "meshed") >= 2.0);
    assert!(!wire.contains(SECRET));
}

#[test]
fn a_nested_namespace_that_takes_another_pods_address_is_refused() {
    let mut scene = Scene::new("nested: allow", "").unwrap();
    let settings = ["nested: allow", "skipOutboundPorts: [8080]"];
    let neighbours = ["steered", "skipping"].into_iter().zip(settings);
    let neighbours: Vec<_> = neighbours
        .map(|(name, settings)| {
            let spec = PodSpec::new(name).settings(settings);
            scene.bed.pod(&scene.a.clone(), spec).unwrap()
        })
        .collect();
    eventually("the neighbours to be enrolled", LIMIT, || {
        let metrics = scene.metrics(&scene.a).unwrap();
        metrics.sum("malla_pods_enrolled", &[]) > 2.5
    })
    .unwrap();
    let nested = nest(&scene);
    let interfaces = ["eth0", "lo"].map(|name| Capture::start(scene.client.netns(), name).unwrap());
    let sender = RawSender::new(&nested).unwrap();
    let refusals = || {
        let metrics = scene.metrics(&scene.a)?;
        anyhow::Ok(metrics.syns("outbound", "refused", "unknown_address"))
    };
    for neighbour in &neighbours {
        for to in scene.server.addresses() {
            let taken = same_family(neighbour.addresses(), *to).unwrap();
            let syn = TcpPacket::syn((taken, 1234).into(), (*to, PORT).into(), 1).to_bytes();
            let before = refusals().unwrap();
            eventually(&format!("a refusal of {taken}"), LIMIT, || {
                // A link that has just come up may drop what it is given.
                sender.send(&syn).unwrap();
                refusals().unwrap() > before
            })
            .unwrap();
        }
    }
    for interface in interfaces {
        let left = interface.tcp().into_iter();
        let left: Vec<_> = left.filter(|p| p.to.port() == PORT).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
