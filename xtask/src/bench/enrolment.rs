//! How long an agent takes to have the pods of its node.

use std::{path::Path, time::Duration};

use anyhow::Result;
use malla_testbed::{Crowd, End, Enrolled, Testbed};

use super::results::{Outcome, Row};

/// Pods of the node.
const PODS: usize = 200;
/// Pods a second that come and go.
const RATE: usize = 50;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amount {
    /// Pods that join one by one.
    joining: usize,
    /// How long pods come and go.
    changing: Duration,
}

impl Amount {
    pub(super) const FULL: Self = Self {
        joining: 100,
        changing: Duration::from_secs(20),
    };
    pub(super) const QUICK: Self = Self {
        joining: 20,
        changing: Duration::from_secs(4),
    };
}

/// One turn. Nothing is pinned to a processor: an agent that starts has the node's.
pub(super) fn measure(malla: &Path, amount: Amount) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let bed = Testbed::new("bench")?.with_agent_program(malla);
    let mut crowd = Crowd::new(bed, PODS)?;
    outcome.set(Row::Start, crowd.start()?.as_secs_f64());
    outcome.set(Row::RestartKilled, crowd.restart(End::Kill)?.as_secs_f64());
    outcome.set(Row::RestartStopped, crowd.restart(End::Stop)?.as_secs_f64());
    let joined = crowd.enrol_one_by_one(amount.joining)?;
    let work = |enrolled: &Enrolled| enrolled.work;
    outcome.set(Row::EnrolMedian, milliseconds(&joined, 0.5, work));
    outcome.set(Row::EnrolHigh, milliseconds(&joined, 0.99, work));
    let outside = |enrolled: &Enrolled| enrolled.from_outside;
    outcome.set(Row::JoinMedian, milliseconds(&joined, 0.5, outside));
    outcome.set(Row::JoinHigh, milliseconds(&joined, 0.99, outside));
    let (took, pods) = crowd.come_and_go(RATE, amount.changing)?;
    // A few thousand pods.
    #[expect(clippy::cast_precision_loss)]
    let pods = pods as f64;
    outcome.set(Row::ComeAndGo, pods / took.as_secs_f64());
    Ok(outcome)
}

/// A quantile, such as 0.5 for the median.
fn milliseconds(joined: &[Enrolled], quantile: f64, figure: impl Fn(&Enrolled) -> Duration) -> f64 {
    let mut times: Vec<Duration> = joined.iter().map(figure).collect();
    times.sort();
    // A few hundred, and a quantile is at most 1.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    let at = (times.len() as f64 * quantile) as usize;
    let found = times.get(at).or(times.last());
    found.map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}
