use std::{
    io::{Read, Write},
    sync::atomic::AtomicBool,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::timeout;

use super::*;
use crate::identity::{
    ca::{CaError, SignedChain, SigningRequest, Standing},
    embedded::EmbeddedAuthority,
    peer::peer_identity,
    testing::{ScratchFolder, Session, TestAuthority, handshake, identity, list_of},
};

const DEADLINE: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_hours(24);

/// What the authority of a test does with requests.
#[derive(Debug, Default)]
struct Behaviour {
    fails: AtomicBool,
    /// Certifies this identity, whatever was asked for.
    confused: AtomicBool,
    /// Takes half a second for an answer.
    slow: AtomicBool,
}

/// The embedded authority, with faults.
#[derive(Debug)]
struct Faulty {
    inner: EmbeddedAuthority,
    behaviour: Arc<Behaviour>,
}

impl CertificateAuthority for Faulty {
    fn sign(&self, mut request: SigningRequest) -> BoxFuture<'_, Result<SignedChain, CaError>> {
        if self.behaviour.fails.load(Ordering::SeqCst) {
            return std::future::ready(Err(CaError::Stopped)).boxed();
        }
        if self.behaviour.confused.load(Ordering::SeqCst) {
            request.identity = identity("confused");
        }
        if self.behaviour.slow.load(Ordering::SeqCst) {
            let signed = self.inner.sign(request);
            let late = tokio::time::sleep(Duration::from_millis(500));
            return late.then(|()| signed).boxed();
        }
        self.inner.sign(request)
    }

    fn standing(&self) -> BoxFuture<'_, Result<Standing, CaError>> {
        self.inner.standing()
    }
}

struct Fixture {
    scratch: ScratchFolder,
    behaviour: Arc<Behaviour>,
    certificates: Certificates,
}

impl Fixture {
    fn new(lifetime: Duration) -> Self {
        let scratch = ScratchFolder::new();
        let behaviour = Arc::new(Behaviour::default());
        let authority = Faulty {
            inner: EmbeddedAuthority::new(&scratch.authority()),
            behaviour: Arc::clone(&behaviour),
        };
        let certificates =
            Certificates::new(Arc::new(authority), "cluster.local".to_owned(), lifetime);
        Self {
            scratch,
            behaviour,
            certificates,
        }
    }

    async fn with_identities(lifetime: Duration, names: &[&str]) -> Self {
        let fixture = Self::new(lifetime);
        for name in names {
            fixture.certificates.ensure(&identity(name)).unwrap();
            fixture.certificates.ready(&identity(name)).await.unwrap();
        }
        fixture
    }

    fn session(&self) -> Session {
        let (web, voting) = (identity("web"), identity("voting"));
        let client = self.certificates.client_config(&web, &voting).unwrap();
        let server = self.certificates.server_config(&voting).unwrap();
        handshake(client, server).unwrap()
    }

    fn end_of(&self, name: &str) -> SystemTime {
        let expirations = self.certificates.expirations();
        let wanted = identity(name);
        let found = expirations.into_iter().find(|(id, _)| *id == wanted);
        found.unwrap().1
    }

    /// Waits until `holds` is true after an attempt for `name`; it is told how many have ended.
    async fn until(&self, name: &str, holds: impl Fn(u64) -> bool) {
        let mut attempts = self
            .certificates
            .entry(&identity(name))
            .unwrap()
            .attempts
            .clone();
        let waiting = attempts.wait_for(|ended| holds(*ended));
        timeout(DEADLINE, waiting).await.unwrap().unwrap();
    }
}

fn exchange(session: &mut Session, text: &[u8]) {
    session.client.writer().write_all(text).unwrap();
    session.client_speaks().unwrap();
    let mut received = vec![0; text.len()];
    session.server.reader().read_exact(&mut received).unwrap();
    assert_eq!(received, text);
}

#[tokio::test]
async fn two_identities_of_a_node_speak_with_each_other() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    let session = fixture.session();
    let seen = peer_identity(session.server.peer_certificates().unwrap());
    assert_eq!(seen, Ok(identity("web")));
    let refreshes = fixture.certificates.refreshes();
    assert_eq!(refreshes, Refreshes { ok: 2, failed: 0 });
    assert_eq!(fixture.certificates.expirations().len(), 2);
}

#[tokio::test]
async fn other_threads_make_handshakes_with_the_managers_keys() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| fixture.session());
        }
    });
}

#[tokio::test]
async fn a_renewal_changes_the_key_and_leaves_live_connections_alone() {
    let fixture = Fixture::with_identities(Duration::from_secs(6), &["web", "voting"]).await;
    let mut live = fixture.session();
    let first = live.server.peer_certificates().unwrap().to_vec();
    let ends = fixture.end_of("web");

    fixture.until("web", |_| fixture.end_of("web") > ends).await;

    // Before its end, so that nothing was without a certificate meanwhile.
    assert!(SystemTime::now() < ends);
    exchange(&mut live, b"as if nothing had happened");
    let next = fixture.session();
    assert_ne!(next.server.peer_certificates().unwrap(), first);
}

#[tokio::test]
async fn a_failing_authority_leaves_the_certificate_in_use_and_recovers_alone() {
    let fixture = Fixture::with_identities(Duration::from_secs(6), &["web", "voting"]).await;
    let ends = fixture.end_of("web");

    fixture.behaviour.fails.store(true, Ordering::SeqCst);
    fixture
        .until("web", |_| fixture.certificates.refreshes().failed > 0)
        .await;
    fixture.session();
    assert_eq!(fixture.end_of("web"), ends);

    fixture.behaviour.fails.store(false, Ordering::SeqCst);
    fixture.until("web", |_| fixture.end_of("web") > ends).await;
    fixture.session();
}

#[tokio::test]
async fn an_authority_that_answers_wrongly_and_then_slowly_leaves_no_gap() {
    let fixture = Fixture::with_identities(Duration::from_secs(10), &["web", "voting"]).await;
    let ends = fixture.end_of("web");

    fixture.behaviour.confused.store(true, Ordering::SeqCst);
    fixture
        .until("web", |_| fixture.certificates.refreshes().failed > 0)
        .await;
    fixture.session();
    assert_eq!(fixture.end_of("web"), ends);

    fixture.behaviour.slow.store(true, Ordering::SeqCst);
    fixture.behaviour.confused.store(false, Ordering::SeqCst);
    fixture.until("web", |_| fixture.end_of("web") > ends).await;
    assert!(SystemTime::now() < ends, "the old one had ended");
    fixture.session();
}

#[tokio::test]
async fn a_certificate_of_another_identity_is_not_taken() {
    let fixture = Fixture::new(DAY);
    fixture.behaviour.confused.store(true, Ordering::SeqCst);
    fixture.certificates.ensure(&identity("web")).unwrap();

    let ready = fixture.certificates.ready(&identity("web")).await;

    assert_eq!(ready, Err(NoIdentity::NotYet(identity("web"))));
    // One, or two where the first look at the authority has counted as a change of it meanwhile.
    let entry = fixture.certificates.entry(&identity("web")).unwrap();
    let failed = *entry.attempts.borrow();
    assert_eq!(
        fixture.certificates.refreshes(),
        Refreshes { ok: 0, failed }
    );
}

#[tokio::test]
async fn a_replaced_authority_is_followed_without_a_restart() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    let before = fixture.session();
    let before = before.server.peer_certificates().unwrap();

    // In one step: an anchor alone, without a new issuer, would not be taken over.
    let directory = fixture.scratch.authority();
    let next = directory.with_extension("next");
    TestAuthority::new("new").place_in(&next);
    std::fs::rename(&directory, directory.with_extension("old")).unwrap();
    std::fs::rename(&next, &directory).unwrap();
    for name in ["web", "voting"] {
        fixture.until(name, |ended| ended > 1).await;
    }

    let after = fixture.session();
    let after = after.server.peer_certificates().unwrap();
    assert_ne!(after[1], before[1]);
}

#[tokio::test]
async fn a_new_issuer_under_the_same_anchor_renews_every_certificate_within_seconds() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    let mut live = fixture.session();
    let directory = fixture.scratch.authority();

    // One that is missing is made with the anchor's key.
    std::fs::remove_file(directory.join("issuer.key")).unwrap();
    std::fs::remove_file(directory.join("issuer.crt")).unwrap();
    for name in ["web", "voting"] {
        fixture.until(name, |ended| ended > 1).await;
    }

    assert_eq!(
        fixture.certificates.refreshes(),
        Refreshes { ok: 4, failed: 0 }
    );
    exchange(&mut live, b"as if nothing had happened");
    fixture.session();
}

#[tokio::test]
async fn a_revoked_certificate_is_told_of_and_the_own_one_replaced() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    let session = fixture.session();
    let web = session.server.peer_certificates().unwrap();
    let voting = session.client.peer_certificates().unwrap();
    let directory = fixture.scratch.authority();
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    let key = rcgen::KeyPair::from_pem(&read("issuer.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("issuer.crt"), key).unwrap();

    let list = list_of(&issuer, &[&web[0]]);
    std::fs::write(directory.join("crl.pem"), list).unwrap();

    let told = timeout(DEADLINE, fixture.certificates.revoked(web));
    told.await.unwrap();
    fixture.until("web", |ended| ended > 1).await;
    let next = fixture.session();
    assert_ne!(next.server.peer_certificates().unwrap()[0], web[0]);
    assert_eq!(next.client.peer_certificates().unwrap(), voting);
    let others = fixture.certificates.revoked(voting);
    assert!(others.now_or_never().is_none());
}

#[tokio::test]
async fn a_released_identity_has_no_configuration() {
    let fixture = Fixture::with_identities(DAY, &["web", "voting"]).await;
    let mut live = fixture.session();

    fixture.certificates.release(&identity("web"));

    let refused = fixture.certificates.server_config(&identity("web"));
    assert_eq!(refused.unwrap_err(), NoIdentity::Unknown(identity("web")));
    exchange(&mut live, b"still there");
    assert_eq!(fixture.certificates.expirations().len(), 1);
}

#[tokio::test]
async fn an_identity_of_another_trust_domain_is_not_kept() {
    let fixture = Fixture::new(DAY);
    let foreign: SpiffeId = "spiffe://elsewhere/ns/test/sa/web".parse().unwrap();
    let refused = fixture.certificates.ensure(&foreign).unwrap_err();
    let trust_domain = "cluster.local".to_owned();
    assert_eq!(
        refused,
        NoIdentity::ForeignTrustDomain(foreign, trust_domain)
    );
}

mod load;
