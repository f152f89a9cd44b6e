//! Socket acceleration under apps that end, stall and send as they like, beside others and through
//! restarts.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    ops::Range,
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{
    PATIENCE, PORT, Pair, Pod, PodSpec, Polled, TcpState, Testbed, accept, dial_from, eventually,
    listen, nginx, payload,
};
use socket2::{Domain, Protocol, Socket, Type};

const MIB: usize = 1 << 20;
const THREADS: u64 = 8;

/// The addresses and ports of a pod's connections, its apps' and its agent's, without their order.
fn connections(pod: &Pod) -> HashSet<[SocketAddr; 2]> {
    let sockets = pod.sockets().into_iter();
    let live = sockets.filter(|socket| socket.state == TcpState::Established);
    live.map(|socket| {
        let mut ends = [socket.local, socket.remote];
        ends.sort();
        ends
    })
    .collect()
}

#[test]
fn two_pods_with_one_four_tuple_read_their_own() {
    const MANY: u16 = 60;
    const DIALLED: Range<u16> = 20_000..21_000;
    let mut bed = Testbed::new("tuple").unwrap();
    let node = bed.node("a").unwrap();
    let client = PodSpec::new("client").settings("accelerate: full");
    let client = bed.pod(&node, client).unwrap();
    let servers = ["full", "off"].map(|mode| {
        let (first, last) = (DIALLED.start, DIALLED.end - 1);
        let settings = format!("accelerate: {mode}\ndialPorts: {first}-{last}");
        let server = PodSpec::new(format!("server-{mode}")).settings(settings);
        bed.pod(&node, server).unwrap()
    });
    bed.start_agents().unwrap();
    bed.agent(&node).wait_for_acceleration("full").unwrap();
    for server in servers {
        let listener = listen(&server, 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = SocketAddr::new(IpAddr::from(server.v4()), port);
        let connect = |port| {
            let app = client.enter(|| dial_from(port, to)).unwrap();
            let served = accept(&listener).unwrap();
            [app, served].map(|end| Polled::new(end).unwrap())
        };
        // The agent's ports go round their range: the client has those that come next, from the
        // last to the first, so that each tuple is one connection's in the client's netns and
        // another's in the server's.
        let [_, served] = connect(DIALLED.end);
        let dialled = served.0.peer_addr().unwrap().port() - DIALLED.start;
        let port = |turn| DIALLED.start + (dialled + MANY - turn) % 1000;
        let ends: Vec<_> = (0..MANY).map(|turn| connect(port(turn))).collect();
        let of_both = connections(&client)
            .intersection(&connections(&server))
            .count();
        assert!(of_both >= usize::from(MANY) / 2, "{of_both}");
        for round in 0..5 {
            for (turn, [app, served]) in (0..).zip(&ends) {
                payload::send(app, turn, 3000 + round).unwrap();
                payload::send(served, turn + 1000, 3000 + round).unwrap();
            }
            for (turn, [app, served]) in (0..).zip(&ends) {
                payload::receive(served, turn, 3000 + round).unwrap();
                payload::receive(app, turn + 1000, 3000 + round).unwrap();
            }
        }
    }
    let redirected = bed.agent(&node).directions("redirected").unwrap();
    assert!(redirected > usize::from(MANY), "{redirected}");
}

#[test]
fn connections_of_mptcp_stay_plain_and_those_beside_them_do_not() {
    let pair = Pair::accelerated().unwrap();
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    let speak = |protocol: Protocol| {
        let app = pair.client.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            Polled::new(TcpStream::from(socket))
        });
        let (app, served) = (app.unwrap(), accept(&listener).unwrap());
        let served = Polled::new(served).unwrap();
        for turn in 0..3 {
            payload::send(&app, turn, 5000).unwrap();
            payload::receive(&served, turn, 5000).unwrap();
            payload::send(&served, turn, 90_000).unwrap();
            payload::receive(&app, turn, 90_000).unwrap();
        }
    };
    for _ in 0..50 {
        speak(Protocol::MPTCP);
    }
    // The server's app has a plain socket whatever its client has.
    pair.wait_for_redirected(50).unwrap();
    assert_eq!(pair.agents()[0].directions("redirected").unwrap(), 0);
    speak(Protocol::TCP);
    let clients = || pair.agents()[0].directions("redirected").unwrap();
    eventually("a plain one to be redirected", PATIENCE, || clients() > 0).unwrap();
}

#[test]
fn ten_restarts_with_changes_between_leave_as_much_in_the_kernel() {
    let mut pair = Pair::accelerated().unwrap();
    let a = Arc::clone(&pair.a);
    let speaks = |pair: &Pair| {
        let (client, server) = pair.polled_connection().unwrap();
        payload::send(&client, 1, 5000).unwrap();
        payload::receive(&server, 1, 5000).unwrap();
        (client, server)
    };
    drop(speaks(&pair));
    pair.nothing_is_held().unwrap();
    eventually("links in the place of filters", PATIENCE, || {
        pair.client.has_no_filters().unwrap()
    })
    .unwrap();
    let before = a.bpf_objects().unwrap();
    for turn in 0..10 {
        let alive = speaks(&pair);
        let skipped = format!("accelerate: full\nskipOutboundPorts: [{}]", 3000 + turn);
        if turn % 4 < 2 {
            pair.bed.change_settings(&pair.client, &skipped).unwrap();
        }
        if turn % 2 == 0 {
            pair.agents()[0].kill9();
            drop(alive);
        } else {
            // It would serve to its end what lives.
            drop(alive);
            pair.agents()[0].stop().unwrap();
        }
        if turn % 4 >= 2 {
            pair.bed.change_settings(&pair.client, &skipped).unwrap();
        }
        drop(pair.bed.start_agent(&a).unwrap());
        pair.agents()[0].wait_for_acceleration("full").unwrap();
        drop(speaks(&pair));
        let mut after = before;
        eventually("as much as there was", PATIENCE, || {
            after = a.bpf_objects().unwrap();
            after == before
        })
        .unwrap_or_else(|error| panic!("{error}, turn {turn}: {after:?}, was {before:?}"));
    }
}

/// Runs connections in several threads, each told which it is.
fn in_threads(many: u64, connection: impl Fn(u64) + Sync) {
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let connection = &connection;
            scope.spawn(move || {
                for turn in (thread..many).step_by(usize::try_from(THREADS).unwrap()) {
                    connection(turn);
                }
            });
        }
    });
}

#[test]
fn a_thousand_connections_that_end_within_a_send_lose_nothing_that_was_sent() {
    let pair = Pair::accelerated().unwrap();
    in_threads(1000, |turn| {
        let (client, server) = pair.polled_connection().unwrap();
        let (sender, reader) = if turn % 2 == 0 {
            (client, server)
        } else {
            (server, client)
        };
        let length = 1 + usize::try_from(turn * 7919 % 700_000).unwrap();
        let mut bytes = Vec::new();
        payload::send(&mut bytes, turn, length).unwrap();
        // Some of it is taken at once, and then the sender goes.
        let mut sent = 0;
        while sent < length
            && let Ok(written) = (&sender.0).write(&bytes[sent..])
        {
            sent += written;
        }
        drop(sender);
        let mut read = Vec::new();
        { &reader }.read_to_end(&mut read).unwrap();
        assert!(read == bytes[..sent], "{} bytes of {sent}", read.len());
    });
    pair.wait_for_redirected(1000).unwrap();
    pair.nothing_is_held().unwrap();
}

/// Connections whose end is sent right behind their data, in either direction.
fn ends_right_behind_data(many: u64) {
    let pair = Pair::accelerated().unwrap();
    in_threads(many, |turn| {
        let (client, server) = pair.polled_connection().unwrap();
        let length = 1 + usize::try_from(turn * 37 % 9000).unwrap();
        let (first, second) = if turn % 2 == 0 {
            (client, server)
        } else {
            (server, client)
        };
        payload::send(&first, turn, length).unwrap();
        if turn % 4 < 2 {
            drop(first);
        } else {
            first.0.shutdown(Shutdown::Write).unwrap();
        }
        payload::receive_all(&second, turn, length).unwrap();
    });
    pair.nothing_is_held().unwrap();
}

#[test]
fn an_end_right_behind_data_is_read_after_it() {
    ends_right_behind_data(400);
}

#[test]
#[ignore = "long: 100,000 connections"]
fn an_end_right_behind_data_is_read_after_it_100_000_times() {
    ends_right_behind_data(100_000);
}

#[test]
fn what_nginx_sends_by_sendfile_is_the_file() {
    const CLIENTS: usize = 20;
    let pair = Pair::accelerated().unwrap();
    let folder = pair.bed.folder().join("nginx");
    fs::create_dir(&folder).unwrap();
    payload::send(fs::File::create(folder.join("file")).unwrap(), 3, 5 * MIB).unwrap();
    let server = format!(
        "sendfile on; server {{ listen {PORT}; root {}; }}",
        folder.display()
    );
    let nginx = nginx(&pair.server, &folder, &server).unwrap();
    let _nginx = nginx.spawn().unwrap();
    pair.server.wait_listening(PORT).unwrap();
    let to = pair.address(PORT);
    thread::scope(|scope| {
        for turn in 0..CLIENTS {
            let client = Polled::new(pair.dial(to).unwrap()).unwrap();
            scope.spawn(move || {
                let request = b"GET /file HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
                { &client }.write_all(request).unwrap();
                // Some clients are slow, so what is sent finds no room.
                thread::sleep(Duration::from_millis(20 * (turn as u64 % 10)));
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    { &client }.read_exact(&mut byte).unwrap();
                    head.push(byte[0]);
                }
                assert!(head.starts_with(b"HTTP/1.1 200"));
                payload::receive_all(&client, 3, 5 * MIB).unwrap();
            });
        }
    });
    // Nginx answers when both ends are there.
    let redirected = || pair.agents()[1].directions("redirected").unwrap();
    eventually("nginx's answers to be redirected", PATIENCE, || {
        redirected() >= CLIENTS
    })
    .unwrap();
}

#[test]
fn haproxy_carries_bytes_between_accelerated_connections_and_splices_where_it_may_try() {
    const BEHIND: u16 = PORT + 1;
    const LENGTH: usize = 4 * MIB;
    let mut bed = Testbed::new("haproxy").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let [client, proxy, server] =
        [("client", &a), ("proxy", &b), ("server", &a)].map(|(name, node)| {
            let spec = PodSpec::new(name).settings("accelerate: full");
            bed.pod(node, spec).unwrap()
        });
    bed.start_agents().unwrap();
    for node in [&a, &b] {
        bed.agent(node).wait_for_acceleration("full").unwrap();
    }
    let file = bed.folder().join("haproxy.cfg");
    // It reads where that is refused.
    let splices = if b.refuses_splices().unwrap() {
        "option splice-request\n  option splice-response"
    } else {
        "no option splice-auto"
    };
    let configuration = format!(
        "defaults\n  mode tcp\n  {splices}\n  timeout connect 20s\n  timeout client 60s\n  timeout server 60s\n\
         listen app\n  bind :{PORT}\n  server app {}:{BEHIND}\n",
        server.v4()
    );
    fs::write(&file, configuration).unwrap();
    let command = [
        "haproxy".as_ref(),
        "-db".as_ref(),
        "-f".as_ref(),
        file.as_os_str(),
    ];
    let _haproxy = proxy.spawn(command).unwrap();
    proxy.wait_listening(PORT).unwrap();
    let listener = listen(&server, BEHIND).unwrap();
    for turn in 0..12 {
        let left = Polled::new(client.connect((proxy.v4(), PORT)).unwrap()).unwrap();
        let right = Polled::new(accept(&listener).unwrap()).unwrap();
        thread::scope(|scope| {
            for (from, to) in [(&left, &right), (&right, &left)] {
                scope.spawn(move || {
                    payload::send(from, turn, LENGTH).unwrap();
                    from.0.shutdown(Shutdown::Write).unwrap();
                });
                scope.spawn(move || {
                    // Some are slow.
                    thread::sleep(Duration::from_millis(30 * (turn % 4)));
                    payload::receive_all(to, turn, LENGTH).unwrap();
                });
            }
        });
    }
    // What it read of either and wrote to either.
    let redirected = || bed.agent(&b).directions("redirected").unwrap();
    eventually(
        "what haproxy sends and reads to be redirected",
        PATIENCE,
        || redirected() >= 20,
    )
    .unwrap();
}
