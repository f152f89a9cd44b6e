//! What the user gets to see.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{
    machine::Machine,
    results::{Results, Row},
    scenario::Scenario,
};

/// Ratios that are shown, where both scenarios ran.
const RATIOS: [(Scenario, Scenario); 4] = [
    (Scenario::HaproxyTcpMtls, Scenario::Direct),
    (Scenario::Malla, Scenario::Direct),
    (Scenario::Malla, Scenario::HaproxyTcpMtls),
    (Scenario::FloodMeshed, Scenario::FloodUnmeshed),
];

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

/// Without acceleration.
const GOALS: [Goal; 3] = [
    Goal {
        row: Row::Requests32,
        of: Scenario::Malla,
        beside: Scenario::Direct,
        bound: Bound::AtLeast(0.80),
    },
    Goal {
        row: Row::Cpu,
        of: Scenario::Malla,
        beside: Scenario::HaproxyTcpMtls,
        bound: Bound::AtMost(0.75),
    },
    Goal {
        row: Row::FloodHigh,
        of: Scenario::FloodMeshed,
        beside: Scenario::FloodUnmeshed,
        bound: Bound::AtMost(2.0),
    },
];

/// Medians, ratios, and which goals are met.
pub(super) fn table(results: &Results, scenarios: &[Scenario]) -> String {
    let ratios = ratios(scenarios);
    let mut text = format!("{:34}", "medians");
    for scenario in scenarios {
        text += &format!("{scenario:>18}");
    }
    for (of, to) in &ratios {
        text += &format!("{:>17}", format!("{}/{}", short(*of), short(*to)));
    }
    text.push('\n');
    let has_figure = |row: &Row| {
        let mut scenarios = scenarios.iter();
        scenarios.any(|scenario| results.median(*scenario, *row).is_some())
    };
    for row in Row::ALL.into_iter().filter(has_figure) {
        text += &format!("{:34}", row.title());
        for scenario in scenarios {
            let figure = results.median(*scenario, row);
            let figure = figure.map_or_else(|| "-".to_owned(), |figure| row.show(figure));
            text += &format!("{figure:>18}");
        }
        for (of, to) in &ratios {
            let ratio = results.ratio(*of, *to, row);
            let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            text += &format!("{ratio:>17}");
        }
        text.push('\n');
    }
    for scenario in scenarios {
        let errors = results.errors(*scenario);
        if errors > 0 {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{scenario}: {errors} connections or answers failed");
        }
    }
    for goal in GOALS {
        if let Some(ratio) = results.ratio(goal.of, goal.beside, goal.row) {
            text += &goal.line(ratio);
        }
    }
    text
}

/// All figures of all rounds, in the units that the keys name.
pub(super) fn json(
    machine: &Machine,
    free: bool,
    results: &Results,
    scenarios: &[Scenario],
) -> String {
    let mut all = Map::new();
    for scenario in scenarios {
        let mut rows = Map::new();
        for row in Row::ALL {
            let (median, rounds) = (
                results.median(*scenario, row),
                results.rounds(*scenario, row),
            );
            rows.insert(
                row.key().to_owned(),
                json!({"median": median, "rounds": rounds}),
            );
        }
        rows.insert("errors".to_owned(), results.errors(*scenario).into());
        all.insert(scenario.name().to_owned(), rows.into());
    }
    let mut compared = Map::new();
    for (of, to) in ratios(scenarios) {
        let rows = Row::ALL.map(|row| (row.key().to_owned(), json!(results.ratio(of, to, row))));
        compared.insert(
            format!("{of}/{to}"),
            Value::Object(rows.into_iter().collect()),
        );
    }
    let document = json!({
        "machine": machine.json(),
        "pinned": !free,
        "scenarios": all,
        "ratios": compared,
    });
    format!("{document:#}\n")
}

fn ratios(scenarios: &[Scenario]) -> Vec<(Scenario, Scenario)> {
    let mut ratios = RATIOS.to_vec();
    ratios.retain(|(of, to)| scenarios.contains(of) && scenarios.contains(to));
    ratios
}

fn short(scenario: Scenario) -> &'static str {
    match scenario {
        Scenario::FloodMeshed => "meshed",
        Scenario::FloodUnmeshed => "unmeshed",
        other => other.name().split('-').next().unwrap_or_default(),
    }
}

impl Goal {
    fn line(self, ratio: f64) -> String {
        let Self {
            row, beside, bound, ..
        } = self;
        let (word, bound, shortfall) = match bound {
            Bound::AtLeast(bound) => ("at least", bound, 1.0 - ratio / bound),
            Bound::AtMost(bound) => ("at most", bound, ratio / bound - 1.0),
        };
        let verdict = if shortfall <= 0.0 {
            "met".to_owned()
        } else {
            format!("MISSED by {:.0} %", shortfall * 100.0)
        };
        let title = row.title();
        format!("goal: {title}, {word} {bound:.2} of {beside}'s: {ratio:.2}, {verdict}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_says_by_how_much_it_is_missed() {
        let [rate, cpu, _] = GOALS;
        assert!(rate.line(0.84).ends_with("0.84, met\n"));
        assert!(rate.line(0.60).ends_with("0.60, MISSED by 25 %\n"));
        assert!(cpu.line(0.75).ends_with("0.75, met\n"));
        assert!(cpu.line(0.90).ends_with("0.90, MISSED by 20 %\n"));
    }
}
