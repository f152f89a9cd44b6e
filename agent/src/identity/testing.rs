//! Fixtures of this module's tests: authorities, folders and handshakes in memory.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwapOption;
use malla_common::Reason;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType,
};
use rustls::{
    ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection, Side,
    pki_types::{CertificateDer, ServerName},
};
use time::{Duration, OffsetDateTime};

use super::{
    files::parse,
    key_slot::KeySlot,
    reason::reason_of,
    revocation::Revocations,
    trust::{SharedTrust, Trust},
};
use crate::model::SpiffeId;

mod volume;

pub(super) use crate::scratch::ScratchFolder;
pub(super) use volume::Volume;

/// The identity of service account `name` in the tests' trust domain.
pub(super) fn identity(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/test/sa/{name}")
        .parse()
        .unwrap()
}

impl ScratchFolder {
    /// The authority's folder, which doesn't exist yet.
    pub(super) fn authority(&self) -> PathBuf {
        self.path().join("identity")
    }
}

/// A trust anchor in memory that signs whatever a test wants.
#[derive(Debug)]
pub(super) struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl TestAuthority {
    pub(super) fn new(name: &str) -> Self {
        let now = OffsetDateTime::now_utc();
        Self::valid(name, now - Duration::hours(1), now + Duration::hours(1))
    }

    pub(super) fn valid(name: &str, from: OffsetDateTime, to: OffsetDateTime) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name, from, to);
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).unwrap(),
        }
    }

    /// An authority that this one has signed, whose end is `to`.
    pub(super) fn issuer(&self, name: &str, to: OffsetDateTime) -> Self {
        self.certified(Self::params(name, to - Duration::hours(2), to))
    }

    /// The same, but for the word that it is one.
    pub(super) fn no_authority(&self, name: &str, to: OffsetDateTime) -> Self {
        let mut params = Self::params(name, to - Duration::hours(2), to);
        params.is_ca = IsCa::ExplicitNoCa;
        self.certified(params)
    }

    fn certified(&self, mut params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        params.use_authority_key_identifier_extension = true;
        Self {
            issuer: CertifiedIssuer::signed_by(params, key, &self.issuer).unwrap(),
        }
    }

    fn params(name: &str, from: OffsetDateTime, to: OffsetDateTime) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (from, to);
        params
    }

    pub(super) fn der(&self) -> &CertificateDer<'static> {
        self.issuer.der()
    }

    pub(super) fn pem(&self) -> String {
        self.issuer.pem()
    }

    pub(super) fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A list of this authority that revokes `certificates`, as PEM.
    pub(super) fn list(&self, certificates: &[&CertificateDer<'_>]) -> String {
        list_of(&self.issuer, certificates)
    }

    pub(super) fn trust(&self) -> SharedTrust {
        let anchors = vec![self.issuer.der().clone()];
        let trust = Trust::new(anchors, Arc::default()).unwrap();
        Arc::new(ArcSwapOption::from_pointee(trust))
    }

    /// The same, but for what `list` revokes.
    pub(super) fn trust_but(&self, list: &str) -> SharedTrust {
        let anchors = vec![self.issuer.der().clone()];
        let revocations = Revocations::read(list.as_bytes(), &anchors).unwrap();
        let trust = Trust::new(anchors, Arc::new(revocations)).unwrap();
        Arc::new(ArcSwapOption::from_pointee(trust))
    }

    /// Writes the anchor and its key as the embedded authority keeps them.
    pub(super) fn place_in(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("ca.crt"), self.issuer.pem()).unwrap();
        let key = self.issuer.key().serialize_pem();
        std::fs::write(directory.join("ca.key"), key).unwrap();
    }

    /// A key whose certificate is valid now and names `uris`.
    pub(super) fn certify(&self, uris: &[&str]) -> Arc<KeySlot> {
        self.certify_with(uris, |_| {})
    }

    pub(super) fn certify_with(
        &self,
        uris: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Arc<KeySlot> {
        let (chain, key) = self.issue(uris, change);
        KeySlot::unchecked(chain, &key)
    }

    pub(super) fn issue(
        &self,
        uris: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = now - Duration::minutes(10);
        params.not_after = now + Duration::minutes(10);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        (vec![leaf.der().clone()], key)
    }
}

/// A list of `issuer` that revokes `certificates`, as PEM.
pub(super) fn list_of(
    issuer: &Issuer<'_, KeyPair>,
    certificates: &[&CertificateDer<'_>],
) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked = certificates.iter().map(|certificate| RevokedCertParams {
        serial_number: parse(certificate).raw_serial().to_vec().into(),
        revocation_time: now,
        reason_code: None,
        invalidity_date: None,
    });
    let list = CertificateRevocationListParams {
        this_update: now,
        next_update: now + Duration::hours(1),
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(issuer).unwrap().pem().unwrap()
}

/// Two ends that shake hands.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) client: ClientConnection,
    pub(super) server: ServerConnection,
}

/// How a handshake failed.
#[derive(Debug)]
pub(super) struct Refusal {
    /// The side that refused, with its reason.
    pub(super) by: Side,
    pub(super) reason: Reason,
    /// What the other side made of the alert.
    pub(super) told: Reason,
}

/// Shakes hands, and lets the client see the server's verdict on its certificate.
pub(super) fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<Session, Refusal> {
    let mut session = Session::new(client, server);
    // A full handshake takes two round trips at most (hello retry).
    for _ in 0..3 {
        if let Err(error) = session.client_speaks() {
            return Err(Refusal {
                by: Side::Server,
                reason: reason_of(&error, Side::Server),
                told: reason_of(&session.server_speaks().unwrap_err(), Side::Client),
            });
        }
        if let Err(error) = session.server_speaks() {
            return Err(Refusal {
                by: Side::Client,
                reason: reason_of(&error, Side::Client),
                told: reason_of(&session.client_speaks().unwrap_err(), Side::Server),
            });
        }
    }
    assert!(!session.client.is_handshaking() && !session.server.is_handshaking());
    Ok(session)
}

impl Session {
    /// Two ends that have said nothing yet.
    pub(super) fn new(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Self {
        let name = ServerName::from(std::net::IpAddr::from([10, 0, 0, 1]));
        Self {
            client: ClientConnection::new(client, name).unwrap(),
            server: ServerConnection::new(server).unwrap(),
        }
    }

    /// Carries what the client has to say to the server.
    pub(super) fn client_speaks(&mut self) -> Result<(), Error> {
        let mut bytes = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut bytes).unwrap();
        }
        let mut bytes = &bytes[..];
        while !bytes.is_empty() {
            self.server.read_tls(&mut bytes).unwrap();
            self.server.process_new_packets()?;
        }
        Ok(())
    }

    /// Carries what the server has to say to the client.
    pub(super) fn server_speaks(&mut self) -> Result<(), Error> {
        let mut bytes = Vec::new();
        while self.server.wants_write() {
            self.server.write_tls(&mut bytes).unwrap();
        }
        let mut bytes = &bytes[..];
        while !bytes.is_empty() {
            self.client.read_tls(&mut bytes).unwrap();
            self.client.process_new_packets()?;
        }
        Ok(())
    }
}
