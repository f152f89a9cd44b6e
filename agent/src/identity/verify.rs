//! Who may be a peer: chain, dates, purpose and SPIFFE identity of a certificate.
//!
//! Verifiers read the trust anchors through a shared pointer, so a change of anchors takes effect
//! at the next handshake without a new configuration.

use std::{sync::Arc, time::SystemTime};

use arc_swap::ArcSwapOption;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::{key_slot::unix_time, tls::shared_provider};
use crate::model::SpiffeId;

/// Trust anchors, ready to check certificates of either side.
#[derive(Debug)]
pub(super) struct TrustAnchors {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

/// The anchors in use. Empty until the authority has named some.
pub(super) type SharedTrust = Arc<ArcSwapOption<TrustAnchors>>;

impl TrustAnchors {
    pub(super) fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone())?;
        }
        let roots = Arc::new(roots);
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), shared_provider())
                .build()
                .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self {
            certificates,
            roots,
            clients,
        })
    }

    /// Checks a chain of our own as peers on both sides will.
    pub(super) fn verify_own(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        let now = unix_time(now);
        self.verify_client(leaf, intermediates, now)?;
        self.verify_server(leaf, intermediates, now)
    }

    fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        self.clients
            .verify_client_cert(leaf, intermediates, now)
            .map(|_| ())
    }

    fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.roots,
            intermediates,
            now,
            shared_provider().signature_verification_algorithms.all,
        )
    }
}

/// Why a peer whose chain is sound is refused for its identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum IdentityRefused {
    #[error("the peer is {}, expected {expected}", listed(presented))]
    Mismatch {
        expected: SpiffeId,
        presented: Vec<SpiffeId>,
    },
    #[error(
        "the peer has no identity in trust domain `{trust_domain}`, it is {}",
        listed(presented)
    )]
    ForeignTrustDomain {
        trust_domain: String,
        presented: Vec<SpiffeId>,
    },
}

impl From<IdentityRefused> for Error {
    fn from(refused: IdentityRefused) -> Self {
        CertificateError::Other(OtherError(Arc::new(refused))).into()
    }
}

fn listed(identities: &[SpiffeId]) -> String {
    if identities.is_empty() {
        return "without a SPIFFE identity".to_owned();
    }
    let texts: Vec<String> = identities.iter().map(ToString::to_string).collect();
    texts.join(" and ")
}

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
fn spiffe_ids(leaf: &CertificateDer<'_>) -> Result<Vec<SpiffeId>, PeerIdentityError> {
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

fn presented(leaf: &CertificateDer<'_>) -> Result<Vec<SpiffeId>, Error> {
    spiffe_ids(leaf).map_err(|_| CertificateError::BadEncoding.into())
}

/// Asks of a client: a sound chain, and an identity of the server's own trust domain.
#[derive(Debug)]
pub(super) struct ClientsOfTrustDomain {
    pub(super) trust: SharedTrust,
    pub(super) trust_domain: String,
}

impl ClientCertVerifier for ClientsOfTrustDomain {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let trust = self.trust.load();
        let trust = trust.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        trust.verify_client(leaf, intermediates, now)?;
        let presented = presented(leaf)?;
        if presented
            .iter()
            .any(|id| id.trust_domain == self.trust_domain)
        {
            return Ok(ClientCertVerified::assertion());
        }
        Err(IdentityRefused::ForeignTrustDomain {
            trust_domain: self.trust_domain.clone(),
            presented,
        }
        .into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature_of(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Asks of a server: a sound chain, and the identity that discovery says it has.
#[derive(Debug)]
pub(super) struct ServerWithIdentity {
    pub(super) trust: SharedTrust,
    pub(super) expected: SpiffeId,
}

impl ServerCertVerifier for ServerWithIdentity {
    /// The server's name is not looked at: an address says nothing about who is behind it.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let trust = self.trust.load();
        let trust = trust.as_ref().ok_or(CertificateError::UnknownIssuer)?;
        trust.verify_server(leaf, intermediates, now)?;
        let presented = presented(leaf)?;
        if presented.contains(&self.expected) {
            return Ok(ServerCertVerified::assertion());
        }
        let trust_domain = &self.expected.trust_domain;
        let refused = if presented.iter().any(|id| id.trust_domain == *trust_domain) {
            IdentityRefused::Mismatch {
                expected: self.expected.clone(),
                presented,
            }
        } else {
            IdentityRefused::ForeignTrustDomain {
                trust_domain: trust_domain.clone(),
                presented,
            }
        };
        Err(refused.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature_of(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

fn only_tls13() -> Error {
    Error::General("the mesh speaks TLS 1.3 only".to_owned())
}

fn signature_of(
    message: &[u8],
    leaf: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let provider = shared_provider();
    verify_tls13_signature(
        message,
        leaf,
        signature,
        &provider.signature_verification_algorithms,
    )
}

fn schemes() -> Vec<SignatureScheme> {
    shared_provider()
        .signature_verification_algorithms
        .supported_schemes()
}
