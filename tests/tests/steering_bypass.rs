//! Ways round the agent that somebody may try: from outside into a strict pod, and from a pod's
//! app onto the wire.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::Read,
    net::{IpAddr, TcpStream, UdpSocket},
    os::unix::ffi::OsStrExt,
    time::Duration,
};

use malla_testbed::{
    Capture, Fate, PORT, PodSpec, RawSender, SECRET, Scene, TcpState, eventually,
    packet::{self, TcpPacket},
    same_family, say, until,
};
use socket2::{Domain, Socket};

const LIMIT: Duration = Duration::from_secs(10);

/// A host on a node's side of the wire that makes its packets by itself, so that no kernel answers
/// in its name.
struct Stranger<'a> {
    sender: RawSender<'a>,
    wire: Capture,
}

impl<'a> Stranger<'a> {
    /// One that speaks from any of `addresses`, which nobody on the node gets packets for.
    fn new(scene: &'a Scene, addresses: &[IpAddr]) -> Self {
        let blackholes = addresses
            .iter()
            .map(|a| format!("route add blackhole {a}\n"));
        let netns = scene.a.netns();
        netns.ip(&blackholes.collect::<String>()).unwrap();
        Self {
            sender: RawSender::new(netns).unwrap(),
            wire: scene.bed.capture_wire(&scene.a, &scene.b).unwrap(),
        }
    }

    /// Opens a connection by `first`, the packets of its SYN, and sends a secret on it. Returns the
    /// answer to the secret, or that to the SYN where it is no SYN-ACK: a reset, or the ACK of a
    /// connection that has ended just now (RFC 9293 §3.10.7.4).
    fn talk(&self, syn: &TcpPacket, first: &[Vec<u8>]) -> TcpPacket {
        for packet in first {
            self.sender.send(packet).unwrap();
        }
        let next = syn.seq.wrapping_add(1);
        let answer = self.answer("an answer to a SYN", syn, |p| {
            let fits = p.flags & (packet::SYN | packet::RST) != 0 && p.ack == next;
            fits || p.flags == packet::ACK
        });
        if answer.flags & packet::SYN == 0 {
            return answer;
        }
        let ack = TcpPacket {
            seq: next,
            ack: answer.seq.wrapping_add(1),
            flags: packet::ACK,
            ..syn.clone()
        };
        // What the SYN carried comes again, as a kernel would send it.
        let secret = TcpPacket {
            flags: packet::ACK | packet::PSH,
            payload: [&syn.payload, SECRET].concat(),
            ..ack.clone()
        };
        self.sender.send(&ack.to_bytes()).unwrap();
        self.sender.send(&secret.to_bytes()).unwrap();
        self.answer("an answer to the secret", syn, |p| {
            p.flags & packet::RST != 0 || !p.payload.is_empty()
        })
    }

    fn answer(&self, what: &str, syn: &TcpPacket, is: impl Fn(&TcpPacket) -> bool) -> TcpPacket {
        let find = || {
            let mut packets = self.wire.tcp().into_iter();
            packets.find(|p| p.from == syn.to && p.to == syn.from && is(p))
        };
        until(what, LIMIT, find).unwrap()
    }
}

fn strangers() -> [IpAddr; 2] {
    ["10.101.200.1", "fd65::c801"].map(|address| address.parse().unwrap())
}

/// A SYN of a stranger to the server, of `to`'s family.
fn strange_syn(to: IpAddr, port: u16) -> TcpPacket {
    let [v4, v6] = strangers();
    let from = if to.is_ipv4() { v4 } else { v6 };
    TcpPacket::syn((from, port).into(), (to, PORT).into(), 1_000_000)
}

#[test]
fn a_syn_in_fragments_does_not_reach_a_strict_pods_app() {
    let scene = Scene::new("", "mtls: strict").unwrap();
    let stranger = Stranger::new(&scene, &strangers());
    for to in scene.server.addresses() {
        // In IPv4 the first fragment may end before the flags.
        let cuts: &[usize] = if to.is_ipv4() { &[8, 16, 24] } else { &[24] };
        for (port, cut) in (40_001..).zip(cuts) {
            let mut syn = strange_syn(*to, port);
            syn.payload = vec![0; 16];
            let pieces = packet::fragments(&syn.to_bytes(), *cut);
            let answer = stranger.talk(&syn, &pieces);
            assert_eq!(answer.flags & packet::RST, packet::RST);
        }
    }
    assert_eq!(scene.app.accepted(), 0);
}

#[test]
fn a_syn_in_fragments_reaches_a_permissive_pods_app_by_its_agent() {
    let scene = Scene::new("", "").unwrap();
    let stranger = Stranger::new(&scene, &strangers());
    for to in scene.server.addresses() {
        let mut syn = strange_syn(*to, 40_001);
        syn.payload = b"0123456789abcdef".to_vec();
        let answer = stranger.talk(&syn, &packet::fragments(&syn.to_bytes(), 24));
        assert!(!answer.payload.is_empty());
        eventually("the whole echo", LIMIT, || {
            let streams = stranger.wire.streams().into_iter();
            let mut echoes = streams.filter(|stream| stream.to == syn.from);
            echoes.any(|stream| stream.bytes.ends_with(SECRET))
        })
        .unwrap();
    }
    let peers = scene.app.peers();
    assert_eq!(peers.len(), 2);
    // Not the port that the stranger used: the agent has dialled the app.
    assert!(
        peers
            .iter()
            .all(|p| strangers().contains(&p.ip()) && p.port() != 40_001)
    );
}

#[test]
fn fragments_are_dropped_while_no_agent_lives() {
    let mut scene = Scene::new("", "failMode: open\nmtls: strict").unwrap();
    scene.bed.agent(&scene.b).kill9();
    let stranger = Stranger::new(&scene, &strangers());
    for to in scene.server.addresses() {
        let syn = strange_syn(*to, 40_001);
        let mut syn = TcpPacket {
            payload: vec![0; 16],
            ..syn
        };
        for piece in packet::fragments(&syn.to_bytes(), 24) {
            stranger.sender.send(&piece).unwrap();
        }
        // What comes after it, and is answered, shows that the fragments have arrived.
        syn.from.set_port(40_002);
        let answer = stranger.talk(&syn, &[syn.to_bytes()]);
        assert_eq!(answer.flags & packet::RST, packet::RST);
    }
    let answered = |p: &TcpPacket| p.from.port() == PORT && p.to.port() == 40_001;
    assert!(!stranger.wire.tcp().iter().any(answered));
    assert_eq!(scene.app.accepted(), 0);
    drop(stranger);
    scene.bed.start_agent(&scene.b.clone()).unwrap();
    let dropped = scene.metrics(&scene.b).unwrap();
    let dropped = dropped.steering_packets("inbound", "dropped", "unparsable");
    assert!(dropped >= 4.0, "{dropped}");
}

#[test]
fn a_syn_with_unusual_flags_does_not_reach_a_strict_pods_app() {
    const URG: u8 = 0x20;
    const ECE_CWR: u8 = 0xc0;
    let scene = Scene::new("", "mtls: strict").unwrap();
    let stranger = Stranger::new(&scene, &strangers());
    let odd = [packet::PSH, URG, ECE_CWR, packet::PSH | URG | ECE_CWR];
    for to in scene.server.addresses() {
        for (port, flags) in (40_001..).zip(odd) {
            let mut syn = strange_syn(*to, port);
            syn.flags |= flags;
            let answer = stranger.talk(&syn, &[syn.to_bytes()]);
            assert_eq!(answer.flags & packet::RST, packet::RST, "{flags:#x}");
        }
    }
    assert_eq!(scene.app.accepted(), 0);
}

#[test]
fn a_syn_behind_an_extension_header_does_not_reach_a_strict_pods_app() {
    let scene = Scene::new("", "mtls: strict").unwrap();
    let stranger = Stranger::new(&scene, &strangers());
    let to = scene.server.v6().into();
    let syn = strange_syn(to, 40_001);
    let once = packet::behind_destination_options(&syn.to_bytes());
    let answer = stranger.talk(&syn, &[once]);
    assert_eq!(answer.flags & packet::RST, packet::RST);

    // More headers than TC reads.
    let syn = strange_syn(to, 40_002);
    let deep = (0..8).fold(syn.to_bytes(), |p, _| {
        packet::behind_destination_options(&p)
    });
    let answer = stranger.talk(&syn, &[deep]);
    assert_eq!(answer.flags & packet::RST, packet::RST);

    // Both at once.
    let syn = TcpPacket {
        payload: vec![0; 16],
        ..strange_syn(to, 40_003)
    };
    let hidden = packet::fragments(&packet::behind_destination_options(&syn.to_bytes()), 32);
    let answer = stranger.talk(&syn, &hidden);
    assert_eq!(answer.flags & packet::RST, packet::RST);
    assert_eq!(scene.app.accepted(), 0);
}

/// SYNs with the tuples that the app has seen so far: of a client's address and the agent's choice
/// of port.
fn spoofed_syns(scene: &Scene, seq: u32) -> Vec<TcpPacket> {
    let peers = scene.app.peers().into_iter();
    let syns = peers.map(|peer| {
        let mut to = scene.server.addresses().iter();
        let to = to.find(|to| to.is_ipv4() == peer.is_ipv4()).unwrap();
        TcpPacket::syn(peer, (*to, PORT).into(), seq)
    });
    syns.collect()
}

/// A connection of the client to each address of the server, over which bytes went both ways.
fn connected(scene: &Scene) -> Vec<TcpStream> {
    let connected = scene.server.addresses().iter().map(|to| {
        let mut stream = scene.client.caller().connect((*to, PORT).into()).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        stream
    });
    connected.collect()
}

#[test]
fn a_tuple_that_the_agent_uses_towards_the_app_is_refused_to_a_stranger() {
    let scene = Scene::new("", "mtls: strict").unwrap();
    let streams = connected(&scene);
    let stranger = Stranger::new(&scene, scene.client.addresses());
    for syn in spoofed_syns(&scene, 1) {
        let answer = stranger.talk(&syn, &[syn.to_bytes()]);
        assert_eq!(answer.flags & packet::RST, packet::RST);
    }
    let clashes = scene.metrics(&scene.b).unwrap();
    assert!(clashes.syns("inbound", "refused", "port_clash") >= 2.0);
    assert_eq!(scene.app.accepted(), 2);
    drop(streams);
}

#[test]
fn a_tuple_that_the_agent_used_towards_the_app_opens_nothing_to_a_stranger() {
    for app_ends_first in [false, true] {
        let scene = Scene::new("", "mtls: strict").unwrap();
        let mut streams = connected(&scene);
        if app_ends_first {
            scene.app.half_close();
            for stream in &mut streams {
                assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
            }
        }
        drop(streams);
        eventually("the app's connections to end", LIMIT, || {
            let sockets = scene.server.sockets();
            let mut of_app = sockets.iter().filter(|s| s.local.port() == PORT);
            of_app.all(|socket| socket.state != TcpState::Established)
        })
        .unwrap();
        let stranger = Stranger::new(&scene, scene.client.addresses());
        // One of the two numbers is after those of the connection that has ended.
        for seq in [1_000_000_000, 3_147_483_648] {
            for syn in spoofed_syns(&scene, seq) {
                let answer = stranger.talk(&syn, &[syn.to_bytes()]);
                let opened = answer.flags & packet::RST == 0 && answer.flags != packet::ACK;
                assert!(!opened && answer.payload.is_empty(), "{answer:?}");
            }
        }
        assert_eq!(scene.app.accepted(), 2);
    }
}

#[test]
fn no_mark_takes_an_app_past_its_agent() {
    // The steering mark and that of the programs' own answers (common/src/lib.rs, ebpf/src).
    const STEER_MARK: u32 = 0x2031;
    const ANSWER_MARK: u32 = 0x2032;
    let scene = Scene::new("", "").unwrap();
    let captures = [
        scene.client.capture().unwrap(),
        scene.bed.capture_wire(&scene.a, &scene.b).unwrap(),
    ];
    let bits = (0..32).map(|bit| 1_u32 << bit);
    for mark in bits.chain([u32::MAX, ANSWER_MARK, STEER_MARK]) {
        for to in scene.server.addresses() {
            let caller = scene.client.caller().saying(SECRET).marked(mark);
            // What is routed to the loopback by its mark may end there.
            let caller =
                caller.patience(Duration::from_secs(if mark == STEER_MARK { 1 } else { 10 }));
            let fate = caller.call((*to, PORT));
            assert!(
                fate == Fate::Echoed || mark == STEER_MARK,
                "{mark:#x}: {fate:?}"
            );
        }
    }
    for capture in captures {
        assert!(!capture.contains(SECRET));
        assert_eq!(capture.missed().unwrap(), 0);
    }
    let metrics = scene.metrics(&scene.a).unwrap();
    assert!(metrics.syns("outbound", "steered", "meshed") >= 68.0);
    assert!(metrics.syns("outbound", "passed", "").abs() < 0.5);
}

#[test]
fn an_app_that_takes_another_pods_address_is_refused() {
    // The neighbour's own connections to the port would pass.
    let mut scene = Scene::new("", "").unwrap();
    let neighbour = PodSpec::new("neighbour").settings("skipOutboundPorts: [8080]");
    let neighbour = scene.bed.pod(&scene.a.clone(), neighbour).unwrap();
    let own = neighbour.caller();
    let interface = scene.client.capture().unwrap();
    for to in scene.server.addresses() {
        // Once it passes, its agent knows it.
        eventually("the neighbour to pass", LIMIT, || {
            own.call((*to, PORT)) == Fate::Echoed && passed(&scene) > 0.0
        })
        .unwrap();
        let taken = same_family(neighbour.addresses(), *to).unwrap();
        let transparent = |socket: &Socket| match socket.domain()? {
            Domain::IPV4 => socket.set_ip_transparent_v4(true),
            _ => socket.set_freebind_v6(true),
        };
        let liar = scene.client.caller().preparing(transparent);
        let (fate, time) = liar.from((taken, 0).into()).timed_call((*to, PORT));
        assert_eq!(fate, Fate::Refused, "{taken}");
        assert!(time < Duration::from_millis(500), "{time:?}");
    }
    let refused = scene.metrics(&scene.a).unwrap();
    let refused = refused.syns("outbound", "refused", "unknown_address");
    assert!((refused - 2.0).abs() < 0.5, "{refused}");
    let left = interface.tcp().into_iter();
    let left: Vec<_> = left.filter(|p| p.to.port() == PORT).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn passed(scene: &Scene) -> f64 {
    let metrics = scene.metrics(&scene.a).unwrap();
    metrics.syns("outbound", "passed", "port_skipped")
}

#[test]
fn fragments_of_an_apps_own_making_do_not_leave_the_pod() {
    let scene = Scene::new("", "").unwrap();
    let wire = scene.client.capture().unwrap();
    let sender = scene.client.raw_sender().unwrap();
    for to in scene.server.addresses() {
        let own = scene.client.addresses().iter();
        let from = *own
            .clone()
            .find(|from| from.is_ipv4() == to.is_ipv4())
            .unwrap();
        let syn = TcpPacket {
            payload: SECRET.to_vec(),
            ..TcpPacket::syn((from, 1234).into(), (*to, PORT).into(), 1)
        };
        for piece in packet::fragments(&syn.to_bytes(), 24) {
            // The kernel may tell the sender that it was dropped.
            let _ = sender.send(&piece);
        }
        let deep = (0..8).fold(syn.to_bytes(), |p, _| {
            if to.is_ipv4() {
                p
            } else {
                packet::behind_destination_options(&p)
            }
        });
        let _ = sender.send(&deep);
    }
    let metrics = scene.metrics(&scene.a).unwrap();
    let dropped = metrics.steering_packets("outbound", "dropped", "unparsable");
    assert!(dropped >= 5.0, "{dropped}");
    // The IPv4 packet that is whole is a SYN without a socket.
    assert!(metrics.syns("outbound", "refused", "forwarded") >= 1.0);
    assert!(!wire.contains(&SECRET[4..]));
}

#[test]
fn a_frame_that_is_sent_as_of_another_protocol_does_not_leave_the_pod() {
    const ARP: u16 = 0x0806;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    const NOBODYS: u16 = 0x1234;
    let scene = Scene::new("", "").unwrap();
    // One without link headers, whose packets nobody takes.
    let tun = "tuntap add tun7 mode tun\nlink set tun7 up\n";
    scene.client.netns().ip(tun).unwrap();
    let links = scene.a.bpffs().join("links/default/client");
    let pins = fs::read_dir(links).unwrap().next().unwrap().unwrap().path();
    eventually("the interface to be steered", LIMIT, || {
        let mut links = fs::read_dir(&pins).unwrap().flatten();
        links.any(|link| link.file_name().as_bytes().ends_with(b"_egress_l3"))
    })
    .unwrap();
    let wire = scene.client.capture().unwrap();
    let sender = scene.client.raw_sender().unwrap();
    let mut sent = 0.0;
    for to in scene.server.addresses() {
        let from = same_family(scene.client.addresses(), *to).unwrap();
        let syn = TcpPacket {
            payload: SECRET.to_vec(),
            ..TcpPacket::syn((from, 1234).into(), (*to, PORT).into(), 1)
        };
        let packet = syn.to_bytes();
        let ethertype = if to.is_ipv4() { IPV4 } else { IPV6 };
        let header = [&[0xff; 6][..], &[2; 6], &ethertype.to_be_bytes()].concat();
        let frame = [&header, &packet[..]].concat();
        for protocol in [ARP, IPV4, IPV6, NOBODYS] {
            // The kernel may tell the sender that it was dropped.
            let _ = sender.send_frame("eth0", protocol, &frame);
            let _ = sender.send_frame("tun7", protocol, &packet);
            sent += 2.0;
        }
    }
    let metrics = scene.metrics(&scene.a).unwrap();
    let refused = metrics.syns("outbound", "refused", "forwarded");
    assert!((refused - sent).abs() < 0.5, "{refused} of {sent}");
    assert!(!wire.contains(SECRET));
}

#[test]
fn udp_and_icmp_pass() {
    let scene = Scene::new("", "mtls: strict").unwrap();
    for to in scene.server.addresses() {
        let socket = scene.server.enter(|| UdpSocket::bind("[::]:5353").unwrap());
        let client = scene.client.enter(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any).unwrap()
        });
        for socket in [&socket, &client] {
            socket.set_read_timeout(Some(LIMIT)).unwrap();
        }
        // The longer one goes in fragments.
        for length in [100, 4000] {
            let sent = vec![7; length];
            client.send_to(&sent, (*to, 5353)).unwrap();
            let mut received = vec![0; 9000];
            let (got, from) = socket.recv_from(&mut received).unwrap();
            socket.send_to(&received[..got], from).unwrap();
            let got = client.recv(&mut received).unwrap();
            assert_eq!(received[..got], sent);
        }
        let to = to.to_string();
        scene
            .client
            .run(["ping", "-c", "1", "-W", "5", &to])
            .unwrap();
        scene
            .client
            .run(["ping", "-c", "1", "-W", "5", "-s", "4000", &to])
            .unwrap();
    }
}
