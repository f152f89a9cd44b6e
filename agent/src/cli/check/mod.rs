//! `malla check`: each thing that must hold on this machine and in the running agent, with the fix
//! beside what doesn't. In the layout of `linkerd check`.
//!
//! `machine` looks at the machine, `running` judges what the agent says; both give categories of
//! plain data, which are printed here.

mod machine;
mod running;

use std::{fmt, process::ExitCode, time::SystemTime};

use serde::Serialize;

use super::{
    Output,
    client::{Client, Location},
    mesh,
    metrics::Metrics,
    print, print_json,
    style::{Sign, Style},
    view::Config,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Location,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Checks of one kind.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Category {
    #[serde(rename = "categoryName")]
    name: &'static str,
    checks: Vec<Check>,
}

/// One thing that must hold.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    /// What must hold.
    description: String,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Whether it holds. A warning is what doesn't keep pods from being served, or not yet.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "lowercase")]
enum Outcome {
    Success,
    Warning(Fault),
    Error(Fault),
}

/// Why something doesn't hold.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Fault {
    #[serde(rename = "error")]
    reason: String,
    #[serde(rename = "hint")]
    fix: String,
}

impl Check {
    fn good(description: impl Into<String>) -> Self {
        Self {
            description: description.into(),
            outcome: Outcome::Success,
        }
    }

    fn warning(
        description: impl Into<String>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::faulty(Outcome::Warning, description, reason, fix)
    }

    fn error(
        description: impl Into<String>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::faulty(Outcome::Error, description, reason, fix)
    }

    fn faulty(
        outcome: fn(Fault) -> Outcome,
        description: impl Into<String>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let (reason, fix) = (reason.into(), fix.into());
        Self {
            description: description.into(),
            outcome: outcome(Fault { reason, fix }),
        }
    }

    /// An agent's errors say what is wrong, a colon, and the fix.
    fn of(description: impl Into<String>, result: Result<(), impl fmt::Display>) -> Self {
        match result {
            Ok(()) => Self::good(description),
            Err(error) => {
                let error = error.to_string();
                let (reason, fix) = error.split_once(": ").unwrap_or((&error, ""));
                Self::error(description, reason, fix)
            }
        }
    }

    fn sign(&self) -> Sign {
        match self.outcome {
            Outcome::Success => Sign::Good,
            Outcome::Warning(_) => Sign::Warning,
            Outcome::Error(_) => Sign::Bad,
        }
    }
}

/// What could be had of the running agent.
struct Running {
    client: anyhow::Result<Client>,
    config: anyhow::Result<Config>,
    metrics: Metrics,
    /// What it waits for before it is ready, a line each; None where it is.
    unready: Option<String>,
}

impl Running {
    fn ask(location: &Location) -> Self {
        let client = location.client();
        let (config, metrics, unready) = match &client {
            Ok(client) => {
                let ready = client.get("/ready").ok();
                (
                    client.config(),
                    client.metrics().unwrap_or_default(),
                    ready
                        .filter(|answer| answer.status != 200)
                        .map(|answer| answer.body),
                )
            }
            Err(error) => (Err(anyhow::anyhow!("{error:#}")), Metrics::default(), None),
        };
        Self {
            client,
            config,
            metrics,
            unready,
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let running = Running::ask(&arguments.agent);
    let told = running.config.as_ref().ok();
    let path = arguments.agent.config.clone().or_else(|| {
        // Relative to the agent's folder, which may be another.
        told.map(|config| config.mesh.path.clone())
            .filter(|path| path.is_absolute())
    });
    let mesh = path.as_deref().map(mesh::read);
    let name = arguments.agent.node.as_deref();
    let name = name.or(told.map(|config| config.node.as_str()));
    let mut categories = machine::categories(path.as_deref(), mesh.as_ref(), name);
    let lifetime = mesh
        .and_then(Result::ok)
        .map(|mesh| mesh.identity.certificate_lifetime);
    categories.extend(running::categories(&running, lifetime, SystemTime::now()));
    let holds = categories
        .iter()
        .flat_map(|category| &category.checks)
        .all(|check| check.sign() != Sign::Bad);
    match arguments.output {
        Output::Json => print_json(&serde_json::json!({
            "success": holds,
            "categories": categories,
        }))?,
        Output::Table => print(&render(&categories, holds, Style::of_stdout()))?,
    };
    Ok(if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn render(categories: &[Category], holds: bool, style: Style) -> String {
    let mut text = String::new();
    for category in categories {
        text.push_str(&format!(
            "{}\n{}\n",
            category.name,
            "-".repeat(category.name.len())
        ));
        for check in &category.checks {
            text.push_str(&format!(
                "{} {}\n",
                style.sign(check.sign()),
                check.description
            ));
            if let Outcome::Warning(fault) | Outcome::Error(fault) = &check.outcome {
                let lines = fault.reason.lines();
                text.extend(lines.map(|line| format!("    {line}\n")));
                if !fault.fix.is_empty() {
                    text.push_str(&format!("    fix: {}\n", fault.fix));
                }
            }
        }
        text.push('\n');
    }
    let sign = style.sign(if holds { Sign::Good } else { Sign::Bad });
    text.push_str(&format!("Status check results are {sign}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_printed_as_linkerd_does_with_reason_and_fix_below() {
        let missing: Result<(), &str> = Err("the kernel has no BTF: use another kernel");
        let categories = [
            Category {
                name: "kernel",
                checks: vec![
                    Check::good("is 6.1 or later"),
                    Check::of("has BTF", missing),
                ],
            },
            Category {
                name: "clock",
                checks: vec![Check::warning(
                    "is synchronised",
                    "it isn't",
                    "start chrony",
                )],
            },
        ];
        assert_eq!(
            render(&categories, false, Style::PLAIN),
            "kernel\n\
             ------\n\
             √ is 6.1 or later\n\
             × has BTF\n    the kernel has no BTF\n    fix: use another kernel\n\
             \n\
             clock\n\
             -----\n\
             ‼ is synchronised\n    it isn't\n    fix: start chrony\n\
             \n\
             Status check results are ×\n"
        );
    }

    #[test]
    fn the_json_has_linkerds_keys() {
        let check = Check::error("has BTF", "it has none", "use another kernel");
        assert_eq!(
            serde_json::to_value(&check).unwrap(),
            serde_json::json!({
                "description": "has BTF",
                "result": "error",
                "error": "it has none",
                "hint": "use another kernel",
            })
        );
    }
}
