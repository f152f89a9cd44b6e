//! What an app says before its way to the server is open. It goes with the CONNECT, so that the first
//! answer on a new connection takes one round trip of the network, where TCP without a mesh takes two.
//!
//! It is kept until the peer has answered. A peer that is known to have done nothing with it leaves it
//! to another; where that isn't known, the server may have heard it, and it isn't said a second time.

use std::{
    cell::{Cell, RefCell},
    io,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::SendStream;
use malla_common::Reason;
use tokio::net::TcpStream;

use super::buffers::{Buffers, Pace, Then};
use crate::telemetry::Failure;

/// The first chunk that the app of one connection has sent.
pub(super) struct OptimisticData<'a> {
    buffers: &'a Buffers,
    client: &'a TcpStream,
    kept: RefCell<Bytes>,
    /// What comes behind it. None: it hasn't been read.
    then: RefCell<Option<Then>>,
    at_peer: Cell<bool>,
}

impl<'a> OptimisticData<'a> {
    /// Of a connection that has just been accepted. A client that speaks first has nearly always spoken
    /// by then, and is heard without the event loop.
    pub(super) fn of(client: &'a TcpStream, buffers: &'a Buffers) -> Self {
        let read = buffers.read_at_once(client);
        let data = Self {
            buffers,
            client,
            kept: RefCell::default(),
            then: RefCell::default(),
            at_peer: Cell::new(false),
        };
        if let Some(read) = read {
            data.keep(read);
        }
        data
    }

    fn keep(&self, read: io::Result<(Bytes, Then)>) {
        let then = match read {
            Ok((said, then)) => {
                self.kept.replace(said);
                then
            }
            Err(error) => Then::Failed(error),
        };
        self.then.replace(Some(then));
    }

    /// Ready when the app has said something, or has reset its connection; never for one that ends
    /// without a word.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.then.borrow().is_none() {
            let mut pace = Pace::default();
            self.keep(ready!(self.buffers.poll_read(cx, &mut pace, self.client)));
        }
        if self.kept.borrow().is_empty() && self.failure().is_none() {
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Sends what was taken from the app, with its end where that came with it, unless the peer has it.
    /// A stream that has ended takes nothing, which its answer or what it carries tells.
    pub(super) fn send(&self, stream: &mut SendStream<Bytes>) {
        let kept = self.kept();
        if kept.is_empty() || self.at_peer.get() {
            return;
        }
        if stream.send_data(kept, self.ends()).is_ok() {
            self.at_peer.set(true);
        }
    }

    /// How the app's connection was reset behind what was taken, which the socket doesn't tell again.
    pub(super) fn failure(&self) -> Option<Failure> {
        match &*self.then.borrow() {
            Some(Then::Failed(error)) => Some(Failure::new(Reason::ClientReset, error)),
            _ => None,
        }
    }

    /// Whether the app's end comes behind what was taken from it.
    pub(super) fn ends(&self) -> bool {
        matches!(*self.then.borrow(), Some(Then::End))
    }

    /// Of an app that has reset its connection already, no server hears.
    pub(super) fn fail_if_reset(&self) -> Result<(), Failure> {
        self.failure().map_or(Ok(()), Err)
    }

    /// The peer is known to have given it to nobody.
    pub(super) fn came_back(&self) {
        self.at_peer.set(false);
    }

    /// Whether a server may have heard it.
    pub(super) fn is_at_peer(&self) -> bool {
        self.at_peer.get()
    }

    /// Whether no other way to the server is worth a try: it may have heard the app already, or the
    /// app is gone.
    pub(super) fn allows_no_other_try(&self) -> bool {
        self.at_peer.get() || self.failure().is_some()
    }

    /// What was taken from the app.
    pub(super) fn kept(&self) -> Bytes {
        self.kept.borrow().clone()
    }
}
