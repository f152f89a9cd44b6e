//! `cargo xtask vm`: runs a command or the tests as root under another kernel, in QEMU.
//!
//! The guest has the machine's own files, read-only, with memory above them for what it writes: so
//! whatever runs here runs there, the programs just built included. Only the kernel and its modules
//! are others, from Debian's suites; they are kept below the target folder.

mod initramfs;
mod kernel;
mod machine;
mod script;
mod suite;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{interrupt, packages};
use kernel::{Kernel, Line};
use machine::{Ended, Machine};
use script::Script;

/// After how many minutes a guest is ended, unless it is said otherwise.
const LIMIT: u64 = 6;

/// Which kernel, and what to run.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The kernel's line, such as 6.1 or 6.12, or `newest` for the newest of Debian's suites
    #[arg(long, value_name = "LINE")]
    kernel: Line,
    /// After how many minutes the guest is ended, which is a failure
    #[arg(long, value_name = "MINUTES", default_value_t = LIMIT, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Never use KVM
    #[arg(long)]
    emulate: bool,
    /// With `test TEXT`, run what is too long for each change as well
    #[arg(long)]
    long: bool,
    /// `test` for the tests that fit, `test TEXT` for all tests whose file or name contains it; or
    /// any command
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Boots, runs the command, and returns its exit code.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let kernel = prepare(&options.kernel)?;
    let words: Vec<&str> = options.command.iter().map(String::as_str).collect();
    let script = match words[..] {
        ["test"] => suite::script(None, false, kernel.numbers()?)?,
        ["test", text] => suite::script(Some(text), options.long, kernel.numbers()?)?,
        _ => Script::command(&options.command),
    };
    let ended = boot(&kernel, &script, options.limit, options.emulate)?;
    if script.has_tests {
        println!("{} passed, {} failed", ended.passed, ended.failed);
    }
    Ok(ExitCode::from(ended.code))
}

/// Runs the tests that fit under the newest kernel of a line: how many have passed, and failed.
pub(crate) fn test(line: &str) -> Result<(usize, usize)> {
    let line: Line = line.parse().map_err(anyhow::Error::msg)?;
    let kernel = prepare(&line)?;
    let script = suite::script(None, false, kernel.numbers()?)?;
    let ended = boot(&kernel, &script, LIMIT, false)?;
    ensure!(
        (ended.code == 0) == (ended.failed == 0),
        "{} tests failed, but the exit code is {}",
        ended.failed,
        ended.code
    );
    Ok((ended.passed, ended.failed))
}

/// Sets up what every guest needs of the machine, and gets the kernel.
fn prepare(line: &Line) -> Result<Kernel> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the VM is for x86_64 only: run the tests natively, by `cargo xtask test`"
    );
    interrupt::catch()?;
    packages::ensure(packages::FOR_VM, "the VM")?;
    kernel::get(line).with_context(|| format!("getting Debian's kernel {line}"))
}

fn boot(kernel: &Kernel, script: &Script, limit: u64, emulate: bool) -> Result<Ended> {
    let initramfs = initramfs::build(kernel, script)?;
    let machine = Machine {
        kernel,
        initramfs: &initramfs,
        limit: Duration::from_mins(limit),
    };
    let started = Instant::now();
    let ended = machine.run(emulate)?;
    println!(
        "{} on Linux {} ended with {} after {:.0} s.",
        script.name,
        kernel.release,
        ended.code,
        started.elapsed().as_secs_f64()
    );
    Ok(ended)
}
