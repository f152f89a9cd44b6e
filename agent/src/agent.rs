//! The agent: wires discovery, identity, steering, workers and telemetry, and follows discovery.
//!
//! Control work runs here, on the main thread's runtime; connections never do.

use std::{
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
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};

use crate::{
    audits::Audits,
    config,
    discovery::{self, Discovery},
    identity::{Certificates, EmbeddedAuthority},
    memory,
    model::{Accelerate, Mesh, Node},
    pods::Pods,
    proxy::{Balance, Shared, Workers},
    reconcile::{Reconciler, Served},
    report::Report,
    steer::{AUDIT_INTERVAL, EbpfLog, EventReceiver, Steering, TcMethod},
    telemetry::{self, Admin, KernelCount, Metrics, Readiness, ReadinessTask},
};

/// Port of metrics and probes, on the node's addresses. Linkerd's.
const ADMIN_PORT: u16 = 4191;
/// How often the agent looks after what changes by itself in its pods.
const LOOK_AFTER_PODS: Duration = Duration::from_millis(500);
/// How long changes are gathered before what they touched is audited.
const AUDIT_DELAY: Duration = Duration::from_millis(20);
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
    /// How long a pod's connections may go on when it has left the mesh.
    pub withdraw_limit: Duration,
    pub workers: Option<u16>,
    pub accelerate: Accelerate,
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
    let (steering, events) = Steering::start(
        &node,
        workers,
        options.ebpf_log,
        options.tc_method,
        options.takeover,
        options.accelerate,
    )?;
    let readiness = Readiness::default();
    let folder = config::Folder::open(&node.runtime)?;
    let mut agent = Agent::start(
        &options, &discovery, &node, steering, workers, metrics, &readiness,
    )?;
    let (charge, in_charge) = oneshot::channel();
    let (asker, requests) = config::requests();
    let admin = Admin::new(Arc::clone(&agent.shared.metrics), readiness);
    let mut admin: Serving = Box::pin(serve_admin(
        node.addresses.clone(),
        folder,
        asker,
        admin,
        in_charge,
    ));
    tokio::select! {
        error = &mut admin => match error? {},
        result = agent.follow(mesh, events, requests, charge) => result?,
        _ = terminate.recv() => agent.wait_for_successor().await,
        _ = interrupt.recv() => {}
    }
    if !agent.pods.steering.is_in_charge() {
        // Metrics, probes and configuration are the successor's.
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
    pods: Pods,
    shared: Shared,
    status: watch::Receiver<discovery::Status>,
    steered: ReadinessTask,
    report: Report,
    audits: Audits,
    mesh_status: config::MeshStatus,
    reconciler: Reconciler,
}

type Serving = Pin<Box<dyn Future<Output = anyhow::Result<Infallible>>>>;

/// Serves metrics, probes and configuration. While another agent is in charge they are its own.
async fn serve_admin(
    addresses: Vec<IpAddr>,
    folder: config::Folder,
    asker: config::Asker,
    admin: Admin,
    in_charge: oneshot::Receiver<()>,
) -> anyhow::Result<Infallible> {
    let _ = in_charge.await;
    let path = folder.socket_path().display();
    let listener = folder
        .listen()
        .with_context(|| format!("can't serve the configuration at {path}"))?;
    tracing::info!(socket = %path, "the configuration is at /config");
    tokio::select! {
        error = config::serve(listener, asker, &admin) => Ok(error?),
        error = admin.serve(admin_listeners(&addresses)?) => Ok(error?),
    }
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
        let services = mesh.clone();
        metrics.set_endpoints(Box::new(move |id, port| {
            services.borrow().services.get(id)?.endpoint_counts(port)
        }));
        let shared = Shared {
            mesh,
            certificates,
            metrics,
            witnesses: Arc::default(),
            balance: Balance::default(),
        };
        let report = Report::new(Arc::clone(&shared.metrics), readiness);
        let audits = Audits::new(Arc::clone(&shared.metrics));
        let handles = (0..workers)
            .map(|_| steering.worker_handles())
            .collect::<Result<Vec<_>, _>>()?;
        let workers = Workers::start(&shared, handles)?;
        let reconciler = Reconciler::new(Arc::clone(&shared.metrics))
            .context("can't read the agent's own descriptors")?;
        tracing::info!(node = node.name, config = %options.config.display(), "the agent is up");
        Ok(Self {
            node: options.node.clone(),
            pods: Pods::new(
                options.node.clone(),
                steering,
                workers,
                shared.clone(),
                options.withdraw_limit,
            ),
            shared,
            status: discovery.status(),
            steered,
            report,
            audits,
            mesh_status: config::MeshStatus::new(options.config.clone()),
            reconciler,
        })
    }

    /// Enrols what discovery has for this node, and follows its changes until another agent has
    /// taken over. `charge` is told when metrics and probes are this agent's.
    async fn follow(
        &mut self,
        mut mesh: watch::Receiver<Arc<Mesh>>,
        mut events: EventReceiver,
        mut requests: mpsc::Receiver<config::Request>,
        charge: oneshot::Sender<()>,
    ) -> anyhow::Result<()> {
        let mut current = Arc::clone(&mesh.borrow_and_update());
        let mut charge = Some(charge);
        if self.pods.steering.is_in_charge() {
            charge.take().map(|charge| charge.send(()));
        } else {
            // Its pods are served by the other agent until this one can do it as well.
            self.pods.ensure_certificates(&current);
            self.wait_for_certificates(&current).await;
        }
        self.pods.steering.refuse_for(&current);
        self.pods.remove_leftovers(&current).await;
        let all = discovery::changes(&Mesh::default(), &current, &self.node);
        self.pods.apply(all).await;
        self.wait_for_certificates(&current).await;
        self.pods.steering.take_charge()?;
        charge.take().map(|charge| charge.send(()));
        self.steered.done();
        tracing::info!("in charge of the node's pods");
        memory::drop_program_pages();
        let mut status = self.status.clone();
        let mut report = tokio::time::interval(Duration::from_secs(1));
        let mut superseded = tokio::time::interval(LOOK_FOR_SUCCESSOR);
        let mut look = tokio::time::interval(LOOK_AFTER_PODS);
        let mut audit = tokio::time::interval(AUDIT_INTERVAL);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut audit_at = None;
        loop {
            tokio::select! {
                changed = mesh.changed() => {
                    changed.context("discovery ended")?;
                    let next = Arc::clone(&mesh.borrow_and_update());
                    // Before pods, whose enrolment takes longer.
                    self.pods.steering.refuse_for(&next);
                    self.pods.apply(discovery::changes(&current, &next, &self.node)).await;
                    current = next;
                }
                changed = status.changed() => {
                    changed.context("discovery ended")?;
                    let status = status.borrow_and_update().clone();
                    self.mesh_status.heard(&status);
                    self.shared.metrics.discovery_reload(status.refusal.is_none());
                }
                Some(request) = requests.recv() => self.tell(request),
                _ = look.tick() => self.pods.look_after(&current).await,
                _ = report.tick() => self.report(),
                event = events.next() => {
                    self.pods.touch(event);
                    audit_at.get_or_insert_with(|| Instant::now() + AUDIT_DELAY);
                }
                () = sleep_until(audit_at) => {
                    audit_at = None;
                    let found = self.pods.audit_touched(&current).await;
                    self.audits.found(found);
                }
                _ = audit.tick() => {
                    let started = Instant::now();
                    let found = self.pods.audit().await;
                    self.audits.whole(found, started.elapsed());
                }
                _ = superseded.tick() => {
                    if self.pods.steering.is_superseded() {
                        return Ok(());
                    }
                    self.pods.reopen();
                    self.pods.steering.notice_urgent();
                }
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

    fn report(&mut self) {
        self.report.certificates(&self.shared.certificates);
        self.report.degraded(self.pods.enrolments());
        self.report.cgroup(&self.pods.steering);
        self.pods.accelerate();
        self.reconciler.look(|| served(&self.pods));
    }

    /// Answers with the configuration, off this task.
    fn tell(&self, request: config::Request) {
        let served = served(&self.pods);
        let sections = config::Sections::new(
            self.node.clone(),
            self.mesh_status.clone(),
            config::certificates(&self.shared.certificates),
            self.audits.section(),
            &self.pods,
            served.clone(),
        );
        let workers = &self.pods.workers;
        let (tunnels, neighbours) = (workers.tunnels(), workers.neighbours());
        let ended = workers.ended();
        let account = self.reconciler.account(served);
        let age = self.reconciler.persistence();
        let mesh = Arc::clone(&self.shared.mesh.borrow());
        let balance = self.shared.balance.clone();
        tokio::spawn(async move {
            let (tunnels, neighbours, ended, account) =
                tokio::join!(tunnels, neighbours, ended, account);
            let carried = config::Carried {
                tunnels,
                neighbours,
                ended,
            };
            let services = config::services(&mesh, &balance);
            // Who asked may be gone.
            let _ = request.send(sections.complete(&carried, account, age, services));
        });
    }

    /// Told to end while another agent is starting to take over, this one serves until then.
    async fn wait_for_successor(&self) {
        let end = Instant::now() + SUCCESSOR_PATIENCE;
        while self.pods.steering.is_in_charge()
            && self.pods.steering.has_successor()
            && Instant::now() < end
        {
            tokio::time::sleep(LOOK_FOR_SUCCESSOR).await;
        }
    }

    /// Takes no new connection and waits for those that live.
    async fn drain(&mut self, limit: Duration) {
        self.steered.undo();
        let grace = if self.pods.steering.is_in_charge() {
            tracing::info!("draining: no new connections are taken, pods stay closed");
            self.pods.close();
            Duration::ZERO
        } else {
            tracing::info!("draining: another agent has taken over");
            ACCEPT_GRACE
        };
        // What a pod's netns is like is no longer this agent's to follow.
        let mut carried = self.pods.hand_over();
        let workers = &self.pods.workers;
        workers.leave(grace).await;
        let now = Instant::now();
        let (accepted, end) = (now + grace, now + limit);
        let mut mesh = self.shared.mesh.clone();
        mesh.mark_changed();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let mut look = tokio::time::interval(LOOK_AFTER_PODS);
        let mut reconcile = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                Ok(()) = mesh.changed() => {
                    let now = Arc::clone(&mesh.borrow_and_update());
                    carried.follow(&now, &self.node, workers).await;
                }
                _ = look.tick() => carried.end_withdrawals(workers).await,
                // Apps that go without a word would have it wait for them to its limit.
                _ = reconcile.tick() => self.reconciler.look(|| carried.served()),
                _ = ticks.tick() => {
                    self.pods.steering.notice_urgent();
                    let now = Instant::now();
                    let is_idle = now >= accepted && workers.live_connections() == 0;
                    if is_idle || now >= end {
                        return;
                    }
                }
            }
        }
    }
}

/// For ever without a time.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The pods that sockets are held of.
fn served(pods: &Pods) -> Vec<Served> {
    pods.all()
        .map(|pod| Served {
            workload: pod.workload.id.clone(),
            pod: Arc::clone(pod.enrolment.pod()),
            tasks: pod.connections.tasks(),
        })
        .collect()
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
