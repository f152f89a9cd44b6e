//! What is remembered of one connection: its metrics and, at its end, its line in the access log.

use std::{cell::Cell, net::SocketAddr, rc::Rc, sync::Arc};

use malla_common::Reason;

use super::{ended::LastEnded, pod::PodContext, worker::Worker};
use crate::{
    model::Workload,
    telemetry::{
        AccessRecord, ConnectionLabels, ConnectionMetrics, Direction, Failure, Party, Peer,
        Security,
    },
};

/// A connection from when its ends are known.
///
/// Dropped without a word, its task was cut: with the pod's enrolment, or with the agent.
pub(super) struct Record {
    /// Whose task carries the connection.
    pod: Rc<PodContext>,
    last_ended: Rc<LastEnded>,
    metrics: ConnectionMetrics,
    /// Whether the other end has proved the identity that the labels name.
    proved: Cell<bool>,
    ended: Cell<bool>,
    addresses: Box<Addresses>,
    from_client: Cell<u64>,
    from_server: Cell<u64>,
}

/// What only a connection's end asks for: in the task it would cost more room than by itself.
struct Addresses {
    client: SocketAddr,
    /// The address that was dialled.
    destination: Cell<SocketAddr>,
    /// The authority of the CONNECT.
    tunnelled: Cell<Option<SocketAddr>>,
}

/// The ends of a connection.
pub(super) struct Ends {
    pub client: SocketAddr,
    pub destination: SocketAddr,
    pub tunnelled: Option<SocketAddr>,
}

impl Addresses {
    /// What the client asked for.
    fn asked(&self) -> SocketAddr {
        self.tunnelled.get().unwrap_or(self.destination.get())
    }
}

impl Record {
    pub(super) fn open(
        worker: &Worker,
        pod: &Rc<PodContext>,
        labels: &ConnectionLabels,
        ends: &Ends,
    ) -> Self {
        let metrics = worker.series.borrow_mut().open(labels);
        // A peer's tunnel was verified before its connections came.
        let proved = Cell::new(labels.direction == Direction::Inbound);
        Self {
            pod: Rc::clone(pod),
            last_ended: Rc::clone(&worker.ended),
            metrics,
            proved,
            ended: Cell::new(false),
            addresses: Box::new(Addresses {
                client: ends.client,
                destination: Cell::new(ends.destination),
                tunnelled: Cell::new(ends.tunnelled),
            }),
            from_client: Cell::new(0),
            from_server: Cell::new(0),
        }
    }

    /// Whose task carries the connection.
    pub(super) fn pod(&self) -> &PodContext {
        &self.pod
    }

    /// The destination's agent has proved to be who discovery says.
    pub(super) fn proved(&self) {
        self.proved.set(true);
    }

    /// It takes a tunnel, to this mesh port, after all.
    pub(super) fn tunnelled(&self, mesh: SocketAddr) {
        let dialled = self.addresses.destination.replace(mesh);
        self.addresses.tunnelled.set(Some(dialled));
    }

    pub(super) fn dialled(&self) {
        self.metrics.dialled();
    }

    /// Bytes that went from the client towards the server.
    pub(super) fn client_sent(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.from_client.set(self.from_client.get() + bytes);
        self.metrics.read(Peer::Src, bytes);
        self.metrics.wrote(Peer::Dst, bytes);
    }

    /// Bytes that went from the server towards the client.
    pub(super) fn server_sent(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.from_server.set(self.from_server.get() + bytes);
        self.metrics.read(Peer::Dst, bytes);
        self.metrics.wrote(Peer::Src, bytes);
    }

    /// Ends the record: in good order, or for a reason.
    pub(super) fn close(&self, result: Result<(), impl Into<Failure>>) {
        self.end(result.err().map(Into::into));
    }

    fn end(&self, failure: Option<Failure>) {
        self.ended.set(true);
        self.last_ended.add(
            self.metrics.labels().direction,
            self.addresses.client,
            self.addresses.asked(),
            failure.map(|failure| failure.reason),
        );
        self.log(failure.map(|failure| failure.reason));
        match failure {
            None => self.metrics.close(),
            Some(failure) => self.metrics.fail(failure),
        }
    }

    fn log(&self, error: Option<Reason>) {
        let labels = self.metrics.labels();
        let reporter: &Arc<Workload> = &labels.reporter;
        let remote = labels.remote.as_deref();
        let proved = match &labels.security {
            Security::MutualTls(identity) if self.proved.get() => Some(&**identity),
            Security::MutualTls(_) | Security::None(_) => None,
        };
        let own = proved.map(|_| &*reporter.identity);
        let source = (Some(&**reporter), own);
        let peer = (remote, proved);
        let (src, dst, sent, received) = match labels.direction {
            Direction::Outbound => (source, peer, &self.from_client, &self.from_server),
            Direction::Inbound => (peer, source, &self.from_server, &self.from_client),
        };
        AccessRecord {
            direction: labels.direction,
            src: Party {
                address: self.addresses.client,
                workload: src.0,
                identity: src.1,
            },
            dst: Party {
                address: self.addresses.destination.get(),
                workload: dst.0,
                identity: dst.1,
            },
            hbone_address: self.addresses.tunnelled.get(),
            service: labels.service.as_ref().map(|service| &*service.host),
            bytes_sent: sent.get(),
            bytes_received: received.get(),
            duration: self.metrics.age(),
            error,
        }
        .write();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.ended.get() {
            self.end(Some(self.pod.cause_of_cut().into()));
        }
    }
}
