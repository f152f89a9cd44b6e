//! TCP metrics of proxied connections, with Linkerd's names and labels.
//!
//! A proxied connection has two transports: `peer="src"`, which the agent accepted, and
//! `peer="dst"`, which it dialled. One of them is the leg to the pod's own app and reads
//! `tls="no_identity", no_tls_reason="loopback"`, as with Linkerd's proxies; the other is the leg
//! to the rest of the world and tells how that is secured.
//!
//! A worker keeps the series that it has seen by the labels' own pointers. Opening a connection
//! is one look-up there, and everything after it atomic additions on the series, shared by the
//! workers.
//!
//! An end that discovery knows has its namespace, pod and service account. Of an end that it
//! doesn't know, namespace and service account come from its certificate; without one, all three
//! are `unknown`.
//!
//! As with Linkerd's proxies, a scrape drops a series after it stood still for ten minutes without
//! a connection, so the series of a pod that is gone go too. A scrape has at most
//! [`series::MAX_LINES`] lines of them, and [`series::MAX_OF_ONE`] series of one workload; what is
//! beyond is summed, for each reporting workload, under the other end `other`.

mod families;
mod key;
mod reporter;
mod routes;
mod series;

use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    hash::{Hash, Hasher},
    io, ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use malla_common::Reason;
use nix::errno::Errno;

use super::Direction;
use crate::model::{MtlsMode, Service, SpiffeId, Workload};
pub(super) use families::described;
use routes::Route;
pub use routes::{ReadEndpoints, RouteMetrics};
use series::Series;
pub(super) use series::Transports;

/// The series that a worker remembers. Beyond it, the worker forgets all and begins anew.
const MAX_REMEMBERED: usize = 4096;

/// One of the two transports of a proxied connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The one that the agent accepted.
    Src,
    /// The one that the agent dialled.
    Dst,
}

impl Peer {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Src => "src",
            Self::Dst => "dst",
        }
    }
}

/// Why a leg has no mutual TLS, in Linkerd's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoTls {
    /// The leg is between the agent and the pod's app.
    Loopback,
    /// The client sent plaintext.
    PlaintextClient,
    /// The port is opted out.
    PortSkipped,
    /// Discovery knows no identity for the destination.
    NotProvidedByServiceDiscovery,
}

impl NoTls {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::PlaintextClient => "no_tls_from_remote",
            Self::PortSkipped => "port_skipped",
            Self::NotProvidedByServiceDiscovery => "not_provided_by_service_discovery",
        }
    }
}

/// How the leg between the agent and the other end is secured.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Security {
    /// Mutual TLS with this identity.
    MutualTls(Arc<SpiffeId>),
    /// Plaintext.
    None(NoTls),
}

/// What tells the series of one connection from others.
///
/// Equality and hash take workloads and Services by pointer, since they are of one immutable snapshot.
#[derive(Debug, Clone)]
pub struct ConnectionLabels {
    pub direction: Direction,
    /// The workload whose traffic the agent carries: the source of an outbound connection, the
    /// destination of an inbound one.
    pub reporter: Arc<Workload>,
    /// The workload at the other end, if discovery knows it.
    pub remote: Option<Arc<Workload>>,
    /// The Service that the client asked for.
    pub service: Option<Arc<Service>>,
    /// The port that the client wanted; of a Service, the endpoint's.
    pub target_port: u16,
    pub security: Security,
}

impl ConnectionLabels {
    fn pointers(&self) -> (*const Workload, *const Workload, *const Service) {
        let remote = self.remote.as_ref().map_or(ptr::null(), Arc::as_ptr);
        let service = self.service.as_ref().map_or(ptr::null(), Arc::as_ptr);
        (Arc::as_ptr(&self.reporter), remote, service)
    }
}

impl PartialEq for ConnectionLabels {
    fn eq(&self, other: &Self) -> bool {
        self.pointers() == other.pointers()
            && self.direction == other.direction
            && self.target_port == other.target_port
            && self.security == other.security
    }
}

impl Eq for ConnectionLabels {}

impl Hash for ConnectionLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.pointers().hash(state);
        self.direction.hash(state);
        self.target_port.hash(state);
        self.security.hash(state);
    }
}

/// Why a connection ended other than in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    pub reason: Reason,
    /// The kernel's error, where there was one: the label `errno`.
    pub errno: Option<Errno>,
}

impl Failure {
    /// With the error number of `error`, if it has one.
    pub fn new(reason: Reason, error: &io::Error) -> Self {
        let errno = error.raw_os_error().map(Errno::from_raw);
        Self {
            errno: errno.or(Self::from(reason).errno),
            reason,
        }
    }
}

impl From<Reason> for Failure {
    /// With the error number that the reason stands for, if it stands for one.
    fn from(reason: Reason) -> Self {
        let errno = match reason {
            Reason::ClientReset | Reason::ServerReset => Some(Errno::ECONNRESET),
            Reason::ConnectRefused => Some(Errno::ECONNREFUSED),
            Reason::ConnectTimeout => Some(Errno::ETIMEDOUT),
            Reason::DialPortsExhausted => Some(Errno::EADDRNOTAVAIL),
            _ => None,
        };
        Self { reason, errno }
    }
}

/// A worker's way to the metrics of its connections.
pub struct WorkerMetrics {
    transports: Arc<Transports>,
    /// The labels are the connections' own as well: each has the same for as long as it lives.
    remembered: HashMap<Arc<ConnectionLabels>, Arc<Series>>,
    /// By the place of the Service's snapshot, which is kept for as long, and the port.
    routes: HashMap<(usize, u16), (Arc<Service>, Arc<Route>)>,
}

impl WorkerMetrics {
    pub(super) fn new(transports: Arc<Transports>) -> Self {
        Self {
            transports,
            remembered: HashMap::new(),
            routes: HashMap::new(),
        }
    }

    /// Counts a connection that the agent accepted and now knows the labels of. No allocation and
    /// no lock where this worker has seen the labels before.
    pub fn open(&mut self, labels: &ConnectionLabels) -> ConnectionMetrics {
        let inbound = labels.direction == Direction::Inbound;
        let settings = &labels.reporter.settings;
        let mode = inbound.then(|| settings.mtls_on(labels.target_port));
        let (labels, series) = self.enter(labels);
        ConnectionMetrics::of(labels, series, mode)
    }

    /// Counts a connection to a port of a Service. As with [`Self::open`], no lock for one that
    /// this worker has seen.
    pub fn open_route(&mut self, service: &Arc<Service>, port: u16) -> RouteMetrics {
        if self.routes.len() >= MAX_REMEMBERED {
            self.forget();
        }
        let known = self.routes.entry((Arc::as_ptr(service).addr(), port));
        let (_, route) = known.or_insert_with(|| {
            let route = self.transports.routes.of(service, port);
            (Arc::clone(service), route)
        });
        RouteMetrics::open(Arc::clone(route))
    }

    /// Counts a connection that failed at the Service's endpoint of these labels and is tried at
    /// another one. It counts nowhere else until its end is known.
    pub fn retried(&mut self, labels: &ConnectionLabels, reason: Reason) {
        let (_, series) = self.enter(labels);
        series.retried(reason);
        series.leave();
    }

    /// The series of `labels`, entered.
    fn enter(&mut self, labels: &ConnectionLabels) -> (Arc<ConnectionLabels>, Arc<Series>) {
        let known = self.remembered.get_key_value(labels);
        if let Some((labels, series)) = known.filter(|(_, series)| series.enter()) {
            return (Arc::clone(labels), Arc::clone(series));
        }
        let series = self.transports.enter(labels);
        if self.remembered.len() >= MAX_REMEMBERED {
            self.forget();
        }
        let labels = Arc::new(labels.clone());
        self.remembered
            .insert(Arc::clone(&labels), Arc::clone(&series));
        (labels, series)
    }

    /// Lets go of what this worker remembers, and with it of the workloads of old snapshots. To be
    /// called when discovery has a new one. Living connections and their series aren't touched.
    pub fn forget(&mut self) {
        self.remembered.clear();
        self.routes.clear();
    }
}

impl fmt::Debug for WorkerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerMetrics")
            .field("remembered", &self.remembered.len())
            .finish_non_exhaustive()
    }
}

/// The metrics of one connection, from when it is accepted.
///
/// Dropped without a word it counts as closed with reason `shutdown`, which is the cause where a
/// connection's task is dropped with its worker. So the gauge of open connections can't leak.
#[derive(Debug)]
pub struct ConnectionMetrics {
    labels: Arc<ConnectionLabels>,
    series: Arc<Series>,
    began: Instant,
    dialled: Cell<bool>,
    closed: Cell<bool>,
    /// The mode of the port, until it has said whether it takes the connection. None: nobody asks.
    asked: Cell<Option<MtlsMode>>,
}

impl ConnectionMetrics {
    /// `series` has been entered.
    fn of(labels: Arc<ConnectionLabels>, series: Arc<Series>, asked: Option<MtlsMode>) -> Self {
        series.counters(Peer::Src).opened();
        Self {
            labels,
            series,
            began: Instant::now(),
            dialled: Cell::new(false),
            closed: Cell::new(false),
            asked: Cell::new(asked),
        }
    }

    fn authorized(&self, is_allowed: bool) {
        if let Some(mode) = self.asked.take() {
            self.series.authorized(mode, is_allowed);
        }
    }

    /// What tells the connection's series from others.
    pub fn labels(&self) -> &ConnectionLabels {
        &self.labels
    }

    /// How long ago the connection was accepted.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// The destination is connected: the second transport opens.
    pub fn dialled(&self) {
        self.authorized(true);
        if !self.dialled.replace(true) {
            self.series.counters(Peer::Dst).opened();
        }
    }

    /// `bytes` were read from this transport.
    pub fn read(&self, peer: Peer, bytes: u64) {
        self.series.counters(peer).read(bytes);
    }

    /// `bytes` were written to this transport.
    pub fn wrote(&self, peer: Peer, bytes: u64) {
        self.series.counters(peer).wrote(bytes);
    }

    /// Both directions ended in good order.
    pub fn close(&self) {
        self.end(None);
    }

    /// The connection was refused, reset or given up.
    pub fn fail(&self, failure: impl Into<Failure>) {
        self.end(Some(failure.into()));
    }

    fn end(&self, failure: Option<Failure>) {
        if self.closed.replace(true) {
            return;
        }
        let is_denied = |failure: Failure| {
            matches!(
                failure.reason,
                Reason::PlaintextRefused | Reason::ProbeUndeclared
            )
        };
        self.authorized(!failure.is_some_and(is_denied));
        if self.dialled.get() {
            self.series.counters(Peer::Dst).closed(failure);
        }
        self.series.counters(Peer::Src).closed(failure);
        let reason = failure.map(|failure| failure.reason);
        let seconds = self.age().as_secs_f64();
        self.series.reporter().ended(seconds, reason);
        self.series.leave();
    }
}

impl Drop for ConnectionMetrics {
    fn drop(&mut self) {
        self.end(Some(Reason::Shutdown.into()));
    }
}

#[cfg(test)]
mod tests;
