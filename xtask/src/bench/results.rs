//! The figures of all turns, and what is made of them.

use std::collections::BTreeMap;

use super::scenario::Scenario;

/// One kind of figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    Requests1,
    Requests32,
    Requests256,
    LatencyMedian,
    LatencyHigh,
    Http2,
    NewConnections,
    Bulk1,
    Bulk4,
    RequestCpu,
    BulkCpu,
    IdleMemory,
    ConnectionMemory,
    PodMemory,
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
    pub(super) const ALL: [Self; 23] = [
        Self::Requests1,
        Self::Requests32,
        Self::Requests256,
        Self::LatencyMedian,
        Self::LatencyHigh,
        Self::Http2,
        Self::NewConnections,
        Self::Bulk1,
        Self::Bulk4,
        Self::RequestCpu,
        Self::BulkCpu,
        Self::IdleMemory,
        Self::ConnectionMemory,
        Self::PodMemory,
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

    /// Its name in JSON, the unit of its figures, and its title in the table.
    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Requests1 => ("rps_1", "requests/s, 1 connection"),
            Self::Requests32 => ("rps_32", "requests/s, 32 connections"),
            Self::Requests256 => ("rps_256", "requests/s, 256 connections"),
            Self::LatencyMedian => ("p50_us", "us at 2,000 requests/s, median"),
            Self::LatencyHigh => ("p99_us", "  99th percentile"),
            Self::Http2 => ("h2_rps", "HTTP/2 requests/s, 8 x 32 streams"),
            Self::NewConnections => ("conn_per_s", "new connections/s"),
            Self::Bulk1 => ("iperf_1", "Gbit/s, 1 stream"),
            Self::Bulk4 => ("iperf_4", "Gbit/s, 4 streams"),
            Self::RequestCpu => ("cpu_s_per_100k", "proxies' CPU s per 100k requests"),
            Self::BulkCpu => ("cpu_s_per_10gb", "proxies' CPU s per 10 GB"),
            Self::IdleMemory => ("rss_idle_kib", "proxies' memory idle, KiB"),
            Self::ConnectionMemory => ("kib_per_conn", "  per idle connection, KiB"),
            Self::PodMemory => ("kib_per_pod", "  per meshed pod, KiB"),
            Self::EnrolMedian => ("enrol_ms", "ms to enrol a pod, median"),
            Self::EnrolHigh => ("enrol_p99_ms", "  99th percentile"),
            Self::JoinMedian => ("join_ms", "ms from file to steered, median"),
            Self::JoinHigh => ("join_p99_ms", "  99th percentile"),
            Self::Start => ("start_s", "s to start with 200 pods"),
            Self::RestartKilled => ("restart_killed_s", "s to serve 200 after kill -9"),
            Self::RestartStopped => ("restart_stopped_s", "s to serve 200 after SIGTERM"),
            Self::ComeAndGo => ("pods_per_s", "pods/s come and go, of 50"),
            Self::FloodHigh => ("flood_p99_ms", "ms to answer beside a flood, p99"),
        }
    }

    pub(super) const fn key(self) -> &'static str {
        self.names().0
    }

    /// Its title in the table, where one that begins with spaces goes on with the line above.
    pub(super) const fn title(self) -> &'static str {
        self.names().1
    }

    /// A title that stands alone.
    pub(super) const fn full_title(self) -> &'static str {
        match self {
            Self::LatencyHigh => "us at 2,000 requests/s, p99",
            other => other.title(),
        }
    }
}

/// A figure with as many digits as mean something.
pub(super) fn show(figure: f64) -> String {
    match figure.abs() {
        100.0.. => format!("{figure:.0}"),
        10.0.. => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
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

    /// Takes over what another part of the turn has shown.
    pub(super) fn extend(&mut self, other: Self) {
        self.figures.extend(other.figures);
        self.errors += other.errors;
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

    /// The lowest and the highest figure of a scenario's rounds.
    pub(super) fn range(&self, scenario: Scenario, row: Row) -> Option<(f64, f64)> {
        let figures = self.rounds(scenario, row).into_iter().flatten();
        figures.fold(None, |range, figure| {
            let (low, high) = range.unwrap_or((figure, figure));
            Some((figure.min(low), figure.max(high)))
        })
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
        let missing = results.ratio(Scenario::Malla, Scenario::Direct, Row::RequestCpu);
        assert_eq!(missing, None);
        let range = results.range(Scenario::Direct, Row::Requests32);
        assert_eq!(range, Some((50.0, 100.0)));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median([4.0, 1.0, 2.0, 9.0].into_iter()), Some(3.0));
        assert_eq!(median([].into_iter()), None);
    }
}
