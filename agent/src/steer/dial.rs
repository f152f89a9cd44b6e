//! Sockets that the agent opens from inside a pod's netns.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use malla_common::Flow;
use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{
    diag::{Held, SocketDiag},
    listeners::{relay_options, set_option},
    netns::Netns,
};
use crate::model::{PortRange, Reason};

/// Ports that are tried for one connection before it is given up: every one of them was held by a
/// connection of the same client to the same address.
const PORT_TRIES: u32 = 64;

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("refused")]
    Refused,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no free port in the dial range for this client and address")]
    PortsExhausted,
    #[error(transparent)]
    Io(io::Error),
}

impl DialError {
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused => Reason::ConnectRefused,
            Self::Timeout(_) => Reason::ConnectTimeout,
            Self::PortsExhausted => Reason::DialPortsExhausted,
            Self::Io(_) => Reason::ConnectFailed,
        }
    }
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::TimedOut => Self::Timeout(Duration::ZERO),
            _ => Self::Io(error),
        }
    }
}

/// Source ports towards the app of one pod, shared by all workers.
///
/// They go round the whole range before one comes again, so that its last connection is as long
/// gone as can be. From the second round on, and as soon as a client has used a port of the range
/// itself, the kernel is asked whether the app's side of a tuple is free: a connection that is
/// closed on one side, or a client's own, would answer the SYN in the app's stead.
#[derive(Debug)]
pub struct DialPorts {
    range: PortRange,
    ports: Vec<u16>,
    next: AtomicU32,
    /// Ports that haven't been used yet.
    first_round: AtomicU32,
    /// Whether clients use ports of the range themselves.
    overlaps: AtomicBool,
    diag: SocketDiag,
}

impl DialPorts {
    /// The ports of `range` but those in `taken`. To be made in the pod's netns.
    pub fn new(range: PortRange, taken: impl Fn(u16) -> bool) -> io::Result<Self> {
        let ports: Vec<u16> = (range.first..=range.last)
            .filter(|port| !taken(*port))
            .collect();
        let first_round = u32::try_from(ports.len()).unwrap_or(0);
        Ok(Self {
            range,
            ports,
            next: AtomicU32::new(fastrand::u32(..)),
            first_round: AtomicU32::new(first_round),
            overlaps: AtomicBool::new(false),
            diag: SocketDiag::open()?,
        })
    }

    /// Tells that a client connects to this pod with a source port of its own choice.
    pub fn met_client(&self, port: u16) {
        if self.range.contains(port) {
            self.overlaps.store(true, Ordering::Relaxed);
        }
    }

    /// A port for a connection of `client` to `app` whose tuple no connection of the pod's netns
    /// holds. One that was the agent's and is over may be used again (RFC 6191); one that may have
    /// been the client's, whose clock is another, only when there is no better.
    fn next(&self, client: IpAddr, app: SocketAddr) -> Option<u16> {
        let mut over = None;
        for _ in 0..PORT_TRIES {
            let turn = self.next.fetch_add(1, Ordering::Relaxed) as usize;
            let port = *self.ports.get(turn.checked_rem(self.ports.len())?)?;
            let overlaps = self.overlaps.load(Ordering::Relaxed);
            let first_round = |left: u32| left.checked_sub(1);
            let first =
                self.first_round
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, first_round);
            if first.is_ok() && !overlaps {
                return Some(port);
            }
            match self.diag.find(app, SocketAddr::new(client, port)) {
                Held::No => return Some(port),
                Held::TimeWait if !overlaps => return Some(port),
                Held::TimeWait => over = over.or(Some(port)),
                Held::Connection => {}
            }
        }
        over
    }
}

/// One worker's handle on the map of the connections that are being opened to apps.
#[derive(Debug)]
pub struct OwnDial(BpfHashMap<MapData, Flow, u32>);

impl OwnDial {
    pub(super) fn new(map: BpfHashMap<MapData, Flow, u32>) -> Self {
        Self(map)
    }

    /// Leaves this flow's SYN to the app's listener.
    fn announce(&mut self, flow: Flow) -> io::Result<()> {
        self.0.insert(flow, 1, 0).map_err(map_error)
    }

    /// From here on its tuple is known to the kernel as a connection, or as none.
    fn withdraw(&mut self, flow: &Flow) {
        // Gone already where the map was full, or a SYN of the same tuple came in from outside.
        let _ = self.0.remove(flow);
    }
}

fn map_error(error: MapError) -> io::Error {
    io::Error::other(error)
}

/// Opens a connection from the pod's netns to an address outside, with the pod's own address.
pub async fn to_network(
    netns: &Netns,
    home: &Netns,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, DialError> {
    let socket = netns.enter(home, || new_socket(destination))??;
    let socket = TcpSocket::from_std_stream(socket.into());
    connect(socket, destination, limit).await
}

/// Opens a connection to the app at `destination`, an address of the pod, with `client` as source
/// where that is another host's of the same family, else with the pod's own address.
pub async fn to_app(
    netns: &Netns,
    home: &Netns,
    ports: &DialPorts,
    own_dial: &RefCell<OwnDial>,
    client: IpAddr,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, DialError> {
    if client.is_ipv4() != destination.is_ipv4() || client == destination.ip() {
        return to_network(netns, home, destination, limit).await;
    }
    let socket = netns.enter(home, || new_socket(destination))??;
    let (level, option) = match client {
        IpAddr::V4(_) => (libc::SOL_IP, libc::IP_TRANSPARENT),
        IpAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
    };
    set_option(&socket, level, option, 1)?;
    socket.set_reuse_address(true)?;
    let mut socket = socket;
    for _ in 0..PORT_TRIES {
        let port = ports
            .next(client, destination)
            .ok_or(DialError::PortsExhausted)?;
        let source = SocketAddr::new(client, port);
        match socket.bind(&source.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => continue,
            Err(error) => return Err(error.into()),
        }
        let flow = Flow {
            source: client.into(),
            destination: destination.ip().into(),
            source_port: port,
            destination_port: destination.port(),
        };
        own_dial.borrow_mut().announce(flow)?;
        let announced = Announced { own_dial, flow };
        let tokio_socket = TcpSocket::from_std_stream(socket.into());
        match connect(tokio_socket, destination, limit).await {
            Err(DialError::Io(error))
                if error.raw_os_error() == Some(Errno::EADDRNOTAVAIL as i32) =>
            {
                drop(announced);
                // This tuple is in use. A bound socket can't be bound again.
                socket = netns.enter(home, || new_socket(destination))??;
                set_option(&socket, level, option, 1)?;
                socket.set_reuse_address(true)?;
            }
            other => return other,
        }
    }
    Err(DialError::PortsExhausted)
}

/// Takes the flow out of the map on every way out, the dropped future's included.
struct Announced<'a> {
    own_dial: &'a RefCell<OwnDial>,
    flow: Flow,
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.own_dial.borrow_mut().withdraw(&self.flow);
    }
}

async fn connect(
    socket: TcpSocket,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, DialError> {
    match tokio::time::timeout(limit, socket.connect(destination)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(DialError::Timeout(limit)),
    }
}

fn new_socket(destination: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(destination);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    relay_options(&socket)?;
    Ok(socket)
}

/// Takes the reset off as the end of this leg: what follows is an orderly close.
pub fn end_orderly(stream: &impl AsFd) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(None);
}
