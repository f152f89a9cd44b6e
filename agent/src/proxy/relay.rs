//! Moving bytes between two ends, byte-exact, until both directions have ended.
//!
//! Back-pressure goes end to end: nothing is read that the other side can't take, but for one
//! chunk. A FIN is passed on as the end of that direction while the other flows on; a reset is
//! passed on as a reset, at once, whether or not the other side reads. An idle connection holds no buffer: chunks are read into a buffer of the
//! worker, and only what the other side didn't take at once is kept.

mod ends;

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream};
use malla_common::Reason;
use tokio::{
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Notify,
};

use super::{
    activity::Activity,
    buffers::{Buffers, Moved, Moving, Pace, Then},
    record::Record,
    writer::Writer,
};
use crate::{steer::end_orderly, telemetry::Failure};
pub(super) use ends::{End, Side, reset_behind};
use ends::{Receiving, no_reset, poll_reset, reset_of, stream_ended};

/// Relays between two sockets, for the pod of each record. What was read from the client already, it
/// has `said`.
pub(super) async fn tcp(
    buffers: &Buffers,
    records: &[&Record],
    client: &mut TcpStream,
    said: Bytes,
    server: &mut TcpStream,
    idle: Option<Duration>,
) -> Result<(), End> {
    let relay = Relay::new(buffers, records, idle);
    {
        let (client_reader, client_writer) = client.split();
        let (server_reader, server_writer) = server.split();
        let (up_ended, down_ended) = (Notify::new(), Notify::new());
        let up = pin!(async {
            let mut reader = client_reader;
            relay
                .copy(Side::Client, &mut reader, server_writer, said)
                .await?;
            up_ended.notify_one();
            Box::pin(no_reset(&reader, Side::Client, down_ended.notified())).await
        });
        let down = pin!(async {
            let mut reader = server_reader;
            relay
                .copy(Side::Server, &mut reader, client_writer, Bytes::new())
                .await?;
            down_ended.notify_one();
            Box::pin(no_reset(&reader, Side::Server, up_ended.notified())).await
        });
        relay.both(up, down, Order::InTurns).await?;
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
    server: &mut ReadHalf<'_>,
    client: WriteHalf<'_>,
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

/// Relays between a socket, which is this `side` of the connection, and a stream of a tunnel, of which
/// the `first` bytes were read already.
pub(super) async fn tunnel(
    buffers: &Buffers,
    record: &Record,
    side: Side,
    socket: &mut TcpStream,
    (send, receive): (&mut SendStream<Bytes>, &mut RecvStream),
    first: Option<Box<Bytes>>,
    idle: Option<Duration>,
) -> Result<(), End> {
    let records = [record];
    let relay = Relay::new(buffers, &records, idle);
    let result = {
        let (mut reader, writer) = socket.split();
        let receiving = Cell::new(Receiving::Flows);
        let down = pin!(relay.stream_to_socket(side, writer, receive, first, &receiving));
        let up = pin!(async {
            relay
                .socket_to_stream(side, &mut reader, send, &receiving)
                .await?;
            // Polled after the other direction, so it hears of its end without being woken.
            let down_ended = poll_fn(|_| match receiving.get() {
                Receiving::Ended => Poll::Ready(()),
                Receiving::Flows | Receiving::Stalls => Poll::Pending,
            });
            tokio::select! {
                biased;
                ended = Box::pin(no_reset(&reader, side, down_ended)) => ended,
                ended = poll_fn(|cx| poll_reset(cx, send, side, &receiving)) => ended,
            }
        });
        // What came before a reset is written before the reset is heard of.
        relay.both(down, up, Order::FirstFirst).await
    };
    if result.is_ok() {
        end_orderly(socket);
    } else {
        // The other way round is what the socket's linger brings about when it is dropped.
        reset_behind(send).await;
    }
    result
}

/// What both directions of one connection share.
struct Relay<'a> {
    buffers: &'a Buffers,
    records: &'a [&'a Record],
    activity: Activity,
    /// The sides whose end has been read and passed on.
    passed_on: [Cell<bool>; 2],
}

/// Which of two directions is polled first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    FirstFirst,
    /// So that one that always has something to move leaves the other its share.
    InTurns,
}

impl<'a> Relay<'a> {
    fn new(buffers: &'a Buffers, records: &'a [&'a Record], idle: Option<Duration>) -> Self {
        Self {
            buffers,
            records,
            activity: Activity::new(idle),
            passed_on: [Cell::new(false), Cell::new(false)],
        }
    }

    /// Runs two directions until both have ended, one has failed, or nothing has moved for too long.
    /// In a fifth of the room that `try_join` in a `select` takes.
    fn both(
        &self,
        first: Pin<&mut impl Future<Output = Result<(), End>>>,
        second: Pin<&mut impl Future<Output = Result<(), End>>>,
        order: Order,
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
            second_first ^= order == Order::InTurns;
            if ended {
                return Poll::Ready(Ok(()));
            }
            self.activity.poll_ends(cx).map(|()| Err(End::Idle))
        })
    }

    /// Moves what `side` has `said` and goes on to send to the other socket.
    async fn copy(
        &self,
        side: Side,
        reader: &mut ReadHalf<'_>,
        writer: WriteHalf<'_>,
        mut said: Bytes,
    ) -> Result<(), End> {
        let mut pace = Pace::default();
        let mut writer = Writer::new(writer, self.buffers);
        if !said.is_empty() {
            let bytes = said.len();
            let written = Box::pin(self.write(&mut writer, &mut said, false)).await;
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
                Then::More => pace.rest(bytes).await,
                Then::End => {
                    self.passed_on(side).set(true);
                    self.end(side.other(), &mut writer).await;
                    return Ok(());
                }
                Then::Failed(error) => return Err(side.failed(error)),
            }
        }
    }

    /// Whether the end of what this `side` says has been read and passed on.
    fn passed_on(&self, side: Side) -> &Cell<bool> {
        &self.passed_on[usize::from(side == Side::Server)]
    }

    /// Ends what is said to this `side`. Where that was the other direction's, its socket is closed next,
    /// which tells it as much, with a call less and without an event that nobody waits for.
    async fn end(&self, side: Side, writer: &mut Writer<'_>) {
        if !self.passed_on(side).get() {
            // Fails when that side is gone already, which its own reader notices.
            let _ = writer.shut_down().await;
        }
    }

    /// Moves what the socket, which is this `side`, sends into the tunnel.
    async fn socket_to_stream(
        &self,
        side: Side,
        reader: &mut ReadHalf<'_>,
        send: &mut SendStream<Bytes>,
        receiving: &Cell<Receiving>,
    ) -> Result<(), End> {
        let mut pace = Pace::default();
        loop {
            let read = poll_fn(|cx| {
                if let Poll::Ready(read) = self.buffers.poll_read(cx, &mut pace, reader) {
                    return Poll::Ready(Ok(read));
                }
                poll_reset(cx, send, side, receiving).map(Err)
            });
            let (mut chunk, then) = match read.await {
                Ok(read) => read.map_err(|error| side.failed(error))?,
                Err(ended) => return ended,
            };
            let is_last = matches!(then, Then::End);
            if chunk.is_empty() {
                // Refused only by a stream that has ended, which `stream_to_socket` notices.
                let _ = send.send_data(chunk, true);
                self.passed_on(side).set(true);
                return Ok(());
            }
            let bytes = chunk.len();
            while !chunk.is_empty() {
                send.reserve_capacity(chunk.len());
                if send.capacity() == 0 {
                    let capacity = tokio::select! {
                        biased;
                        capacity = poll_fn(|cx| send.poll_capacity(cx)) => capacity,
                        end = Box::pin(reset_of(reader, side)) => return Err(end),
                    };
                    match capacity {
                        Some(Ok(_)) => self.activity.happened(),
                        Some(Err(error)) => return stream_ended(&error, side.other()),
                        // It isn't open for sending any more, for a reason that reading it tells.
                        None => return Ok(()),
                    }
                }
                let part = chunk.split_to(send.capacity().min(chunk.len()));
                if let Err(error) = send.send_data(part, is_last && chunk.is_empty()) {
                    return stream_ended(&error, side.other());
                }
            }
            side.sent(self.records, bytes);
            self.activity.happened();
            match then {
                Then::More => pace.rest(bytes).await,
                Then::End => {
                    self.passed_on(side).set(true);
                    return Ok(());
                }
                Then::Failed(error) => return Err(side.failed(error)),
            }
        }
    }

    /// Moves what comes out of the tunnel to the socket, which is this `side`.
    async fn stream_to_socket(
        &self,
        side: Side,
        writer: WriteHalf<'_>,
        receive: &mut RecvStream,
        mut first: Option<Box<Bytes>>,
        receiving: &Cell<Receiving>,
    ) -> Result<(), End> {
        let mut pace = Pace::default();
        let mut writer = Writer::new(writer, self.buffers);
        loop {
            // What the socket takes at once, as nearly always all of it, needs no room in the task.
            let received = poll_fn(|cx| {
                let received = match first.take() {
                    Some(first) => Some(Ok(*first)),
                    None => ready!(receive.poll_data(cx)),
                };
                Poll::Ready(received.map(|chunk| {
                    let mut rest = chunk?;
                    let (bytes, is_last) = (rest.len(), receive.is_end_stream());
                    let written = self.poll_write(cx, &mut writer, &mut rest, is_last);
                    Ok((bytes, is_last, rest, written))
                }))
            });
            let (bytes, is_last, mut rest, written) = match received.await {
                Some(Ok(received)) => received,
                Some(Err(error)) => {
                    stream_ended(&error, side.other())?;
                    break;
                }
                None => break,
            };
            if let Poll::Ready(Err(error)) = written {
                return Err(side.failed(error));
            }
            if !rest.is_empty() {
                receiving.set(Receiving::Stalls);
                Box::pin(self.write(&mut writer, &mut rest, is_last))
                    .await
                    .map_err(|error| side.failed(error))?;
                receiving.set(Receiving::Flows);
            }
            // Fails only for a stream that has ended, which the next read tells.
            let _ = receive.flow_control().release_capacity(bytes);
            side.other().sent(self.records, bytes);
            self.activity.happened();
            // What was last waits in the kernel for the end.
            if !is_last {
                pace.rest(bytes).await;
            }
        }
        self.end(side, &mut writer).await;
        receiving.set(Receiving::Ended);
        Ok(())
    }

    /// Writes all of `bytes`. Behind what `is_last`, the socket is to be shut down.
    async fn write(
        &self,
        writer: &mut Writer<'_>,
        bytes: &mut Bytes,
        is_last: bool,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            writer.renew().await;
            poll_fn(|cx| self.poll_write(cx, writer, bytes, is_last)).await?;
        }
        Ok(())
    }

    /// Writes of `bytes` what there is credit for; each part of it is activity.
    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        writer: &mut Writer<'_>,
        bytes: &mut Bytes,
        is_last: bool,
    ) -> Poll<io::Result<()>> {
        while !bytes.is_empty() {
            let written = ready!(writer.poll_write(cx, bytes, is_last))?;
            if written == 0 {
                break;
            }
            bytes.advance(written);
            self.activity.happened();
        }
        Poll::Ready(Ok(()))
    }
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
