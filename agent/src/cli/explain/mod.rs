//! `malla explain SRC DST:PORT`: what would happen to a connection and by which rule, and what
//! became of the last ones and why.
//!
//! The first comes from the mesh file (`decide`), the second from the agents of both nodes, as far
//! as they have sockets on this machine (`past`).

mod decide;
mod ends;
mod past;
mod probed;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::Context;
use malla_common::Reason;
use serde::Serialize;

use super::{
    Output,
    client::{Client, Location},
    mesh, print, print_json,
    style::{Sign, Style},
    table::{Align, Table},
    view::AccelerationInForce,
};
use crate::model::Mesh;
use decide::{AgentState, Decision, Outcome, Source, World};
use ends::{End, pair};
use past::{KernelRefusals, Past};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Who connects: a pod's NAME or NAMESPACE/NAME, an address, or `node` for the node of the
    /// destination, which probes come from.
    #[arg(value_name = "SRC")]
    source: String,
    /// To whom, and to which port: a Service's or pod's name or an address, such as voting:8080,
    /// emojivoto/voting:8080 or 10.1.0.2:80.
    #[arg(value_name = "DST:PORT")]
    destination: String,
    #[command(flatten)]
    agent: Location,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// All that is told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explanation {
    source: Told,
    destination: Told,
    #[serde(flatten)]
    decision: Decision,
    /// What the reason means.
    meaning: Option<&'static str>,
    /// By node.
    agents: BTreeMap<String, AgentState>,
    /// Of both ends' workloads, as far as their agents answer.
    acceleration: BTreeMap<String, AccelerationInForce>,
    past: Vec<Past>,
    kernel_refused: Vec<KernelRefusals>,
}

/// An end.
#[derive(Debug, Serialize)]
struct Told {
    name: String,
    address: String,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (mesh, asked) = known(&arguments.agent)?;
    let (destination, port) = End::parse_with_port(&mesh, &arguments.destination)?;
    let source = match arguments.source.as_str() {
        "node" => End::node_of(&mesh, &destination)?,
        source => End::parse(&mesh, source)?,
    };
    let (from, to) = pair(&source, &destination, port);

    let file = arguments.agent.config.as_deref();
    let clients = clients(&mesh, file, [&source, &destination], asked);
    let states: BTreeMap<String, AgentState> = clients
        .iter()
        .map(|(node, client)| (node.clone(), state(client)))
        .collect();
    let world = World {
        mesh: &mesh,
        agents: &|node| states.get(node).copied().unwrap_or(AgentState::Elsewhere),
    };
    let connects = Source {
        workload: source.workload.clone(),
        address: from,
    };
    let decision = world.decide(&connects, to);
    let mut past = Vec::new();
    let mut kernel_refused = Vec::new();
    let ids = [&source, &destination].map(|end| end.workload.as_ref().map(|it| it.id.to_string()));
    let mut acceleration = BTreeMap::new();
    for (node, client) in &clients {
        if states.get(node) == Some(&AgentState::Answers) {
            let (config, metrics) = (client.config()?, client.metrics()?);
            let ends = config.workloads.iter().cloned();
            let ends = ends.filter(|pod| ids.contains(&Some(pod.id.clone())));
            acceleration.extend(ends.map(|pod| (pod.id, pod.acceleration)));
            past.extend(past::of_pair(
                node,
                &config,
                &metrics,
                &source,
                &destination,
                port,
            ));
            kernel_refused.extend(past::kernel_refusals(node, &metrics));
        }
    }
    let explanation = Explanation {
        source: Told {
            name: source.name(),
            address: from.to_string(),
        },
        destination: Told {
            name: destination.name(),
            address: to.to_string(),
        },
        meaning: decision.reason.and_then(meaning),
        decision,
        agents: states,
        acceleration,
        past,
        kernel_refused,
    };
    match arguments.output {
        Output::Json => print_json(&explanation)?,
        Output::Table => print(&render(&explanation, SystemTime::now(), Style::of_stdout()))?,
    };
    let dead = clients
        .iter()
        .filter(|(node, _)| explanation.agents.get(*node) == Some(&AgentState::Dead));
    let mut code = ExitCode::SUCCESS;
    for (_, client) in dead {
        // Says which, and how to start it.
        let error = client.get("/live").err();
        let error = error.map_or_else(
            || "an agent died meanwhile".to_owned(),
            |e| format!("{e:#}"),
        );
        eprintln!("malla: {error}");
        code = ExitCode::FAILURE;
    }
    Ok(code)
}

/// The mesh, and the agent that is meant, where one is, with its node's name.
fn known(location: &Location) -> anyhow::Result<(Mesh, Option<(String, Client)>)> {
    if let Some(path) = &location.config {
        return Ok((mesh::read(path)?, None));
    }
    let client = location.client()?;
    let config = client
        .config()
        .context("without an agent, the mesh file has to be named with --config")?;
    let mesh = mesh::read(&config.mesh.path)?;
    Ok((mesh, Some((config.node, client))))
}

/// The agents of both ends' nodes, by node.
fn clients(
    mesh: &Mesh,
    file: Option<&Path>,
    ends: [&End; 2],
    asked: Option<(String, Client)>,
) -> BTreeMap<String, Client> {
    let pods = ends.into_iter().filter_map(|end| end.workload.as_ref());
    let nodes: BTreeSet<&str> = pods
        .filter(|pod| pod.is_enrolled())
        .map(|pod| pod.node.as_str())
        .collect();
    let nodes = nodes.into_iter().filter_map(|name| mesh.nodes.get(name));
    let mut clients: BTreeMap<String, Client> = nodes
        .map(|node| (node.name.clone(), Client::of_node(node, file)))
        .collect();
    if let Some((node, client)) = asked {
        clients.entry(node).and_modify(|other| *other = client);
    }
    clients
}

fn state(client: &Client) -> AgentState {
    let path: PathBuf = client.socket().to_owned();
    match client.get("/live") {
        Ok(_) => AgentState::Answers,
        // A dead agent's socket stays.
        Err(_) if path.exists() => AgentState::Dead,
        Err(_) => AgentState::Elsewhere,
    }
}

fn meaning(word: &str) -> Option<&'static str> {
    Reason::from_word(word).map(Reason::meaning)
}

fn render(told: &Explanation, now: SystemTime, style: Style) -> String {
    let Explanation {
        source,
        destination,
        decision,
        ..
    } = told;
    let mut text = format!(
        "{} ({}) to {} ({})\n\n",
        source.name, source.address, destination.name, destination.address
    );
    let mut rules = Table::new([("RULE", Align::Left), ("ANSWER", Align::Left)]);
    for rule in &decision.rules {
        rules.row([rule.rule.to_owned(), rule.says.clone()]);
    }
    text.push_str(&rules.render());
    let sign = match decision.outcome {
        Outcome::Meshed => Sign::Good,
        Outcome::Plaintext | Outcome::Direct => Sign::Warning,
        Outcome::Refused | Outcome::Reset | Outcome::Dropped => Sign::Bad,
    };
    let reason = decision
        .reason
        .map_or_else(String::new, |reason| format!(": {reason}"));
    text.push_str(&format!(
        "\n{} a connection would be {}{reason}\n",
        style.sign(sign),
        decision.outcome.text()
    ));
    text.extend(told.meaning.map(|meaning| format!("    {meaning}\n")));
    // Where nobody asks for it there is nothing to explain.
    let asked = told.acceleration.iter();
    let asked = asked.filter(|(_, is)| is.mode != "off" || is.reason != "default");
    text.extend(
        asked.map(|(id, is)| format!("  acceleration of {id}: {} ({})\n", is.mode, is.why)),
    );
    if !decision.probes.is_empty() {
        let columns = [("PROBE", Align::Left), ("BECOMES", Align::Left)];
        let mut probes = Table::new(columns);
        for probe in &decision.probes {
            let outcome = format!("{}: {}", probe.outcome.text(), probe.reason);
            probes.row([probe.asks.clone(), outcome]);
        }
        text.push_str("\nbut a declared probe passes:\n");
        text.push_str(&probes.render());
    }
    text.push_str(&past::render(&told.past, &told.kernel_refused, now, style));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_come_first_then_what_would_happen_then_what_has() {
        let told = Explanation {
            source: Told {
                name: "a/stranger".to_owned(),
                address: "10.1.0.9".to_owned(),
            },
            destination: Told {
                name: "a/db".to_owned(),
                address: "10.1.1.3:8080".to_owned(),
            },
            decision: Decision {
                outcome: Outcome::Reset,
                reason: Some("plaintext_refused"),
                rules: vec![decide::Rule {
                    rule: "mtls",
                    says: "strict".to_owned(),
                }],
                probes: vec![probed::Passing {
                    asks: "GET /healthz (httpGet)".to_owned(),
                    outcome: Outcome::Plaintext,
                    reason: "no_tls_from_remote",
                }],
            },
            meaning: meaning("plaintext_refused"),
            agents: BTreeMap::new(),
            acceleration: BTreeMap::from([
                (
                    "a/db".to_owned(),
                    AccelerationInForce {
                        mode: "full".to_owned(),
                        reason: "configured".to_owned(),
                        why: "as the settings say".to_owned(),
                    },
                ),
                (
                    "a/stranger".to_owned(),
                    AccelerationInForce {
                        mode: "off".to_owned(),
                        reason: "default".to_owned(),
                        why: "nobody asked".to_owned(),
                    },
                ),
            ]),
            past: Vec::new(),
            kernel_refused: Vec::new(),
        };
        assert_eq!(
            render(&told, SystemTime::now(), Style::PLAIN),
            "a/stranger (10.1.0.9) to a/db (10.1.1.3:8080)\n\
             \n\
             RULE   ANSWER\n\
             mtls   strict\n\
             \n\
             × a connection would be opened, then reset: plaintext_refused\n    \
             A strict pod takes no plaintext.\n  \
             acceleration of a/db: full (as the settings say)\n\
             \n\
             but a declared probe passes:\n\
             PROBE                    BECOMES\n\
             GET /healthz (httpGet)   carried in plaintext: no_tls_from_remote\n\
             \n\
             No agent that was asked remembers a connection between the two.\n"
        );
    }
}
