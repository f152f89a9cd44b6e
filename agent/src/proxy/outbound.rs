//! The life of a connection that an app opens.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV6},
    rc::Rc,
    sync::Arc,
};

use malla_common::{Flow, Reason};
use tokio::net::TcpStream;

use super::{
    canonical, hbone,
    inbound::{self, FromNeighbour},
    neighbours::{self, Pair},
    pod::PodContext,
    pool,
    record::{Ends, Record},
    relay::{self, Side},
    tunnel::OpenError,
    worker::Worker,
};
use crate::{
    ledger::{Accounted, Kind},
    model::{Mesh, Workload, ports},
    steer::to_network,
    telemetry::{ConnectionLabels, Direction, Failure, NoTls, Security},
};

/// Tunnels that a connection tries before it is refused.
const MAX_ATTEMPTS: u32 = 3;

/// What becomes of a connection to an address.
enum Route {
    /// Through the destination's agent, under mutual TLS.
    Mesh(Arc<Workload>),
    /// Through memory, to another pod of this agent.
    Neighbour(Arc<Workload>, Rc<Pair>),
    /// As plain TCP, and why.
    Plain(Option<Arc<Workload>>, NoTls),
}

impl Route {
    /// Through memory, where the mesh would only come back to this agent.
    fn shortened(self, worker: &Rc<Worker>, pod: &Rc<PodContext>, address: IpAddr) -> Self {
        let Self::Mesh(workload) = self else {
            return self;
        };
        match neighbours::pair(worker, pod, &workload, address) {
            Some(pair) => Self::Neighbour(workload, pair),
            None => Self::Mesh(workload),
        }
    }
}

/// Accept, resolve, connect, relay, record.
pub(super) async fn serve(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    mut client: Accounted<TcpStream>,
) {
    let _live = worker.count_live();
    // A connection that its client reset before it was accepted has no ends.
    let (Ok(source), Ok(destination)) = (client.peer_addr(), client.local_addr()) else {
        return;
    };
    let source = canonical(source);
    let destination = with_scope(&worker, source, canonical(destination));
    let mesh = worker.mesh();
    if is_own_listener(&pod, &mesh, destination) {
        return worker.refuse(
            Direction::Outbound,
            source,
            destination,
            Reason::OwnListener,
        );
    }
    let Some(_admitted) = pod.admit() else {
        return worker.refuse(
            Direction::Outbound,
            source,
            destination,
            Reason::ConnectionLimit,
        );
    };
    let route = resolve(&mesh, source.ip(), destination);
    drop(mesh);
    let route = route.shortened(&worker, &pod, destination.ip());
    let record = open_record(&worker, &pod, &route, source, destination);
    let result = match &route {
        Route::Mesh(workload) => {
            through_mesh(
                &worker,
                &pod,
                workload,
                &mut client,
                source,
                destination,
                &record,
            )
            .await
        }
        Route::Plain(..)
            if !pod
                .workload()
                .settings
                .allows_plaintext_to(destination.ip()) =>
        {
            Err(Reason::EgressRefused.into())
        }
        Route::Neighbour(workload, pair) => match pair.allowed().await {
            Ok(true) => {
                record.proved();
                let from = FromNeighbour {
                    pod: &pod,
                    workload: pod.workload(),
                    client: &mut client,
                    source,
                    record: &record,
                };
                inbound::serve_neighbour(&worker, pair, from, destination).await
            }
            Ok(false) => {
                record.tunnelled(SocketAddr::new(destination.ip(), ports::MESH));
                through_mesh(
                    &worker,
                    &pod,
                    workload,
                    &mut client,
                    source,
                    destination,
                    &record,
                )
                .await
            }
            Err(reason) => Err(reason.into()),
        },
        Route::Plain(..) => plain(&worker, &pod, &mut client, destination, &record).await,
    };
    record.close(result);
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
fn is_own_listener(pod: &PodContext, mesh: &Mesh, destination: SocketAddr) -> bool {
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

fn resolve(mesh: &Mesh, client: IpAddr, destination: SocketAddr) -> Route {
    match mesh.workload_at(destination.ip()) {
        Some(workload) if workload.serves_mesh_to(client, destination.port()) => {
            Route::Mesh(Arc::clone(workload))
        }
        Some(workload) if workload.meshed => {
            Route::Plain(Some(Arc::clone(workload)), NoTls::PortSkipped)
        }
        workload => Route::Plain(workload.cloned(), NoTls::NotProvidedByServiceDiscovery),
    }
}

fn open_record(
    worker: &Worker,
    pod: &Rc<PodContext>,
    route: &Route,
    client: SocketAddr,
    destination: SocketAddr,
) -> Record {
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
        target_port: destination.port(),
        security,
    };
    Record::open(
        worker,
        pod,
        labels,
        &Ends {
            client,
            destination: dialled,
            tunnelled,
        },
    )
}

async fn through_mesh(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    workload: &Workload,
    client: &mut TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
    record: &Record,
) -> Result<(), Failure> {
    let mesh_address: IpAddr = destination.ip();
    let reporter = pod.workload();
    let mut attempts = 1;
    // The lease counts the stream for as long as it lives.
    let (lease, mut send, mut receive) = loop {
        let lease = pool::lease(worker, pod, mesh_address, &workload.identity).await?;
        record.proved();
        let request = hbone::connect(&reporter, source, destination);
        match lease.open(request).await {
            Ok((send, receive)) => break (lease, send, receive),
            Err(OpenError::Again(_)) if attempts < MAX_ATTEMPTS => attempts += 1,
            Err(error) => return Err(error.into()),
        }
    };
    record.dialled();
    let idle = reporter.settings.idle_timeout;
    relay::tunnel(
        &worker.buffers,
        record,
        Side::Client,
        client,
        &mut send,
        &mut receive,
        idle,
    )
    .await
    .map_err(|end| lease.failed(end))
}

async fn plain(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    client: &mut TcpStream,
    destination: SocketAddr,
    record: &Record,
) -> Result<(), Failure> {
    let settings = &pod.workload().settings;
    let limit = settings.connect_timeout;
    let server = to_network(&pod.pod, destination, limit)
        .await
        .map_err(|error| Failure::from(error.reason()))?;
    let mut server = server.turned_into(Kind::PlaintextOutbound);
    record.dialled();
    relay::tcp(
        &worker.buffers,
        &[record],
        client,
        &mut server,
        settings.idle_timeout,
    )
    .await
    .map_err(Failure::from)
}
