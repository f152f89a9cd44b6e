//! The seam to what signs certificates.
//!
//! Two real things plug in: the authority in a folder of this machine, and a remote one that
//! speaks Istio's CSR API. Which one it is doesn't show above this seam.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::{expiry::Expiry, files::FolderError, revocation::Revocations};
use crate::model::SpiffeId;

/// Signs workload certificates and says what peers are to be checked against.
///
/// Futures are boxed: this is control work, a few calls per identity and day.
pub(crate) trait CertificateAuthority: fmt::Debug + Send + Sync {
    /// Signs the public key of `request` for its identity.
    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<SignedChain, CaError>>;

    /// How it stands now. Asked every second: that is how a change is noticed.
    fn standing(&self) -> BoxFuture<'_, Result<Standing, CaError>>;
}

/// What an authority is asked for.
#[derive(Debug, Clone)]
pub(crate) struct SigningRequest {
    /// PKCS #10 with the workload's public key and its identity as the only name.
    pub(crate) csr: CertificateSigningRequestDer<'static>,
    /// The identity to certify. An authority takes it from here, never from the CSR.
    pub(crate) identity: SpiffeId,
    /// The wish; the authority may give less.
    pub(crate) lifetime: Duration,
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub(crate) struct SignedChain {
    /// The workload's certificate, then intermediates upwards, without the trust anchor.
    pub(crate) certificates: Vec<CertificateDer<'static>>,
}

/// An authority at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// The trust anchors; several while one replaces another.
    pub(crate) anchors: Vec<CertificateDer<'static>>,
    pub(crate) revocations: Arc<Revocations>,
    /// What stands above a certificate that it signs now. Where that changes, certificates are
    /// renewed. Empty: it doesn't say.
    pub(crate) issuer: Vec<CertificateDer<'static>>,
    /// The ends of its own certificates and lists.
    pub(crate) expiries: Vec<Expiry>,
    /// How what it is made of was read anew.
    pub(crate) reloads: Vec<Reloads>,
}

/// How often one thing that an authority is made of was read anew, with which result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reloads {
    /// The word for metrics.
    pub(crate) object: &'static str,
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error(transparent)]
    Folder(Arc<FolderError>),
    #[error("cannot make or sign a certificate request: {0}")]
    Signing(#[from] rcgen::Error),
    #[error("the certificate authority did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("the certificate authority's answer is unusable: {0}")]
    UnusableAnswer(String),
    #[error("the certificate authority was stopped")]
    Stopped,
}

impl From<FolderError> for CaError {
    fn from(error: FolderError) -> Self {
        Self::Folder(Arc::new(error))
    }
}

impl CaError {
    /// The word for metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Folder(_) => "folder",
            Self::Signing(_) => "signing",
            Self::TimedOut(_) => "timed_out",
            Self::UnusableAnswer(_) => "unusable_answer",
            Self::Stopped => "stopped",
        }
    }
}
