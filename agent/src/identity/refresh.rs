//! The background work: getting certificates, and following the trust anchors.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::CertificateSigningRequestDer;
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    ca::{CaError, CertificateAuthority, SigningRequest},
    key_slot::{Held, KeySlot},
    schedule,
    trust::{SharedTrust, TrustAnchors},
};
use crate::model::SpiffeId;

/// Limit for one answer of the authority. A remote one is seconds slow under load.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);
/// Requests at an authority at a time: a node that starts has many identities.
const IN_FLIGHT: usize = 8;
/// How often the trust anchors are looked at. A changed set is in use so much later.
const ANCHOR_INTERVAL: Duration = Duration::from_secs(5);
/// The wall clock may be set while a task sleeps: it is read again after so long.
const LONGEST_NAP: Duration = Duration::from_mins(1);

/// Where certificates come from, shared by all identities.
#[derive(Debug)]
pub(super) struct Source {
    authority: Arc<dyn CertificateAuthority>,
    lifetime: Duration,
    pub(super) trust: SharedTrust,
    /// Counts the changes of `trust`.
    anchors_changed: watch::Sender<u64>,
    in_flight: Semaphore,
    pub(super) refreshed: AtomicU64,
    pub(super) failed: AtomicU64,
}

impl Source {
    pub(super) fn new(authority: Arc<dyn CertificateAuthority>, lifetime: Duration) -> Self {
        Self {
            authority,
            lifetime,
            trust: SharedTrust::default(),
            anchors_changed: watch::Sender::new(0),
            in_flight: Semaphore::new(IN_FLIGHT),
            refreshed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// A new key with a certificate that peers will accept.
    async fn obtain(&self, identity: &SpiffeId) -> Result<Held, CaError> {
        // Fails only when the semaphore is closed, which nobody does.
        let _permit = self
            .in_flight
            .acquire()
            .await
            .map_err(|_| CaError::Stopped)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = SigningRequest {
            csr: request_for(identity, &key)?,
            identity: identity.clone(),
            lifetime: self.lifetime,
        };
        let signed = in_time(self.authority.sign(request)).await?;
        let trust = self.update_anchors().await?;
        Held::new(
            signed.certificates,
            &key,
            identity,
            &trust,
            SystemTime::now(),
        )
    }

    /// Asks for the trust anchors and takes them over where they have changed.
    async fn update_anchors(&self) -> Result<Arc<TrustAnchors>, CaError> {
        let certificates = in_time(self.authority.trust_anchors()).await?;
        if let Some(current) = self.trust.load_full()
            && current.certificates == certificates
        {
            return Ok(current);
        }
        let count = certificates.len();
        let trust = TrustAnchors::new(certificates).map_err(|error| {
            CaError::UnusableAnswer(format!("its trust anchors cannot be used: {error}"))
        })?;
        let trust = Arc::new(trust);
        self.trust.store(Some(Arc::clone(&trust)));
        self.anchors_changed.send_modify(|changes| *changes += 1);
        tracing::info!(count, "trust anchors taken over");
        Ok(trust)
    }

    /// Ends when the trust anchors have changed so that peers no longer accept what `slot` holds.
    async fn distrusts(&self, slot: &KeySlot, changes: &mut watch::Receiver<u64>) {
        loop {
            if changes.changed().await.is_err() {
                // `self` has the sender, so this is never reached; waiting for ever is harmless.
                std::future::pending::<()>().await;
            }
            if let (Some(held), Some(trust)) = (slot.held(), self.trust.load_full())
                && !held.is_trusted_by(&trust, SystemTime::now())
            {
                return;
            }
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, CaError>>) -> Result<T, CaError> {
    timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or(Err(CaError::TimedOut(ANSWER_TIMEOUT)))
}

/// No name but the identity and no extension but these: remote authorities are strict about it.
pub(super) fn request_for(
    identity: &SpiffeId,
    key: &KeyPair,
) -> Result<CertificateSigningRequestDer<'static>, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    Ok(params.serialize_request(key)?.into())
}

/// Keeps `slot` filled for as long as it runs; counts each ended attempt in `ended`.
pub(super) async fn keep_fresh(
    source: Arc<Source>,
    identity: SpiffeId,
    slot: Arc<KeySlot>,
    ended: watch::Sender<u64>,
) {
    let mut changes = source.anchors_changed.subscribe();
    let mut failures = 0_u32;
    let mut due = SystemTime::now();
    loop {
        tokio::select! {
            () = sleep_until(due) => {}
            () = source.distrusts(&slot, &mut changes) => {}
        }
        let obtained = source.obtain(&identity).await;
        let now = SystemTime::now();
        match obtained {
            Ok(held) => {
                let ends = time::OffsetDateTime::from(held.term.ends);
                slot.store(held);
                failures = 0;
                source.refreshed.fetch_add(1, Ordering::Relaxed);
                due = schedule::next_attempt(now, slot.term(), failures, dice());
                tracing::info!(%identity, %ends, "certificate obtained");
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                source.failed.fetch_add(1, Ordering::Relaxed);
                due = schedule::next_attempt(now, slot.term(), failures, dice());
                warn(&identity, &error, &slot, now, due);
            }
        }
        ended.send_modify(|attempts| *attempts += 1);
    }
}

fn warn(identity: &SpiffeId, error: &CaError, slot: &KeySlot, now: SystemTime, due: SystemTime) {
    let cause = error.label();
    let retry_in = due.duration_since(now).unwrap_or_default();
    match slot.term() {
        Some(term) => {
            let ends = time::OffsetDateTime::from(term.ends);
            if term.is_over(now) {
                tracing::warn!(%identity, cause, %error, %ends, ?retry_in,
                    "no new certificate, and the old one has expired");
            } else {
                tracing::warn!(%identity, cause, %error, %ends, ?retry_in,
                    "no new certificate, the old one stays in use until its end");
            }
        }
        None => {
            tracing::warn!(%identity, cause, %error, ?retry_in, "no certificate yet");
        }
    }
}

/// Takes over changed trust anchors for as long as it runs.
pub(super) async fn follow_anchors(source: Arc<Source>) {
    let mut last_error = None;
    loop {
        match source.update_anchors().await {
            Ok(_) => last_error = None,
            // Once for each cause: this runs every few seconds.
            Err(error) => {
                let text = error.to_string();
                if last_error.as_ref() != Some(&text) {
                    tracing::warn!(cause = error.label(), %error,
                        "the trust anchors cannot be read, those known stay in use");
                    last_error = Some(text);
                }
            }
        }
        sleep(ANCHOR_INTERVAL).await;
    }
}

async fn sleep_until(due: SystemTime) {
    while let Ok(left) = due.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        sleep(left.min(LONGEST_NAP)).await;
    }
}

/// A number in -1..=1 that spreads what would otherwise happen at once.
fn dice() -> f64 {
    fastrand::f64() * 2.0 - 1.0
}
