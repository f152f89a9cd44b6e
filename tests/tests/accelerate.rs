//! Socket acceleration: bytes, order, ends and memory are those of TCP, whoever stalls.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{PATIENCE, Pair, Polled, accept, eventually, listen, payload};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockRef, Socket, Type};

const MIB: usize = 1 << 20;

#[test]
fn messages_stay_redirected_in_both_families() {
    let pair = Pair::accelerated().unwrap();
    let before = pair.directions("no_credit").unwrap();
    let listener = listen(&pair.server, 0).unwrap();
    let port = listener.local_addr().unwrap().port();
    for to in pair.addresses(port) {
        let client = Polled::new(pair.dial(to).unwrap()).unwrap();
        let server = Polled::new(accept(&listener).unwrap()).unwrap();
        for turn in 0..300 {
            payload::send(&client, turn, 200).unwrap();
            payload::receive(&server, turn, 200).unwrap();
            payload::send(&server, turn, 1000).unwrap();
            payload::receive(&client, turn, 1000).unwrap();
        }
    }
    // Of eight: app and agent on two nodes, both ways, in two families. One that begins before the
    // kernel has come to the other end's last packet of the handshake goes by TCP.
    pair.wait_for_redirected(4).unwrap();
    assert_eq!(pair.directions("no_credit").unwrap(), before);
    pair.nothing_is_held().unwrap();
}

#[test]
fn bulk_data_is_exact_whether_its_reader_keeps_up_or_not() {
    let pair = Pair::accelerated().unwrap();
    let (client, server) = pair.polled_connection().unwrap();
    for (from, to) in [(&client, &server), (&server, &client)] {
        thread::scope(|scope| {
            scope.spawn(|| payload::send(from, 7, 64 * MIB).unwrap());
            payload::receive(to, 7, 64 * MIB).unwrap();
        });
    }
    // Apps that stall until what is redirected isn't taken any more.
    for turn in 0..20 {
        let (client, server) = pair.polled_connection().unwrap();
        for (from, to) in [(&client, &server), (&server, &client)] {
            thread::scope(|scope| {
                scope.spawn(|| payload::send(from, turn, 4 * MIB).unwrap());
                thread::sleep(Duration::from_millis(10 * turn));
                payload::receive(to, turn, 4 * MIB).unwrap();
            });
        }
    }
    assert!(pair.directions("redirected").unwrap() > 0);
}

#[test]
fn three_writes_of_a_delayed_answer_keep_their_order() {
    let pair = Pair::accelerated().unwrap();
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    for turn in 0..1000_u64 {
        let client = pair.client.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            // The first message brings the ACK, which the agent's end comes to be by.
            socket.set_tcp_quickack(false)?;
            socket.set_tcp_nodelay(true)?;
            socket.connect(&to.into())?;
            Polled::new(socket.into())
        });
        let client = client.unwrap();
        for message in 0..3 {
            payload::send(&client, 3 * turn + message, 100).unwrap();
        }
        let server = Polled::new(accept(&listener).unwrap()).unwrap();
        for message in 0..3 {
            payload::receive(&server, 3 * turn + message, 100).unwrap();
        }
    }
    // What the server's agent sends, unless its app's end comes to be by it.
    pair.wait_for_redirected(100).unwrap();
}

#[test]
fn the_last_bytes_before_an_end_are_read_before_it() {
    let pair = Pair::accelerated().unwrap();
    for turn in 0..300 {
        let (client, server) = pair.polled_connection().unwrap();
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
    pair.wait_for_redirected(600).unwrap();
    pair.nothing_is_held().unwrap();
}

#[test]
fn a_reset_is_a_reset_on_either_side() {
    let pair = Pair::accelerated().unwrap();
    for turn in 0..20 {
        let (client, server) = pair.polled_connection().unwrap();
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
    let pair = Pair::accelerated().unwrap();
    let before = pair.agents().map(|agent| agent.resident_memory().unwrap());
    for server_writes in [false, true] {
        let (client, server) = pair.polled_connection().unwrap();
        let (writer, reader) = if server_writes {
            (server, client)
        } else {
            (client, server)
        };
        let mut pushed = 0;
        let piece = vec![1; 64 << 10];
        // Full for a second.
        let is_full = |writer: &Polled| {
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
    let before = pair.directions("redirected").unwrap();
    eventually("a new connection to be accelerated", PATIENCE, || {
        let (client, server) = pair.polled_connection().unwrap();
        payload::send(&client, 1, 1000).unwrap();
        payload::receive(&server, 1, 1000).unwrap();
        pair.directions("redirected").unwrap() > before
    })
    .unwrap();
}

#[test]
fn settings_and_agents_change_under_a_live_connection() {
    let mut pair = Pair::accelerated().unwrap();
    let (client, server) = pair.polled_connection().unwrap();
    let speaks = |turn: u64| {
        for (from, to) in [(&client, &server), (&server, &client)] {
            payload::send(from, turn, 30_000).unwrap();
            payload::receive(to, turn, 30_000).unwrap();
        }
    };
    speaks(1);
    pair.wait_for_redirected(1).unwrap();
    let (a, b) = (Arc::clone(&pair.a), Arc::clone(&pair.b));
    for (turn, mode) in [(2, "off"), (4, "full"), (6, "auto"), (8, "full")] {
        for pod in [&pair.client, &pair.server] {
            let settings = format!("accelerate: {mode}");
            pair.bed.change_settings(pod, &settings).unwrap();
        }
        let in_force = if mode == "full" { "full" } else { "off" };
        for agent in pair.agents() {
            agent.wait_for_acceleration(in_force).unwrap();
        }
        speaks(turn);
        if mode == "full" {
            new_connections_are_accelerated(&pair);
        }
    }
    let old = [&a, &b].map(|node| pair.bed.upgrade_agent(node).unwrap());
    for agent in pair.agents() {
        agent.wait_for_acceleration("full").unwrap();
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
    let pair = Pair::accelerated().unwrap();
    let (client, server) = pair.polled_connection().unwrap();
    payload::send(&client, 1, 100).unwrap();
    payload::receive(&server, 1, 100).unwrap();
    payload::send(&server, 2, 50_000).unwrap();
    drop(server);
    // In the client's socket now, or on its way there.
    pair.wait_for_redirected(1).unwrap();
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
    let mut pair = Pair::accelerated().unwrap();
    let a = Arc::clone(&pair.a);
    // At rest, with a writer that its reader has stopped, and in the middle of a transfer.
    let ends = [0, 1, 2].map(|_| pair.polled_connection().unwrap());
    for (client, server) in &ends {
        payload::send(client, 1, 100).unwrap();
        payload::receive(server, 1, 100).unwrap();
    }
    pair.wait_for_redirected(3).unwrap();
    let [rest, stalled, moving] = &ends;
    let write_on = |mut to: &Polled| loop {
        if let Err(error) = to.write(&[1; 16 << 10]) {
            break error.kind();
        }
    };
    let read_on = |mut from: &Polled| loop {
        match from.read(&mut [0; 16 << 10]) {
            Ok(0) => panic!("a reset is read as an end"),
            Ok(_) => {}
            Err(error) => break error.kind(),
        }
    };
    let told = thread::scope(|scope| {
        let both = [&moving.0, &moving.1];
        let writers = [&stalled.0, &stalled.1].into_iter().chain(both);
        let writers: Vec<_> = writers.map(|end| scope.spawn(|| write_on(end))).collect();
        let readers = both.into_iter().chain([&rest.0, &rest.1]);
        let readers: Vec<_> = readers.map(|end| scope.spawn(|| read_on(end))).collect();
        thread::sleep(Duration::from_millis(500));
        assert!(writers.iter().chain(&readers).all(|end| !end.is_finished()));
        pair.agents()[0].kill9();
        let all = writers.into_iter().chain(readers);
        all.map(|end| end.join().unwrap()).collect::<Vec<_>>()
    });
    for kind in told {
        // One that reads and writes is told once of the reset, and then that the pipe is broken.
        let is_end = matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
        assert!(is_end, "{kind:?}");
    }
    drop(pair.bed.start_agent(&a).unwrap());
    pair.agents()[0].wait_for_acceleration("full").unwrap();
    new_connections_are_accelerated(&pair);
}

#[test]
fn both_nodes_count_each_byte_through_demotions_and_a_change_of_mode() {
    let pair = Pair::accelerated().unwrap();
    let connections = [(); 4].map(|()| pair.polled_connection().unwrap());
    // Of all clients, and of all servers.
    let mut sent = [0, 0];
    for mode in ["full", "off"] {
        if mode == "off" {
            for pod in [&pair.client, &pair.server] {
                pair.bed.change_settings(pod, "accelerate: off").unwrap();
            }
            for agent in pair.agents() {
                agent.wait_for_acceleration("off").unwrap();
            }
        }
        for (turn, (client, server)) in (0..).zip(&connections) {
            // The third one's reader stalls until what is redirected isn't taken any more.
            let length = if turn == 2 { 6 * MIB } else { 100 * turn + 1 };
            for (side, from, to) in [(0, client, server), (1, server, client)] {
                thread::scope(|scope| {
                    scope.spawn(|| payload::send(from, 1, length).unwrap());
                    thread::sleep(Duration::from_millis(if turn == 2 { 300 } else { 0 }));
                    payload::receive(to, 1, length).unwrap();
                });
                sent[side] += length;
            }
        }
    }
    pair.wait_for_redirected(8).unwrap();
    drop(connections);
    pair.nothing_is_held().unwrap();
    for (agent, direction) in pair.agents().into_iter().zip(["outbound", "inbound"]) {
        let metrics = agent.metrics().unwrap();
        let sum = |family, peer| {
            let sum = metrics.sum(family, &[("direction", direction), ("peer", peer)]);
            format!("{sum}")
        };
        let [asked, answered] = sent.map(|sent| sent.to_string());
        assert_eq!(sum("tcp_read_bytes_total", "src"), asked);
        assert_eq!(sum("tcp_read_bytes_total", "dst"), answered);
        assert_eq!(sum("tcp_write_bytes_total", "src"), answered);
        assert_eq!(sum("tcp_write_bytes_total", "dst"), asked);
    }
}

/// An agent that is replaced tells of its connections in its log, as nobody asks it for metrics any more.
#[test]
fn each_byte_is_told_of_through_upgrades_and_a_withdrawal() {
    let mut pair = Pair::accelerated().unwrap();
    let (a, b) = (Arc::clone(&pair.a), Arc::clone(&pair.b));
    let (client, server) = pair.polled_connection().unwrap();
    let says = |from: &Polled, to: &Polled, length| {
        thread::scope(|scope| {
            scope.spawn(|| payload::send(from, 1, length).unwrap());
            payload::receive(to, 1, length).unwrap();
        });
    };
    says(&client, &server, 1001);
    pair.wait_for_redirected(1).unwrap();
    let old = [&a, &b].map(|node| pair.bed.upgrade_agent(node).unwrap());
    for agent in pair.agents() {
        agent.wait_for_acceleration("full").unwrap();
    }
    says(&server, &client, 40_000);
    says(&client, &server, 5);
    let (left, right) = pair.polled_connection().unwrap();
    says(&left, &right, 70_000);
    says(&right, &left, 7);
    pair.wait_for_redirected(2).unwrap();

    pair.bed.withdraw(&pair.client).unwrap();
    eventually("new connections to pass the agent", PATIENCE, || {
        let agent = pair.bed.agent(&a);
        drop(pair.connection());
        agent
            .metrics()
            .unwrap()
            .syns("outbound", "passed", "withdrawn")
            > 0.0
    })
    .unwrap();
    says(&left, &right, 300_000);
    says(&right, &left, 900);

    says(&client, &server, 20);
    drop((left, right, client, server));
    let told = |log: &str, sent: usize, received: usize| {
        log.contains(&format!(" bytes_sent={sent} bytes_recv={received} "))
    };
    for (agent, direction) in old.iter().zip(["outbound", "inbound"]) {
        let (sent, received) = (1001 + 5 + 20, 40_000);
        agent.wait_ended(Duration::from_secs(30)).unwrap();
        let log = agent.log();
        let is_told = match direction {
            "outbound" => told(&log, sent, received),
            _ => told(&log, received, sent),
        };
        assert!(is_told, "{log}");
    }
    let line = " bytes_sent=370000 bytes_recv=907 ";
    let process = pair.bed.agent(&a).process();
    process.wait_for_log(line, PATIENCE).unwrap();
}
