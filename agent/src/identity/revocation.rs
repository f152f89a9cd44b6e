//! Certificate revocation lists (RFC 5280, 5): which certificates are no longer good.
//!
//! A list counts for the certificates of the authority that has signed it. Its signature is checked
//! when a certificate is found on it, with the keys that stand above that certificate: agents of
//! other nodes may have issuers of which this one has never heard. A list whose date for the next
//! one has passed stays in force.

use std::collections::HashSet;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{ParsedExtension, X509Extension},
    prelude::FromDer,
    revocation_list::CertificateRevocationList,
};

/// Lists that were read together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Revocations(Vec<List>);

#[derive(Debug, PartialEq, Eq)]
struct List {
    der: Vec<u8>,
    /// The name of who has signed it, as DER.
    issuer: Vec<u8>,
    /// The key of who has signed it, where the list says so.
    issuer_key: Option<Vec<u8>>,
    serials: HashSet<Vec<u8>>,
}

/// Why a list can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ListError {
    #[error("no list was found in it")]
    Empty,
    #[error("it is not PEM: {0}")]
    Pem(String),
    #[error("list {number} is not valid DER: {detail}")]
    Malformed { number: usize, detail: String },
    #[error("list {number} has a critical extension {oid}, which cannot be honoured")]
    CriticalExtension { number: usize, oid: String },
    #[error("list {number} says to be of `{issuer}`, whose key has not signed it")]
    BadSignature { number: usize, issuer: String },
}

/// Of whom a list is, and when the next one is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListTerm {
    pub(super) issuer: String,
    pub(super) begins: OffsetDateTime,
    pub(super) next: Option<OffsetDateTime>,
}

impl Revocations {
    /// The lists of a PEM file. `authorities` are the certificates of those who may have signed
    /// them, as far as they are known.
    pub(super) fn read(
        pem: &[u8],
        authorities: &[CertificateDer<'static>],
    ) -> Result<Self, ListError> {
        let mut lists = Vec::new();
        for (number, der) in (1..).zip(CertificateRevocationListDer::pem_slice_iter(pem)) {
            let der = der.map_err(|error| ListError::Pem(error.to_string()))?;
            let list = List::read(number, &der)?;
            let mut known = authorities
                .iter()
                .filter(|one| list.may_be_of(one))
                .peekable();
            if known.peek().is_some() && !known.any(|authority| list.is_signed_by(authority)) {
                let issuer = list.parse().issuer().to_string();
                return Err(ListError::BadSignature { number, issuer });
            }
            lists.push(list);
        }
        if lists.is_empty() {
            return Err(ListError::Empty);
        }
        Ok(Self(lists))
    }

    /// Whether a list revokes a certificate of `chain`, which hangs on one of `anchors`.
    pub(super) fn revoke(
        &self,
        chain: &[CertificateDer<'_>],
        anchors: &[CertificateDer<'static>],
    ) -> bool {
        chain.iter().any(|certificate| {
            self.0.iter().any(|list| {
                let mut above = chain.iter().chain(anchors);
                list.names(certificate)
                    && above.any(|above| list.may_be_of(above) && list.is_signed_by(above))
            })
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn terms(&self) -> Vec<ListTerm> {
        let terms = self.0.iter().map(|list| {
            let parsed = list.parse();
            ListTerm {
                issuer: parsed.issuer().to_string(),
                begins: parsed.last_update().to_datetime(),
                next: parsed.next_update().map(|next| next.to_datetime()),
            }
        });
        terms.collect()
    }
}

impl List {
    fn read(number: usize, der: &[u8]) -> Result<Self, ListError> {
        let (_, parsed) =
            CertificateRevocationList::from_der(der).map_err(|error| ListError::Malformed {
                number,
                detail: error.to_string(),
            })?;
        let entries = parsed.iter_revoked_certificates();
        let mut extensions = parsed
            .extensions()
            .iter()
            .chain(entries.flat_map(|entry| entry.extensions()));
        if let Some(extension) = extensions.find(|extension| !is_honoured(extension)) {
            return Err(ListError::CriticalExtension {
                number,
                oid: extension.oid.to_id_string(),
            });
        }
        let entries = parsed.iter_revoked_certificates();
        Ok(Self {
            issuer: parsed.issuer().as_raw().to_owned(),
            issuer_key: authority_key(parsed.extensions()),
            serials: entries.map(|entry| entry.raw_serial().to_owned()).collect(),
            der: der.to_owned(),
        })
    }

    fn parse(&self) -> CertificateRevocationList<'_> {
        let (_, parsed) = CertificateRevocationList::from_der(&self.der)
            // Parsing is a function of the bytes, and `read` has parsed these.
            .expect("a list that was parsed before");
        parsed
    }

    /// Whether the certificate is of this list's authority, by its word, and on the list.
    fn names(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
            certificate.issuer().as_raw() == self.issuer
                && self
                    .serials
                    .contains(certificate.tbs_certificate.raw_serial())
        })
    }

    /// Whether the list says to be of this authority. Issuers that follow each other often share a
    /// name: it is their keys that tell them apart.
    fn may_be_of(&self, authority: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(authority).is_ok_and(|(_, authority)| {
            let key = subject_key(authority.extensions());
            let same_key = self.issuer_key.is_none() || key.is_none() || key == self.issuer_key;
            authority.subject().as_raw() == self.issuer && same_key
        })
    }

    fn is_signed_by(&self, authority: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(authority).is_ok_and(|(_, authority)| {
            let usage = authority.key_usage().ok().flatten();
            authority.is_ca()
                && usage.is_none_or(|usage| usage.value.crl_sign())
                && self
                    .parse()
                    .verify_signature(authority.public_key())
                    .is_ok()
        })
    }
}

/// What isn't critical may be passed over. Of critical extensions, the scope of a list only narrows
/// for which certificates it is complete; but a list of more than one issuer is another matter.
fn is_honoured(extension: &X509Extension<'_>) -> bool {
    match extension.parsed_extension() {
        ParsedExtension::IssuingDistributionPoint(point) => !point.indirect_crl,
        _ => !extension.critical,
    }
}

fn authority_key(extensions: &[X509Extension<'_>]) -> Option<Vec<u8>> {
    extensions.iter().find_map(|extension| {
        match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(key) => key.key_identifier.as_ref(),
            _ => None,
        }
        .map(|id| id.0.to_owned())
    })
}

fn subject_key(extensions: &[X509Extension<'_>]) -> Option<Vec<u8>> {
    extensions
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_owned()),
            _ => None,
        })
}

#[cfg(test)]
mod tests;
