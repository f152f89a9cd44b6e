//! The life of a connection that an app opens.

use std::{
    mem,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use malla_common::{Flow, Reason};
use tokio::net::TcpStream;

use super::{
    canonical, hbone,
    inbound::{self, ToNeighbour},
    neighbours::{self, Pair},
    optimistic::OptimisticData,
    pod::{Admitted, PodContext},
    pool,
    record::{Ends, Record},
    relay::{self, Side, Tunnelled},
    service::{self, Balanced},
    tunnel::{Lease, OpenError},
    worker::{Live, Worker},
};
use crate::{
    ledger::{Accounted, Kind},
    model::{Mesh, Service, Workload, ports},
    steer::to_network,
    telemetry::{ConnectionLabels, Direction, Failure, NoTls, Security},
};

/// Tunnels that a connection tries before it is refused.
const MAX_ATTEMPTS: u32 = 3;

/// Who called, and which address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// What becomes of a connection to an address.
pub(super) enum Route {
    /// Through the destination's agent, under mutual TLS.
    Mesh(Arc<Workload>),
    /// Through memory, to another pod of this agent.
    Neighbour(Arc<Workload>, Rc<Pair>),
    /// As plain TCP, and why.
    Plain(Option<Arc<Workload>>, NoTls),
}

/// What becomes known while a connection is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The other end's agent has proved its identity.
    Proved,
    /// What was to go through memory takes a tunnel after all.
    Tunnelled,
}

impl Progress {
    /// Tells the record of a connection to `destination`.
    pub(super) fn tell(self, record: &Record, destination: SocketAddr) {
        match self {
            Self::Proved => record.proved(),
            Self::Tunnelled => {
                record.tunnelled(SocketAddr::new(destination.ip(), ports::MESH));
            }
        }
    }
}

/// An open way to the other end.
pub(super) enum Server {
    Tunnel {
        /// Counts the stream for as long as it lives.
        lease: Lease,
        send: SendStream<Bytes>,
        receive: RecvStream,
    },
    Neighbour(Box<ToNeighbour>),
    /// … and what the client has said before it was open.
    Plain(Box<Accounted<TcpStream>>, Bytes),
}

/// A connection whose way to the other end is open: all that is kept of it while it is relayed.
struct Opened {
    server: Server,
    record: Record,
    /// What one to a Service counts by besides.
    balanced: Option<Box<Balanced>>,
    _admitted: Admitted,
    live: Live,
    client: Accounted<TcpStream>,
}

/// Accept, resolve, connect, relay, record.
pub(super) fn serve(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    client: Accounted<TcpStream>,
) -> impl Future<Output = ()> {
    // Opening takes many times the room of what is kept, and so has a place of its own.
    let opening = Box::pin(open(worker, pod, client));
    async move {
        let mut opened = opening.await;
        // Taken out of the option, it would have a second place.
        if let Some(opened) = &mut opened {
            opened.carry().await;
        }
    }
}

/// None: it was refused, or has failed, and that is recorded.
async fn open(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    client: Accounted<TcpStream>,
) -> Option<Opened> {
    let live = worker.count_live();
    // A connection that its client reset before it was accepted has no ends.
    let (Ok(source), Ok(destination)) = (client.peer_addr(), client.local_addr()) else {
        return None;
    };
    let source = canonical(source);
    let destination = with_scope(&worker, source, canonical(destination));
    let mesh = worker.mesh();
    let refuse = |reason| {
        worker.refuse(Direction::Outbound, source, destination, reason);
        None
    };
    if is_own_listener(&pod, &mesh, destination) {
        return refuse(Reason::OwnListener);
    }
    let Some(admitted) = pod.admit() else {
        return refuse(Reason::ConnectionLimit);
    };
    let asked = Asked {
        source,
        destination,
    };
    let data = OptimisticData::of(&client, &worker.buffers);
    let (mut server, record, balanced) = if let Some(service) = mesh.service_at(destination.ip()) {
        let port = destination.port();
        let route = worker.series.borrow_mut().open_route(service, port);
        drop(mesh);
        let (server, record, balanced) = service::open(&worker, &pod, asked, &data, route).await?;
        (server, record, Some(Box::new(balanced)))
    } else {
        let route = route(&worker, &pod, &mesh, source.ip(), destination);
        drop(mesh);
        let (labels, ends) = labels(&pod, &route, None, &asked, destination);
        let record = Record::open(&worker, &pod, &labels, &ends);
        let told = |progress: Progress| progress.tell(&record, destination);
        let way = Way {
            route: &route,
            source,
            destination,
            within: None,
        };
        match connect(&worker, &pod, &way, &data, told).await {
            Ok(server) => (server, record, None),
            Err(failure) => {
                record.close(Err(failure));
                return None;
            }
        }
    };
    record.dialled();
    if let Server::Tunnel { send, .. } = &mut server {
        record.client_sent(data.kept().len());
        if let Some(failure) = data.failure() {
            relay::reset_behind(send).await;
            record.close(Err(failure));
            return None;
        }
    }
    Some(Opened {
        server,
        record,
        balanced,
        _admitted: admitted,
        live,
        client,
    })
}

impl Opened {
    /// Moves bytes until both directions have ended.
    async fn carry(&mut self) {
        let buffers = &self.live.worker().buffers;
        let (record, client) = (&self.record, &self.client);
        let idle = record.pod().workload().settings.idle_timeout;
        // A tunnel is what most connections take, and what the task has room for.
        let result = match &mut self.server {
            Server::Tunnel {
                lease,
                send,
                receive,
            } => {
                let (client, stream) = ((Side::Client, &**client), (send, receive));
                Tunnelled::new(buffers, record, client, stream, None, idle)
                    .await
                    .map_err(|end| lease.failed(end))
            }
            Server::Neighbour(server) => Box::pin(server.relay(buffers, client, record)).await,
            Server::Plain(server, said) => {
                let said = mem::take(said);
                Box::pin(relay::tcp(buffers, &[record], client, said, server, idle))
                    .await
                    .map_err(Failure::from)
            }
        };
        if let Some(balanced) = self.balanced.take() {
            balanced
                .0
                .close(result.as_ref().err().map(|failure| failure.reason));
        }
        self.record.close(result);
    }
}

/// A link-local address means nothing without the interface that the SYN left by.
fn with_scope(worker: &Worker, source: SocketAddr, destination: SocketAddr) -> SocketAddr {
    let SocketAddr::V6(v6) = destination else {
        return destination;
    };
    if !v6.ip().is_unicast_link_local() {
        return destination;
    }
    let flow = Flow {
        source: source.ip().into(),
        destination: destination.ip().into(),
        source_port: source.port(),
        destination_port: destination.port(),
    };
    let mut scopes = worker.scopes.borrow_mut();
    let scope = scopes.get(&flow, 0).unwrap_or(0);
    // The entry also tells `lookup` of this SYN, and must not tell of a later one.
    let _ = scopes.remove(&flow);
    SocketAddrV6::new(*v6.ip(), v6.port(), 0, scope).into()
}

/// A connection to one of the agent's own listeners would come back to it for ever.
pub(super) fn is_own_listener(pod: &PodContext, mesh: &Mesh, destination: SocketAddr) -> bool {
    // Nothing is steered to the loopback: who comes by it has called this listener itself.
    let own = destination.ip().is_loopback() || pod.pod.owns(destination.ip());
    if own && pod.pod.listener_ports.contains(destination.port()) {
        return true;
    }
    destination.port() == ports::MESH
        && mesh
            .workload_at(destination.ip())
            .is_some_and(|workload| workload.meshed)
}

/// How `destination` is reached, the address of a workload or of a stranger.
pub(super) fn route(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    mesh: &Mesh,
    client: IpAddr,
    destination: SocketAddr,
) -> Route {
    match mesh.workload_at(destination.ip()) {
        Some(workload) if workload.serves_mesh_to(client, destination.port()) => {
            let workload = Arc::clone(workload);
            // The mesh would only come back to this agent.
            match neighbours::pair(worker, pod, &workload, destination.ip()) {
                Some(pair) => Route::Neighbour(workload, pair),
                None => Route::Mesh(workload),
            }
        }
        Some(workload) if workload.meshed => {
            Route::Plain(Some(Arc::clone(workload)), NoTls::PortSkipped)
        }
        workload => Route::Plain(workload.cloned(), NoTls::NotProvidedByServiceDiscovery),
    }
}

/// What the record of a connection says that goes to `destination`.
pub(super) fn labels(
    pod: &PodContext,
    route: &Route,
    service: Option<Arc<Service>>,
    asked: &Asked,
    destination: SocketAddr,
) -> (ConnectionLabels, Ends) {
    let (remote, security, dialled, tunnelled) = match route {
        Route::Mesh(workload) => (
            Some(Arc::clone(workload)),
            Security::MutualTls(Arc::clone(&workload.identity)),
            SocketAddr::new(destination.ip(), ports::MESH),
            Some(destination),
        ),
        Route::Neighbour(workload, _) => (
            Some(Arc::clone(workload)),
            Security::MutualTls(Arc::clone(&workload.identity)),
            destination,
            None,
        ),
        Route::Plain(workload, why) => (workload.clone(), Security::None(*why), destination, None),
    };
    let labels = ConnectionLabels {
        direction: Direction::Outbound,
        reporter: pod.workload(),
        remote,
        service,
        target_port: destination.port(),
        security,
    };
    let ends = Ends {
        client: asked.source,
        destination: dialled,
        tunnelled,
    };
    (labels, ends)
}

/// The way to a server.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) route: &'a Route,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    /// How long its agent may try, where another server will be tried afterwards.
    pub(super) within: Option<Duration>,
}

/// Opens a way, and tells what the record of the connection says of it.
pub(super) async fn connect(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    way: &Way<'_>,
    data: &OptimisticData<'_>,
    told: impl Fn(Progress),
) -> Result<Server, Failure> {
    let Way {
        route,
        source,
        destination,
        within,
    } = *way;
    let workload = match route {
        Route::Mesh(workload) => workload,
        Route::Neighbour(_, pair) if pair.allowed().await? => {
            told(Progress::Proved);
            data.fail_if_reset()?;
            let (ends, said) = ((source, destination), (data.kept(), data.ends()));
            let opened = inbound::reach_neighbour(worker, pod, pair, ends, said).await?;
            return Ok(Server::Neighbour(Box::new(opened)));
        }
        Route::Neighbour(workload, _) => {
            told(Progress::Tunnelled);
            workload
        }
        Route::Plain(..) => {
            let settings = &pod.workload().settings;
            if !settings.allows_plaintext_to(destination.ip()) {
                return Err(Reason::EgressRefused.into());
            }
            data.fail_if_reset()?;
            let server = to_network(&pod.pod, destination, settings.connect_timeout)
                .await
                .map_err(|error| Failure::from(error.reason()))?;
            let server = Box::new(server.turned_into(Kind::PlaintextOutbound));
            return Ok(Server::Plain(server, data.kept()));
        }
    };
    let reporter = pod.workload();
    let mut attempts = 1;
    loop {
        let request = hbone::connect(&reporter, source, destination, within);
        let identity = &workload.identity;
        let asked = pool::request(worker, pod, destination.ip(), identity, request).await;
        let answered = match asked {
            Ok(requested) => {
                told(Progress::Proved);
                requested.answered(data).await
            }
            Err(error) => Err(error),
        };
        match answered {
            Ok((lease, send, receive)) => {
                return Ok(Server::Tunnel {
                    lease,
                    send,
                    receive,
                });
            }
            Err(OpenError::Again(_)) if attempts < MAX_ATTEMPTS => attempts += 1,
            Err(error) => return Err(error.into()),
        }
    }
}
