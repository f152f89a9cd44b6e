//! The relay between an app's socket and a stream of a tunnel, as a state machine: what is kept of a
//! connection at rest is this and no more, so that what only a stalled or half-closed one needs is in
//! boxes.

use std::{
    io, mem,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason as H2Reason, RecvStream, SendStream};
use tokio::{
    net::TcpStream,
    task::yield_now,
    time::{Instant, sleep_until},
};

use super::{
    ends::{End, Receiving, Side, over, poll_reset, reset, reset_of, stream_ended},
    poll_write_all,
};
use crate::{
    proxy::{
        activity::Activity,
        buffers::{Buffers, Pace, Then},
        record::Record,
        tunnel,
        writer::Writer,
    },
    steer::end_orderly,
};

/// A connection between a socket, which is one `side` of it, and a stream. Ready when both directions
/// have ended, one has failed, or nothing has moved for too long. A failure has reset the stream; the
/// other way round is what the socket's linger brings about when it is dropped.
pub(in crate::proxy) struct Tunnelled<'a> {
    buffers: &'a Buffers,
    record: &'a Record,
    send: &'a mut SendStream<Bytes>,
    receive: &'a mut RecvStream,
    activity: Activity,
    writer: Writer<'a>,
    /// What came out of the tunnel and the socket hasn't taken.
    waits: Option<Box<Received>>,
    sending: Sending<'a>,
    from_socket: Pace,
    to_socket: Pace,
    side: Side,
    receiving: Receiving,
    /// The end of what the socket says has been read and passed on.
    said_all: bool,
}

/// A chunk out of the tunnel.
struct Received {
    /// What of it is still to be written.
    rest: Bytes,
    bytes: usize,
    /// Nothing comes behind it.
    is_last: bool,
}

/// How far the direction is that goes into the tunnel.
enum Sending<'a> {
    Flows,
    /// The socket isn't read.
    Waits(Box<Waiting<'a>>),
    Ended,
    /// The relay has failed.
    Resets(Box<End>),
}

/// Why a socket isn't read, and what can still come from it.
struct Waiting<'a> {
    /// What the stream has no room for. None: there is no more to send, and the other direction goes on.
    stalls: Option<Read>,
    over: Pin<Box<dyn Future<Output = Result<(), End>> + 'a>>,
}

/// A chunk from the socket.
struct Read {
    /// What of it is still to be sent.
    rest: Bytes,
    bytes: usize,
    then: Then,
}

impl<'a> Tunnelled<'a> {
    /// `first` was read from the stream already.
    pub(in crate::proxy) fn new(
        buffers: &'a Buffers,
        record: &'a Record,
        (side, socket): (Side, &'a TcpStream),
        (send, receive): (&'a mut SendStream<Bytes>, &'a mut RecvStream),
        first: Option<Box<Bytes>>,
        idle: Option<Duration>,
    ) -> Self {
        let is_last = receive.is_end_stream();
        let waits = first.map(|rest| {
            let bytes = rest.len();
            Box::new(Received {
                rest: *rest,
                bytes,
                is_last,
            })
        });
        // Until the socket has taken it, nobody reads the stream.
        let receiving = match waits {
            Some(_) => Receiving::Stalls,
            None => Receiving::Flows,
        };
        Self {
            buffers,
            record,
            send,
            receive,
            activity: Activity::new(idle),
            writer: Writer::new(socket, buffers),
            waits,
            sending: Sending::Flows,
            from_socket: Pace::default(),
            to_socket: Pace::default(),
            side,
            receiving,
            said_all: false,
        }
    }

    /// Moves what comes out of the tunnel to the socket.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        loop {
            let received = match &mut self.waits {
                Some(received) => {
                    ready!(received.poll_write(cx, &mut self.writer, &self.activity))
                        .map_err(|error| self.side.failed(error))?;
                    let received = (received.bytes, received.is_last);
                    self.waits = None;
                    self.receiving = Receiving::Flows;
                    received
                }
                None => match ready!(self.receive.poll_data(cx)) {
                    Some(Ok(rest)) => {
                        let mut received = Received {
                            bytes: rest.len(),
                            is_last: self.receive.is_end_stream(),
                            rest,
                        };
                        // What the socket takes at once, as nearly always all of it, needs no box.
                        match received.poll_write(cx, &mut self.writer, &self.activity) {
                            Poll::Ready(written) => {
                                written.map_err(|error| self.side.failed(error))?;
                            }
                            Poll::Pending => {
                                self.waits = Some(Box::new(received));
                                self.receiving = Receiving::Stalls;
                                return Poll::Pending;
                            }
                        }
                        (received.bytes, received.is_last)
                    }
                    Some(Err(error)) => {
                        stream_ended(&error, self.side.other())?;
                        break;
                    }
                    None => break,
                },
            };
            let (bytes, is_last) = received;
            // Fails only for a stream that has ended, which the next read tells.
            let _ = self.receive.flow_control().release_capacity(bytes);
            self.side.other().sent(&[self.record], bytes);
            self.activity.happened();
            // What was last waits in the kernel for the end.
            if !is_last && self.to_socket.is_over(bytes) {
                return pause(cx);
            }
        }
        // Where the other direction's end was passed on, the socket is closed next, which tells it as much,
        // with a call less and without an event that nobody waits for.
        if !self.said_all {
            // Fails when that side is gone already, which its own reader notices.
            let _ = self.writer.shut_down();
        }
        self.receiving = Receiving::Ended;
        Poll::Ready(Ok(()))
    }

    /// Moves what the socket sends into the tunnel.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        loop {
            match &mut self.sending {
                Sending::Flows => {
                    let pace = &mut self.from_socket;
                    let Poll::Ready(read) = self.buffers.poll_read(cx, pace, self.writer.socket())
                    else {
                        ready!(poll_reset(cx, self.send, self.side, self.receiving))?;
                        self.wait(None);
                        continue;
                    };
                    let (rest, then) = read.map_err(|error| self.side.failed(error))?;
                    let bytes = rest.len();
                    if bytes == 0 {
                        // Refused only by a stream that has ended, which reading it tells.
                        let _ = self.send.send_data(rest, true);
                        self.said_all = true;
                        self.wait(None);
                        continue;
                    }
                    let mut read = Read { rest, bytes, then };
                    match read.poll_send(cx, self.send, self.side, &self.activity) {
                        Poll::Ready(sent) => ready!(self.sent(cx, sent?, bytes, read.then))?,
                        Poll::Pending => self.wait(Some(read)),
                    }
                }
                Sending::Waits(waiting) => {
                    let Waiting { stalls, over } = &mut **waiting;
                    if let Some(read) = stalls {
                        let Poll::Ready(sent) =
                            read.poll_send(cx, self.send, self.side, &self.activity)
                        else {
                            return over.as_mut().poll(cx);
                        };
                        let (sent, bytes) = (sent?, read.bytes);
                        let then = mem::replace(&mut read.then, Then::More);
                        self.sending = Sending::Flows;
                        ready!(self.sent(cx, sent, bytes, then))?;
                        continue;
                    }
                    // Polled after the other direction, so it hears of its end without being woken.
                    if self.receiving != Receiving::Ended {
                        if let Poll::Ready(is_over) = over.as_mut().poll(cx) {
                            is_over?;
                            // The peer's app hears no more than that: see RFC 9113 §8.1.
                            self.send.send_reset(H2Reason::NO_ERROR);
                            self.receiving = Receiving::Ended;
                            self.sending = Sending::Ended;
                            continue;
                        }
                        ready!(poll_reset(cx, self.send, self.side, self.receiving))?;
                    }
                    self.sending = Sending::Ended;
                }
                Sending::Ended | Sending::Resets(_) => return Poll::Ready(Ok(())),
            }
        }
    }

    /// What comes behind a chunk that was `sent`, or that the stream took no more of.
    fn sent(
        &mut self,
        cx: &mut Context<'_>,
        sent: Sent,
        bytes: usize,
        then: Then,
    ) -> Poll<Result<(), End>> {
        if sent == Sent::TakesNoMore {
            self.wait(None);
            return Poll::Ready(Ok(()));
        }
        self.side.sent(&[self.record], bytes);
        match then {
            Then::More if self.from_socket.is_over(bytes) => return pause(cx),
            Then::More => {}
            Then::End => {
                self.said_all = true;
                self.wait(None);
            }
            Then::Failed(error) => return Poll::Ready(Err(self.side.failed(error))),
        }
        Poll::Ready(Ok(()))
    }

    /// Reads no more of the socket, for what the stream has no room for or since there is no more.
    fn wait(&mut self, stalls: Option<Read>) {
        if stalls.is_none() && self.receiving == Receiving::Ended {
            self.sending = Sending::Ended;
            return;
        }
        let (socket, side) = (self.writer.socket(), self.side);
        let over: Pin<Box<dyn Future<Output = _>>> = if stalls.is_some() {
            Box::pin(async move { Err(reset_of(socket, side).await) })
        } else {
            let said_all = Instant::now();
            Box::pin(async move {
                over(socket, side).await?;
                // A reset takes the place of what waits to be sent. Since then the tunnel has sent it, or is gone.
                sleep_until(said_all + tunnel::USER_TIMEOUT).await;
                Ok(())
            })
        };
        self.sending = Sending::Waits(Box::new(Waiting { stalls, over }));
    }

    /// Ready when both directions have ended or one has failed.
    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        // What came before a reset is written before the reset is heard of.
        if self.receiving != Receiving::Ended
            && let Poll::Ready(received) = self.poll_receive(cx)
        {
            received?;
        }
        if let Poll::Ready(sent) = self.poll_send(cx) {
            sent?;
            if self.receiving == Receiving::Ended {
                return Poll::Ready(Ok(()));
            }
        }
        self.activity.poll_ends(cx).map(|()| Err(End::Idle))
    }
}

impl Future for Tunnelled<'_> {
    type Output = Result<(), End>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let relay = self.get_mut();
        if let Sending::Resets(_) = relay.sending
            && let Sending::Resets(end) = mem::replace(&mut relay.sending, Sending::Ended)
        {
            reset(relay.send);
            return Poll::Ready(Err(*end));
        }
        match ready!(relay.poll_both(cx)) {
            Ok(()) => {
                end_orderly(relay.writer.socket());
                Poll::Ready(Ok(()))
            }
            Err(end) => {
                relay.sending = Sending::Resets(Box::new(end));
                // A reset takes the place of what waits to be sent: see [`super::reset_behind`].
                pause(cx)
            }
        }
    }
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    All,
    /// The stream isn't open for sending any more, for a reason that reading it tells.
    TakesNoMore,
}

impl Read {
    /// Sends what is left, as far as the stream has room.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        send: &mut SendStream<Bytes>,
        side: Side,
        activity: &Activity,
    ) -> Poll<Result<Sent, End>> {
        let ended =
            |error: &h2::Error| stream_ended(error, side.other()).map(|()| Sent::TakesNoMore);
        while !self.rest.is_empty() {
            send.reserve_capacity(self.rest.len());
            if send.capacity() == 0 {
                match ready!(send.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    Some(Err(error)) => return Poll::Ready(ended(&error)),
                    None => return Poll::Ready(Ok(Sent::TakesNoMore)),
                }
            }
            let part = self.rest.split_to(send.capacity().min(self.rest.len()));
            let is_last = matches!(self.then, Then::End) && self.rest.is_empty();
            if let Err(error) = send.send_data(part, is_last) {
                return Poll::Ready(ended(&error));
            }
            activity.happened();
        }
        Poll::Ready(Ok(Sent::All))
    }
}

impl Received {
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut Writer<'_>,
        activity: &Activity,
    ) -> Poll<io::Result<()>> {
        poll_write_all(cx, writer, &mut self.rest, self.is_last, activity)
    }
}

/// Lets others go on: the task is woken after them.
fn pause<T>(cx: &mut Context<'_>) -> Poll<T> {
    // The first poll of it does all that it does.
    let _ = pin!(yield_now()).poll(cx);
    Poll::Pending
}
