//! The certificate authority in a folder of this machine.
//!
//! Every signature reads the folder anew, so a replaced issuer or anchor is in use at once, and a
//! broken one is refused by name. There are few signatures: one per identity and renewal.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    ca::{CaError, CertificateAuthority, SignedChain, SigningRequest},
    folder::{self, CLOCK_TOLERANCE},
    trust::TrustAnchors,
};

/// Signs with the issuer in a folder, which it makes where there is none.
#[derive(Debug, Clone)]
pub(crate) struct EmbeddedAuthority {
    directory: PathBuf,
}

impl EmbeddedAuthority {
    /// The authority in `directory`. Nothing is read or made before it is needed.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Runs `work` where it may block.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, CaError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, CaError>> {
        let directory = self.directory.clone();
        async move {
            tokio::task::spawn_blocking(move || work(&directory))
                .await
                .unwrap_or(Err(CaError::Stopped))
        }
        .boxed()
    }
}

impl CertificateAuthority for EmbeddedAuthority {
    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<SignedChain, CaError>> {
        self.blocking(move |directory| sign(directory, &request, OffsetDateTime::now_utc()))
    }

    fn trust_anchors(&self) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, CaError>> {
        self.blocking(|directory| Ok(folder::anchors(directory, OffsetDateTime::now_utc())?))
    }
}

fn sign(
    directory: &Path,
    request: &SigningRequest,
    now: OffsetDateTime,
) -> Result<SignedChain, CaError> {
    let authority = folder::open(directory, now)?;
    // Proves that the requester has the private key.
    let csr = CertificateSigningRequestParams::from_der(&request.csr)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // Critical, since the subject is empty (RFC 5280, 4.2.1.6).
    params.subject_alt_names = vec![SanType::URI(request.identity.to_string().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = end(now, request.lifetime, authority.ends);
    if params.not_after == authority.ends {
        tracing::warn!(
            identity = %request.identity,
            ends = %authority.ends,
            "issuer or trust anchor end before the certificate's lifetime is over: \
             it is shortened",
        );
    }
    let issuer = Issuer::from_ca_cert_der(&authority.chain[0], authority.key)?;
    let leaf = params.signed_by(&csr.public_key, &issuer)?;
    let mut certificates = vec![leaf.der().clone()];
    certificates.extend(authority.chain);
    let sound = TrustAnchors::new(authority.anchors)
        .and_then(|trust| trust.verify_own(&certificates, now.into()));
    if let Err(error) = sound {
        tracing::debug!(%error, "what the issuer signs does not verify");
        return Err(folder::not_signed_by_anchor(directory).into());
    }
    Ok(SignedChain { certificates })
}

/// The wanted end, but never past that of the authority.
fn end(now: OffsetDateTime, lifetime: Duration, authority: OffsetDateTime) -> OffsetDateTime {
    time::Duration::try_from(lifetime)
        .ok()
        .and_then(|lifetime| now.checked_add(lifetime))
        .map_or(authority, |wanted| wanted.min(authority))
}

#[cfg(test)]
mod tests;
