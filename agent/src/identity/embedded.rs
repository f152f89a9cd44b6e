//! The certificate authority in a folder of this machine.
//!
//! The folder is looked at every second; what is good in it is kept in memory and signs from there,
//! so a broken file stops nothing. Trust anchors and revocation lists are in force at once. A new
//! issuer follows a little later: other agents see the same files at other moments, and must know
//! its anchor before they meet a certificate of it.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyUsagePurpose, SanType,
};
use rustls::{CertificateError, Error, pki_types::CertificateDer};
use time::OffsetDateTime;

use super::{
    ca::{CaError, CertificateAuthority, SignedChain, SigningRequest, Standing},
    files::FolderError,
    folder::{CLOCK_TOLERANCE, Contents, Folder},
    judge::{self, Signer},
    part::Part,
    revocation::Revocations,
    trust::Trust,
};

/// How much later than its anchor a new issuer signs.
const HANDOVER: time::Duration = time::Duration::seconds(2);
/// How often unchanged files are judged again: certificates begin and end.
const JUDGE_AGAIN: time::Duration = time::Duration::seconds(10);

/// Signs with the issuer in a folder, which it makes where there is none.
#[derive(Debug, Clone)]
pub(crate) struct EmbeddedAuthority(Arc<Mutex<Authority>>);

impl EmbeddedAuthority {
    /// The authority in `directory`. Nothing is read or made before it is needed.
    pub(crate) fn new(directory: &Path) -> Self {
        Self(Arc::new(Mutex::new(Authority::new(directory))))
    }

    /// Runs `work` where it may block.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Authority) -> Result<T, CaError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, CaError>> {
        let authority = Arc::clone(&self.0);
        async move {
            tokio::task::spawn_blocking(move || {
                work(&mut authority.lock().unwrap_or_else(PoisonError::into_inner))
            })
            .await
            .unwrap_or(Err(CaError::Stopped))
        }
        .boxed()
    }
}

impl CertificateAuthority for EmbeddedAuthority {
    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<SignedChain, CaError>> {
        self.blocking(move |authority| {
            let now = OffsetDateTime::now_utc();
            if authority.signer.is_none() {
                authority.look(now)?;
            }
            authority.sign(&request, now)
        })
    }

    fn standing(&self) -> BoxFuture<'_, Result<Standing, CaError>> {
        self.blocking(|authority| authority.look(OffsetDateTime::now_utc()))
    }
}

/// What the folder has, and had.
#[derive(Debug)]
struct Authority {
    folder: Folder,
    /// What was judged last, and when.
    judged: Option<(Contents, OffsetDateTime)>,
    anchors: Part<Vec<CertificateDer<'static>>>,
    revocations: Part<Arc<Revocations>>,
    issuer: Part<Signer>,
    /// What signs: the issuer, or for a moment the one before it.
    signer: Option<Signer>,
    /// Why what is missing couldn't be made, as it was said last.
    not_made: Option<String>,
}

impl Authority {
    fn new(directory: &Path) -> Self {
        Self {
            folder: Folder::new(directory),
            judged: None,
            anchors: Part::new("trust_anchors", None),
            revocations: Part::new("revocation_list", Some(Arc::default())),
            issuer: Part::new("issuer", None),
            signer: None,
            not_made: None,
        }
    }

    /// Reads the folder, takes over what is good in it, and says what is in use then.
    fn look(&mut self, now: OffsetDateTime) -> Result<Standing, CaError> {
        let known = self.judged.as_ref().map(|(contents, _)| contents);
        match self.folder.read(known) {
            Ok(contents) => {
                let is_judged = self.judged.as_ref().is_some_and(|(known, at)| {
                    *known == contents && *at <= now && now < *at + JUDGE_AGAIN
                });
                if !is_judged {
                    let contents = self.make_missing(now)?.unwrap_or(contents);
                    self.judge(&contents, now);
                    self.judged = Some((contents, now));
                }
            }
            Err(error) => self.refuse_all(error, now),
        }
        self.hand_over(now);
        self.standing()
    }

    /// What the folder has after something was made in it; `None` where nothing was.
    fn make_missing(&mut self, now: OffsetDateTime) -> Result<Option<Contents>, FolderError> {
        let first = self.anchors.good().is_none();
        match self.folder.make_missing(first, now) {
            Ok(made) => {
                self.not_made = None;
                if made {
                    self.folder.read(None).map(Some)
                } else {
                    Ok(None)
                }
            }
            // Without an authority there is nothing to go on with.
            Err(error) if self.signer.is_none() => Err(error),
            Err(error) => {
                let said = error.to_string();
                if self.not_made.as_ref() != Some(&said) {
                    tracing::warn!(%error, "the issuer is missing or nears its end, and none can be made");
                    self.not_made = Some(said);
                }
                Ok(None)
            }
        }
    }

    fn judge(&mut self, contents: &Contents, now: OffsetDateTime) {
        let folder = &self.folder;
        let mut anchors = judge::anchors(folder, contents, now);
        let known = || self.anchors.good().cloned().unwrap_or_default();
        let against = anchors.as_ref().map_or_else(|_| known(), Vec::clone);
        let lists = judge::revocations(folder, contents, &against).map(Arc::new);
        self.revocations
            .judged(lists.map_err(Arc::new), &folder.revocations, now);
        let lists = self.revocations.good().cloned().unwrap_or_default();
        let mut issuer = judge::signer(folder, contents, &against, &lists, now);
        // Anchors that neither issuer hangs on would end the mesh.
        let signer = self.issuer.good();
        if issuer.is_err() && anchors.is_ok() && signer.is_some_and(|s| !s.hangs_on(&against)) {
            anchors = Err(judge::not_chained(folder));
            issuer = judge::signer(folder, contents, &known(), &lists, now);
        }
        self.anchors
            .judged(anchors.map_err(Arc::new), &folder.anchors, now);
        self.issuer
            .judged(issuer.map_err(Arc::new), &folder.issuer, now);
    }

    fn refuse_all(&mut self, error: FolderError, now: OffsetDateTime) {
        let (folder, error) = (&self.folder, Arc::new(error));
        self.anchors
            .judged(Err(Arc::clone(&error)), &folder.anchors, now);
        self.revocations
            .judged(Err(Arc::clone(&error)), &folder.revocations, now);
        self.issuer.judged(Err(error), &folder.issuer, now);
        // Whatever is there when it can be read again is news.
        self.judged = None;
    }

    /// Lets the issuer sign once its time has come, or at once where the one before it is no good
    /// any more.
    fn hand_over(&mut self, now: OffsetDateTime) {
        let Some(issuer) = self.issuer.good() else {
            return;
        };
        let old_serves = self.signer.as_ref().is_some_and(|old| {
            let anchors = self.anchors.good().map_or(&[][..], Vec::as_slice);
            let is_revoked = |lists: &Arc<Revocations>| lists.revoke(&old.chain, anchors);
            old.check(now).is_ok()
                && old.hangs_on(anchors)
                && !self.revocations.good().is_some_and(is_revoked)
        });
        let since = self.issuer.since();
        let is_time = now < since || now >= since + HANDOVER;
        if self.signer.as_ref() != Some(issuer) && (is_time || !old_serves) {
            self.signer = Some(issuer.clone());
        }
    }

    fn standing(&self) -> Result<Standing, CaError> {
        let Some(anchors) = self.anchors.good() else {
            return Err(self.refused());
        };
        let revocations = self.revocations.good().cloned().unwrap_or_default();
        let signer = self.signer.as_ref();
        Ok(Standing {
            anchors: anchors.clone(),
            issuer: signer
                .map(|signer| signer.chain.clone())
                .unwrap_or_default(),
            expiries: judge::expiries(&self.folder, anchors, signer, &revocations),
            reloads: vec![
                self.anchors.reloads(),
                self.issuer.reloads(),
                self.revocations.reloads(),
            ],
            revocations,
        })
    }

    /// Why there is no authority.
    fn refused(&self) -> CaError {
        let refusal = self.anchors.refusal().or(self.issuer.refusal());
        refusal.map_or(CaError::Stopped, |error| CaError::Folder(Arc::clone(error)))
    }

    fn sign(&self, request: &SigningRequest, now: OffsetDateTime) -> Result<SignedChain, CaError> {
        let signer = self.signer.as_ref().ok_or_else(|| self.refused())?;
        signer.check(now).map_err(CaError::Folder)?;
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
        params.not_after = end(now, request.lifetime, signer.ends);
        if params.not_after == signer.ends {
            tracing::warn!(
                identity = %request.identity,
                ends = %signer.ends,
                "issuer or trust anchor end before the certificate's lifetime is over: \
                 it is shortened",
            );
        }
        let issuer = Issuer::from_ca_cert_der(&signer.chain[0], &*signer.key)?;
        let leaf = params.signed_by(&csr.public_key, &issuer)?;
        let mut certificates = vec![leaf.der().clone()];
        certificates.extend(signer.chain.iter().cloned());
        self.try_out(&certificates, now)?;
        Ok(SignedChain { certificates })
    }

    /// Checks what was signed as peers will, with all that an issuer may say about what hangs on it.
    fn try_out(
        &self,
        certificates: &[CertificateDer<'static>],
        now: OffsetDateTime,
    ) -> Result<(), CaError> {
        let anchors = self.anchors.good().cloned().unwrap_or_default();
        let revocations = self.revocations.good().cloned().unwrap_or_default();
        let sound = Trust::new(anchors, revocations)
            .and_then(|trust| trust.verify_own(certificates, now.into()));
        let Err(error) = sound else { return Ok(()) };
        tracing::debug!(%error, "what the issuer signs does not verify");
        Err(match error {
            Error::InvalidCertificate(CertificateError::Revoked) => judge::revoked(&self.folder),
            _ => judge::not_chained(&self.folder),
        }
        .into())
    }
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
