//! Many connections: one after another, at once, and again from the same port.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use malla_testbed::{
    PATIENCE, Pair, Pod, PodSpec, Testbed, Way, accept, allow_many_descriptors, dial_from, listen,
    on_each_way,
};
use socket2::SockRef;

/// Threads of the client and of the server each.
const THREADS: usize = 32;

/// What a client asks; the first byte says who ends first.
const QUESTION: usize = 64;
const CLIENT_ENDS: u8 = 1;
const SERVER_ENDS: u8 = 2;

on_each_way!(
    [Direct, Mesh, RandomPorts, LossyWire, ToUnmeshed, FromUnmeshed]
    short_connections_all_get_their_answer,
    connections_at_once_all_get_their_answer,
);

fn short_connections_all_get_their_answer(pair: &Pair) {
    let number = pair.way.fewer_if_slow(10_000);
    let ends = |turn| {
        if turn % 2 == 0 {
            CLIENT_ENDS
        } else {
            SERVER_ENDS
        }
    };
    ask_often(pair, number, ends);
}

/// Opens `number` connections, each of which gets its own answer and ends in good order.
fn ask_often(pair: &Pair, number: usize, who_ends: impl Fn(usize) -> u8 + Sync) {
    let answering = Answering::start(&pair.server);
    let (to, next) = (pair.address(answering.port()), AtomicUsize::new(0));
    let turns = || std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
    let ask_all = || {
        for turn in turns().take_while(|turn| *turn < number) {
            let mut question = [0; QUESTION];
            question[0] = who_ends(turn);
            question[1..9].copy_from_slice(&turn.to_le_bytes());
            let asked = ask(pair.way, to, question);
            asked.unwrap_or_else(|error| panic!("connection {turn}: {error}"));
        }
    };
    answering.while_answering(|| {
        thread::scope(|scope| {
            // The scope ends when all have, and with a panic if one had.
            for _ in 0..THREADS {
                scope.spawn(|| pair.client.enter(ask_all));
            }
        });
    });
}

fn ask(way: Way, to: SocketAddr, question: [u8; QUESTION]) -> io::Result<()> {
    let mut stream = way.dial(to)?;
    ask_on(&mut stream, question)
}

fn ask_on(stream: &mut TcpStream, question: [u8; QUESTION]) -> io::Result<()> {
    stream.write_all(&question)?;
    let mut answer = [0; QUESTION];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, question.map(|byte| !byte));
    if question[0] == CLIENT_ENDS {
        stream.shutdown(Shutdown::Write)?;
    }
    assert_eq!(stream.read(&mut answer)?, 0);
    Ok(())
}

/// A server that answers each connection's question and ends as the question says.
struct Answering {
    listener: TcpListener,
    ended: AtomicBool,
}

impl Answering {
    fn start(pod: &Pod) -> Self {
        Self {
            listener: listen(pod, 0).unwrap(),
            ended: AtomicBool::new(false),
        }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// Runs `work`, and answers until it has ended.
    fn while_answering(&self, work: impl FnOnce()) {
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| self.answer_all());
            }
            // However the work ends: a panic waits for the threads of its scope.
            let _ending = Ending(self);
            work();
        });
    }

    fn answer_all(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = self.listener.accept() else {
                return;
            };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            // The client tells what went wrong.
            let _ = answer(&mut stream);
        }
    }
}

/// Ends the answering when it is dropped.
struct Ending<'a>(&'a Answering);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
        // accept(2) of a listener that is shut down returns, in every thread.
        let _ = SockRef::from(&self.0.listener).shutdown(Shutdown::Both);
    }
}

fn answer(stream: &mut TcpStream) -> io::Result<()> {
    let mut question = [0; QUESTION];
    stream.read_exact(&mut question)?;
    stream.write_all(&question.map(|byte| !byte))?;
    if question[0] == CLIENT_ENDS {
        stream.read_exact(&mut [0])?;
    }
    Ok(())
}

fn connections_at_once_all_get_their_answer(pair: &Pair) {
    const NUMBER: u64 = 2_000;
    allow_many_descriptors().unwrap();
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    let (mut clients, mut servers) = thread::scope(|scope| {
        let dial_all = || (0..NUMBER).map(|_| pair.way.dial(to).unwrap()).collect();
        let clients = scope.spawn(move || pair.client.enter(dial_all));
        let servers = (0..NUMBER).map(|_| accept(&listener).unwrap());
        let servers: Vec<_> = servers.collect();
        let clients: Vec<TcpStream> = clients.join().unwrap();
        (clients, servers)
    });
    // All are open by now. Each gets the answer to its own question.
    for (client, number) in clients.iter_mut().zip(0..NUMBER) {
        client.write_all(&number.to_le_bytes()).unwrap();
    }
    for server in &mut servers {
        let mut question = [0; 8];
        server.read_exact(&mut question).unwrap();
        server.write_all(&question.map(|byte| !byte)).unwrap();
    }
    for (client, number) in clients.iter_mut().zip(0..NUMBER) {
        let mut answer = [0; 8];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), !number);
    }
}

#[test]
fn one_source_port_connects_a_thousand_times_while_the_proxys_side_ends_first() {
    for way in [Way::Direct, Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed] {
        let pair = Pair::new(way).unwrap();
        for address in pair.addresses(0) {
            reconnect(&pair, address);
        }
        pair.nothing_is_held().unwrap();
    }
}

/// Dials with a source port whose last connection may not be over yet: the acknowledgement of its
/// FIN is on its way, with or without a mesh.
fn dial_again(source: u16, to: SocketAddr) -> io::Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match dial_from(source, to) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrNotAvailable && Instant::now() < deadline =>
            {
                thread::yield_now();
            }
            other => return other,
        }
    }
}

/// The server ends first, so the agent ends first towards the client: its side is the one that is
/// in `TIME_WAIT` when the same source port comes again.
fn reconnect(pair: &Pair, mut to: SocketAddr) {
    const SOURCE: u16 = 45_000;
    let answering = Answering::start(&pair.server);
    to.set_port(answering.port());
    answering.while_answering(|| {
        pair.client.enter(|| {
            for turn in 0..1_000 {
                let mut stream = dial_again(SOURCE, to)
                    .unwrap_or_else(|error| panic!("connect {turn}: {error}"));
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                ask_on(&mut stream, [SERVER_ENDS; QUESTION]).unwrap();
            }
        });
    });
}

#[test]
fn a_tunnel_has_as_many_streams_as_its_peer_has_said_that_it_takes() {
    // 100 before it has said so, which the first answer tells.
    for (connections, expected) in [(256, 1.0), (257, 2.0)] {
        let bed = Testbed::new("streams").unwrap();
        let bed = bed.with_agent_arguments(["--workers", "1"]);
        let (client, server) = (PodSpec::new("client"), PodSpec::new("server"));
        let pair = Pair::on(bed, Way::Mesh, client, server).unwrap();
        let open = |_| {
            let ends = pair.connection().unwrap();
            (&ends.0).write_all(b"x").unwrap();
            (&ends.1).read_exact(&mut [0]).unwrap();
            ends
        };
        let open: Vec<_> = (0..connections).map(open).collect();
        let metrics = pair.bed.agent(&pair.a).metrics().unwrap();
        let tunnels = metrics.sum("malla_tunnels_open", &[("direction", "outbound")]);
        assert!((tunnels - expected).abs() < f64::EPSILON, "{tunnels}");
        drop(open);
        pair.nothing_is_held().unwrap();
    }
}

#[test]
#[ignore = "long: 100,000 connections on each of three ways"]
fn a_hundred_thousand_short_connections_from_one_pod_to_one_address() {
    for way in [Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed] {
        let pair = Pair::new(way).unwrap();
        // A client that ended first would run out of ports without a mesh too.
        ask_often(&pair, 100_000, |_| SERVER_ENDS);
        pair.nothing_is_held().unwrap();
    }
}
