//! The metrics of certificates: when they end, and whether new ones are had.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{GaugeVec, IntCounterVec, Opts, Registry};

use super::metrics::{counters, register, valid};

/// What workload certificates and their authority tell.
#[derive(Debug)]
pub struct IdentityMetrics {
    refreshes: IntCounterVec,
    /// Without labels; a vector so that it can be absent while there is no certificate.
    expiration: GaugeVec,
    authority_expiration: GaugeVec,
    /// The labels of `authority_expiration`.
    authority: Mutex<BTreeMap<Certified, SystemTime>>,
    authority_reloads: IntCounterVec,
}

/// Something of an authority that ends: what it is, and its subject.
type Certified = (&'static str, String);

impl IdentityMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        Self {
            refreshes: counters(
                registry,
                "control_identity_cert_refreshes_total",
                "Certificates asked for: ok or error.",
                &["result"],
            ),
            expiration: register(
                registry,
                valid(GaugeVec::new(
                    Opts::new(
                        "control_identity_cert_expiration_timestamp_seconds",
                        "When the first of the workloads' certificates expires, in seconds \
                         since 1970.",
                    ),
                    &[],
                )),
            ),
            authority_expiration: register(
                registry,
                valid(GaugeVec::new(
                    Opts::new(
                        "malla_identity_expiration_timestamp_seconds",
                        "When trust anchors, issuers and revocation lists end, in seconds since \
                         1970.",
                    ),
                    &["object", "subject"],
                )),
            ),
            authority: Mutex::default(),
            authority_reloads: counters(
                registry,
                "malla_identity_reloads_total",
                "Changed trust anchors, issuers and revocation lists: ok or error.",
                &["object", "result"],
            ),
        }
    }

    /// How many certificates were issued or renewed so far, and how many attempts failed.
    pub fn set_refreshes(&self, ok: u64, failed: u64) {
        for (result, total) in [("ok", ok), ("error", failed)] {
            let counter = self.refreshes.with_label_values(&[result]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// The first end of the current certificates' validity. `None`: there is no certificate.
    pub fn set_expiration(&self, first: Option<SystemTime>) {
        match first {
            Some(first) => self
                .expiration
                .with_label_values::<&str>(&[])
                .set(since_1970(first)),
            None => self.expiration.reset(),
        }
    }

    /// When what certificates hang on ends: object, subject, end. It replaces what was told before;
    /// of several of one subject the first end counts.
    pub fn set_authority_expirations(
        &self,
        ends: impl IntoIterator<Item = (&'static str, String, SystemTime)>,
    ) {
        let mut first = BTreeMap::new();
        for (object, subject, end) in ends {
            let known = first.entry((object, subject)).or_insert(end);
            *known = end.min(*known);
        }
        for ((object, subject), end) in &first {
            let gauge = self
                .authority_expiration
                .with_label_values(&[*object, subject]);
            gauge.set(since_1970(*end));
        }
        let mut told = self
            .authority
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (object, subject) in told.keys().filter(|key| !first.contains_key(*key)) {
            // Fails only for a series that isn't there.
            let _ = self
                .authority_expiration
                .remove_label_values(&[*object, subject]);
        }
        *told = first;
    }

    /// How often an `object` of the authority was read anew so far: taken over, or refused.
    pub fn set_authority_reloads(&self, object: &'static str, ok: u64, failed: u64) {
        for (result, total) in [("ok", ok), ("error", failed)] {
            let counter = self.authority_reloads.with_label_values(&[object, result]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }
}

fn since_1970(time: SystemTime) -> f64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn the_ends_of_an_authority_are_those_told_last() {
        let registry = Registry::new();
        let metrics = IdentityMetrics::new(&registry);
        let end = |object, subject: &str, seconds| {
            let end = UNIX_EPOCH + Duration::from_secs(seconds);
            (object, subject.to_owned(), end)
        };
        metrics.set_authority_expirations([end("issuer", "CN=old", 5), end("issuer", "CN=new", 9)]);
        metrics.set_authority_expirations([end("issuer", "CN=new", 9), end("issuer", "CN=new", 7)]);
        let text = TextEncoder::new().encode_to_string(&registry.gather());
        let text = text.unwrap();
        let name = "malla_identity_expiration_timestamp_seconds";
        assert!(text.contains(&format!(
            "{name}{{object=\"issuer\",subject=\"CN=new\"}} 7\n"
        )));
        assert!(!text.contains("CN=old"), "{text}");
    }
}
