//! Probes of the kubelet in a pod that takes no other plaintext.
//!
//! They come from an address of the node, which others may come from too. So each byte towards the
//! app is read first, and only a declared request passes on: whoever sends it learns what the
//! kubelet learns, and does nothing that the kubelet doesn't do.

mod grpc;
mod http;

use std::{net::SocketAddr, rc::Rc, time::Duration};

use malla_common::Reason;
use tokio::{net::TcpStream, time::timeout};

use self::http::Heads;
use super::{
    inbound::{Beginning, dial},
    pod::PodContext,
    record::Record,
    relay,
    worker::Worker,
};
use crate::{
    ledger::Accounted,
    model::{Ask, Workload},
    steer::end_orderly,
    telemetry::Failure,
};

/// How long a client may take until it has said what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an HTTP/2 connection begins with (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that may be a probe.
pub(super) struct Probed<'a> {
    pub worker: &'a Worker,
    pub pod: &'a Rc<PodContext>,
    pub workload: &'a Workload,
    pub record: &'a Record,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Probed<'_> {
    /// Whether a probe may come from here at all.
    pub(super) fn is_expected(&self) -> bool {
        self.asked().next().is_some()
    }

    fn asked(&self) -> impl Iterator<Item = &Ask> {
        let probes = &self.workload.probes;
        probes.asked(self.source.ip(), self.destination.port())
    }

    /// Carries it if it is one of those that are declared.
    pub(super) async fn carry(&self, client: &mut TcpStream) -> Result<(), Failure> {
        let mut first = [0; PREFACE.len()];
        let peeked = timeout(PATIENCE, client.peek(&mut first)).await;
        let peeked = peeked.map_err(|_| Reason::ProbeUndeclared)?;
        match peeked.map_err(|error| Failure::new(Reason::ClientReset, &error))? {
            // It wanted to know whether the app listens, which `ingress` has looked for.
            0 if self.asked().any(|ask| *ask == Ask::TcpSocket) => Ok(()),
            0 => Err(Reason::ProbeUndeclared.into()),
            length if PREFACE.starts_with(&first[..length]) => self.carry_check(client).await,
            _ => self.carry_requests(client).await,
        }
    }

    async fn carry_requests(&self, client: &mut TcpStream) -> Result<(), Failure> {
        let targets = self.asked().filter_map(|ask| match ask {
            Ask::HttpGet { path } => Some(&**path),
            Ask::TcpSocket | Ask::Grpc { .. } => None,
        });
        let mut heads = Heads::new(targets);
        let (mut from_client, to_client) = client.split();
        let first = timeout(PATIENCE, heads.next(&mut from_client)).await;
        let first = first.map_err(|_| Reason::ProbeUndeclared)??;
        let first = first.ok_or(Reason::ProbeUndeclared)?;
        let mut server = self.dial().await?;
        let (from_server, mut to_server) = server.split();
        let asking = async {
            let mut next = Some(first);
            while let Some(head) = next {
                http::send(&mut to_server, &head).await?;
                self.record.client_sent(head.len());
                next = heads.next(&mut from_client).await?;
            }
            http::finish(&mut to_server).await
        };
        let idle = self.workload.settings.idle_timeout;
        let buffers = &self.worker.buffers;
        relay::answers(
            buffers,
            self.record,
            from_server.as_ref(),
            to_client.as_ref(),
            asking,
            idle,
        )
        .await?;
        end_orderly(client);
        end_orderly(&*server);
        Ok(())
    }

    async fn dial(&self) -> Result<Accounted<TcpStream>, Failure> {
        let Self {
            worker,
            pod,
            source,
            destination,
            ..
        } = *self;
        let opening = &mut Beginning::default();
        let dialled = dial(worker, pod, source, destination, opening).await;
        let server = dialled.map_err(|error| Failure::from(error.reason()))?;
        self.record.dialled();
        Ok(server)
    }
}
