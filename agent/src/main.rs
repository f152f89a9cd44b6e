//! `malla`: the agent and its command line.

mod model;

fn main() {}
