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

use anyhow::{Result, ensure};
use clap::Args;

use crate::{interrupt, packages};
use kernel::Line;
use machine::Machine;
use script::Script;

/// Which kernel, and what to run.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The kernel's line, such as 6.1 or 6.12, or `newest` for the newest of Debian's suites
    #[arg(long, value_name = "LINE")]
    kernel: Line,
    /// After how many minutes the guest is ended, which is a failure
    #[arg(long, value_name = "MINUTES", default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Never use KVM
    #[arg(long)]
    emulate: bool,
    /// `test` for the tests that fit, `test TEXT` for all tests whose file or name contains it; or
    /// any command
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Boots, runs the command, and returns its exit code.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the VM is for x86_64 only: run the tests natively, by `cargo xtask test`"
    );
    interrupt::catch()?;
    packages::ensure(packages::FOR_VM, "the VM")?;
    let script = match options
        .command
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()[..]
    {
        ["test"] => suite::script(None)?,
        ["test", text] => suite::script(Some(text))?,
        _ => Script::command(&options.command),
    };
    let kernel = kernel::get(&options.kernel)?;
    let initramfs = initramfs::build(&kernel, &script)?;
    let machine = Machine {
        kernel: &kernel,
        initramfs: &initramfs,
        limit: Duration::from_mins(options.limit),
    };
    let started = Instant::now();
    let ended = machine.run(options.emulate)?;
    println!(
        "{} on Linux {} ended with {} after {:.0} s.",
        script.name,
        kernel.release,
        ended.code,
        started.elapsed().as_secs_f64()
    );
    if script.has_tests {
        println!("{} passed, {} failed", ended.passed, ended.failed);
    }
    Ok(ExitCode::from(ended.code))
}
