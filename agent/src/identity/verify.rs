//! Who may be a peer: a sound chain, and the identity that each side asks of the other.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{
    peer::spiffe_ids,
    tls::provider,
    trust::{SharedTrust, Trust},
};
use crate::model::SpiffeId;

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

/// The identities of `leaf`, of which at least one is of `trust_domain`.
fn identities_of(leaf: &CertificateDer<'_>, trust_domain: &str) -> Result<Vec<SpiffeId>, Error> {
    let presented = spiffe_ids(leaf).map_err(|_| CertificateError::BadEncoding)?;
    if presented.iter().any(|id| id.trust_domain == trust_domain) {
        return Ok(presented);
    }
    Err(IdentityRefused::ForeignTrustDomain {
        trust_domain: trust_domain.to_owned(),
        presented,
    }
    .into())
}

/// Runs `check` with the trust in use. Without any, nobody is known.
fn with_trust(
    trust: &SharedTrust,
    check: impl FnOnce(&Trust) -> Result<(), Error>,
) -> Result<(), Error> {
    let trust = trust.load();
    check(trust.as_ref().ok_or(CertificateError::UnknownIssuer)?)
}

/// How the proof of the key is checked, which rustls asks of the verifier of either side.
macro_rules! proofs_of_keys {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("the mesh speaks TLS 1.3 only".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            leaf: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &provider().signature_verification_algorithms;
            verify_tls13_signature(message, leaf, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            let algorithms = &provider().signature_verification_algorithms;
            algorithms.supported_schemes()
        }
    };
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
        with_trust(&self.trust, |trust| {
            trust.verify_client(leaf, intermediates, now)
        })?;
        identities_of(leaf, &self.trust_domain)?;
        Ok(ClientCertVerified::assertion())
    }

    proofs_of_keys!();
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
        with_trust(&self.trust, |trust| {
            trust.verify_server(leaf, intermediates, now)
        })?;
        let presented = identities_of(leaf, &self.expected.trust_domain)?;
        if presented.contains(&self.expected) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(IdentityRefused::Mismatch {
            expected: self.expected.clone(),
            presented,
        }
        .into())
    }

    proofs_of_keys!();
}
