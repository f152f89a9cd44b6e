//! `cargo xtask bench`: what two proxies on the path cost, beside a direct connection and haproxy.
//!
//! Machines differ by half in speed, and one machine from minute to minute. So scenarios take
//! turns, round by round, and what counts is the ratio of two of them within a round.

mod authority;
mod document;
mod enrolment;
mod envoy;
mod flood;
mod haproxy;
mod load;
mod machine;
mod paced;
mod pods;
mod report;
mod results;
mod rival;
mod scenario;
mod scene;
mod usage;

use std::{
    env,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{ebpf, interrupt, packages, prepare, release, shell, workspace};
use document::Document;
use enrolment::Amount;
use load::{Load, Times};
use machine::Machine;
use results::{Outcome, Results, Row};
use scenario::Scenario;
use scene::{Pins, Programs, Scene};

/// How long one scenario may take in one round; in the first one for memory once more.
const TURN_LIMIT: Duration = Duration::from_secs(45);

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each scenario has its turn; figures are medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
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
    /// Print one JSON document on standard output, and what is done on standard error
    #[arg(long)]
    json: bool,
}

/// Measures and prints a table. An error where a scenario couldn't run, not where a goal is missed.
pub(crate) fn run(options: &Options) -> Result<()> {
    interrupt::catch()?;
    let document = options.json.then(Document::open).transpose()?;
    let pins = if options.free { Pins::NONE } else { Pins::TWO };
    ensure!(
        options.free || thread::available_parallelism()?.get() >= 2,
        "the bench needs two processors, one of them for the proxies: try --free"
    );
    let mut scenarios: Vec<Scenario> = Scenario::ALL
        .into_iter()
        .filter(|scenario| options.only.is_empty() || options.only.contains(scenario))
        .collect();
    packages::ensure(packages::FOR_BENCH, "the bench")?;
    let programs = programs(&mut scenarios, options.quick)?;
    raise_descriptor_limit()?;
    prepare::remove_leftovers()?;

    let (times, amount, rounds) = if options.quick {
        (Times::QUICK, Amount::QUICK, 1)
    } else {
        (Times::FULL, Amount::FULL, options.rounds)
    };
    let machine = Machine::of_this(programs.malla.as_deref());
    println!("{machine}");
    let mut results = Results::default();
    for round in 1..=rounds {
        for &scenario in &scenarios {
            interrupt::check()?;
            let started = Instant::now();
            let turn = Turn {
                scenario,
                pins,
                programs: &programs,
                times,
                amount,
                with_memory: round == 1,
            };
            let outcome = turn.take();
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
    if let Some(document) = document {
        document.write(&report::json(&machine, options.free, &results, &scenarios))?;
    }
    match results.failures() {
        0 => Ok(()),
        failures => bail!("{failures} turns of scenarios failed"),
    }
}

/// Puts an agent under short loads of each kind, and lets it end by itself after each scenario.
pub(crate) fn train(malla: &Path) -> Result<()> {
    const SCENARIOS: [Scenario; 4] = [
        Scenario::Malla,
        Scenario::MallaFull,
        Scenario::MallaSameNode,
        Scenario::MallaSameNodeFull,
    ];
    interrupt::catch()?;
    packages::ensure(packages::FOR_BENCH, "putting the agent under load")?;
    raise_descriptor_limit()?;
    prepare::remove_leftovers()?;
    let programs = Programs {
        malla: Some(malla.to_owned()),
        ..Programs::default()
    };
    for scenario in SCENARIOS {
        interrupt::check()?;
        let scene = Scene::set_up(scenario, Pins::NONE, &programs)?;
        let load = Load::new(&scene, Times::QUICK, Instant::now() + TURN_LIMIT);
        load.all(&mut Outcome::default())
            .with_context(|| scenario.to_string())?;
        scene.stop_agents()?;
    }
    Ok(())
}

/// A scenario in one round.
struct Turn<'a> {
    scenario: Scenario,
    pins: Pins,
    programs: &'a Programs,
    times: Times,
    amount: Amount,
    with_memory: bool,
}

impl Turn<'_> {
    fn take(&self) -> Result<Outcome> {
        let malla = || {
            self.programs
                .malla
                .as_deref()
                .context("no agent to measure")
        };
        match self.scenario {
            Scenario::Enrolment => enrolment::measure(malla()?, self.amount),
            Scenario::FloodUnmeshed => flood::measure(malla()?, self.pins, false),
            Scenario::FloodMeshed => flood::measure(malla()?, self.pins, true),
            _ => {
                let mut outcome = Outcome::default();
                if self.with_memory {
                    outcome.extend(self.memory()?);
                }
                outcome.extend(self.loads()?);
                Ok(outcome)
            }
        }
    }

    /// Memory varies little, and is read in a scene of its own: what loads leave in a heap would
    /// hide it, and a heap that has held a thousand connections slows haproxy down.
    fn memory(&self) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let deadline = Instant::now() + TURN_LIMIT;
        let scene = self.set_up()?;
        if !scene.proxies.is_empty() {
            Load::new(&scene, self.times, deadline).memory(&mut outcome)?;
        }
        drop(scene);
        if self.scenario == Scenario::Malla {
            let malla = self.programs.malla.as_deref().context("no agent")?;
            outcome.set(Row::PodMemory, pods::memory_of_each(malla)?);
        }
        Ok(outcome)
    }

    fn loads(&self) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let deadline = Instant::now() + TURN_LIMIT;
        let scene = self.set_up()?;
        let load = Load::new(&scene, self.times, deadline);
        load.prove_proxies()?;
        load.all(&mut outcome)?;
        Ok(outcome)
    }

    fn set_up(&self) -> Result<Scene> {
        Scene::set_up(self.scenario, self.pins, self.programs)
    }
}

/// What the scenarios need and the machine doesn't have from Debian. A competitor that can't be had
/// is left out, with a line that says so.
fn programs(scenarios: &mut Vec<Scenario>, is_quick: bool) -> Result<Programs> {
    let mut programs = Programs::default();
    if scenarios.contains(&Scenario::EnvoyTcpMtls) {
        match envoy::program() {
            Ok(program) => programs.envoy = Some(program),
            Err(error) => {
                println!("{} is left out: {error:#}", Scenario::EnvoyTcpMtls);
                scenarios.retain(|scenario| *scenario != Scenario::EnvoyTcpMtls);
            }
        }
    }
    if scenarios.iter().any(|scenario| scenario.has_agent()) {
        programs.malla = Some(agent_program(is_quick)?);
    }
    Ok(programs)
}

/// The agent as users have it, in a hurry without a profile of its work, or what `MALLA_BIN` names.
fn agent_program(is_quick: bool) -> Result<PathBuf> {
    if let Some(path) = env::var_os("MALLA_BIN") {
        return Ok(PathBuf::from(path));
    }
    if !is_quick {
        return release::build();
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
