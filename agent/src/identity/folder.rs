//! The folder of the embedded authority: trust anchor and issuer, each a certificate and a key.
//!
//! `ca.crt` may hold several anchors, while one replaces another; `issuer.crt` may hold
//! intermediates after the issuer. What is missing is made; what is there is checked, never
//! replaced, but for an issuer that nears its end and whose anchor's key is here too. Agents of
//! one machine share the folder: readers and makers hold a lock on it, and each file appears
//! whole or not at all. Whoever replaces files by hand should rename them into place.

use std::{
    fs::{DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::files::{
    FolderError, check_dates, check_pair, io_error, making, parse, read_certificates, read_key,
    write_whole,
};

const ANCHOR: &str = "trust anchor";
const ISSUER: &str = "issuer";

const ANCHOR_LIFETIME: Duration = Duration::days(3650);
const ISSUER_LIFETIME: Duration = Duration::days(365);
/// How far the clocks of two nodes may be apart before a new certificate isn't valid yet.
pub(super) const CLOCK_TOLERANCE: Duration = Duration::minutes(2);

/// A checked authority.
#[derive(Debug)]
pub(super) struct Authority {
    /// The anchors that are valid now.
    pub(super) anchors: Vec<CertificateDer<'static>>,
    /// The issuer, then what stands between it and its anchor.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: KeyPair,
    /// The first end among the issuer's chain and its anchor.
    pub(super) ends: OffsetDateTime,
}

/// The four files.
struct Paths {
    anchor: PathBuf,
    anchor_key: PathBuf,
    issuer: PathBuf,
    issuer_key: PathBuf,
}

impl Paths {
    fn of(directory: &Path) -> Self {
        Self {
            anchor: directory.join("ca.crt"),
            anchor_key: directory.join("ca.key"),
            issuer: directory.join("issuer.crt"),
            issuer_key: directory.join("issuer.key"),
        }
    }
}

/// Loads the authority, after making what is missing. Blocks on the disk and on the lock.
pub(super) fn open(directory: &Path, now: OffsetDateTime) -> Result<Authority, FolderError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io_error("make", directory))?;
    let paths = Paths::of(directory);
    let lock = File::open(directory).map_err(io_error("open", directory))?;
    lock.lock_shared().map_err(io_error("lock", directory))?;
    if paths.anchor.exists() && paths.issuer.exists() && !issuer_is_due(&paths, now) {
        return load(&paths, now);
    }
    // Not an upgrade of the shared lock: two upgrades would wait for each other.
    lock.unlock().map_err(io_error("unlock", directory))?;
    lock.lock().map_err(io_error("lock", directory))?;
    if !paths.anchor.exists() {
        make_anchor(&paths, now)?;
    }
    if !paths.issuer.exists() {
        make_issuer(&paths, now)?;
    } else if issuer_is_due(&paths, now)
        && let Err(error) = make_issuer(&paths, now)
    {
        tracing::warn!(%error, "the issuer nears its end and could not be renewed");
    }
    load(&paths, now)
}

/// The trust anchors in use, without the issuer: anchors outlast an issuer that is broken.
pub(super) fn anchors(
    directory: &Path,
    now: OffsetDateTime,
) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let paths = Paths::of(directory);
    if !paths.anchor.exists() {
        return open(directory, now).map(|authority| authority.anchors);
    }
    valid_anchors(&paths, now)
}

fn valid_anchors(
    paths: &Paths,
    now: OffsetDateTime,
) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let mut valid = Vec::new();
    let mut invalid = None;
    for anchor in read_certificates(&paths.anchor)? {
        match check_dates(&anchor, ANCHOR, &paths.anchor, now) {
            Ok(()) => valid.push(anchor),
            Err(error) => invalid = Some(error),
        }
    }
    match (valid.is_empty(), invalid) {
        (true, Some(error)) => Err(error),
        _ => Ok(valid),
    }
}

fn load(paths: &Paths, now: OffsetDateTime) -> Result<Authority, FolderError> {
    let anchors = valid_anchors(paths, now)?;
    let chain = read_certificates(&paths.issuer)?;
    for certificate in &chain {
        check_dates(certificate, ISSUER, &paths.issuer, now)?;
    }
    let key = read_key(&paths.issuer_key)?;
    check_pair(&key, &paths.issuer_key, &chain[0], &paths.issuer)?;
    let anchor_ends = anchor_end(&chain, &anchors).ok_or_else(|| not_chained(paths))?;
    let ends = chain
        .iter()
        .map(|certificate| parse(certificate).validity().not_after.to_datetime())
        .fold(anchor_ends, OffsetDateTime::min);
    Ok(Authority {
        anchors,
        chain,
        key,
        ends,
    })
}

/// The error for an issuer in `directory` whose signature isn't that of an anchor, which shows only
/// when something that it signed is verified.
pub(super) fn not_signed_by_anchor(directory: &Path) -> FolderError {
    not_chained(&Paths::of(directory))
}

fn not_chained(paths: &Paths) -> FolderError {
    FolderError::NotChained {
        issuer: paths.issuer.clone(),
        anchors: paths.anchor.clone(),
    }
}

/// The first end among the anchors that may have signed the top of `chain`.
fn anchor_end(
    chain: &[CertificateDer<'static>],
    anchors: &[CertificateDer<'static>],
) -> Option<OffsetDateTime> {
    let top = parse(chain.last()?);
    anchors
        .iter()
        .map(parse)
        .filter(|anchor| anchor.subject().as_raw() == top.issuer().as_raw())
        .map(|anchor| anchor.validity().not_after.to_datetime())
        .min()
}

/// Whether the issuer is past 70 % of its life and one that ends later can be made.
fn issuer_is_due(paths: &Paths, now: OffsetDateTime) -> bool {
    let Ok(chain) = read_certificates(&paths.issuer) else {
        return false;
    };
    // A longer chain was made elsewhere, for an anchor whose key is elsewhere.
    let [issuer] = &chain[..] else { return false };
    let validity = parse(issuer).validity().clone();
    let from = validity.not_before.to_datetime();
    let ends = validity.not_after.to_datetime();
    now >= from + (ends - from) * 0.7
        && signing_anchor(paths, now).is_ok_and(|(anchor, _)| new_issuer_end(&anchor, now) > ends)
}

fn new_issuer_end(anchor: &CertificateDer<'_>, now: OffsetDateTime) -> OffsetDateTime {
    let anchor_ends = parse(anchor).validity().not_after.to_datetime();
    anchor_ends.min(now + ISSUER_LIFETIME)
}

/// The valid anchor whose key is in the folder, with that key.
fn signing_anchor(
    paths: &Paths,
    now: OffsetDateTime,
) -> Result<(CertificateDer<'static>, KeyPair), FolderError> {
    let key = read_key(&paths.anchor_key)?;
    let spki = key.subject_public_key_info();
    valid_anchors(paths, now)?
        .into_iter()
        .find(|anchor| parse(anchor).public_key().raw == spki)
        .map(|anchor| (anchor, key))
        .ok_or_else(|| FolderError::KeyMismatch {
            key: paths.anchor_key.clone(),
            certificate: paths.anchor.clone(),
        })
}

fn make_anchor(paths: &Paths, now: OffsetDateTime) -> Result<(), FolderError> {
    let making = making(ANCHOR, &paths.anchor);
    let key = existing_or_new_key(&paths.anchor_key, &making)?;
    let mut params = authority_params("malla trust anchor", &key);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = now + ANCHOR_LIFETIME;
    let anchor = params.self_signed(&key).map_err(making)?;
    write_whole(&paths.anchor, anchor.pem().as_bytes())
}

fn make_issuer(paths: &Paths, now: OffsetDateTime) -> Result<(), FolderError> {
    let (anchor, anchor_key) = signing_anchor(paths, now)?;
    let ends = new_issuer_end(&anchor, now);
    let making = making(ISSUER, &paths.issuer);
    let anchor = Issuer::from_ca_cert_der(&anchor, anchor_key).map_err(&making)?;
    // A renewed issuer keeps its key, so that one rename replaces it.
    let key = existing_or_new_key(&paths.issuer_key, &making)?;
    let mut params = authority_params("malla issuer", &key);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = ends;
    let issuer = params.signed_by(&key, &anchor).map_err(making)?;
    write_whole(&paths.issuer, issuer.pem().as_bytes())
}

/// A name that follows from the key: authorities of two folders never share one, and an anchor
/// made anew from its old key keeps its own.
fn authority_params(name: &str, key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    let id = params
        .key_identifier(key)
        .iter()
        .take(8)
        .fold(0_u64, |id, byte| id << 8 | u64::from(*byte));
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("{name} {id:016x}"));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A key without its certificate is what a crash between the two files leaves.
fn existing_or_new_key(
    path: &Path,
    making: impl Fn(rcgen::Error) -> FolderError,
) -> Result<KeyPair, FolderError> {
    if path.exists() {
        return read_key(path);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(making)?;
    write_whole(path, key.serialize_pem().as_bytes())?;
    Ok(key)
}
