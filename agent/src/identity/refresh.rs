//! The background work: getting certificates, and following the authority.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::CertificateSigningRequestDer;
use time::OffsetDateTime;
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    ca::{CaError, CertificateAuthority, SigningRequest, Standing},
    expiry::{Expiry, Reminders},
    key_slot::{Held, KeySlot},
    schedule,
    trust::{SharedTrust, Trust},
};
use crate::model::SpiffeId;

/// Limit for one answer of the authority. A remote one is seconds slow under load.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);
/// Requests at an authority at a time: a node that starts has many identities.
const IN_FLIGHT: usize = 8;
/// How often the authority is looked at. What it changes is in use so much later.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The wall clock may be set while a task sleeps: it is read again after so long.
const LONGEST_NAP: Duration = Duration::from_mins(1);

/// Where certificates come from, shared by all identities.
#[derive(Debug)]
pub(super) struct Source {
    authority: Arc<dyn CertificateAuthority>,
    lifetime: Duration,
    pub(super) trust: SharedTrust,
    /// The authority as it was last seen.
    pub(super) standing: ArcSwap<Standing>,
    /// Counts the changes of what certificates hang on.
    pub(super) changes: watch::Sender<u64>,
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
            standing: ArcSwap::default(),
            changes: watch::Sender::new(0),
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
        let trust = match self.trust.load_full() {
            Some(trust) => trust,
            None => self.look().await?,
        };
        Held::new(
            signed.certificates,
            &key,
            identity,
            &trust,
            SystemTime::now(),
        )
    }

    /// Asks the authority how it stands, and takes over what has changed.
    async fn look(&self) -> Result<Arc<Trust>, CaError> {
        let standing = in_time(self.authority.standing()).await?;
        let (trust, has_other_trust) = match self.trust.load_full() {
            Some(trust) if trust.is_of(&standing.anchors, &standing.revocations) => (trust, false),
            _ => {
                let (anchors, lists) = (&standing.anchors, &standing.revocations);
                let trust = Trust::new(anchors.clone(), Arc::clone(lists)).map_err(|error| {
                    CaError::UnusableAnswer(format!("its trust anchors cannot be used: {error}"))
                })?;
                (Arc::new(trust), true)
            }
        };
        let has_other_issuer = self.standing.load().issuer != standing.issuer;
        self.standing.store(Arc::new(standing));
        if has_other_trust {
            self.trust.store(Some(Arc::clone(&trust)));
        }
        if has_other_trust || has_other_issuer {
            self.changes.send_modify(|changes| *changes += 1);
        }
        Ok(trust)
    }

    /// Ends when the authority has changed so that another certificate is needed than the one in
    /// `slot`, or so that one may be had after all.
    async fn asks_for_another(
        &self,
        slot: &KeySlot,
        failures: u32,
        changes: &mut watch::Receiver<u64>,
    ) {
        loop {
            if changes.changed().await.is_err() {
                // `self` has the sender, so this is never reached; waiting for ever is harmless.
                std::future::pending::<()>().await;
            }
            if failures > 0 || self.has_left_behind(slot) {
                return;
            }
        }
    }

    /// Whether what is in `slot` isn't what the authority would sign and peers would accept now.
    fn has_left_behind(&self, slot: &KeySlot) -> bool {
        let (Some(held), Some(trust)) = (slot.held(), self.trust.load_full()) else {
            return false;
        };
        let issuer = &self.standing.load().issuer;
        !held.is_trusted_by(&trust, SystemTime::now()) || !issuer.is_empty() && !held.is_of(issuer)
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
    let mut changes = source.changes.subscribe();
    let mut failures = 0_u32;
    let mut due = SystemTime::now();
    loop {
        tokio::select! {
            () = sleep_until(due) => {}
            () = source.asks_for_another(&slot, failures, &mut changes) => {}
        }
        let obtained = source.obtain(&identity).await;
        let now = SystemTime::now();
        match obtained {
            Ok(held) => {
                let ends = OffsetDateTime::from(held.term.ends);
                let serial = held.serial();
                slot.store(held);
                failures = 0;
                source.refreshed.fetch_add(1, Ordering::Relaxed);
                due = schedule::next_attempt(now, slot.term(), failures, dice());
                tracing::info!(%identity, serial, %ends, "certificate obtained");
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
            let ends = OffsetDateTime::from(term.ends);
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

/// Takes over what the authority changes, and reminds of what ends, for as long as it runs.
pub(super) async fn follow(source: Arc<Source>) {
    let mut last_error = None;
    let mut reminders = Reminders::default();
    loop {
        match source.look().await {
            Ok(_) => last_error = None,
            // Once for each cause: this runs every second.
            Err(error) => {
                let text = error.to_string();
                if last_error.as_ref() != Some(&text) {
                    tracing::warn!(cause = error.label(), %error,
                        "the authority cannot be asked, what is known of it stays in use");
                    last_error = Some(text);
                }
            }
        }
        let standing = source.standing.load();
        for expiry in reminders.due(&standing.expiries, OffsetDateTime::now_utc()) {
            remind(expiry);
        }
        drop(standing);
        sleep(LOOK_INTERVAL).await;
    }
}

fn remind(expiry: &Expiry) {
    let Expiry {
        object,
        subject,
        path,
        ends,
        ..
    } = expiry;
    let path = path.display();
    if OffsetDateTime::now_utc() < *ends {
        tracing::warn!(object, subject, %path, %ends, "nears its end: put its successor there");
    } else {
        tracing::warn!(object, subject, %path, %ends, "is past its end: put its successor there");
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
