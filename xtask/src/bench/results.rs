//! The figures of all turns, and what is made of them.

use std::collections::BTreeMap;

use super::scenario::Scenario;

/// One kind of figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    Requests32,
    Requests256,
    NewConnections,
    Bulk,
    Cpu,
    IdleMemory,
    ConnectionMemory,
    EnrolMedian,
    EnrolHigh,
    JoinMedian,
    JoinHigh,
    Start,
    RestartKilled,
    RestartStopped,
    ComeAndGo,
    FloodHigh,
}

impl Row {
    pub(super) const ALL: [Self; 16] = [
        Self::Requests32,
        Self::Requests256,
        Self::NewConnections,
        Self::Bulk,
        Self::Cpu,
        Self::IdleMemory,
        Self::ConnectionMemory,
        Self::EnrolMedian,
        Self::EnrolHigh,
        Self::JoinMedian,
        Self::JoinHigh,
        Self::Start,
        Self::RestartKilled,
        Self::RestartStopped,
        Self::ComeAndGo,
        Self::FloodHigh,
    ];

    /// Its name in JSON, with its unit.
    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::Requests32 => "requests_per_second_32_connections",
            Self::Requests256 => "requests_per_second_256_connections",
            Self::NewConnections => "new_connections_per_second",
            Self::Bulk => "gigabits_per_second_one_stream",
            Self::Cpu => "proxies_cpu_seconds_per_100k_requests",
            Self::IdleMemory => "proxies_idle_bytes",
            Self::ConnectionMemory => "proxies_bytes_per_idle_connection",
            Self::EnrolMedian => "enrolment_milliseconds_median",
            Self::EnrolHigh => "enrolment_milliseconds_p99",
            Self::JoinMedian => "file_changed_to_steered_milliseconds_median",
            Self::JoinHigh => "file_changed_to_steered_milliseconds_p99",
            Self::Start => "seconds_to_ready_with_200_pods",
            Self::RestartKilled => "seconds_to_serve_200_pods_after_kill",
            Self::RestartStopped => "seconds_to_serve_200_pods_after_stop",
            Self::ComeAndGo => "pods_per_second_come_and_go",
            Self::FloodHigh => "answer_milliseconds_p99_beside_a_flood",
        }
    }

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Requests32 => "requests/s, 32 connections",
            Self::Requests256 => "requests/s, 256 connections",
            Self::NewConnections => "new connections/s",
            Self::Bulk => "Gbit/s, one stream",
            Self::Cpu => "proxies' CPU s per 100k requests",
            Self::IdleMemory => "proxies' memory idle, MiB",
            Self::ConnectionMemory => "  per idle connection, KiB",
            Self::EnrolMedian => "ms to enrol a pod, median",
            Self::JoinMedian => "ms from file to steered, median",
            Self::EnrolHigh | Self::JoinHigh => "  99th percentile",
            Self::Start => "s to start with 200 pods",
            Self::RestartKilled => "s to serve 200 after kill -9",
            Self::RestartStopped => "s to serve 200 after SIGTERM",
            Self::ComeAndGo => "pods/s come and go, of 50",
            Self::FloodHigh => "ms to answer beside a flood, p99",
        }
    }

    /// A figure in the unit of the title.
    pub(super) fn show(self, figure: f64) -> String {
        match self {
            Self::Requests32 | Self::Requests256 | Self::NewConnections => format!("{figure:.0}"),
            Self::Bulk | Self::Cpu | Self::Start | Self::RestartKilled | Self::RestartStopped => {
                format!("{figure:.2}")
            }
            Self::EnrolMedian
            | Self::EnrolHigh
            | Self::JoinMedian
            | Self::JoinHigh
            | Self::ComeAndGo
            | Self::FloodHigh => format!("{figure:.1}"),
            Self::IdleMemory => format!("{:.1}", figure / 1024.0 / 1024.0),
            Self::ConnectionMemory => format!("{:.1}", figure / 1024.0),
        }
    }
}

/// What one turn has shown.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    figures: BTreeMap<Row, f64>,
    /// Connections and answers that failed under load.
    pub(super) errors: u64,
}

impl Outcome {
    pub(super) fn set(&mut self, row: Row, figure: f64) {
        self.figures.insert(row, figure);
    }
}

/// What all turns have shown: for each scenario one entry a round, none where it failed.
#[derive(Debug, Default)]
pub(super) struct Results(BTreeMap<Scenario, Vec<Option<Outcome>>>);

impl Results {
    pub(super) fn add(&mut self, scenario: Scenario, outcome: Option<Outcome>) {
        self.0.entry(scenario).or_default().push(outcome);
    }

    /// The number of turns that failed.
    pub(super) fn failures(&self) -> usize {
        let turns = self.0.values().flatten();
        turns.filter(|outcome| outcome.is_none()).count()
    }

    /// Connections and answers of a scenario that failed under load, in all rounds.
    pub(super) fn errors(&self, scenario: Scenario) -> u64 {
        let turns = self.0.get(&scenario).into_iter().flatten();
        turns.flatten().map(|outcome| outcome.errors).sum()
    }

    /// A scenario's figure in each round.
    pub(super) fn rounds(&self, scenario: Scenario, row: Row) -> Vec<Option<f64>> {
        let turns = self.0.get(&scenario).into_iter().flatten();
        turns
            .map(|outcome| outcome.as_ref()?.figures.get(&row).copied())
            .collect()
    }

    pub(super) fn median(&self, scenario: Scenario, row: Row) -> Option<f64> {
        median(self.rounds(scenario, row).into_iter().flatten())
    }

    /// The median of the rounds' ratios: what both had in common in a round falls out.
    pub(super) fn ratio(&self, of: Scenario, to: Scenario, row: Row) -> Option<f64> {
        let pairs = self.rounds(of, row).into_iter().zip(self.rounds(to, row));
        let ratios = pairs.filter_map(|(of, to)| Some(of? / to?));
        median(ratios.filter(|ratio| ratio.is_finite()))
    }
}

pub(super) fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    let upper = figures.get(middle)?;
    if figures.len() % 2 == 1 {
        return Some(*upper);
    }
    Some(f64::midpoint(figures[middle - 1], *upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(rate: f64) -> Outcome {
        let mut outcome = Outcome::default();
        outcome.set(Row::Requests32, rate);
        outcome
    }

    #[test]
    fn a_ratio_compares_within_rounds_and_leaves_failed_ones_out() {
        let mut results = Results::default();
        // The machine is half as fast in the second round, and in the third one turn fails.
        for (direct, malla) in [(100.0, Some(80.0)), (50.0, Some(42.0)), (100.0, None)] {
            results.add(Scenario::Direct, Some(outcome(direct)));
            results.add(Scenario::Malla, malla.map(outcome));
        }
        let ratio = results.ratio(Scenario::Malla, Scenario::Direct, Row::Requests32);
        assert!((ratio.unwrap() - 0.82).abs() < 1e-9, "{ratio:?}");
        assert_eq!(results.failures(), 1);
        let missing = results.ratio(Scenario::Malla, Scenario::Direct, Row::Cpu);
        assert_eq!(missing, None);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median([4.0, 1.0, 2.0, 9.0].into_iter()), Some(3.0));
        assert_eq!(median([].into_iter()), None);
    }
}
