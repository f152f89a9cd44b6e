//! How one direction of a connection moves: the worker's buffer that it reads into, and its pace.

use std::{
    cell::RefCell,
    io,
    os::fd::AsRawFd,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use tokio::{io::Interest, net::TcpStream};

use super::{
    hbone,
    readiness::{Exhausted, poll_call},
    relay::JoinedConnections,
    writer::Writer,
};
use crate::steer::{Credit, Queues};

/// What one read takes at first. It grows while reads fill it. With the head of its frame it fills
/// TLS records to the last byte, since a few bytes that are left over cost a record as well.
const MIN_CHUNK: u32 = 16 * 1024 - hbone::FRAME_HEAD;
/// 15 records, which with their heads fit in four of the kernel's largest segments, at any MTU up to
/// 16 KiB and over the loopback. 16 are some bytes more, for which a fifth would cross the network.
pub(super) const MAX_CHUNK: u32 = 15 * 16 * 1024 - hbone::FRAME_HEAD;
/// Chunks up to this size are copied out of the worker's buffer: a slice would pin all of it.
const COPIED: usize = 16 * 1024;
/// What one connection moves in one turn before it lets others go on.
const TURN: usize = MAX_CHUNK as usize;
/// What a chunk counts at least: each also takes of tokio's budget of 128 calls a turn, and a socket that
/// is left waiting for that looks like one that takes nothing.
const LEAST: usize = TURN / 64;

/// The buffer that all connections of one worker read into.
#[derive(Debug)]
pub(super) struct Buffers {
    buffer: RefCell<BytesMut>,
    /// What the first chunk of a connection is read into.
    first: RefCell<Box<[u8]>>,
    queues: Arc<Queues>,
    /// The connections that the kernel moves past it.
    pub(super) joined: JoinedConnections,
}

/// What comes behind the bytes of a read.
#[derive(Debug)]
pub(super) enum Then {
    /// Perhaps more, later.
    More,
    /// The end of the stream, which goes on with the bytes. Apps look where the end comes: one that
    /// closes first keeps its port in `TIME_WAIT`, so a client that is told of an answer's end only
    /// after the answer would run out of ports where the server was to close.
    End,
    Failed(io::Error),
}

/// Which of the two ends failed.
#[derive(Debug)]
pub(super) enum Moving {
    Read(io::Error),
    Write(io::Error),
}

pub(super) struct Moved {
    /// What was read; none at the end.
    pub bytes: usize,
    /// What of it the writer didn't take.
    pub rest: Bytes,
    pub then: Then,
}

impl Buffers {
    pub(super) fn new(queues: Arc<Queues>) -> Self {
        Self {
            buffer: RefCell::default(),
            first: RefCell::new(vec![0; MIN_CHUNK as usize].into()),
            queues,
            joined: JoinedConnections::default(),
        }
    }

    /// What may be written to one socket. None: whatever TCP takes.
    pub(super) fn credit(&self) -> Option<Credit> {
        self.queues.credit()
    }

    /// Reads one chunk. Empty at the end of the stream.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        pace: &mut Pace,
        reader: &TcpStream,
    ) -> Poll<io::Result<(Bytes, Then)>> {
        let mut buffer = self.buffer.borrow_mut();
        let then = ready!(self.poll_into(&mut buffer, cx, pace, reader))?;
        let read = buffer.len();
        Poll::Ready(Ok((take(&mut buffer, 0, read), then)))
    }

    /// Reads what has come already from a socket that the event loop hasn't told of yet, at most one
    /// chunk. None: nothing has come.
    pub(super) fn read_at_once(&self, socket: &TcpStream) -> Option<io::Result<(Bytes, Then)>> {
        let mut first = self.first.borrow_mut();
        let mut read = 0;
        let then = loop {
            match recv(socket.as_raw_fd(), &mut first[read..], MsgFlags::empty()) {
                Ok(0) => break Then::End,
                Ok(more) => read += more,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if read == 0 => return None,
                Err(Errno::EAGAIN) => break Then::More,
                Err(error) if read == 0 => return Some(Err(error.into())),
                Err(error) => break Then::Failed(error.into()),
            }
            if read == first.len() {
                break Then::More;
            }
        };
        Some(Ok((Bytes::copy_from_slice(&first[..read]), then)))
    }

    /// Reads one chunk and writes what the writer takes of it at once, without a copy.
    pub(super) fn poll_move(
        &self,
        cx: &mut Context<'_>,
        pace: &mut Pace,
        reader: &TcpStream,
        writer: &mut Writer<'_>,
    ) -> Poll<Result<Moved, Moving>> {
        let mut buffer = self.buffer.borrow_mut();
        let then = ready!(self.poll_into(&mut buffer, cx, pace, reader)).map_err(Moving::Read)?;
        let read = buffer.len();
        let is_last = matches!(then, Then::End);
        if read == 0 {
            // A write of nothing would tell of a reset before the other direction has read what came first.
            let (bytes, rest) = (0, Bytes::new());
            return Poll::Ready(Ok(Moved { bytes, rest, then }));
        }
        let written = match writer.poll_write(cx, &buffer, is_last) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => {
                buffer.clear();
                return Poll::Ready(Err(Moving::Write(error)));
            }
            Poll::Pending => 0,
        };
        let rest = take(&mut buffer, written, read);
        let bytes = read;
        Poll::Ready(Ok(Moved { bytes, rest, then }))
    }

    /// Reads at most one chunk into the empty buffer, and leaves it empty where the stream has ended.
    fn poll_into(
        &self,
        buffer: &mut BytesMut,
        cx: &mut Context<'_>,
        pace: &mut Pace,
        reader: &TcpStream,
    ) -> Poll<io::Result<Then>> {
        let size = pace.chunk();
        if buffer.capacity() < size {
            // One block serves several reads of bulk data, and no block is larger than that.
            buffer.reserve(MAX_CHUNK as usize);
        }
        let mut limited = (&mut *buffer).limit(size);
        let exhausted = if self.queues.may_leave_bytes() {
            Exhausted::BySaying
        } else {
            Exhausted::ByShort { of: size }
        };
        let read = || reader.try_read_buf(&mut limited);
        let read = ready!(poll_call(cx, reader, Interest::READABLE, exhausted, read))?;
        pace.filled(read);
        if read == 0 || read == size {
            let then = if read == 0 { Then::End } else { Then::More };
            return Poll::Ready(Ok(then));
        }
        // After a read that emptied the socket it is ready only for its end, which the same event has
        // told of, or where it is read until it is empty.
        if reader.poll_read_ready(cx).is_pending() {
            return Poll::Ready(Ok(Then::More));
        }
        let then = match reader.try_read_buf(&mut limited) {
            Ok(0) => Then::End,
            Ok(_) => Then::More,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Then::More,
            Err(error) => Then::Failed(error),
        };
        Poll::Ready(Ok(then))
    }
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

/// How much one direction reads at a time, and when it lets others go on. Each connection has two.
#[derive(Debug)]
pub(super) struct Pace {
    chunk: u32,
    moved: u32,
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
        self.chunk as usize
    }

    /// Grows with what a connection moves, and shrinks when it idles.
    fn filled(&mut self, read: usize) {
        if read == self.chunk() {
            self.chunk = (self.chunk * 4).min(MAX_CHUNK);
        } else if read < self.chunk() / 8 {
            self.chunk = (self.chunk / 4).max(MIN_CHUNK);
        }
    }

    /// Whether a turn is over with so many bytes, so that others are to go on.
    pub(super) fn is_over(&mut self, moved: usize) -> bool {
        let all = self.moved as usize + moved.max(LEAST);
        self.moved = u32::try_from(all).ok().filter(|_| all < TURN).unwrap_or(0);
        all >= TURN
    }

    pub(super) async fn rest(&mut self, moved: usize) {
        if self.is_over(moved) {
            tokio::task::yield_now().await;
        }
    }
}
