//! What malla tells about itself: metrics, the access log, logs and the admin endpoint.
//!
//! Nothing here decides anything. The data path calls in with what it has done, in plain values,
//! and pays for it with a hash look-up when a connection opens and an atomic addition for each
//! read and write. Formatting, and every lock that a scrape takes, stay off the workers.
//!
//! Names and labels are Linkerd's where it has one, else they begin with `malla_`. Every cause is
//! a word of [`malla_common::Reason`], the same in metrics and access log.

mod acceleration;
mod access;
mod admin;
mod collector;
#[cfg(test)]
mod fixtures;
mod http;
mod identity;
mod kernel;
mod ledger;
mod load;
mod logging;
mod metrics;
mod process;
mod readiness;
mod steering;
mod transport;

use std::fmt;

use nix::errno::Errno;

pub use access::{AccessRecord, Party, write_refusal};
pub use admin::{Admin, only_get};
pub use http::{serve as serve_http, text};
pub use kernel::{KernelCount, Unit, Verdict};
pub use logging::{LogFormat, init as init_logging};
pub use metrics::{Metrics, Role};
pub use readiness::{Readiness, ReadinessTask};
pub use transport::{
    ConnectionLabels, ConnectionMetrics, Failure, NoTls, Peer, RouteMetrics, Security,
    WorkerMetrics,
};

/// Which way a connection goes, seen from the workload that reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards the workload's app.
    Inbound,
    /// From the workload's app.
    Outbound,
}

impl Direction {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The label `errno`: the name that C has for it, empty without an error.
fn errno_label(errno: Option<Errno>) -> String {
    match errno {
        None => String::new(),
        Some(Errno::UnknownErrno) => "UNKNOWN_ERRNO".to_owned(),
        Some(errno) => format!("{errno:?}"),
    }
}
