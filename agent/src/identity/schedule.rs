//! When a certificate is renewed, and when a failed renewal is tried again.
//!
//! Functions of plain values: the clock and the dice are the caller's.

use std::time::{Duration, SystemTime};

/// Share of the lifetime after which a certificate is renewed.
const RENEWAL_POINT: f64 = 0.7;
/// Renewals of certificates made together spread over this share of the lifetime, both ways.
const RENEWAL_SPREAD: f64 = 0.05;
/// The least time between two renewals, whatever is left of the authority's own life.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(150);
const RETRY_SPREAD: f64 = 0.2;

/// The time that a certificate serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Term {
    /// When it was received. `notBefore` lies earlier, to allow for clocks that are behind.
    pub(super) obtained: SystemTime,
    /// `notAfter` of the certificate.
    pub(super) ends: SystemTime,
}

impl Term {
    pub(super) fn is_over(self, now: SystemTime) -> bool {
        now >= self.ends
    }
}

/// When to ask the authority next. `failures` counts attempts in a row without a certificate;
/// `dice` lies in -1..=1.
pub(super) fn next_attempt(
    now: SystemTime,
    term: Option<Term>,
    failures: u32,
    dice: f64,
) -> SystemTime {
    match (term, failures) {
        (None, 0) => now,
        (Some(term), 0) => renewal(term, dice),
        (term, failures) => {
            let retry = now + retry_delay(failures, dice);
            match term {
                // Whatever the back-off says, the last moment of a valid certificate is used.
                Some(term) if !term.is_over(now) => retry.min(term.ends),
                _ => retry,
            }
        }
    }
}

fn renewal(term: Term, dice: f64) -> SystemTime {
    let lifetime = term.ends.duration_since(term.obtained).unwrap_or_default();
    let wait = lifetime.mul_f64(RENEWAL_POINT + RENEWAL_SPREAD * dice);
    term.obtained + wait.max(SHORTEST_RENEWAL)
}

fn retry_delay(failures: u32, dice: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let delay = FIRST_RETRY * 2_u32.pow(doublings);
    delay
        .min(LONGEST_RETRY)
        .mul_f64(1.0 + RETRY_SPREAD * dice)
        .min(LONGEST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 60 * 60;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn term(obtained: u64, ends: u64) -> Term {
        Term {
            obtained: at(obtained),
            ends: at(ends),
        }
    }

    #[test]
    fn a_certificate_is_renewed_around_70_percent_of_its_lifetime() {
        for (term, dice, expected) in [
            (term(0, 1000), 0.0, 700),
            (term(0, 1000), 1.0, 750),
            (term(0, 1000), -1.0, 650),
            (term(DAY, 2 * DAY), 0.0, DAY + DAY * 7 / 10),
            // Hardly valid or over when it came: without haste.
            (term(10, 11), 0.0, 11),
            (term(10, 5), 0.0, 11),
        ] {
            assert_eq!(next_attempt(at(0), Some(term), 0, dice), at(expected));
        }
    }

    #[test]
    fn the_first_certificate_is_asked_for_at_once() {
        assert_eq!(next_attempt(at(7), None, 0, 1.0), at(7));
    }

    #[test]
    fn failures_back_off_by_doubling_up_to_the_cap() {
        for (failures, dice, expected_ms) in [
            (1, 0.0, 1_000),
            (1, 1.0, 1_200),
            (1, -1.0, 800),
            (2, 0.0, 2_000),
            (5, 0.0, 16_000),
            (8, 0.0, 128_000),
            (8, 1.0, 150_000),
            (9, 0.0, 150_000),
            (9, -1.0, 120_000),
            (u32::MAX, 0.0, 150_000),
        ] {
            let retry = next_attempt(at(100), None, failures, dice);
            let expected = Duration::from_millis(expected_ms);
            assert_eq!(retry, at(100) + expected, "{failures} failures");
        }
    }

    #[test]
    fn a_retry_is_never_later_than_the_end_of_a_valid_certificate() {
        let held = Some(term(0, 1000));
        assert_eq!(next_attempt(at(900), held, 9, 0.0), at(1000));
        assert_eq!(next_attempt(at(999), held, 1, 1.0), at(1000));
        assert_eq!(next_attempt(at(1000), held, 9, 0.0), at(1150));
    }
}
