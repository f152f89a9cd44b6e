//! Sockets that the agent opens from inside a pod's netns.

use std::{
    cell::{Cell, RefCell},
    io,
    mem::MaybeUninit,
    net::{IpAddr, Shutdown, SocketAddr},
    os::fd::AsFd,
    pin::pin,
    time::Duration,
};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use malla_common::Flow;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Pod,
    cgroup::CgroupId,
    diag::Held,
    dial_stock::ExpectedDial,
    legs::{Leg, relay_options, set_option},
};
use crate::{
    ledger::{Accounted, Kind},
    model::Reason,
};

/// Ports that are tried for one connection before it is given up: every one of them was held by a
/// connection of the same client to the same address.
const PORT_TRIES: u32 = 64;

/// By now a packet that passed TC has met its socket. As short as the timer has it.
const SETTLED: Duration = Duration::from_millis(1);
/// A connection over the loopback opens within this time, or something is in its way.
const AT_ONCE: Duration = Duration::from_millis(20);
/// So many dials that the app's kernel answered, and whose answers did not come, mean that they
/// don't get out of the pod: the loopback takes them only once a neighbour is found. One may be a
/// client that came with the dial's tuple, or a neighbour that is being asked for.
const LOST_ANSWERS: u32 = 3;

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
            // Only an established connection is reset in this way: a SYN is refused.
            Self::Io(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Reason::ServerReset
            }
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

/// One worker's handle on the maps of the connections that are being opened to apps.
#[derive(Debug)]
pub struct OwnDial {
    map: BpfHashMap<MapData, Flow, u32>,
    steered: BpfHashMap<MapData, Flow, u32>,
    owner: u32,
}

/// How the map names the agent whose dial an entry is.
pub(super) fn owner(agent: CgroupId) -> u32 {
    // The low half: two agents of one node that live at once don't share it.
    #[expect(clippy::cast_possible_truncation)]
    let owner = agent.0 as u32;
    owner
}

impl OwnDial {
    pub(super) fn new(
        map: BpfHashMap<MapData, Flow, u32>,
        steered: BpfHashMap<MapData, Flow, u32>,
        agent: CgroupId,
    ) -> Self {
        let owner = owner(agent);
        Self {
            map,
            steered,
            owner,
        }
    }

    /// Forgets the dials of agents that were killed.
    pub(super) fn forget_all_but(&mut self, lives: impl Fn(u32) -> bool) {
        let entries = self.map.iter().flatten();
        let dead: Vec<Flow> = entries
            .filter(|(_, owner)| !lives(*owner))
            .map(|(flow, _)| flow)
            .collect();
        for flow in &dead {
            self.withdraw(flow);
        }
    }

    /// Leaves this flow's SYN to the app's listener.
    fn announce(&mut self, flow: Flow) -> io::Result<()> {
        self.map.insert(flow, self.owner, 0).map_err(map_error)
    }

    /// Whether it is still announced. The kernel takes the entry back where the app's side of the
    /// tuple has a connection, whose SYN it drops (`ebpf/loopback.rs`).
    fn is_announced(&self, flow: &Flow) -> bool {
        !matches!(self.map.get(flow, 0), Err(MapError::KeyNotFound))
    }

    /// From here on its tuple is known to the kernel as a connection, or as none.
    fn withdraw(&mut self, flow: &Flow) {
        // Gone already where the map was full, or a SYN of the same tuple came in from outside.
        let _ = self.map.remove(flow);
    }

    /// Nobody waits any more for what the app's kernel answers to this flow's SYN: it repeats that
    /// for a minute, and may still have it in a neighbour's queue.
    fn give_up(&mut self, flow: &Flow) {
        // Best effort: such an answer has no byte of the app's.
        let _ = self.steered.insert(flow.turned(), 1, 0);
    }
}

fn map_error(error: MapError) -> io::Error {
    io::Error::other(error)
}

/// Opens a connection from the pod's netns to an address outside, with the pod's own address. Like
/// all that is dialled here, it is entered in the ledger as being dialled.
pub async fn to_network(
    pod: &Pod,
    destination: SocketAddr,
    limit: Duration,
) -> Result<Accounted<TcpStream>, DialError> {
    Opening::begin(pod, destination)?.open(limit).await
}

/// A connection from a pod's netns that has been asked for and isn't open yet.
#[derive(Debug)]
pub struct Opening {
    socket: Accounted<Socket>,
}

impl Opening {
    /// [`to_network`] up to its SYN.
    pub fn begin(pod: &Pod, destination: SocketAddr) -> Result<Self, DialError> {
        let socket = || new_socket(destination, Leg::Network);
        let socket = pod.netns.enter(&pod.home, socket)??;
        let socket = Accounted::new(socket, pod.id, Kind::Connecting);
        Ok(Self::of(socket, destination)?)
    }

    fn of(socket: Accounted<Socket>, destination: SocketAddr) -> io::Result<Self> {
        match socket.connect(&destination.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(Self { socket }),
        }
    }

    /// Its own end, which it has from its SYN on.
    pub fn local(&self) -> io::Result<SocketAddr> {
        let local = self.socket.local_addr()?.as_socket();
        local.ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    /// Whether it is open already, as over the loopback, where the app's kernel has answered before
    /// `connect` returned. One that isn't has no peer (`getpeername`).
    fn is_open(&self) -> bool {
        self.socket.peer_addr().is_ok()
    }

    /// Waits until it is open. For one that is, no timer is set.
    pub async fn open(self, limit: Duration) -> Result<Accounted<TcpStream>, DialError> {
        if self.is_open() {
            return Ok(self.into_stream()?);
        }
        self.wait(limit).await
    }

    async fn wait(self, limit: Duration) -> Result<Accounted<TcpStream>, DialError> {
        let stream = self.into_stream()?;
        timeout(limit, stream.writable())
            .await
            .map_err(|_| DialError::Timeout(limit))??;
        outcome(&stream)?;
        Ok(stream)
    }

    fn into_stream(self) -> io::Result<Accounted<TcpStream>> {
        let (entry, socket) = self.socket.into_parts();
        let stream = TcpStream::from_std(socket.into())?;
        Ok(Accounted::from_parts(entry, stream))
    }
}

/// How the opening of a connection ended.
///
/// By a peek, since `SO_ERROR` is also what became of it afterwards: of an app that has answered
/// and reset at once, the answer would be lost. A read tells an error behind what came before it.
fn outcome(stream: &TcpStream) -> io::Result<()> {
    match SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}

/// A connection to the app.
#[derive(Debug)]
pub struct Dialled {
    pub stream: Accounted<TcpStream>,
    /// How many bytes of what the client has said were sent.
    pub sent: usize,
    /// The app sees the pod's own address in place of the client's.
    pub source_replaced: bool,
}

/// A connection to the app that is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct ToApp<'a> {
    pub client: IpAddr,
    /// An address of the pod.
    pub destination: SocketAddr,
    pub limit: Duration,
    /// What the client says first, as far as it is here. An app whose kernel answers at once hears it
    /// with the connection's opening.
    pub said: &'a [u8],
    /// Whether the end comes behind that.
    pub is_last: bool,
}

/// Opens a connection to the app, with the client's address as source. Where that is of another
/// family, or an address that the pod has no route to or whose neighbour doesn't answer, the pod's own
/// address is the source. It may have been `expected`.
pub async fn to_app(
    pod: &Pod,
    own_dial: &RefCell<OwnDial>,
    mut expected: Option<ExpectedDial>,
    asked: ToApp<'_>,
) -> Result<Dialled, DialError> {
    let ToApp {
        client,
        destination,
        limit,
        ..
    } = asked;
    let usable = client.is_ipv4() == destination.is_ipv4()
        && client != destination.ip()
        && pod.routes.reaches(&pod.netns, &pod.home, client);
    if !usable {
        drop(expected);
        return from_own_address(pod, destination, limit).await;
    }
    let mut lost_answers = 0;
    for turn in 0..PORT_TRIES {
        let port = pod.dial_ports.next().ok_or(DialError::PortsExhausted)?;
        let source = SocketAddr::new(client, port);
        let flow = Flow {
            source: client.into(),
            destination: destination.ip().into(),
            source_port: port,
            destination_port: destination.port(),
        };
        own_dial.borrow_mut().announce(flow)?;
        let announced = Announced::new(own_dial, flow);
        if pod.dial_ports.overlaps() {
            // A client's SYN that passed `ingress` just before is on its way up the stack.
            tokio::time::sleep(SETTLED).await;
        }
        let pressed = turn >= PORT_TRIES / 2;
        if pod.dial_ports.is_blocked(source, destination, pressed) {
            continue;
        }
        let socket = match expected.take() {
            Some(expected) => expected.socket(pod, destination)?,
            None => unexpected_socket(pod, destination)?,
        };
        match announced.attempt(pod, socket, source, asked).await? {
            Attempt::Open(stream, sent) => {
                return Ok(Dialled {
                    stream,
                    sent,
                    source_replaced: false,
                });
            }
            Attempt::Taken => {}
            Attempt::AnswerLost => {
                lost_answers += 1;
                if lost_answers == LOST_ANSWERS {
                    pod.routes.has_no_neighbour(client);
                    return from_own_address(pod, destination, limit).await;
                }
            }
        }
    }
    Err(DialError::PortsExhausted)
}

async fn from_own_address(
    pod: &Pod,
    destination: SocketAddr,
    limit: Duration,
) -> Result<Dialled, DialError> {
    let socket = || new_socket(destination, Leg::App);
    let socket = pod.netns.enter(&pod.home, socket)??;
    let socket = Accounted::new(socket, pod.id, Kind::Connecting);
    pod.dial_tag.put_on(&socket);
    let stream = Opening::of(socket, destination)?.open(limit).await?;
    Ok(Dialled {
        stream,
        sent: 0,
        source_replaced: true,
    })
}

/// What became of one try from one port.
enum Attempt {
    /// … and how many bytes were sent.
    Open(Accounted<TcpStream>, usize),
    /// Something else has the tuple.
    Taken,
    /// The app's kernel has answered the SYN, and the answer doesn't come.
    AnswerLost,
}

/// Takes the flow out of the map on every way out, the dropped future's included.
struct Announced<'a> {
    own_dial: &'a RefCell<OwnDial>,
    flow: Flow,
    /// Whether a SYN was sent that may be answered yet.
    awaits_answer: Cell<bool>,
}

impl<'a> Announced<'a> {
    fn new(own_dial: &'a RefCell<OwnDial>, flow: Flow) -> Self {
        Self {
            own_dial,
            flow,
            awaits_answer: Cell::new(false),
        }
    }

    async fn attempt(
        &self,
        pod: &Pod,
        socket: Accounted<Socket>,
        source: SocketAddr,
        asked: ToApp<'_>,
    ) -> Result<Attempt, DialError> {
        self.awaits_answer.set(true);
        let result = self.connect(pod, socket, source, asked).await;
        let is_answered = match &result {
            Ok(Attempt::Open(..) | Attempt::Taken) | Err(DialError::Refused) => true,
            Ok(Attempt::AnswerLost) | Err(_) => false,
        };
        self.awaits_answer.set(!is_answered);
        result
    }

    async fn connect(
        &self,
        pod: &Pod,
        socket: Accounted<Socket>,
        source: SocketAddr,
        asked: ToApp<'_>,
    ) -> Result<Attempt, DialError> {
        let ToApp {
            destination, limit, ..
        } = asked;
        let accelerated = pod.dial_tag.put_on(&socket);
        match socket.bind(&source.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
                return Ok(Attempt::Taken);
            }
            Err(error) => return Err(error.into()),
        }
        // What is redirected takes a connection that both ends have open.
        let said = if accelerated { &[] } else { asked.said };
        let held = !said.is_empty() && hold_ack(&SockRef::from(&*socket), true).is_ok();
        let opening = match Opening::of(socket, destination) {
            Ok(opening) => opening,
            // This tuple is in use, and a bound socket can't be bound again.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                return Ok(Attempt::Taken);
            }
            Err(error) => return Err(error.into()),
        };
        if opening.is_open() {
            let stream = opening.into_stream()?;
            // Before the flow is withdrawn: an app that has answered with a SYN cookie has no socket yet.
            let sent = if held {
                first(&SockRef::from(&*stream), said, asked.is_last)?
            } else {
                0
            };
            return Ok(Attempt::Open(stream, sent));
        }
        if !self.own_dial.borrow().is_announced(&self.flow) {
            return Ok(Attempt::Taken);
        }
        if held {
            // Its answer will be acknowledged when it comes.
            hold_ack(&SockRef::from(&*opening.socket), false)?;
        }
        let mut connecting = pin!(opening.wait(limit));
        let connected = match timeout(AT_ONCE, &mut connecting).await {
            Ok(connected) => connected,
            Err(_) => match pod.dial_ports.holder(source, destination) {
                // A client's SYN that was past `ingress` when the tuple was announced came first.
                Held::Connection => return Ok(Attempt::Taken),
                Held::Answered => return Ok(Attempt::AnswerLost),
                // Its SYN was dropped meanwhile.
                _ if !self.own_dial.borrow().is_announced(&self.flow) => return Ok(Attempt::Taken),
                Held::No | Held::TimeWait => connecting.await,
            },
        };
        Ok(Attempt::Open(connected?, 0))
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        let mut own_dial = self.own_dial.borrow_mut();
        own_dial.withdraw(&self.flow);
        if self.awaits_answer.get() {
            own_dial.give_up(&self.flow);
        }
    }
}

/// Lets the first data acknowledge the answer to a SYN, where an ACK would go ahead of it
/// (`tcp_rcv_synsent_state_process`): a packet less, and the app is woken once for both. Or doesn't.
fn hold_ack(socket: &SockRef<'_>, held: bool) -> io::Result<()> {
    socket.set_tcp_quickack(!held)
}

/// Sends the first bytes, with the ACK that was held for them. An end goes with them as well, since with
/// what is kept for it the ACK would be kept.
fn first(socket: &SockRef<'_>, said: &[u8], is_last: bool) -> io::Result<usize> {
    let flags = if is_last { libc::MSG_MORE } else { 0 };
    let sent = match socket.send_with_flags(said, flags) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        sent => sent?,
    };
    // From here on it fails no more, since the app has heard something: it may have reset the connection,
    // which a read tells behind what it has answered.
    if is_last && sent == said.len() {
        let _ = socket.shutdown(Shutdown::Write);
    }
    // What was sent so soon looks like an answer, and from then on the kernel would keep its ACKs for 40 ms,
    // which an app without TCP_NODELAY that answers in two parts waits for.
    let _ = hold_ack(socket, false);
    Ok(sent)
}

fn unexpected_socket(pod: &Pod, destination: SocketAddr) -> io::Result<Accounted<Socket>> {
    let socket = || transparent_socket(destination);
    let socket = pod.netns.enter(&pod.home, socket)??;
    Ok(Accounted::new(socket, pod.id, Kind::Connecting))
}

/// A socket that may be bound to an address which isn't the pod's.
pub(super) fn transparent_socket(destination: SocketAddr) -> io::Result<Socket> {
    let socket = new_socket(destination, Leg::App)?;
    let (level, option) = match destination {
        SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
    };
    set_option(&socket, level, option, 1)?;
    socket.set_reuse_address(true)?;
    Ok(socket)
}

fn new_socket(destination: SocketAddr, leg: Leg) -> io::Result<Socket> {
    let domain = Domain::for_address(destination);
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    relay_options(&socket, leg)?;
    Ok(socket)
}

/// Takes the reset off as the end of this leg: what follows is an orderly close.
pub fn end_orderly(stream: &impl AsFd) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(None);
}
