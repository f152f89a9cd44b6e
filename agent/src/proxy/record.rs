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
    labels: ConnectionLabels,
    metrics: ConnectionMetrics,
    /// Whether the other end has proved the identity that the labels name.
    proved: Cell<bool>,
    ended: Cell<bool>,
    client: SocketAddr,
    /// The address that was dialled.
    destination: Cell<SocketAddr>,
    /// The authority of the CONNECT.
    tunnelled: Cell<Option<SocketAddr>>,
    from_client: Cell<u64>,
    from_server: Cell<u64>,
}

/// The ends of a connection.
pub(super) struct Ends {
    pub client: SocketAddr,
    pub destination: SocketAddr,
    pub tunnelled: Option<SocketAddr>,
}

impl Record {
    pub(super) fn open(
        worker: &Worker,
        pod: &Rc<PodContext>,
        labels: ConnectionLabels,
        ends: &Ends,
    ) -> Self {
        let metrics = worker.series.borrow_mut().open(&labels);
        // A peer's tunnel was verified before its connections came.
        let proved = Cell::new(labels.direction == Direction::Inbound);
        Self {
            pod: Rc::clone(pod),
            last_ended: Rc::clone(&worker.ended),
            labels,
            metrics,
            proved,
            ended: Cell::new(false),
            client: ends.client,
            destination: Cell::new(ends.destination),
            tunnelled: Cell::new(ends.tunnelled),
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
        let dialled = self.destination.replace(mesh);
        self.tunnelled.set(Some(dialled));
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
            self.labels.direction,
            self.client,
            self.tunnelled.get().unwrap_or(self.destination.get()),
            failure.map(|failure| failure.reason),
        );
        self.log(failure.map(|failure| failure.reason));
        match failure {
            None => self.metrics.close(),
            Some(failure) => self.metrics.fail(failure),
        }
    }

    fn log(&self, error: Option<Reason>) {
        let reporter: &Arc<Workload> = &self.labels.reporter;
        let remote = self.labels.remote.as_deref();
        let proved = match &self.labels.security {
            Security::MutualTls(identity) if self.proved.get() => Some(&**identity),
            Security::MutualTls(_) | Security::None(_) => None,
        };
        let own = proved.map(|_| &*reporter.identity);
        let source = (Some(&**reporter), own);
        let peer = (remote, proved);
        let (src, dst, sent, received) = match self.labels.direction {
            Direction::Outbound => (source, peer, &self.from_client, &self.from_server),
            Direction::Inbound => (peer, source, &self.from_server, &self.from_client),
        };
        AccessRecord {
            direction: self.labels.direction,
            src: Party {
                address: self.client,
                workload: src.0,
                identity: src.1,
            },
            dst: Party {
                address: self.destination.get(),
                workload: dst.0,
                identity: dst.1,
            },
            hbone_address: self.tunnelled.get(),
            service: self.labels.service.as_ref().map(|service| &*service.host),
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
