//! What audits have found: counted, told, and kept for `/config`.
//!
//! What was put right is told each time, what couldn't be is told once, until it is.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    config,
    model::WorkloadId,
    steer::{Difference, Kind},
    telemetry::Metrics,
};

/// How many of the last differences are kept.
const KEPT: usize = 64;

/// The audits of this agent so far.
pub struct Audits {
    metrics: Arc<Metrics>,
    /// Differences that couldn't be put right.
    unhealed: HashSet<Key>,
    recent: VecDeque<config::AuditDifference>,
    last_whole: Option<config::WholeAudit>,
}

type Key = (Option<WorkloadId>, Kind, String);

impl Audits {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let kinds = Kind::ALL.into_iter().map(Kind::as_str);
        metrics.steering().describe_audit(kinds);
        Self {
            metrics,
            unhealed: HashSet::new(),
            recent: VecDeque::new(),
            last_whole: None,
        }
    }

    /// What an audit of some parts has found.
    pub fn found(&mut self, found: Vec<Difference>) {
        for difference in found {
            if difference.failure.is_none() || self.unhealed.insert(key(&difference)) {
                self.tell(&difference);
                self.keep(difference);
            }
        }
    }

    /// What an audit of everything has found, in the time that it took.
    pub fn whole(&mut self, found: Vec<Difference>, took: Duration) {
        let failed = found.iter().filter(|found| found.failure.is_some());
        let failed: HashSet<Key> = failed.map(key).collect();
        self.unhealed.retain(|key| failed.contains(key));
        self.found(found);
        self.metrics.steering().audited(took);
        self.last_whole = Some(config::WholeAudit {
            ended: SystemTime::now(),
            took_seconds: took.as_secs_f64(),
        });
    }

    fn tell(&self, difference: &Difference) {
        let Difference { what, failure, .. } = difference;
        let workload = difference.workload.as_ref().map(tracing::field::display);
        let kind = difference.kind.as_str();
        let metrics = self.metrics.steering();
        metrics.audit_difference(kind, failure.is_none());
        match failure {
            None => tracing::warn!(
                workload,
                kind,
                what,
                "an audit found a difference and put it right"
            ),
            Some(failure) => tracing::error!(
                workload,
                kind,
                what,
                failure,
                "an audit found a difference that can't be put right"
            ),
        }
    }

    fn keep(&mut self, difference: Difference) {
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(config::AuditDifference {
            at: SystemTime::now(),
            workload: difference.workload.map(|id| id.to_string()),
            kind: difference.kind.as_str(),
            what: difference.what,
            failure: difference.failure,
        });
    }

    /// The section of `/config`.
    pub fn section(&self) -> config::Audit {
        config::Audit {
            last_whole: self.last_whole.clone(),
            unhealed: self.unhealed.len(),
            recent: self.recent.iter().cloned().collect(),
        }
    }
}

fn key(difference: &Difference) -> Key {
    let Difference { kind, what, .. } = difference;
    (difference.workload.clone(), *kind, what.clone())
}
