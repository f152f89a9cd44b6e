//! `malla`: the agent and its command line.

mod discovery;
mod model;

fn main() {}
