//! The options of a relayed connection's sockets, by what is at their other end.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    time::Duration,
};

use socket2::{SockRef, Socket, TcpKeepalive};

/// Keepalive: a peer that is gone is noticed within 40 s. No user time-out, which would cut a live peer
/// that merely doesn't read: the kernel counts answered window probes as well.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// What is at the other end of a relayed connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// An app of this kernel, over the pod's loopback.
    App,
    Network,
}

/// What every relayed leg has: no delay, and a reset as its end unless an orderly close takes that off. A
/// peer beyond the network has its death noticed.
///
/// An app's death is told by its kernel, which is this one: so nobody asks, unless no app has the other end
/// any more ([`notice_gone`]). The kernel asks for all whose time falls in the same half second or two at
/// once, and of thousands of idle connections a loopback's backlog (`net.core.netdev_max_backlog`, 1,000)
/// would drop what is beyond it, others' packets with theirs.
pub fn relay_options(socket: &Socket, leg: Leg) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    match leg {
        Leg::Network => ask_whether_alive(socket)?,
        // The plainest congestion control: there is no path to find out about, and BBR, where it is the
        // node's choice, would pace what is sent by a timer. Every kernel has it (net/ipv4/tcp_cong.c),
        // and without it the leg works as well.
        Leg::App => {
            let _ = socket.set_tcp_congestion(b"reno");
        }
    }
    socket.set_linger(Some(Duration::ZERO))
}

fn ask_whether_alive(socket: &impl AsFd) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(KEEPALIVE_RETRIES);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Asks whether an app is alive whose leg stands alone, by its descriptor and inode: the app has closed
/// its socket, which its kernel forgets (`net.ipv4.tcp_fin_timeout`) and tells only who asks, what the
/// kernel has told is lost, or the app is beyond another netns or a virtual machine. Whatever else has the
/// descriptor by now is left as it is.
///
/// It is for the ledger's look to find such legs, since most connections end before it.
pub fn notice_gone(descriptor: RawFd, inode: u32) {
    // SAFETY: a call without memory. Where nothing is open under the number, it fails.
    let copy = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return;
    }
    // SAFETY: the call has just made it, for nobody else.
    let copy = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    if copy.metadata().is_ok_and(|is| is.ino() == u64::from(inode)) {
        // Fails only for a socket that is gone already.
        let _ = ask_whether_alive(&copy);
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
