//! Every metric of the agent, in one registry.
//!
//! Workers reach connection metrics through [`WorkerMetrics`]; the other families are for events
//! that are rare beside a connection's bytes (handshakes, tunnels, reloads) and take a look-up in
//! a shared map each time.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use malla_common::Reason;
use nix::errno::Errno;
use prometheus::{
    IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector,
    proto::{MetricFamily, MetricType},
};

use super::{
    Direction, KernelCount,
    acceleration::AccelerationMetrics,
    collector::{Family, Sampled, label},
    errno_label,
    identity::IdentityMetrics,
    kernel,
    ledger::LedgerMetrics,
    load::LoadMetrics,
    logging::DroppedLines,
    process,
    steering::SteeringMetrics,
    transport::{self, ReadEndpoints, Transports, WorkerMetrics},
};

const BUILD: Family = Family {
    name: "malla_build_info",
    help: "What the agent was built from. Always 1.",
    kind: MetricType::GAUGE,
    labels: &["profile", "version"],
};

const DROPPED_LINES: Family = Family {
    name: "malla_log_lines_dropped_total",
    help: "Log lines given up because nobody read the log quickly enough.",
    kind: MetricType::COUNTER,
    labels: &[],
};

/// Whose listener it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Outbound,
    Inbound,
    Mesh,
    Admin,
}

impl Role {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Mesh => "mesh",
            Self::Admin => "admin",
        }
    }
}

/// The agent's metrics. Made once, shared by `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    transports: Arc<Transports>,
    kernel: Arc<Mutex<kernel::Slot>>,
    handshakes: IntCounterVec,
    tunnels: IntCounterVec,
    tunnels_open: IntGaugeVec,
    pub(super) load: LoadMetrics,
    discovery_reloads: IntCounterVec,
    source_replaced: IntCounter,
    accept_errors: IntCounterVec,
    identity: IdentityMetrics,
    pods_enrolled: IntGauge,
    enrolment_errors: IntCounterVec,
    steering: SteeringMetrics,
    acceleration: AccelerationMetrics,
    ledger: LedgerMetrics,
}

impl Metrics {
    /// A registry with every family. The process counts as started now.
    pub fn new() -> Self {
        let registry = Registry::new();
        let started = SystemTime::now();
        let transports = Arc::<Transports>::default();
        let read = Arc::clone(&transports);
        attach(
            &registry,
            Sampled::new(&transport::described(), move || {
                read.families(Instant::now())
            }),
        );
        let kernel = Arc::<Mutex<kernel::Slot>>::default();
        let read = Arc::clone(&kernel);
        attach(
            &registry,
            Sampled::new(&kernel::FAMILIES, move || {
                read.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .families()
            }),
        );
        attach(
            &registry,
            Sampled::new(&process::described(), move || process::families(started)),
        );
        attach(&registry, Sampled::new(&[BUILD], || vec![build_info()]));
        Self {
            handshakes: counters(
                &registry,
                "malla_handshakes_total",
                "TLS handshakes by how they ended: ok, or the reason.",
                &["direction", "result"],
            ),
            tunnels: counters(
                &registry,
                "malla_tunnels_total",
                "Tunnels to (outbound) and from (inbound) other agents that were opened.",
                &["direction"],
            ),
            tunnels_open: register(
                &registry,
                valid(IntGaugeVec::new(
                    Opts::new("malla_tunnels_open", "Tunnels that are open now."),
                    &["direction"],
                )),
            ),
            load: LoadMetrics::new(&registry),
            discovery_reloads: counters(
                &registry,
                "malla_discovery_reloads_total",
                "Times that discovery read its source anew: ok or error.",
                &["result"],
            ),
            source_replaced: register(
                &registry,
                valid(IntCounter::new(
                    "malla_source_replaced_total",
                    "Connections that the app sees with the pod's own address as source.",
                )),
            ),
            accept_errors: counters(
                &registry,
                "malla_accept_errors_total",
                "Errors of accept() on the agent's listeners.",
                &["role", "errno"],
            ),
            identity: IdentityMetrics::new(&registry),
            pods_enrolled: register(
                &registry,
                valid(IntGauge::new(
                    "malla_pods_enrolled",
                    "Pods whose traffic this agent steers.",
                )),
            ),
            enrolment_errors: counters(
                &registry,
                "malla_enrolment_errors_total",
                "Pods that could not be enrolled or withdrawn, by cause.",
                &["reason"],
            ),
            steering: SteeringMetrics::new(&registry),
            acceleration: AccelerationMetrics::new(&registry),
            ledger: LedgerMetrics::new(&registry),
            registry,
            transports,
            kernel,
        }
    }

    /// What a worker counts its connections with. One for each worker.
    pub fn worker(&self) -> WorkerMetrics {
        WorkerMetrics::new(Arc::clone(&self.transports))
    }

    /// From now on scrapes ask `read` for the kernel's counters, which must not block for long.
    pub fn set_kernel_counters(&self, read: Box<dyn Fn() -> Vec<KernelCount> + Send + Sync>) {
        let mut slot = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        slot.0 = Some(read);
    }

    /// From now on scrapes ask `read` how many endpoints a port of a Service has, which must not
    /// block for long. None: discovery has no such port.
    pub fn set_endpoints(&self, read: ReadEndpoints) {
        self.transports.set_endpoints(read);
    }

    /// Exports the log's lost lines. To be called once; a second log is not exported.
    pub fn watch_log(&self, dropped: DroppedLines) {
        let collector = Sampled::new(&[DROPPED_LINES], move || {
            let count = DROPPED_LINES.sample(Vec::new(), dropped.count());
            vec![DROPPED_LINES.with(vec![count])]
        });
        if let Err(error) = self.registry.register(Box::new(collector)) {
            tracing::warn!(%error, "lost log lines are not exported");
        }
    }

    /// A TLS handshake ended. `direction` is outbound for the client.
    pub fn handshake(&self, direction: Direction, result: Result<(), Reason>) {
        let result = result.map_or_else(Reason::as_str, |()| "ok");
        let labels = [direction.as_str(), result];
        self.handshakes.with_label_values(&labels).inc();
    }

    /// A tunnel is open until the returned value is dropped.
    pub fn tunnel_opened(&self, direction: Direction) -> TunnelMetrics {
        let labels = [direction.as_str()];
        self.tunnels.with_label_values(&labels).inc();
        let open = self.tunnels_open.with_label_values(&labels);
        open.inc();
        TunnelMetrics { open }
    }

    /// Discovery has read its source anew, or failed to.
    pub fn discovery_reload(&self, ok: bool) {
        let labels = [if ok { "ok" } else { "error" }];
        self.discovery_reloads.with_label_values(&labels).inc();
    }

    /// `accept` failed on a listener of `role`.
    pub fn accept_error(&self, role: Role, error: &io::Error) {
        let errno = error.raw_os_error().map(Errno::from_raw);
        let labels = [role.as_str(), &errno_label(errno)];
        self.accept_errors.with_label_values(&labels).inc();
    }

    /// An app sees a connection with its pod's own address in place of the client's.
    pub fn source_replaced(&self) {
        self.source_replaced.inc();
    }

    /// The metrics of certificates.
    pub fn identity(&self) -> &IdentityMetrics {
        &self.identity
    }

    /// How many pods' traffic this agent steers now.
    pub fn set_pods_enrolled(&self, pods: usize) {
        self.pods_enrolled
            .set(i64::try_from(pods).unwrap_or(i64::MAX));
    }

    /// A pod could not be enrolled or withdrawn. `reason` is the label of the error's variant.
    pub fn enrolment_error(&self, reason: &'static str) {
        self.enrolment_errors.with_label_values(&[reason]).inc();
    }

    /// Metrics of socket acceleration.
    pub fn acceleration(&self) -> &AccelerationMetrics {
        &self.acceleration
    }

    /// What the control side tells of steering.
    pub fn steering(&self) -> &SteeringMetrics {
        &self.steering
    }

    /// What the agent has open, and where the kernel disagrees.
    pub fn ledger(&self) -> &LedgerMetrics {
        &self.ledger
    }

    /// All metrics in Prometheus' text format 0.0.4.
    pub fn scrape(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts a tunnel as open until it is dropped.
#[derive(Debug)]
pub struct TunnelMetrics {
    open: IntGauge,
}

impl Drop for TunnelMetrics {
    fn drop(&mut self) {
        self.open.dec();
    }
}

fn build_info() -> MetricFamily {
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let version = env!("CARGO_PKG_VERSION");
    let labels = vec![label("profile", profile), label("version", version)];
    BUILD.with(vec![BUILD.sample(labels, 1)])
}

pub(super) fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> IntCounterVec {
    register(
        registry,
        valid(IntCounterVec::new(Opts::new(name, help), labels)),
    )
}

/// Names, helps and labels are constants of this module, and a test makes them all.
pub(super) fn valid<T>(metric: prometheus::Result<T>) -> T {
    metric.expect("metric names and labels are valid")
}

pub(super) fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    attach(registry, collector.clone());
    collector
}

fn attach(registry: &Registry, collector: impl Collector + 'static) {
    valid(registry.register(Box::new(collector)));
}

#[cfg(test)]
mod tests;
