//! The agent's listening sockets in a pod's netns.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::legs::{Leg, relay_options, set_option};
use crate::{
    ledger::{Accounted, Kind},
    model::{PortRange, ports},
};

/// Connections that wait for `accept`, bounded by the netns's `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

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
