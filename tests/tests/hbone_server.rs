//! A malla pod reaches a server of another make, written from the description of HBONE alone.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{
    Node, Pod, PodSpec, Process, Testbed, eventually,
    hbone::{self, Certificate},
};
use socket2::SockRef;

const LIMIT: Duration = Duration::from_secs(20);
const BULK: usize = 1 << 20;

// What the server does with a connection, by the port that is asked for.
const ECHO: u16 = 7;
const STALL: u16 = 9;
const ANSWER_LAST: u16 = 10;
const END_FIRST: u16 = 11;
const RESET: u16 = 12;
const SILENCE: u16 = 13;
const CUT: u16 = 14;
const LEAVE: u16 = 15;
const CUT_FIRST: u16 = 16;
const ANSWER_DATA: u16 = 17;
const CUT_AT_DATA: u16 = 18;
const REFUSE_DATA: u16 = 19;
const LEAVE_DATA: u16 = 20;

/// A pod under an agent, and one whose mesh port is served by something else.
struct World {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    peer: Arc<Pod>,
    server: Process,
}

impl World {
    fn new(name: &str, arguments: &[&str]) -> Self {
        let mut bed = Testbed::new(name)
            .unwrap()
            .with_agent_arguments(["--workers", "1"]);
        let (node, without_agent) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = bed.pod(&node, PodSpec::new("client").account("front"));
        let client = client.unwrap();
        let peer = bed.pod(&without_agent, PodSpec::new("peer").account("peer"));
        let peer = peer.unwrap();
        bed.start_agent(&node).unwrap();
        let certificate = Certificate::of("spiffe://cluster.local/ns/default/sa/peer");
        let certificate = certificate.issue(&bed).unwrap();
        let server = hbone::serve(&bed, &peer, &certificate, arguments).unwrap();
        Self {
            bed,
            node,
            client,
            peer,
            server,
        }
    }

    /// A connection of the pod's app, over IPv4. It may only be one that isn't reset at once.
    fn connect(&self, port: u16) -> TcpStream {
        self.client.connect((self.peer.v4(), port)).unwrap()
    }

    fn server_says(&self, line: &str) {
        self.server.wait_for_log(line, LIMIT).unwrap();
    }

    fn agent_logs(&self, text: &str) {
        let what = format!("`{text}` in the agent's log");
        let logs = || self.bed.agent(&self.node).log().contains(text);
        eventually(&what, LIMIT, logs).unwrap();
    }
}

/// Sends, ends, and returns what comes back.
fn ask(mut stream: &TcpStream, bytes: &[u8]) -> Vec<u8> {
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// Whether the other end resets the connection, which may show while it is made.
fn is_reset(stream: io::Result<TcpStream>) -> bool {
    let read = stream.and_then(|mut stream| stream.read_to_end(&mut Vec::new()));
    read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn a_connection_arrives_as_a_connect_under_the_pods_identity() {
    let world = World::new("peer-out", &[]);
    for address in world.peer.addresses() {
        let stream = world.client.connect((*address, ECHO)).unwrap();
        let client = stream.local_addr().unwrap();
        assert_eq!(ask(&stream, b"hello"), b"hello");
        let authority = SocketAddr::new(*address, ECHO);
        // No scheme and no path: a plain CONNECT has none (RFC 9113, 8.5).
        world.server_says(&format!(
            "request CONNECT {authority} :method,:authority,baggage,forwarded,traceparent\n"
        ));
        world.server_says(&format!("forwarded=for=\"{client}\""));
        world.server_says("baggage=k8s.namespace.name=default,k8s.pod.name=client");
    }
    world.server_says("tunnel TLSv1.3 h2 spiffe://cluster.local/ns/default/sa/front\n");
    world.server_says("ended 7 end 5\n");
}

#[test]
fn either_end_may_end_first_and_bytes_still_flow_the_other_way() {
    let world = World::new("peer-out-half", &[]);
    let answer = ask(&world.connect(ANSWER_LAST), b"question");
    assert!(answer == vec![b'a'; BULK], "{} bytes came", answer.len());

    let mut stream = world.connect(END_FIRST);
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"bye");
    stream.write_all(&vec![b'x'; BULK]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    world.server_says("ended 11 end 1048576\n");
}

#[test]
fn a_reset_stream_is_a_reset_for_the_app() {
    let world = World::new("peer-out-rst", &[]);
    let mut stream = world.connect(RESET);
    stream.write_all(b"hello").unwrap();
    assert!(is_reset(Ok(stream)));
    assert_eq!(ask(&world.connect(ECHO), b"on"), b"on");
}

#[test]
fn a_reset_by_the_app_is_a_connect_error_of_the_stream() {
    let world = World::new("peer-out-rst-app", &[]);
    let mut stream = world.connect(ECHO);
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    let linger = Some(Duration::ZERO);
    SockRef::from(&stream).set_linger(linger).unwrap();
    drop(stream);
    world.server_says("ended 7 reset CONNECT_ERROR 5\n");
}

#[test]
fn a_tunnel_that_is_cut_resets_its_apps_and_the_next_one_is_new() {
    let world = World::new("peer-out-cut", &[]);
    let other = world.connect(ECHO);
    let mut stream = world.connect(CUT);
    stream.write_all(b"hello").unwrap();
    assert!(is_reset(Ok(stream)));
    assert!(is_reset(Ok(other)));
    world.agent_logs("error=\"tunnel_lost\"");
    assert_eq!(ask(&world.connect(ECHO), b"on"), b"on");
}

#[test]
fn a_peer_that_goes_away_keeps_its_streams_and_gets_no_new_ones() {
    let world = World::new("peer-out-goaway", &[]);
    let echoed = |mut stream: &TcpStream| {
        stream.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
    };
    let tunnels = || world.server.log().matches("tunnel ").count();
    let old = [ECHO, LEAVE].map(|port| world.connect(port));
    old.iter().for_each(echoed);
    world.server_says("leaving\n");
    assert_eq!(tunnels(), 1);
    let new = [ECHO, ECHO].map(|port| world.connect(port));
    new.iter().for_each(echoed);
    assert_eq!(tunnels(), 2);
    old.iter().for_each(echoed);
    for stream in old.iter().chain(&new) {
        assert_eq!(ask(stream, &vec![b'x'; BULK]), vec![b'x'; BULK]);
    }
    world.server_says("ended 15 end 1048586\n");
    assert!(!world.bed.agent(&world.node).log().contains("error="));
}

#[test]
fn a_refused_connect_is_a_reset_for_the_app() {
    let world = World::new("peer-out-refused", &[]);
    for status in [400, 401, 503] {
        let connected = world.client.connect((world.peer.v4(), status));
        assert!(is_reset(connected), "{status}");
        world.server_says(&format!("request CONNECT {}:{status} ", world.peer.v4()));
    }
    world.agent_logs("error=\"peer_refused\"");
}

#[test]
fn a_connect_without_an_answer_times_out_alone() {
    let world = World::new("peer-out-silent", &[]);
    let silent = world.connect(SILENCE);
    assert_eq!(ask(&world.connect(ECHO), b"on"), b"on");
    assert!(is_reset(Ok(silent)));
    world.agent_logs("error=\"connect_timeout\"");
}

#[test]
fn a_peer_that_gives_no_window_blocks_one_app_and_nobody_else() {
    let world = World::new("peer-out-window", &[]);
    let mut stalled = world.connect(STALL);
    stalled
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut sent = 0;
    // Until all buffers between this app and the peer are full.
    let blocked = loop {
        match stalled.write(&vec![b'x'; BULK]) {
            Ok(bytes) => sent += bytes,
            Err(error) => break error.kind(),
        }
        assert!(sent < 32 * BULK, "nothing holds the app back");
    };
    assert_eq!(blocked, ErrorKind::WouldBlock);
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_eq!(ask(&world.connect(ECHO), b"on"), b"on"));
        }
    });
    world.server_says("tunnel ");
    let tunnels = world.server.log().matches("tunnel ").count();
    assert_eq!(tunnels, 1, "the others went through another tunnel");
}

#[test]
fn a_peers_limit_of_streams_is_kept_and_more_connections_take_more_tunnels() {
    let world = World::new("peer-out-limit", &["--streams", "3"]);
    let mut open = Vec::new();
    for _ in 0..10 {
        let mut stream = world.connect(ECHO);
        stream.write_all(b"hello").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        open.push(stream);
    }
    let log = world.server.log();
    assert_eq!(log.matches("tunnel ").count(), 4, "{log}");
    assert!(!log.contains("closed"), "{log}");
}

#[test]
fn a_stream_that_a_peer_refuses_unprocessed_goes_by_another_tunnel() {
    let world = World::new("peer-out-strict", &["--streams", "5", "--strict"]);
    // All at once: the peer sends its SETTINGS when they are exceeded, and not before.
    let all: Vec<TcpStream> = thread::scope(|scope| {
        let world = &world;
        let asked: Vec<_> = (0..40)
            .map(|_| {
                scope.spawn(move || {
                    let mut stream = world.connect(ECHO);
                    stream.write_all(b"hello").unwrap();
                    stream.read_exact(&mut [0; 5]).unwrap();
                    stream
                })
            })
            .collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(all.len(), 40);
    let log = world.server.log();
    assert!(log.contains("refused "), "nothing was refused: {log}");
}

#[test]
fn a_connection_whose_tunnel_breaks_before_the_answer_goes_by_another() {
    let world = World::new("peer-out-again", &[]);
    assert_eq!(ask(&world.connect(CUT_FIRST), b"hello"), b"hello");
    assert_eq!(world.server.log().matches("tunnel ").count(), 2);
}

/// A server that takes data before its answer, and a tunnel in which it has said so.
fn optimistic(name: &str) -> World {
    let world = World::new(name, &["--optimistic"]);
    assert_eq!(ask(&world.connect(ECHO), b"first"), b"first");
    world
}

#[test]
fn what_an_app_says_goes_with_its_connect_to_who_takes_it() {
    let world = optimistic("peer-out-data");
    // The end comes with the word; the word, when the connection has been asked for already; and more
    // than goes at once.
    for (late, length) in [(0, 5), (20, 5), (0, BULK)] {
        let said = vec![b's'; length];
        // An app that is so slow that the tunnel owes an answer meanwhile is not heard before it.
        let heard = || {
            let stream = world.connect(ANSWER_DATA);
            thread::sleep(Duration::from_millis(late));
            (&stream).write_all(&said).ok()?;
            stream.shutdown(Shutdown::Write).ok()?;
            let mut answer = Vec::new();
            (&stream).read_to_end(&mut answer).ok()?;
            Some(answer)
        };
        let answer = (0..3).find_map(|_| heard()).unwrap();
        assert!(answer == said, "{} bytes", answer.len());
    }
    assert_eq!(ask(&world.connect(ANSWER_LAST), b"?").len(), BULK);
    world.server_says(&format!("ended {ANSWER_LAST} end 1\n"));
    assert_eq!(world.server.log().matches("tunnel ").count(), 1);
}

#[test]
fn what_an_app_says_waits_for_the_answer_of_who_does_not_take_it() {
    let world = World::new("peer-out-late", &[]);
    assert_eq!(ask(&world.connect(ECHO), b"first"), b"first");
    let mut stream = world.connect(ANSWER_DATA);
    stream.write_all(b"hello").unwrap();
    world.server_says(&format!(":{ANSWER_DATA} "));
    thread::sleep(Duration::from_millis(300));
    let log = world.server.log();
    assert!(!log.contains("data before the answer"), "{log}");
}

#[test]
fn what_a_peer_leaves_unprocessed_is_said_to_another_tunnel() {
    for (name, port) in [("refused", REFUSE_DATA), ("left", LEAVE_DATA)] {
        let world = optimistic(&format!("peer-out-{name}"));
        assert_eq!(ask(&world.connect(port), b"hello"), b"hello");
        world.server_says(&format!("data before the answer {port}\n"));
        world.server_says(&format!("ended {port} end 5\n"));
        assert_eq!(world.server.log().matches("tunnel ").count(), 2);
    }
}

#[test]
fn what_a_server_may_have_heard_is_not_said_twice() {
    let world = optimistic("peer-out-once");
    let mut stream = world.connect(CUT_AT_DATA);
    stream.write_all(b"hello").unwrap();
    assert!(is_reset(Ok(stream)));
    world.agent_logs("tunnel_lost");
    assert_eq!(ask(&world.connect(ECHO), b"on"), b"on");
    let log = world.server.log();
    assert_eq!(log.matches("data before the answer").count(), 1, "{log}");
}

#[test]
fn an_app_that_is_reset_before_the_answer_ends_its_stream() {
    let world = optimistic("peer-out-gone");
    let stream = world.connect(SILENCE);
    world.server_says(&format!(":{SILENCE} "));
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(stream);
    world.server_says(&format!("ended {SILENCE} reset CANCEL 0\n"));
    world.agent_logs("client_reset");
}

#[test]
fn many_connections_share_few_tunnels_and_no_byte_is_mixed_up() {
    let world = World::new("peer-out-many", &[]);
    thread::scope(|scope| {
        for number in 0..150_u8 {
            let world = &world;
            scope.spawn(move || {
                let bytes = vec![number; 10_000];
                assert!(ask(&world.connect(ECHO), &bytes) == bytes);
            });
        }
    });
    let tunnels = world.server.log().matches("tunnel ").count();
    assert!(tunnels <= 3, "150 connections took {tunnels} tunnels");
}
