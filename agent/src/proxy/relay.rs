//! Moving bytes between two ends, byte-exact, until both directions have ended.
//!
//! Back-pressure goes end to end: nothing is read that the other side can't take, but for one
//! chunk. A FIN is passed on as the end of that direction while the other flows on; a reset is
//! passed on as a reset. An idle connection holds no buffer: chunks are read into a buffer of the
//! worker, and only what the other side didn't take at once is kept.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{Reason as H2Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, Interest},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Notify,
    time::Instant,
};
use tokio_util::io::poll_read_buf;

use super::record::Record;
use crate::{steer::end_orderly, telemetry::Failure};
use malla_common::Reason;

/// What one read takes at first. It grows while reads fill it.
const MIN_CHUNK: usize = 16 * 1024;
const MAX_CHUNK: usize = 256 * 1024;
/// Chunks up to this size are copied out of the worker's buffer: a slice would pin all of it.
const COPIED: usize = 16 * 1024;
/// What one connection moves in one turn before it lets others go on.
const TURN: usize = 256 * 1024;

/// The buffer that all connections of one worker read into.
#[derive(Debug, Default)]
pub(super) struct Buffers(RefCell<BytesMut>);

/// How one end of a relay failed.
#[derive(Debug)]
pub(super) enum End {
    /// The client's side.
    Client(io::Error),
    /// The server's side.
    Server(io::Error),
    /// No byte moved for too long.
    Idle,
    /// The tunnel that carried it is gone.
    Tunnel,
}

impl From<End> for Failure {
    fn from(end: End) -> Self {
        match end {
            End::Client(error) => Self::new(Reason::ClientReset, &error),
            End::Server(error) => Self::new(Reason::ServerReset, &error),
            End::Idle => Reason::IdleTimeout.into(),
            End::Tunnel => Reason::TunnelLost.into(),
        }
    }
}

/// Which end of the connection a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

impl Side {
    fn failed(self, error: io::Error) -> End {
        match self {
            Self::Client => End::Client(error),
            Self::Server => End::Server(error),
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// Counts bytes that this side sent.
    fn sent(self, record: &Record, bytes: usize) {
        match self {
            Self::Client => record.client_sent(bytes),
            Self::Server => record.server_sent(bytes),
        }
    }
}

/// Relays between two sockets.
pub(super) async fn tcp(
    buffers: &Buffers,
    record: &Record,
    client: &mut TcpStream,
    server: &mut TcpStream,
    idle: Option<Duration>,
) -> Result<(), End> {
    let activity = Activity::new(idle);
    {
        let (mut client_reader, client_writer) = client.split();
        let (mut server_reader, server_writer) = server.split();
        let (up_ended, down_ended) = (Notify::new(), Notify::new());
        let up = async {
            let reader = &mut client_reader;
            copy(
                buffers,
                record,
                &activity,
                Side::Client,
                reader,
                server_writer,
            )
            .await?;
            up_ended.notify_one();
            no_reset(&client_reader, Side::Client, &down_ended).await
        };
        let down = async {
            let reader = &mut server_reader;
            copy(
                buffers,
                record,
                &activity,
                Side::Server,
                reader,
                client_writer,
            )
            .await?;
            down_ended.notify_one();
            no_reset(&server_reader, Side::Server, &up_ended).await
        };
        tokio::select! {
            biased;
            both = async { tokio::try_join!(up, down) } => { both?; }
            () = activity.ends() => return Err(End::Idle),
        }
    }
    end_orderly(client);
    end_orderly(server);
    Ok(())
}

/// Relays between a socket, which is this `side` of the connection, and a stream of a tunnel.
pub(super) async fn tunnel(
    buffers: &Buffers,
    record: &Record,
    side: Side,
    socket: &mut TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    idle: Option<Duration>,
) -> Result<(), End> {
    let activity = Activity::new(idle);
    let result = {
        let (mut reader, writer) = socket.split();
        let down_ended = Notify::new();
        let up = async {
            into_stream(buffers, record, &activity, side, &mut reader, send).await?;
            no_reset(&reader, side, &down_ended).await
        };
        let down = async {
            out_of_stream(record, &activity, side, writer, receive).await?;
            down_ended.notify_one();
            Ok(())
        };
        tokio::select! {
            biased;
            both = async { tokio::try_join!(up, down) } => both.map(|_| ()),
            () = activity.ends() => Err(End::Idle),
        }
    };
    match &result {
        Ok(()) => end_orderly(socket),
        // RFC 9113 §8.5: an error of the TCP connection is a stream error of this type, and the
        // other way round, which the socket's linger brings about when it is dropped.
        Err(_) => send.send_reset(H2Reason::CONNECT_ERROR),
    }
    result
}

/// Writes all of `bytes`; each part of it is activity.
async fn write(
    writer: &mut WriteHalf<'_>,
    bytes: &mut Bytes,
    activity: &Activity,
) -> io::Result<()> {
    while !bytes.is_empty() {
        if writer.write_buf(bytes).await? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        activity.happened();
    }
    Ok(())
}

/// Watches a socket that has said all it had to say: until the other direction has ended, only a
/// reset can still come from it.
async fn no_reset(reader: &ReadHalf<'_>, side: Side, other_ended: &Notify) -> Result<(), End> {
    tokio::select! {
        biased;
        () = other_ended.notified() => Ok(()),
        _ = reader.ready(Interest::ERROR) => {
            // The kernel calls it EPIPE here, since the peer's FIN came first.
            Err(side.failed(io::Error::from_raw_os_error(libc::ECONNRESET)))
        }
    }
}

async fn copy(
    buffers: &Buffers,
    record: &Record,
    activity: &Activity,
    side: Side,
    reader: &mut ReadHalf<'_>,
    mut writer: WriteHalf<'_>,
) -> Result<(), End> {
    let mut pace = Pace::default();
    loop {
        let moved = poll_fn(|cx| buffers.poll_move(cx, &mut pace, reader, &mut writer))
            .await
            .map_err(|failure| match failure {
                Moving::Read(error) => side.failed(error),
                Moving::Write(error) => side.other().failed(error),
            })?;
        let Moved { bytes, mut rest } = moved;
        if bytes == 0 {
            // Fails when the other side is gone already, which its own reader notices.
            let _ = writer.shutdown().await;
            return Ok(());
        }
        write(&mut writer, &mut rest, activity)
            .await
            .map_err(|error| side.other().failed(error))?;
        side.sent(record, bytes);
        activity.happened();
        pace.rest(bytes).await;
    }
}

/// From the socket into the tunnel.
async fn into_stream(
    buffers: &Buffers,
    record: &Record,
    activity: &Activity,
    side: Side,
    reader: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
) -> Result<(), End> {
    let mut pace = Pace::default();
    loop {
        let read = poll_fn(|cx| {
            if let Poll::Ready(read) = buffers.poll_read(cx, &mut pace, reader) {
                return Poll::Ready(Ok(read));
            }
            // While the socket is silent, the peer may want no more.
            send.poll_reset(cx).map(Err)
        })
        .await;
        let mut chunk = match read {
            Ok(read) => read.map_err(|error| side.failed(error))?,
            Err(Ok(reason)) => return reset(reason, side.other()),
            Err(Err(error)) => return stream_ended(&error, side.other()),
        };
        if chunk.is_empty() {
            // Refused only by a stream that has ended, which `out_of_stream` notices.
            let _ = send.send_data(chunk, true);
            return Ok(());
        }
        let bytes = chunk.len();
        while !chunk.is_empty() {
            send.reserve_capacity(chunk.len());
            let capacity = match send.capacity() {
                0 => match poll_fn(|cx| send.poll_capacity(cx)).await {
                    Some(Ok(capacity)) => capacity,
                    Some(Err(error)) => return stream_ended(&error, side.other()),
                    // It isn't open for sending any more, for a reason that reading it tells.
                    None => return Ok(()),
                },
                capacity => capacity,
            };
            activity.happened();
            let part = chunk.split_to(capacity.min(chunk.len()));
            if let Err(error) = send.send_data(part, false) {
                return stream_ended(&error, side.other());
            }
        }
        side.sent(record, bytes);
        activity.happened();
        pace.rest(bytes).await;
    }
}

/// Out of the tunnel into the socket.
async fn out_of_stream(
    record: &Record,
    activity: &Activity,
    side: Side,
    mut writer: WriteHalf<'_>,
    receive: &mut RecvStream,
) -> Result<(), End> {
    let mut pace = Pace::default();
    while let Some(chunk) = receive.data().await {
        let mut chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                stream_ended(&error, side.other())?;
                break;
            }
        };
        let bytes = chunk.len();
        write(&mut writer, &mut chunk, activity)
            .await
            .map_err(|error| side.failed(error))?;
        // Fails only for a stream that has ended, which the next read tells.
        let _ = receive.flow_control().release_capacity(bytes);
        side.other().sent(record, bytes);
        activity.happened();
        pace.rest(bytes).await;
    }
    let _ = writer.shutdown().await;
    Ok(())
}

/// How the peer ended a stream early: without an error when it wants no more of it (RFC 9113
/// §8.1), as a failure of the far side, or with the tunnel.
fn stream_ended(error: &h2::Error, far: Side) -> Result<(), End> {
    match error.reason() {
        Some(reason) if error.is_reset() => reset(reason, far),
        _ => Err(End::Tunnel),
    }
}

fn reset(reason: H2Reason, far: Side) -> Result<(), End> {
    if reason == H2Reason::NO_ERROR {
        return Ok(());
    }
    let error = io::Error::new(io::ErrorKind::ConnectionReset, reason.description());
    Err(far.failed(error))
}

#[derive(Debug)]
enum Moving {
    Read(io::Error),
    Write(io::Error),
}

struct Moved {
    /// What was read; none at the end.
    bytes: usize,
    /// What of it the writer didn't take.
    rest: Bytes,
}

impl Buffers {
    /// Reads one chunk. Empty at the end of the stream.
    fn poll_read(
        &self,
        cx: &mut Context<'_>,
        pace: &mut Pace,
        reader: &mut ReadHalf<'_>,
    ) -> Poll<io::Result<Bytes>> {
        let mut buffer = self.0.borrow_mut();
        let read = ready!(poll_into(&mut buffer, cx, pace, reader))?;
        Poll::Ready(Ok(take(&mut buffer, 0, read)))
    }

    /// Reads one chunk and writes what the writer takes of it at once, without a copy.
    fn poll_move(
        &self,
        cx: &mut Context<'_>,
        pace: &mut Pace,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
    ) -> Poll<Result<Moved, Moving>> {
        let mut buffer = self.0.borrow_mut();
        let read = ready!(poll_into(&mut buffer, cx, pace, reader)).map_err(Moving::Read)?;
        let written = if read == 0 {
            0
        } else {
            match Pin::new(writer).poll_write(cx, &buffer[..read]) {
                Poll::Ready(Ok(written)) => written,
                Poll::Ready(Err(error)) => {
                    buffer.clear();
                    return Poll::Ready(Err(Moving::Write(error)));
                }
                Poll::Pending => 0,
            }
        };
        let rest = take(&mut buffer, written, read);
        Poll::Ready(Ok(Moved { bytes: read, rest }))
    }
}

/// Reads at most one chunk into the empty buffer.
fn poll_into(
    buffer: &mut BytesMut,
    cx: &mut Context<'_>,
    pace: &mut Pace,
    reader: &mut ReadHalf<'_>,
) -> Poll<io::Result<usize>> {
    let size = pace.chunk();
    if buffer.capacity() < size {
        // One block serves several reads of bulk data, and no block is larger than that.
        buffer.reserve(MAX_CHUNK);
    }
    let mut limited = (&mut *buffer).limit(size);
    let read = ready!(poll_read_buf(Pin::new(reader), cx, &mut limited))?;
    pace.filled(read);
    Poll::Ready(Ok(read))
}

/// Takes `written..read` out of the buffer and leaves it empty.
fn take(buffer: &mut BytesMut, written: usize, read: usize) -> Bytes {
    if written == read {
        buffer.clear();
        return Bytes::new();
    }
    if read - written <= COPIED {
        let rest = Bytes::copy_from_slice(&buffer[written..read]);
        buffer.clear();
        return rest;
    }
    buffer.split_to(read).freeze().slice(written..)
}

/// How much one direction reads at a time, and when it lets others go on.
#[derive(Debug)]
struct Pace {
    chunk: usize,
    moved: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            chunk: MIN_CHUNK,
            moved: 0,
        }
    }
}

impl Pace {
    fn chunk(&self) -> usize {
        self.chunk
    }

    /// Grows with what a connection moves, and shrinks when it idles.
    fn filled(&mut self, read: usize) {
        if read == self.chunk {
            self.chunk = (self.chunk * 4).min(MAX_CHUNK);
        } else if read < self.chunk / 8 {
            self.chunk = (self.chunk / 4).max(MIN_CHUNK);
        }
    }

    async fn rest(&mut self, moved: usize) {
        self.moved += moved;
        if self.moved >= TURN {
            self.moved = 0;
            tokio::task::yield_now().await;
        }
    }
}

/// When a byte moved last, for the idle time-out.
#[derive(Debug)]
struct Activity {
    last: std::cell::Cell<Instant>,
    limit: Option<Duration>,
}

impl Activity {
    fn new(limit: Option<Duration>) -> Self {
        Self {
            last: std::cell::Cell::new(Instant::now()),
            limit,
        }
    }

    fn happened(&self) {
        if self.limit.is_some() {
            self.last.set(Instant::now());
        }
    }

    /// Returns when nothing has happened for too long; never, where there is no limit.
    async fn ends(&self) {
        let Some(limit) = self.limit else {
            return std::future::pending().await;
        };
        loop {
            let end = self.last.get() + limit;
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}
