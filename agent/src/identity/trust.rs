//! What certificates are checked against: chain, dates, purpose and revocation.
//!
//! Everything that checks reads it through one shared pointer, so a change of anchors or lists takes
//! effect at the next handshake without a new configuration.

use std::{slice, sync::Arc, time::SystemTime};

use arc_swap::ArcSwapOption;
use rustls::{
    CertificateError, Error, RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    pki_types::{CertificateDer, UnixTime},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::{
    key_slot::unix_time,
    revocation::Revocations,
    tls::{provider, shared_provider},
};

/// Trust anchors and revocation lists, ready to check certificates of either side.
#[derive(Debug)]
pub(super) struct Trust {
    anchors: Vec<CertificateDer<'static>>,
    revocations: Arc<Revocations>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

/// What is in use. Empty until the authority has named anchors.
pub(super) type SharedTrust = Arc<ArcSwapOption<Trust>>;

impl Trust {
    pub(super) fn new(
        anchors: Vec<CertificateDer<'static>>,
        revocations: Arc<Revocations>,
    ) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for anchor in &anchors {
            roots.add(anchor.clone())?;
        }
        let roots = Arc::new(roots);
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), shared_provider())
                .build()
                .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self {
            anchors,
            revocations,
            roots,
            clients,
        })
    }

    pub(super) fn is_of(
        &self,
        anchors: &[CertificateDer<'static>],
        revocations: &Revocations,
    ) -> bool {
        self.anchors == anchors && *self.revocations == *revocations
    }

    /// Whether a certificate of a chain that was sound once is revoked.
    pub(super) fn revokes(&self, chain: &[CertificateDer<'_>]) -> bool {
        self.revocations.revoke(chain, &self.anchors)
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
        self.clients.verify_client_cert(leaf, intermediates, now)?;
        self.refuse_revoked(leaf, intermediates)
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
            provider().signature_verification_algorithms.all,
        )?;
        self.refuse_revoked(leaf, intermediates)
    }

    fn refuse_revoked(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), Error> {
        if self.revocations.is_empty() {
            return Ok(());
        }
        if self.revokes(&[slice::from_ref(leaf), intermediates].concat()) {
            return Err(CertificateError::Revoked.into());
        }
        Ok(())
    }
}
