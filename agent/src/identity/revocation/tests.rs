use super::*;
use crate::identity::testing::TestAuthority;

fn read(pem: &str, authorities: &[&TestAuthority]) -> Result<Revocations, ListError> {
    let authorities: Vec<_> = authorities.iter().map(|one| one.der().clone()).collect();
    Revocations::read(pem.as_bytes(), &authorities)
}

fn leaf(authority: &TestAuthority) -> CertificateDer<'static> {
    authority
        .issue(&["spiffe://td/ns/a/sa/b"], |_| {})
        .0
        .remove(0)
}

#[test]
fn a_list_revokes_what_is_on_it_and_nothing_else() {
    let mesh = TestAuthority::new("mesh");
    let (bad, good) = (leaf(&mesh), leaf(&mesh));
    let revocations = read(&mesh.list(&[&bad]), &[&mesh]).unwrap();
    let anchors = [mesh.der().clone()];
    assert!(revocations.revoke(&[bad], &anchors));
    assert!(!revocations.revoke(&[good], &anchors));
}

#[test]
fn an_issuer_that_its_anchor_revokes_takes_its_certificates_with_it() {
    let mesh = TestAuthority::new("mesh");
    let end = OffsetDateTime::now_utc() + time::Duration::hours(1);
    let issuer = mesh.issuer("issuer", end);
    let chain = [leaf(&issuer), issuer.der().clone()];
    let revocations = read(&mesh.list(&[issuer.der()]), &[&mesh]).unwrap();
    assert!(revocations.revoke(&chain, &[mesh.der().clone()]));
}

#[test]
fn a_list_of_an_issuer_that_only_a_peer_has_counts_for_that_peer() {
    let mesh = TestAuthority::new("mesh");
    let end = OffsetDateTime::now_utc() + time::Duration::hours(1);
    let elsewhere = mesh.issuer("issuer elsewhere", end);
    let bad = leaf(&elsewhere);
    let revocations = read(&elsewhere.list(&[&bad]), &[&mesh]).unwrap();
    let chain = [bad, elsewhere.der().clone()];
    assert!(revocations.revoke(&chain, &[mesh.der().clone()]));
}

#[test]
fn an_authority_of_the_same_name_revokes_nothing_of_another_one() {
    let mesh = TestAuthority::new("mesh");
    let imitation = TestAuthority::new("mesh");
    let certificate = leaf(&mesh);
    // As with an issuer that has a successor of its name: the list is good, and not of this one.
    let revocations = read(&imitation.list(&[&certificate]), &[&mesh]).unwrap();
    let anchors = [mesh.der().clone(), imitation.der().clone()];
    assert!(!revocations.revoke(&[certificate], &anchors[..1]));
}

#[test]
fn what_is_no_list_is_refused_with_its_number() {
    let mesh = TestAuthority::new("mesh");
    let list = mesh.list(&[&leaf(&mesh)]);
    assert_eq!(read("", &[&mesh]), Err(ListError::Empty));
    assert_eq!(read(&mesh.pem(), &[&mesh]), Err(ListError::Empty));
    let half = &list[..list.len() / 2];
    assert!(matches!(read(half, &[&mesh]), Err(ListError::Pem(_))));
    let two = format!("{list}-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n");
    let refused = read(&two, &[&mesh]).unwrap_err();
    assert!(
        matches!(refused, ListError::Malformed { number: 2, .. }),
        "{refused}"
    );
}

#[test]
fn a_list_that_was_tampered_with_is_refused() {
    let mesh = TestAuthority::new("mesh");
    let list = mesh.list(&[&leaf(&mesh)]);
    let mut der = CertificateRevocationListDer::from_pem_slice(list.as_bytes())
        .unwrap()
        .to_vec();
    // The last byte of the signature.
    *der.last_mut().unwrap() ^= 1;
    let listed = List::read(1, &der).unwrap();
    assert!(listed.may_be_of(mesh.der()) && !listed.is_signed_by(mesh.der()));
}
