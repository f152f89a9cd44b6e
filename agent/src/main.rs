//! `malla`: the agent and its command line.

mod model;
mod steer;

fn main() {}
