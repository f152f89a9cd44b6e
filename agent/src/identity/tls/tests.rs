use malla_common::Reason;
use rustls::{CipherSuite, HandshakeKind, NamedGroup, ProtocolVersion, Side};
use time::{Duration, OffsetDateTime};

use super::*;
use crate::identity::{
    peer::peer_identity,
    testing::{Refusal, Session, TestAuthority, handshake, identity},
};

const WEB: &str = "spiffe://cluster.local/ns/test/sa/web";
const VOTING: &str = "spiffe://cluster.local/ns/test/sa/voting";
const FOREIGN: &str = "spiffe://elsewhere/ns/test/sa/web";

/// `client` calls `server`, which it expects to be `voting`, both trusting `mesh`.
fn call(
    mesh: &TestAuthority,
    client: Arc<KeySlot>,
    server: Arc<KeySlot>,
) -> Result<Session, Refusal> {
    let client = client_config(client, mesh.trust(), identity("voting"));
    let server = server_config(server, mesh.trust(), "cluster.local".to_owned());
    handshake(Arc::new(client), Arc::new(server))
}

fn refused(result: Result<Session, Refusal>) -> (Side, Reason, Reason) {
    let refusal = result.unwrap_err();
    (refusal.by, refusal.reason, refusal.told)
}

fn expired(params: &mut rcgen::CertificateParams) {
    params.not_after = OffsetDateTime::now_utc() - Duration::minutes(1);
}

#[test]
fn identities_that_match_speak_post_quantum_tls13_and_http2() {
    let mesh = TestAuthority::new("mesh");
    let session = call(&mesh, mesh.certify(&[WEB]), mesh.certify(&[VOTING])).unwrap();

    let Session { client, server } = &session;
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(
        client.negotiated_cipher_suite().unwrap().suite(),
        CipherSuite::TLS13_AES_128_GCM_SHA256
    );
    assert_eq!(
        client.negotiated_key_exchange_group().unwrap().name(),
        NamedGroup::X25519MLKEM768
    );
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(server.server_name(), None);
    let seen_by_server = peer_identity(server.peer_certificates().unwrap());
    assert_eq!(seen_by_server, Ok(identity("web")));
    let seen_by_client = peer_identity(client.peer_certificates().unwrap());
    assert_eq!(seen_by_client, Ok(identity("voting")));
}

#[test]
fn a_peer_without_post_quantum_key_exchange_needs_no_further_round_trip() {
    let mesh = TestAuthority::new("mesh");
    let classic = CryptoProvider {
        kx_groups: vec![kx_group::X25519],
        ..provider().clone()
    };
    let mut server = ServerConfig::builder_with_provider(Arc::new(classic))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(mesh.certify(&[VOTING]));
    server.alpn_protocols = vec![ALPN.to_vec()];
    let client = client_config(mesh.certify(&[WEB]), mesh.trust(), identity("voting"));

    let session = handshake(Arc::new(client), Arc::new(server)).unwrap();

    let client = &session.client;
    // Not `FullWithHelloRetryRequest`.
    assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    let group = client.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519);
}

/// The handshake message of one record as two records, cut after `first` bytes.
fn in_two_records(record: &[u8], first: usize) -> Vec<u8> {
    let (kind_and_version, message) = (&record[..3], &record[5..]);
    let (head, tail) = message.split_at(first);
    let records = [head, tail].map(|part| {
        let length = u16::try_from(part.len()).unwrap().to_be_bytes();
        [kind_and_version, &length, part].concat()
    });
    records.concat()
}

#[test]
fn a_post_quantum_hello_is_understood_in_whatever_pieces_it_comes() {
    let mesh = TestAuthority::new("mesh");
    let server = server_config(
        mesh.certify(&[VOTING]),
        mesh.trust(),
        "cluster.local".to_owned(),
    );
    let server = Arc::new(server);
    for (piece, cut) in [(1, None), (100, None), (1, Some(700)), (4096, Some(1))] {
        let client = client_config(mesh.certify(&[WEB]), mesh.trust(), identity("voting"));
        let mut session = Session::new(Arc::new(client), Arc::clone(&server));
        let mut hello = Vec::new();
        session.client.write_tls(&mut hello).unwrap();
        assert!(hello.len() > 1_400, "{} bytes only", hello.len());
        if let Some(cut) = cut {
            hello = in_two_records(&hello, cut);
        }
        for mut piece in hello.chunks(piece) {
            session.server.read_tls(&mut piece).unwrap();
            session.server.process_new_packets().unwrap();
        }
        session.server_speaks().unwrap();
        session.client_speaks().unwrap();
        assert!(!session.server.is_handshaking(), "{piece} {cut:?}");
    }
}

#[test]
fn no_session_is_resumed() {
    let mesh = TestAuthority::new("mesh");
    let client = Arc::new(client_config(
        mesh.certify(&[WEB]),
        mesh.trust(),
        identity("voting"),
    ));
    let server = Arc::new(server_config(
        mesh.certify(&[VOTING]),
        mesh.trust(),
        "cluster.local".to_owned(),
    ));
    for _ in 0..2 {
        let session = handshake(Arc::clone(&client), Arc::clone(&server)).unwrap();
        assert_eq!(session.client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(session.client.tls13_tickets_received(), 0);
    }
}

#[test]
fn a_server_refuses_clients_that_are_not_of_the_mesh() {
    let mesh = TestAuthority::new("mesh");
    let other = TestAuthority::new("other");
    let imitation = TestAuthority::new("mesh");
    for (what, client, reason, told) in [
        (
            "no certificate",
            Arc::new(KeySlot::default()),
            Reason::NoCertificate,
            Reason::NoCertificate,
        ),
        (
            "expired",
            mesh.certify_with(&[WEB], expired),
            Reason::CertificateExpired,
            Reason::CertificateExpired,
        ),
        (
            "not valid yet",
            mesh.certify_with(&[WEB], |params| {
                params.not_before = OffsetDateTime::now_utc() + Duration::minutes(5);
            }),
            Reason::CertificateExpired,
            Reason::CertificateExpired,
        ),
        (
            "foreign authority",
            other.certify(&[WEB]),
            Reason::UntrustedCertificate,
            Reason::UntrustedCertificate,
        ),
        (
            "authority of the same name",
            imitation.certify(&[WEB]),
            Reason::UntrustedCertificate,
            Reason::TlsFailed,
        ),
        (
            "for servers only",
            mesh.certify_with(&[WEB], |params| {
                params.extended_key_usages.truncate(1);
            }),
            Reason::UntrustedCertificate,
            Reason::UntrustedCertificate,
        ),
        (
            "another trust domain",
            mesh.certify(&[FOREIGN]),
            Reason::ForeignTrustDomain,
            Reason::ForeignTrustDomain,
        ),
        (
            "without a name",
            mesh.certify(&[]),
            Reason::ForeignTrustDomain,
            Reason::ForeignTrustDomain,
        ),
        (
            "a name that is no workload's",
            mesh.certify(&["spiffe://cluster.local/web"]),
            Reason::ForeignTrustDomain,
            Reason::ForeignTrustDomain,
        ),
    ] {
        let result = call(&mesh, client, mesh.certify(&[VOTING]));
        assert_eq!(refused(result), (Side::Server, reason, told), "{what}");
    }
}

#[test]
fn a_client_refuses_servers_that_are_not_who_it_expects() {
    let mesh = TestAuthority::new("mesh");
    let other = TestAuthority::new("other");
    for (what, server, reason, told) in [
        (
            "another identity",
            mesh.certify(&[WEB]),
            Reason::IdentityMismatch,
            Reason::IdentityMismatch,
        ),
        (
            "another trust domain",
            mesh.certify(&[FOREIGN]),
            Reason::ForeignTrustDomain,
            Reason::IdentityMismatch,
        ),
        (
            "without a name",
            mesh.certify(&[]),
            Reason::ForeignTrustDomain,
            Reason::IdentityMismatch,
        ),
        (
            "expired",
            mesh.certify_with(&[VOTING], expired),
            Reason::CertificateExpired,
            Reason::CertificateExpired,
        ),
        (
            "foreign authority",
            other.certify(&[VOTING]),
            Reason::UntrustedCertificate,
            Reason::UntrustedCertificate,
        ),
        (
            "for clients only",
            mesh.certify_with(&[VOTING], |params| {
                params.extended_key_usages.remove(0);
            }),
            Reason::UntrustedCertificate,
            Reason::UntrustedCertificate,
        ),
    ] {
        let result = call(&mesh, mesh.certify(&[WEB]), server);
        assert_eq!(refused(result), (Side::Client, reason, told), "{what}");
    }
}

#[test]
fn a_revoked_certificate_is_refused_by_either_side_and_by_name() {
    let mesh = TestAuthority::new("mesh");
    let (web, voting) = (mesh.certify(&[WEB]), mesh.certify(&[VOTING]));
    for (revoked, side) in [(&web, Side::Server), (&voting, Side::Client)] {
        let trust = mesh.trust_but(&mesh.list(&[&revoked.chain()[0]]));
        let client = client_config(Arc::clone(&web), Arc::clone(&trust), identity("voting"));
        let server = server_config(Arc::clone(&voting), trust, "cluster.local".to_owned());
        let result = handshake(Arc::new(client), Arc::new(server));
        let by_name = Reason::CertificateRevoked;
        assert_eq!(refused(result), (side, by_name, by_name));
    }
}

#[test]
fn any_name_of_a_server_may_be_the_expected_one() {
    let mesh = TestAuthority::new("mesh");
    let server = mesh.certify(&["https://voting.test", WEB, VOTING]);
    assert!(call(&mesh, mesh.certify(&[WEB]), server).is_ok());
}

#[test]
fn the_identity_of_a_peer_is_its_first_name_that_is_a_workloads() {
    let mesh = TestAuthority::new("mesh");
    let client = mesh.certify(&["https://web.test", "spiffe://cluster.local/x", WEB, VOTING]);
    let session = call(&mesh, client, mesh.certify(&[VOTING])).unwrap();
    let seen = peer_identity(session.server.peer_certificates().unwrap());
    assert_eq!(seen, Ok(identity("web")));
}

#[test]
fn a_change_of_trust_anchors_needs_no_new_configuration() {
    let (old, new) = (TestAuthority::new("old"), TestAuthority::new("new"));
    let trust = old.trust();
    let server = Arc::new(server_config(
        old.certify(&[VOTING]),
        Arc::clone(&trust),
        "cluster.local".to_owned(),
    ));
    let call = || {
        let client = client_config(new.certify(&[WEB]), old.trust(), identity("voting"));
        handshake(Arc::new(client), Arc::clone(&server))
    };
    assert_eq!(refused(call()).1, Reason::UntrustedCertificate);

    trust.store(new.trust().load_full());

    assert!(call().is_ok());
}
