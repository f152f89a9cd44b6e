//! `malla diagnostics`: what the agent says, as it says it.

use std::process::ExitCode;

use clap::Subcommand;

use super::{
    Output,
    client::Location,
    print, print_json,
    table::{Align, Table},
    view::{Ledger, Sockets},
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// The agent's metrics, in Prometheus' text format.
    #[command(visible_alias = "proxy-metrics")]
    Metrics(Location),
    /// What the agent believes, as JSON.
    Config(Location),
    /// The agent's sockets and tasks of each pod, beside what the kernel lists.
    Ledger(LedgerArguments),
}

#[derive(Debug, clap::Args)]
pub(super) struct LedgerArguments {
    #[command(flatten)]
    agent: Location,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(super) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Metrics(agent) => print(&agent.client()?.text("/metrics")?),
        Command::Config(agent) => print(&agent.client()?.text("/config")?),
        Command::Ledger(arguments) => {
            let agent = arguments.agent.client()?;
            if arguments.output == Output::Json {
                // As the agent has it, with what this version of the program doesn't know.
                let mut config: serde_json::Value = serde_json::from_str(&agent.text("/config")?)?;
                return print_json(&config["ledger"].take());
            }
            print(&ledger(&agent.config()?.ledger))
        }
    }
}

fn ledger(ledger: &Ledger) -> String {
    if let Some(failure) = &ledger.failure {
        return format!("the kernel couldn't be asked: {failure}\n");
    }
    let mut pods = Table::new([
        ("WORKLOAD", Align::Left),
        ("TASKS", Align::Right),
        ("LISTENERS", Align::Right),
        ("KERNEL", Align::Right),
        ("CONNECTIONS", Align::Right),
        ("KERNEL", Align::Right),
        ("CLOSED", Align::Right),
    ]);
    for pod in &ledger.workloads {
        let kernel = |number: fn(Sockets) -> usize| {
            pod.kernel
                .map_or_else(String::new, |sockets| number(sockets).to_string())
        };
        pods.row([
            pod.workload.clone(),
            pod.tasks.to_string(),
            pod.believed.listeners.to_string(),
            kernel(|sockets| sockets.listeners),
            pod.believed.connections.to_string(),
            kernel(|sockets| sockets.connections),
            pod.closed.to_string(),
        ]);
    }
    let mut kinds = Table::new([("DESCRIPTORS", Align::Left), ("OPEN", Align::Right)]);
    for (kind, open) in &ledger.descriptors.entered {
        kinds.row([kind.clone(), open.to_string()]);
    }
    let from_start: usize = ledger.descriptors.from_start.values().sum();
    kinds.row(["from the start".to_owned(), from_start.to_string()]);
    let open = ledger.descriptors.open;
    kinds.row(["all, as the kernel has them".to_owned(), open.to_string()]);
    let mut text = pods.render() + "\n" + &kinds.render();
    if !ledger.differences.is_empty() {
        let mut differences = Table::new([
            ("DIFFERENCE", Align::Left),
            ("KIND", Align::Left),
            ("WORKLOAD", Align::Left),
            ("DESCRIPTOR", Align::Right),
            ("SECONDS", Align::Right),
        ]);
        for difference in &ledger.differences {
            differences.row([
                difference.how.clone(),
                difference.kind.clone(),
                difference.workload.clone().unwrap_or_default(),
                difference.descriptor.to_string(),
                difference.for_seconds.to_string(),
            ]);
        }
        text.push('\n');
        text.push_str(&differences.render());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_stands_beside_the_kernel() {
        let told: Ledger = serde_json::from_value(serde_json::json!({
            "descriptors": {"open": 30, "entered": {"listener": 6, "tunnel_inbound": 1},
                "fromStart": {"eventfd": 3, "bpf": 20}},
            "workloads": [{"workload": "default/web", "tasks": 7,
                "believed": {"listeners": 6, "connections": 1},
                "kernel": {"listeners": 6, "connections": 1}, "closed": 0}],
            "differences": [{"difference": "orphaned", "kind": "tunnel_inbound",
                "workload": null, "descriptor": 40, "forSeconds": 12}],
        }))
        .unwrap();
        assert_eq!(
            ledger(&told),
            "WORKLOAD      TASKS   LISTENERS   KERNEL   CONNECTIONS   KERNEL   CLOSED\n\
             default/web       7           6        6             1        1        0\n\
             \n\
             DESCRIPTORS                   OPEN\n\
             listener                         6\n\
             tunnel_inbound                   1\n\
             from the start                  23\n\
             all, as the kernel has them     30\n\
             \n\
             DIFFERENCE   KIND             WORKLOAD   DESCRIPTOR   SECONDS\n\
             orphaned     tunnel_inbound   -                  40        12\n"
        );
    }
}
