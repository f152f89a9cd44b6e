//! What certificates are checked against: chain, dates and purpose.
//!
//! Everything that checks reads it through one shared pointer, so a change of anchors takes effect
//! at the next handshake without a new configuration.

use std::{sync::Arc, time::SystemTime};

use arc_swap::ArcSwapOption;
use rustls::{
    Error, RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    pki_types::{CertificateDer, UnixTime},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::{key_slot::unix_time, tls::shared_provider};

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

    pub(super) fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        self.clients
            .verify_client_cert(leaf, intermediates, now)
            .map(|_| ())
    }

    pub(super) fn verify_server(
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
