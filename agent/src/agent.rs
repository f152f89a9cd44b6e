//! The agent: wires discovery, identity, steering, workers and telemetry, and follows discovery.
//!
//! Control work runs here, on the main thread's runtime; connections never do.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use malla_common::{Counter, MAX_WORKERS, Outcome};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    discovery::{self, Changes, Discovery},
    identity::{Certificates, EmbeddedAuthority},
    model::{Mesh, Node, Workload, WorkloadId},
    proxy::{Shared, Workers},
    report::Report,
    steer::{EbpfLog, Enrolment, Steering, TcMethod},
    telemetry::{self, KernelCount, Metrics, Readiness, ReadinessTask},
};

/// Port of metrics and probes, on the node's addresses. Linkerd's.
const ADMIN_PORT: u16 = 4191;
/// How long after a failure a pod's enrolment is tried again.
const ENROL_AGAIN: Duration = Duration::from_millis(500);
/// How long the agent waits for its pods' first certificates before it is ready without them.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(5);

/// What the command line says.
#[derive(Debug)]
pub struct Options {
    pub config: PathBuf,
    pub node: String,
    pub ebpf_log: EbpfLog,
    pub tc_method: TcMethod,
    pub drain_limit: Duration,
    pub workers: Option<u16>,
}

/// Runs until SIGTERM or SIGINT, then drains.
pub async fn run(options: Options, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("can't handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't handle SIGINT")?;
    raise_descriptor_limit();

    let discovery = discovery::file::watch(&options.config).await?;
    let mesh = discovery.mesh();
    let first = Arc::clone(&mesh.borrow());
    let Some(node) = first.nodes.get(&options.node).cloned() else {
        let known: Vec<&String> = first.nodes.keys().collect();
        bail!(
            "{}: no node is named `{}` (there are: {known:?}): set --node to one of them",
            options.config.display(),
            options.node
        );
    };
    // The cgroup comes before every socket.
    let workers = options.workers.unwrap_or_else(default_workers);
    let steering = Steering::start(&node, workers, options.ebpf_log, options.tc_method)?;
    let readiness = Readiness::default();
    let mut agent = Agent::start(
        &options, &discovery, &node, steering, workers, metrics, &readiness,
    )?;
    let admin = telemetry::serve_admin(
        admin_listeners(&node.addresses)?,
        Arc::clone(&agent.shared.metrics),
        readiness,
    );
    tokio::pin!(admin);
    tokio::select! {
        error = &mut admin => match error? {},
        result = agent.follow(mesh) => result?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("draining: no new connections are taken, pods stay closed");
    tokio::select! {
        error = &mut admin => match error? {},
        () = agent.drain(options.drain_limit) => {}
        _ = terminate.recv() => tracing::info!("told again to end: live connections are reset"),
        _ = interrupt.recv() => tracing::info!("told again to end: live connections are reset"),
    }
    Ok(())
}

struct Agent {
    node: String,
    steering: Steering,
    shared: Shared,
    workers: Workers,
    enrolled: HashMap<WorkloadId, Enrolment>,
    /// Workloads whose enrolment failed, with what was said of it, to be tried again.
    failed: HashMap<WorkloadId, String>,
    status: watch::Receiver<discovery::Status>,
    steered: ReadinessTask,
    report: Report,
}

impl Agent {
    fn start(
        options: &Options,
        discovery: &Discovery,
        node: &Node,
        steering: Steering,
        workers: u16,
        metrics: Arc<Metrics>,
        readiness: &Readiness,
    ) -> anyhow::Result<Self> {
        let steered = readiness.register("steering");
        let mesh = discovery.mesh();
        let first = Arc::clone(&mesh.borrow());
        let authority = EmbeddedAuthority::new(&first.identity.directory);
        let certificates = Arc::new(Certificates::new(
            Arc::new(authority),
            first.trust_domain.clone(),
            first.identity.certificate_lifetime,
        ));
        let counters = steering.counters()?;
        metrics.set_kernel_counters(Box::new(move || {
            counters()
                .into_iter()
                .map(|(counter, value)| kernel_count(counter, value))
                .collect()
        }));
        let shared = Shared {
            mesh,
            certificates,
            metrics,
        };
        let report = Report::new(Arc::clone(&shared.metrics), readiness);
        let handles = (0..workers)
            .map(|_| steering.worker_handles())
            .collect::<Result<Vec<_>, _>>()?;
        let workers = Workers::start(&shared, handles)?;
        tracing::info!(node = node.name, config = %options.config.display(), "the agent is up");
        Ok(Self {
            node: options.node.clone(),
            steering,
            shared,
            workers,
            enrolled: HashMap::new(),
            failed: HashMap::new(),
            status: discovery.status(),
            steered,
            report,
        })
    }

    /// Enrols what discovery has for this node, and follows its changes.
    async fn follow(&mut self, mut mesh: watch::Receiver<Arc<Mesh>>) -> anyhow::Result<()> {
        let mut current = Arc::clone(&mesh.borrow_and_update());
        let ids: Vec<&WorkloadId> = current.enrolled_on(&self.node).map(|w| &w.id).collect();
        self.steering.remove_leftovers(|id| ids.contains(&id)).await;
        self.apply(discovery::changes(&Mesh::default(), &current, &self.node))
            .await;
        self.wait_for_certificates(&current).await;
        self.steered.done();
        let mut status = self.status.clone();
        let mut report = tokio::time::interval(Duration::from_secs(1));
        loop {
            let again = Instant::now() + ENROL_AGAIN;
            tokio::select! {
                changed = mesh.changed() => {
                    changed.context("discovery ended")?;
                    let next = Arc::clone(&mesh.borrow_and_update());
                    self.apply(discovery::changes(&current, &next, &self.node)).await;
                    current = next;
                }
                changed = status.changed() => {
                    changed.context("discovery ended")?;
                    let refused = status.borrow_and_update().refusal.is_some();
                    self.shared.metrics.discovery_reload(!refused);
                }
                () = sleep_until(again), if !self.failed.is_empty() => {
                    self.enrol_failed(&current).await;
                }
                _ = report.tick() => self.report(),
            }
        }
    }

    async fn apply(&mut self, changes: Changes) {
        if changes.is_empty() {
            return;
        }
        for workload in changes.removed {
            self.withdraw(&workload).await;
        }
        for changed in changes.reenrolled {
            self.withdraw(&changed.old).await;
            self.enrol(&changed.new).await;
        }
        for changed in changes.updated {
            self.update(&changed.new).await;
        }
        for workload in changes.added {
            self.enrol(&workload).await;
        }
    }

    async fn enrol(&mut self, workload: &Arc<Workload>) {
        if let Err(error) = self.shared.certificates.ensure(&workload.identity) {
            tracing::error!(workload = %workload.id, %error, "no certificate for a workload");
        }
        match self.steering.enrol(workload).await {
            Ok((enrolment, listeners)) => {
                self.failed.remove(&workload.id);
                self.workers.add(enrolment.pod(), workload, listeners).await;
                self.enrolled.insert(workload.id.clone(), enrolment);
                self.shared.metrics.set_pods_enrolled(self.enrolled.len());
                tracing::info!(workload = %workload.id, identity = %workload.identity, "enrolled");
            }
            Err(error) => {
                let said = error.to_string();
                // The same failure, again and again, is told once.
                if self.failed.get(&workload.id) != Some(&said) {
                    tracing::error!(workload = %workload.id, %error, "can't enrol a workload");
                    self.shared.metrics.enrolment_error(error.reason());
                    self.failed.insert(workload.id.clone(), said);
                }
            }
        }
    }

    async fn enrol_failed(&mut self, mesh: &Mesh) {
        let failed: Vec<WorkloadId> = self.failed.keys().cloned().collect();
        for id in failed {
            match mesh.workloads.get(&id) {
                Some(workload) => self.enrol(&Arc::clone(workload)).await,
                None => {
                    self.failed.remove(&id);
                }
            }
        }
    }

    async fn update(&mut self, workload: &Arc<Workload>) {
        let Some(enrolment) = self.enrolled.get(&workload.id) else {
            return;
        };
        if let Err(error) = enrolment.update(&workload.settings) {
            tracing::error!(workload = %workload.id, %error, "can't put settings in force");
        }
        self.workers.update(workload).await;
        tracing::info!(workload = %workload.id, "settings changed");
    }

    async fn withdraw(&mut self, workload: &Workload) {
        self.failed.remove(&workload.id);
        match self.enrolled.remove(&workload.id) {
            Some(enrolment) => {
                self.workers.remove(enrolment.pod()).await;
                self.steering.withdraw(enrolment).await;
            }
            // Its enrolment failed, but an earlier agent may have enrolled it.
            None => self.steering.remove(&workload.id).await,
        }
        let identity = &workload.identity;
        let used = self
            .shared
            .mesh
            .borrow()
            .enrolled_on(&self.node)
            .any(|w| w.identity == *identity);
        if !used {
            self.shared.certificates.release(identity);
        }
        self.shared.metrics.set_pods_enrolled(self.enrolled.len());
        tracing::info!(workload = %workload.id, "withdrawn");
    }

    /// Ready means that pods can speak. An authority that fails does not hold up the rest.
    async fn wait_for_certificates(&self, mesh: &Mesh) {
        let ready = async {
            for workload in mesh.enrolled_on(&self.node) {
                if let Err(error) = self.shared.certificates.ready(&workload.identity).await {
                    tracing::warn!(identity = %workload.identity, %error, "no certificate yet");
                }
            }
        };
        let _ = tokio::time::timeout(CERTIFICATE_PATIENCE, ready).await;
    }

    fn report(&mut self) {
        self.report.certificates(&self.shared.certificates);
        self.report.degraded(self.enrolled.values());
        self.report.cgroup(&self.steering);
    }

    /// Takes no new connection and waits for those that live.
    async fn drain(&self, limit: Duration) {
        self.steered.undo();
        self.workers.stop_accepting().await;
        let end = Instant::now() + limit;
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while self.workers.live_connections() > 0 && Instant::now() < end {
            ticks.tick().await;
        }
    }
}

fn kernel_count(counter: Counter, value: u64) -> KernelCount {
    KernelCount {
        unit: match counter.unit {
            malla_common::Unit::Syns => telemetry::Unit::Syns,
            malla_common::Unit::Packets => telemetry::Unit::Packets,
        },
        direction: match counter.direction {
            malla_common::Direction::Outbound => telemetry::Direction::Outbound,
            malla_common::Direction::Inbound => telemetry::Direction::Inbound,
        },
        verdict: match counter.outcome {
            Outcome::Steered => telemetry::Verdict::Steered,
            Outcome::Passed => telemetry::Verdict::Passed,
            Outcome::Refused => telemetry::Verdict::Refused,
            Outcome::Dropped => telemetry::Verdict::Dropped,
        },
        reason: counter.reason,
        value,
    }
}

fn admin_listeners(addresses: &[IpAddr]) -> anyhow::Result<Vec<TcpListener>> {
    addresses
        .iter()
        .map(|address| {
            let address = SocketAddr::new(*address, ADMIN_PORT);
            TcpListener::bind(address).with_context(|| {
                format!("can't serve metrics on {address}: is it the node's, and free?")
            })
        })
        .collect()
}

/// One worker for each processor that this process may run on.
fn default_workers() -> u16 {
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(available.min(MAX_WORKERS as usize)).unwrap_or(1)
}

/// Each connection takes two descriptors or more: the soft limit is of another age.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "can't raise the limit of open files");
    }
}
