//! Socket acceleration where it ends: readers that stall or go, what a direction does when its
//! credit is used up, and what an accelerated socket refuses or doesn't do.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    ptr,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    PATIENCE, Pair, PodSpec, Polled, Testbed, accept, eventually, listen, payload, set_option,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use socket2::SockRef;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// A send buffer, which the kernel doubles, and doesn't grow then.
const SMALL: usize = 64 * KIB;

/// Sends, and drops `tells` when it finds no room for the first time.
struct Telling<'a> {
    to: &'a Polled,
    tells: Option<Sender<()>>,
}

impl Write for Telling<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.to.0).write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.tells = None;
                    self.to.wait(PollFlags::POLLOUT)?;
                }
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads so many bytes, and the rest when the sender of `told` is gone.
struct Stalling<'a> {
    from: &'a Polled,
    before: usize,
    stall: Stall,
    told: Receiver<()>,
}

impl Read for Stalling<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.before == 0 {
            // Nothing is ever sent, so it fails when the sender goes.
            let _ = self.told.recv();
            if self.stall == Stall::Ended {
                self.from
                    .wait(PollFlags::from_bits_retain(libc::POLLRDHUP))?;
            }
            self.before = usize::MAX;
        }
        let most = bytes.len().min(self.before);
        let read = { self.from }.read(&mut bytes[..most])?;
        self.before -= read;
        Ok(read)
    }
}

/// Waits for room for longer than others do.
struct Patient<'a> {
    to: &'a Polled,
    until: Instant,
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match { self.to }.write(bytes) {
                Err(error)
                    if error.kind() == ErrorKind::TimedOut && Instant::now() < self.until => {}
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a reader waits for when it stalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    /// Its writer finds no room.
    Full,
    /// Its writer's end has come.
    Ended,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy)]
struct Transfer {
    seed: u64,
    length: usize,
    /// What is read before the stall.
    before: usize,
    stall: Stall,
}

impl Transfer {
    /// All of it, to its end.
    fn run(self, from: &Polled, to: &Polled) {
        let (tells, told) = channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let (when_full, when_ended) = match self.stall {
                    Stall::Full => (Some(tells), None),
                    Stall::Ended => (None, Some(tells)),
                };
                let telling = Telling {
                    to: from,
                    tells: when_full,
                };
                payload::send(telling, self.seed, self.length).unwrap();
                from.0.shutdown(Shutdown::Write).unwrap();
                drop(when_ended);
            });
            let stalling = Stalling {
                from: to,
                before: self.before,
                stall: self.stall,
                told,
            };
            payload::receive_all(stalling, self.seed, self.length).unwrap();
        });
    }
}

#[test]
fn an_app_that_closes_with_bytes_unread_resets_its_peer() {
    let pair = Pair::accelerated().unwrap();
    // The kernel keeps a closed socket as what it was for what this is longer than a minute.
    let long = [("ipv4/tcp_fin_timeout", "120")];
    pair.client.netns().sysctls(&long).unwrap();
    for _ in 0..3 {
        let (client, server) = pair.polled_connection().unwrap();
        let piece = vec![1; SMALL];
        // Full for half a second.
        let is_full = || {
            let mut polled = [PollFd::new(server.0.as_fd(), PollFlags::POLLOUT)];
            poll(&mut polled, PollTimeout::from(500_u16)).unwrap() == 0
        };
        let mut pushed = 0;
        while !is_full() {
            match { &server.0 }.write(&piece) {
                Ok(written) => pushed += written,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        assert!(pushed > MIB, "{pushed}");
        drop(client);
        let error = loop {
            if let Err(error) = { &server }.write_all(&piece) {
                break error;
            }
        };
        let is_reset = matches!(
            error.kind(),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
        );
        assert!(is_reset, "{error}");
    }
    pair.wait_for_redirected(3).unwrap();
    pair.nothing_is_held().unwrap();
}

#[test]
fn a_thousand_demotions_amid_transfers_lose_and_change_nothing() {
    const CONNECTIONS: u64 = 500;
    const AT_ONCE: usize = 4;
    let mut bed = Testbed::new("demoted").unwrap();
    // Through one agent's memory less is under way than through a tunnel.
    let node = bed.node("a").unwrap();
    let [client, server] = ["client", "server"].map(|name| {
        let spec = PodSpec::new(name).settings("accelerate: full");
        bed.pod(&node, spec).unwrap()
    });
    bed.start_agents().unwrap();
    bed.agent(&node).wait_for_acceleration("full").unwrap();
    let connect = |listener: &TcpListener| {
        let to = SocketAddr::new(server.v4().into(), listener.local_addr().unwrap().port());
        let dialled = client.connect(to).unwrap();
        [dialled, accept(listener).unwrap()].map(|end| {
            SockRef::from(&end).set_send_buffer_size(SMALL).unwrap();
            Polled::new(end).unwrap()
        })
    };
    let transfer = |seed: u64| {
        let scattered = |factor: u64, below: usize| {
            let scattered = seed * factor % below as u64;
            usize::try_from(scattered).unwrap()
        };
        let before = scattered(7_368_787, 400 * KIB);
        Transfer {
            seed,
            // More than the queues of both apps and of the agent hold, so that the writer finds no
            // room, and some more.
            length: before + 5 * MIB / 4 + scattered(15_485_863, 256 * KIB),
            before,
            stall: Stall::Full,
        }
    };
    thread::scope(|scope| {
        for first in (0..CONNECTIONS).take(AT_ONCE) {
            let (connect, transfer, server) = (&connect, &transfer, &server);
            scope.spawn(move || {
                let listener = listen(server, 0).unwrap();
                for turn in (first..CONNECTIONS).step_by(AT_ONCE) {
                    let [a, b] = connect(&listener);
                    thread::scope(|scope| {
                        scope.spawn(|| transfer(2 * turn).run(&a, &b));
                        transfer(2 * turn + 1).run(&b, &a);
                    });
                }
            });
        }
    });
    // Each app's of each connection, which an agent counts now and then.
    let demoted = || bed.agent(&node).directions("no_credit").unwrap();
    eventually("a thousand demotions", PATIENCE, || demoted() >= 990).unwrap();
}

#[test]
fn a_reader_may_stall_at_every_point_of_a_connection() {
    const MANY: usize = 16 * MIB;
    /// What is redirected at most, so that an end comes while nothing was read.
    const FEW: usize = 200 * KIB;
    let pair = Pair::accelerated().unwrap();
    let points = [
        // Before its first byte, after the first message, and amid what is much.
        (0, MANY, 0, Stall::Full),
        (1, MANY, 0, Stall::Full),
        (1, MANY, MIB + 123, Stall::Full),
        // After the end has come: all of it is unread, or some.
        (0, FEW, 0, Stall::Ended),
        (0, FEW, FEW / 3, Stall::Ended),
        (1, 1, 0, Stall::Ended),
        (1, FEW, 0, Stall::Ended),
    ];
    for (messages, length, before, stall) in points {
        for server_sends in [false, true] {
            let (client, server) = pair.polled_connection().unwrap();
            for message in 0..messages {
                payload::send(&client, message, 100).unwrap();
                payload::receive(&server, message, 100).unwrap();
                payload::send(&server, message, 100).unwrap();
                payload::receive(&client, message, 100).unwrap();
            }
            let (from, to) = if server_sends {
                (&server, &client)
            } else {
                (&client, &server)
            };
            SockRef::from(&from.0).set_send_buffer_size(SMALL).unwrap();
            let transfer = Transfer {
                seed: length as u64,
                length,
                before,
                stall,
            };
            transfer.run(from, to);
            // The other direction is as it was.
            payload::send(to, 5, 100).unwrap();
            to.0.shutdown(Shutdown::Write).unwrap();
            payload::receive_all(from, 5, 100).unwrap();
        }
    }
    // Of those that found no room: what the client sent, and what the server did.
    let demoted = || pair.directions("no_credit").unwrap();
    eventually("six demotions", PATIENCE, || demoted() >= 6).unwrap();
    pair.nothing_is_held().unwrap();
}

#[test]
#[ignore = "long: readers stall for a minute"]
fn two_hundred_writers_wait_for_readers_that_stall_for_a_minute() {
    const WRITERS: u64 = 200;
    const LENGTH: usize = 8 * MIB;
    /// What may be on its way of one connection, in both agents.
    const UNDER_WAY: usize = MIB;
    const STALL: Duration = Duration::from_mins(1);
    let pair = Pair::accelerated().unwrap();
    let before = pair.agents().map(|agent| agent.resident_memory().unwrap());
    let connections: Vec<_> = (0..WRITERS)
        .map(|_| pair.polled_connection().unwrap())
        .collect();
    thread::scope(|scope| {
        for (seed, (client, server)) in (0..).zip(&connections) {
            let (from, to) = if seed % 2 == 0 {
                (client, server)
            } else {
                (server, client)
            };
            scope.spawn(move || {
                let patient = Patient {
                    to: from,
                    until: Instant::now() + STALL + PATIENCE,
                };
                payload::send(patient, seed, LENGTH).unwrap();
                from.0.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                thread::sleep(STALL);
                payload::receive_all(to, seed, LENGTH).unwrap();
            });
        }
        thread::sleep(STALL / 2);
        for (agent, before) in pair.agents().into_iter().zip(before) {
            let grown = agent.resident_memory().unwrap().saturating_sub(before);
            let most = usize::try_from(WRITERS).unwrap() * UNDER_WAY;
            assert!(grown < most, "an agent has grown by {grown} bytes");
        }
        // Those that don't stall go on.
        let (client, server) = pair.polled_connection().unwrap();
        for (from, to) in [(&client, &server), (&server, &client)] {
            thread::scope(|scope| {
                scope.spawn(|| payload::send(from, 1, LENGTH).unwrap());
                payload::receive(to, 1, LENGTH).unwrap();
            });
        }
    });
    drop(connections);
    pair.nothing_is_held().unwrap();
}

#[test]
fn kernel_tls_and_zero_copy_are_refused_to_accelerated_sockets_alone() {
    let (tls, zero_copy) = (
        (libc::SOL_TCP, libc::TCP_ULP),
        (libc::SOL_SOCKET, libc::SO_ZEROCOPY),
    );
    let on = 1_i32.to_ne_bytes();
    let set = |socket: &TcpStream, option, value: &[u8]| {
        set_option(socket, option, value).map_err(|error| Errno::try_from(error).unwrap())
    };
    let pair = Pair::accelerated().unwrap();
    let (client, server) = pair.polled_connection().unwrap();
    for turn in 0..3 {
        for (from, to) in [(&client, &server), (&server, &client)] {
            assert_eq!(set(&from.0, tls, b"tls"), Err(Errno::EPERM));
            assert_eq!(set(&from.0, zero_copy, &on), Err(Errno::EPERM));
            payload::send(from, turn, MIB / 4).unwrap();
            payload::receive(to, turn, MIB / 4).unwrap();
        }
    }
    pair.wait_for_redirected(2).unwrap();
    // Of the same pod, past its agent.
    let (plain, _served) = pair.client.enter(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let plain = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (plain, listener.accept().unwrap())
    });
    assert_eq!(set(&plain, zero_copy, &on), Ok(()));
    // As the kernel has it, which may have none.
    let answer = set(&plain, tls, b"tls");
    assert!(matches!(answer, Ok(()) | Err(Errno::ENOENT)), "{answer:?}");
}

/// Moves bytes between a pipe and a socket or file, as far as that goes without waiting.
fn splice(from: &impl AsRawFd, to: &impl AsRawFd, most: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: a plain call on two open descriptors, without offsets.
    let moved = unsafe { libc::splice(from, ptr::null_mut(), to, ptr::null_mut(), most, flags) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Moves bytes of a file, from where it was left, into a socket.
fn send_file(from: &File, to: &Polled, most: usize) -> io::Result<usize> {
    let (from, to) = (from.as_raw_fd(), to.0.as_raw_fd());
    // SAFETY: as above.
    let moved = unsafe { libc::sendfile(to, from, ptr::null_mut(), most) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[test]
fn a_splice_from_an_accelerated_socket_is_refused_or_finds_nothing_and_a_read_does() {
    let pair = Pair::accelerated().unwrap();
    let expected = if pair.a.refuses_splices().unwrap() {
        ErrorKind::InvalidInput
    } else {
        ErrorKind::WouldBlock
    };
    for turn in 0..10 {
        let (client, server) = pair.polled_connection().unwrap();
        for (from, to) in [(&client, &server), (&server, &client)] {
            payload::send(from, turn, 5000).unwrap();
            to.wait(PollFlags::POLLIN).unwrap();
            let (_reader, writer) = io::pipe().unwrap();
            let error = splice(&to.0, &writer, 5000).unwrap_err();
            assert_eq!(error.kind(), expected);
            payload::receive(to, turn, 5000).unwrap();
        }
    }
    // Of the same pod, past its agent: as without malla.
    let mut plain = pair.client.enter(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let plain = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        payload::send(listener.accept().unwrap().0, 1, 5000).unwrap();
        plain
    });
    let (mut reader, writer) = io::pipe().unwrap();
    assert_eq!(plain.peek(&mut [0]).unwrap(), 1);
    let spliced = splice(&plain, &writer, 5000).unwrap();
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), spliced);
    plain.read_to_end(&mut bytes).unwrap();
    payload::receive_all(&bytes[..], 1, 5000).unwrap();
    pair.nothing_is_held().unwrap();
}

#[test]
fn what_is_spliced_and_sent_of_a_file_into_an_accelerated_socket_is_the_file() {
    const LENGTH: usize = 8 * MIB + 12_345;
    let pair = Pair::accelerated().unwrap();
    let path = pair.bed.folder().join("file");
    payload::send(File::create(&path).unwrap(), 9, LENGTH).unwrap();
    let retried = |socket: &Polled, mut step: Box<dyn FnMut() -> io::Result<usize> + '_>| loop {
        match step() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                socket.wait(PollFlags::POLLOUT).unwrap();
            }
            done => break done.unwrap(),
        }
    };
    for spliced in [true, false] {
        let (client, server) = pair.polled_connection().unwrap();
        for (from, to) in [(&client, &server), (&server, &client)] {
            let file = File::open(&path).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (reader, writer) = io::pipe().unwrap();
                    let mut left = LENGTH;
                    while left > 0 {
                        if !spliced {
                            left -= retried(from, Box::new(|| send_file(&file, from, left)));
                            continue;
                        }
                        let mut piped = splice(&file, &writer, left).unwrap();
                        left -= piped;
                        while piped > 0 {
                            piped -= retried(from, Box::new(|| splice(&reader, &from.0, piped)));
                        }
                    }
                });
                payload::receive(to, 9, LENGTH).unwrap();
            });
        }
    }
    pair.wait_for_redirected(4).unwrap();
    pair.nothing_is_held().unwrap();
}
