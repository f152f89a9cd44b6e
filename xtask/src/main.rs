//! All that a developer of malla runs: `cargo xtask build-ebpf`, `test`, `vm`, `demo`,
//! `soak`, `bench` and `release`.
//!
//! What a step needs and the machine lacks is installed by it, with one line on what and why.

mod bench;
mod demo;
mod ebpf;
mod interrupt;
mod packages;
mod prepare;
mod release;
mod shell;
mod soak;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the eBPF programs to target/ebpf/malla, unless they are built already
    BuildEbpf {
        /// Build nothing; fail where the programs aren't built or older than their sources
        #[arg(long)]
        check: bool,
    },
    /// Run everything that must hold on each change (as root)
    Test {
        /// Run what is too long for each change as well
        #[arg(long)]
        long: bool,
        /// Run only the tests whose names contain this text
        #[arg(long, value_name = "TEXT")]
        filter: Option<String>,
    },
    /// Run tests or a command as root under another kernel, in QEMU (as root)
    Vm(vm::Options),
    /// Show a meshed voting application on two nodes, until Ctrl-C (as root)
    Demo {
        /// Run for a few seconds, and exit with 0 only if everything that it proves held
        #[arg(long)]
        once: bool,
    },
    /// Run mixed traffic for minutes, and see that nothing of it stays (as root)
    Soak(soak::Options),
    /// Measure what malla costs beside a direct connection and haproxy (as root)
    Bench(bench::Options),
    /// Build the agent as it is to be shipped, by a profile of its own work, and say where it is (as root)
    Release,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().task {
        Task::BuildEbpf { check: true } => ebpf::check()?,
        Task::BuildEbpf { check: false } => ebpf::build()?,
        Task::Test { long, filter } => test::run(long, filter.as_deref())?,
        Task::Vm(options) => return vm::run(&options),
        Task::Demo { once } => demo::run(once)?,
        Task::Soak(options) => soak::run(&options)?,
        Task::Bench(options) => bench::run(&options)?,
        Task::Release => println!("{}", release::build()?.display()),
    }
    Ok(ExitCode::SUCCESS)
}
