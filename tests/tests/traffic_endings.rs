//! How connections end: each end is told of the other's end as it would be without a mesh.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use malla_testbed::{Capture, PATIENCE, Pair, Way, eventually, on_each_way, packet, payload};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

/// What an end says last.
const LAST: &[u8] = b"the last bytes";

/// How late an end is that speaks late: long after everything else has come to rest.
const LATE: Duration = Duration::from_millis(700);

on_each_way!(
    [Direct, Mesh, RandomPorts, LossyWire, ToUnmeshed, FromUnmeshed]
    an_answer_after_a_half_close_arrives_whole,
    a_request_after_the_servers_half_close_arrives_whole,
    a_half_close_leaves_what_flows_the_other_way,
    a_late_half_close_is_passed_on,
    a_reset_by_the_client_is_a_reset_for_the_server,
    a_reset_by_the_server_is_a_reset_for_the_client,
    a_close_with_bytes_unread_is_a_reset_for_the_other,
    a_reset_after_ones_own_half_close_is_passed_on,
    a_reset_unblocks_a_blocked_writer,
    a_reset_reaches_an_end_that_does_not_read,
    what_came_before_a_reset_can_be_read,
    what_a_server_wrote_before_it_ended_is_all_read,
    an_end_that_comes_with_the_last_bytes_goes_on_with_them,
);

fn an_answer_after_a_half_close_arrives_whole(pair: &Pair) {
    let (client, server) = pair.connection().unwrap();
    answer_after_half_close(&client, &server);
}

fn a_request_after_the_servers_half_close_arrives_whole(pair: &Pair) {
    let (client, server) = pair.connection().unwrap();
    answer_after_half_close(&server, &client);
}

/// One asks and closes its direction; the other answers 1 MiB a while later.
fn answer_after_half_close(asks: &TcpStream, answers: &TcpStream) {
    payload::send(asks, 1, 1 << 10).unwrap();
    asks.shutdown(Shutdown::Write).unwrap();
    payload::receive_all(answers, 1, 1 << 10).unwrap();
    thread::sleep(LATE);
    thread::scope(|scope| {
        scope.spawn(|| {
            payload::send(answers, 2, 1 << 20).unwrap();
            answers.shutdown(Shutdown::Write).unwrap();
        });
        payload::receive_all(asks, 2, 1 << 20).unwrap();
    });
}

fn a_half_close_leaves_what_flows_the_other_way(pair: &Pair) {
    for short in [0, 1] {
        let (client, server) = pair.connection().unwrap();
        let lengths = [[1_usize << 10, 4 << 20], [4 << 20, 1 << 10]][short];
        thread::scope(|scope| {
            for (end, length, seed) in [(&client, lengths[0], 1), (&server, lengths[1], 2)] {
                scope.spawn(move || {
                    payload::send(end, seed, length).unwrap();
                    end.shutdown(Shutdown::Write).unwrap();
                });
            }
            scope.spawn(|| payload::receive_all(&server, 1, lengths[0]).unwrap());
            payload::receive_all(&client, 2, lengths[1]).unwrap();
        });
    }
}

fn a_late_half_close_is_passed_on(pair: &Pair) {
    let (mut client, mut server) = pair.connection().unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    thread::sleep(LATE);
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    thread::sleep(LATE);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
}

fn a_reset_by_the_client_is_a_reset_for_the_server(pair: &Pair) {
    let (client, server) = pair.connection().unwrap();
    is_told_of_a_reset(client, &server);
}

fn a_reset_by_the_server_is_a_reset_for_the_client(pair: &Pair) {
    let (client, server) = pair.connection().unwrap();
    is_told_of_a_reset(server, &client);
}

fn is_told_of_a_reset(mut resets: TcpStream, mut is_told: &TcpStream) {
    resets.write_all(b"x").unwrap();
    is_told.read_exact(&mut [0]).unwrap();
    reset(resets);
    let error = is_told.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Closes a connection with a reset.
fn reset(stream: TcpStream) {
    let linger = Some(Duration::ZERO);
    SockRef::from(&stream).set_linger(linger).unwrap();
    drop(stream);
}

fn a_close_with_bytes_unread_is_a_reset_for_the_other(pair: &Pair) {
    for server_closes in [false, true] {
        let (client, server) = pair.connection().unwrap();
        let (closes, mut is_told) = if server_closes {
            (server, client)
        } else {
            (client, server)
        };
        is_told.write_all(b"never read").unwrap();
        wait_until(&closes, PollFlags::POLLIN);
        drop(closes);
        let error = is_told.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

fn a_reset_after_ones_own_half_close_is_passed_on(pair: &Pair) {
    for server_resets in [false, true] {
        let (client, server) = pair.connection().unwrap();
        let (resets, mut is_told) = if server_resets {
            (server, client)
        } else {
            (client, server)
        };
        resets.shutdown(Shutdown::Write).unwrap();
        assert_eq!(is_told.read(&mut [0]).unwrap(), 0);
        reset(resets);
        wait_until(&is_told, PollFlags::POLLERR);
        // The other had ended its direction already, so writing is what fails.
        let error = is_told.write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }
}

fn a_reset_unblocks_a_blocked_writer(pair: &Pair) {
    for server_resets in [false, true] {
        let (client, server) = pair.connection().unwrap();
        let (resets, mut writes) = if server_resets {
            (server, client)
        } else {
            (client, server)
        };
        let error = thread::scope(|scope| {
            let blocked = scope.spawn(|| {
                let block = vec![0; 1 << 20];
                (0..256).find_map(|_| writes.write_all(&block).err())
            });
            thread::sleep(LATE);
            reset(resets);
            blocked.join().unwrap().unwrap()
        });
        assert!(
            matches!(
                error.kind(),
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
            ),
            "{error}"
        );
    }
}

fn a_reset_reaches_an_end_that_does_not_read(pair: &Pair) {
    for server_resets in [false, true] {
        let (client, server) = pair.connection().unwrap();
        let (resets, is_told) = if server_resets {
            (server, client)
        } else {
            (client, server)
        };
        fill(&resets);
        reset(resets);
        wait_until(&is_told, PollFlags::POLLERR);
    }
}

/// Writes until every buffer on the way is full.
fn fill(mut stream: &TcpStream) {
    stream.set_write_timeout(Some(LATE)).unwrap();
    let block = vec![0; 1 << 20];
    let full = (0..1024).find_map(|_| stream.write(&block).err()).unwrap();
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
}

/// Both ends of a new connection.
fn connection(pair: &Pair, server_first: bool) -> (TcpStream, TcpStream) {
    let (client, server) = pair.connection().unwrap();
    if server_first {
        (server, client)
    } else {
        (client, server)
    }
}

fn what_came_before_a_reset_can_be_read(pair: &Pair) {
    // What a kernel sends before its peer's first acknowledgement.
    const LENGTH: usize = 8 << 10;
    for server_resets in [false, true] {
        for _ in 0..20 {
            let (resets, mut reads) = connection(pair, server_resets);
            payload::send(&resets, 1, LENGTH).unwrap();
            reset(resets);
            wait_until(&reads, PollFlags::POLLERR);
            let mut received = vec![0; LENGTH];
            reads.read_exact(&mut received).unwrap();
            let error = reads.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
}

/// As istio/ztunnel#1887 has it, where the client met a reset in the place of the end.
fn what_a_server_wrote_before_it_ended_is_all_read(pair: &Pair) {
    const SERVER: &str = "import socket\n\
        listener = socket.create_server(('', 7000))\n\
        print('ready', flush=True)\n\
        connection, _ = listener.accept()\n\
        connection.sendall(bytes(range(256)) * 256)\n\
        connection.close()\n";
    let server = pair.server.command(["/usr/bin/python3", "-c", SERVER]);
    let server = server.spawn().unwrap();
    server.wait_for_log("ready", PATIENCE).unwrap();
    let captures = [&pair.client, &pair.server]
        .map(|pod| ["lo", "eth0"].map(|name| Capture::start(pod.netns(), name).unwrap()));

    let mut client = pair.dial((pair.server.v4(), 7000).into()).unwrap();
    assert!(server.wait(PATIENCE).unwrap().success());
    thread::sleep(LATE);
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    let sent: Vec<u8> = (0..=255).cycle().take(64 << 10).collect();
    assert!(received == sent, "{} bytes", received.len());
    drop(client);

    pair.nothing_is_held().unwrap();
    let resets = captures.as_flattened().iter().flat_map(|capture| {
        let packets = capture.tcp().into_iter();
        packets.filter(|packet| packet.flags & packet::RST != 0)
    });
    let resets: Vec<_> = resets.collect();
    assert!(resets.is_empty(), "{resets:?}");
}

/// A client that closes once it has its answer leaves the port that it had in `TIME_WAIT` for a minute,
/// unless it has been told by then that the server has closed first.
fn an_end_that_comes_with_the_last_bytes_goes_on_with_them(pair: &Pair) {
    for server_ends in [false, true] {
        let pod = if server_ends {
            &pair.client
        } else {
            &pair.server
        };
        let captures = ["lo", "eth0"].map(|name| Capture::start(pod.netns(), name).unwrap());
        for _ in 0..20 {
            let (ends, mut reads) = connection(pair, server_ends);
            // While a connection is being opened, an agent may look just between the bytes and the end.
            (&ends).write_all(b"?").unwrap();
            reads.read_exact(&mut [0]).unwrap();
            reads.write_all(b"!").unwrap();
            (&ends).read_exact(&mut [0]).unwrap();
            let reader = reads.local_addr().unwrap().port();
            SockRef::from(&ends)
                .send_with_flags(LAST, libc::MSG_MORE)
                .unwrap();
            ends.shutdown(Shutdown::Write).unwrap();
            let mut received = Vec::new();
            reads.read_to_end(&mut received).unwrap();
            assert_eq!(received, LAST);
            let flags = || {
                let packets = captures.iter().flat_map(Capture::tcp);
                let mut last =
                    packets.filter(|seen| seen.to.port() == reader && seen.payload == LAST);
                last.next().map(|seen| seen.flags)
            };
            eventually("the packet with the last bytes", PATIENCE, || {
                flags().is_some()
            })
            .unwrap();
            assert!(
                flags().unwrap() & packet::FIN != 0,
                "server ends: {server_ends}"
            );
            reset(ends);
        }
    }
}

/// By PINGs in a tunnel and by keepalive elsewhere: each takes 30 to 40 s to be sure.
#[test]
#[ignore = "long: a peer is believed alive for 40 s"]
fn the_ends_of_a_connection_are_reset_once_the_other_node_has_vanished() {
    let ways = [Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed];
    let pairs = ways.map(|way| Pair::new(way).unwrap());
    thread::scope(|scope| {
        for pair in &pairs {
            scope.spawn(|| {
                let (client, server) = pair.connection().unwrap();
                let wire = pair.a.wire_to(&pair.b);
                let down = format!("link set {wire} down\n");
                pair.a.netns().ip(&down).unwrap();
                // An end without an agent of its own is told by nobody.
                let told = match pair.way {
                    Way::ToUnmeshed => vec![client],
                    Way::FromUnmeshed => vec![server],
                    _ => vec![client, server],
                };
                for mut end in told {
                    end.set_read_timeout(Some(3 * PATIENCE)).unwrap();
                    let error = end.read(&mut [0]).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{:?}", pair.way);
                }
            });
        }
    });
}

/// Waits until poll(2) says one of `events` of a socket.
fn wait_until(stream: &TcpStream, events: PollFlags) {
    eventually(&format!("{events:?}"), PATIENCE, || {
        let mut descriptor = [PollFd::new(stream.as_fd(), events)];
        poll(&mut descriptor, PollTimeout::ZERO).unwrap();
        let seen = descriptor[0].revents().unwrap_or(PollFlags::empty());
        seen.intersects(events)
    })
    .unwrap();
}
