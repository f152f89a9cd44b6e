//! `malla`: the agent and its command line.

mod agent;
mod audits;
mod carried;
mod cleanup;
mod cli;
mod config;
mod discovery;
mod identity;
mod ledger;
mod memory;
mod model;
mod pods;
mod proxy;
mod reconcile;
mod report;
#[cfg(test)]
mod scratch;
mod steer;
mod telemetry;

use std::process::ExitCode;

/// Many small and short-lived allocations of many threads: what jemalloc is made for.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main()
}
