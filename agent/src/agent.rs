//! The agent: wires discovery, identity, steering, workers and telemetry, and follows discovery.
//!
//! Control work runs here, on the main thread's runtime; connections never do.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use malla_common::{Counter, MAX_WORKERS, Outcome};
use socket2::{Domain, Socket, Type};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
    time::Instant,
};

use crate::{
    discovery::{self, Changes, Discovery},
    identity::{Certificates, EmbeddedAuthority},
    model::{Mesh, Node, Workload, WorkloadId},
    proxy::{Shared, Workers},
    report::Report,
    steer::{EbpfLog, Enrolment, Pod, Steering, TcMethod},
    telemetry::{self, KernelCount, Metrics, Readiness, ReadinessTask},
};

/// Port of metrics and probes, on the node's addresses. Linkerd's.
const ADMIN_PORT: u16 = 4191;
/// How often enrolments that failed are tried again.
const ENROL_AGAIN: Duration = Duration::from_millis(500);
/// How often an agent looks whether another has taken over.
const LOOK_FOR_SUCCESSOR: Duration = Duration::from_millis(100);
/// How long an agent that is told to end waits for one that is starting to take over.
const SUCCESSOR_PATIENCE: Duration = Duration::from_secs(30);
/// How long listeners stay open whose place another agent's have taken: a connection that was
/// answered there is completed there, and a lost packet is sent again after 1 and 3 s.
const ACCEPT_GRACE: Duration = Duration::from_secs(5);
/// How long the agent waits for its pods' first certificates before it is ready without them.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(5);

/// What the command line says.
#[derive(Debug)]
pub struct Options {
    pub config: PathBuf,
    pub node: String,
    pub ebpf_log: EbpfLog,
    pub tc_method: TcMethod,
    /// Take the place of a living agent.
    pub takeover: bool,
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
    let steering = Steering::start(
        &node,
        workers,
        options.ebpf_log,
        options.tc_method,
        options.takeover,
    )?;
    let readiness = Readiness::default();
    let mut agent = Agent::start(
        &options, &discovery, &node, steering, workers, metrics, &readiness,
    )?;
    let (charge, in_charge) = oneshot::channel();
    let mut admin: Admin = Box::pin(serve_admin(
        node.addresses.clone(),
        Arc::clone(&agent.shared.metrics),
        readiness,
        in_charge,
    ));
    tokio::select! {
        error = &mut admin => match error? {},
        result = agent.follow(mesh, charge) => result?,
        _ = terminate.recv() => agent.wait_for_successor().await,
        _ = interrupt.recv() => {}
    }
    if !agent.steering.is_in_charge() {
        // Metrics and probes are the successor's.
        admin = Box::pin(std::future::pending());
    }
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

type Admin = Pin<Box<dyn Future<Output = anyhow::Result<Infallible>>>>;

/// Serves metrics and probes. While another agent is in charge they are its own.
async fn serve_admin(
    addresses: Vec<IpAddr>,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    in_charge: oneshot::Receiver<()>,
) -> anyhow::Result<Infallible> {
    let _ = in_charge.await;
    let admin = telemetry::serve_admin(admin_listeners(&addresses)?, metrics, readiness);
    Ok(admin.await?)
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

    /// Enrols what discovery has for this node, and follows its changes until another agent has
    /// taken over. `charge` is told when metrics and probes are this agent's.
    async fn follow(
        &mut self,
        mut mesh: watch::Receiver<Arc<Mesh>>,
        charge: oneshot::Sender<()>,
    ) -> anyhow::Result<()> {
        let mut current = Arc::clone(&mesh.borrow_and_update());
        let mut charge = Some(charge);
        if self.steering.is_in_charge() {
            charge.take().map(|charge| charge.send(()));
        } else {
            // Its pods are served by the other agent until this one can do it as well.
            self.ensure_certificates(&current);
            self.wait_for_certificates(&current).await;
        }
        let ids: Vec<&WorkloadId> = current.enrolled_on(&self.node).map(|w| &w.id).collect();
        self.steering.remove_leftovers(|id| ids.contains(&id)).await;
        self.apply(discovery::changes(&Mesh::default(), &current, &self.node))
            .await;
        self.wait_for_certificates(&current).await;
        self.steering.take_charge()?;
        charge.take().map(|charge| charge.send(()));
        self.steered.done();
        tracing::info!("in charge of the node's pods");
        let mut status = self.status.clone();
        let mut report = tokio::time::interval(Duration::from_secs(1));
        let mut superseded = tokio::time::interval(LOOK_FOR_SUCCESSOR);
        let mut again = tokio::time::interval(ENROL_AGAIN);
        loop {
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
                _ = again.tick(), if !self.failed.is_empty() => {
                    self.enrol_failed(&current).await;
                }
                _ = report.tick() => self.report(),
                _ = superseded.tick() => {
                    if !self.steering.is_in_charge() {
                        return Ok(());
                    }
                    self.reopen();
                }
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

    fn ensure_certificates(&self, mesh: &Mesh) {
        for workload in mesh.enrolled_on(&self.node) {
            if let Err(error) = self.shared.certificates.ensure(&workload.identity) {
                tracing::error!(workload = %workload.id, %error, "no certificate for a workload");
            }
        }
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

    /// An agent that takes over puts its own listeners in the place of this one's. When it dies
    /// before it is in charge, pods are closed until this one's are back.
    fn reopen(&self) {
        if self.steering.has_successor() {
            return;
        }
        for enrolment in self.enrolled.values() {
            let workload = enrolment.workload();
            match enrolment.reopen() {
                Ok(false) => {}
                Ok(true) => tracing::warn!(%workload, "its listeners were missing, and are back"),
                Err(error) => tracing::error!(%workload, %error, "can't put its listeners back"),
            }
        }
    }

    fn report(&mut self) {
        self.report.certificates(&self.shared.certificates);
        self.report.degraded(self.enrolled.values());
        self.report.cgroup(&self.steering);
    }

    /// Told to end while another agent is starting to take over, this one serves until then.
    async fn wait_for_successor(&self) {
        let end = Instant::now() + SUCCESSOR_PATIENCE;
        while self.steering.is_in_charge() && self.steering.has_successor() && Instant::now() < end
        {
            tokio::time::sleep(LOOK_FOR_SUCCESSOR).await;
        }
    }

    /// Takes no new connection and waits for those that live.
    async fn drain(&mut self, limit: Duration) {
        self.steered.undo();
        let grace = if self.steering.is_in_charge() {
            tracing::info!("draining: no new connections are taken, pods stay closed");
            self.steering.give_up_charge(self.enrolled.values());
            Duration::ZERO
        } else {
            tracing::info!("draining: another agent has taken over");
            ACCEPT_GRACE
        };
        // What a pod's netns is like is no longer this agent's to follow.
        let enrolled = self.enrolled.drain();
        let mut pods: HashMap<WorkloadId, Arc<Pod>> = enrolled
            .map(|(id, enrolment)| (id, Arc::clone(enrolment.pod())))
            .collect();
        self.workers.leave(grace).await;
        let now = Instant::now();
        let (accepted, end) = (now + grace, now + limit);
        let mut mesh = self.shared.mesh.clone();
        let mut current = Arc::clone(&mesh.borrow_and_update());
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                Ok(()) = mesh.changed() => {
                    let next = Arc::clone(&mesh.borrow_and_update());
                    let changes = discovery::changes(&current, &next, &self.node);
                    let gone = changes.reenrolled.into_iter().map(|changed| changed.old);
                    for workload in gone.chain(changes.removed) {
                        if let Some(pod) = pods.remove(&workload.id) {
                            self.workers.remove(&pod).await;
                        }
                    }
                    current = next;
                }
                _ = ticks.tick() => {
                    let now = Instant::now();
                    let is_idle = now >= accepted && self.workers.live_connections() == 0;
                    if is_idle || now >= end {
                        return;
                    }
                }
            }
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

/// Two agents have them for a moment when one takes over.
fn admin_listeners(addresses: &[IpAddr]) -> anyhow::Result<Vec<TcpListener>> {
    addresses
        .iter()
        .map(|address| {
            let address = SocketAddr::new(*address, ADMIN_PORT);
            admin_listener(address).with_context(|| {
                format!("can't serve metrics on {address}: is it the node's, and free?")
            })
        })
        .collect()
}

fn admin_listener(address: SocketAddr) -> io::Result<TcpListener> {
    const BACKLOG: i32 = 128;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
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
