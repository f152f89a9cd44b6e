//! What agents hold in memory at rest, and for connections that say nothing.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use malla_testbed::{
    Agent, PATIENCE, Pair, Way, accept, allow_many_descriptors, eventually, listen,
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
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    let open = |number| -> Vec<(TcpStream, TcpStream)> {
        let each = (0..number).map(|_| {
            let (mut client, mut byte) = (pair.dial(to).unwrap(), [7]);
            let mut server = accept(&listener).unwrap();
            client.write_all(&byte).unwrap();
            server.read_exact(&mut byte).unwrap();
            server.write_all(&byte).unwrap();
            client.read_exact(&mut byte).unwrap();
            (client, server)
        });
        each.collect()
    };
    let idle = open(CONNECTIONS);
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
