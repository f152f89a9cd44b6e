//! The options of a relayed connection's sockets, by what is at their other end.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use nix::errno::Errno;
use socket2::Socket;

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

/// From now on. To set the times of a socket that is asked for already would have the kernel ask again at once,
/// and count it as one more probe without an answer (net/ipv4/tcp.c, `tcp_sock_set_keepidle_locked`).
fn ask_whether_alive(socket: &impl AsRawFd) -> io::Result<()> {
    let times = [
        (libc::TCP_KEEPIDLE, KEEPALIVE_SECONDS),
        (libc::TCP_KEEPINTVL, KEEPALIVE_SECONDS),
        (libc::TCP_KEEPCNT, KEEPALIVE_RETRIES),
    ];
    for (name, value) in times {
        set_option(socket, libc::IPPROTO_TCP, name, value)?;
    }
    set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
}

/// Asks whether an app is alive whose leg seems to stand alone, by the leg's descriptor: the app has closed its
/// socket, which its kernel forgets (`net.ipv4.tcp_fin_timeout`) and tells only who asks, what the kernel has
/// told is lost, or the app is beyond another netns or a virtual machine. Asked once, the kernel goes on asking.
/// Needs no descriptor, since who has none is in most need of it. Whatever else has the number by now takes no
/// harm: another TCP socket is asked for as well, and nothing else has these options.
///
/// It is for the ledger's look to find such legs, since most connections end before it.
pub fn notice_gone(leg: RawFd) {
    // SAFETY: an integer.
    let is_asked = unsafe { option::<i32>(&leg, libc::SOL_SOCKET, libc::SO_KEEPALIVE) };
    if is_asked.is_ok_and(|is_asked| is_asked == 0) {
        // Fails only for a socket that is gone already.
        let _ = ask_whether_alive(&leg);
    }
}

/// Has the kernel tell once more of what waits in a socket, if anything does (net/ipv4/tcp.c,
/// `tcp_set_rcvlowat`). The option keeps the value that every socket has; nothing else takes harm.
pub fn tell_again(socket: RawFd) {
    // Fails only for what is no TCP socket, or none any more.
    let _ = set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1);
}

/// Whether a socket has failed because a question of keepalive had no answer but a reset, or none: nobody has
/// its other end any more. An app's own reset finds no question open, since a live kernel answers at once.
pub fn was_found_gone(socket: &impl AsRawFd) -> bool {
    // SAFETY: integers, of which the kernel fills those that it knows.
    let info = unsafe { option::<libc::tcp_info>(socket, libc::IPPROTO_TCP, libc::TCP_INFO) };
    // Probes of a full window are counted as well, behind which bytes wait.
    info.is_ok_and(|info| info.tcpi_probes > 0 && info.tcpi_notsent_bytes == 0)
}

/// Sets an integer option that socket2 has no method for.
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value lives across the call and has the length that is passed.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length_of::<i32>(),
        )
    };
    Errno::result(answer)?;
    Ok(())
}

/// Reads an option, zero where the kernel says nothing of it.
///
/// # Safety
///
/// All bytes are a valid `T`.
unsafe fn option<T>(socket: &impl AsRawFd, level: i32, name: i32) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = length_of::<T>();
    // SAFETY: both live across the call, which writes at most the length that is passed.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(answer)?;
    // SAFETY: the caller's.
    Ok(unsafe { value.assume_init() })
}

#[expect(clippy::cast_possible_truncation, reason = "no option is that long")]
const fn length_of<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}
