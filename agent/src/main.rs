//! `malla`: the agent and its command line.

mod discovery;
mod identity;
mod model;
mod steer;
mod telemetry;

fn main() {}
