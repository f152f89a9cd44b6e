//! Writes of one turn go out together.
//!
//! The HTTP/2 layer writes and flushes each frame by itself. Here frames gather until the driver
//! of the connection has been polled, and then become one TLS record and one system call: for
//! small messages most of a tunnel's cost is in those two.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What gathers at most: the plaintext of one TLS record (RFC 8446 §5.1). More goes out at once.
const CAPACITY: usize = 16 * 1024;

/// A stream whose flush waits for [`Flusher`].
pub(super) struct Coalescing<S>(Rc<RefCell<Inner<S>>>);

/// Sends what has gathered.
pub(super) struct Flusher<S>(Rc<RefCell<Inner<S>>>);

struct Inner<S> {
    stream: S,
    gathered: BytesMut,
    /// Whether the stream below has something to flush.
    dirty: bool,
}

/// Both handles on `stream`.
pub(super) fn coalescing<S>(stream: S) -> (Coalescing<S>, Flusher<S>) {
    let inner = Rc::new(RefCell::new(Inner {
        stream,
        gathered: BytesMut::new(),
        dirty: false,
    }));
    (Coalescing(Rc::clone(&inner)), Flusher(inner))
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    /// Hands what has gathered to the stream below.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.gathered))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        if self.dirty {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.dirty = false;
        }
        // A tunnel that idles holds no buffer.
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        self.dirty = true;
        if self.gathered.len() + length > CAPACITY {
            // What does not fit in one record goes first, and what fills one by itself follows
            // without a copy.
            ready!(self.poll_drain(cx))?;
            if length >= CAPACITY {
                return Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
            }
        }
        if self.gathered.capacity() == 0 {
            self.gathered.reserve(CAPACITY);
        }
        for slice in slices {
            self.gathered.extend_from_slice(slice);
        }
        Poll::Ready(Ok(length))
    }
}

impl<S: AsyncWrite + Unpin> Flusher<S> {
    /// Polls the connection by `turn`, and then sends what it wrote, whatever came of it.
    pub(super) async fn after<T>(&self, mut turn: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
        poll_fn(|cx| {
            let result = turn(cx);
            // An error stays with the stream, and the connection's next turn meets it.
            let _ = self.0.borrow_mut().poll_flush(cx);
            result
        })
        .await
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalescing<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalescing<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_flush(cx))?;
        Pin::new(&mut inner.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Keeps each write that reaches it.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl AsyncWrite for Writes {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_writes_of_one_turn_become_one() {
        let (mut stream, flusher) = coalescing(Writes::default());
        for part in [b"one".as_slice(), b"two", b"three"] {
            stream.write_all(part).await.unwrap();
            stream.flush().await.unwrap();
        }
        assert!(flusher.0.borrow().stream.0.is_empty());
        flusher.after(|_| Poll::Ready(())).await;
        assert_eq!(flusher.0.borrow().stream.0, [b"onetwothree".to_vec()]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn order_holds_between_gathered_and_large_writes() {
        let (theirs, ours) = tokio::io::duplex(1024);
        let (mut stream, flusher) = coalescing(theirs);
        let large: Vec<u8> = (0..=250).cycle().take(100_000).collect();
        let mut expected = b"small".to_vec();
        expected.extend(&large);
        expected.extend(b"end");
        let read = async {
            let mut ours = ours;
            let mut all = Vec::new();
            ours.read_to_end(&mut all).await.unwrap();
            all
        };
        let write = async {
            stream.write_all(b"small").await.unwrap();
            stream.write_all(&large).await.unwrap();
            stream.write_all(b"end").await.unwrap();
            stream.shutdown().await.unwrap();
            drop((stream, flusher));
        };
        let (all, ()) = tokio::join!(read, write);
        assert_eq!(all, expected);
    }
}
