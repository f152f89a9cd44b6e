//! Keeps a valid certificate for each identity of this node.
//!
//! Each identity has a task that asks the authority, waits and asks again. It lives on the control
//! runtime; workers on other threads read its key and wait for its first answer. When an identity
//! is released or the manager dropped, its task ends; configurations handed out stay usable until
//! their certificate ends.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, ServerConfig, pki_types::CertificateDer};
use tokio::{sync::watch, task::JoinHandle};

use super::{
    ca::{CertificateAuthority, Standing},
    key_slot::KeySlot,
    refresh::{self, Source},
    tls,
};
use crate::model::SpiffeId;

/// The certificates of this node's workloads.
#[derive(Debug)]
pub(crate) struct Certificates {
    source: Arc<Source>,
    trust_domain: String,
    /// Read for each connection, written when a workload comes or goes.
    entries: ArcSwap<HashMap<SpiffeId, Arc<Entry>>>,
    writing: Mutex<()>,
    _following: OwnedTask,
}

/// One identity.
#[derive(Debug)]
struct Entry {
    slot: Arc<KeySlot>,
    /// How many attempts to get a certificate have ended.
    attempts: watch::Receiver<u64>,
    server: Arc<ServerConfig>,
    _renewal: OwnedTask,
}

/// Ends the task when dropped.
#[derive(Debug)]
struct OwnedTask(JoinHandle<()>);

impl Drop for OwnedTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why there is no certificate to speak with: [`Reason::NoIdentity`](malla_common::Reason) each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoIdentity {
    #[error("{0} is not an identity of this node")]
    Unknown(SpiffeId),
    #[error("{0} has no certificate yet")]
    NotYet(SpiffeId),
    #[error("the certificate of {0} has expired")]
    Expired(SpiffeId),
    #[error("{0} is not of trust domain `{1}`")]
    ForeignTrustDomain(SpiffeId, String),
}

/// How many attempts to get a certificate ended how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Refreshes {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
}

impl Certificates {
    /// A manager without identities, for certificates of `lifetime` from `authority`.
    ///
    /// Must be called on the runtime that the background work is to run on.
    pub(crate) fn new(
        authority: Arc<dyn CertificateAuthority>,
        trust_domain: String,
        lifetime: Duration,
    ) -> Self {
        let source = Arc::new(Source::new(authority, lifetime));
        let following = tokio::spawn(refresh::follow(Arc::clone(&source)));
        Self {
            source,
            trust_domain,
            entries: ArcSwap::default(),
            writing: Mutex::new(()),
            _following: OwnedTask(following),
        }
    }

    /// Begins to keep a certificate for `identity`; does nothing where it is kept already.
    ///
    /// Returns at once: [`ready`](Self::ready) waits for the certificate. Must be called on the
    /// runtime that the background work is to run on.
    pub(crate) fn ensure(&self, identity: &SpiffeId) -> Result<(), NoIdentity> {
        if identity.trust_domain != self.trust_domain {
            return Err(NoIdentity::ForeignTrustDomain(
                identity.clone(),
                self.trust_domain.clone(),
            ));
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.entries.load().contains_key(identity) {
            return Ok(());
        }
        let slot = Arc::new(KeySlot::default());
        let (ended, attempts) = watch::channel(0);
        let server = tls::server_config(
            Arc::clone(&slot),
            Arc::clone(&self.source.trust),
            self.trust_domain.clone(),
        );
        let renewal = tokio::spawn(refresh::keep_fresh(
            Arc::clone(&self.source),
            identity.clone(),
            Arc::clone(&slot),
            ended,
        ));
        let entry = Entry {
            slot,
            attempts,
            server: Arc::new(server),
            _renewal: OwnedTask(renewal),
        };
        let mut entries = HashMap::clone(&self.entries.load());
        entries.insert(identity.clone(), Arc::new(entry));
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Stops to renew the certificate of `identity`, whose last workload has left this node.
    pub(crate) fn release(&self, identity: &SpiffeId) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = HashMap::clone(&self.entries.load());
        if entries.remove(identity).is_some() {
            self.entries.store(Arc::new(entries));
        }
    }

    /// Waits until `own` has a valid certificate, or the first attempt to get one has failed.
    /// May be awaited on any runtime; bounded by the authority's time-out.
    pub(crate) async fn ready(&self, own: &SpiffeId) -> Result<(), NoIdentity> {
        let mut attempts = self.entry(own)?.attempts.clone();
        // Fails where the identity is released meanwhile, which the next line tells.
        let _ = attempts.wait_for(|ended| *ended > 0).await;
        self.usable(own).map(|_| ())
    }

    /// The server side of `own`, which any workload of the trust domain may call.
    pub(crate) fn server_config(&self, own: &SpiffeId) -> Result<Arc<ServerConfig>, NoIdentity> {
        Ok(Arc::clone(&self.usable(own)?.server))
    }

    /// The client side of `own`, for a server that must be `expected`.
    ///
    /// Made anew for each call, a dozen reference counts and small allocations: kept ones would
    /// grow with every pair of identities that ever talked.
    pub(crate) fn client_config(
        &self,
        own: &SpiffeId,
        expected: &SpiffeId,
    ) -> Result<Arc<ClientConfig>, NoIdentity> {
        let entry = self.usable(own)?;
        Ok(Arc::new(tls::client_config(
            Arc::clone(&entry.slot),
            Arc::clone(&self.source.trust),
            expected.clone(),
        )))
    }

    /// The chain that `own` would show in a handshake now, which a peer would accept. None where a
    /// handshake would fail, and tell why.
    pub(crate) fn proven(&self, own: &SpiffeId) -> Option<Vec<CertificateDer<'static>>> {
        let held = self.usable(own).ok()?.slot.held()?;
        let trust = self.source.trust.load_full()?;
        let is_trusted = held.is_trusted_by(&trust, SystemTime::now());
        is_trusted.then(|| held.chain().to_vec())
    }

    /// How many attempts to get a certificate ended how, over all identities.
    pub(crate) fn refreshes(&self) -> Refreshes {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Refreshes {
            ok: count(&self.source.refreshed),
            failed: count(&self.source.failed),
        }
    }

    /// `notAfter` of each identity's current certificate, also where it has passed. An identity
    /// that never had one is left out.
    pub(crate) fn expirations(&self) -> Vec<(SpiffeId, SystemTime)> {
        let entries = self.entries.load();
        entries
            .iter()
            .filter_map(|(identity, entry)| Some((identity.clone(), entry.slot.term()?.ends)))
            .collect()
    }

    /// The authority as it was last seen: its ends, and how its files were read.
    pub(crate) fn authority(&self) -> Arc<Standing> {
        self.source.standing.load_full()
    }

    /// Ends when a certificate of `chain`, which was sound at its handshake, is revoked; maybe at
    /// once. May be awaited on any runtime.
    pub(crate) async fn revoked(&self, chain: &[CertificateDer<'static>]) {
        let mut changes = self.source.changes.subscribe();
        loop {
            let trust = self.source.trust.load_full();
            if trust.is_some_and(|trust| trust.revokes(chain)) {
                return;
            }
            if changes.changed().await.is_err() {
                // `source` has the sender, so this is never reached.
                std::future::pending::<()>().await;
            }
        }
    }

    fn entry(&self, own: &SpiffeId) -> Result<Arc<Entry>, NoIdentity> {
        let entries = self.entries.load();
        let entry = entries.get(own).map(Arc::clone);
        entry.ok_or_else(|| NoIdentity::Unknown(own.clone()))
    }

    fn usable(&self, own: &SpiffeId) -> Result<Arc<Entry>, NoIdentity> {
        let entry = self.entry(own)?;
        match entry.slot.term() {
            None => Err(NoIdentity::NotYet(own.clone())),
            Some(term) if term.is_over(SystemTime::now()) => Err(NoIdentity::Expired(own.clone())),
            Some(_) => Ok(entry),
        }
    }
}

#[cfg(test)]
mod tests;
