//! What an app hasn't read yet of what was redirected to it, as the agent asks before it writes.
//!
//! The kernel would let the agent go over to TCP at any time, but not tell the app: one that waits
//! for an event of its socket, having read less than it asked for, would wait for bytes that it has
//! been told of. So the agent goes over when the app has read everything.
//!
//! What apps read is counted by a program, which a kernel may leave out: it runs none that is running
//! on that processor already, and one whose tracepoints can be preempted (7.3, tried) has such cases by
//! the hundred. Then more seems to wait than does. So whoever waits for long asks for the memory of
//! what the app has to read, which such kernels count as the socket's.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use malla_common::{
    Flow,
    acceleration::{self, End, Queue},
};
use socket2::SockRef;
use tokio::{net::TcpStream, time::sleep};

use super::joins::{Join, Turn};
use crate::{
    ledger::Entry,
    steer::{diag, netns::Netns},
};

/// What the agent lets wait for an app.
const CREDIT: i64 = acceleration::CREDIT as i64;

/// Between looks whether the app has read everything, which happens once in a connection's life at
/// most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// After how long the kernel is asked for what the app has to read, and how often at most from then
/// on: that takes a dozen system calls.
const FIRST_QUESTION: Duration = Duration::from_millis(100);
const BETWEEN_QUESTIONS: Duration = Duration::from_secs(2);

/// The maps of what is redirected.
#[derive(Debug)]
pub(super) struct Maps {
    /// How many bytes wait for each end.
    pub waiting: (BpfHashMap<MapData, End, Queue>, Entry),
    /// The cookie of each end's socket, until its app closes it.
    pub ends: (BpfHashMap<MapData, End, u64>, Entry),
    /// Which apps' sockets, by their cookie, send without the agent.
    pub joins: (BpfHashMap<MapData, u64, acceleration::Join>, Entry),
}

/// What waits to be read, once something may.
#[derive(Debug)]
pub struct Queues {
    began: AtomicBool,
    urgent: AtomicBool,
    tells_memory: AtomicBool,
    home: Arc<Netns>,
    maps: Mutex<Option<Maps>>,
}

impl Queues {
    /// `home` is the agent's own netns.
    pub(super) fn new(home: Arc<Netns>) -> Self {
        Self {
            began: AtomicBool::new(false),
            urgent: AtomicBool::new(false),
            tells_memory: AtomicBool::new(false),
            home,
            maps: Mutex::default(),
        }
    }

    /// `tells_memory` where the memory of what was redirected counts as the socket's.
    pub(super) fn fill(&self, maps: Maps, tells_memory: bool) {
        *self.maps() = Some(maps);
        self.tells_memory.store(tells_memory, Ordering::Relaxed);
        self.began.store(true, Ordering::Relaxed);
    }

    /// Whether connections are or have been accelerated.
    fn began(&self) -> bool {
        self.began.load(Ordering::Relaxed)
    }

    /// Whether a read that doesn't fill its buffer may leave bytes in the socket, and readiness with
    /// them: which came by TCP after others had been redirected, or stand behind something urgent.
    pub fn may_leave_bytes(&self) -> bool {
        self.began() || self.has_urgent()
    }

    /// Whether anything urgent was ever sent.
    pub(in crate::steer) fn has_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    pub(in crate::steer) fn set_urgent(&self) {
        self.urgent.store(true, Ordering::Relaxed);
    }

    /// What may be written to one socket, be it accelerated or not. None: whatever TCP takes.
    pub fn credit(self: &Arc<Self>) -> Option<Credit> {
        self.began().then(|| Credit {
            queues: Arc::clone(self),
            peer: None,
            used: 0,
            wrote: 0,
            join: None,
            turn: Turn::default(),
            is_short: false,
            by_tcp: false,
        })
    }

    /// None: nothing is redirected there.
    fn queue(&self, end: &End) -> Option<Queue> {
        self.maps().as_ref()?.waiting.0.get(end, 0).ok()
    }

    /// Whether somebody may still read there.
    fn is_open(&self, end: &End) -> bool {
        let socket = self.maps().as_ref().map(|maps| maps.ends.0.get(end, 0));
        !matches!(socket, Some(Err(MapError::KeyNotFound)))
    }

    /// Whether the app at the other end of `socket` has nothing to read, as the kernel says of it.
    fn is_read(&self, socket: &TcpStream) -> bool {
        let ask = || -> io::Result<Option<u32>> {
            let question = Netns::of_socket(socket)?.enter(&self.home, diag::netlink)??;
            let (own, app) = (socket.local_addr()?, socket.peer_addr()?);
            let [own, app] =
                [own, app].map(|end| SocketAddr::new(end.ip().to_canonical(), end.port()));
            Ok(diag::memory_to_read(&question, app, own))
        };
        self.tells_memory() && ask().is_ok_and(|memory| memory == Some(0))
    }

    fn tells_memory(&self) -> bool {
        self.tells_memory.load(Ordering::Relaxed)
    }

    fn forget(&self, end: &End) {
        if let Some(maps) = &mut *self.maps() {
            // Gone already where its socket is.
            let _ = maps.waiting.0.remove(end);
        }
    }

    pub(super) fn maps(&self) -> MutexGuard<'_, Option<Maps>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the agent may write to one app.
#[derive(Debug, Clone)]
pub struct Credit {
    queues: Arc<Queues>,
    /// The app's end, once it was asked for: most connections end before.
    peer: Option<End>,
    /// Most that the app may have to read.
    used: i64,
    wrote: u64,
    /// What reaches the app besides, straight from the app behind the other of the agent's sockets.
    join: Option<Rc<Join>>,
    turn: Turn,
    /// The kernel has no memory to redirect into: what the app may have to read is all that it gets.
    is_short: bool,
    by_tcp: bool,
}

impl Credit {
    /// How many bytes may be written without a look.
    pub fn left(&self) -> usize {
        if self.by_tcp {
            return usize::MAX;
        }
        if self.is_short {
            return 0;
        }
        usize::try_from(CREDIT - self.used).unwrap_or(0)
    }

    /// Whether what is written goes by TCP for certain.
    pub fn is_by_tcp(&self) -> bool {
        self.by_tcp
    }

    /// What was taken of so many bytes.
    pub fn wrote(&mut self, bytes: usize, of: usize) {
        self.used = self.used.saturating_add_unsigned(bytes as u64);
        self.wrote = self.wrote.wrapping_add(bytes as u64);
        self.is_short |= bytes < of;
    }

    /// Whether a write that has failed may be tried again, by TCP: the kernel had no memory to
    /// redirect into, which TCP can wait for.
    pub fn outlives(&mut self, error: &io::Error) -> bool {
        let is_short = !self.by_tcp && error.raw_os_error() == Some(libc::ENOMEM);
        self.is_short |= is_short;
        is_short
    }

    /// Told of each chunk that was read from `reader` and written to `writer` as a whole. Now and then,
    /// joins the apps behind them: from there on the kernel moves what the one sends, unless the agent has
    /// got something of it meanwhile. Gives what it goes by, if that is new.
    ///
    /// Not where the kernel doesn't tell of memory: what it had none for counts as joined, and who waits
    /// for the app to read that would wait for ever.
    pub fn moved(&mut self, reader: &TcpStream, writer: &TcpStream) -> Option<Rc<Join>> {
        let may_be = !self.by_tcp && !self.is_short && self.queues.tells_memory();
        if !may_be || !self.turn.comes() {
            return None;
        }
        let before = self.join.as_ref();
        let used = before.is_none_or(|join| join.was_used());
        let made = Join::make(&self.queues, before, [reader, writer], self.wrote);
        self.turn.next(made.is_some() && used);
        let join = made?;
        // What the kernel moves fills the app's queue, so the next write is to look.
        self.used = CREDIT;
        let is_new = self.join.is_none();
        self.join = Some(Rc::clone(&join));
        is_new.then_some(join)
    }

    /// Waits until something may be written: looks how much was read, and where that isn't enough,
    /// waits until it is all and goes over to TCP for good. Sooner where the app closes its socket: as
    /// the kernel doesn't see what waits there, the app has ended with a FIN, and it takes what comes
    /// by TCP to be told of a reset.
    pub async fn renew(&mut self, socket: &TcpStream) {
        let Ok(peer) = self.peer.map_or_else(|| peer(socket), Ok) else {
            // It was reset, which a write will tell.
            self.by_tcp = true;
            return;
        };
        self.peer = Some(peer);
        let mut pause = FIRST_PAUSE;
        while self.left() == 0 && !self.is_short {
            match self.queues.queue(&peer) {
                Some(queue) if queue.unread > CREDIT / 2 => break,
                Some(queue) => self.used = queue.unread.max(0),
                None => self.by_tcp = true,
            }
        }
        // What there is to write now has ended the join, so that this is all.
        let joined = self.join.as_ref().map_or(0, |join| join.bytes());
        let wrote = self.wrote.wrapping_add(joined);
        let (mut waited, mut ask_at) = (Duration::ZERO, FIRST_QUESTION);
        while self.left() == 0 {
            let queue = self.queues.queue(&peer);
            let mut waits =
                queue.is_some_and(|queue| waits(&queue, wrote)) && self.queues.is_open(&peer);
            if waits && waited >= ask_at {
                waits = !self.queues.is_read(socket);
                ask_at = waited + waited.min(BETWEEN_QUESTIONS);
            }
            if waits {
                sleep(pause).await;
                waited += pause;
                pause = (pause * 2).min(LONGEST_PAUSE);
            } else {
                // Without its entry, the kernel redirects nothing more there.
                self.queues.forget(&peer);
                self.by_tcp = true;
            }
        }
    }
}

/// Whether the app has something to read that was redirected, of all that was written there. What the
/// kernel had no memory for wasn't, though it is counted, and isn't written either.
fn waits(queue: &Queue, wrote: u64) -> bool {
    queue.unread > 0 && wrote.wrapping_sub(queue.read).cast_signed() > 0
}

/// The other end of `socket`, in its netns.
pub(super) fn peer(socket: &impl AsFd) -> io::Result<End> {
    let names = SockRef::from(socket);
    let (own, other) = (names.local_addr()?, names.peer_addr()?);
    let (Some(own), Some(other)) = (own.as_socket(), other.as_socket()) else {
        return Err(io::ErrorKind::AddrNotAvailable.into());
    };
    let address = |end: SocketAddr| end.ip().into();
    Ok(End {
        netns: netns_cookie(socket)?,
        flow: Flow {
            source: address(other),
            destination: address(own),
            source_port: other.port(),
            destination_port: own.port(),
        },
        reserved: 0,
    })
}

/// The kernel's cookie of a socket's netns (Linux 5.14).
fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let (mut cookie, mut length): (u64, libc::socklen_t) = (0, 8);
    // SAFETY: the value lives across the call and has the length that is passed.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if answer == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}
