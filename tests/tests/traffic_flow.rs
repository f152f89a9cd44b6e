//! How fast bytes flow: as fast as the slower end, and nobody else's connection is the slower.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{PATIENCE, Pair, PodSpec, Testbed, Way, eventually, on_each_way, payload};
use socket2::SockRef;

const MIB: usize = 1 << 20;

/// What a sender may push ahead of its reader, with small buffers at both apps. Between them are a
/// stream's window and the buffers of the kernel for two more sockets, or four with two agents: it
/// grows a send buffer to 4 MiB, and a receive buffer with what was read in a round trip.
const AHEAD: usize = 12 * MIB;

/// What an agent may grow by while connections are blocked.
const GROWTH: usize = 16 * MIB;

on_each_way!(
    [Direct, Mesh, RandomPorts, LossyWire, ToUnmeshed, FromUnmeshed]
    slow_ends_get_all_bytes_at_their_own_pace,
    a_writer_without_a_reader_is_blocked,
    a_stalled_connection_stops_no_other,
    both_directions_flow_at_once,
);

/// 64 KiB/s for 10 s, a tenth of it each time.
fn paced(mut step: impl FnMut(usize)) {
    let began = Instant::now();
    for turn in 0..100 {
        step(6_553);
        let next = began + Duration::from_millis(100) * (turn + 1);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn slow_ends_get_all_bytes_at_their_own_pace(pair: &Pair) {
    // Linux's own bound of a receive buffer. A machine's may be many times that, and how much of it a
    // socket gets is luck.
    for pod in [&pair.client, &pair.server] {
        let bound = [("ipv4/tcp_rmem", "4096 131072 6291456")];
        pod.netns().sysctls(&bound).unwrap();
    }
    let [from_client, from_server] = [(); 2].map(|()| pair.connection().unwrap());
    let slowly_written = pair.connection().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| a_slow_reader_holds_up_its_writer(&from_client.0, &from_client.1));
        scope.spawn(|| a_slow_reader_holds_up_its_writer(&from_server.1, &from_server.0));
        a_slow_writers_bytes_arrive_at_once(&slowly_written.0, &slowly_written.1);
    });
}

fn a_slow_reader_holds_up_its_writer(writer: &TcpStream, mut reader: &TcpStream) {
    const LENGTH: usize = 24 * MIB;
    SockRef::from(writer)
        .set_send_buffer_size(64 << 10)
        .unwrap();
    SockRef::from(reader)
        .set_recv_buffer_size(64 << 10)
        .unwrap();
    let pushed = AtomicUsize::new(0);
    let counting = Counting(writer, &pushed);
    thread::scope(|scope| {
        scope.spawn(|| payload::send(counting, 1, LENGTH).unwrap());
        let mut received = Vec::new();
        paced(|length| {
            let mut piece = vec![0; length];
            reader.read_exact(&mut piece).unwrap();
            received.extend(piece);
            let ahead = pushed
                .load(Ordering::Relaxed)
                .saturating_sub(received.len());
            assert!(ahead <= AHEAD, "the writer is {ahead} bytes ahead");
        });
        payload::receive(received.chain(reader), 1, LENGTH).unwrap();
    });
}

/// Counts what was written.
struct Counting<'a>(&'a TcpStream, &'a AtomicUsize);

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1.fetch_add(written, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn a_slow_writers_bytes_arrive_at_once(mut writer: &TcpStream, mut reader: &TcpStream) {
    let mut payload = payload::Payload::new(3);
    paced(|length| {
        let piece = payload.next(length);
        writer.write_all(piece).unwrap();
        let (written, mut received) = (Instant::now(), vec![0; length]);
        reader.read_exact(&mut received).unwrap();
        assert!(received == piece);
        // A lost packet is sent again within a second at the latest.
        let late = written.elapsed();
        assert!(late < Duration::from_secs(2), "{late:?} later");
    });
}

fn a_writer_without_a_reader_is_blocked(pair: &Pair) {
    const LENGTH: usize = 64 * MIB;
    let before = pair.agents().map(|agent| agent.resident_memory().unwrap());
    for server_writes in [false, true] {
        let (client, server) = pair.connection().unwrap();
        let (writer, reader) = if server_writes {
            (server, client)
        } else {
            (client, server)
        };
        let pushed = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| payload::send(Counting(&writer, &pushed), 1, LENGTH).unwrap());
            wait_until_blocked(&pushed);
            let ahead = pushed.load(Ordering::Relaxed);
            assert!(ahead < LENGTH / 2, "{ahead} bytes went to nobody");
            for (agent, before) in pair.agents().iter().zip(before) {
                let now = agent.resident_memory().unwrap();
                assert!(now < before + GROWTH, "from {before} to {now} bytes");
            }
            payload::receive(&reader, 1, LENGTH).unwrap();
        });
    }
}

/// Waits until nothing was written for 2 s.
fn wait_until_blocked(pushed: &AtomicUsize) {
    let mut last = (0, Instant::now());
    eventually("a writer to be blocked", PATIENCE, || {
        let now = pushed.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(2)
    })
    .unwrap();
}

/// As istio/ztunnel#1538 has it, where streams that nobody read took the window of all others.
fn a_stalled_connection_stops_no_other(pair: &Pair) {
    let stalled: Vec<_> = (0..4).map(|_| pair.connection().unwrap()).collect();
    let pushed: Vec<_> = stalled
        .iter()
        .flat_map(|(a, b)| [fill(a), fill(b)])
        .collect();
    let (client, server) = pair.connection().unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| payload::send(&client, 1, 4 * MIB).unwrap());
        payload::receive(&server, 1, 4 * MIB).unwrap();
        scope.spawn(|| payload::send(&server, 2, 4 * MIB).unwrap());
        payload::receive(&client, 2, 4 * MIB).unwrap();
    });
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    for ((client, server), pushed) in stalled.iter().zip(pushed.chunks(2)) {
        read_zeroes(server, pushed[0]);
        read_zeroes(client, pushed[1]);
    }
}

#[test]
fn a_tunnel_full_of_stalled_connections_stops_none_beside_them() {
    // Fewer than a tunnel takes, so that all have the same.
    const STALLED: usize = 90;
    let bed = Testbed::new("tunnel").unwrap();
    let bed = bed.with_agent_arguments(["--workers", "1"]);
    let [client, server] = ["client", "server"].map(PodSpec::new);
    let pair = Pair::on(bed, Way::Mesh, client, server).unwrap();
    let stalled: Vec<_> = (0..STALLED)
        .map(|_| {
            let (client, server) = pair.connection().unwrap();
            for end in [&client, &server] {
                SockRef::from(end).set_send_buffer_size(64 << 10).unwrap();
            }
            (client, server)
        })
        .collect();
    let pushed: Vec<_> = thread::scope(|scope| {
        let ends = stalled.iter().flat_map(|(a, b)| [a, b]);
        let filling: Vec<_> = ends.map(|end| scope.spawn(|| fill(end))).collect();
        filling.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let (client, server) = pair.connection().unwrap();
    for (from, to) in [(&client, &server), (&server, &client)] {
        thread::scope(|scope| {
            scope.spawn(|| payload::send(from, 1, 4 * MIB).unwrap());
            payload::receive(to, 1, 4 * MIB).unwrap();
        });
    }
    for ((client, server), pushed) in stalled.iter().zip(pushed.chunks(2)) {
        read_zeroes(server, pushed[0]);
        read_zeroes(client, pushed[1]);
    }
    drop((client, server, stalled));
    pair.nothing_is_held().unwrap();
}

/// Writes zeroes until nothing more is taken for half a second, and returns how many.
fn fill(mut stream: &TcpStream) -> usize {
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let (zeroes, mut pushed) = (vec![0; 64 << 10], 0);
    loop {
        match stream.write(&zeroes) {
            Ok(written) => pushed += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return pushed,
            Err(error) => panic!("after {pushed} bytes: {error}"),
        }
    }
}

fn read_zeroes(mut stream: &TcpStream, length: usize) {
    let mut buffer = vec![1; length];
    stream.read_exact(&mut buffer).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 0));
}

fn both_directions_flow_at_once(pair: &Pair) {
    let length = pair.way.fewer_if_slow(64 * MIB);
    let (client, server) = pair.connection().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| payload::send(&client, 1, length).unwrap());
        scope.spawn(|| payload::send(&server, 2, length).unwrap());
        scope.spawn(|| payload::receive(&server, 1, length).unwrap());
        payload::receive(&client, 2, length).unwrap();
    });
}

const PLAIN_AND_TUNNEL: [Way; 3] = [Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed];

fn with_idle_timeout(way: Way, timeout: &str) -> Pair {
    let bed = Testbed::new("idle").unwrap();
    let bed = bed.with_settings(format!("idleTimeout: {timeout}"));
    Pair::on(bed, way, PodSpec::new("client"), PodSpec::new("server")).unwrap()
}

#[test]
fn a_connection_without_a_byte_is_reset_after_its_idle_timeout() {
    for way in PLAIN_AND_TUNNEL {
        let pair = with_idle_timeout(way, "500ms");
        let (mut client, mut server) = pair.connection().unwrap();
        let began = Instant::now();
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        for end in [&mut client, &mut server] {
            let error = end.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{way:?}");
        }
        let lived = began.elapsed();
        assert!(lived >= Duration::from_millis(500), "{way:?}: {lived:?}");
        assert!(lived < Duration::from_secs(5), "{way:?}: {lived:?}");
        pair.nothing_is_held().unwrap();
    }
}

#[test]
fn a_connection_whose_bytes_move_slowly_outlives_its_idle_timeout() {
    const TIMEOUT: Duration = Duration::from_secs(2);
    let slowly = |mut from: &TcpStream, mut to: &TcpStream| {
        for _ in 0..5 {
            thread::sleep(TIMEOUT / 2);
            from.write_all(b"x").unwrap();
            to.read_exact(&mut [0]).unwrap();
        }
    };
    let pairs = PLAIN_AND_TUNNEL.map(|way| with_idle_timeout(way, "2s"));
    thread::scope(|scope| {
        for pair in &pairs {
            let [up, down] = [(); 2].map(|()| pair.connection().unwrap());
            scope.spawn(move || slowly(&up.0, &up.1));
            scope.spawn(move || slowly(&down.1, &down.0));
        }
    });
}

#[test]
#[ignore = "long: readers pause for 40 s"]
fn a_reader_that_pauses_longer_than_any_timeout_is_not_cut() {
    const LENGTH: usize = 24 * MIB;
    let pairs = PLAIN_AND_TUNNEL.map(|way| Pair::new(way).unwrap());
    thread::scope(|scope| {
        for pair in &pairs {
            for server_writes in [false, true] {
                let (client, server) = pair.connection().unwrap();
                let (writer, reader) = if server_writes {
                    (server, client)
                } else {
                    (client, server)
                };
                writer.set_write_timeout(None).unwrap();
                scope.spawn(move || payload::send(&writer, 1, LENGTH).unwrap());
                scope.spawn(move || {
                    thread::sleep(Duration::from_secs(40));
                    payload::receive(&reader, 1, LENGTH).unwrap();
                });
            }
        }
    });
    for pair in &pairs {
        pair.nothing_is_held().unwrap();
    }
}

#[test]
#[ignore = "long: 2 GiB each way"]
fn two_gibibytes_arrive_as_they_were_sent() {
    for way in [Way::Mesh, Way::ToUnmeshed] {
        let pair = Pair::new(way).unwrap();
        for server_sends in [false, true] {
            let (client, server) = pair.connection().unwrap();
            let (from, to) = if server_sends {
                (&server, &client)
            } else {
                (&client, &server)
            };
            thread::scope(|scope| {
                scope.spawn(|| payload::send(from, 1, 2048 * MIB).unwrap());
                payload::receive(to, 1, 2048 * MIB).unwrap();
            });
        }
        pair.nothing_is_held().unwrap();
    }
}
