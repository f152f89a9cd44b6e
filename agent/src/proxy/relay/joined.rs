//! Connections whose bytes the kernel moves past the agent, and how they come to be counted.
//!
//! Nobody wakes the agent for such bytes. Each worker looks at the kernel's counts once a second, less
//! often at those that don't move, and wakes the task of one that has moved. What is left is read when
//! the relay ends.

use std::{
    cell::{Cell, OnceCell, RefCell},
    rc::{Rc, Weak},
    task::{Context, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::ends::Side;
use crate::steer::Join;

/// Sweeps begin so far apart at least.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many connections are looked at without a pause, each with two questions to the kernel.
const AT_ONCE: usize = 500;
/// Looks at the counts of a connection at rest lie so many sweeps apart at most.
const LONGEST_REST: u32 = 16;

/// The connections of a worker with a joined direction.
#[derive(Debug, Default)]
pub(in crate::proxy) struct JoinedConnections {
    connections: RefCell<Vec<Weak<Joined>>>,
    /// When the last sweep began, and how far it has come.
    last_sweep: Cell<Option<Instant>>,
    swept: Cell<usize>,
}

impl JoinedConnections {
    /// Goes on with a sweep, or begins one if it is time. To be called often.
    pub(in crate::proxy) fn sweep(&self) {
        let mut connections = self.connections.borrow_mut();
        if self.swept.get() >= connections.len() {
            let now = Instant::now();
            let last = self.last_sweep.get();
            if last.is_some_and(|last| now - last < INTERVAL) {
                return;
            }
            self.last_sweep.set(Some(now));
            self.swept.set(0);
        }
        for _ in 0..AT_ONCE {
            let place = self.swept.get();
            let Some(connection) = connections.get(place) else {
                return;
            };
            if let Some(connection) = connection.upgrade() {
                connection.at_sweep();
                self.swept.set(place + 1);
            } else {
                connections.swap_remove(place);
            }
        }
    }

    /// One more. It is looked at in each sweep where `rests` is not.
    pub(super) fn add(&self, rests: bool) -> Rc<Joined> {
        let joined = Rc::new(Joined {
            directions: Default::default(),
            waker: RefCell::default(),
            between: Cell::new(1),
            left: Cell::new(1),
            rests,
        });
        self.connections.borrow_mut().push(Rc::downgrade(&joined));
        joined
    }
}

/// A connection with a joined direction.
#[derive(Debug)]
pub(super) struct Joined {
    /// Of what the client says and of what the server does.
    directions: [Counted; 2],
    /// Of the task that counts.
    waker: RefCell<Option<Waker>>,
    /// Sweeps from one look to the next, and those left.
    between: Cell<u32>,
    left: Cell<u32>,
    rests: bool,
}

#[derive(Debug, Default)]
struct Counted {
    join: OnceCell<Rc<Join>>,
    /// What the kernel has told of, and what of it was taken.
    told: Cell<u64>,
    taken: Cell<u64>,
}

impl Joined {
    pub(super) fn set(&self, side: Side, join: Rc<Join>) {
        // A direction has one for life.
        let _ = self.of(side).join.set(join);
    }

    /// Asks the kernel. Whether anything has moved.
    pub(super) fn look(&self) -> bool {
        let mut moved = false;
        for direction in &self.directions {
            if let Some(join) = direction.join.get() {
                let bytes = join.bytes();
                moved |= direction.told.replace(bytes) != bytes;
            }
        }
        moved
    }

    /// How many bytes of this side there are to count.
    pub(super) fn take(&self, side: Side) -> usize {
        let Counted { told, taken, .. } = self.of(side);
        // The kernel may have had no answer, in place of which the last join's beginning was told.
        let more = told.get().saturating_sub(taken.get());
        taken.set(taken.get() + more);
        usize::try_from(more).unwrap_or(usize::MAX)
    }

    /// Remembers whom to wake.
    pub(super) fn watch(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if waker
            .as_ref()
            .is_none_or(|known| !known.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
    }

    fn at_sweep(&self) {
        self.left.set(self.left.get() - 1);
        if self.left.get() > 0 {
            return;
        }
        let between = if self.look() {
            if let Some(waker) = &*self.waker.borrow() {
                waker.wake_by_ref();
            }
            1
        } else if self.rests {
            (self.between.get() * 2).min(LONGEST_REST)
        } else {
            1
        };
        self.between.set(between);
        self.left.set(between);
    }

    fn of(&self, side: Side) -> &Counted {
        &self.directions[side.index()]
    }
}
