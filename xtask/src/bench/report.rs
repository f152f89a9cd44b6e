//! What the user gets to see.

use std::fmt::Write;

use serde_json::{Map, json};

use super::{
    machine::Machine,
    results::{Results, Row, show},
    scenario::Scenario,
};

/// A ratio that malla shall reach.
#[derive(Debug, Clone, Copy)]
struct Goal {
    row: Row,
    of: Scenario,
    beside: Scenario,
    bound: Bound,
}

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

const fn at_least(row: Row, of: Scenario, beside: Scenario, bound: f64) -> Goal {
    Goal {
        row,
        of,
        beside,
        bound: Bound::AtLeast(bound),
    }
}

const fn at_most(row: Row, of: Scenario, beside: Scenario, bound: f64) -> Goal {
    Goal {
        row,
        of,
        beside,
        bound: Bound::AtMost(bound),
    }
}

/// What malla shall reach beside its peers, and what it shall cost at most.
fn goals() -> Vec<Goal> {
    use Row::{
        Bulk1, BulkCpu, FloodHigh, Http2, LatencyHigh, LatencyMedian, NewConnections, RequestCpu,
        Requests32, Requests256,
    };
    use Scenario::{
        Direct, DirectSameNode, FloodMeshed, FloodUnmeshed, HaproxyTcpMtls, Malla, MallaFull,
        MallaSameNode, MallaSameNodeFull,
    };
    vec![
        at_least(Requests32, Malla, Direct, 0.90),
        at_least(Requests256, Malla, Direct, 0.90),
        at_most(RequestCpu, Malla, HaproxyTcpMtls, 0.60),
        at_most(LatencyMedian, Malla, HaproxyTcpMtls, 0.85),
        at_most(LatencyHigh, Malla, HaproxyTcpMtls, 0.85),
        at_least(Bulk1, Malla, Direct, 0.43),
        at_most(BulkCpu, Malla, HaproxyTcpMtls, 0.50),
        at_least(NewConnections, Malla, Direct, 0.95),
        at_least(Http2, Malla, Direct, 1.0),
        at_least(Requests32, MallaSameNode, DirectSameNode, 1.0),
        at_least(Requests256, MallaSameNode, DirectSameNode, 1.0),
        at_most(RequestCpu, MallaSameNode, HaproxyTcpMtls, 0.35),
        at_most(LatencyMedian, MallaSameNode, HaproxyTcpMtls, 0.60),
        at_most(LatencyHigh, MallaSameNode, HaproxyTcpMtls, 0.60),
        at_least(Bulk1, MallaSameNode, DirectSameNode, 0.80),
        at_most(BulkCpu, MallaSameNode, HaproxyTcpMtls, 0.20),
        at_least(NewConnections, MallaSameNode, DirectSameNode, 0.95),
        at_least(Http2, MallaSameNode, DirectSameNode, 1.0),
        at_least(Requests32, MallaFull, Direct, 1.15),
        at_least(Requests256, MallaFull, Direct, 1.15),
        at_most(RequestCpu, MallaFull, HaproxyTcpMtls, 0.50),
        at_least(NewConnections, MallaFull, Direct, 0.90),
        at_least(Requests32, MallaSameNodeFull, DirectSameNode, 1.40),
        at_least(Requests256, MallaSameNodeFull, DirectSameNode, 1.40),
        at_most(RequestCpu, MallaSameNodeFull, HaproxyTcpMtls, 0.25),
        at_least(NewConnections, MallaSameNodeFull, DirectSameNode, 0.90),
        at_most(FloodHigh, FloodMeshed, FloodUnmeshed, 2.0),
    ]
}

/// Most that malla's agents shall take of memory, in KiB.
const MEMORY: [(Row, f64); 3] = [
    (Row::IdleMemory, 12.0 * 1024.0),
    (Row::ConnectionMemory, 4.0),
    (Row::PodMemory, 100.0),
];

/// A line for each row that has figures and a column for each scenario: medians, and what they are
/// beside nothing between as many nodes, and beside haproxy. Then which goals are met.
pub(super) fn table(results: &Results, scenarios: &[Scenario]) -> String {
    let mut text = block("medians", scenarios, |scenario, row| {
        results.median(scenario, row)
    });
    text += &block("/ direct", scenarios, |scenario, row| {
        beside(results, scenario, scenario.direct(), row)
    });
    text += &block("/ haproxy", scenarios, |scenario, row| {
        beside(results, scenario, Scenario::HaproxyTcpMtls, row)
    });
    for scenario in scenarios {
        let errors = results.errors(*scenario);
        if errors > 0 {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{scenario}: {errors} connections or answers failed");
        }
    }
    for goal in goals() {
        if let Some(ratio) = results.ratio(goal.of, goal.beside, goal.row) {
            text += &goal.line(ratio);
        }
    }
    for (row, bound) in MEMORY {
        if let Some(figure) = results.median(Scenario::Malla, row) {
            let verdict = verdict(figure / bound - 1.0);
            let (title, figure) = (row.title().trim(), show(figure));
            text += &format!("goal: {title}, at most {bound:.0}: {figure}, {verdict}\n");
        }
    }
    text
}

/// Lines and columns without any figure are left out.
fn block(
    title: &str,
    scenarios: &[Scenario],
    figure: impl Fn(Scenario, Row) -> Option<f64>,
) -> String {
    let has_row = |row: &Row| scenarios.iter().any(|s| figure(*s, *row).is_some());
    let rows: Vec<Row> = Row::ALL.into_iter().filter(has_row).collect();
    let has_column = |s: &&Scenario| rows.iter().any(|row| figure(**s, *row).is_some());
    let columns: Vec<Scenario> = scenarios.iter().filter(has_column).copied().collect();
    if columns.is_empty() {
        return String::new();
    }
    let mut text = format!("{title:34}");
    for scenario in &columns {
        text += &format!("  {scenario}");
    }
    text.push('\n');
    for row in rows {
        text += &format!("{:34}", row.title());
        for scenario in &columns {
            let figure = figure(*scenario, row).map_or_else(|| "-".to_owned(), show);
            let width = scenario.name().len().max(2) + 2;
            text += &format!("{figure:>width$}");
        }
        text.push('\n');
    }
    text.push('\n');
    text
}

/// The ratio of two scenarios that aren't the same.
fn beside(results: &Results, of: Scenario, to: Scenario, row: Row) -> Option<f64> {
    (of != to).then(|| results.ratio(of, to, row))?
}

/// All figures, in the units that the keys name.
pub(super) fn json(
    machine: &Machine,
    free: bool,
    results: &Results,
    scenarios: &[Scenario],
) -> String {
    let mut all = Map::new();
    for &scenario in scenarios {
        let mut rows = Map::new();
        for row in Row::ALL {
            let range = results.range(scenario, row);
            let Some((median, (min, max))) = results.median(scenario, row).zip(range) else {
                continue;
            };
            let figures = json!({
                "median": median,
                "min": min,
                "max": max,
                "rounds": results.rounds(scenario, row),
                "vs_direct": beside(results, scenario, scenario.direct(), row),
                "vs_haproxy": beside(results, scenario, Scenario::HaproxyTcpMtls, row),
            });
            rows.insert(row.key().to_owned(), figures);
        }
        rows.insert("errors".to_owned(), results.errors(scenario).into());
        all.insert(scenario.name().to_owned(), rows.into());
    }
    let document = json!({"machine": machine.json(), "pinned": !free, "scenarios": all});
    format!("{document:#}\n")
}

impl Goal {
    fn line(self, ratio: f64) -> String {
        let Self {
            row,
            of,
            beside,
            bound,
        } = self;
        let (word, bound, shortfall) = match bound {
            Bound::AtLeast(bound) => ("at least", bound, 1.0 - ratio / bound),
            Bound::AtMost(bound) => ("at most", bound, ratio / bound - 1.0),
        };
        let (title, verdict) = (row.full_title(), verdict(shortfall));
        format!("goal: {of}: {title}, {word} {bound:.2} of {beside}'s: {ratio:.2}, {verdict}\n")
    }
}

fn verdict(shortfall: f64) -> String {
    if shortfall <= 0.0 {
        "met".to_owned()
    } else {
        format!("MISSED by {:.0} %", shortfall * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::bench::results::Outcome;

    #[test]
    fn a_goal_says_by_how_much_it_is_missed() {
        let rate = at_least(Row::Requests32, Scenario::Malla, Scenario::Direct, 0.80);
        let cpu = at_most(
            Row::RequestCpu,
            Scenario::Malla,
            Scenario::HaproxyTcpMtls,
            0.75,
        );
        assert!(rate.line(0.84).ends_with("0.84, met\n"));
        assert!(rate.line(0.60).ends_with("0.60, MISSED by 25 %\n"));
        assert!(cpu.line(0.75).ends_with("0.75, met\n"));
        assert!(cpu.line(0.90).ends_with("0.90, MISSED by 20 %\n"));
    }

    #[test]
    fn each_figure_stands_beside_direct_of_as_many_nodes_and_haproxy() {
        let mut results = Results::default();
        for (scenario, rate) in [
            (Scenario::Direct, 100.0),
            (Scenario::DirectSameNode, 200.0),
            (Scenario::HaproxyTcpMtls, 50.0),
            (Scenario::MallaSameNode, 150.0),
        ] {
            let mut outcome = Outcome::default();
            outcome.set(Row::Requests32, rate);
            results.add(scenario, Some(outcome));
        }
        let scenarios = [
            Scenario::Direct,
            Scenario::DirectSameNode,
            Scenario::HaproxyTcpMtls,
            Scenario::MallaSameNode,
        ];
        let text = json(&Machine::default(), false, &results, &scenarios);
        let document: Value = serde_json::from_str(&text).unwrap();
        let row = |scenario: &str| document["scenarios"][scenario]["rps_32"].clone();
        assert_eq!(row("malla-same-node")["vs_direct"], json!(0.75));
        assert_eq!(row("malla-same-node")["vs_haproxy"], json!(3.0));
        assert_eq!(row("haproxy-tcp-mtls")["vs_direct"], json!(0.5));
        assert_eq!(row("direct")["vs_direct"], Value::Null);
        let table = table(&results, &scenarios);
        let line = |text: &str| table.lines().filter(|l| l.starts_with(text)).count();
        assert_eq!(line("requests/s, 32 connections"), 3, "{table}");
        assert!(!table.contains("Gbit/s"), "{table}");
    }
}
