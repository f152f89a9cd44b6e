//! Networks of all kinds: sizes of packets, families of addresses, interfaces, neighbours.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Fate, Impairment, Link, PATIENCE, Pair, Pod, PodSpec, SERVICE_PORT, Testbed, Way, accept,
    eventually, listen, payload, same_family,
};
use nix::sys::signal::Signal;

const WAYS: [Way; 5] = [
    Way::Mesh,
    Way::RandomPorts,
    Way::LossyWire,
    Way::ToUnmeshed,
    Way::FromUnmeshed,
];

/// Both ends send at once: one less than a packet, the other many.
const LENGTHS: [usize; 2] = [700, 1 << 20];

/// Runs the exchange on each way, with pods as described, over each family that both have.
fn exchange_on_each_way(client: &PodSpec, server: &PodSpec, wire_mtu: u32) {
    for way in WAYS {
        let bed = bed(way).with_wire_mtu(wire_mtu);
        let pair = Pair::on(bed, way, client.clone(), server.clone()).unwrap();
        let families = pair.addresses(0);
        assert!(!families.is_empty());
        for address in families {
            exchange(way, &pair.client, &pair.server, address.ip());
        }
        pair.nothing_is_held().unwrap();
    }
}

fn bed(way: Way) -> Testbed {
    let link = match way {
        Way::LossyWire => Link::LOSSY_WIRE,
        _ => Link::Veth,
    };
    Testbed::new("network").unwrap().with_link(link)
}

/// Opens a connection to an address of the server, which must see the client as its peer, and
/// sends both ways at once.
fn exchange(way: Way, client: &Pod, server: &Pod, address: IpAddr) {
    let listener = listen(server, 0).unwrap();
    let to = SocketAddr::new(address, listener.local_addr().unwrap().port());
    for lengths in [LENGTHS, [LENGTHS[1], LENGTHS[0]]] {
        let opened = client.enter(|| way.dial(to));
        let ours = opened.unwrap_or_else(|error| panic!("{way:?}, connecting to {to}: {error}"));
        let theirs = accept(&listener).unwrap();
        let peer = theirs.peer_addr().unwrap().ip().to_canonical();
        assert!(
            client.addresses().contains(&peer),
            "{way:?}: {to} sees {peer}"
        );
        send_both_ways(&ours, &theirs, lengths);
    }
}

fn send_both_ways(ours: &TcpStream, theirs: &TcpStream, lengths: [usize; 2]) {
    thread::scope(|scope| {
        scope.spawn(|| payload::send(ours, 1, lengths[0]).unwrap());
        scope.spawn(|| payload::send(theirs, 2, lengths[1]).unwrap());
        scope.spawn(|| payload::receive(theirs, 1, lengths[0]).unwrap());
        payload::receive(ours, 2, lengths[1]).unwrap();
    });
}

fn specs() -> [PodSpec; 2] {
    [PodSpec::new("client"), PodSpec::new("server")]
}

#[test]
fn dual_stack_pods_reach_each_other_over_both_families() {
    let [client, server] = specs();
    exchange_on_each_way(&client, &server, 1500);
}

#[test]
fn pods_with_ipv6_alone_reach_each_other() {
    let [client, server] = specs().map(PodSpec::ipv6_only);
    exchange_on_each_way(&client, &server, 1500);
}

#[test]
fn pods_without_any_ipv6_reach_each_other() {
    let [client, server] = specs().map(PodSpec::disable_ipv6);
    exchange_on_each_way(&client, &server, 1500);
}

#[test]
fn a_pod_without_any_ipv6_and_a_dual_stack_pod_reach_each_other() {
    let [client, server] = specs();
    exchange_on_each_way(&client.clone().disable_ipv6(), &server, 1500);
    exchange_on_each_way(&client, &server.disable_ipv6(), 1500);
}

#[test]
fn small_packets_carry_everything() {
    let [client, server] = specs().map(|spec| spec.mtu(1400));
    exchange_on_each_way(&client, &server, 1400);
}

#[test]
fn large_packets_carry_everything() {
    let [client, server] = specs().map(|spec| spec.mtu(9000));
    exchange_on_each_way(&client, &server, 9000);
}

#[test]
fn large_packets_of_pods_are_cut_for_a_wire_of_smaller_ones() {
    let [client, server] = specs().map(|spec| spec.mtu(9000));
    exchange_on_each_way(&client, &server, 1400);
}

#[test]
fn each_address_of_a_pod_with_two_interfaces_is_reached() {
    for way in WAYS {
        let [client, server] = specs();
        let pair = Pair::on(bed(way), way, client, server.second_interface()).unwrap();
        assert_eq!(pair.server.addresses().len(), 4);
        for address in pair.server.addresses() {
            exchange(way, &pair.client, &pair.server, *address);
        }
        pair.nothing_is_held().unwrap();
    }
}

#[test]
fn a_pod_with_two_interfaces_reaches_others_by_either() {
    for way in WAYS {
        let [client, server] = specs();
        let mut pair = Pair::on(bed(way), way, client.second_interface(), server).unwrap();
        // One that is a neighbour of the second interface, meshed as the client's server is.
        let neighbour = PodSpec::new("neighbour").second_interface();
        let neighbour = match way {
            Way::ToUnmeshed => neighbour.unmeshed(),
            _ => neighbour,
        };
        let neighbour = pair.bed.pod(&pair.a, neighbour).unwrap();
        wait_enrolled(&pair, &neighbour, way);
        for address in pair.server.addresses() {
            exchange(way, &pair.client, &pair.server, *address);
        }
        for address in neighbour.addresses() {
            exchange(way, &pair.client, &neighbour, *address);
        }
    }
}

#[test]
fn pods_of_one_node_reach_each_other_and_themselves() {
    for way in WAYS {
        let [client, server] = specs();
        let mut pair = Pair::on(bed(way), way, client, server).unwrap();
        let neighbour = PodSpec::new("neighbour");
        let neighbour = match way {
            Way::ToUnmeshed => neighbour.unmeshed(),
            _ => neighbour,
        };
        let neighbour = pair.bed.pod(&pair.a, neighbour).unwrap();
        wait_enrolled(&pair, &neighbour, way);
        for address in neighbour.addresses() {
            exchange(way, &pair.client, &neighbour, *address);
        }
        for address in pair.client.addresses() {
            exchange(way, &pair.client, &pair.client, *address);
        }
    }
}

/// Waits until the agent of node `a` has taken in a pod that came later.
fn wait_enrolled(pair: &Pair, pod: &Arc<Pod>, way: Way) {
    if way != Way::ToUnmeshed {
        let line = format!("workload=default/{}", pod.name());
        let agent = pair.bed.agent(&pair.a).process();
        agent.wait_for_log(&line, malla_testbed::PATIENCE).unwrap();
    }
}

#[test]
fn an_app_whose_answers_to_a_client_find_no_neighbour_sees_its_pods_own_address() {
    let pair = Pair::new(Way::Mesh).unwrap();
    // To the app's port alone the clients are on the link, where nobody answers for them.
    let listener = listen(&pair.server, 0).unwrap();
    let port = listener.local_addr().unwrap().port();
    for to in pair.addresses(port) {
        let client = same_family(pair.client.addresses(), to.ip()).unwrap();
        let family = if client.is_ipv4() { "-4" } else { "-6" };
        let (rule, route) = (
            format!("rule add ipproto tcp sport {port} lookup 77"),
            format!("route add {client} dev eth0 table 77"),
        );
        for words in [rule, route] {
            let words = ["ip", family].into_iter().chain(words.split(' '));
            pair.server.run(words).unwrap();
        }
    }
    for to in pair.addresses(port) {
        for turn in 0..2 {
            let began = Instant::now();
            let mut client = pair.dial(to).unwrap();
            let mut server = accept(&listener).unwrap();
            // A second is what the kernel takes to send a SYN again.
            assert!(began.elapsed() < Duration::from_secs(1), "turn {turn}");
            let peer = server.peer_addr().unwrap().ip().to_canonical();
            assert_eq!(peer, to.ip());
            client.write_all(b"hello").unwrap();
            server.read_exact(&mut [0; 5]).unwrap();
        }
    }
    let metrics = pair.agents()[1].metrics().unwrap();
    let replaced = metrics.sum("malla_source_replaced_total", &[]);
    assert!((replaced - 4.0).abs() < 0.5, "{replaced}");
}

/// TCP without a mesh takes one for its opening and one for the question. A client's agent has opened
/// its connection already, and what it says goes with the request for the rest of the way.
#[test]
fn the_first_answer_on_a_new_connection_takes_one_round_trip() {
    const DELAY: Duration = Duration::from_millis(150);
    let impairment = Impairment {
        delay: DELAY,
        ..Impairment::NONE
    };
    for (way, trips) in [(Way::Direct, 2), (Way::Mesh, 1), (Way::ToService, 1)] {
        // Another worker would open a tunnel of its own.
        let bed = Testbed::new("trips").unwrap();
        let bed = bed.with_agent_arguments(["--workers", "1"]);
        let bed = bed.with_link(Link::Wire(impairment));
        let [client, server] =
            ["client", "server"].map(|name| PodSpec::new(name).settings("meshConnectTimeout: 9s"));
        let pair = Pair::on(bed, way, client, server).unwrap();
        let _app = pair.server.echo(SERVICE_PORT).unwrap();
        let call = || {
            let (fate, took) = pair.client.caller().timed_call(pair.address(SERVICE_PORT));
            assert_eq!(fate, Fate::Echoed, "{way:?}");
            took
        };
        // The first one may take a tunnel's opening.
        call();
        let fastest = (0..3).map(|_| call()).min().unwrap();
        let taken = fastest.as_millis() / (2 * DELAY).as_millis();
        assert_eq!(taken, trips, "{way:?}: {fastest:?}");
    }
}

/// What a client says first is sent with the ACK of the server's SYN-ACK, so that a server which reads
/// as soon as it accepts isn't woken a second time for it.
#[test]
fn what_a_client_says_first_is_there_when_its_server_accepts() {
    const SAID: &[u8] = b"the first words";
    for way in [Way::Mesh, Way::ToService] {
        let bed = Testbed::new("first").unwrap();
        let bed = bed.with_agent_arguments(["--workers", "1"]);
        let (client, server) = (PodSpec::new("client"), PodSpec::new("server"));
        let pair = Pair::on(bed, way, client, server).unwrap();
        let listener = listen(&pair.server, SERVICE_PORT).unwrap();
        // Opens the tunnel, whose first answer tells what the server's agent takes.
        let mut client = pair.dial(pair.address(SERVICE_PORT)).unwrap();
        let mut server = accept(&listener).unwrap();
        server.write_all(SAID).unwrap();
        client.read_exact(&mut [0; SAID.len()]).unwrap();
        let [agent, _] = pair.agents();
        agent.process().signal(Signal::SIGSTOP).unwrap();
        // So few that the tunnel doesn't owe an answer for long before the last of them.
        let clients: Vec<_> = (0..5)
            .map(|_| {
                let mut client = pair.dial(pair.address(SERVICE_PORT)).unwrap();
                client.write_all(SAID).unwrap();
                client
            })
            .collect();
        eventually(
            "what was said to be with the agent's kernel",
            PATIENCE,
            || {
                let sockets = pair.client.run(["ss", "-Htn", "state", "established"]);
                let sockets = sockets.unwrap().stdout;
                let unacknowledged = |line: &str| line.split_whitespace().nth(1) != Some("0");
                !sockets.lines().any(unacknowledged)
            },
        )
        .unwrap();
        agent.process().signal(Signal::SIGCONT).unwrap();
        for (number, _client) in clients.iter().enumerate() {
            // Without the pauses of `accept`.
            let (mut server, _) = listener.accept().unwrap();
            server.set_nonblocking(true).unwrap();
            let mut heard = [0; 2 * SAID.len()];
            let length = server.read(&mut heard);
            let length = length.unwrap_or_else(|error| panic!("{way:?}, {number}: {error}"));
            assert_eq!(&heard[..length], SAID, "{way:?}, {number}");
        }
    }
}

/// An app that leaves Nagle's algorithm on and answers in two parts sends the second one when the first is
/// acknowledged, which a kernel that takes a connection for a conversation puts off for 40 ms.
#[test]
fn an_answer_in_two_parts_to_what_a_client_says_first_comes_at_once() {
    const PUT_OFF: Duration = Duration::from_millis(40);
    let bed = Testbed::new("parts").unwrap();
    let bed = bed.with_agent_arguments(["--workers", "1"]);
    let (client, server) = (PodSpec::new("client"), PodSpec::new("server"));
    let pair = Pair::on(bed, Way::Mesh, client, server).unwrap();
    let listener = listen(&pair.server, SERVICE_PORT).unwrap();
    let call = || {
        let mut client = pair.dial(pair.address(SERVICE_PORT)).unwrap();
        client.write_all(b"ask").unwrap();
        client
    };
    let answer = || {
        let (mut server, _) = listener.accept().unwrap();
        server.read_exact(&mut [0; 3]).unwrap();
        server.write_all(b"head").unwrap();
        server.write_all(b"body").unwrap();
        server
    };
    let mut client = call();
    let mut open = vec![answer()];
    client.read_exact(&mut [0; 8]).unwrap();
    let [agent, _] = pair.agents();
    agent.process().signal(Signal::SIGSTOP).unwrap();
    let clients: Vec<_> = (0..10).map(|_| call()).collect();
    agent.process().signal(Signal::SIGCONT).unwrap();
    let took = clients.into_iter().map(|mut client| {
        let began = Instant::now();
        open.push(answer());
        client.read_exact(&mut [0; 8]).unwrap();
        began.elapsed()
    });
    let fastest = took.min().unwrap();
    assert!(fastest < PUT_OFF, "{fastest:?}");
}
