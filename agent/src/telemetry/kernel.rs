//! What the eBPF programs counted, as metrics.
//!
//! This module doesn't read BPF maps: whoever owns them gives a function that does
//! (see [`Metrics::set_kernel_counters`](super::Metrics::set_kernel_counters)).

use std::fmt;

use malla_common::Reason;
use prometheus::proto::{MetricFamily, MetricType};

use super::{
    Direction,
    collector::{Family, label},
};

const LABELS: &[&str] = &["direction", "reason", "verdict"];

pub(super) const FAMILIES: [Family; 2] = [
    Family {
        name: "malla_steering_syns_total",
        help: "New connections by what the kernel's programs decided, and why.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
    Family {
        name: "malla_steering_packets_total",
        help: "Packets that the kernel's programs decided on one by one, and why.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
];

/// What became of a SYN or packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Sent to the agent.
    Steered,
    /// Let past the agent.
    Passed,
    /// Answered with a reset.
    Refused,
    /// Dropped without an answer.
    Dropped,
}

impl Verdict {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Steered => "steered",
            Self::Passed => "passed",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
        }
    }
}

/// What was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    Syns,
    Packets,
}

/// One counter of the kernel's programs, summed over processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelCount {
    pub unit: Unit,
    pub direction: Direction,
    pub verdict: Verdict,
    pub reason: Reason,
    pub value: u64,
}

/// Reads the kernel's counters. Called once a scrape, on the thread that serves it.
pub(super) type Source = Box<dyn Fn() -> Vec<KernelCount> + Send + Sync>;

/// The place of the [`Source`], empty until the programs are loaded.
#[derive(Default)]
pub(super) struct Slot(pub Option<Source>);

impl Slot {
    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let counts = self.0.as_ref().map(|read| read()).unwrap_or_default();
        [Unit::Syns, Unit::Packets]
            .into_iter()
            .zip(FAMILIES)
            .map(|(unit, family)| {
                let of_unit = counts.iter().filter(|count| count.unit == unit);
                let samples = of_unit.map(|count| {
                    let labels = vec![
                        label("direction", count.direction.as_str()),
                        label("reason", count.reason.as_str()),
                        label("verdict", count.verdict.as_str()),
                    ];
                    family.sample(labels, count.value)
                });
                family.with(samples.collect())
            })
            .collect()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").field(&self.0.is_some()).finish()
    }
}
