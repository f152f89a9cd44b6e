//! What the files of an authority's folder are good for: functions of their bytes and the clock.
//!
//! Each of the three, anchors, issuer and revocation lists, is judged by itself: a bad one of them
//! keeps no good other one from being used.

use std::{path::Path, sync::Arc};

use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    expiry::Expiry,
    files::{FolderError, certificates_of, key_of, parse},
    folder::{Contents, Folder},
    revocation::Revocations,
};

pub(super) const ANCHOR: &str = "trust anchor";
pub(super) const ISSUER: &str = "issuer";

/// A key that signs, with the certificates above what it signs.
#[derive(Debug, Clone)]
pub(super) struct Signer {
    /// The issuer, then what stands between it and its anchor.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Arc<KeyPair>,
    /// The first end among the issuer's chain and its anchor.
    pub(super) ends: OffsetDateTime,
    /// Whose end that is: the error for what is to be signed from then on.
    ended: Arc<FolderError>,
}

impl PartialEq for Signer {
    /// The certificate names the key, and was checked to be its.
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.ends == other.ends
    }
}

impl Signer {
    /// Fails from the first end on. Nothing is signed past it.
    pub(super) fn check(&self, now: OffsetDateTime) -> Result<(), Arc<FolderError>> {
        if now < self.ends {
            return Ok(());
        }
        Err(Arc::clone(&self.ended))
    }

    /// Whether what it signs hangs on one of `anchors`.
    pub(super) fn hangs_on(&self, anchors: &[CertificateDer<'static>]) -> bool {
        hanging_on(&self.chain, anchors).next().is_some()
    }
}

/// The trust anchors that are valid now.
pub(super) fn anchors(
    folder: &Folder,
    contents: &Contents,
    now: OffsetDateTime,
) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let all = certificates_of(contents.anchors.as_deref(), ANCHOR, &folder.anchors)?;
    valid(all, ANCHOR, &folder.anchors, now)
}

/// Those of `certificates` that are valid now; an error where none is.
pub(super) fn valid(
    certificates: Vec<CertificateDer<'static>>,
    object: &'static str,
    path: &Path,
    now: OffsetDateTime,
) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let mut valid = Vec::new();
    let mut invalid = None;
    for certificate in certificates {
        match check_dates(&certificate, object, path, now) {
            Ok(()) => valid.push(certificate),
            Err(error) => invalid = Some(error),
        }
    }
    match (valid.is_empty(), invalid) {
        (true, Some(error)) => Err(error),
        _ => Ok(valid),
    }
}

/// The issuer, whose chain must lead to one of `anchors` and be revoked by nobody.
pub(super) fn signer(
    folder: &Folder,
    contents: &Contents,
    anchors: &[CertificateDer<'static>],
    revocations: &Revocations,
    now: OffsetDateTime,
) -> Result<Signer, FolderError> {
    let chain = certificates_of(contents.issuer.as_deref(), ISSUER, &folder.issuer)?;
    for certificate in &chain {
        check_dates(certificate, ISSUER, &folder.issuer, now)?;
        if !parse(certificate).is_ca() {
            return Err(FolderError::NotAnAuthority(folder.issuer.clone()));
        }
    }
    let key = key_of(contents.issuer_key.as_deref(), &folder.issuer_key)?;
    if parse(&chain[0]).public_key().raw != key.subject_public_key_info() {
        return Err(FolderError::KeyMismatch {
            key: folder.issuer_key.clone(),
            certificate: folder.issuer.clone(),
        });
    }
    // Of several anchors with one key the last to end is what peers will find.
    let anchor_ends = hanging_on(&chain, anchors).map(end_of).max();
    let anchor_ends = anchor_ends.ok_or_else(|| not_chained(folder))?;
    if revocations.revoke(&chain, anchors) {
        return Err(revoked(folder));
    }
    let own_ends = chain
        .iter()
        .map(end_of)
        .fold(anchor_ends, OffsetDateTime::min);
    let (object, path) = if own_ends < anchor_ends {
        (ISSUER, &folder.issuer)
    } else {
        (ANCHOR, &folder.anchors)
    };
    Ok(Signer {
        chain,
        key: Arc::new(key),
        ends: own_ends,
        ended: Arc::new(FolderError::Expired {
            object,
            path: path.clone(),
            at: own_ends,
        }),
    })
}

/// The revocation lists; none where there is no such file.
pub(super) fn revocations(
    folder: &Folder,
    contents: &Contents,
    anchors: &[CertificateDer<'static>],
) -> Result<Revocations, FolderError> {
    let Some(pem) = &contents.revocations else {
        return Ok(Revocations::default());
    };
    let issuers = certificates_of(contents.issuer.as_deref(), ISSUER, &folder.issuer);
    let known = [anchors, issuers.as_deref().unwrap_or_default()].concat();
    Revocations::read(pem, &known).map_err(|source| FolderError::RevocationList {
        path: folder.revocations.clone(),
        source,
    })
}

/// The ends of what is in use.
pub(super) fn expiries(
    folder: &Folder,
    anchors: &[CertificateDer<'static>],
    signer: Option<&Signer>,
    revocations: &Revocations,
) -> Vec<Expiry> {
    let of = |object, path: &Path, certificate: &CertificateDer<'_>| {
        let parsed = parse(certificate);
        Expiry {
            object,
            subject: parsed.subject().to_string(),
            path: path.to_owned(),
            begins: parsed.validity().not_before.to_datetime(),
            ends: parsed.validity().not_after.to_datetime(),
        }
    };
    let mut all: Vec<Expiry> = anchors
        .iter()
        .map(|anchor| of("trust_anchor", &folder.anchors, anchor))
        .collect();
    let chain = signer.map_or(&[][..], |signer| &signer.chain);
    all.extend(chain.iter().map(|one| of("issuer", &folder.issuer, one)));
    let lists = revocations.terms().into_iter().filter_map(|term| {
        Some(Expiry {
            object: "revocation_list",
            subject: term.issuer,
            path: folder.revocations.clone(),
            begins: term.begins,
            ends: term.next?,
        })
    });
    all.extend(lists);
    all
}

/// The error for an issuer that no anchor has signed.
pub(super) fn not_chained(folder: &Folder) -> FolderError {
    FolderError::NotChained {
        issuer: folder.issuer.clone(),
        anchors: folder.anchors.clone(),
    }
}

/// The error for an issuer that a list revokes.
pub(super) fn revoked(folder: &Folder) -> FolderError {
    FolderError::IssuerRevoked {
        issuer: folder.issuer.clone(),
        list: folder.revocations.clone(),
    }
}

fn end_of(certificate: &CertificateDer<'_>) -> OffsetDateTime {
    parse(certificate).validity().not_after.to_datetime()
}

fn check_dates(
    certificate: &CertificateDer<'_>,
    object: &'static str,
    path: &Path,
    now: OffsetDateTime,
) -> Result<(), FolderError> {
    let parsed = parse(certificate);
    let from = parsed.validity().not_before.to_datetime();
    let at = parsed.validity().not_after.to_datetime();
    let path = path.to_owned();
    if at <= now {
        return Err(FolderError::Expired { object, path, at });
    }
    if from > now {
        return Err(FolderError::NotYetValid { object, path, from });
    }
    Ok(())
}

/// The anchors that have signed the top of `chain`, each certificate of which the next one must
/// have signed.
fn hanging_on<'a>(
    chain: &[CertificateDer<'static>],
    anchors: &'a [CertificateDer<'static>],
) -> impl Iterator<Item = &'a CertificateDer<'static>> {
    let is_linked = chain.windows(2).all(|pair| has_signed(&pair[1], &pair[0]));
    anchors
        .iter()
        .filter(move |anchor| is_linked && chain.last().is_some_and(|top| has_signed(anchor, top)))
}

fn has_signed(above: &CertificateDer<'_>, below: &CertificateDer<'_>) -> bool {
    let (above, below) = (parse(above), parse(below));
    above.subject().as_raw() == below.issuer().as_raw()
        && below.verify_signature(Some(above.public_key())).is_ok()
}
