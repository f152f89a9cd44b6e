//! How bytes reach an app's socket.

use std::{
    io, mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, Interest},
    net::tcp::WriteHalf,
};

use super::buffers::Buffers;
use crate::steer::Credit;

/// The half of a socket that is written to.
pub(super) struct Writer<'a> {
    half: WriteHalf<'a>,
    /// None: it takes whatever TCP takes.
    credit: Option<Box<Credit>>,
    /// Nothing was written yet.
    is_new: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn new(half: WriteHalf<'a>, buffers: &Buffers) -> Self {
        Self {
            half,
            credit: buffers.credit().map(Box::new),
            is_new: true,
        }
    }

    /// Writes what the socket takes of some bytes. None of them: there is no credit, which
    /// [`Self::renew`] waits for. Behind what `is_last`, the socket is to be shut down.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        is_last: bool,
    ) -> Poll<io::Result<usize>> {
        let Some(credit) = &mut self.credit else {
            return self.poll_send(cx, bytes, is_last);
        };
        let most = credit.left().min(bytes.len());
        if most == 0 {
            return Poll::Ready(Ok(0));
        }
        // Where it may be redirected, its end can't go with it.
        let is_last = is_last && credit.is_by_tcp();
        let written = ready!(self.poll_send(cx, &bytes[..most], is_last));
        let Some(credit) = &mut self.credit else {
            return Poll::Ready(written);
        };
        Poll::Ready(match written {
            Ok(written) => {
                credit.wrote(written, most);
                Ok(written)
            }
            Err(error) if !credit.outlives(&error) => Err(error),
            Err(_) => Ok(0),
        })
    }

    /// Waits until there is credit.
    pub(super) async fn renew(&mut self) {
        if let Some(credit) = &mut self.credit
            && credit.left() == 0
        {
            Box::pin(credit.renew(self.half.as_ref())).await;
        }
    }

    /// Sends a FIN behind all that was written. Fails when that side is gone already.
    pub(super) async fn shut_down(&mut self) -> io::Result<()> {
        self.half.shutdown().await
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        is_last: bool,
    ) -> Poll<io::Result<usize>> {
        // The kernel keeps what is last until the socket is shut down, which must follow: it waits for
        // 200 ms at most (tcp(7), `TCP_CORK`). So the end goes with it in one packet.
        let flags = if is_last { libc::MSG_MORE } else { 0 };
        let socket = self.half.as_ref();
        let send = || SockRef::from(socket).send_with_flags(bytes, flags);
        if mem::take(&mut self.is_new) {
            // The event loop may not have told of the socket yet.
            match send() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
        if self.credit.as_ref().is_none_or(|credit| credit.is_by_tcp()) && !is_last {
            return Pin::new(&mut self.half).poll_write(cx, bytes);
        }
        // Waits only when the kernel has said that there is no room. tokio's own write waits after one
        // that was cut short, as for want of memory where it was redirected: no event tells of its
        // end, since nothing is on its way.
        loop {
            ready!(socket.poll_write_ready(cx))?;
            match socket.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }
}
