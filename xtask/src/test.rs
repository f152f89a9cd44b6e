//! Runs everything that must hold on each change, part by part, each against its budget of time.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use malla_testbed::leftovers::{self, Leftover};

use crate::{demo, ebpf, packages, shell, soak, vm, workspace};

/// What a part's time counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Budget {
    Build,
    Native,
    Vm,
}

impl Budget {
    const ALL: [Self; 3] = [Self::Build, Self::Native, Self::Vm];

    /// On 2 cores, with nothing built yet.
    const fn limit(self) -> Duration {
        match self {
            Self::Build => Duration::from_mins(15),
            Self::Native => Duration::from_mins(25),
            // Six for each kernel.
            Self::Vm => Duration::from_mins(12),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Native => "native tests",
            Self::Vm => "other kernels",
        }
    }
}

/// The lines of kernels that the programs are tried on beside the machine's own.
const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// The least that a soak takes.
const SOAK: Duration = Duration::from_mins(1);

const TOTAL_LIMIT: Duration = Duration::from_hours(1);

/// One thing that was done.
#[derive(Debug)]
struct Part {
    name: String,
    budget: Budget,
    time: Duration,
    passed: usize,
    failed: usize,
}

/// What was done so far.
#[derive(Debug)]
struct Report {
    started: Instant,
    parts: Vec<Part>,
}

/// Runs all tests, or those whose names contain `filter`; with `long` those marked as ignored too.
///
/// Tests run in the dev profile: it has the checks for overflow and broken assumptions on, and
/// optimises what the data path's speed hangs on.
pub(crate) fn run(long: bool, filter: Option<&str>) -> Result<()> {
    let before: HashSet<Leftover> = leftovers::list()?.into_iter().collect();
    let mut report = Report {
        started: Instant::now(),
        parts: Vec::new(),
    };
    report.step("packages", || {
        packages::ensure(packages::FOR_TESTS, "testing")
    })?;
    report.step("eBPF programs", ebpf::build)?;
    report.step("workspace", || {
        // The programs themselves too: tests run them.
        shell::run(shell::cargo().args(["build", "--quiet", "--workspace"]))?;
        shell::run(shell::cargo().args(["test", "--quiet", "--workspace", "--no-run"]))
    })?;

    report.tests(
        "unit tests",
        &["--workspace", "--lib", "--bins"],
        long,
        filter,
    )?;
    report.tests(
        "examples in the docs",
        &["--workspace", "--doc"],
        long,
        filter,
    )?;
    for name in test_files()? {
        let arguments = ["--package", "malla-testbed", "--test", &name];
        report.tests(&name, &arguments, long, filter)?;
    }
    if filter.is_none() {
        report.check("demo", Budget::Native, || demo::run(true).map(|()| (1, 0)));
        report.check("soak", Budget::Native, || soak::soak(SOAK).map(|()| (1, 0)));
        report.check("nothing left", Budget::Native, || {
            nothing_left(&before).map(|()| (1, 0))
        });
        // There the kernels are for.
        if cfg!(target_arch = "x86_64") {
            for line in KERNELS {
                report.check(&format!("vm {line}"), Budget::Vm, || vm::test(line));
            }
        }
    }
    report.finish()
}

/// The programs of tests/tests, each a part of its own.
fn test_files() -> Result<Vec<String>> {
    let folder = workspace::root().join("tests/tests");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let is_source = path.extension().is_some_and(|extension| extension == "rs");
            is_source.then(|| path.file_stem()?.to_str().map(str::to_owned))?
        })
        .collect();
    names.sort();
    Ok(names)
}

fn nothing_left(before: &HashSet<Leftover>) -> Result<()> {
    let mut left = leftovers::list()?;
    left.retain(|leftover| !before.contains(leftover));
    if left.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = left.iter().map(ToString::to_string).collect();
    bail!("the tests have left: {}", names.join(", "))
}

impl Report {
    /// Does what the tests need. Where it fails there is nothing to test.
    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let started = Instant::now();
        work().with_context(|| name.to_owned())?;
        self.record(name, Budget::Build, started, (0, 0));
        Ok(())
    }

    /// Does what says how many tests have passed and failed. An error counts as one that failed.
    fn check(&mut self, name: &str, budget: Budget, work: impl FnOnce() -> Result<(usize, usize)>) {
        println!("\n== {name}");
        let started = Instant::now();
        let counts = work().unwrap_or_else(|error| {
            println!("{name} failed: {error:#}");
            (0, 1)
        });
        self.record(name, budget, started, counts);
    }

    /// Runs tests by cargo.
    fn tests(
        &mut self,
        name: &str,
        which: &[&str],
        long: bool,
        filter: Option<&str>,
    ) -> Result<()> {
        println!("\n== {name}");
        let started = Instant::now();
        let mut cargo = shell::cargo();
        cargo
            .args(["test", "--quiet", "--no-fail-fast"])
            .args(which);
        cargo.arg("--").args(filter);
        if long {
            cargo.arg("--include-ignored");
        }
        let line = shell::line(&cargo);
        cargo.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut running = cargo.spawn().with_context(|| format!("`{line}`"))?;
        let (mut passed, mut failed) = (0, 0);
        if let Some(output) = running.stdout.take() {
            for line in BufReader::new(output).lines() {
                let line = line.context("reading what the tests say")?;
                println!("{line}");
                if let Some(result) = line.strip_prefix("test result: ") {
                    passed += count(result, "passed");
                    failed += count(result, "failed");
                }
            }
        }
        let succeeded = running.wait()?.success();
        if !succeeded && failed == 0 {
            println!("`{line}` failed before a test did");
            failed = 1;
        }
        self.record(name, Budget::Native, started, (passed, failed));
        Ok(())
    }

    fn record(&mut self, name: &str, budget: Budget, started: Instant, counts: (usize, usize)) {
        self.parts.push(Part {
            name: name.to_owned(),
            budget,
            time: started.elapsed(),
            passed: counts.0,
            failed: counts.1,
        });
    }

    /// Prints times and numbers. An error if a test has failed.
    fn finish(self) -> Result<()> {
        println!();
        for part in &self.parts {
            let (name, time) = (&part.name, part.time.as_secs_f64());
            match part.passed + part.failed {
                0 => println!("{name:28} {time:8.1} s"),
                _ => println!("{name:28} {time:8.1} s {:5} passed", part.passed),
            }
        }
        for budget in Budget::ALL {
            let parts = self.parts.iter().filter(|part| part.budget == budget);
            let time = parts.map(|part| part.time).sum();
            print_budget(budget.name(), time, budget.limit());
        }
        print_budget("all", self.started.elapsed(), TOTAL_LIMIT);
        let passed: usize = self.parts.iter().map(|part| part.passed).sum();
        let failed: usize = self.parts.iter().map(|part| part.failed).sum();
        let failing = self.parts.iter().filter(|part| part.failed > 0);
        let failing: Vec<&str> = failing.map(|part| part.name.as_str()).collect();
        println!("{passed} passed, {failed} failed");
        if failed > 0 {
            bail!("failed: {}", failing.join(", "));
        }
        Ok(())
    }
}

fn print_budget(name: &str, time: Duration, limit: Duration) {
    let [minutes, limit_minutes] = [time, limit].map(|time| time.as_secs_f64() / 60.0);
    let over = if time > limit { ": OVER BUDGET" } else { "" };
    println!("{name:28} {minutes:8.1} min of {limit_minutes:.0}{over}");
}

/// The number before `word` in a line such as `ok. 3 passed; 0 failed; ...`.
pub(crate) fn count(result: &str, word: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).collect();
    let found = words.windows(2).find(|pair| pair[1] == word);
    found.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_result_line_are_read() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!((count(line, "passed"), count(line, "failed")), (12, 3));
    }
}
