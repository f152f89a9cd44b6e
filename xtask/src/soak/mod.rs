//! `cargo xtask soak`: mixed traffic for minutes, after which the agents must hold what they held
//! before.

mod traffic;

use std::{
    fmt,
    panic::resume_unwind,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use malla_testbed::{Churn, Churners, Node, Testbed, kernel, until};
use serde_json::{Value, json};

use crate::{interrupt, packages, prepare};
use traffic::Traffic;

/// Connections a second that are closed in every way there is: 400,000 in ten minutes.
const CHURN: u32 = 670;
const PROGRESS: Duration = Duration::from_secs(15);
/// Five times what it may take until nothing is held.
const SETTLED: Duration = Duration::from_secs(50);
/// Descriptors of who asks, and of files that are read now and then.
const SPARE: u64 = 4;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many minutes the traffic goes on
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    minutes: u32,
}

/// Builds what is needed, and runs the traffic. An error where a byte was lost, a connection ended
/// otherwise than its ends ended it, or something is held when all have ended.
pub(crate) fn run(options: &Options) -> Result<()> {
    prepare::everything(packages::FOR_TESTS, "making namespaces and traffic")?;
    soak(Duration::from_mins(options.minutes.into()))
}

/// The same with what is built already.
pub(crate) fn soak(time: Duration) -> Result<()> {
    println!("Making two nodes, their pods and an agent on each node.");
    // A line for each connection would fill the disk, not the agent.
    let quiet = ["--log", "malla=info"];
    let mut bed = Testbed::new("soak")?.with_agent_arguments(quiet);
    let nodes = [bed.node("a")?, bed.node("b")?];
    let churners = Churners::new(&mut bed, &nodes)?;
    let traffic = Traffic::new(&mut bed, &nodes)?;
    bed.start_agents()?;
    let accelerates = kernel::release() >= kernel::ACCELERATES;
    if accelerates {
        for node in &nodes {
            bed.agent(node).wait_for_acceleration("full")?;
        }
    }
    interrupt::check()?;

    let mut before = Vec::new();
    for node in &nodes {
        before.push(Held::now(&bed, node)?);
    }
    let number = usize::try_from(time.as_secs())? * usize::try_from(CHURN)?;
    let churn = Churn::new(&churners, number)?.at_most(CHURN);
    go_on(&mut bed, &nodes, &churn, &traffic)?;
    interrupt::check()?;
    if accelerates {
        for node in &nodes {
            let redirected = bed.agent(node).directions("redirected")?;
            let name = node.name();
            ensure!(redirected > 0, "nothing was redirected on node {name}");
        }
    }

    for (node, before) in nodes.iter().zip(before) {
        let (name, ended) = (node.name(), Instant::now());
        let settled = settle(&bed, node, &before);
        let after = settled.with_context(|| format!("node {name} held {before}"))?;
        println!(
            "Node {name}: {before} before, {after} after {:.1?}.",
            ended.elapsed()
        );
    }
    println!("Removing everything.");
    Ok(())
}

/// Lets all traffic go on until the connections of `churn` have been opened.
fn go_on(
    bed: &mut Testbed,
    nodes: &[Arc<Node>; 2],
    churn: &Churn<'_>,
    traffic: &Traffic,
) -> Result<()> {
    let began = Instant::now();
    thread::scope(|scope| {
        let churning = scope.spawn(|| churn.run(bed));
        let talking = scope.spawn(|| traffic.run());
        let mut told = began;
        while !churning.is_finished() {
            if interrupt::requested() || talking.is_finished() {
                churn.stop();
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                println!("{}", progress(began.elapsed(), nodes, churn, traffic));
            }
            thread::sleep(Duration::from_millis(100));
        }
        traffic.stop();
        let churned = churning.join().unwrap_or_else(|panic| resume_unwind(panic));
        let talked = talking.join().unwrap_or_else(|panic| resume_unwind(panic));
        println!("{}", progress(began.elapsed(), nodes, churn, traffic));
        talked.and(churned)
    })
}

fn progress(
    time: Duration,
    nodes: &[Arc<Node>; 2],
    churn: &Churn<'_>,
    traffic: &Traffic,
) -> String {
    let open = |node: &Node| {
        let config = node.config().unwrap_or_default();
        config["ledger"]["descriptors"]["open"]
            .as_u64()
            .unwrap_or(0)
    };
    let [a, b] = nodes.each_ref().map(|node| open(node));
    format!(
        "{:5.0} s  {:8} short connections  {:5} long ones  {:7} MiB echoed  {a:5} and {b:5} descriptors",
        time.as_secs_f64(),
        churn.opened(),
        traffic.connections(),
        traffic.bytes() >> 20,
    )
}

/// What an agent holds.
#[derive(Debug)]
struct Held {
    /// Its ledger, as `/config` has it.
    ledger: Value,
    /// Bytes that it has allocated.
    memory: usize,
}

impl Held {
    fn now(bed: &Testbed, node: &Node) -> Result<Self> {
        Ok(Self {
            ledger: node.config()?["ledger"].take(),
            memory: bed.agent(node).anonymous_memory()?,
        })
    }

    /// Open descriptors, but those of what comes with the pods' first seconds and stays: links in
    /// place of filters, and tunnels with their witnesses.
    fn descriptors(&self) -> u64 {
        let descriptors = &self.ledger["descriptors"];
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let stay = ["link", "witness", "tunnel_inbound", "tunnel_outbound"];
        let staying: u64 = stay
            .iter()
            .map(|kind| number(&descriptors["entered"][kind]))
            .sum();
        number(&descriptors["open"]) - staying
    }

    /// Whether the ledger agrees with the kernel, and has no app's connection.
    fn is_at_rest(&self) -> bool {
        let workloads = self.ledger["workloads"].as_array();
        let is_at_rest = |workload: &Value| {
            let sockets = workload["sockets"].as_object();
            let mut kinds = sockets.into_iter().flat_map(|sockets| sockets.keys());
            workload["believed"] == workload["kernel"]
                && !kinds.any(|kind| kind.starts_with("app_"))
        };
        self.ledger["differences"] == json!([])
            && workloads.is_some_and(|workloads| workloads.iter().all(is_at_rest))
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (descriptors, kib) = (self.descriptors(), self.memory >> 10);
        write!(f, "{descriptors} descriptors and {kib} KiB")
    }
}

/// Waits until an agent is at rest with what it held before.
fn settle(bed: &Testbed, node: &Node, before: &Held) -> Result<Held> {
    let mut last = None;
    let settled = until("the agent to be at rest", SETTLED, || {
        let held = Held::now(bed, node).ok()?;
        let settled = held.is_at_rest()
            && held.descriptors() <= before.descriptors() + SPARE
            && held.memory * 5 <= before.memory * 6;
        let (held, last_one) = if settled {
            (Some(held), None)
        } else {
            (None, Some(held))
        };
        last = last_one;
        held
    });
    settled.with_context(|| match last {
        Some(held) => format!("now {held}: {:#}", held.ledger),
        None => "it doesn't answer".to_owned(),
    })
}
