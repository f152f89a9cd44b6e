//! What the command line, the metrics and the access log count is what happened.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]
#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use malla_testbed::{Agent, Caller, Fate, PORT, Pod, PodSpec, Scene, Testbed, eventually, say};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Calls in threads, and says how many had this fate.
fn call_many(pod: &Pod, to: SocketAddr, calls: usize, fate: Fate) -> usize {
    const THREADS: usize = 8;
    let call = |share: usize| {
        let caller = Caller::new(pod.netns());
        (0..share).filter(|_| caller.call(to) == fate).count()
    };
    thread::scope(|scope| {
        let shares = (0..THREADS).map(|thread| (calls + thread) / THREADS);
        let callers: Vec<_> = shares
            .map(|share| scope.spawn(move || call(share)))
            .collect();
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .sum()
    })
}

/// Waits until an agent's access log has this many lines of connections that ended with `error`, or in
/// good order.
fn assert_lines(agent: &Agent, of: (&str, &str), error: Option<&str>, count: usize) {
    let (direction, src) = of;
    let parts = [
        "\tconnection complete\t".to_owned(),
        format!(" direction=\"{direction}\""),
        format!(" src.workload=\"{src}\""),
    ];
    let ended = |line: &&str| match error {
        Some(error) => line.ends_with(&format!(" error=\"{error}\"")),
        None => !line.contains(" error="),
    };
    let mut found = 0;
    let told = eventually("lines of the access log", LIMIT, || {
        let log = agent.log();
        let lines = log
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part)));
        found = lines.filter(ended).count();
        found == count
    });
    told.unwrap_or_else(|problem| panic!("{problem}: {count} of {of:?} {error:?}, not {found}"));
}

/// The number that `malla edges -o json` has of a pair, secured or for a reason.
fn edge(edges: &Value, src: &str, reason: Option<&str>) -> u64 {
    let edges = edges.as_array().unwrap().iter();
    edges
        .filter(|edge| edge["src"] == src && edge["dst"] == "server")
        .filter(|edge| edge["reason"].as_str() == reason)
        .filter(|edge| edge["secured"] == reason.is_none())
        .map(|edge| edge["opened"].as_u64().unwrap())
        .sum()
}

#[test]
fn the_numbers_of_ten_thousand_connections_agree_everywhere() {
    const ECHOED: usize = 8_000;
    const NOBODY_LISTENS: usize = 1_000;
    const REFUSED: usize = 1_000;
    const OPEN: usize = 5;
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    let (a, b) = (Arc::clone(&scene.a), Arc::clone(&scene.b));
    let stranger = scene
        .bed
        .pod(&a, PodSpec::new("stranger").unmeshed())
        .unwrap();
    let to = SocketAddr::from((scene.server.v4(), PORT));
    let nowhere = SocketAddr::from((scene.server.v4(), 81));
    assert_eq!(call_many(&scene.client, to, ECHOED, Fate::Echoed), ECHOED);
    let refused = call_many(&scene.client, nowhere, NOBODY_LISTENS, Fate::Reset);
    assert_eq!(refused, NOBODY_LISTENS);
    assert_eq!(call_many(&stranger, to, REFUSED, Fate::Reset), REFUSED);
    let mut held: Vec<_> = (0..OPEN)
        .map(|_| scene.client.connect(to).unwrap())
        .collect();
    for stream in &mut held {
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }

    let number = |count: usize| count as u64;
    let mut seen = Value::Null;
    let settled = eventually("the counters of the last connections", LIMIT, || {
        seen = scene
            .bed
            .ask_json(&b, &["stat", "server", "-t", "1ms"])
            .unwrap();
        seen[0]["tcpConnections"] == number(OPEN)
    });
    settled.unwrap_or_else(|error| panic!("{error}: {seen:#}"));
    eventually("the client's too", LIMIT, || {
        let stat = scene
            .bed
            .ask_json(&a, &["stat", "client", "--outbound", "-t", "1ms"])
            .unwrap();
        stat[0]["tcpConnections"] == number(OPEN)
    })
    .unwrap();

    // The client's side.
    let stat = scene
        .bed
        .ask_json(&a, &["stat", "client", "--outbound", "-t", "1ms"])
        .unwrap();
    assert_eq!(stat[0]["tcpOpened"], number(ECHOED + NOBODY_LISTENS + OPEN));
    assert_eq!(stat[0]["tcpClosed"][""], number(ECHOED));
    assert_eq!(stat[0]["tcpClosed"]["peer_refused"], number(NOBODY_LISTENS));
    let edges = scene.bed.ask_json(&a, &["edges"]).unwrap();
    assert_eq!(edge(&edges, "client", None), number(ECHOED + OPEN));
    assert_eq!(
        edge(&edges, "client", Some("peer_refused")),
        number(NOBODY_LISTENS)
    );
    let [at_a, at_b] = [&a, &b].map(|node| scene.bed.agent(node));
    let of = ("outbound", "client");
    assert_lines(at_a, of, None, ECHOED);
    assert_lines(at_a, of, Some("peer_refused"), NOBODY_LISTENS);

    // The server's side.
    let stat = scene
        .bed
        .ask_json(&b, &["stat", "server", "-t", "1ms"])
        .unwrap();
    assert_eq!(
        stat[0]["tcpOpened"],
        number(ECHOED + NOBODY_LISTENS + REFUSED + OPEN)
    );
    let closed = &stat[0]["tcpClosed"];
    assert_eq!(closed[""], number(ECHOED));
    assert_eq!(closed["connect_refused"], number(NOBODY_LISTENS));
    assert_eq!(closed["plaintext_refused"], number(REFUSED));
    let edges = scene.bed.ask_json(&b, &["edges"]).unwrap();
    assert_eq!(edge(&edges, "client", None), number(ECHOED + OPEN));
    assert_eq!(
        edge(&edges, "client", Some("connect_refused")),
        number(NOBODY_LISTENS)
    );
    assert_eq!(
        edge(&edges, "stranger", Some("plaintext_refused")),
        number(REFUSED)
    );
    assert_eq!(edge(&edges, "stranger", Some("no_tls_from_remote")), 0);
    let of = ("inbound", "client");
    assert_lines(at_b, of, None, ECHOED);
    assert_lines(at_b, of, Some("connect_refused"), NOBODY_LISTENS);
    let of = ("inbound", "stranger");
    assert_lines(at_b, of, Some("plaintext_refused"), REFUSED);
}

/// A connection that an endpoint refuses is one at that endpoint's agent, and goes on to another
/// endpoint: both ends must count it alike.
#[test]
fn both_ends_agree_on_connections_that_went_on_to_another_endpoint() {
    const CALLS: usize = 60;
    let mut bed = Testbed::new("retries").unwrap();
    let [a, b] = ["a", "b"].map(|name| bed.node(name).unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let pods = ["living", "gone"].map(|name| {
        let spec = PodSpec::new(name).label("app", "web").port(PORT);
        bed.pod(&b, spec).unwrap()
    });
    // Discovery doesn't know that the other one's app is gone.
    let _app = pods[0].echo(PORT).unwrap();
    let web = format!(
        "addresses: [10.96.0.10]\nports: [{{port: 80, targetPort: {PORT}}}]\nselector: {{app: web}}"
    );
    bed.service("web", web).unwrap();
    bed.start_agents().unwrap();
    let to = SocketAddr::from(([10, 96, 0, 10], 80));
    assert_eq!(call_many(&client, to, CALLS, Fate::Echoed), CALLS);

    let number = |count: usize| count as u64;
    let stat = |node, arguments: &[&str]| {
        let line = [&["stat", "-t", "1ms"], arguments].concat();
        bed.ask_json(node, &line).unwrap()[0].clone()
    };
    let mut told = Value::Null;
    let settled = eventually("the ends of all", LIMIT, || {
        told = stat(&a, &["client", "--outbound"]);
        let at_server = stat(&b, &["living"]);
        told["tcpClosed"][""] == number(CALLS) && at_server["tcpClosed"][""] == number(CALLS)
    });
    settled.unwrap_or_else(|error| panic!("{error}: {told:#}"));
    // To the app, each of its connections is one, whatever it took.
    assert_eq!(told["tcpOpened"], number(CALLS));
    assert_lines(bed.agent(&a), ("outbound", "client"), None, CALLS);
    assert_eq!(stat(&b, &["living"])["tcpOpened"], number(CALLS));

    let metrics = bed.agent(&a).metrics().unwrap();
    let of = [
        ("dst_pod", "gone"),
        ("dst_service", "web"),
        ("reason", "peer_refused"),
    ];
    let retried = metrics.sum("malla_outbound_tcp_retries_total", &of);
    assert!(retried > 0.0, "half of the calls are drawn there");
    assert_eq!(
        metrics.sum("malla_outbound_tcp_retries_total", &[]),
        retried
    );
    let refused = stat(&b, &["gone"]);
    assert_eq!(refused["tcpOpened"].as_f64(), Some(retried), "{refused:#}");
    let closed = &refused["tcpClosed"]["connect_refused"];
    assert_eq!(closed.as_f64(), Some(retried), "{refused:#}");
    for (node, reason) in [(&a, "peer_refused"), (&b, "connect_refused")] {
        let edges = bed.ask_json(node, &["edges"]).unwrap();
        let mut edges = edges.as_array().unwrap().iter();
        let edge = edges.find(|edge| edge["dst"] == "gone").unwrap();
        assert_eq!(edge["reason"], reason);
        assert_eq!(edge["opened"].as_f64(), Some(retried), "{edge:#}");
    }

    // And explain tells why an endpoint gets no connections.
    let explain = bed.ask(&a, &["explain", "client", "web:80"]).unwrap();
    assert!(
        explain.contains("peer_refused, then another endpoint\n"),
        "{explain}"
    );
}
