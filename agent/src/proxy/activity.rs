//! The idle time-out of a connection.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// When a byte moved last, for the idle time-out. Most connections have none, and so no room for it.
#[derive(Debug)]
pub(super) struct Activity(Option<Box<Limited>>);

#[derive(Debug)]
struct Limited {
    last: Cell<Instant>,
    limit: Duration,
    timer: RefCell<Option<Pin<Box<Sleep>>>>,
}

impl Activity {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        let limited = |limit| Limited {
            last: Cell::new(Instant::now()),
            limit,
            timer: RefCell::default(),
        };
        Self(limit.map(|limit| Box::new(limited(limit))))
    }

    pub(super) fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn happened(&self) {
        if let Some(limited) = &self.0 {
            limited.last.set(Instant::now());
        }
    }

    /// Ready when nothing has happened for too long; never, where there is no limit.
    pub(super) fn poll_ends(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(Limited { last, limit, timer }) = self.0.as_deref() else {
            return Poll::Pending;
        };
        let mut timer = timer.borrow_mut();
        loop {
            let end = last.get() + *limit;
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
            ready!(timer.as_mut().poll(cx));
            timer.as_mut().reset(end);
        }
    }
}
