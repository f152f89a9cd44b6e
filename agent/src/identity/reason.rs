//! The one word for why a TLS connection failed.
//!
//! The side that refused knows exactly. The other side has the alert only, which says less: for a
//! wrong identity TLS has one alert, `certificate_unknown`, whatever was wrong with it.

use std::{error::Error as StdError, io};

use malla_common::Reason;
use rustls::{AlertDescription, CertificateError, Error, Side};

use super::verify::IdentityRefused;

/// Why the TLS connection of which `error` tells has failed. `side` is ours.
///
/// `error` may be rustls' own or wrap it at any depth (`io::Error`, `h2::Error`); one without a
/// TLS cause is [`Reason::TlsFailed`].
pub(crate) fn reason_of(error: &(dyn StdError + 'static), side: Side) -> Reason {
    match tls_cause(error) {
        Some(Error::NoCertificatesPresented) => Reason::NoCertificate,
        Some(Error::InvalidCertificate(error)) => refused_by_us(error),
        Some(Error::AlertReceived(alert)) => refused_by_peer(*alert, side),
        _ => Reason::TlsFailed,
    }
}

fn tls_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<Error>() {
            return Some(found);
        }
        next = match error.downcast_ref::<io::Error>() {
            // `source()` of an I/O error skips the error that it wraps.
            Some(outer) => outer
                .get_ref()
                .map(|inner| -> &'a (dyn StdError + 'static) { inner }),
            None => error.source(),
        };
    }
    None
}

fn refused_by_us(error: &CertificateError) -> Reason {
    match error {
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => Reason::CertificateExpired,
        CertificateError::Revoked => Reason::CertificateRevoked,
        CertificateError::Other(other) => match other.0.downcast_ref() {
            Some(IdentityRefused::Mismatch { .. }) => Reason::IdentityMismatch,
            Some(IdentityRefused::ForeignTrustDomain { .. }) => Reason::ForeignTrustDomain,
            None => Reason::UntrustedCertificate,
        },
        _ => Reason::UntrustedCertificate,
    }
}

fn refused_by_peer(alert: AlertDescription, side: Side) -> Reason {
    match alert {
        AlertDescription::CertificateRequired => Reason::NoCertificate,
        AlertDescription::CertificateExpired => Reason::CertificateExpired,
        AlertDescription::CertificateRevoked => Reason::CertificateRevoked,
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate => Reason::UntrustedCertificate,
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => match side {
            // A client looks for one identity, a server for a trust domain.
            Side::Server => Reason::IdentityMismatch,
            Side::Client => Reason::ForeignTrustDomain,
        },
        _ => Reason::TlsFailed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_found_under_wrappers() {
        let tls = Error::AlertReceived(AlertDescription::CertificateExpired);
        let once = io::Error::new(io::ErrorKind::InvalidData, tls);
        let twice = io::Error::other(once);
        assert_eq!(reason_of(&twice, Side::Client), Reason::CertificateExpired);
    }

    #[test]
    fn an_error_without_a_tls_cause_is_a_failed_handshake() {
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(reason_of(&reset, Side::Server), Reason::TlsFailed);
    }

    #[test]
    fn alerts_of_a_peer_are_read_by_the_side_that_got_them() {
        for (alert, side, expected) in [
            (
                AlertDescription::CertificateRequired,
                Side::Client,
                Reason::NoCertificate,
            ),
            (
                AlertDescription::UnknownCA,
                Side::Server,
                Reason::UntrustedCertificate,
            ),
            (
                AlertDescription::CertificateUnknown,
                Side::Server,
                Reason::IdentityMismatch,
            ),
            (
                AlertDescription::CertificateUnknown,
                Side::Client,
                Reason::ForeignTrustDomain,
            ),
            (
                AlertDescription::ProtocolVersion,
                Side::Client,
                Reason::TlsFailed,
            ),
        ] {
            let error = Error::AlertReceived(alert);
            assert_eq!(reason_of(&error, side), expected, "{alert:?}");
        }
    }
}
