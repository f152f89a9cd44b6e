//! How bytes reach an app's socket.

use std::{
    io, mem,
    net::Shutdown,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

use super::{
    buffers::Buffers,
    readiness::{Exhausted, poll_call},
};
use crate::steer::{Credit, Join};

/// What writes to a socket.
pub(super) struct Writer<'a> {
    socket: &'a TcpStream,
    /// None: it takes whatever TCP takes.
    credit: Option<Box<Allowance<'a>>>,
    /// Nothing was written yet.
    is_new: bool,
}

/// What a socket takes.
enum Allowance<'a> {
    Credit(Credit),
    /// There is none, which is waited for.
    Nothing(Pin<Box<dyn Future<Output = Credit> + 'a>>),
}

impl<'a> Writer<'a> {
    pub(super) fn new(socket: &'a TcpStream, buffers: &Buffers) -> Self {
        let credit = buffers.credit().map(Allowance::Credit);
        Self {
            socket,
            credit: credit.map(Box::new),
            is_new: true,
        }
    }

    pub(super) fn socket(&self) -> &'a TcpStream {
        self.socket
    }

    /// Writes what the socket takes of some bytes; none of them only where there are none. Behind what
    /// `is_last`, the socket is to be shut down.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        is_last: bool,
    ) -> Poll<io::Result<usize>> {
        let (socket, is_new) = (self.socket, &mut self.is_new);
        let Some(allowance) = &mut self.credit else {
            return poll_send(cx, socket, is_new, bytes, is_last, true);
        };
        loop {
            let credit = match &mut **allowance {
                Allowance::Credit(credit) => credit,
                Allowance::Nothing(renewed) => {
                    **allowance = Allowance::Credit(ready!(renewed.as_mut().poll(cx)));
                    continue;
                }
            };
            let most = credit.left().min(bytes.len());
            if most > 0 || bytes.is_empty() {
                let by_tcp = credit.is_by_tcp();
                // Where it may be redirected, its end can't go with it.
                let is_last = is_last && by_tcp;
                match ready!(poll_send(
                    cx,
                    socket,
                    is_new,
                    &bytes[..most],
                    is_last,
                    by_tcp
                )) {
                    Ok(written) => {
                        credit.wrote(written, most);
                        return Poll::Ready(Ok(written));
                    }
                    Err(error) if !credit.outlives(&error) => return Poll::Ready(Err(error)),
                    Err(_) => continue,
                }
            }
            let mut credit = credit.clone();
            **allowance = Allowance::Nothing(Box::pin(async move {
                credit.renew(socket).await;
                credit
            }));
        }
    }

    /// Told of each chunk from `reader` that was written as a whole, by which the apps behind both sockets
    /// may be joined. Gives what it goes by, if that is new.
    pub(super) fn moved(&mut self, reader: &TcpStream) -> Option<Rc<Join>> {
        match self.credit.as_deref_mut()? {
            Allowance::Credit(credit) => credit.moved(reader, self.socket),
            Allowance::Nothing(_) => None,
        }
    }

    /// Sends a FIN behind all that was written. Fails when that side is gone already.
    pub(super) fn shut_down(&self) -> io::Result<()> {
        SockRef::from(self.socket).shutdown(Shutdown::Write)
    }
}

/// Sends what the socket takes. What doesn't go `by_tcp` for certain may be redirected.
fn poll_send(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    is_new: &mut bool,
    bytes: &[u8],
    is_last: bool,
    by_tcp: bool,
) -> Poll<io::Result<usize>> {
    // The kernel keeps what is last until the socket is shut down, which must follow: it waits for
    // 200 ms at most (tcp(7), `TCP_CORK`). So the end goes with it in one packet.
    let flags = if is_last { libc::MSG_MORE } else { 0 };
    let send = || SockRef::from(socket).send_with_flags(bytes, flags);
    if mem::take(is_new) {
        // The event loop may not have told of the socket yet.
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return Poll::Ready(done),
        }
    }
    // A write that was cut short for want of memory where it was redirected has nothing on its way
    // that an event would tell of.
    let exhausted = if by_tcp && !is_last {
        Exhausted::ByShort { of: bytes.len() }
    } else {
        Exhausted::BySaying
    };
    poll_call(cx, socket, Interest::WRITABLE, exhausted, send)
}
