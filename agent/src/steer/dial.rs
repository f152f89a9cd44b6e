//! Sockets that the agent opens from inside a pod's netns.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use malla_common::Flow;
use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{
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
/// gone as can be.
#[derive(Debug)]
pub struct DialPorts {
    ports: Vec<u16>,
    next: AtomicU32,
}

impl DialPorts {
    /// The ports of `range` but those in `taken`.
    pub fn new(range: PortRange, taken: impl Fn(u16) -> bool) -> Self {
        let ports: Vec<u16> = (range.first..=range.last)
            .filter(|port| !taken(*port))
            .collect();
        Self {
            ports,
            next: AtomicU32::new(fastrand::u32(..)),
        }
    }

    fn next(&self) -> Option<u16> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        let length = self.ports.len();
        if length == 0 {
            None
        } else {
            Some(self.ports[turn % length])
        }
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
        let port = ports.next().ok_or(DialError::PortsExhausted)?;
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
