//! Connections without number that end in every way there is: nothing of them stays.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::time::Instant;

use malla_testbed::{Churn, Churners, Held, Testbed};

fn churn_leaves_nothing(number: usize) {
    // A line for each connection would fill the disk, not the agent.
    let quiet = ["--log", "malla=info"];
    let mut bed = Testbed::new("churn").unwrap().with_agent_arguments(quiet);
    let nodes = ["a", "b"].map(|name| bed.node(name).unwrap());
    let pods = Churners::new(&mut bed, &nodes).unwrap();
    bed.start_agents().unwrap();
    let meshed = pods.meshed();
    let held = |node| Held::now(bed.agent(node), &nodes, &meshed).unwrap();
    let before = nodes.each_ref().map(|node| held(node));
    let began = Instant::now();
    Churn::new(&pods, number).unwrap().run(&mut bed).unwrap();
    println!("{number} connections in {:?}", began.elapsed());
    for (node, before) in nodes.iter().zip(before) {
        let began = Instant::now();
        let now = before.wait(bed.agent(node), &nodes, &meshed).unwrap();
        println!("{before} before; after {:?} {now}", began.elapsed());
    }
}

#[test]
fn connections_of_every_end_leave_nothing() {
    churn_leaves_nothing(5_000);
}

#[test]
#[ignore = "long: 400,000 connections"]
fn four_hundred_thousand_connections_of_every_end_leave_nothing() {
    churn_leaves_nothing(400_000);
}
