//! The key and certificate that an identity uses now.
//!
//! Handshakes read it from any thread without a lock; a renewal swaps it. A handshake keeps what
//! it has read, so a live connection never sees the swap.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rcgen::KeyPair;
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{ca::CaError, peer::peer_identity, schedule::Term, tls::provider, trust::Trust};
use crate::model::SpiffeId;

/// A key with its certificate, checked to be what peers will accept.
#[derive(Debug)]
pub(super) struct Held {
    key: Arc<CertifiedKey>,
    pub(super) term: Term,
}

impl Held {
    /// Checks an authority's answer as a peer would, so that a bad one never replaces a good
    /// certificate.
    pub(super) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &KeyPair,
        identity: &SpiffeId,
        trust: &Trust,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let unusable = |what: String| CaError::UnusableAnswer(what);
        let certified = match peer_identity(&chain) {
            Ok(certified) => certified,
            Err(error) => return Err(unusable(error.to_string())),
        };
        if certified != *identity {
            return Err(unusable(format!("it certifies {certified}")));
        }
        trust
            .verify_own(&chain, now)
            .map_err(|error| unusable(error.to_string()))?;
        let ends = end_of(&chain[0]).ok_or_else(|| unusable("it has no end".to_owned()))?;
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        // Also compares the public key in the certificate with ours.
        let key = CertifiedKey::from_der(chain, private, provider())
            .map_err(|error| unusable(error.to_string()))?;
        Ok(Self {
            key: Arc::new(key),
            term: Term {
                obtained: now,
                ends,
            },
        })
    }

    /// Whether it hangs on `issuer`: the certificates above it.
    pub(super) fn is_of(&self, issuer: &[CertificateDer<'static>]) -> bool {
        self.key.cert.get(1..) == Some(issuer)
    }

    /// Its number, as `openssl` writes it.
    pub(super) fn serial(&self) -> String {
        let (_, parsed) = X509Certificate::from_der(&self.key.cert[0])
            // `new` has read its names and its end.
            .expect("a certificate that was parsed before");
        let digits = parsed.tbs_certificate.raw_serial_as_string();
        digits.replace(':', "").to_uppercase()
    }

    /// Whether peers that have `trust` would accept this certificate now.
    pub(super) fn is_trusted_by(&self, trust: &Trust, now: SystemTime) -> bool {
        trust.verify_own(self.chain(), now).is_ok()
    }

    pub(super) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }
}

fn end_of(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// `now` as rustls wants it.
pub(super) fn unix_time(now: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        now.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default(),
    )
}

/// The place of the current key of one identity.
#[derive(Debug, Default)]
pub(super) struct KeySlot(ArcSwapOption<Held>);

impl KeySlot {
    pub(super) fn store(&self, held: Held) {
        self.0.store(Some(Arc::new(held)));
    }

    pub(super) fn held(&self) -> Option<Arc<Held>> {
        self.0.load_full()
    }

    pub(super) fn term(&self) -> Option<Term> {
        self.0.load().as_ref().map(|held| held.term)
    }

    fn key(&self) -> Option<Arc<CertifiedKey>> {
        self.0.load().as_ref().map(|held| Arc::clone(&held.key))
    }
}

#[cfg(test)]
impl KeySlot {
    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.key().unwrap().cert.clone()
    }

    /// A slot with what [`Held::new`] would refuse.
    pub(super) fn unchecked(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Arc<Self> {
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let ends = end_of(&chain[0]).unwrap();
        let key = CertifiedKey::from_der(chain, private, provider()).unwrap();
        let slot = Self::default();
        slot.store(Held {
            key: Arc::new(key),
            term: Term {
                obtained: SystemTime::now(),
                ends,
            },
        });
        Arc::new(slot)
    }
}

impl ResolvesServerCert for KeySlot {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.key()
    }
}

impl ResolvesClientCert for KeySlot {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.key()
    }

    fn has_certs(&self) -> bool {
        self.0.load().is_some()
    }
}
