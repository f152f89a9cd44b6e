//! Connections that one client opens one after the other: none overtakes the one before.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use malla_testbed::{Pair, PodSpec, Testbed, Way, accept, listen, on_each_way};

on_each_way!(
    [Direct, Mesh, ToUnmeshed, FromUnmeshed]
    connections_reach_the_server_in_the_order_of_their_opening,
);

/// iperf3 --bidir takes its first connection for one direction and the second for the other.
fn connections_reach_the_server_in_the_order_of_their_opening(pair: &Pair) {
    const ROWS: usize = 40;
    const IN_ROW: u8 = 8;
    let (from, to) = pair.connection().unwrap();
    let done = AtomicBool::new(false);
    let listener = listen(&pair.server, 0).unwrap();
    let address = pair.address(listener.local_addr().unwrap().port());
    thread::scope(|scope| {
        // The workers are busy, one more than another.
        scope.spawn(|| send_until(&from, &done));
        scope.spawn(|| io::copy(&mut (&to), &mut io::sink()).unwrap());
        let rows = scope.spawn(|| {
            for row in 0..ROWS {
                let clients: Vec<TcpStream> = (0..IN_ROW)
                    .map(|number| {
                        let mut stream = pair.dial(address).unwrap();
                        stream.write_all(&[number]).unwrap();
                        stream
                    })
                    .collect();
                let order = numbers(&listener, clients.len());
                let expected: Vec<u8> = (0..IN_ROW).collect();
                assert_eq!(order, expected, "in row {row}");
                // Longer than what makes one row of two.
                thread::sleep(Duration::from_millis(120));
            }
        });
        // Even after a failure, or the load would go on for ever.
        let rows = rows.join();
        done.store(true, Ordering::Relaxed);
        rows.unwrap();
    });
}

/// What the next connections say, in the order in which they are accepted.
fn numbers(listener: &TcpListener, many: usize) -> Vec<u8> {
    let number = |_| {
        let mut number = [0];
        accept(listener).unwrap().read_exact(&mut number).unwrap();
        number[0]
    };
    (0..many).map(number).collect()
}

/// Sends without a pause, then ends.
fn send_until(mut stream: &TcpStream, done: &AtomicBool) {
    let block = vec![0; 1 << 20];
    while !done.load(Ordering::Relaxed) && stream.write_all(&block).is_ok() {}
    stream.shutdown(Shutdown::Write).unwrap();
}

/// What comes while the first tunnel of a pair is being opened waits for it, and what comes just
/// then doesn't.
#[test]
fn who_waits_for_a_tunnel_is_not_overtaken() {
    for _ in 0..5 {
        let pair = Pair::new(Way::Mesh).unwrap();
        let listener = listen(&pair.server, 0).unwrap();
        let address = pair.address(listener.local_addr().unwrap().port());
        arrive_in_order(&listener, || pair.dial(address).unwrap());
    }
}

/// On one node, what comes first waits for the network's word on the pair.
#[test]
fn who_waits_for_the_word_on_a_pair_of_one_node_is_not_overtaken() {
    for _ in 0..3 {
        let mut bed = Testbed::new("order").unwrap();
        let node = bed.node("a").unwrap();
        let client = bed.pod(&node, PodSpec::new("client")).unwrap();
        let server = bed.pod(&node, PodSpec::new("server")).unwrap();
        bed.start_agents().unwrap();
        let listener = listen(&server, 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        for ip in server.addresses() {
            let address = SocketAddr::new(*ip, port);
            arrive_in_order(&listener, || client.connect(address).unwrap());
        }
    }
}

/// Opens connections for longer than what the first of them waits for takes.
fn arrive_in_order(listener: &TcpListener, dial: impl Fn() -> TcpStream) {
    // As many as keep their order.
    const CONNECTIONS: u8 = 60;
    let clients: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|number| {
            let mut stream = dial();
            stream.write_all(&[number]).unwrap();
            thread::sleep(Duration::from_micros(200));
            stream
        })
        .collect();
    let order = numbers(listener, clients.len());
    let expected: Vec<u8> = (0..CONNECTIONS).collect();
    assert_eq!(order, expected);
}

#[test]
fn the_connections_of_a_pair_at_ease_share_one_tunnel() {
    let pair = Pair::new(Way::Mesh).unwrap();
    let open: Vec<_> = (0..50).map(|_| pair.connection().unwrap()).collect();
    for agent in pair.agents() {
        let metrics = agent.metrics().unwrap();
        let tunnels = metrics.sum("malla_tunnels_open", &[]);
        assert!((tunnels - 1.0).abs() < 0.5, "{tunnels} tunnels");
    }
    drop(open);
    pair.nothing_is_held().unwrap();
}
