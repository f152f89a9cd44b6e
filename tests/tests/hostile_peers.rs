//! Peers on the mesh port that send nonsense, send nothing, or come in masses.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    App, Node, Pod, PodSpec, Testbed, eventually,
    hbone::{self, Certificate, Client},
    packet::TcpPacket,
};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
const MESH: u16 = 15008;

/// Two meshed pods under agents, whose server echoes; and a pod on a node without one.
struct World {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    _app: App<()>,
}

impl World {
    fn new(name: &str) -> Self {
        let mut bed = Testbed::new(name).unwrap();
        let nodes = ["a", "b", "c"].map(|node| bed.node(node).unwrap());
        let [clients, node, without_agent] = nodes;
        let client = bed.pod(&clients, PodSpec::new("client")).unwrap();
        let spec = PodSpec::new("server").settings("mtls: strict");
        let server = bed.pod(&node, spec).unwrap();
        let spec = PodSpec::new("stranger").account("stranger");
        let stranger = bed.pod(&without_agent, spec).unwrap();
        bed.start_agent(&clients).unwrap();
        bed.start_agent(&node).unwrap();
        let app = App::start(&server, PORT, usize::MAX, echo).unwrap();
        Self {
            bed,
            node,
            client,
            server,
            stranger,
            _app: app,
        }
    }

    /// A proper client from the stranger's pod, which can go on to be an improper one.
    fn proper_client(&self) -> Client<'_> {
        let uri = "spiffe://cluster.local/ns/default/sa/stranger";
        let certificate = Certificate::of(uri).issue(&self.bed).unwrap();
        Client::new(&self.bed, &self.stranger).with(&certificate)
    }

    /// A TCP connection to the server's mesh port.
    fn knock(&self) -> TcpStream {
        self.stranger.connect((self.server.v4(), MESH)).unwrap()
    }

    fn handshakes(&self, result: &str) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        let labels = [("direction", "inbound"), ("result", result)];
        metrics.sum("malla_handshakes_total", &labels)
    }

    /// The app of the meshed client dials the stranger, and is reset.
    fn dials_in_vain(&self) {
        let connected = self.client.connect((self.stranger.v4(), PORT));
        let read = connected.and_then(|mut stream| stream.read(&mut [0; 1]));
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    /// The same, and the reason is counted.
    fn is_reset_for_the_app(&self, result: &str) {
        let count = || {
            let metrics = self.bed.agent(self.client.node()).metrics().unwrap();
            let labels = [("direction", "outbound"), ("result", result)];
            metrics.sum("malla_handshakes_total", &labels)
        };
        let before = count();
        self.dials_in_vain();
        eventually(result, LIMIT, || count() > before).unwrap();
    }

    fn counts(&self, result: &str, before: f64) {
        let what = format!("one more handshake that ended as {result}");
        let counted = || self.handshakes(result) > before;
        eventually(&what, LIMIT, counted).unwrap();
    }

    /// The mesh still serves its own pods, and the peer that misbehaved.
    fn still_serves(&self) {
        ask(&self.client, &self.server).unwrap();
        let authority = format!("{}:{PORT}", self.server.v4());
        let steps = format!("connect 1 {authority}\nsend 1 on\nend 1\nfinish 1\n");
        let said = self.proper_client().talk(self.server.v4(), &steps).unwrap();
        assert_eq!(said[1..], ["1 end on"]);
    }
}

fn echo(mut stream: TcpStream) {
    let mut received = Vec::new();
    // Fails where the client gives up, which is the client's to tell.
    if stream.read_to_end(&mut received).is_ok() {
        let _ = stream.write_all(&received);
    }
}

/// One connection through the mesh, which must come back whole.
fn ask(client: &Pod, server: &Pod) -> std::io::Result<()> {
    let mut stream = client.connect((server.v4(), PORT))?;
    stream.write_all(b"hello")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    assert_eq!(answer, b"hello");
    Ok(())
}

/// Waits for the other end's close, in good order or not.
fn wait_closed(mut stream: &TcpStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

#[test]
fn bytes_that_are_no_tls_are_refused() {
    let world = World::new("no-tls");
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
        &[0; 4096],
        &[0xff; 4096],
        // A TLS record of the greatest length, with nothing in it that is a hello.
        &[[22, 3, 1, 0x40, 0].as_slice(), &[9; 0x4000]].concat(),
    ] {
        let before = world.handshakes("tls_failed");
        let mut stream = world.knock();
        // May fail at its end, when the beginning has been refused already.
        let _ = stream.write_all(bytes);
        wait_closed(&stream);
        world.counts("tls_failed", before);
    }
    world.still_serves();
}

#[test]
fn a_peer_that_says_nothing_or_half_a_hello_is_closed_in_time() {
    let world = World::new("silent");
    let before = world.handshakes("handshake_timeout");
    let started = Instant::now();
    let streams = [&b""[..], &[22], &[22, 3, 1, 2, 0, 1, 0]].map(|bytes| {
        let mut stream = world.knock();
        stream.write_all(bytes).unwrap();
        stream
    });
    streams.iter().for_each(wait_closed);
    assert!(started.elapsed() >= Duration::from_secs(4), "cut too early");
    world.counts("handshake_timeout", before + 2.0);
    world.still_serves();
}

#[test]
fn a_peer_that_leaves_in_the_middle_of_its_hello_costs_nothing() {
    let world = World::new("leaves");
    let before = world.handshakes("tls_failed");
    let mut stream = world.knock();
    stream.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    drop(stream);
    world.counts("tls_failed", before);
    world.still_serves();
}

#[test]
fn inside_tls_only_http_2_is_spoken() {
    let world = World::new("no-http2");
    let garbage = "\u{1}\u{2}\u{3} no protocol at all, and longer than the preface is";
    for (client, result) in [
        (world.proper_client().offering("http/1.1"), "tls_failed"),
        (
            world
                .proper_client()
                .offering("none")
                .saying("GET / HTTP/1.1\r\n\r\n"),
            "protocol_error",
        ),
        (
            world
                .proper_client()
                .saying("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
            "protocol_error",
        ),
        (world.proper_client().saying(garbage), "protocol_error"),
    ] {
        let before = world.handshakes(result);
        let said = client.talk(world.server.v4(), "").unwrap();
        let last = said.last().unwrap();
        assert!(last.starts_with("closed"), "{said:?}");
        world.counts(result, before);
    }
    world.still_serves();
}

#[test]
fn garbage_between_frames_ends_that_tunnel_alone() {
    let world = World::new("bad-frames");
    let authority = format!("{}:{PORT}", world.server.v4());
    let steps = format!(
        "connect 1 {authority}\nstatus 1\nraw {}\n",
        "no frame ".repeat(200)
    );
    let said = world
        .proper_client()
        .talk(world.server.v4(), &steps)
        .unwrap();
    assert_eq!(said[1], "1 200");
    assert!(said[2].starts_with("closed"), "{said:?}");
    world.still_serves();
}

#[test]
fn ten_thousand_half_open_handshakes_do_not_stop_another_pods_traffic() {
    const KNOCKS: usize = 10_000;
    let world = World::new("half-open");
    let pid = world.bed.agent(&world.node).process().pid();
    let (open_before, limited_before) = (descriptors(pid), world.handshakes("handshake_limit"));
    let is_over = AtomicBool::new(false);
    let (mut knocks, mut slowest, mut asked) = (Vec::new(), Duration::ZERO, 0);
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let to = SocketAddr::from((world.server.v4(), MESH));
            let held = world.stranger.enter(|| {
                let knocks = (0..KNOCKS).map(|_| TcpStream::connect_timeout(&to, LIMIT));
                // One that is over the limit may be reset before `connect` has returned.
                let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
                let knocks = knocks.filter(|knock| !knock.as_ref().is_err_and(reset));
                knocks.collect::<Result<Vec<_>, _>>()
            });
            is_over.store(true, Ordering::Relaxed);
            held
        });
        // The first of these needs a handshake of its own.
        while !is_over.load(Ordering::Relaxed) || asked < 20 {
            let started = Instant::now();
            ask(&world.client, &world.server).unwrap();
            slowest = slowest.max(started.elapsed());
            asked += 1;
        }
        knocks = flood.join().unwrap().unwrap();
    });
    assert!(
        slowest < Duration::from_secs(4),
        "one of {asked} took {slowest:?}"
    );
    // All but those that were given a place: 16 at a time, for 5 seconds each, a worker.
    eventually("the handshakes over the limit to be counted", LIMIT, || {
        world.handshakes("handshake_limit") - limited_before > 9_000.0
    })
    .unwrap();
    eventually(
        "the others to time out, and all to be closed",
        LIMIT,
        || world.handshakes("handshake_timeout") > 0.0 && descriptors(pid) < open_before + 50,
    )
    .unwrap();
    drop(knocks);
    world.still_serves();
}

#[test]
fn spoofed_syns_in_masses_do_not_stop_other_handshakes() {
    let world = World::new("syns");
    // Nobody is there, and nobody says so: what is sent there is lost.
    let nowhere = "route add blackhole 198.18.0.0/15\n";
    world.node.netns().ip(nowhere).unwrap();
    let sender = world.stranger.raw_sender().unwrap();
    let to = SocketAddr::from((world.server.v4(), MESH));
    for number in 0..10_000_u16 {
        let [high, low] = number.to_be_bytes();
        let from = SocketAddr::from(([198, 18, high, low], 40_000));
        let syn = TcpPacket::syn(from, to, u32::from(number));
        sender.send(&syn.to_bytes()).unwrap();
    }
    eventually("half-open connections", LIMIT, || {
        half_open(&world.server) > 100
    })
    .unwrap();
    world.still_serves();
    assert!(half_open(&world.server) > 100, "it was no flood any more");
}

/// How many connections to a pod have had their SYN answered, and nothing since.
fn half_open(pod: &Pod) -> usize {
    const SYN_RECEIVED: &str = "03";
    let table = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let tables = pod.enter(|| table("tcp") + &table("tcp6"));
    let states = tables
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3));
    states.filter(|state| *state == SYN_RECEIVED).count()
}

#[test]
fn a_server_that_is_none_is_a_reset_for_the_app_and_named() {
    let world = World::new("bad-server");
    let greetings = [
        (Some(&b"220 mail.example ESMTP\r\n"[..]), "tls_failed"),
        (Some(&[0; 4096]), "tls_failed"),
        // Says nothing, and keeps the connection.
        (None, "handshake_timeout"),
    ];
    for (greeting, result) in greetings {
        let server = App::start(&world.stranger, MESH, 1, move |mut stream| {
            if let Some(greeting) = greeting {
                stream.write_all(greeting).unwrap();
            }
            wait_closed(&stream);
        });
        let server = server.unwrap();
        world.is_reset_for_the_app(result);
        server.results().unwrap();
    }
    let uri = "spiffe://cluster.local/ns/default/sa/stranger";
    let certificate = Certificate::of(uri).issue(&world.bed).unwrap();
    let arguments = ["--raw", "HTTP/1.1 400 Bad Request\r\n\r\n"];
    let _server = hbone::serve(&world.bed, &world.stranger, &certificate, &arguments).unwrap();
    world.dials_in_vain();
    ask(&world.client, &world.server).unwrap();
}

#[test]
fn connections_that_are_opened_and_reset_in_masses_are_ended_or_carried_and_leave_nothing() {
    let world = World::new("churn");
    let pid = world.bed.agent(&world.node).process().pid();
    let (open_before, memory_before) = (descriptors(pid), resident(pid));
    // So many that the agent has had enough, and so few that it takes each.
    for (batch, end) in [(100, "closed GOAWAY ENHANCE_YOUR_CALM"), (5, "churned")] {
        let authority = format!("{}:{PORT}", world.server.v4());
        let steps = format!("churn {authority} 5000 {batch}\n");
        let is_over = AtomicBool::new(false);
        let said = thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let said = world.proper_client().talk(world.server.v4(), &steps);
                is_over.store(true, Ordering::Relaxed);
                said.unwrap()
            });
            while !is_over.load(Ordering::Relaxed) {
                let started = Instant::now();
                ask(&world.client, &world.server).unwrap();
                let took = started.elapsed();
                assert!(took < Duration::from_secs(4), "one took {took:?}");
            }
            flood.join().unwrap()
        });
        assert_eq!(said.last().unwrap(), end);
        let closed = || descriptors(pid) < open_before + 50;
        eventually("its sockets to be closed", LIMIT, closed).unwrap();
    }
    let grown = resident(pid).saturating_sub(memory_before);
    assert!(grown < 64 << 20, "the agent has grown by {grown} bytes");
    world.still_serves();
}

/// How many descriptors a process has open.
fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Bytes of a process that are in memory.
fn resident(pid: i32) -> usize {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
