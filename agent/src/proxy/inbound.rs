//! The life of a connection to an app: in plaintext, through a tunnel from another agent, or from a
//! pod of the same node.

mod tunnelled;

use std::{mem, net::SocketAddr, pin::pin, rc::Rc, sync::Arc, time::Duration};

use bytes::{Buf, Bytes};
use malla_common::Reason;
use tokio::net::TcpStream;

use super::{
    buffers::Buffers,
    canonical,
    neighbours::Pair,
    pod::{Admitted, PodContext},
    probe::Probed,
    record::{Ends, Record},
    relay,
    worker::{Live, Worker},
};
use crate::{
    ledger::{Accounted, Kind},
    model::MtlsMode,
    steer::{DialError, ExpectedDial, ToApp, to_app},
    telemetry::{ConnectionLabels, Direction, Failure, NoTls, Security},
};
pub(super) use tunnelled::serve_mesh;

/// A client without an identity: what the pod's mTLS mode says, and of a probe what is declared.
pub(super) async fn serve_plaintext(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    mut client: Accounted<TcpStream>,
) {
    let _live = worker.count_live();
    let (Ok(source), Ok(destination)) = (client.peer_addr(), client.local_addr()) else {
        return;
    };
    let (source, destination) = (canonical(source), canonical(destination));
    if pod.pod.listener_ports.contains(destination.port()) {
        return worker.refuse(Direction::Inbound, source, destination, Reason::OwnListener);
    }
    let Some(_admitted) = pod.admit() else {
        return worker.refuse(
            Direction::Inbound,
            source,
            destination,
            Reason::ConnectionLimit,
        );
    };
    pod.pod.dial_ports.met_client(source.port());
    let workload = pod.workload();
    let record = {
        let labels = ConnectionLabels {
            direction: Direction::Inbound,
            reporter: Arc::clone(&workload),
            remote: worker.mesh().workload_at(source.ip()).cloned(),
            service: None,
            target_port: destination.port(),
            security: Security::None(NoTls::PlaintextClient),
        };
        let ends = Ends {
            client: source,
            destination,
            tunnelled: None,
        };
        Record::open(&worker, &pod, &labels, &ends)
    };
    if workload.settings.mtls_on(destination.port()) == MtlsMode::Strict {
        let probed = Probed {
            worker: &worker,
            pod: &pod,
            workload: &workload,
            record: &record,
            source,
            destination,
        };
        let result = if probed.is_expected() {
            Box::pin(probed.carry(&mut client)).await
        } else {
            Err(Reason::PlaintextRefused.into())
        };
        return record.close(result);
    }
    let mut opening = Beginning::default();
    let dialling = Box::pin(dial(&worker, &pod, source, destination, &mut opening));
    let server = match dialling.await {
        Ok(server) => server,
        Err(error) => return record.close(Err(error.reason())),
    };
    record.dialled();
    let idle = workload.settings.idle_timeout;
    let result = relay::tcp(
        &worker.buffers,
        &[&record],
        &client,
        Bytes::new(),
        &server,
        idle,
    )
    .await;
    record.close(result);
}

/// An open connection to the app of another pod of this node, through memory: what a tunnel would
/// carry, with both sides' records.
pub(super) struct ToNeighbour {
    pair: Rc<Pair>,
    server: Accounted<TcpStream>,
    opening: Beginning,
    record: Record,
    idle: Option<Duration>,
    _counted: (Live, Admitted),
}

/// Opens a connection of the pod `source_pod`, whose task carries it. Gives how it failed for the
/// outbound side.
pub(super) async fn reach_neighbour(
    worker: &Rc<Worker>,
    source_pod: &Rc<PodContext>,
    pair: &Rc<Pair>,
    (source, destination): (SocketAddr, SocketAddr),
    (said, is_last): (Bytes, bool),
) -> Result<ToNeighbour, Failure> {
    let live = worker.count_live();
    let (pod, from) = (&pair.destination, source_pod.workload());
    let refuse = |reason| {
        worker.refuse(Direction::Inbound, source, destination, reason);
        Err(Reason::PeerRefused.into())
    };
    let known = worker.mesh().workload_at(source.ip()).cloned();
    if known.is_some_and(|known| known.identity != from.identity) {
        return refuse(Reason::IdentityMismatch);
    }
    if pod.pod.listener_ports.contains(destination.port()) {
        return refuse(Reason::OwnListener);
    }
    let Some(admitted) = pod.admit() else {
        return refuse(Reason::ConnectionLimit);
    };
    let workload = pod.workload();
    let idle = [&workload, &from].map(|end| end.settings.idle_timeout);
    let labels = ConnectionLabels {
        direction: Direction::Inbound,
        reporter: Arc::clone(&workload),
        security: Security::MutualTls(Arc::clone(&from.identity)),
        remote: Some(from),
        service: None,
        target_port: destination.port(),
    };
    let ends = Ends {
        client: source,
        destination,
        tunnelled: None,
    };
    let record = Record::open(worker, source_pod, &labels, &ends);
    let mut opening = Beginning {
        said,
        is_last,
        ..Beginning::default()
    };
    let dialling = pin!(async move {
        let dialled = dial(worker, pod, source, destination, &mut opening).await;
        let dialled = dialled.map(|server| (server, opening));
        Ok(dialled.map_err(|error| error.reason()))
    });
    let dialled = pair.unless_cut(dialling).await;
    match dialled {
        Ok(Ok((server, opening))) => {
            record.dialled();
            Ok(ToNeighbour {
                pair: Rc::clone(pair),
                server,
                opening,
                record,
                idle: idle.into_iter().flatten().min(),
                _counted: (live, admitted),
            })
        }
        Ok(Err(reason)) => {
            record.close(Err(reason));
            Err(Reason::PeerRefused.into())
        }
        Err(cut) => {
            record.close(Err(cut));
            Err(cut)
        }
    }
}

impl ToNeighbour {
    /// Moves bytes until both directions have ended. `from` is the outbound side's record.
    pub(super) async fn relay(
        &mut self,
        buffers: &Buffers,
        client: &TcpStream,
        from: &Record,
    ) -> Result<(), Failure> {
        let Self {
            pair,
            server,
            opening,
            record,
            idle,
            ..
        } = self;
        for record in [from, &*record] {
            record.client_sent(opening.sent);
        }
        let said = mem::take(&mut opening.said);
        let result = {
            let relaying = pin!(async {
                relay::tcp(buffers, &[from, &*record], client, said, server, *idle)
                    .await
                    .map_err(Failure::from)
            });
            pair.unless_cut(relaying).await
        };
        record.close(result);
        result
    }
}

/// What a connection to the app is opened with, beside its ends.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    /// The peer waits for less than the pod's own limit.
    within: Option<Duration>,
    /// What the client has said already, and afterwards what of it is still to be sent.
    said: Bytes,
    /// Its end comes behind that.
    is_last: bool,
    /// How many bytes were sent.
    sent: usize,
    /// Others may be about to begin with it.
    expected: Option<ExpectedDial>,
}

/// Opens the connection to the app, with the client's address as its source.
pub(super) async fn dial(
    worker: &Worker,
    pod: &PodContext,
    client: SocketAddr,
    destination: SocketAddr,
    opening: &mut Beginning,
) -> Result<Accounted<TcpStream>, DialError> {
    let limit = pod.workload().settings.mesh_connect_timeout;
    let expected = opening.expected.take();
    let asked = ToApp {
        client: client.ip(),
        destination,
        limit: opening.within.map_or(limit, |within| within.min(limit)),
        said: &opening.said,
        is_last: opening.is_last,
    };
    let dialled = to_app(&pod.pod, &worker.own_dial, expected, asked).await?;
    if dialled.source_replaced {
        worker.metrics().source_replaced();
    }
    opening.said.advance(dialled.sent);
    opening.sent = dialled.sent;
    Ok(dialled.stream.turned_into(Kind::AppInbound))
}
