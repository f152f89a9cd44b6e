//! The programs tried on two sockets of the agent's own: whether what is redirected is what was
//! sent, in order, bounded and ended as with TCP, and what an app could notice of it.

mod joins;

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::{AsRawFd, RawFd},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{MapData, SkStorage};
use malla_common::acceleration::{Event, Tag};
use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{ledger::Entry, steer::diag};

use super::{
    programs::{AccelerationPrograms, LoadError},
    verdict::{Verdict, limits},
};

const MIB: usize = 1 << 20;
/// What is sent each way.
const BULK: usize = 16 * MIB;
/// What a reader that stalls may have waiting for it: what may be redirected, and TCP's buffers.
const MOST_QUEUED: usize = 2 * MIB;
/// TCP's buffers meanwhile, which the kernel doubles. Else they grow to whatever the machine allows.
const TCP_BUFFER: usize = 128 * 1024;
const PIECE: usize = 32 * 1024;
const PERIOD: usize = 61;
/// Of the order of the first messages.
const ROUNDS: usize = 20;
/// After which a read or write that should go on has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tries everything. What doesn't work is the verdict, never a panic or a hang.
pub(super) fn run(programs: &mut AccelerationPrograms, own_cgroup: &Path) -> Verdict {
    let tried = Bench::new(programs, own_cgroup)
        .map_err(|error| error.to_string())
        .and_then(Bench::verdict);
    programs.detach();
    // Users want to know of their own connections.
    let forgotten = programs.reset_events().map_err(|error| error.to_string());
    match tried.and_then(|verdict| forgotten.map(|()| verdict)) {
        Ok(verdict) => verdict,
        Err(failure) => Verdict::failed(failure),
    }
}

/// Where pairs of sockets are made that the programs take for an app's and the agent's.
struct Bench<'a> {
    programs: &'a AccelerationPrograms,
    listener: TcpListener,
    tags: SkStorage<MapData, u32>,
    _entry: Entry,
}

/// An app's end and the agent's.
type Ends = (TcpStream, TcpStream);

/// What follows an app's SYN.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Ack,
    /// Its first message, with the ACK that was delayed for it: until then the agent's end isn't
    /// there. Without a message the kernel sends the ACK after 200 ms.
    Data,
}

type Tried<T = ()> = Result<T, String>;

type Check<'a> = fn(&mut Bench<'a>) -> Tried;

impl<'a> Bench<'a> {
    fn new(programs: &'a mut AccelerationPrograms, own_cgroup: &Path) -> Result<Self, LoadError> {
        programs.attach(own_cgroup)?;
        let (mut tags, entry) = programs.tags()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        tags.insert(&listener, Tag::Both as u32, 0)?;
        Ok(Self {
            programs,
            listener,
            tags,
            _entry: entry,
        })
    }

    /// What an app may notice, or what fails.
    fn verdict(mut self) -> Tried<Verdict> {
        let checks: [(&str, Check<'a>); 6] = [
            ("order", Self::order),
            ("bytes", Self::bulk),
            ("bounds", Self::bounds),
            ("ends", Self::ends),
            ("credit", Self::credit),
            ("joins", Self::joins),
        ];
        for (what, check) in checks {
            let (before, _) = self.counts();
            check(&mut self).map_err(|why| format!("{what}: {why}"))?;
            // What TCP alone has carried proves nothing.
            if self.counts().0 == before {
                return Err(format!("{what}: nothing is redirected"));
            }
        }
        let mut found = Vec::new();
        let properties = [
            (limits::BLOCKING_READ, self.blocking_read()),
            (limits::FIONREAD, self.tells_length()),
            (limits::SPLICE, self.splices()),
        ];
        for (limit, is_as_tcp) in properties {
            if !is_as_tcp.map_err(|why| format!("{limit}: {why}"))? {
                found.push(limit.to_owned());
            }
        }
        Ok(Verdict {
            failure: None,
            limits: found,
            tells_memory: self.tells_memory()?,
        })
    }

    /// How many directions were redirected, and how many went by TCP or over to it.
    fn counts(&self) -> (u64, u64) {
        let events = self.programs.events().into_iter();
        events.fold((0, 0), |(redirected, by_tcp), (event, count)| match event {
            Event::Redirected => (redirected + count, by_tcp),
            Event::NoPeer | Event::NoCredit | Event::PeerGone => (redirected, by_tcp + count),
            Event::Joined => (redirected, by_tcp),
        })
    }

    fn pair(&mut self) -> Tried<Ends> {
        let app = self.dial(First::Ack)?;
        Ok((app, self.accept()?))
    }

    /// The app's end.
    fn dial(&mut self, first: First) -> Tried<TcpStream> {
        let mut make = || -> io::Result<TcpStream> {
            let app = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            let tagged = self.tags.insert(&app, Tag::App as u32, 0);
            tagged.map_err(io::Error::other)?;
            app.set_tcp_nodelay(true)?;
            if first == First::Data {
                SockRef::from(&app).set_tcp_quickack(false)?;
            }
            app.connect(&self.listener.local_addr()?.into())?;
            app.set_nonblocking(true)?;
            Ok(app.into())
        };
        make().map_err(|error| format!("no connection: {error}"))
    }

    /// The agent's end.
    fn accept(&self) -> Tried<TcpStream> {
        let take = || -> io::Result<TcpStream> {
            let (agent, _) = self.listener.accept()?;
            agent.set_nodelay(true)?;
            agent.set_nonblocking(true)?;
            Ok(agent)
        };
        take().map_err(|error| format!("no connection: {error}"))
    }

    /// Messages that are sent at once arrive in their order, whether the agent's end is there at
    /// the first of them or comes to be by it.
    fn order(&mut self) -> Tried {
        for _ in 0..ROUNDS {
            for first in [First::Ack, First::Data] {
                let app = self.dial(first)?;
                for message in [b"1111", b"2222", b"3333"] {
                    send(&app, message)?;
                }
                let mut received = [0; 12];
                receive(&self.accept()?, &mut received)?;
                if received != *b"111122223333" {
                    return Err("messages overtake each other".to_owned());
                }
            }
        }
        Ok(())
    }

    /// Bulk data is what was sent, while its reader stalls now and then.
    fn bulk(&mut self) -> Tried {
        let (app, agent) = self.pair()?;
        for (from, to) in [(&app, &agent), (&agent, &app)] {
            thread::scope(|scope| {
                let sending = scope.spawn(|| {
                    let pattern = pattern();
                    (0..BULK / PIECE).try_for_each(|turn| send(from, piece(&pattern, turn)))
                });
                let received = check_bulk(to);
                let sent: Tried = sending
                    .join()
                    .unwrap_or_else(|_| Err("the writer panicked".to_owned()));
                match (received, sent) {
                    (Ok(()), Ok(())) => Ok(()),
                    (received, sent) => Err(format!("read {received:?}, written {sent:?}")),
                }
            })?;
        }
        Ok(())
    }

    /// A writer whose reader stalls is stopped.
    fn bounds(&mut self) -> Tried {
        let (app, agent) = self.pair()?;
        let piece = vec![1; 64 * 1024];
        for end in [&app, &agent] {
            let (sends, receives) = (
                SockRef::from(end).set_send_buffer_size(TCP_BUFFER),
                SockRef::from(end).set_recv_buffer_size(TCP_BUFFER),
            );
            sends.and(receives).map_err(|error| error.to_string())?;
        }
        for mut from in [&app, &agent] {
            let (mut queued, mut refused) = (0, 0);
            while queued <= MOST_QUEUED && refused < 3 {
                match from.write(&piece) {
                    Ok(written) => queued += written,
                    Err(error) if is_wait(&error) => {
                        refused += 1;
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => return Err(format!("the writer failed: {error}")),
                }
            }
            if queued > MOST_QUEUED {
                return Err(format!("a stalled reader has {queued} bytes waiting"));
            }
        }
        Ok(())
    }

    /// Both sides of a half-close are heard to their end, and a reset is a reset.
    fn ends(&mut self) -> Tried {
        for _ in 0..ROUNDS {
            let (app, agent) = self.pair()?;
            for (from, to) in [(&app, &agent), (&agent, &app)] {
                send(from, b"last words")?;
                let shut = from.shutdown(Shutdown::Write);
                shut.map_err(|error| error.to_string())?;
                let mut received = [0; 10];
                receive(to, &mut received)?;
                match patiently(|| { to }.read(&mut [0])) {
                    Ok(0) => {}
                    other => return Err(format!("an end is read as {other:?}")),
                }
            }
        }
        for agent_resets in [false, true] {
            let (app, agent) = self.pair()?;
            let (resets, hears) = if agent_resets {
                (agent, app)
            } else {
                (app, agent)
            };
            send(&resets, b"read first")?;
            reset(resets).map_err(|error| error.to_string())?;
            receive(&hears, &mut [0; 10])?;
            match patiently(|| { &hears }.read(&mut [0])) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                other => return Err(format!("a reset is read as {other:?}")),
            }
        }
        Ok(())
    }

    /// What is read may be sent again: messages that are answered stay redirected.
    fn credit(&mut self) -> Tried {
        let (app, agent) = self.pair()?;
        let (_, before) = self.counts();
        let mut message = vec![7; 16 * 1024];
        for _ in 0..64 {
            for (from, to) in [(&app, &agent), (&agent, &app)] {
                send(from, &message)?;
                receive(to, &mut message)?;
            }
        }
        if self.counts().1 > before {
            return Err("messages that are read in turns don't stay redirected".to_owned());
        }
        Ok(())
    }

    /// Whether a blocking read that a reset wakes tells of it.
    fn blocking_read(&mut self) -> Tried<bool> {
        for _ in 0..3 {
            let (app, agent) = self.pair()?;
            let blocks = app.set_nonblocking(false);
            blocks.map_err(|error| error.to_string())?;
            let (tell, told) = mpsc::channel();
            let reading = thread::spawn(move || {
                let _ = tell.send(nix::unistd::gettid());
                { &app }.read(&mut [0])
            });
            if let Ok(thread) = told.recv() {
                wait_until_asleep(thread.as_raw());
            }
            reset(agent).map_err(|error| error.to_string())?;
            let read = reading.join().map_err(|_| "the reader panicked")?;
            if !read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the memory of what was redirected counts as the socket's until it is read.
    fn tells_memory(&mut self) -> Tried<bool> {
        let (app, agent) = self.pair()?;
        let ask = || -> io::Result<Option<u32>> {
            let question = diag::netlink()?;
            let (local, remote) = (app.local_addr()?, app.peer_addr()?);
            Ok(diag::memory_to_read(&question, local, remote))
        };
        let ask = || ask().map_err(|error| format!("no answer about a socket: {error}"));
        let (before, _) = self.counts();
        let mut bytes = [1; 5000];
        send(&agent, &bytes)?;
        let waiting = ask()?;
        if self.counts().0 == before {
            return Err("memory: nothing is redirected".to_owned());
        }
        receive(&app, &mut bytes)?;
        Ok(waiting >= Some(5000) && ask()? == Some(0))
    }

    /// Whether FIONREAD tells of what was redirected.
    fn tells_length(&mut self) -> Tried<bool> {
        let (app, agent) = self.pair()?;
        send(&agent, &[1; 5000])?;
        let mut length: libc::c_int = 0;
        // SAFETY: the kernel writes one number where the pointer says.
        let answer = unsafe { libc::ioctl(app.as_raw_fd(), libc::FIONREAD, &raw mut length) };
        Ok(answer == 0 && length == 5000)
    }

    /// Whether splice(2) moves what was redirected, or is refused as by a socket that can't be spliced
    /// from, so that who splices reads.
    fn splices(&mut self) -> Tried<bool> {
        let (app, agent) = self.pair()?;
        send(&agent, &[1; 5000])?;
        let (_reader, writer) = io::pipe().map_err(|error| error.to_string())?;
        let none = std::ptr::null_mut();
        let (from, to): (RawFd, RawFd) = (app.as_raw_fd(), writer.as_raw_fd());
        // SAFETY: a plain call on two open descriptors, without offsets.
        let moved = unsafe { libc::splice(from, none, to, none, 5000, libc::SPLICE_F_NONBLOCK) };
        let is_refused = moved < 0 && Errno::last() == Errno::EINVAL;
        Ok(moved == 5000 || is_refused)
    }
}

fn check_bulk(to: &TcpStream) -> Tried {
    let pattern = pattern();
    let mut buffer = vec![0; PIECE];
    for turn in 0..BULK / PIECE {
        receive(to, &mut buffer)?;
        if buffer != piece(&pattern, turn) {
            return Err("other bytes than were sent".to_owned());
        }
        if turn.is_multiple_of(64) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// What pieces are cut from: no two of [`PERIOD`] in a row are the same.
fn pattern() -> Vec<u8> {
    let byte = |place: u32| place.wrapping_mul(2_654_435_761).to_be_bytes()[0];
    (0..).map(byte).take(PIECE + PERIOD).collect()
}

fn piece(pattern: &[u8], turn: usize) -> &[u8] {
    &pattern[turn % PERIOD..][..PIECE]
}

fn is_wait(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}

/// Tries until it needn't wait.
fn patiently<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if !is_wait(&error) => return Err(error),
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_micros(50)),
            Err(_) => return Err(ErrorKind::TimedOut.into()),
            done => return done,
        }
    }
}

/// Ends a connection without a FIN.
fn reset(socket: TcpStream) -> io::Result<()> {
    let without_fin = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    drop(socket);
    without_fin
}

fn send(mut to: &TcpStream, mut bytes: &[u8]) -> Tried {
    while !bytes.is_empty() {
        let written = patiently(|| to.write(bytes)).map_err(|error| format!("sending: {error}"))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

fn receive(mut from: &TcpStream, bytes: &mut [u8]) -> Tried {
    let mut filled = 0;
    while filled < bytes.len() {
        match patiently(|| from.read(&mut bytes[filled..])) {
            Ok(0) => return Err("an early end".to_owned()),
            Ok(length) => filled += length,
            Err(error) => return Err(format!("receiving: {error}")),
        }
    }
    Ok(())
}

/// Waits, not for ever, until a thread of this process waits.
fn wait_until_asleep(thread: libc::pid_t) {
    let path = format!("/proc/self/task/{thread}/stat");
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let stat = std::fs::read_to_string(&path).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
        if state.is_some_and(|rest| rest.starts_with('S')) {
            // It may have slept for another reason on its way.
            thread::sleep(Duration::from_millis(2));
            return;
        }
        thread::sleep(Duration::from_micros(200));
    }
}
