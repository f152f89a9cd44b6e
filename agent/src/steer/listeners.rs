//! The agent's listening sockets in a pod's netns.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    ledger::{Accounted, Kind},
    model::{PortRange, ports},
};

/// Connections that wait for `accept`, bounded by the netns's `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Keepalive: a peer that is gone is noticed within 40 s. No user time-out, which would cut a live peer
/// that merely doesn't read: the kernel counts answered window probes as well.
const KEEPALIVE_SECONDS: i32 = 10;
const KEEPALIVE_RETRIES: i32 = 3;

/// What is at the other end of a relayed connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// An app of this kernel, over the pod's loopback.
    App,
    Network,
}

/// The listeners of one pod for one worker.
#[derive(Debug)]
pub struct PodListeners {
    pub outbound: Accounted<TcpListener>,
    pub inbound: Accounted<TcpListener>,
    pub mesh: Accounted<TcpListener>,
}

impl PodListeners {
    /// A second hold on the same sockets.
    pub fn try_clone(&self) -> io::Result<Self> {
        let clone = |listener: &TcpListener| {
            let clone = listener.try_clone()?;
            io::Result::Ok(Accounted::new(clone, 0, Kind::ListenerCopy))
        };
        Ok(Self {
            outbound: clone(&self.outbound)?,
            inbound: clone(&self.inbound)?,
            mesh: clone(&self.mesh)?,
        })
    }

    /// Whether all of them listen. Who may administrate a netns can close another's sockets in it
    /// (`ss -K`).
    pub fn listen(&self) -> bool {
        let mut all = [&*self.outbound, &*self.inbound, &*self.mesh].into_iter();
        all.all(|socket| getsockopt(socket, sockopt::AcceptConn).unwrap_or(false))
    }
}

/// Ports that a pod's listeners are bound to. Only [`ports::MESH`] is ever dialled; the kernel
/// finds the listeners by the map, so any port that the app doesn't want will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenerPorts {
    pub outbound: u16,
    pub inbound: u16,
    /// The mesh port itself, unless the app has it.
    pub mesh: u16,
}

impl ListenerPorts {
    /// Whether `port` of the pod is one of the agent's own listeners.
    pub fn contains(self, port: u16) -> bool {
        [self.outbound, self.inbound, self.mesh, ports::MESH].contains(&port)
    }
}

/// Some of all ports, to be asked for each of thousands.
#[derive(Debug, Clone)]
pub struct PortSet(Vec<bool>);

impl Default for PortSet {
    fn default() -> Self {
        Self(vec![false; 1 << 16])
    }
}

impl PortSet {
    pub fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port)]
    }
}

impl Extend<u16> for PortSet {
    fn extend<T: IntoIterator<Item = u16>>(&mut self, ports: T) {
        for port in ports {
            self.0[usize::from(port)] = true;
        }
    }
}

/// The highest three ports outside the pod's ephemeral range, the agent's dial range, and what
/// `is_taken` says.
pub fn choose_ports(
    ephemeral: &RangeInclusive<u16>,
    dial: PortRange,
    is_taken: impl Fn(u16) -> bool,
) -> Option<[u16; 3]> {
    let mut free = (1024..=u16::MAX).rev().filter(|port| {
        *port != ports::MESH
            && !ephemeral.contains(port)
            && !dial.contains(*port)
            && !is_taken(*port)
    });
    Some([free.next()?, free.next()?, free.next()?])
}

/// `net.ipv4.ip_local_port_range` of the calling thread's netns.
pub fn ephemeral_ports() -> RangeInclusive<u16> {
    const DEFAULT: RangeInclusive<u16> = 32768..=60999;
    let Ok(text) = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range") else {
        return DEFAULT;
    };
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => first..=last,
        _ => DEFAULT,
    }
}

/// Makes the listeners of `workers` workers in the calling thread's netns, on `free` ports and the
/// mesh port. Where the app has that one, mutual TLS still comes to the agent, by the map; only the
/// app's own port can't be reached from outside the pod.
pub fn bind(workers: u16, free: [u16; 3]) -> io::Result<(ListenerPorts, Vec<PodListeners>)> {
    let [outbound, inbound, spare] = free;
    let on = |mesh| {
        let ports = ListenerPorts {
            outbound,
            inbound,
            mesh,
        };
        bind_to(workers, ports).map(|sets| (ports, sets))
    };
    match on(ports::MESH) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => on(spare),
        done => done,
    }
}

/// Makes the listeners of `workers` workers on these ports.
pub fn bind_to(workers: u16, ports: ListenerPorts) -> io::Result<Vec<PodListeners>> {
    let set = |_| {
        Ok(PodListeners {
            outbound: listener(ports.outbound, Leg::App)?,
            inbound: listener(ports.inbound, Leg::Network)?,
            mesh: listener(ports.mesh, Leg::Network)?,
        })
    };
    (0..workers).map(set).collect()
}

/// A listener for both families, that takes connections to any address.
///
/// What it sets is inherited by the sockets that it accepts, so accepting one costs no further
/// call: their end is a RST until an orderly close takes the linger off, so that the peers of a
/// killed agent see a reset and not a clean end.
fn listener(port: u16, leg: Leg) -> io::Result<Accounted<TcpListener>> {
    let (socket, address): (Socket, SocketAddr) =
        match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
            Ok(socket) => {
                socket.set_only_v6(false)?;
                set_option(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
                (socket, (Ipv6Addr::UNSPECIFIED, port).into())
            }
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
                (socket, (Ipv4Addr::UNSPECIFIED, port).into())
            }
            Err(error) => return Err(error),
        };
    set_option(&socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1)?;
    socket.set_reuse_address(true)?;
    // One socket for each worker on the same port; the map chooses among them.
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    relay_options(&socket, leg)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    // The worker that it is for says which pod's it is.
    Ok(Accounted::new(socket.into(), 0, Kind::Listener))
}

/// What every relayed leg has: no delay, a peer's death noticed, and a reset as its end unless an
/// orderly close takes that off.
///
/// An app's death is told by its kernel, which is this one, but for one that has ended what it says
/// ([`notice_forgotten`]): so as long as it hasn't, nobody asks, unless no app has the other end any more
/// ([`notice_gone`]). The kernel asks for all whose time falls
/// in the same half second or two at once, and of thousands of idle connections a loopback's backlog
/// (`net.core.netdev_max_backlog`, 1,000) would drop what is beyond it, others' packets with theirs.
pub fn relay_options(socket: &Socket, leg: Leg) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = [
        (libc::TCP_KEEPIDLE, KEEPALIVE_SECONDS),
        (libc::TCP_KEEPINTVL, KEEPALIVE_SECONDS),
        (libc::TCP_KEEPCNT, KEEPALIVE_RETRIES),
    ];
    for (option, value) in keepalive {
        set_option(socket, libc::IPPROTO_TCP, option, value)?;
    }
    match leg {
        Leg::Network => socket.set_keepalive(true)?,
        // The plainest congestion control: there is no path to find out about, and BBR, where it is the
        // node's choice, would pace what is sent by a timer. Every kernel has it (net/ipv4/tcp_cong.c),
        // and without it the leg works as well.
        Leg::App => {
            let _ = socket.set_tcp_congestion(b"reno");
        }
    }
    socket.set_linger(Some(Duration::ZERO))
}

/// For a leg to an app that has ended what it says: its kernel forgets a socket that it has closed
/// (`net.ipv4.tcp_fin_timeout`), and tells of that only who asks.
pub fn notice_forgotten(leg: &impl AsFd) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(leg).set_keepalive(true);
}

/// The same for a leg that stands alone, by its descriptor and inode: what its app's kernel has told is lost,
/// or the app is beyond another netns or a virtual machine. Whatever else has the descriptor by now is
/// left as it is.
pub fn notice_gone(descriptor: RawFd, inode: u32) {
    // SAFETY: a call without memory. Where nothing is open under the number, it fails.
    let copy = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return;
    }
    // SAFETY: the call has just made it, for nobody else.
    let copy = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    if copy.metadata().is_ok_and(|is| is.ino() == u64::from(inode)) {
        notice_forgotten(&copy);
    }
}

/// Sets an integer option that socket2 has no method for.
pub fn set_option(socket: &Socket, level: i32, name: i32, value: i32) -> io::Result<()> {
    const LENGTH: libc::socklen_t = 4;
    // SAFETY: the value lives across the call and has the length that is passed.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            LENGTH,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_keep_clear_of_the_pods_ports() {
        let dial = PortRange {
            first: 10_000,
            last: 32_000,
        };
        let chosen = choose_ports(&(32768..=60999), dial, |port| port == 65535);
        assert_eq!(chosen, Some([65534, 65533, 65532]));
        let chosen = choose_ports(&(32768..=65535), dial, |_| false);
        assert_eq!(chosen, Some([32767, 32766, 32765]));
        assert!(choose_ports(&(1024..=65535), dial, |_| false).is_none());
    }
}
