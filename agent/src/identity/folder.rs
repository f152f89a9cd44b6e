//! The folder of the embedded authority: trust anchors, issuer, revocation lists.
//!
//! `ca.crt` may hold several anchors, while one replaces another; `issuer.crt` may hold
//! intermediates after the issuer. In a folder without an authority one is made; an issuer that is
//! missing, or nears its end, is made where the anchor's key is here too. What somebody has put
//! there is checked, never replaced. Agents of one machine share the folder: readers and makers
//! hold a lock on it, and each file that an agent makes appears whole or not at all.

use std::{
    fs::{DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    thread,
    time::Duration as StdDuration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::{
    files::{FolderError, certificates_of, io_error, key_of, making, parse, read, write_whole},
    judge::{self, ANCHOR, ISSUER},
};

const ANCHOR_LIFETIME: Duration = Duration::days(3650);
const ISSUER_LIFETIME: Duration = Duration::days(365);
/// How far the clocks of two nodes may be apart before a new certificate isn't valid yet.
pub(super) const CLOCK_TOLERANCE: Duration = Duration::minutes(2);

/// Files that are read as they are written one after the other don't belong together. So a change
/// counts once two readings, this far apart, have found the same.
const QUIET: StdDuration = StdDuration::from_millis(50);
/// Readings after which files that never rest are judged as they are.
const MOST_READINGS: u32 = 10;

/// The folder, by the names of its files.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    directory: PathBuf,
    pub(super) anchors: PathBuf,
    anchor_key: PathBuf,
    pub(super) issuer: PathBuf,
    pub(super) issuer_key: PathBuf,
    pub(super) revocations: PathBuf,
}

/// What was in the files, read in one go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Contents {
    pub(super) anchors: Option<Vec<u8>>,
    pub(super) issuer: Option<Vec<u8>>,
    pub(super) issuer_key: Option<Vec<u8>>,
    pub(super) revocations: Option<Vec<u8>>,
}

impl Folder {
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            anchors: directory.join("ca.crt"),
            anchor_key: directory.join("ca.key"),
            issuer: directory.join("issuer.crt"),
            issuer_key: directory.join("issuer.key"),
            revocations: directory.join("crl.pem"),
        }
    }

    /// What is in the folder, once it rests. Blocks on the disk, and for as long as files differ
    /// from `known` and change: half a second at most.
    pub(super) fn read(&self, known: Option<&Contents>) -> Result<Contents, FolderError> {
        let mut contents = self.read_once()?;
        for _ in 0..MOST_READINGS {
            if known == Some(&contents) {
                break;
            }
            thread::sleep(QUIET);
            let again = self.read_once()?;
            if again == contents {
                break;
            }
            contents = again;
        }
        Ok(contents)
    }

    fn read_once(&self) -> Result<Contents, FolderError> {
        let Some(_lock) = self.lock(File::lock_shared)? else {
            return Ok(Contents::default());
        };
        Ok(Contents {
            anchors: read(&self.anchors)?,
            issuer: read(&self.issuer)?,
            issuer_key: read(&self.issuer_key)?,
            revocations: read(&self.revocations)?,
        })
    }

    /// Makes an issuer where it is missing or nears its end; where this is a `first` look, also an
    /// authority where there is none: a folder that is empty later was emptied by somebody. Says
    /// whether anything was made, by this agent or meanwhile by another.
    pub(super) fn make_missing(
        &self,
        first: bool,
        now: OffsetDateTime,
    ) -> Result<bool, FolderError> {
        if !self.lacks_something(first, now)? {
            return Ok(false);
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(io_error("make", &self.directory))?;
        let _lock = self.lock(File::lock)?;
        // Another agent may have been quicker.
        if !self.lacks_something(first, now)? {
            return Ok(true);
        }
        if !self.anchors.exists() {
            self.make_anchor(now)?;
        }
        self.make_issuer(now)?;
        Ok(true)
    }

    /// Whether something is to be made. A folder with parts of an authority is somebody's, and only
    /// what its anchor's key can make is made there.
    fn lacks_something(&self, first: bool, now: OffsetDateTime) -> Result<bool, FolderError> {
        if !self.anchors.exists() {
            return Ok(first && !self.issuer.exists() && !self.issuer_key.exists());
        }
        if !self.issuer.exists() {
            return Ok(self.anchor_key.exists());
        }
        self.issuer_is_due(now)
    }

    /// Locks the folder for as long as the result lives. None where there is no folder.
    fn lock(
        &self,
        lock: impl FnOnce(&File) -> std::io::Result<()>,
    ) -> Result<Option<File>, FolderError> {
        match File::open(&self.directory) {
            Ok(folder) => {
                lock(&folder).map_err(io_error("lock", &self.directory))?;
                Ok(Some(folder))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("open", &self.directory)(error)),
        }
    }

    /// Whether the issuer is past 70 % of its life and one that ends later can be made.
    fn issuer_is_due(&self, now: OffsetDateTime) -> Result<bool, FolderError> {
        let bytes = read(&self.issuer)?;
        let Ok(chain) = certificates_of(bytes.as_deref(), ISSUER, &self.issuer) else {
            return Ok(false);
        };
        // A longer chain was made elsewhere, for an anchor whose key is elsewhere.
        let [issuer] = &chain[..] else {
            return Ok(false);
        };
        let validity = parse(issuer).validity().clone();
        let from = validity.not_before.to_datetime();
        let ends = validity.not_after.to_datetime();
        Ok(now >= from + (ends - from) * 0.7
            && self
                .signing_anchor(now)
                .is_ok_and(|(anchor, _)| new_issuer_end(&anchor, now) > ends))
    }

    /// The valid anchor whose key is in the folder, with that key.
    fn signing_anchor(
        &self,
        now: OffsetDateTime,
    ) -> Result<(CertificateDer<'static>, KeyPair), FolderError> {
        let key = key_of(read(&self.anchor_key)?.as_deref(), &self.anchor_key)?;
        let spki = key.subject_public_key_info();
        let anchors = certificates_of(read(&self.anchors)?.as_deref(), ANCHOR, &self.anchors)?;
        judge::valid(anchors, ANCHOR, &self.anchors, now)?
            .into_iter()
            .find(|anchor| parse(anchor).public_key().raw == spki)
            .map(|anchor| (anchor, key))
            .ok_or_else(|| FolderError::KeyMismatch {
                key: self.anchor_key.clone(),
                certificate: self.anchors.clone(),
            })
    }

    fn make_anchor(&self, now: OffsetDateTime) -> Result<(), FolderError> {
        let making = making(ANCHOR, &self.anchors);
        let key = existing_or_new_key(&self.anchor_key, &making)?;
        let mut params = authority_params("malla trust anchor", &key);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = now - CLOCK_TOLERANCE;
        params.not_after = now + ANCHOR_LIFETIME;
        let anchor = params.self_signed(&key).map_err(making)?;
        write_whole(&self.anchors, anchor.pem().as_bytes())
    }

    fn make_issuer(&self, now: OffsetDateTime) -> Result<(), FolderError> {
        let (anchor, anchor_key) = self.signing_anchor(now)?;
        let ends = new_issuer_end(&anchor, now);
        let making = making(ISSUER, &self.issuer);
        let anchor = Issuer::from_ca_cert_der(&anchor, anchor_key).map_err(&making)?;
        // A renewed issuer keeps its key, so that one rename replaces it.
        let key = existing_or_new_key(&self.issuer_key, &making)?;
        let mut params = authority_params("malla issuer", &key);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - CLOCK_TOLERANCE;
        params.not_after = ends;
        let issuer = params.signed_by(&key, &anchor).map_err(making)?;
        write_whole(&self.issuer, issuer.pem().as_bytes())
    }
}

fn new_issuer_end(anchor: &CertificateDer<'_>, now: OffsetDateTime) -> OffsetDateTime {
    let anchor_ends = parse(anchor).validity().not_after.to_datetime();
    anchor_ends.min(now + ISSUER_LIFETIME)
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
    if let Some(bytes) = read(path)? {
        return key_of(Some(&bytes), path);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(making)?;
    write_whole(path, key.serialize_pem().as_bytes())?;
    Ok(key)
}
