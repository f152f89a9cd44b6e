//! The idle time-out of a connection.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

/// When a byte moved last, for the idle time-out.
#[derive(Debug)]
pub(super) struct Activity {
    last: Cell<Instant>,
    limit: Option<Duration>,
}

impl Activity {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self {
            last: Cell::new(Instant::now()),
            limit,
        }
    }

    pub(super) fn happened(&self) {
        if self.limit.is_some() {
            self.last.set(Instant::now());
        }
    }

    /// Returns when nothing has happened for too long; never, where there is no limit.
    pub(super) async fn ends(&self) {
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
