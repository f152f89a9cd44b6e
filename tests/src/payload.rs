//! Bytes that can be told apart from all others, sent and checked without being kept.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

/// One piece of a payload.
const PIECE: usize = 64 << 10;

/// Bytes that no other seed and no other place has, as far as that goes in one piece.
#[derive(Debug, Clone)]
pub struct Payload {
    piece: Vec<u8>,
    number: u64,
}

impl Payload {
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        let words = (0..PIECE / 8).flat_map(|_| {
            // Knuth's linear congruence: cheap, and every word is another.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state ^ state >> 29).to_le_bytes()
        });
        Self {
            piece: words.collect(),
            number: 0,
        }
    }

    /// The next bytes, at most 64 KiB. Each call begins a new piece.
    pub fn next(&mut self, length: usize) -> &[u8] {
        self.number += 1;
        self.piece[..8].copy_from_slice(&self.number.to_le_bytes());
        &self.piece[..length.min(PIECE)]
    }
}

/// Sends `length` bytes of the payload `seed`.
pub fn send(mut to: impl Write, seed: u64, length: usize) -> Result<()> {
    let mut payload = Payload::new(seed);
    let mut left = length;
    while left > 0 {
        let piece = payload.next(left);
        let sent = to.write_all(piece);
        sent.with_context(|| format!("sending, {left} of {length} bytes to go"))?;
        left -= piece.len();
    }
    Ok(())
}

/// Receives `length` bytes, which must be those of [`send`] with the same seed and length.
pub fn receive(mut from: impl Read, seed: u64, length: usize) -> Result<()> {
    let mut payload = Payload::new(seed);
    let mut buffer = vec![0; PIECE];
    let mut left = length;
    while left > 0 {
        let expected = payload.next(left);
        let piece = &mut buffer[..expected.len()];
        let received = from.read_exact(piece);
        received.with_context(|| format!("receiving, {left} of {length} bytes to go"))?;
        ensure!(
            piece == expected,
            "other bytes than those sent, {left} of {length} bytes before the end"
        );
        left -= piece.len();
    }
    Ok(())
}

/// Receives `length` bytes as [`receive`] does, and then the end.
pub fn receive_all(mut from: impl Read, seed: u64, length: usize) -> Result<()> {
    receive(&mut from, seed, length)?;
    let more = from.read(&mut [0]).context("waiting for the end")?;
    ensure!(more == 0, "more than the {length} bytes that were sent");
    Ok(())
}
