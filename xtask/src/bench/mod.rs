//! `cargo xtask bench`: what two proxies on the path cost, beside a direct connection and haproxy.
//!
//! Machines differ by half in speed, and one machine from minute to minute. So scenarios take
//! turns, round by round, and what counts is the ratio of two of them within a round.

mod enrolment;
mod flood;
mod haproxy;
mod load;
mod machine;
mod report;
mod results;
mod scenario;
mod scene;
mod usage;

use std::{
    env, fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use malla_testbed::leftovers;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{ebpf, interrupt, packages, shell, workspace};
use enrolment::Amount;
use load::{Load, Times};
use machine::Machine;
use results::{Outcome, Results};
use scenario::Scenario;
use scene::{Pins, Scene};

/// How long one scenario may take in one round.
const TURN_LIMIT: Duration = Duration::from_secs(45);

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each scenario has its turn; figures are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// One round of short loads: shows that everything runs, and little more
    #[arg(long)]
    quick: bool,
    /// Only this scenario (may be given more than once)
    #[arg(long, value_name = "NAME")]
    only: Vec<Scenario>,
    /// Pin nothing to a processor
    #[arg(long)]
    free: bool,
    /// Write all figures of all rounds to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints a table. An error where a scenario couldn't run, not where a goal is missed.
pub(crate) fn run(options: &Options) -> Result<()> {
    interrupt::catch()?;
    let pins = if options.free { Pins::NONE } else { Pins::TWO };
    ensure!(
        options.free || thread::available_parallelism()?.get() >= 2,
        "the bench needs two processors, one of them for the proxies: try --free"
    );
    let scenarios: Vec<Scenario> = Scenario::ALL
        .into_iter()
        .filter(|scenario| options.only.is_empty() || options.only.contains(scenario))
        .collect();
    packages::ensure(packages::FOR_BENCH, "the bench")?;
    let malla = if scenarios.iter().any(|scenario| scenario.has_agent()) {
        Some(agent_program()?)
    } else {
        None
    };
    raise_descriptor_limit()?;
    for leftover in leftovers::remove()? {
        println!("Removed what an earlier run has left: {leftover}.");
    }

    let (times, amount, rounds) = if options.quick {
        (Times::QUICK, Amount::QUICK, 1)
    } else {
        (Times::FULL, Amount::FULL, options.rounds)
    };
    let machine = Machine::of_this(malla.as_deref());
    println!("{machine}");
    let mut results = Results::default();
    for round in 1..=rounds {
        for &scenario in &scenarios {
            interrupt::check()?;
            let started = Instant::now();
            let agent = || malla.as_deref().context("no agent to measure");
            let outcome = match scenario {
                Scenario::Enrolment => agent().and_then(|malla| enrolment::measure(malla, amount)),
                Scenario::FloodUnmeshed | Scenario::FloodMeshed => {
                    let meshed = scenario == Scenario::FloodMeshed;
                    agent().and_then(|malla| flood::measure(malla, pins, meshed))
                }
                Scenario::Direct | Scenario::HaproxyTcpMtls | Scenario::Malla => {
                    let set_up = || Scene::set_up(scenario, pins, malla.as_deref());
                    measure(set_up, times, started + TURN_LIMIT)
                }
            };
            let outcome = outcome.with_context(|| format!("{scenario}, round {round}"));
            interrupt::check()?;
            let seconds = started.elapsed().as_secs_f64();
            match &outcome {
                Ok(_) => println!("round {round} of {rounds}: {scenario} took {seconds:.0} s"),
                Err(error) => println!("FAILED {error:#}"),
            }
            results.add(scenario, outcome.ok());
        }
    }

    print!("\n{}", report::table(&results, &scenarios));
    if let Some(path) = &options.json {
        let text = report::json(&machine, options.free, &results, &scenarios);
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    match results.failures() {
        0 => Ok(()),
        failures => bail!("{failures} turns of scenarios failed"),
    }
}

/// One turn of a scenario, which must end by `deadline`.
///
/// Memory is read in a scene of its own: what loads leave in a heap would hide it, and a heap that
/// has held a thousand connections slows haproxy down.
fn measure(set_up: impl Fn() -> Result<Scene>, times: Times, deadline: Instant) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut scene = set_up()?;
    if !scene.proxies.is_empty() {
        Load::new(&scene, times, deadline).memory(&mut outcome)?;
        drop(scene);
        scene = set_up()?;
    }
    let load = Load::new(&scene, times, deadline);
    load.prove_encryption()?;
    load.requests(&mut outcome)?;
    load.new_connections(&mut outcome)?;
    load.bulk(&mut outcome)?;
    Ok(outcome)
}

/// The agent as users have it: built in the release profile, or what `MALLA_BIN` names.
fn agent_program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("MALLA_BIN") {
        return Ok(PathBuf::from(path));
    }
    ebpf::build()?;
    println!("Building the agent in the release profile, unless it is built already.");
    let arguments = ["build", "--quiet", "--release", "--package", "malla"];
    shell::run(shell::cargo().args(arguments))?;
    Ok(workspace::target().join("release/malla"))
}

/// A thousand idle connections need more descriptors than a process has by default.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of descriptors")
}
