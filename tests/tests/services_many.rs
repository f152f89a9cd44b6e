//! A thousand Services: what they cost an agent, and how soon a change of one is in force.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fmt::Write,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use malla_testbed::{EchoApp, Fate, PORT, Pair, Pod, PodSpec, Way, eventually};

const SERVICES: usize = 1000;
const ENDPOINTS: usize = 10;
/// What they may cost, in bytes.
const MEMORY: usize = 50 << 20;
/// A change is in force within 100 ms, where an agent has a processor for itself. Beside other tests,
/// and in the dev profile, this only tells that it is no matter of a queue or of a next look.
const LIVE: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(20);

/// The address of a Service: none of another kind is in these networks.
fn address(service: usize) -> String {
    format!("10.96.{}.{}", service / 250, 1 + service % 250)
}

/// All Services as YAML. The first is over these pods alone, the others over strangers.
fn services(first: &Pod) -> String {
    let mut text = "services:\n".to_owned();
    for service in 0..SERVICES {
        writeln!(
            text,
            "- name: s{service}\n  addresses: [{}]\n  ports: [{{port: 80, targetPort: {PORT}}}]\n  \
             endpoints:",
            address(service)
        )
        .unwrap();
        if service == 0 {
            writeln!(text, "  - addresses: [{}]", first.v4()).unwrap();
            continue;
        }
        for endpoint in 0..ENDPOINTS {
            let number = service * ENDPOINTS + endpoint;
            let [high, low] = [number / 250, 1 + number % 250];
            writeln!(text, "  - addresses: [10.200.{high}.{low}]").unwrap();
        }
    }
    text
}

#[test]
fn a_thousand_services_cost_little_and_a_change_of_one_is_in_force_at_once() {
    let mut pair = Pair::new(Way::Mesh).unwrap();
    let node = Arc::clone(&pair.b);
    let other = pair.bed.pod(&node, PodSpec::new("other")).unwrap();
    let apps: [EchoApp; 2] = [&pair.server, &other].map(|pod| pod.echo(PORT).unwrap());
    pair.bed.write_mesh().unwrap();
    let agent = pair.agents()[0];
    let before = agent.anonymous_memory().unwrap();
    let mesh = pair.bed.mesh_yaml();
    let write = |first: &Pod| {
        pair.bed
            .write_mesh_text(&(mesh.clone() + &services(first)))
            .unwrap();
    };
    write(&pair.server);
    let service: SocketAddr = format!("{}:80", address(0)).parse().unwrap();
    let call = || pair.client.caller().call(service);
    eventually("the Services", LIMIT, || call() == Fate::Echoed).unwrap();
    let grown = || agent.anonymous_memory().unwrap().saturating_sub(before);
    eventually("memory", LIMIT, || grown() < MEMORY).unwrap_or_else(|error| {
        panic!("{error}: {} MiB", grown() >> 20);
    });
    println!("{} KiB more", grown() >> 10);

    let mut took = Vec::new();
    for turn in 0..6 {
        let place = (turn + 1) % 2;
        let reached = || {
            let before = apps[place].accepted();
            assert_eq!(call(), Fate::Echoed);
            apps[place].accepted() > before
        };
        assert!(!reached(), "not changed yet");
        write([&*pair.server, &*other][place]);
        let changed = Instant::now();
        eventually("the change", LIMIT, reached).unwrap();
        took.push(changed.elapsed());
    }
    took.sort_unstable();
    println!("in force after {took:?}");
    assert!(took[took.len() / 2] < LIVE, "{took:?}");
    let grown = grown();
    assert!(grown < MEMORY, "{} MiB after changes", grown >> 20);
}
