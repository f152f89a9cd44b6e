//! The files of an authority's folder: read and checked one by one, written whole.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::revocation::ListError;

/// The largest file that is read: a list of some 400,000 revoked certificates.
const MOST_BYTES: u64 = 16 << 20;

/// Why the folder can't serve as a certificate authority. Each names the file and the way out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the private key {} is missing: put it there, or remove the certificate beside it to have \
         a new one made",
        .0.display()
    )]
    MissingKey(PathBuf),
    #[error("the {object} {} is missing: put it there", path.display())]
    Missing { object: &'static str, path: PathBuf },
    #[error("the revocation list {} cannot be used: {source}: put a whole one there", path.display())]
    RevocationList { path: PathBuf, source: ListError },
    #[error("the issuer in {} is revoked by {}: put a new issuer and its key there", issuer.display(), list.display())]
    IssuerRevoked { issuer: PathBuf, list: PathBuf },
    #[error("the certificate in {} is not an authority's: put an issuer there whose basic constraints say CA", .0.display())]
    NotAnAuthority(PathBuf),
    #[error(
        "{} is not a PEM file with a {what} ({detail}): replace it, or remove the folder's files \
         to have new ones made",
        path.display()
    )]
    Unreadable {
        path: PathBuf,
        what: &'static str,
        detail: String,
    },
    #[error("the {object} in {} expired at {at}: put a new {object} there", path.display())]
    Expired {
        object: &'static str,
        path: PathBuf,
        at: OffsetDateTime,
    },
    #[error(
        "the {object} in {} is not valid before {from}: check this machine's clock",
        path.display()
    )]
    NotYetValid {
        object: &'static str,
        path: PathBuf,
        from: OffsetDateTime,
    },
    #[error(
        "{} is not the key of the certificate in {}: put the pair that belongs together there",
        key.display(),
        certificate.display()
    )]
    KeyMismatch { key: PathBuf, certificate: PathBuf },
    #[error(
        "the issuer in {} is not signed by a trust anchor in {}: put its anchor there, or remove \
         {} to have a new issuer made",
        issuer.display(),
        anchors.display(),
        issuer.display()
    )]
    NotChained { issuer: PathBuf, anchors: PathBuf },
    #[error("cannot make the {object} for {}: {source}", path.display())]
    Making {
        object: &'static str,
        path: PathBuf,
        source: rcgen::Error,
    },
}

/// A file's bytes; `None` where there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, FolderError> {
    let read = || -> io::Result<Vec<u8>> {
        // Asked before opening: to open a FIFO would wait for its writer.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MOST_BYTES + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(io::Error::other("it is larger than 16 MiB"));
        }
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// The private key of what [`read`] has read from `path`.
pub(super) fn key_of(bytes: Option<&[u8]>, path: &Path) -> Result<KeyPair, FolderError> {
    let bytes = bytes.ok_or_else(|| FolderError::MissingKey(path.to_owned()))?;
    let unreadable = |detail: String| FolderError::Unreadable {
        path: path.to_owned(),
        what: "private key",
        detail,
    };
    let pem = str::from_utf8(bytes).map_err(|error| unreadable(error.to_string()))?;
    KeyPair::from_pem(pem).map_err(|error| unreadable(error.to_string()))
}

/// The certificates, at least one, of what [`read`] has read from `path`. Each of them [`parse`]s.
pub(super) fn certificates_of(
    bytes: Option<&[u8]>,
    object: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let missing = || FolderError::Missing {
        object,
        path: path.to_owned(),
    };
    let unreadable = |detail: String| FolderError::Unreadable {
        path: path.to_owned(),
        what: "certificate",
        detail,
    };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(bytes.ok_or_else(missing)?)
        .collect::<Result<_, _>>()
        .map_err(|error| unreadable(error.to_string()))?;
    for certificate in &certificates {
        X509Certificate::from_der(certificate).map_err(|error| unreadable(error.to_string()))?;
    }
    if certificates.is_empty() {
        return Err(unreadable("none found".to_owned()));
    }
    Ok(certificates)
}

/// Parses what [`certificates_of`] has let through.
pub(super) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> X509Certificate<'a> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        // Parsing is a function of the bytes, and these were parsed when they were read.
        .expect("a certificate that was parsed before");
    parsed
}

/// Writes a file that only its owner reads, and that others see whole or not at all. The caller
/// holds the folder's lock, so the temporary name is its own.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), FolderError> {
    let temporary = path.with_added_extension("new");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        // Makes the new name last, not only the content.
        path.parent()
            .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(io_error("write", path))
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::Io {
        action,
        path,
        source,
    }
}

pub(super) fn making(object: &'static str, path: &Path) -> impl Fn(rcgen::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::Making {
        object,
        path: path.clone(),
        source,
    }
}
