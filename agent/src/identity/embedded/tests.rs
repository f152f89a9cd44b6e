use std::{os::unix::fs::PermissionsExt, sync::Barrier};

use rcgen::{KeyPair, PublicKeyData};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::*;
use crate::identity::{
    files::FolderError,
    refresh::request_for,
    testing::{ScratchFolder, TestAuthority, identity},
};

const DAY: Duration = Duration::from_hours(24);

fn request(lifetime: Duration) -> SigningRequest {
    let key = KeyPair::generate().unwrap();
    SigningRequest {
        csr: request_for(&identity("web"), &key).unwrap(),
        identity: identity("web"),
        lifetime,
    }
}

/// What a fresh authority in `directory` makes of a request.
fn try_at(
    directory: &Path,
    lifetime: Duration,
    now: OffsetDateTime,
) -> Result<SignedChain, CaError> {
    let mut authority = Authority::new(directory);
    authority.look(now)?;
    authority.sign(&request(lifetime), now)
}

fn sign_at(directory: &Path, lifetime: Duration, now: OffsetDateTime) -> SignedChain {
    try_at(directory, lifetime, now).unwrap()
}

fn anchors_at(directory: &Path, now: OffsetDateTime) -> Vec<CertificateDer<'static>> {
    Authority::new(directory).look(now).unwrap().anchors
}

fn assert_trusted(directory: &Path, chain: &[CertificateDer<'static>], now: OffsetDateTime) {
    let trust = Trust::new(anchors_at(directory, now), Arc::default()).unwrap();
    trust.verify_own(chain, now.into()).unwrap();
}

fn refusal(directory: &Path) -> Arc<FolderError> {
    let error = try_at(directory, DAY, OffsetDateTime::now_utc()).unwrap_err();
    let CaError::Folder(error) = error else {
        panic!("not an error of the folder: {error}");
    };
    error
}

fn end_of(certificate: &CertificateDer<'_>) -> OffsetDateTime {
    let (_, parsed) = X509Certificate::from_der(certificate).unwrap();
    parsed.validity().not_after.to_datetime()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_new_authority_is_readable_by_its_owner_only() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    sign_at(&directory, DAY, OffsetDateTime::now_utc());

    assert_eq!(mode(&directory), 0o700);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&directory).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(&entry.path()), 0o600, "{:?}", entry.file_name());
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["ca.crt", "ca.key", "issuer.crt", "issuer.key"]);
}

#[test]
fn a_certificate_names_the_identity_only_and_serves_both_sides() {
    let scratch = ScratchFolder::new();
    let now = OffsetDateTime::now_utc();
    let chain = sign_at(&scratch.authority(), DAY, now).certificates;

    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(
        names.value.general_names,
        [x509_parser::extensions::GeneralName::URI(
            "spiffe://cluster.local/ns/test/sa/web"
        )]
    );
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    assert!(!leaf.is_ca());
    let seconds = |time: OffsetDateTime| time.unix_timestamp();
    let validity = leaf.validity();
    assert_eq!(validity.not_before.timestamp(), seconds(now) - 120);
    assert_eq!(validity.not_after.timestamp(), seconds(now) + 86_400);
    assert_trusted(&scratch.authority(), &chain, now);
}

#[test]
fn agents_that_start_at_once_get_the_same_authority() {
    let scratch = ScratchFolder::new();
    let agents = 4;
    let start = Barrier::new(agents);
    let chains: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..agents)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    sign_at(&scratch.authority(), DAY, OffsetDateTime::now_utc()).certificates
                })
            })
            .collect();
        running.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for chain in &chains {
        assert_eq!(chain[1..], chains[0][1..]);
    }
}

#[test]
fn a_placed_anchor_is_kept_and_gets_an_issuer() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    TestAuthority::new("ours").place_in(&directory);
    let placed = std::fs::read(directory.join("ca.crt")).unwrap();

    let now = OffsetDateTime::now_utc();
    let chain = sign_at(&directory, DAY, now).certificates;

    assert_eq!(std::fs::read(directory.join("ca.crt")).unwrap(), placed);
    assert_trusted(&directory, &chain, now);
}

#[test]
fn no_certificate_outlives_its_anchor() {
    let scratch = ScratchFolder::new();
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap();
    let ends = now + time::Duration::minutes(2);
    TestAuthority::valid("short", now - time::Duration::minutes(1), ends)
        .place_in(&scratch.authority());

    let chain = sign_at(&scratch.authority(), DAY, now).certificates;

    let all: Vec<_> = chain.iter().map(end_of).collect();
    assert_eq!(all, [ends, ends]);
}

#[test]
fn an_expired_anchor_is_refused_by_name() {
    let scratch = ScratchFolder::new();
    let now = OffsetDateTime::now_utc();
    let hour = time::Duration::hours(1);
    TestAuthority::valid("old", now - hour * 2, now - hour).place_in(&scratch.authority());

    let text = refusal(&scratch.authority()).to_string();

    let at = (now - hour).replace_nanosecond(0).unwrap();
    let path = scratch.authority().join("ca.crt");
    let named = format!("the trust anchor in {} expired at {at}", path.display());
    assert!(text.starts_with(&named), "{text}");
}

#[test]
fn an_expired_issuer_without_the_anchors_key_is_refused_by_name() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    let past = OffsetDateTime::now_utc() - time::Duration::days(400);
    sign_at(&directory, DAY, past);
    std::fs::remove_file(directory.join("ca.key")).unwrap();

    let error = refusal(&directory);

    assert!(
        matches!(
            &*error,
            FolderError::Expired {
                object: "issuer",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_issuer_near_its_end_is_renewed_with_the_anchors_key() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    let now = OffsetDateTime::now_utc();
    let old = sign_at(&directory, DAY, now - time::Duration::days(300)).certificates;

    let new = sign_at(&directory, DAY, now).certificates;

    assert!(end_of(&new[1]) > end_of(&old[1]) + time::Duration::days(299));
    assert_trusted(&directory, &new, now);
}

#[test]
fn a_key_of_another_certificate_is_refused_until_the_pair_is_right_again() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    sign_at(&directory, DAY, OffsetDateTime::now_utc());
    let path = directory.join("issuer.key");
    let right = std::fs::read(&path).unwrap();

    let wrong = KeyPair::generate().unwrap();
    std::fs::write(&path, wrong.serialize_pem()).unwrap();
    let error = refusal(&directory);
    assert!(
        matches!(&*error, FolderError::KeyMismatch { key, .. } if *key == path),
        "{error}"
    );

    std::fs::write(&path, right).unwrap();
    sign_at(&directory, DAY, OffsetDateTime::now_utc());
}

#[test]
fn an_issuer_of_another_anchor_is_refused() {
    for other in ["other", "same name"] {
        let scratch = ScratchFolder::new();
        let directory = scratch.authority();
        TestAuthority::new("same name").place_in(&directory);
        sign_at(&directory, DAY, OffsetDateTime::now_utc());
        TestAuthority::new(other).place_in(&directory);

        let error = refusal(&directory);

        assert!(matches!(&*error, FolderError::NotChained { .. }), "{error}");
    }
}

#[test]
fn an_anchor_without_its_key_needs_an_issuer() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    TestAuthority::new("kept elsewhere").place_in(&directory);
    std::fs::remove_file(directory.join("ca.key")).unwrap();

    let error = refusal(&directory);

    let issuer = directory.join("issuer.crt");
    assert!(
        matches!(&*error, FolderError::Missing { path, .. } if *path == issuer),
        "{error}"
    );
}

#[test]
fn a_file_that_is_no_pem_is_refused_by_name() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    sign_at(&directory, DAY, OffsetDateTime::now_utc());
    let path = directory.join("issuer.crt");
    std::fs::write(&path, "garbage").unwrap();

    let error = refusal(&directory);

    assert!(
        matches!(&*error, FolderError::Unreadable { path: named, .. } if *named == path),
        "{error}"
    );
}

#[test]
fn an_interrupted_creation_is_completed_with_the_key_that_it_left() {
    let scratch = ScratchFolder::new();
    let directory = scratch.authority();
    std::fs::create_dir(&directory).unwrap();
    let key = KeyPair::generate().unwrap();
    std::fs::write(directory.join("ca.key"), key.serialize_pem()).unwrap();

    let now = OffsetDateTime::now_utc();
    sign_at(&directory, DAY, now);

    let anchors = anchors_at(&directory, now);
    let (_, anchor) = X509Certificate::from_der(&anchors[0]).unwrap();
    assert_eq!(anchor.public_key().raw, key.subject_public_key_info());
}

mod rotation;
