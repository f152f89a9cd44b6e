//! Moving bytes between two ends, byte-exact, until both directions have ended.
//!
//! Back-pressure goes end to end: nothing is read that the other side can't take, but for one
//! chunk. A FIN is passed on as the end of that direction while the other flows on; a reset is
//! passed on as a reset, at once, whether or not the other side reads. An idle connection holds no buffer: chunks are read into a buffer of the
//! worker, and only what the other side didn't take at once is kept.

mod ends;
mod joined;
mod tunnelled;

use std::{
    cell::{Cell, OnceCell},
    future::poll_fn,
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use malla_common::Reason;
use tokio::{net::TcpStream, sync::Notify};

use super::{
    activity::Activity,
    buffers::{Buffers, Moved, Moving, Pace, Then},
    record::Record,
    writer::Writer,
};
use crate::{steer::end_orderly, telemetry::Failure};
pub(super) use ends::{End, Side, reset_behind};
use ends::{over, reset_of};
use joined::Joined;
pub(super) use joined::JoinedConnections;
pub(super) use tunnelled::Tunnelled;

/// Relays between two sockets, for the pod of each record. What was read from the client already, it
/// has `said`. With records of both ends, both apps are this agent's, and it may leave the bytes to the
/// kernel. The records are whole when this has ended, and when it was dropped, but for what the kernel moves at
/// that moment.
pub(super) async fn tcp(
    buffers: &Buffers,
    records: &[&Record],
    client: &TcpStream,
    said: Bytes,
    server: &TcpStream,
    idle: Option<Duration>,
) -> Result<(), End> {
    let relay = Relay::new(buffers, records, idle);
    {
        let (up_ended, down_ended) = (Notify::new(), Notify::new());
        let up = pin!(async {
            relay.copy(Side::Client, client, server, said).await?;
            up_ended.notify_one();
            Box::pin(relay.watch(client, Side::Client, down_ended.notified())).await
        });
        let down = pin!(async {
            relay
                .copy(Side::Server, server, client, Bytes::new())
                .await?;
            down_ended.notify_one();
            Box::pin(relay.watch(server, Side::Server, up_ended.notified())).await
        });
        relay.both(up, down).await?;
    }
    end_orderly(client);
    end_orderly(server);
    Ok(())
}

/// Relays what the server says, while `asking` sends it what it may hear. Ends when the server does,
/// or with a failure of either.
pub(super) async fn answers(
    buffers: &Buffers,
    record: &Record,
    server: &TcpStream,
    client: &TcpStream,
    asking: impl Future<Output = Result<(), Failure>>,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let records = [record];
    let relay = Relay::new(buffers, &records, idle);
    tokio::select! {
        biased;
        answered = relay.copy(Side::Server, server, client, Bytes::new()) => answered.map_err(Failure::from),
        Err(failure) = asking => Err(failure),
        () = poll_fn(|cx| relay.activity.poll_ends(cx)) => Err(Reason::IdleTimeout.into()),
    }
}

/// What both directions of one connection share.
struct Relay<'a> {
    buffers: &'a Buffers,
    records: &'a [&'a Record],
    activity: Activity,
    /// The sides whose end has been read and passed on.
    passed_on: [Cell<bool>; 2],
    /// An app that had said all was found gone.
    has_lost: Cell<bool>,
    /// What the kernel moves, once it does.
    joined: OnceCell<Rc<Joined>>,
}

impl<'a> Relay<'a> {
    fn new(buffers: &'a Buffers, records: &'a [&'a Record], idle: Option<Duration>) -> Self {
        Self {
            buffers,
            records,
            activity: Activity::new(idle),
            passed_on: [Cell::new(false), Cell::new(false)],
            has_lost: Cell::new(false),
            joined: OnceCell::new(),
        }
    }

    /// Runs two directions until both have ended, one has failed, an app is gone that had said all, or
    /// nothing has moved for too long.
    /// In a fifth of the room that `try_join` in a `select` takes.
    fn both(
        &self,
        first: Pin<&mut impl Future<Output = Result<(), End>>>,
        second: Pin<&mut impl Future<Output = Result<(), End>>>,
    ) -> impl Future<Output = Result<(), End>> {
        let (mut first, mut second) = (Some(first), Some(second));
        let mut second_first = false;
        poll_fn(move |cx| {
            let mut ended = true;
            if second_first {
                ended &= has_ended(&mut second, cx)?;
            }
            ended &= has_ended(&mut first, cx)?;
            if !second_first {
                ended &= has_ended(&mut second, cx)?;
            }
            // So that one that always has something to move leaves the other its share.
            second_first = !second_first;
            if ended || self.has_lost.get() {
                return Poll::Ready(Ok(()));
            }
            self.poll_idle(cx).map(|()| Err(End::Idle))
        })
    }

    /// Ready when nothing has moved for too long, be it by the kernel. Counts what that has told of.
    fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(joined) = self.joined.get() else {
            return self.activity.poll_ends(cx);
        };
        joined.watch(cx);
        loop {
            if self.count(joined) {
                self.activity.happened();
            }
            ready!(self.activity.poll_ends(cx));
            if !joined.look() {
                return Poll::Ready(());
            }
        }
    }

    /// Counts what the kernel has told of. Whether there was any.
    fn count(&self, joined: &Joined) -> bool {
        let mut any = false;
        for side in [Side::Client, Side::Server] {
            let bytes = joined.take(side);
            if bytes > 0 {
                side.sent(self.records, bytes);
                any = true;
            }
        }
        any
    }

    /// A chunk of what `side` says was moved as a whole: the kernel may take over.
    fn moved(&self, side: Side, reader: &TcpStream, writer: &mut Writer<'_>) {
        let are_both_ours = self.records.len() > 1;
        if are_both_ours && let Some(join) = writer.moved(reader) {
            let rests = !self.activity.is_limited();
            let joined = self.joined.get_or_init(|| self.buffers.joined.add(rests));
            joined.set(side, join);
        }
    }

    /// Moves what `side` has `said` and goes on to send to the other socket.
    async fn copy(
        &self,
        side: Side,
        reader: &TcpStream,
        writer: &TcpStream,
        mut said: Bytes,
    ) -> Result<(), End> {
        let mut pace = Pace::default();
        let mut writer = Writer::new(writer, self.buffers);
        if !said.is_empty() {
            let bytes = said.len();
            let written = self.write(&mut writer, &mut said, false).await;
            written.map_err(|error| side.other().failed(error))?;
            side.sent(self.records, bytes);
        }
        loop {
            let moving = poll_fn(|cx| self.buffers.poll_move(cx, &mut pace, reader, &mut writer));
            let moved = moving.await.map_err(|failure| match failure {
                Moving::Read(error) => side.failed(error),
                Moving::Write(error) => side.other().failed(error),
            })?;
            let Moved {
                bytes,
                mut rest,
                then,
            } = moved;
            if !rest.is_empty() {
                let is_last = matches!(then, Then::End);
                tokio::select! {
                    biased;
                    written = self.write(&mut writer, &mut rest, is_last) => {
                        written.map_err(|error| side.other().failed(error))?;
                    }
                    end = Box::pin(reset_of(reader, side)) => return Err(end),
                }
            }
            side.sent(self.records, bytes);
            self.activity.happened();
            match then {
                Then::More => {
                    self.moved(side, reader, &mut writer);
                    pace.rest(bytes).await;
                }
                Then::End => {
                    self.passed_on(side).set(true);
                    self.end(side.other(), &mut writer);
                    return Ok(());
                }
                Then::Failed(error) => return Err(side.failed(error)),
            }
        }
    }

    /// Watches a socket that has said all it had to say: until the other direction has ended, only a reset
    /// can still come from it, or its app be found gone.
    async fn watch(
        &self,
        socket: &TcpStream,
        side: Side,
        other_ended: impl Future<Output = ()>,
    ) -> Result<(), End> {
        tokio::select! {
            biased;
            () = other_ended => Ok(()),
            is_over = over(socket, side) => {
                self.has_lost.set(is_over.is_ok());
                is_over
            }
        }
    }

    /// Whether the end of what this `side` says has been read and passed on.
    fn passed_on(&self, side: Side) -> &Cell<bool> {
        &self.passed_on[side.index()]
    }

    /// Ends what is said to this `side`. Where that was the other direction's, its socket is closed next,
    /// which tells it as much, with a call less and without an event that nobody waits for.
    fn end(&self, side: Side, writer: &mut Writer<'_>) {
        if !self.passed_on(side).get() {
            // Fails when that side is gone already, which its own reader notices.
            let _ = writer.shut_down();
        }
    }

    /// Writes all of `bytes`. Behind what `is_last`, the socket is to be shut down.
    fn write(
        &self,
        writer: &mut Writer<'_>,
        bytes: &mut Bytes,
        is_last: bool,
    ) -> impl Future<Output = io::Result<()>> {
        poll_fn(move |cx| poll_write_all(cx, writer, bytes, is_last, &self.activity))
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if let Some(joined) = self.joined.get() {
            joined.look();
            self.count(joined);
        }
    }
}

/// Writes all of `bytes`; each part of it is activity. Behind what `is_last`, the socket is to be shut
/// down.
fn poll_write_all(
    cx: &mut Context<'_>,
    writer: &mut Writer<'_>,
    bytes: &mut Bytes,
    is_last: bool,
    activity: &Activity,
) -> Poll<io::Result<()>> {
    while !bytes.is_empty() {
        bytes.advance(ready!(writer.poll_write(cx, bytes, is_last))?);
        activity.happened();
    }
    Poll::Ready(Ok(()))
}

/// Polls a direction unless it has ended before.
fn has_ended(
    direction: &mut Option<Pin<&mut impl Future<Output = Result<(), End>>>>,
    cx: &mut Context<'_>,
) -> Result<bool, End> {
    if let Some(running) = direction {
        match running.as_mut().poll(cx) {
            Poll::Ready(ended) => ended?,
            Poll::Pending => return Ok(false),
        }
        *direction = None;
    }
    Ok(true)
}
