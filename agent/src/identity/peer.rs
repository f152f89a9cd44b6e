//! Who a certificate says that a peer is: its SPIFFE identities.

use rustls::pki_types::CertificateDer;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::model::SpiffeId;

/// Why a peer's certificates don't tell who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeerIdentityError {
    #[error("there is no certificate")]
    NoCertificate,
    #[error("the certificate is not valid DER")]
    Malformed,
    #[error("the certificate has no URI of the form of a workload's SPIFFE identity")]
    NoSpiffeUri,
}

/// The identity of a peer whose chain the handshake has verified: the first URI of its
/// certificate that is a workload's SPIFFE identity, as ztunnel takes it.
pub(crate) fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerIdentityError> {
    let leaf = chain.first().ok_or(PeerIdentityError::NoCertificate)?;
    spiffe_ids(leaf)?
        .into_iter()
        .next()
        .ok_or(PeerIdentityError::NoSpiffeUri)
}

/// Every SPIFFE identity of a certificate, in its order. Other names are skipped.
pub(super) fn spiffe_ids(leaf: &CertificateDer<'_>) -> Result<Vec<SpiffeId>, PeerIdentityError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerIdentityError::Malformed)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| PeerIdentityError::Malformed)?;
    let Some(names) = names else {
        return Ok(Vec::new());
    };
    Ok(names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => uri.parse().ok(),
            _ => None,
        })
        .collect())
}
