//! What is replaced in the folder while agents use it.

use super::*;
use crate::identity::testing::Volume;

const SECOND: time::Duration = time::Duration::SECOND;
const HOUR: time::Duration = time::Duration::HOUR;

struct Fixture {
    _scratch: ScratchFolder,
    volume: Volume,
    authority: Authority,
    now: OffsetDateTime,
}

impl Fixture {
    fn new() -> Self {
        let scratch = ScratchFolder::new();
        let volume = Volume::new(scratch.authority());
        Self {
            authority: Authority::new(volume.path()),
            _scratch: scratch,
            volume,
            now: OffsetDateTime::now_utc().replace_nanosecond(0).unwrap(),
        }
    }

    /// An issuer of `anchor` that ends in an hour.
    fn issuer(&self, anchor: &TestAuthority) -> TestAuthority {
        anchor.issuer("issuer", self.now + HOUR)
    }

    fn look(&mut self) -> Standing {
        self.authority.look(self.now).unwrap()
    }

    /// Looks as long as it takes until a new issuer signs.
    fn settle(&mut self) {
        self.look();
        self.now += HANDOVER;
        self.look();
    }

    fn sign(&self) -> Result<SignedChain, CaError> {
        self.authority.sign(&request(DAY), self.now)
    }

    /// Whose certificate stands above one that is signed now.
    fn signed_by(&self) -> CertificateDer<'static> {
        self.sign().unwrap().certificates.remove(1)
    }

    fn refusals(&self) -> String {
        let authority = &self.authority;
        let all = [
            authority.anchors.refusal(),
            authority.issuer.refusal(),
            authority.revocations.refusal(),
        ];
        let texts = all.into_iter().flatten().map(ToString::to_string);
        texts.collect::<Vec<_>>().join("\n")
    }
}

#[test]
fn each_of_a_hundred_issuers_signs_seconds_after_it_was_put_there() {
    let mut fixture = Fixture::new();
    let anchor = TestAuthority::new("anchor");
    let mut before = fixture.issuer(&anchor);
    fixture.volume.put_pair(&[&anchor], &before);
    fixture.settle();
    for number in 0..100 {
        let issuer = fixture.issuer(&anchor);
        if number % 4 == 1 {
            let (cert, key) = (issuer.pem(), before.key_pem());
            let pair = [
                ("ca.crt", &*anchor.pem()),
                ("issuer.crt", &cert),
                ("issuer.key", &key),
            ];
            fixture.volume.put(&pair);
            fixture.look();
            let said = fixture.refusals();
            assert!(
                said.contains("issuer.key is not the key of the certificate in"),
                "{said}"
            );
            assert_eq!(fixture.signed_by(), *before.der());
        }
        if number % 4 == 2 {
            let short_lived = fixture.issuer(&anchor);
            fixture.volume.put_pair(&[&anchor], &short_lived);
        }
        fixture.volume.put_pair(&[&anchor], &issuer);
        fixture.settle();
        assert_eq!(fixture.signed_by(), *issuer.der(), "issuer {number}");
        assert_eq!(fixture.refusals(), "");
        before = issuer;
    }
    let reloads = fixture.authority.issuer.reloads();
    assert_eq!((reloads.accepted, reloads.refused), (101, 25));
}

#[test]
fn what_is_bad_is_refused_by_name_and_the_last_good_state_stays() {
    let anchor = TestAuthority::new("anchor");
    let stranger = TestAuthority::new("stranger");
    let mut fixture = Fixture::new();
    let issuer = fixture.issuer(&anchor);
    let expired = anchor.issuer("expired", fixture.now - SECOND);
    let strange = fixture.issuer(&stranger);
    let list = anchor.list(&[]);
    let (ca, cert, key) = (anchor.pem(), issuer.pem(), issuer.key_pem());
    let leaf = anchor.no_authority("leaf", fixture.now + HOUR).pem();
    let good = [
        ("ca.crt", &*ca),
        ("issuer.crt", &*cert),
        ("issuer.key", &*key),
        ("crl.pem", &*list),
    ];
    let half = |text: &str| text[..text.len() / 2].to_owned();
    for (file, content, said) in [
        (
            "issuer.crt",
            half(&cert),
            "issuer.crt is not a PEM file with a certificate",
        ),
        (
            "issuer.crt",
            String::new(),
            "issuer.crt is not a PEM file with a certificate (none found)",
        ),
        ("issuer.crt", expired.pem(), "issuer.crt expired at"),
        (
            "issuer.crt",
            strange.pem(),
            "issuer.key is not the key of the certificate in",
        ),
        ("issuer.crt", leaf, "issuer.crt is not an authority's"),
        (
            "issuer.key",
            half(&key),
            "issuer.key is not a PEM file with a private key",
        ),
        (
            "issuer.key",
            String::new(),
            "issuer.key is not a PEM file with a private key",
        ),
        (
            "issuer.key",
            strange.key_pem(),
            "issuer.key is not the key of the certificate in",
        ),
        (
            "ca.crt",
            half(&ca),
            "ca.crt is not a PEM file with a certificate",
        ),
        (
            "ca.crt",
            String::new(),
            "ca.crt is not a PEM file with a certificate (none found)",
        ),
        ("ca.crt", expired.pem(), "ca.crt expired at"),
        (
            "ca.crt",
            stranger.pem(),
            "issuer.crt is not signed by a trust anchor in",
        ),
        (
            "crl.pem",
            half(&list),
            "crl.pem cannot be used: it is not PEM",
        ),
        (
            "crl.pem",
            String::new(),
            "crl.pem cannot be used: no list was found in it",
        ),
    ] {
        fixture.volume.put(&good);
        fixture.settle();
        assert_eq!(fixture.refusals(), "");
        let files = good.map(|(name, text)| (name, if name == file { &*content } else { text }));

        fixture.volume.put(&files);
        fixture.settle();

        let refusals = fixture.refusals();
        assert!(refusals.contains(said), "{file}: {refusals}");
        assert_eq!(fixture.look().anchors, [anchor.der().clone()], "{said}");
        assert_eq!(fixture.signed_by(), *issuer.der(), "{said}");
    }
}

#[test]
fn a_new_issuer_signs_only_once_others_have_had_time_to_see_its_anchor() {
    let mut fixture = Fixture::new();
    let (old, new) = (TestAuthority::new("old"), TestAuthority::new("new"));
    let (first, second) = (fixture.issuer(&old), fixture.issuer(&new));
    fixture.volume.put_pair(&[&old], &first);
    fixture.look();

    fixture.volume.put_pair(&[&old, &new], &second);
    let standing = fixture.look();
    assert_eq!(standing.anchors, [old.der().clone(), new.der().clone()]);
    assert_eq!(standing.issuer, [first.der().clone()]);
    assert_eq!(fixture.signed_by(), *first.der());
    fixture.now += HANDOVER;
    assert_eq!(fixture.look().issuer, [second.der().clone()]);
    assert_eq!(fixture.signed_by(), *second.der());
}

#[test]
fn an_issuer_whose_anchor_was_taken_away_signs_no_longer() {
    let mut fixture = Fixture::new();
    let (old, new) = (TestAuthority::new("old"), TestAuthority::new("new"));
    let (first, second) = (fixture.issuer(&old), fixture.issuer(&new));
    fixture.volume.put_pair(&[&old], &first);
    fixture.look();

    fixture.volume.put_pair(&[&new], &second);
    fixture.look();

    assert_eq!(fixture.signed_by(), *second.der());
}

#[test]
fn a_folder_that_vanishes_leaves_the_authority_in_use_and_gets_no_other_one() {
    let scratch = ScratchFolder::new();
    let (directory, away) = (
        scratch.authority(),
        scratch.authority().with_extension("away"),
    );
    let mut authority = Authority::new(&directory);
    let now = OffsetDateTime::now_utc();
    let anchors = authority.look(now).unwrap().anchors;

    std::fs::rename(&directory, &away).unwrap();
    assert_eq!(authority.look(now + SECOND).unwrap().anchors, anchors);
    authority.sign(&request(DAY), now + SECOND).unwrap();
    assert!(!directory.exists());
    let said = authority.anchors.refusal().unwrap().to_string();
    assert!(said.contains("ca.crt is missing"), "{said}");

    std::fs::rename(&away, &directory).unwrap();
    authority.look(now + SECOND * 2).unwrap();
    assert!(authority.anchors.refusal().is_none());
}

#[test]
fn nothing_is_signed_past_the_issuers_end() {
    let mut fixture = Fixture::new();
    let anchor = TestAuthority::new("anchor");
    let ends = fixture.now + time::Duration::minutes(2);
    fixture
        .volume
        .put_pair(&[&anchor], &anchor.issuer("short", ends));
    fixture.look();

    fixture.now = ends - SECOND;
    assert_eq!(end_of(&fixture.sign().unwrap().certificates[0]), ends);
    fixture.now = ends;
    fixture.look();
    let refused = fixture.sign().unwrap_err().to_string();
    assert!(refused.starts_with("the issuer in "), "{refused}");
    assert!(refused.contains("issuer.crt expired at"), "{refused}");
}

#[test]
fn a_revoked_issuer_is_refused_by_name_until_another_is_there() {
    let mut fixture = Fixture::new();
    let anchor = TestAuthority::new("anchor");
    let (bad, good) = (fixture.issuer(&anchor), fixture.issuer(&anchor));
    fixture.volume.put_pair(&[&anchor], &bad);
    fixture.look();

    let list = anchor.list(&[bad.der()]);
    let files = |issuer: &TestAuthority| (issuer.pem(), issuer.key_pem());
    for (issuer, is_good) in [(&bad, false), (&good, true)] {
        let (cert, key) = files(issuer);
        fixture.volume.put(&[
            ("ca.crt", &*anchor.pem()),
            ("issuer.crt", &cert),
            ("issuer.key", &key),
            ("crl.pem", &list),
        ]);
        fixture.look();
        match fixture.sign() {
            Ok(chain) => assert!(is_good && chain.certificates[1] == *good.der()),
            Err(error) => {
                assert!(!is_good, "{error}");
                assert!(
                    error.to_string().contains("issuer.crt is revoked by"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn ends_are_told_of_every_anchor_issuer_and_list() {
    let mut fixture = Fixture::new();
    let anchor = TestAuthority::new("anchor");
    let issuer = fixture.issuer(&anchor);
    fixture.volume.put(&[
        ("ca.crt", &*anchor.pem()),
        ("issuer.crt", &issuer.pem()),
        ("issuer.key", &issuer.key_pem()),
        ("crl.pem", &anchor.list(&[])),
    ]);
    let told = fixture.look().expiries;
    let told: Vec<_> = told.iter().map(|one| (one.object, &*one.subject)).collect();
    let expected = [
        ("trust_anchor", "CN=anchor"),
        ("issuer", "CN=issuer"),
        ("revocation_list", "CN=anchor"),
    ];
    assert_eq!(told, expected);
}
