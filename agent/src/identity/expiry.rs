//! The ends of what certificates hang on, and reminding of them in time.
//!
//! Functions of plain values: the clock is the caller's.

use std::{collections::HashMap, path::PathBuf};

use time::{Duration, OffsetDateTime};

/// Share of a life that is left when reminding begins. What renews itself has done so before.
const REMIND_FROM: f64 = 0.2;
/// How often the same end is told of.
const REMIND_EVERY: Duration = Duration::HOUR;

/// When something in a file ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Expiry {
    /// The word for metrics: `trust_anchor`, `issuer`, `revocation_list`.
    pub(crate) object: &'static str,
    /// Its subject; of a list, its issuer.
    pub(crate) subject: String,
    pub(crate) path: PathBuf,
    pub(crate) begins: OffsetDateTime,
    pub(crate) ends: OffsetDateTime,
}

impl Expiry {
    fn is_near(&self, now: OffsetDateTime) -> bool {
        now >= self.ends - (self.ends - self.begins) * REMIND_FROM
    }
}

/// When each end was told of last.
#[derive(Debug, Default)]
pub(super) struct Reminders(HashMap<Expiry, OffsetDateTime>);

impl Reminders {
    /// Those of `expiries` that are to be told of now: near or past, and not told of for a while.
    pub(super) fn due<'a>(
        &mut self,
        expiries: &'a [Expiry],
        now: OffsetDateTime,
    ) -> Vec<&'a Expiry> {
        self.0.retain(|told, _| expiries.contains(told));
        let near = expiries.iter().filter(|expiry| expiry.is_near(now));
        let due: Vec<_> = near
            .filter(|expiry| {
                let told = self.0.get(*expiry);
                told.is_none_or(|told| {
                    now - *told >= REMIND_EVERY || (expiry.ends <= now && *told < expiry.ends)
                })
            })
            .collect();
        for expiry in &due {
            self.0.insert((*expiry).clone(), now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGINS: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn expiry(days: i64) -> Expiry {
        Expiry {
            object: "issuer",
            subject: "CN=issuer".to_owned(),
            path: PathBuf::from("issuer.crt"),
            begins: BEGINS,
            ends: BEGINS + Duration::days(days),
        }
    }

    #[test]
    fn an_end_is_told_of_hourly_from_the_last_fifth_of_a_life_on() {
        let mut reminders = Reminders::default();
        let expiries = [expiry(10)];
        let mut told = |hours| {
            let due = reminders.due(&expiries, BEGINS + Duration::hours(hours));
            !due.is_empty()
        };
        assert!(!told(191));
        assert!(told(192));
        assert!(!told(192));
        assert!(told(193));
        assert!(told(1_000));
    }

    #[test]
    fn the_end_itself_is_told_of_whenever_it_was_told_of_before() {
        let mut reminders = Reminders::default();
        let expiries = [expiry(10)];
        let ends = expiries[0].ends;
        assert_eq!(reminders.due(&expiries, ends - Duration::SECOND).len(), 1);
        assert_eq!(reminders.due(&expiries, ends).len(), 1);
        assert!(reminders.due(&expiries, ends + Duration::SECOND).is_empty());
    }

    #[test]
    fn what_was_replaced_is_forgotten() {
        let mut reminders = Reminders::default();
        let now = BEGINS + Duration::days(9);
        assert_eq!(reminders.due(&[expiry(10)], now).len(), 1);
        assert!(reminders.due(&[expiry(100)], now).is_empty());
        assert!(reminders.0.is_empty());
    }
}
