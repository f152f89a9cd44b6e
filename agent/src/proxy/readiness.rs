//! Calls of a socket when the event loop has said that it is ready.

use std::{
    io::{self, ErrorKind},
    task::{Context, Poll, ready},
};

use tokio::{io::Interest, net::TcpStream};

/// When a socket that has been read or written isn't ready any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exhausted {
    /// After a call that moved fewer bytes than asked for: there are no more, and to ask would be one
    /// call more. True of TCP, where an event tells of what comes next.
    ByShort { of: usize },
    /// Only when the kernel has said so.
    BySaying,
}

/// Makes one call that reads (`Interest::READABLE`) or writes, once it can be made.
pub(super) fn poll_call(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    interest: Interest,
    exhausted: Exhausted,
    mut call: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    let short_of = match exhausted {
        Exhausted::ByShort { of } => of,
        Exhausted::BySaying => 0,
    };
    loop {
        ready!(if interest.is_readable() {
            socket.poll_read_ready(cx)
        } else {
            socket.poll_write_ready(cx)
        })?;
        let mut short = None;
        // That it would block is what takes its readiness away, unless an event has come since.
        let done = socket.try_io(interest, || match call() {
            Ok(moved) if (1..short_of).contains(&moved) => {
                short = Some(moved);
                Err(ErrorKind::WouldBlock.into())
            }
            done => done,
        });
        match (short, done) {
            (Some(moved), _) => return Poll::Ready(Ok(moved)),
            (None, Err(error)) if error.kind() == ErrorKind::WouldBlock => {}
            (None, done) => return Poll::Ready(done),
        }
    }
}
