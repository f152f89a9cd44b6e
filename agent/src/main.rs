//! `malla`: the agent and its command line.

mod identity;
mod model;

fn main() {}
