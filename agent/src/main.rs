//! `malla`: the agent and its command line.

mod model;
mod telemetry;

fn main() {}
