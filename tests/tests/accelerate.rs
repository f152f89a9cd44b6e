//! Socket acceleration: bytes, order, ends and memory are those of TCP, whoever stalls.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{Agent, PATIENCE, Pair, PodSpec, Way, accept, eventually, listen, payload};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

const MIB: usize = 1 << 20;

/// Between pods that ask for all of it, once they have it.
fn accelerated(way: Way) -> Pair {
    let full = |name| PodSpec::new(name).settings("accelerate: full");
    let mut pair = Pair::of(way, full("client"), full("server")).unwrap();
    for agent in pair.agents() {
        wait_for_mode(agent, "full");
    }
    pair.count_descriptors().unwrap();
    pair
}

fn wait_for_mode(agent: &Agent, mode: &str) {
    eventually(&format!("a pod in mode {mode}"), PATIENCE, || {
        // One that takes over may not answer yet.
        let metrics = agent.metrics();
        metrics.is_ok_and(|metrics| metrics.sum("malla_acceleration_pods", &[("mode", mode)]) > 0.0)
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", agent.log()));
}

/// How many directions of both nodes' connections this has happened to.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count is a whole number far below the limits of a cast"
)]
fn directions(pair: &Pair, event: &str) -> usize {
    let counts = pair.agents().map(|agent| {
        let metrics = agent.metrics().unwrap();
        metrics.sum("malla_acceleration_directions_total", &[("event", event)])
    });
    counts.iter().sum::<f64>() as usize
}

/// Waits until so many directions are counted as redirected.
fn wait_for_redirected(pair: &Pair, many: usize) {
    let what = format!("{many} directions to be redirected");
    eventually(&what, PATIENCE, || directions(pair, "redirected") >= many).unwrap();
}

/// A socket of an app that waits for readiness and reads without blocking, as `full` asks of it.
struct App(TcpStream);

impl App {
    fn new(socket: TcpStream) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let mut polled = [PollFd::new(self.0.as_fd(), what)];
        let limit = PollTimeout::try_from(PATIENCE).unwrap();
        match poll(&mut polled, limit)? {
            0 => Err(ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

impl Read for &App {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.0).read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLIN)?;
                }
                done => return done,
            }
        }
    }
}

impl Write for &App {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.0).write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT)?;
                }
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The client's and the server's end of a new connection.
fn connection(pair: &Pair) -> (App, App) {
    let (client, server) = pair.connection().unwrap();
    (App::new(client), App::new(server))
}

#[test]
fn messages_stay_redirected_in_both_families() {
    let pair = accelerated(Way::Mesh);
    let before = directions(&pair, "no_credit");
    let listener = listen(&pair.server, 0).unwrap();
    let port = listener.local_addr().unwrap().port();
    for to in pair.addresses(port) {
        let client = App::new(pair.dial(to).unwrap());
        let server = App::new(accept(&listener).unwrap());
        for turn in 0..300 {
            payload::send(&client, turn, 200).unwrap();
            payload::receive(&server, turn, 200).unwrap();
            payload::send(&server, turn, 1000).unwrap();
            payload::receive(&client, turn, 1000).unwrap();
        }
    }
    // Of eight: app and agent on two nodes, both ways, in two families. One that begins before the
    // kernel has come to the other end's last packet of the handshake goes by TCP.
    wait_for_redirected(&pair, 4);
    assert_eq!(directions(&pair, "no_credit"), before);
    pair.nothing_is_held().unwrap();
}

#[test]
fn bulk_data_is_exact_whether_its_reader_keeps_up_or_not() {
    let pair = accelerated(Way::Mesh);
    let (client, server) = connection(&pair);
    for (from, to) in [(&client, &server), (&server, &client)] {
        thread::scope(|scope| {
            scope.spawn(|| payload::send(from, 7, 64 * MIB).unwrap());
            payload::receive(to, 7, 64 * MIB).unwrap();
        });
    }
    // Apps that stall until what is redirected isn't taken any more.
    for turn in 0..20 {
        let (client, server) = connection(&pair);
        for (from, to) in [(&client, &server), (&server, &client)] {
            thread::scope(|scope| {
                scope.spawn(|| payload::send(from, turn, 4 * MIB).unwrap());
                thread::sleep(Duration::from_millis(10 * turn));
                payload::receive(to, turn, 4 * MIB).unwrap();
            });
        }
    }
    assert!(directions(&pair, "redirected") > 0);
}

#[test]
fn three_writes_of_a_delayed_answer_keep_their_order() {
    let pair = accelerated(Way::Mesh);
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    for turn in 0..1000_u64 {
        let client = pair.dial(to).unwrap();
        SockRef::from(&client).set_tcp_quickack(false).unwrap();
        client.set_nodelay(true).unwrap();
        let client = App::new(client);
        for message in 0..3 {
            payload::send(&client, 3 * turn + message, 100).unwrap();
        }
        let server = App::new(accept(&listener).unwrap());
        for message in 0..3 {
            payload::receive(&server, 3 * turn + message, 100).unwrap();
        }
    }
    wait_for_redirected(&pair, 1000);
}

#[test]
fn the_last_bytes_before_an_end_are_read_before_it() {
    let pair = accelerated(Way::Mesh);
    for turn in 0..300 {
        let (client, server) = connection(&pair);
        // Each in its turn ends first; the other goes on speaking, and then ends as well.
        let (first, second) = if turn % 2 == 0 {
            (client, server)
        } else {
            (server, client)
        };
        let length = 1 + usize::try_from(turn).unwrap() * 37 % 9000;
        payload::send(&first, turn, length).unwrap();
        first.0.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(&second, turn, length).unwrap();
        payload::send(&second, turn + 1, length).unwrap();
        drop(second);
        payload::receive_all(&first, turn + 1, length).unwrap();
    }
    wait_for_redirected(&pair, 600);
    pair.nothing_is_held().unwrap();
}

#[test]
fn a_reset_is_a_reset_on_either_side() {
    let pair = accelerated(Way::Mesh);
    for turn in 0..20 {
        let (client, server) = connection(&pair);
        let (resets, hears) = if turn % 2 == 0 {
            (client, server)
        } else {
            (server, client)
        };
        payload::send(&resets, turn, 100).unwrap();
        payload::receive(&hears, turn, 100).unwrap();
        SockRef::from(&resets.0)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(resets);
        let error = { &hears }.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    pair.nothing_is_held().unwrap();
}

#[test]
fn a_writer_whose_reader_stalls_is_stopped() {
    let pair = accelerated(Way::Mesh);
    let before = pair.agents().map(|agent| agent.resident_memory().unwrap());
    for server_writes in [false, true] {
        let (client, server) = connection(&pair);
        let (writer, reader) = if server_writes {
            (server, client)
        } else {
            (client, server)
        };
        let mut pushed = 0;
        let piece = vec![1; 64 << 10];
        // Full for a second.
        let is_full = |writer: &App| {
            let mut polled = [PollFd::new(writer.0.as_fd(), PollFlags::POLLOUT)];
            poll(&mut polled, PollTimeout::from(1000_u16)).unwrap() == 0
        };
        while !is_full(&writer) {
            match { &writer.0 }.write(&piece) {
                Ok(written) => pushed += written,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            assert!(pushed < 48 * MIB, "a stalled reader has {pushed} bytes");
        }
        let mut read = 0;
        let mut buffer = vec![0; 64 << 10];
        while read < pushed {
            read += { &reader }.read(&mut buffer).unwrap();
        }
    }
    for (agent, before) in pair.agents().into_iter().zip(before) {
        let grown = agent.resident_memory().unwrap().saturating_sub(before);
        assert!(grown < 24 * MIB, "an agent has grown by {grown} bytes");
    }
}

/// Opens connections until one is seen to be redirected.
fn new_connections_are_accelerated(pair: &Pair) {
    let before = directions(pair, "redirected");
    eventually("a new connection to be accelerated", PATIENCE, || {
        let (client, server) = connection(pair);
        payload::send(&client, 1, 1000).unwrap();
        payload::receive(&server, 1, 1000).unwrap();
        directions(pair, "redirected") > before
    })
    .unwrap();
}

#[test]
fn settings_and_agents_change_under_a_live_connection() {
    let mut pair = accelerated(Way::Mesh);
    let (client, server) = connection(&pair);
    let speaks = |turn: u64| {
        for (from, to) in [(&client, &server), (&server, &client)] {
            payload::send(from, turn, 30_000).unwrap();
            payload::receive(to, turn, 30_000).unwrap();
        }
    };
    speaks(1);
    wait_for_redirected(&pair, 1);
    let (a, b) = (Arc::clone(&pair.a), Arc::clone(&pair.b));
    for (turn, mode) in [(2, "off"), (4, "full"), (6, "auto"), (8, "full")] {
        for pod in [&pair.client, &pair.server] {
            let settings = format!("accelerate: {mode}");
            pair.bed.change_settings(pod, &settings).unwrap();
        }
        let in_force = if mode == "full" { "full" } else { "off" };
        for agent in pair.agents() {
            wait_for_mode(agent, in_force);
        }
        speaks(turn);
        if mode == "full" {
            new_connections_are_accelerated(&pair);
        }
    }
    let old = [&a, &b].map(|node| pair.bed.upgrade_agent(node).unwrap());
    for agent in pair.agents() {
        wait_for_mode(agent, "full");
    }
    speaks(9);
    payload::send(&client, 10, 5000).unwrap();
    client.0.shutdown(Shutdown::Write).unwrap();
    payload::receive_all(&server, 10, 5000).unwrap();
    drop((client, server));
    for agent in old {
        assert!(agent.wait_ended(Duration::from_secs(30)).unwrap().success());
    }
}

#[test]
fn what_a_server_said_is_read_after_the_agents_end() {
    let pair = accelerated(Way::Mesh);
    let (client, server) = connection(&pair);
    payload::send(&client, 1, 100).unwrap();
    payload::receive(&server, 1, 100).unwrap();
    payload::send(&server, 2, 50_000).unwrap();
    drop(server);
    // In the client's socket now, or on its way there.
    wait_for_redirected(&pair, 1);
    client.wait(PollFlags::POLLIN).unwrap();
    let agents = pair.agents();
    client.0.shutdown(Shutdown::Write).unwrap();
    pair_is_idle(&pair);
    for agent in agents {
        agent.stop().unwrap();
    }
    payload::receive_all(&client, 2, 50_000).unwrap();
}

/// Waits until the agents carry no connection.
fn pair_is_idle(pair: &Pair) {
    eventually("the agents to carry nothing", PATIENCE, || {
        pair.agents().iter().all(|agent| {
            let metrics = agent.metrics().unwrap();
            metrics.sum("tcp_open_connections", &[]) == 0.0
        })
    })
    .unwrap();
}

#[test]
fn a_killed_agents_connections_are_reset_and_the_next_one_accelerates() {
    let mut pair = accelerated(Way::Mesh);
    let (client, server) = connection(&pair);
    payload::send(&client, 1, 100).unwrap();
    payload::receive(&server, 1, 100).unwrap();
    let a = Arc::clone(&pair.a);
    pair.agents()[0].kill9();
    for end in [&client, &server] {
        let error = { end }.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    drop(pair.bed.start_agent(&a).unwrap());
    wait_for_mode(pair.agents()[0], "full");
    new_connections_are_accelerated(&pair);
}
