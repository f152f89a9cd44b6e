//! What metrics and access log say of connections, compared with what their client did.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]
#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

use std::{
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use malla_testbed::{
    Agent, Metrics, PATIENCE, Pair, Way, accept, eventually, listen, on_each_way, payload,
};
use socket2::SockRef;

const KIB: usize = 1 << 10;
const CLIENT_ID: &str = "spiffe://cluster.local/ns/default/sa/default";

on_each_way!(
    [Mesh, RandomPorts, LossyWire, ToUnmeshed, FromUnmeshed]
    counters_agree_with_what_the_client_did,
    counters_move_while_a_connection_lives,
    a_reset_is_counted_under_its_reason,
    each_connection_has_one_line_in_the_access_log,
);

/// An agent that carried a connection, the direction that it names, and its legs' labels.
struct Reporter<'a> {
    agent: &'a Agent,
    direction: &'static str,
}

/// The agents that carry the connections of a way.
fn reporters(pair: &Pair) -> Vec<Reporter<'_>> {
    let [a, b] = pair.agents();
    let [outbound, inbound] =
        [(a, "outbound"), (b, "inbound")].map(|(agent, direction)| Reporter { agent, direction });
    match pair.way {
        Way::ToUnmeshed => vec![outbound],
        Way::FromUnmeshed => vec![inbound],
        Way::Direct => vec![],
        Way::Mesh | Way::RandomPorts | Way::LossyWire | Way::ToService => {
            vec![outbound, inbound]
        }
    }
}

impl Reporter<'_> {
    fn metrics(&self) -> Metrics {
        self.agent.metrics().unwrap()
    }

    /// The sum of a family over one of the two legs, `src` or `dst`.
    fn sum(&self, metrics: &Metrics, family: &str, peer: &str) -> f64 {
        let labels = [
            ("direction", self.direction),
            ("peer", peer),
            ("src_pod", "client"),
            ("dst_pod", "server"),
        ];
        metrics.sum(family, &labels)
    }

    fn lines(&self) -> Vec<String> {
        let log = self.agent.log();
        let lines = log.lines().filter(|line| line.contains("\taccess\t"));
        lines.map(str::to_owned).collect()
    }
}

/// Sends `asked` bytes, gets `answered` bytes, and ends in good order.
fn converse(client: &TcpStream, server: &TcpStream, asked: usize, answered: usize) {
    thread::scope(|scope| {
        scope.spawn(|| {
            payload::receive_all(server, 1, asked).unwrap();
            payload::send(server, 2, answered).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
        });
        payload::send(client, 1, asked).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(client, 2, answered).unwrap();
    });
}

// Byte counts of a test are whole numbers far below 2^52.
#[expect(clippy::cast_precision_loss)]
fn number(count: usize) -> f64 {
    count as f64
}

fn counters_agree_with_what_the_client_did(pair: &Pair) {
    const CONNECTIONS: usize = 20;
    for turn in 0..CONNECTIONS {
        let (client, server) = pair.connection().unwrap();
        converse(&client, &server, turn * KIB, 3 * turn * KIB + 1);
    }
    pair.nothing_is_held().unwrap();

    let asked = CONNECTIONS * (CONNECTIONS - 1) / 2 * KIB;
    let answered = 3 * asked + CONNECTIONS;
    for reporter in reporters(pair) {
        let metrics = reporter.metrics();
        for (peer, read, wrote) in [("src", asked, answered), ("dst", answered, asked)] {
            let sum = |family| reporter.sum(&metrics, family, peer);
            assert_eq!(sum("tcp_open_total"), number(CONNECTIONS));
            assert_eq!(sum("tcp_close_total"), number(CONNECTIONS));
            assert_eq!(sum("tcp_open_connections"), 0.0);
            assert_eq!(sum("tcp_read_bytes_total"), number(read));
            assert_eq!(sum("tcp_write_bytes_total"), number(wrote));
        }
        let clean = [("reason", ""), ("errno", "")];
        assert_eq!(
            metrics.sum("tcp_close_total", &clean),
            number(2 * CONNECTIONS)
        );
        legs_say_how_they_are_secured(pair, &reporter, &metrics);
    }
}

/// The leg to the app is loopback; the other has the peer's identity, or says why it has none.
fn legs_say_how_they_are_secured(pair: &Pair, reporter: &Reporter, metrics: &Metrics) {
    let outbound = reporter.direction == "outbound";
    let (app, other) = if outbound {
        ("src", "dst")
    } else {
        ("dst", "src")
    };
    let security = |peer| {
        let labels = [("peer", peer)];
        let sample = metrics.samples("tcp_open_total", &labels).next().unwrap();
        let identity = if outbound { "server_id" } else { "client_id" };
        ["tls", "no_tls_reason", identity].map(|name| sample.label(name).to_owned())
    };
    assert_eq!(security(app), ["no_identity", "loopback", ""]);
    let expected = match pair.way {
        Way::ToUnmeshed => ["no_identity", "not_provided_by_service_discovery", ""],
        Way::FromUnmeshed => ["no_identity", "no_tls_from_remote", ""],
        _ => ["true", "", CLIENT_ID],
    };
    assert_eq!(security(other), expected);
}

/// As istio/istio#52060 has it, where counters moved only when connections closed.
fn counters_move_while_a_connection_lives(pair: &Pair) {
    let (client, server) = pair.connection().unwrap();
    let idle = pair.connection().unwrap();
    for turn in 1..=3 {
        payload::send(&client, turn, 100 * KIB).unwrap();
        payload::receive(&server, turn, 100 * KIB).unwrap();
        let read = 100 * KIB * usize::try_from(turn).unwrap();
        let expected = [2.0, 2.0, 0.0, number(read)];
        for reporter in reporters(pair) {
            wait_for(&reporter, "src", expected);
            wait_for(&reporter, "dst", [2.0, 2.0, 0.0, 0.0]);
        }
    }
    converse(&client, &server, 0, 0);
    for reporter in reporters(pair) {
        wait_for(&reporter, "src", [1.0, 2.0, 1.0, number(300 * KIB)]);
    }
    converse(&idle.0, &idle.1, 0, 0);
    for reporter in reporters(pair) {
        wait_for(&reporter, "src", [0.0, 2.0, 2.0, number(300 * KIB)]);
    }
}

/// Waits until a leg's counters are `expected`: connections that are open, that were opened, that
/// were closed, and bytes read.
fn wait_for(reporter: &Reporter, peer: &str, expected: [f64; 4]) {
    const FAMILIES: [&str; 4] = [
        "tcp_open_connections",
        "tcp_open_total",
        "tcp_close_total",
        "tcp_read_bytes_total",
    ];
    let mut seen = expected;
    let reached = eventually("counters", Duration::from_secs(5), || {
        let metrics = reporter.metrics();
        seen = FAMILIES.map(|family| reporter.sum(&metrics, family, peer));
        seen == expected
    });
    reached.unwrap_or_else(|error| panic!("{error}: {expected:?}, not {seen:?}"));
}

fn a_reset_is_counted_under_its_reason(pair: &Pair) {
    for (client_resets, reason) in [(true, "client_reset"), (false, "server_reset")] {
        let (client, server) = pair.connection().unwrap();
        // The server's kernel may have a connection that its agent doesn't know to stand yet.
        payload::send(&client, 3, 1).unwrap();
        payload::receive(&server, 3, 1).unwrap();
        let (resets, is_told) = if client_resets {
            (client, server)
        } else {
            (server, client)
        };
        let linger = Some(Duration::ZERO);
        SockRef::from(&resets).set_linger(linger).unwrap();
        drop(resets);
        payload::receive(&is_told, 1, 1).unwrap_err();
        for reporter in reporters(pair) {
            let what = format!("a {reason} of both legs");
            let labels = [("reason", reason), ("errno", "ECONNRESET")];
            let counted = || reporter.metrics().sum("tcp_close_total", &labels) == 2.0;
            eventually(&what, PATIENCE, counted).unwrap();
            let line = || {
                let lines = reporter.lines();
                let ending = format!(" error=\"{reason}\"");
                let is_error =
                    |line: &&String| line.contains("\terror\t") && line.ends_with(&ending);
                lines.iter().filter(is_error).count() == 1
            };
            eventually("its line at level error", PATIENCE, line).unwrap();
        }
    }
}

fn each_connection_has_one_line_in_the_access_log(pair: &Pair) {
    const CONNECTIONS: usize = 5;
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    let sources: Vec<SocketAddr> = (0..CONNECTIONS)
        .map(|turn| {
            let client = pair.dial(to).unwrap();
            let server = accept(&listener).unwrap();
            converse(&client, &server, 10, 20 + turn);
            client.local_addr().unwrap()
        })
        .collect();
    for reporter in reporters(pair) {
        let all = || reporter.lines().len() >= CONNECTIONS;
        eventually("the lines of all connections", PATIENCE, all).unwrap();
        let lines = reporter.lines();
        assert_eq!(lines.len(), CONNECTIONS, "{lines:#?}");
        for (turn, source) in sources.iter().enumerate() {
            let (sent, received) = match reporter.direction {
                "outbound" => (10, 20 + turn),
                _ => (20 + turn, 10),
            };
            let bytes = format!(" bytes_sent={sent} bytes_recv={received} ");
            let its: Vec<_> = lines.iter().filter(|line| line.contains(&bytes)).collect();
            assert_eq!(its.len(), 1, "{bytes}: {lines:#?}");
            has_the_keys(pair, &reporter, its[0], *source, to);
        }
    }
}

/// Compares a line with ztunnel's keys, in their order.
fn has_the_keys(pair: &Pair, reporter: &Reporter, line: &str, from: SocketAddr, to: SocketAddr) {
    let meshed = matches!(pair.way, Way::Mesh | Way::RandomPorts | Way::LossyWire);
    let identity = |end: &str| {
        let line = format!("{end}.identity=\"{CLIENT_ID}\" ");
        if meshed { line } else { String::new() }
    };
    let workload = |end: &str, name: &str| {
        format!(
            "{end}.workload=\"{name}\" {end}.namespace=\"default\" {}",
            identity(end)
        )
    };
    let (level, scope, rest) = {
        let mut parts = line.splitn(5, '\t').skip(1);
        let [level, scope, message] = [(); 3].map(|()| parts.next().unwrap());
        assert_eq!(message, "connection complete");
        (level, scope, parts.next().unwrap())
    };
    assert_eq!((level, scope), ("info", "access"));
    let (client, rest) = rest
        .strip_prefix("src.addr=")
        .unwrap()
        .split_once(' ')
        .unwrap();
    // Through a tunnel, the server's agent knows the tunnel's port, not the connection's.
    if meshed && reporter.direction == "inbound" {
        assert_eq!(client.parse::<SocketAddr>().unwrap().ip(), from.ip());
    } else {
        assert_eq!(client, from.to_string());
    }
    let destination = if meshed {
        let tunnel = SocketAddr::new(to.ip(), 15_008);
        format!("dst.addr={tunnel} dst.hbone_addr={to} ")
    } else {
        format!("dst.addr={to} ")
    };
    let beginning = format!(
        "{}{destination}{}direction=\"{}\" bytes_sent=",
        workload("src", "client"),
        workload("dst", "server"),
        reporter.direction
    );
    assert!(rest.starts_with(&beginning), "not\n{beginning}\nin\n{rest}");
    let (_, ending) = rest.split_once(" duration=\"").unwrap();
    let millis = ending.strip_suffix("ms\"").unwrap();
    assert!(millis.parse::<u64>().is_ok(), "{ending}");
}
