//! Joins: a direction between two apps of this node that the kernel moves past the agent.
//!
//! The agent says after how many bytes, once it has written all of them. The kernel compares that with
//! what the app has sent the agent, under the lock of the app's socket: where both are the same, the
//! agent has nothing of it left, and what comes next can overtake nothing. An app that sends the agent
//! something again ends the join with that, since its number only grows; then another one may follow.
//!
//! What the agent has written must all have been redirected, since what came by TCP is read after what
//! is redirected. The queue's numbers tell: all bytes that were ever to go there are the agent's and
//! those of the join, unless some went by TCP.

use std::{cell::Cell, os::fd::AsFd, rc::Rc, sync::Arc};

use malla_common::acceleration::{self, End, Queue};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::queues::{Maps, Queues, peer};

/// Chunks after which a direction is joined. One that moves fewer costs nothing for it.
const FIRST_TURN: u32 = 4;
/// So many at most lie between two attempts.
const LAST_TURN: u32 = 1 << 16;

/// When a direction is to be joined, counted in chunks.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    left: u32,
    between: u32,
}

impl Default for Turn {
    fn default() -> Self {
        Self {
            left: FIRST_TURN,
            between: FIRST_TURN,
        }
    }
}

impl Turn {
    /// Counts a chunk. Whether it is time.
    pub(super) fn comes(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    /// Soon where joins are of use, else later and later.
    pub(super) fn next(&mut self, is_of_use: bool) {
        self.between = if is_of_use {
            FIRST_TURN
        } else {
            (self.between * 2).min(LAST_TURN)
        };
        self.left = self.between;
    }
}

/// A join of one direction, and what follows it there. With this value its entry goes.
#[derive(Debug)]
pub struct Join {
    queues: Arc<Queues>,
    /// The cookie of the sender's socket.
    sender: u64,
    /// What was moved when it was joined last.
    before: Cell<u64>,
}

impl Join {
    /// Joins a direction, as [`enter`] does. `before` is the join that it had, which has ended if anything
    /// was written since.
    pub(super) fn make(
        queues: &Arc<Queues>,
        before: Option<&Rc<Self>>,
        between: [&TcpStream; 2],
        wrote: u64,
    ) -> Option<Rc<Self>> {
        let mut maps = queues.maps();
        let maps = maps.as_mut()?;
        let joined = before.map_or(0, |join| join.counted(maps));
        let sender = enter(maps, joined, between, wrote)?;
        if let Some(join) = before {
            join.before.set(joined);
            return Some(Rc::clone(join));
        }
        Some(Rc::new(Self {
            queues: Arc::clone(queues),
            sender,
            before: Cell::new(0),
        }))
    }

    /// How many bytes the kernel has moved.
    pub fn bytes(&self) -> u64 {
        let maps = self.queues.maps();
        maps.as_ref().map_or(0, |maps| self.counted(maps))
    }

    /// Whether anything went this way since the last time that it was joined.
    pub(super) fn was_used(&self) -> bool {
        self.bytes() != self.before.get()
    }

    fn counted(&self, maps: &Maps) -> u64 {
        let entry = maps.joins.0.get(&self.sender, 0);
        entry.map_or(self.before.get(), |entry| entry.bytes)
    }
}

impl Drop for Join {
    fn drop(&mut self) {
        if let Some(maps) = &mut *self.queues.maps() {
            // It is there, since nothing else removes it.
            let _ = maps.joins.0.remove(&self.sender);
        }
    }
}

/// Lets the app behind `reader` send to the one behind `writer`, where all that `reader` has said was
/// `wrote` and redirected, and where `joined` bytes went there by earlier joins, the last of which has ended.
/// None where that isn't so, or where either app isn't accelerated; else the cookie of the sender's socket.
pub(super) fn enter(
    maps: &mut Maps,
    joined: u64,
    [reader, writer]: [&impl AsFd; 2],
    wrote: u64,
) -> Option<u64> {
    let (sender_end, target) = (peer(reader).ok()?, peer(writer).ok()?);
    let sender = maps.ends.0.get(&sender_end, 0).ok()?;
    let target_cookie = maps.ends.0.get(&target, 0).ok()?;
    let said = maps.waiting.0.get(&sender_end.peer(), 0).ok()?;
    let queue = settled(maps, &target)?;
    let is_all = said.redirected() == wrote
        && queue.redirected() == wrote.wrapping_add(joined)
        && queue.cookie == target_cookie;
    // While the agent's sockets live, the cookies are of the sockets at their other ends, whose addresses
    // and ports no others can have.
    let lives = |socket| SockRef::from(socket).peer_addr().is_ok();
    if !is_all || !lives(reader) || !lives(writer) {
        return None;
    }
    let mut entry = acceleration::Join::new(sender, (target, target_cookie), wrote);
    // Nothing adds to the entry that this one takes the place of.
    entry.bytes = joined;
    maps.joins.0.insert(sender, entry, 0).ok()?;
    Some(sender)
}

/// What is known of a queue, without a read that is half counted: one is taken from what is unread
/// before it is added to what was read, so that with the same count of the latter before and after, none
/// counts twice.
fn settled(maps: &Maps, end: &End) -> Option<Queue> {
    let look = || maps.waiting.0.get(end, 0).ok();
    let (first, second) = (look()?, look()?);
    (first.read == second.read).then_some(second)
}
