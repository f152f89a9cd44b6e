//! A tunnel's socket is read in large pieces, into a buffer that it holds only while bytes are in it.

use std::{
    cell::Cell,
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, ReadBuf};

/// What one read takes. A tunnel carries many connections, and rustls asks for 4 KiB at a time.
const PIECE: usize = 256 * 1024;

thread_local! {
    /// The buffer that whichever tunnel of this thread reads next takes: most have emptied it again
    /// before another one's turn.
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

#[derive(Debug)]
pub(super) struct ReadAhead<S> {
    pub(super) stream: S,
    held: Option<Held>,
}

/// What was read, and which part of it wasn't taken yet.
type Held = (Box<[u8]>, Range<usize>);

impl<S> ReadAhead<S> {
    pub(super) fn new(stream: S) -> Self {
        let held = None;
        Self { stream, held }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (piece, mut left) = match self.held.take() {
            Some(held) => held,
            None => ready!(read(&mut self.stream, cx))?,
        };
        let length = left.len().min(into.remaining());
        into.put_slice(&piece[left.start..left.start + length]);
        left.start += length;
        if left.is_empty() {
            SPARE.set(Some(piece));
        } else {
            self.held = Some((piece, left));
        }
        Poll::Ready(Ok(()))
    }
}

fn read(stream: &mut (impl AsyncRead + Unpin), cx: &mut Context<'_>) -> Poll<io::Result<Held>> {
    let mut piece = SPARE.take().unwrap_or_else(|| vec![0; PIECE].into());
    let mut buffer = ReadBuf::new(&mut piece);
    let read = Pin::new(stream).poll_read(cx, &mut buffer);
    let length = buffer.filled().len();
    match read {
        Poll::Ready(Ok(())) => Poll::Ready(Ok((piece, 0..length))),
        Poll::Ready(Err(error)) => {
            SPARE.set(Some(piece));
            Poll::Ready(Err(error))
        }
        Poll::Pending => {
            SPARE.set(Some(piece));
            Poll::Pending
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn two_that_are_read_by_turns_keep_their_bytes_apart_and_no_buffer_at_rest() {
        let (one, mut to_one) = tokio::io::duplex(4 * PIECE);
        let (two, mut to_two) = tokio::io::duplex(4 * PIECE);
        let (mut one, mut two) = (ReadAhead::new(one), ReadAhead::new(two));
        let sent = |first: u8| -> Vec<u8> {
            let bytes = (first..=250).cycle();
            bytes.take(3 * PIECE + 5).collect()
        };
        to_one.write_all(&sent(1)).await.unwrap();
        to_two.write_all(&sent(2)).await.unwrap();
        drop((to_one, to_two));
        let (mut from_one, mut from_two) = (Vec::new(), Vec::new());
        for part in [1000, PIECE, 4096, 1].into_iter().cycle() {
            let mut bytes = vec![0; part];
            let read = one.read(&mut bytes).await.unwrap();
            from_one.extend_from_slice(&bytes[..read]);
            let other = two.read(&mut bytes).await.unwrap();
            from_two.extend_from_slice(&bytes[..other]);
            if read == 0 && other == 0 {
                break;
            }
        }
        assert_eq!((from_one, from_two), (sent(1), sent(2)));
        assert!(one.held.is_none() && two.held.is_none());
    }
}
