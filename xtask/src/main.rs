//! All that a developer of malla runs: `cargo xtask build-ebpf`.
//!
//! What a step needs and the machine lacks is installed by it, with one line on what and why.

mod ebpf;
mod packages;
mod shell;
mod workspace;

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
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::BuildEbpf { check: true } => ebpf::check(),
        Task::BuildEbpf { check: false } => ebpf::build(),
    }
}
