//! The programs tried on two sockets of the agent's own: whether what is redirected is what was
//! sent, in order, bounded and ended as with TCP, and what an app could notice of it.

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
use socket2::{Domain, SockRef, Socket, Type};

use crate::ledger::Entry;

use super::{
    programs::{AccelerationPrograms, LoadError},
    verdict::{Verdict, limits},
};

const MIB: usize = 1 << 20;
/// What is sent each way.
const BULK: usize = 16 * MIB;
/// What a reader that stalls may have waiting for it, the buffers of TCP included.
const MOST_QUEUED: usize = 4 * MIB;
const PIECE: usize = 32 * 1024;
const PERIOD: usize = 61;
/// Of the order of the first messages.
const ROUNDS: usize = 20;
/// After which a read or write that should go on has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tries everything. What doesn't work is the verdict, never a panic or a hang.
pub(super) fn run(programs: &mut AccelerationPrograms, own_cgroup: &Path) -> Verdict {
    let tried = attach(programs, own_cgroup).and_then(|bench| bench.verdict(programs));
    programs.detach();
    match tried {
        Ok(limits) => Verdict {
            failure: None,
            limits,
        },
        Err(failure) => Verdict::failed(failure),
    }
}

/// Where pairs of sockets are made that the programs take for an app's and the agent's.
struct Bench {
    listener: TcpListener,
    tags: SkStorage<MapData, u32>,
    _entry: Entry,
}

/// An app's end and the agent's.
type Ends = (TcpStream, TcpStream);

type Tried<T = ()> = Result<T, String>;

fn attach(programs: &mut AccelerationPrograms, own_cgroup: &Path) -> Tried<Bench> {
    let mut begin = || -> Result<Bench, LoadError> {
        programs.attach(own_cgroup)?;
        let (mut tags, entry) = programs.tags()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        tags.insert(&listener, Tag::Both as u32, 0)?;
        Ok(Bench {
            listener,
            tags,
            _entry: entry,
        })
    };
    begin().map_err(|error| error.to_string())
}

impl Bench {
    /// What an app may notice, or what fails.
    fn verdict(mut self, programs: &AccelerationPrograms) -> Tried<Vec<String>> {
        self.order().map_err(|why| format!("order: {why}"))?;
        self.bulk().map_err(|why| format!("bytes: {why}"))?;
        self.bounds().map_err(|why| format!("bounds: {why}"))?;
        self.ends().map_err(|why| format!("ends: {why}"))?;
        self.credit(programs)
            .map_err(|why| format!("credit: {why}"))?;
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
        Ok(found)
    }

    fn pair(&mut self) -> Tried<Ends> {
        let mut make = || -> io::Result<Ends> {
            let app = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            let tagged = self.tags.insert(&app, Tag::App as u32, 0);
            tagged.map_err(io::Error::other)?;
            app.set_tcp_nodelay(true)?;
            // The first answer is late, as it is where a delayed ACK waits for one.
            let _ = SockRef::from(&app).set_tcp_quickack(false);
            app.connect(&self.listener.local_addr()?.into())?;
            let (agent, _) = self.listener.accept()?;
            agent.set_nodelay(true)?;
            let app = TcpStream::from(app);
            app.set_nonblocking(true)?;
            agent.set_nonblocking(true)?;
            Ok((app, agent))
        };
        make().map_err(|error| format!("no connection: {error}"))
    }

    /// Messages that are sent at once arrive in their order.
    fn order(&mut self) -> Tried {
        for _ in 0..ROUNDS {
            let (app, agent) = self.pair()?;
            for message in [b"1111", b"2222", b"3333"] {
                send(&app, message)?;
            }
            let mut received = [0; 12];
            receive(&agent, &mut received)?;
            if received != *b"111122223333" {
                return Err("messages overtake each other".to_owned());
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
                if patiently(|| { to }.read(&mut [0]))? != 0 {
                    return Err("more than was sent".to_owned());
                }
            }
        }
        let (app, agent) = self.pair()?;
        send(&agent, b"read first")?;
        let reset = SockRef::from(&agent).set_linger(Some(Duration::ZERO));
        reset.map_err(|error| error.to_string())?;
        drop(agent);
        receive(&app, &mut [0; 10])?;
        match patiently(|| { &app }.read(&mut [0])) {
            Err(_) => Ok(()),
            Ok(length) => Err(format!("a reset is read as {length} bytes")),
        }
    }

    /// What is read may be sent again: messages that are answered stay redirected.
    fn credit(&mut self, programs: &AccelerationPrograms) -> Tried {
        let refused = || {
            let events = programs.events().into_iter();
            events
                .filter(|(event, _)| *event != Event::Redirected)
                .map(|(_, count)| count)
                .sum::<u64>()
        };
        let (app, agent) = self.pair()?;
        let before = refused();
        let mut message = vec![7; 16 * 1024];
        for _ in 0..64 {
            for (from, to) in [(&app, &agent), (&agent, &app)] {
                send(from, &message)?;
                receive(to, &mut message)?;
            }
        }
        if refused() > before {
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
            let reset = SockRef::from(&agent).set_linger(Some(Duration::ZERO));
            reset.map_err(|error| error.to_string())?;
            let (tell, told) = mpsc::channel();
            let reading = thread::spawn(move || {
                let _ = tell.send(nix::unistd::gettid());
                { &app }.read(&mut [0])
            });
            if let Ok(thread) = told.recv() {
                wait_until_asleep(thread.as_raw());
            }
            drop(agent);
            let read = reading.join().map_err(|_| "the reader panicked")?;
            if read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                return Ok(false);
            }
        }
        Ok(true)
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

    /// Whether splice(2) moves what was redirected.
    fn splices(&mut self) -> Tried<bool> {
        let (app, agent) = self.pair()?;
        send(&agent, &[1; 5000])?;
        let (_reader, writer) = io::pipe().map_err(|error| error.to_string())?;
        let none = std::ptr::null_mut();
        let (from, to): (RawFd, RawFd) = (app.as_raw_fd(), writer.as_raw_fd());
        // SAFETY: a plain call on two open descriptors, without offsets.
        let moved = unsafe { libc::splice(from, none, to, none, 5000, libc::SPLICE_F_NONBLOCK) };
        Ok(moved == 5000)
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
fn patiently<T>(mut attempt: impl FnMut() -> io::Result<T>) -> Tried<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if is_wait(&error) && Instant::now() < end => {
                thread::sleep(Duration::from_micros(50));
            }
            done => return done.map_err(|error| error.to_string()),
        }
    }
}

fn send(mut to: &TcpStream, mut bytes: &[u8]) -> Tried {
    while !bytes.is_empty() {
        let written = patiently(|| to.write(bytes))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

fn receive(mut from: &TcpStream, bytes: &mut [u8]) -> Tried {
    let mut filled = 0;
    while filled < bytes.len() {
        match patiently(|| from.read(&mut bytes[filled..]))? {
            0 => return Err("an early end".to_owned()),
            length => filled += length,
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
