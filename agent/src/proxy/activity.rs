//! The idle time-out of a connection.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// When a byte moved last, for the idle time-out.
#[derive(Debug)]
pub(super) struct Activity {
    last: Cell<Instant>,
    limit: Option<Duration>,
    /// Most connections have no limit, and so no timer.
    timer: RefCell<Option<Pin<Box<Sleep>>>>,
}

impl Activity {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self {
            last: Cell::new(Instant::now()),
            limit,
            timer: RefCell::default(),
        }
    }

    pub(super) fn happened(&self) {
        if self.limit.is_some() {
            self.last.set(Instant::now());
        }
    }

    /// Ready when nothing has happened for too long; never, where there is no limit.
    pub(super) fn poll_ends(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(limit) = self.limit else {
            return Poll::Pending;
        };
        let mut timer = self.timer.borrow_mut();
        loop {
            let end = self.last.get() + limit;
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
            ready!(timer.as_mut().poll(cx));
            timer.as_mut().reset(end);
        }
    }
}
