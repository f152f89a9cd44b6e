//! Asking the kernel for sockets of a netns (`sock_diag(7)`).
//!
//! Never /proc/net/tcp: to read it walks the table of all connections of the machine, which takes
//! 7 ms where that has its usual 262,144 places.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::Mutex,
};

use malla_common::Address;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::ledger::{Accounted, Kind};

/// From `linux/sock_diag.h` and `net/tcp_states.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IPPROTO_TCP: u8 = 6;
const TCP_SYN_RECV: u8 = 3;
const TCP_TIME_WAIT: u8 = 6;
const TCP_LISTEN: u8 = 10;
/// Of its attributes.
const INET_DIAG_SKMEMINFO: u16 = 7;
/// Sizes of `struct nlmsghdr`, `struct inet_diag_req_v2` and `struct inet_diag_msg`.
pub(super) const HEADER: usize = 16;
const REQUEST: usize = 56;
pub(super) const DESCRIPTION: usize = 72;
/// The kernel's largest piece of an answer to a dump.
const PIECE: usize = 32 << 10;

/// What holds a tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// No socket, or a listener.
    No,
    /// A connection whose SYN was answered, and that isn't open yet.
    Answered,
    /// A connection that is over.
    TimeWait,
    /// A connection in any other state.
    Connection,
}

/// A netlink socket in a pod's netns.
#[derive(Debug)]
pub struct SocketDiag(Mutex<Accounted<OwnedFd>>);

impl SocketDiag {
    /// Opens it in the calling thread's netns.
    pub fn open() -> io::Result<Self> {
        let socket = Accounted::new(netlink()?, 0, Kind::Netlink);
        Ok(Self(Mutex::new(socket)))
    }

    /// What holds these two ends. [`Held::Connection`] where the kernel can't say: the caller then
    /// takes another port.
    pub fn find(&self, local: SocketAddr, remote: SocketAddr) -> Held {
        self.ask(&request(local, remote))
            .unwrap_or(Held::Connection)
    }

    fn ask(&self, request: &[u8]) -> io::Result<Held> {
        // One question at a time: the next answer is this question's.
        let fd = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        send(fd.as_raw_fd(), request, MsgFlags::empty())?;
        let mut answer = [0; 1024];
        let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        Ok(held(&answer[..length]))
    }
}

/// The ports that TCP sockets of the calling thread's netns listen on, of both families. Walks
/// listeners only.
pub fn listening_ports() -> io::Result<Vec<u16>> {
    let fd = netlink()?;
    let mut ports = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        dump(&fd, &dump_of_listeners(family), |described, _| {
            ports.push(u16::from_be_bytes([described[4], described[5]]));
        })?;
    }
    Ok(ports)
}

/// Asks for many sockets; `each` gets what describes one (`struct inet_diag_msg`), and its attributes.
pub(super) fn dump(
    fd: &OwnedFd,
    question: &[u8],
    mut each: impl FnMut(&[u8; DESCRIPTION], &[u8]),
) -> io::Result<()> {
    send(fd.as_raw_fd(), question, MsgFlags::empty())?;
    let mut piece = vec![0; PIECE];
    // The kernel has the first piece ready when the question is sent, and each further one when it
    // is asked for: this waits for nothing.
    loop {
        let length = recv(fd.as_raw_fd(), &mut piece, MsgFlags::empty())?;
        if read_piece(&piece[..length], &mut each)? {
            return Ok(());
        }
    }
}

fn dump_of_listeners(family: libc::c_int) -> [u8; HEADER + REQUEST] {
    let mut bytes = [0; HEADER + REQUEST];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let length = u32::try_from(HEADER + REQUEST).unwrap_or(0);
    put(0, &length.to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    put(HEADER, &[u8::try_from(family).unwrap_or(0), IPPROTO_TCP]);
    put(HEADER + 4, &(1_u32 << TCP_LISTEN).to_ne_bytes());
    bytes
}

/// Gives away what a piece of a dump describes. Whether it was the last one.
fn read_piece(
    mut piece: &[u8],
    each: &mut impl FnMut(&[u8; DESCRIPTION], &[u8]),
) -> io::Result<bool> {
    while let Some((header, _)) = piece.split_first_chunk::<HEADER>() {
        let [l0, l1, l2, l3, k0, k1, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let message = piece
            .get(HEADER..length)
            .ok_or(io::ErrorKind::InvalidData)?;
        match u16::from_ne_bytes([k0, k1]) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message
                    .first_chunk()
                    .map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(io::Error::from_raw_os_error(-code));
            }
            _ => {
                if let Some((described, attributes)) = message.split_first_chunk() {
                    each(described, attributes);
                }
            }
        }
        // Messages begin at multiples of four.
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// A socket for questions about the calling thread's netns.
pub(super) fn netlink() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?)
}

/// How many bytes of memory wait at a connection's end to be read, asked by `fd` in its netns. None
/// where there is no such connection, or the kernel doesn't say.
pub(super) fn memory_to_read(fd: &OwnedFd, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    let mut question = request(local, remote);
    question[HEADER + 2] = 1 << (INET_DIAG_SKMEMINFO - 1);
    send(fd.as_raw_fd(), &question, MsgFlags::empty()).ok()?;
    let mut answer = [0; 1024];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).ok()?;
    let mut memory = None;
    let described = |described: &[u8; DESCRIPTION], attributes: &[u8]| {
        // The kernel answers with a listener where it finds no connection.
        if described[1] == TCP_LISTEN {
            return;
        }
        // The first of `enum sk_meminfo_vars` is what is received.
        let value = attribute(attributes, INET_DIAG_SKMEMINFO);
        memory = value.and_then(|value| Some(u32::from_ne_bytes(*value.first_chunk()?)));
    };
    read_piece(&answer[..length], &mut { described }).ok()?;
    memory
}

/// One of a socket's attributes (`struct nlattr`, which begin at multiples of four).
pub(super) fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(([l0, l1, k0, k1], rest)) = attributes.split_first_chunk() {
        let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let value = rest.get(..length.checked_sub(4)?)?;
        if u16::from_ne_bytes([*k0, *k1]) == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// The exact question: `struct nlmsghdr`, `struct inet_diag_req_v2`.
fn request(local: SocketAddr, remote: SocketAddr) -> [u8; HEADER + REQUEST] {
    let mut bytes = [0; HEADER + REQUEST];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let length = u32::try_from(HEADER + REQUEST).unwrap_or(0);
    put(0, &length.to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST.to_ne_bytes());
    let family = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    put(HEADER, &[u8::try_from(family).unwrap_or(0), IPPROTO_TCP]);
    put(HEADER + 4, &u32::MAX.to_ne_bytes());
    put(HEADER + 8, &local.port().to_be_bytes());
    put(HEADER + 10, &remote.port().to_be_bytes());
    put(HEADER + 12, &octets(local));
    put(HEADER + 28, &octets(remote));
    // No cookie: any socket.
    put(HEADER + 48, &[0xff; 8]);
    bytes
}

/// An address as the question has it: IPv4 in the first four of 16 bytes.
fn octets(address: SocketAddr) -> [u8; 16] {
    let octets = Address::from(address.ip()).octets();
    if !address.is_ipv4() {
        return octets;
    }
    let mut v4 = [0; 16];
    v4[..4].copy_from_slice(&octets[12..]);
    v4
}

/// What the answer describes; an error message says that there is no socket.
fn held(answer: &[u8]) -> Held {
    let kind = answer
        .get(4..6)
        .and_then(|kind| kind.try_into().ok())
        .map(u16::from_ne_bytes);
    if kind != Some(SOCK_DIAG_BY_FAMILY) {
        return Held::No;
    }
    match answer.get(HEADER + 1) {
        None | Some(&TCP_LISTEN) => Held::No,
        Some(&TCP_SYN_RECV) => Held::Answered,
        Some(&TCP_TIME_WAIT) => Held::TimeWait,
        Some(_) => Held::Connection,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn listeners_of_both_families_are_found_and_connections_are_not() {
        let many: Vec<_> = ["127.0.0.1:0", "[::1]:0", "[::]:0"]
            .into_iter()
            .cycle()
            .take(1200)
            .map(|address| TcpListener::bind(address).unwrap())
            .collect();
        let client = TcpStream::connect(many[0].local_addr().unwrap()).unwrap();
        let found = listening_ports().unwrap();
        for listener in &many {
            let port = listener.local_addr().unwrap().port();
            assert!(found.contains(&port), "{listener:?}");
        }
        assert!(!found.contains(&client.local_addr().unwrap().port()));
    }

    #[test]
    fn what_waits_to_be_read_is_known_by_its_memory() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let client = TcpStream::connect(server).unwrap();
            let (mut accepted, peer) = listener.accept().unwrap();
            let fd = netlink().unwrap();
            assert_eq!(memory_to_read(&fd, server, peer), Some(0), "{address}");
            (&client).write_all(&[1; 5000]).unwrap();
            accepted.peek(&mut [0]).unwrap();
            assert!(memory_to_read(&fd, server, peer) >= Some(5000));
            accepted.read_exact(&mut [0; 5000]).unwrap();
            assert_eq!(memory_to_read(&fd, server, peer), Some(0));
            let other = SocketAddr::new(server.ip(), 1);
            assert_eq!(memory_to_read(&fd, server, other), None);
        }
    }

    #[test]
    fn a_connection_is_found_by_both_ends_and_a_listener_is_none() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let diag = SocketDiag::open().unwrap();
            let client = TcpStream::connect(server).unwrap();
            let client_address = client.local_addr().unwrap();
            assert_eq!(
                diag.find(client_address, server),
                Held::Connection,
                "{address}"
            );
            assert_eq!(
                diag.find(server, client_address),
                Held::Connection,
                "{address}"
            );
            let other = SocketAddr::new(server.ip(), 1);
            assert_eq!(
                diag.find(server, other),
                Held::No,
                "{address}: only the listener"
            );
            // The side that closes first keeps TIME_WAIT.
            drop(client);
            drop(listener.accept().unwrap());
            assert_eq!(
                diag.find(client_address, server),
                Held::TimeWait,
                "{address}"
            );
        }
    }
}
