//! The files of an authority's folder: read and checked one by one, written whole.

use std::{
    fs::{File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

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

pub(super) fn read_key(path: &Path) -> Result<KeyPair, FolderError> {
    let pem = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => FolderError::MissingKey(path.to_owned()),
        _ => io_error("read", path)(source),
    })?;
    KeyPair::from_pem(&pem).map_err(|error| FolderError::Unreadable {
        path: path.to_owned(),
        what: "private key",
        detail: error.to_string(),
    })
}

/// At least one certificate, each of which [`parse`]s.
pub(super) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FolderError> {
    let unreadable = |detail: String| FolderError::Unreadable {
        path: path.to_owned(),
        what: "certificate",
        detail,
    };
    let pem = std::fs::read(path).map_err(io_error("read", path))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
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

/// Parses what [`read_certificates`] has let through.
pub(super) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> X509Certificate<'a> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        // Parsing is a function of the bytes, and these were parsed when they were read.
        .expect("a certificate that was parsed before");
    parsed
}

pub(super) fn check_dates(
    certificate: &CertificateDer<'_>,
    object: &'static str,
    path: &Path,
    now: OffsetDateTime,
) -> Result<(), FolderError> {
    let parsed = parse(certificate);
    let validity = parsed.validity();
    let (from, at) = (
        validity.not_before.to_datetime(),
        validity.not_after.to_datetime(),
    );
    let path = path.to_owned();
    if at <= now {
        return Err(FolderError::Expired { object, path, at });
    }
    if from > now {
        return Err(FolderError::NotYetValid { object, path, from });
    }
    Ok(())
}

pub(super) fn check_pair(
    key: &KeyPair,
    key_path: &Path,
    certificate: &CertificateDer<'_>,
    certificate_path: &Path,
) -> Result<(), FolderError> {
    if parse(certificate).public_key().raw == key.subject_public_key_info() {
        return Ok(());
    }
    Err(FolderError::KeyMismatch {
        key: key_path.to_owned(),
        certificate: certificate_path.to_owned(),
    })
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
