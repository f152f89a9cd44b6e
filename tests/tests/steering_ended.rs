//! What a kernel still says of a connection that its app has ended and everybody has forgotten.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use malla_testbed::{
    Fate, Node, PORT, Pod, PodSpec, Scene, TcpState, Testbed, accept, eventually, listen,
    packet::{ACK, FIN, TcpPacket},
    say,
};
use socket2::SockRef;

const LIMIT: Duration = Duration::from_secs(10);

/// The client's sockets towards the server, and the agent's in the client's netns.
fn between(client: &Pod, port: u16) -> Vec<(SocketAddr, SocketAddr, TcpState)> {
    let sockets = client.sockets().into_iter();
    let ends = sockets.map(|socket| (socket.local, socket.remote, socket.state));
    ends.filter(|(local, remote, _)| [local.port(), remote.port()].contains(&port))
        .filter(|(_, _, state)| *state != TcpState::Listen)
        .collect()
}

/// Waits until all that is left of the client's connections is `number` sockets in `TIME_WAIT`, and
/// returns what the servers' FINs would be if they had to be sent again.
fn repeated_fins(client: &Pod, number: usize) -> Vec<TcpPacket> {
    eventually("nothing but TIME_WAIT to be left", LIMIT, || {
        let sockets = between(client, PORT);
        let mut states = sockets.iter().map(|(_, _, state)| *state);
        sockets.len() == number && states.all(|state| state == TcpState::TimeWait)
    })
    .unwrap();
    let fin = |(client, server, _)| TcpPacket {
        from: server,
        to: client,
        seq: 1,
        ack: 1,
        flags: FIN | ACK,
        payload: Vec::new(),
    };
    between(client, PORT).into_iter().map(fin).collect()
}

/// Waits until the programs of a node have dropped so many answers.
fn answers_are_dropped(scene: &Scene, node: &Node, number: f64) {
    eventually("the answers to be dropped", LIMIT, || {
        let metrics = scene.metrics(node).unwrap();
        metrics.steering_packets("outbound", "dropped", "kernel_reply") >= number
    })
    .unwrap();
}

#[test]
fn an_answer_from_time_wait_does_not_pass_the_agent_that_has_forgotten_the_connection() {
    let scene = Scene::new("", "").unwrap();
    let client = &scene.client;
    let connect = |to: &IpAddr| {
        let mut stream = client.caller().connect((*to, PORT).into()).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        stream
    };
    let streams: Vec<_> = scene.server.addresses().iter().map(connect).collect();
    drop(streams);
    let fins = repeated_fins(client, 2);
    let capture = client.capture().unwrap();
    let sender = client.raw_sender().unwrap();
    for fin in &fins {
        sender.send(&fin.to_bytes()).unwrap();
    }
    answers_are_dropped(&scene, &scene.a, 2.0);
    let seen = capture.tcp();
    let past = |packet: &TcpPacket| fins.iter().any(|fin| fin.from == packet.to);
    assert!(!seen.iter().any(past), "past the agent: {seen:?}");
    assert_eq!(capture.missed().unwrap(), 0);
}

#[test]
fn an_answer_from_time_wait_of_a_connection_older_than_the_enrolment_passes() {
    let mut bed = Testbed::new("ended").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
    let _app = server.echo(PORT).unwrap();
    let connect = |to: &IpAddr| client.connect((*to, PORT)).unwrap();
    let mut streams: Vec<_> = server.addresses().iter().map(connect).collect();
    bed.start_agents().unwrap();
    for stream in &mut streams {
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }
    drop(streams);
    let fins = repeated_fins(&client, 2);
    let capture = client.capture().unwrap();
    let sender = client.raw_sender().unwrap();
    for fin in &fins {
        sender.send(&fin.to_bytes()).unwrap();
    }
    eventually("the answers to pass", LIMIT, || {
        let seen = capture.tcp();
        let answered = |fin: &TcpPacket| {
            let mut packets = seen.iter();
            packets.any(|packet| (packet.from, packet.to) == (fin.to, fin.from))
        };
        fins.iter().all(answered)
    })
    .unwrap();
}

/// As when a keepalive and the reset behind it overtake each other on two processors.
#[test]
fn what_answers_for_a_connection_that_the_agent_has_reset_does_not_leave_the_pod() {
    const RESETS: u16 = 7000;
    let scene = Scene::new("", "").unwrap();
    let (client, server) = (&scene.client, &scene.server);
    let listener = listen(server, RESETS).unwrap();
    let capture = client.capture().unwrap();
    let sender = client.raw_sender().unwrap();
    for to in server.addresses() {
        let mut stream = client.caller().connect((*to, RESETS).into()).unwrap();
        let own = stream.local_addr().unwrap();
        let accepted = accept(&listener).unwrap();
        SockRef::from(&accepted)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(accepted);
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        drop(stream);
        eventually("the connection to be gone", LIMIT, || {
            between(client, RESETS).is_empty()
        })
        .unwrap();
        let keepalive = TcpPacket {
            from: (*to, RESETS).into(),
            to: own,
            seq: 1,
            ack: 1,
            flags: ACK,
            payload: Vec::new(),
        };
        sender.send(&keepalive.to_bytes()).unwrap();
    }
    answers_are_dropped(&scene, &scene.a, 2.0);
    let seen = capture.tcp();
    assert!(
        !seen.iter().any(|packet| packet.to.port() == RESETS),
        "past the agent: {seen:?}"
    );
}

/// An answer that waits for its neighbour leaves the pod when the agent has long dialled otherwise.
#[test]
fn what_an_app_answers_to_a_dial_that_was_given_up_does_not_leave_the_pod() {
    let scene = Scene::new("", "").unwrap();
    let (client, server) = (&scene.client, &scene.server);
    assert_eq!(client.caller().call((server.v4(), PORT)), Fate::Echoed);
    let capture = server.capture().unwrap();
    let answers = |quiet: &str| {
        let quiet = [("ipv4/conf/all/arp_ignore", quiet)];
        scene.b.netns().sysctls(&quiet).unwrap();
    };
    answers("8");
    server.netns().ip("neigh flush dev eth0\n").unwrap();
    let mut stream = client.caller().connect((server.v4(), PORT).into()).unwrap();
    eventually(
        "the agent to dial from the pod's own address",
        LIMIT,
        || {
            let metrics = scene.metrics(&scene.b).unwrap();
            metrics.sum("malla_source_replaced_total", &[]) >= 1.0
        },
    )
    .unwrap();
    answers("0");
    assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
    answers_are_dropped(&scene, &scene.b, 1.0);
    let seen = capture.tcp();
    let past = |packet: &TcpPacket| packet.from.port() == PORT;
    let past: Vec<_> = seen.iter().filter(|packet| past(packet)).collect();
    assert!(past.is_empty(), "past the agent: {past:?}");
}
