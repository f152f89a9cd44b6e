//! What happens at each limit of an agent: new connections wait or are refused, by a reason, and
//! those that live go on.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use malla_testbed::{
    Agent, EchoApp, Fate, Pair, PodSpec, Testbed, Way, accept, allow_many_descriptors, eventually,
    listen, say,
};

const LIMIT: Duration = Duration::from_secs(20);
/// A kernel forgets its app's socket after 1 s, and an agent says of what it has found gone that nothing comes
/// any more 30 s after its end.
const FORGOTTEN: Duration = Duration::from_secs(45);
const PORT: u16 = 8080;
const MESH: u16 = 15008;

/// Pods with these settings, under agents with one worker each: one tunnel between them.
fn pair(client: &str, server: &str) -> (Pair, EchoApp) {
    let bed = Testbed::new("limits").unwrap().with_agents_on_cpu(0);
    let client = PodSpec::new("client").settings(client);
    let server = PodSpec::new("server").settings(server);
    let pair = Pair::on(bed, Way::Mesh, client, server).unwrap();
    let app = pair.server.echo(PORT).unwrap();
    (pair, app)
}

/// No number for one more descriptor: all small ones are taken.
const NO_DESCRIPTORS: u32 = 3;
const ENOUGH_DESCRIPTORS: u32 = 1_000;

/// Sets the number that an agent's descriptors stay below.
fn limit_descriptors(agent: &Agent, limit: u32) {
    let pid = agent.process().pid().to_string();
    let limit = format!("--nofile={limit}:");
    let set = Command::new("prlimit")
        .args(["--pid", &pid, &limit])
        .status();
    assert!(set.unwrap().success());
}

fn refused(agent: &Agent, reason: &str) -> f64 {
    let metrics = agent.metrics().unwrap();
    metrics.sum("malla_connections_refused_total", &[("reason", reason)])
}

/// Counters are whole numbers far below the limits of a cast.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
fn count(counter: f64) -> i64 {
    counter as i64
}

#[test]
fn a_clients_agent_without_descriptors_lets_new_connections_wait_and_carries_the_old_ones() {
    let (pair, _app) = pair("", "");
    let to = pair.address(PORT);
    let [agent, _] = pair.agents();
    let mut old = pair.client.caller().connect(to).unwrap();
    assert_eq!(say(&mut old, b"before"), Fate::Echoed);
    limit_descriptors(agent, NO_DESCRIPTORS);
    let mut new = [(); 20].map(|()| pair.client.caller().connect(to).unwrap());
    let said = agent
        .process()
        .wait_for_log("can't accept connections", LIMIT);
    said.unwrap();
    assert_eq!(say(&mut old, b"meanwhile"), Fate::Echoed);
    limit_descriptors(agent, ENOUGH_DESCRIPTORS);
    let answers = new.each_mut().map(|stream| say(stream, b"after"));
    assert_eq!(answers, [Fate::Echoed; 20]);
    let metrics = agent.metrics().unwrap();
    assert!(metrics.sum("malla_accept_errors_total", &[("errno", "EMFILE")]) > 0.0);
    let lines = agent.log().matches("can't accept connections").count();
    assert!(lines <= 3, "{lines} lines in place of one in 10 s");
}

#[test]
fn a_servers_agent_without_descriptors_refuses_new_connections_and_carries_the_old_ones() {
    let (pair, _app) = pair("", "");
    let to = pair.address(PORT);
    let [_, agent] = pair.agents();
    let mut old = pair.client.caller().connect(to).unwrap();
    assert_eq!(say(&mut old, b"before"), Fate::Echoed);
    limit_descriptors(agent, NO_DESCRIPTORS);
    for _ in 0..20 {
        assert_eq!(pair.client.caller().call(to), Fate::Reset);
    }
    assert_eq!(say(&mut old, b"meanwhile"), Fate::Echoed);
    limit_descriptors(agent, ENOUGH_DESCRIPTORS);
    assert_eq!(pair.client.caller().call(to), Fate::Echoed);
    assert_eq!(say(&mut old, b"after"), Fate::Echoed);
}

/// A look at what it has takes a descriptor or two, and is what frees them.
#[test]
fn an_agent_without_descriptors_frees_those_of_connections_whose_app_is_gone() {
    let (pair, _app) = pair("", "");
    // The server's app keeps its end.
    let listener = listen(&pair.server, 0).unwrap();
    let to = pair.address(listener.local_addr().unwrap().port());
    let connect = || {
        let client = pair.client.caller().connect(to).unwrap();
        (client, accept(&listener).unwrap())
    };
    let (clients, _servers): (Vec<_>, Vec<_>) = (0..20).map(|_| connect()).unzip();
    let [agent, other] = pair.agents();
    let carried = || other.metrics().unwrap().sum("tcp_open_connections", &[]);
    assert!(carried() > 0.0);
    limit_descriptors(agent, NO_DESCRIPTORS);
    let forgets = [("ipv4/tcp_fin_timeout", "1")];
    pair.client.netns().sysctls(&forgets).unwrap();
    drop(clients);
    eventually("all to be freed", FORGOTTEN, || carried() == 0.0).unwrap();
    limit_descriptors(agent, ENOUGH_DESCRIPTORS);
    pair.nothing_is_held().unwrap();
}

#[test]
fn a_pod_that_has_its_number_of_connections_refuses_one_more_by_that_reason() {
    // Of the server's five one is the tunnel.
    for (client, server, refusing) in [("maxConnections: 4", "", 0), ("", "maxConnections: 5", 1)] {
        let (pair, _app) = pair(client, server);
        let to = pair.address(PORT);
        let agent = pair.agents()[refusing];
        let mut open: Vec<TcpStream> = (0..4)
            .map(|_| pair.client.caller().connect(to).unwrap())
            .collect();
        for stream in &mut open {
            assert_eq!(say(stream, b"hello"), Fate::Echoed);
        }
        assert_eq!(pair.client.caller().call(to), Fate::Reset);
        assert_eq!(count(refused(agent, "connection_limit")), 1);
        assert_eq!(say(&mut open[0], b"still here"), Fate::Echoed);
        open.pop();
        eventually("room for another", LIMIT, || {
            pair.client.caller().call(to) == Fate::Echoed
        })
        .unwrap();
    }
}

#[test]
fn a_client_that_has_every_dial_port_is_refused_one_more_by_that_reason() {
    let (pair, _app) = pair("", "dialPorts: 20000-20999");
    allow_many_descriptors().unwrap();
    let to = pair.address(PORT);
    let mut open: Vec<TcpStream> = (0..1_000)
        .map(|_| pair.client.caller().connect(to).unwrap())
        .collect();
    for stream in &mut open {
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }
    assert_eq!(pair.client.caller().call(to), Fate::Reset);
    let log = || pair.agents()[1].log();
    let told = || log().contains("error=\"dial_ports_exhausted\"");
    eventually("the reason in the access log", LIMIT, told).unwrap();
    assert_eq!(say(&mut open[0], b"still here"), Fate::Echoed);
    open.pop();
    eventually("room for another", LIMIT, || {
        pair.client.caller().call(to) == Fate::Echoed
    })
    .unwrap();
}

#[test]
fn a_raised_limit_holds_for_the_next_connection() {
    let (pair, _app) = pair("", "maxConnections: 1");
    let to = pair.address(PORT);
    assert_eq!(
        pair.client.caller().call(to),
        Fate::Reset,
        "the tunnel is one"
    );
    pair.bed
        .change_settings(&pair.server, "maxConnections: 9")
        .unwrap();
    eventually("the change to hold", LIMIT, || {
        pair.client.caller().call(to) == Fate::Echoed
    })
    .unwrap();
}

#[test]
fn half_open_handshakes_with_one_pod_leave_places_for_anothers() {
    const STRANGERS: usize = 6;
    const EACH: usize = 20;
    // One worker, whose 64 places all pods of the node share.
    let mut bed = Testbed::new("places").unwrap().with_agents_on_cpu(0);
    let [clients, node, outside] = ["a", "b", "c"].map(|name| bed.node(name).unwrap());
    let client = bed.pod(&clients, PodSpec::new("client")).unwrap();
    let flooded = bed.pod(&node, PodSpec::new("flooded")).unwrap();
    let other = bed.pod(&node, PodSpec::new("other")).unwrap();
    let strangers: Vec<_> = (0..STRANGERS)
        .map(|number| {
            bed.pod(&outside, PodSpec::new(format!("s{number}")))
                .unwrap()
        })
        .collect();
    bed.start_agent(&clients).unwrap();
    bed.start_agent(&node).unwrap();
    let _app = other.echo(PORT).unwrap();
    let began = Instant::now();
    let held: Vec<TcpStream> = strangers
        .iter()
        .flat_map(|stranger| (0..EACH).map(|_| stranger.connect((flooded.v4(), MESH))))
        // One that is over the limit may be reset before `connect` has returned.
        .filter(|knock| {
            !knock
                .as_ref()
                .is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
        })
        .collect::<Result<_, _>>()
        .unwrap();
    let agent = bed.agent(&node);
    // 32 of the 64 places go to one pod; each of the others is told at once.
    let over = 88;
    eventually("all that are over the limit to be refused", LIMIT, || {
        count(refused(agent, "handshake_limit")) >= over
    })
    .unwrap();
    assert_eq!(client.caller().call((other.v4(), PORT)), Fate::Echoed);
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "it was no flood any more"
    );
    assert_eq!(count(refused(agent, "handshake_limit")), over);
    drop(held);
}

#[test]
fn a_flood_of_refusals_is_counted_whole_and_fills_no_log() {
    const KNOCKS: u32 = 300;
    let (pair, _app) = pair("", "");
    let [_, agent] = pair.agents();
    let to = SocketAddr::new(pair.address(PORT).ip(), MESH);
    let stranger = pair.b.enter(|| {
        (0..KNOCKS).try_for_each(|_| {
            let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
            match stream.read_to_end(&mut Vec::new()) {
                Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error),
                _ => Ok(()),
            }
        })
    });
    stranger.unwrap();
    eventually("each to be counted", LIMIT, || {
        refused(agent, "tls_failed") >= f64::from(KNOCKS)
    })
    .unwrap();
    let told = |text| agent.process().wait_for_log(text, LIMIT).unwrap();
    told("left_out=");
    // A line in 10 s.
    let lines = agent.log().matches("connection failed").count();
    assert!((1..=3).contains(&lines), "{lines} lines");
}
