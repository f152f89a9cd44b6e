//! What agents hold in memory at rest, and for connections that say nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use malla_testbed::{
    Agent, PATIENCE, Pair, Pod, PodSpec, Testbed, Way, accept, allow_descriptors,
    allow_many_descriptors, eventually, listen,
};

/// Of one agent at rest, in bytes: twice what one without optimisation takes. Its start takes 30 MB
/// for a moment.
const AT_REST: usize = 12 << 20;
/// The same with the pages of its program, of which the start alone runs most.
const AT_REST_WITH_PROGRAM: usize = 34 << 20;

/// So many that what they take outweighs what the bounds of agents at rest leave open.
const CONNECTIONS: usize = 3000;

/// Of both agents together, in bytes: twice what a connection at rest may take.
const EACH: usize = 2 * 4 * 1024;

#[test]
fn an_agent_at_rest_gives_back_what_its_start_took() {
    let pair = Pair::new(Way::Mesh).unwrap();
    for agent in pair.agents() {
        assert!(!agent.takes_huge_pages().unwrap());
        let mut seen = (0, 0);
        let small = eventually("an agent to be small", PATIENCE, || {
            let all = agent.resident_memory().unwrap();
            seen = (agent.anonymous_memory().unwrap(), all);
            seen.0 < AT_REST && seen.1 < AT_REST_WITH_PROGRAM
        });
        small.unwrap_or_else(|error| panic!("{error}: {seen:?} bytes"));
    }
}

#[test]
fn three_thousand_idle_connections_take_little_of_both_agents_memory() {
    allow_many_descriptors().unwrap();
    let pair = Pair::new(Way::Mesh).unwrap();
    let idle = open_idle(&pair.client, &pair.server, CONNECTIONS as u64);
    let memory = || -> usize {
        let each = pair.agents().map(Agent::anonymous_memory);
        each.into_iter().map(Result::unwrap).sum()
    };
    // Not what has grown since they had none: what the start took may not be given back by then.
    let small = eventually("idle connections to be small", PATIENCE, || {
        memory() < 2 * AT_REST + CONNECTIONS * EACH
    });
    small.unwrap_or_else(|error| panic!("{error}: {} bytes", memory()));
    drop(idle);
    pair.nothing_is_held().unwrap();
}

/// Longer than it takes until keepalive asks for the first time.
const SILENCE: Duration = Duration::from_secs(12);

/// All that idle connections say falls due within the same second or so. Of thousands a loopback's backlog
/// would drop some, and what others say with them.
#[test]
fn idle_connections_say_nothing_to_their_apps() {
    const MANY: usize = 200;
    let pair = Pair::new(Way::Mesh).unwrap();
    let idle = open_idle(&pair.client, &pair.server, MANY as u64);
    let packets = |pod: &Pod| -> usize {
        let table = pod.enter(|| fs::read_to_string("/proc/thread-self/net/dev"));
        let table = table.unwrap();
        let loopback = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("lo:"));
        let received = loopback.unwrap().split_ascii_whitespace().nth(1);
        received.unwrap().parse().unwrap()
    };
    let both = || [&pair.client, &pair.server].map(|pod| packets(pod));
    let before = both();
    thread::sleep(SILENCE);
    for (before, after) in before.into_iter().zip(both()) {
        assert!(after < before + MANY / 4, "{before} packets, then {after}");
    }
    drop(idle);
    pair.nothing_is_held().unwrap();
}

/// Each client's connections to its server: less than a pod's `maxConnections`, and than half of the ports
/// that a client has, beyond which its kernel searches for a free one.
const EACH_PAIR: u64 = 12_500;
const CROWD: u64 = 100_000;

/// What both agents together may have for them, in bytes of RSS, and what both have at rest.
const CROWD_TAKES: u64 = 336 << 20;
const BOTH_AT_REST: u64 = 64 << 20;

#[test]
#[ignore = "long: 100,000 connections, or as many as this process may have descriptors for"]
fn a_hundred_thousand_idle_connections_fit_in_400_mebibytes() {
    let allowed = allow_descriptors(2 * CROWD + 10_000).unwrap();
    let number = CROWD.min(allowed.saturating_sub(1000) / 2);
    let mut bed = Testbed::new("crowd").unwrap();
    let nodes = ["a", "b"].map(|name| bed.node(name).unwrap());
    let pods: Vec<_> = (0..number.div_ceil(EACH_PAIR))
        .map(|at| {
            [0, 1].map(|end| {
                let pod = PodSpec::new(format!("pod-{at}-{end}"));
                bed.pod(&nodes[end], pod).unwrap()
            })
        })
        .collect();
    bed.start_agents().unwrap();
    let idle: Vec<_> = thread::scope(|scope| {
        let opening = pods.iter().zip(0..).map(|([client, server], at)| {
            let each = EACH_PAIR.min(number - at * EACH_PAIR);
            scope.spawn(move || open_idle(client, server, each))
        });
        let opening: Vec<_> = opening.collect();
        opening.into_iter().map(|all| all.join().unwrap()).collect()
    });
    println!("{number} connections");
    let allowed = BOTH_AT_REST + CROWD_TAKES * number / CROWD;
    let memory = || -> usize {
        let each = nodes
            .each_ref()
            .map(|node| bed.agent(node).resident_memory());
        each.into_iter().map(Result::unwrap).sum()
    };
    // What their opening took is given back within 10 s.
    let small = eventually("idle connections to be small", 3 * PATIENCE, || {
        (memory() as u64) < allowed
    });
    println!("{} KiB, {allowed} bytes are allowed", memory() >> 10);
    small.unwrap();
    // The first ones still speak.
    for (client, server) in idle.iter().flatten().step_by(1000) {
        (&mut &*client).write_all(b"x").unwrap();
        (&mut &*server).read_exact(&mut [0]).unwrap();
    }
}

/// Opens connections that have said a byte each way and then nothing.
fn open_idle(client: &Pod, server: &Pod, number: u64) -> Vec<(TcpStream, TcpStream)> {
    let listener = listen(server, 0).unwrap();
    let to = (server.v4(), listener.local_addr().unwrap().port());
    let one = |_| {
        let (mut ours, mut byte) = (client.connect(to).unwrap(), [7]);
        let mut theirs = accept(&listener).unwrap();
        ours.write_all(&byte).unwrap();
        theirs.read_exact(&mut byte).unwrap();
        theirs.write_all(&byte).unwrap();
        ours.read_exact(&mut byte).unwrap();
        (ours, theirs)
    };
    (0..number).map(one).collect()
}
