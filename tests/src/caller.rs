//! Small apps of the test itself: a server that echoes, and clients that tell what became of them.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{accelerated::Polled, netns::Netns};

/// How long a client waits for its connection and for each answer, unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came to an [`EchoApp`].
#[derive(Debug, Default)]
struct Seen {
    peers: Vec<SocketAddr>,
    /// Those that live, by their place among the peers.
    streams: HashMap<usize, TcpStream>,
}

/// An app that sends back what it receives, on both families. It ends when it is dropped.
#[derive(Debug)]
pub struct EchoApp {
    listener: Arc<TcpListener>,
    seen: Arc<Mutex<Seen>>,
    accepting: Option<JoinHandle<()>>,
}

impl EchoApp {
    /// Listens on `port`, with `SO_REUSEADDR` as most servers do.
    pub fn start(netns: &Netns, port: u16) -> Result<Self> {
        Self::listen(netns, port, true, echo)
    }

    /// The same, whose sockets are as `accelerate: full` asks of them.
    pub fn polled(netns: &Netns, port: u16) -> Result<Self> {
        Self::listen(netns, port, true, |stream| {
            let end = Polled::new(stream.try_clone()?)?;
            io::copy(&mut &end, &mut &end)?;
            Ok(())
        })
    }

    /// Listens on `port` without `SO_REUSEADDR`: no other socket may hold the port.
    pub fn without_reuse(netns: &Netns, port: u16) -> Result<Self> {
        Self::listen(netns, port, false, echo)
    }

    fn listen(netns: &Netns, port: u16, reuse: bool, serve: Serve) -> Result<Self> {
        let listener = netns.enter(|| -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.set_only_v6(false)?;
            socket.set_reuse_address(reuse)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            socket.listen(1024)?;
            Ok(socket.into())
        });
        let listener = listener.with_context(|| format!("listening on port {port}"))?;
        let listener = Arc::new(listener);
        let seen = Arc::<Mutex<Seen>>::default();
        let (accepts, notes) = (Arc::clone(&listener), Arc::clone(&seen));
        let accepting = thread::Builder::new()
            .name("echo".to_owned())
            .spawn(move || accept_all(&accepts, &notes, serve))?;
        Ok(Self {
            listener,
            seen,
            accepting: Some(accepting),
        })
    }

    /// How many connections it has accepted so far.
    pub fn accepted(&self) -> usize {
        self.seen().peers.len()
    }

    /// Whom it has accepted so far, as it sees them.
    pub fn peers(&self) -> Vec<SocketAddr> {
        let seen = self.seen();
        let canonical = |peer: &SocketAddr| SocketAddr::new(peer.ip().to_canonical(), peer.port());
        seen.peers.iter().map(canonical).collect()
    }

    /// Ends the sending side of every connection.
    pub fn half_close(&self) {
        for stream in self.seen().streams.values() {
            // One whose peer is gone has nothing to end.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
}

impl Drop for EchoApp {
    fn drop(&mut self) {
        // Wakes `accept` with an error.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        for stream in self.seen().streams.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(accepting) = self.accepting.take() {
            // A panic there has been printed already.
            let _ = accepting.join();
        }
    }
}

/// Serves one connection until its peer's end.
type Serve = fn(&TcpStream) -> io::Result<()>;

fn echo(mut stream: &TcpStream) -> io::Result<()> {
    let mut reader = stream;
    io::copy(&mut reader, &mut stream)?;
    Ok(())
}

fn accept_all(listener: &TcpListener, seen: &Arc<Mutex<Seen>>, serve: Serve) {
    while let Ok((stream, peer)) = listener.accept() {
        let Ok(kept) = stream.try_clone() else {
            continue;
        };
        let mut notes = lock(seen);
        let place = notes.peers.len();
        notes.peers.push(peer);
        notes.streams.insert(place, stream);
        drop(notes);
        let seen = Arc::clone(seen);
        thread::spawn(move || {
            // A reset is an end like any other.
            let _ = serve(&kept);
            let _ = kept.shutdown(Shutdown::Write);
            lock(&seen).streams.remove(&place);
        });
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of a connection and the bytes that were sent on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The bytes came back.
    Echoed,
    /// `connect` was refused.
    Refused,
    /// It was opened, and then reset.
    Reset,
    /// It was opened, and ended without the bytes.
    Ended,
    /// Nothing came in time.
    Silence,
    /// Another error.
    Failed(Errno),
}

impl From<io::Error> for Fate {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Silence,
            _ => Self::Failed(Errno::from_raw(error.raw_os_error().unwrap_or_default())),
        }
    }
}

/// A client about to connect.
#[derive(Debug, Clone)]
pub struct Caller<'a> {
    netns: &'a Netns,
    bytes: &'a [u8],
    source: Option<SocketAddr>,
    mark: Option<u32>,
    protocol: Option<Protocol>,
    prepare: Option<fn(&Socket) -> io::Result<()>>,
    patience: Duration,
}

impl<'a> Caller<'a> {
    pub fn new(netns: &'a Netns) -> Self {
        Self {
            netns,
            bytes: b"hello",
            source: None,
            mark: None,
            protocol: None,
            prepare: None,
            patience: PATIENCE,
        }
    }

    /// What it sends, and expects back.
    #[must_use]
    pub fn saying(mut self, bytes: &'a [u8]) -> Self {
        self.bytes = bytes;
        self
    }

    /// The address and port that it binds to.
    #[must_use]
    pub fn from(mut self, source: SocketAddr) -> Self {
        self.source = Some(source);
        self
    }

    /// The mark of its packets (`SO_MARK`).
    #[must_use]
    pub fn marked(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// The protocol of its socket, where that isn't plain TCP.
    #[must_use]
    pub fn speaking(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// What it does to its socket before it connects.
    #[must_use]
    pub fn preparing(mut self, prepare: fn(&Socket) -> io::Result<()>) -> Self {
        self.prepare = Some(prepare);
        self
    }

    /// How long it waits for the connection, and for each answer (10 s).
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Opens a connection.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.netns.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, self.protocol)?;
            if let Some(prepare) = self.prepare {
                prepare(&socket)?;
            }
            if let Some(mark) = self.mark {
                socket.set_mark(mark)?;
            }
            if let Some(source) = self.source {
                socket.set_reuse_address(true)?;
                socket.bind(&source.into())?;
            }
            socket.connect_timeout(&to.into(), self.patience)?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(self.patience))?;
            stream.set_write_timeout(Some(self.patience))?;
            Ok(stream)
        })
    }

    /// Connects, sends its bytes and waits for them to come back.
    pub fn call(&self, to: impl Into<SocketAddr>) -> Fate {
        match self.connect(to.into()) {
            Ok(mut stream) => say(&mut stream, self.bytes),
            Err(error) => error.into(),
        }
    }

    /// [`Self::call`], and how long it took.
    pub fn timed_call(&self, to: impl Into<SocketAddr>) -> (Fate, Duration) {
        let began = Instant::now();
        let fate = self.call(to);
        (fate, began.elapsed())
    }
}

/// Sends `bytes` on an open connection and waits for them to come back.
pub fn say(stream: &mut TcpStream, bytes: &[u8]) -> Fate {
    if let Err(error) = stream.write_all(bytes) {
        return error.into();
    }
    let mut answer = vec![0; bytes.len()];
    match stream.read_exact(&mut answer) {
        Ok(()) if answer == bytes => Fate::Echoed,
        Ok(()) => Fate::Ended,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Fate::Ended,
        Err(error) => error.into(),
    }
}

/// The address of `addresses` that is of the same family as `like`.
pub fn same_family(addresses: &[IpAddr], like: IpAddr) -> Option<IpAddr> {
    let same = |address: &&IpAddr| address.is_ipv4() == like.is_ipv4();
    addresses.iter().find(same).copied()
}
