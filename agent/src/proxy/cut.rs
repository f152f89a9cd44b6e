//! What cuts a tunnel that both ends would keep: the revocation of its peer's certificate.
//!
//! A task of its own waits for it, so that a tunnel's own task has nothing more to look at on each
//! wake.

use std::{cell::Cell, net::SocketAddr, rc::Rc};

use malla_common::Reason;
use rustls::pki_types::CertificateDer;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::{pod::PodContext, relay::End, worker::Worker};
use crate::telemetry::Failure;

/// Why what a tunnel carries ends with it.
#[derive(Debug, Clone)]
pub(super) struct Cause(Rc<Cell<Reason>>);

impl Default for Cause {
    fn default() -> Self {
        Self(Rc::new(Cell::new(Reason::TunnelLost)))
    }
}

impl Cause {
    pub(super) fn reason(&self) -> Reason {
        self.0.get()
    }

    /// How a connection in the tunnel failed.
    pub(super) fn of(&self, end: End) -> Failure {
        match end {
            End::Tunnel => self.reason().into(),
            other => other.into(),
        }
    }
}

/// Aborts the task `tunnel` of `pod` when a certificate of `chain`, its peer's, is revoked. Waits
/// until the tunnel has `ended`.
pub(super) fn when_revoked(
    worker: &Rc<Worker>,
    pod: &PodContext,
    (peer, chain): (SocketAddr, Vec<CertificateDer<'static>>),
    tunnel: AbortHandle,
    cause: &Cause,
    ended: CancellationToken,
) {
    let (worker, cause) = (Rc::clone(worker), cause.clone());
    pod.spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = worker.certificates().revoked(&chain) => {
                tracing::warn!(%peer, "a tunnel is cut: its peer's certificate is revoked");
                cause.0.set(Reason::CertificateRevoked);
                tunnel.abort();
            }
        }
    });
}
