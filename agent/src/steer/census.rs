//! The TCP sockets of a pod's netns that some process holds, all at once (`sock_diag(7)`).
//!
//! The kernel walks its whole table of connections for it, some milliseconds on a large machine,
//! whatever the netns has: not for a worker.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::LazyLock,
};

use super::{
    Netns, Pod,
    diag::{self, DESCRIPTION, HEADER, NLM_F_DUMP, NLM_F_REQUEST},
};
use crate::ledger::{Ends, KernelSocket};

/// From `linux/inet_diag.h`. This older question is the one that asks for both families at once,
/// and so walks the table once.
const TCPDIAG_GETSOCK: u16 = 18;
/// Size of `struct inet_diag_req`.
const REQUEST: usize = 60;
/// Every state that a socket with a descriptor can have: not `TIME_WAIT`, `CLOSE` and
/// `NEW_SYN_RECV`.
const STATES: u32 = 0xfff & !(1 << 6) & !(1 << 7);
const TCP_LISTEN: u8 = 10;
const INET_DIAG_CGROUP_ID: u16 = 21;

/// Asks for those of `pod`. One that comes or goes meanwhile may be in it or not, or twice.
pub fn sockets_of(pod: &Pod) -> io::Result<Vec<KernelSocket>> {
    ask(&pod.netns.enter(&pod.home, diag::netlink)??, socket)
}

/// Asks for the ends of those of `pod` that have one of these inodes.
pub fn ends_of(pod: &Pod, inodes: &HashSet<u32>) -> io::Result<HashMap<u32, Ends>> {
    let question = pod.netns.enter(&pod.home, diag::netlink)??;
    let of = |described: &Described| {
        let found = socket(described)?;
        let is_meant = inodes.contains(&found.inode);
        is_meant.then(|| (found.inode, ends(described)))
    };
    ask(&question, of)
}

type Described = [u8; DESCRIPTION];

fn ask<T, C: Default + Extend<T>>(
    question: &OwnedFd,
    of: impl Fn(&Described) -> Option<T>,
) -> io::Result<C> {
    let mut found = C::default();
    diag::dump(question, &request(), |described, _| {
        found.extend(of(described));
    })?;
    Ok(found)
}

/// Whether one of these agents has a connection in a netns. They are known by their cgroups, which
/// the kernel tells of each socket (Linux 5.7).
pub fn has_of_agents(netns: &Netns, home: &Netns, agents: &[u64]) -> io::Result<bool> {
    let question = netns.enter(home, diag::netlink)??;
    let mut found = false;
    diag::dump(&question, &request(), |described, attributes| {
        let connection = socket(described).filter(|socket| !socket.listens);
        let cgroup = connection.and_then(|_| diag::attribute(attributes, INET_DIAG_CGROUP_ID));
        let id = cgroup.and_then(|id| Some(u64::from_ne_bytes(*id.first_chunk()?)));
        found |= id.is_some_and(|id| agents.contains(&id));
    })?;
    Ok(found)
}

/// `struct nlmsghdr`, `struct inet_diag_req`.
fn request() -> [u8; HEADER + REQUEST] {
    const LENGTH: u32 = 76;
    let mut bytes = [0; HEADER + REQUEST];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &LENGTH.to_ne_bytes());
    put(4, &TCPDIAG_GETSOCK.to_ne_bytes());
    put(6, &(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    put(HEADER + 52, &STATES.to_ne_bytes());
    bytes
}

/// None for a socket that no process holds any more.
fn socket(message: &Described) -> Option<KernelSocket> {
    let inode = u32::from_ne_bytes(*message.last_chunk()?);
    let (local, remote) = ends(message);
    (inode != 0).then(|| KernelSocket {
        inode,
        listens: message[1] == TCP_LISTEN,
        // A sum, which is the same at either end.
        pair: number(local).wrapping_add(number(remote)),
    })
}

/// A number for an address, which nobody outside can choose.
fn number(address: SocketAddr) -> u64 {
    static NUMBERS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    NUMBERS.hash_one(address)
}

fn ends(message: &Described) -> Ends {
    let is_v4 = i32::from(message[0]) == libc::AF_INET;
    let end = |port: usize, address: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&message[address..address + 16]);
        let address = if is_v4 {
            IpAddr::from(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
        } else {
            Ipv6Addr::from(octets).to_canonical()
        };
        let port = u16::from_be_bytes([message[port], message[port + 1]]);
        SocketAddr::new(address, port)
    };
    (end(4, 8), end(6, 24))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
        os::unix::fs::MetadataExt,
    };

    use super::*;

    fn inode(socket: &impl AsFd) -> u32 {
        let descriptor = socket.as_fd().try_clone_to_owned().unwrap();
        let metadata = std::fs::File::from(descriptor).metadata().unwrap();
        u32::try_from(metadata.ino()).unwrap()
    }

    #[test]
    fn a_connection_is_known_by_the_cgroup_that_made_it() {
        // That of the second version, which is the only one or is mounted beside the first.
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap();
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let metadata = roots.map(|root| std::fs::metadata(format!("{root}{own}")));
        let own = metadata.into_iter().find_map(Result::ok).unwrap().ino();
        let home = Netns::current().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(has_of_agents(&home, &home, &[own, 1 << 40]).unwrap());
        assert!(!has_of_agents(&home, &home, &[1 << 40]).unwrap());
    }

    #[test]
    fn listeners_and_both_ends_of_a_connection_are_found_in_each_family() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let client = TcpStream::connect(server).unwrap();
            let (accepted, peer) = listener.accept().unwrap();
            let question = || diag::netlink().unwrap();
            let all = || -> Vec<KernelSocket> { ask(&question(), socket).unwrap() };
            let found = all();
            let of = |inode| *found.iter().find(|s| s.inode == inode).unwrap();
            let [listener, near, far] =
                [inode(&listener), inode(&client), inode(&accepted)].map(of);
            assert!(listener.listens, "{address}");
            assert!(!near.listens && !far.listens);
            assert_eq!(near.pair, far.pair);
            assert_ne!(near.pair, listener.pair);
            let of = |described: &Described| Some((socket(described)?.inode, ends(described)));
            let ends: HashMap<u32, Ends> = ask(&question(), of).unwrap();
            assert_eq!(ends[&inode(&client)], (peer, server));
            assert_eq!(ends[&inode(&accepted)], (server, peer));
            // Without a descriptor it may be in the kernel's table for long, and is nobody's.
            let gone = inode(&client);
            drop(client);
            assert!(all().iter().all(|socket| socket.inode != gone));
        }
    }
}
