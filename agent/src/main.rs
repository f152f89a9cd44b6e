//! `malla`: the agent and its command line.

mod identity;
mod model;
mod steer;

fn main() {}
