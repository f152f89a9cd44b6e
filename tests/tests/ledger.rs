//! The ledger equals what the kernel has, and tells of what is leaked.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    collections::HashSet,
    fs,
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Fate, Node, PATIENCE, PORT, Pod, PodSpec, Scene, TcpState, eventually, say, system_call,
};
use serde_json::Value;
use socket2::SockRef;

/// Both workers of an agent listen in three roles.
const LISTENERS: u64 = 6;
/// A difference that stays for 10 s is told of. Looks come every three seconds or so, and more rarely
/// on a busy machine.
const ALARM: Duration = Duration::from_secs(30);
/// Longer than what is told of.
const TRAFFIC: Duration = Duration::from_secs(14);

/// Two workers, whatever the machine has.
fn scene() -> Scene {
    let mut scene = Scene::new("", "").unwrap();
    scene.bed = scene.bed.with_agent_arguments(["--workers", "2"]);
    for node in [Arc::clone(&scene.a), Arc::clone(&scene.b)] {
        scene.bed.upgrade_agent(&node).unwrap();
    }
    scene
}

/// What the agent of a node has in one pod.
struct Held {
    config: Value,
    pod: Value,
}

impl Held {
    fn of(node: &Node, pod: &Pod) -> Self {
        let config = node.config().unwrap();
        let workloads = config["ledger"]["workloads"].as_array().unwrap();
        let name = format!("default/{}", pod.name());
        let pod = workloads.iter().find(|w| w["workload"] == name.as_str());
        let pod = pod.unwrap_or_else(|| panic!("no {name} in {config:#}"));
        Self {
            pod: pod.clone(),
            config,
        }
    }

    fn sockets(&self, kind: &str) -> u64 {
        self.pod["sockets"][kind].as_u64().unwrap_or(0)
    }

    fn tunnels(&self) -> Vec<&Value> {
        let tunnels = self.config["tunnels"].as_array().unwrap();
        let of_pod = tunnels
            .iter()
            .filter(|t| t["workload"] == self.pod["workload"]);
        of_pod.collect()
    }

    fn streams(&self) -> u64 {
        self.tunnels()
            .iter()
            .filter_map(|t| t["streams"].as_u64())
            .sum()
    }

    /// Whether ledger and kernel are one, with all connections tunnels, and all tasks explained.
    fn is_at_rest(&self, tunnels: u64) -> bool {
        let idle = self.sockets("tunnel_outbound") + self.sockets("tunnel_inbound");
        idle == tunnels && self.pod["tasks"] == LISTENERS + 2 * tunnels && self.is_equal(tunnels)
    }

    /// Whether ledger and kernel both have so many connections, and every descriptor is explained.
    fn is_equal(&self, connections: u64) -> bool {
        let both = serde_json::json!({"listeners": LISTENERS, "connections": connections});
        let descriptors = &self.config["ledger"]["descriptors"];
        let sum = |section: &str| -> u64 {
            let kinds = descriptors[section].as_object().unwrap().values();
            kinds.filter_map(Value::as_u64).sum()
        };
        self.pod["believed"] == both
            && self.pod["kernel"] == both
            && self.pod["closed"] == 0
            && self.config["ledger"]["differences"] == serde_json::json!([])
            && descriptors["open"] == sum("entered") + sum("fromStart")
    }
}

/// Waits until a pod's ledger is as it should be.
fn wait_until(node: &Node, pod: &Pod, what: &str, is: impl Fn(&Held) -> bool) {
    let mut last = None;
    let seen = eventually(what, PATIENCE, || {
        let held = Held::of(node, pod);
        let is = is(&held);
        last = Some(held);
        is
    });
    if let Err(error) = seen {
        let last = last.unwrap();
        panic!("{error:#}: {:#}\n{:#}", last.pod, last.config["ledger"]);
    }
}

#[test]
fn while_200_connections_live_the_ledger_has_exactly_those_and_so_has_the_kernel() {
    let scene = scene();
    let to = |turn: usize| SocketAddr::new(scene.server.addresses()[turn % 2], PORT);
    let live: Vec<TcpStream> = (0..200)
        .map(|turn| {
            let mut stream = scene.client.connect(to(turn)).unwrap();
            assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
            stream
        })
        .collect();
    let legs = [
        (
            &scene.a,
            &scene.client,
            "app_outbound",
            "tunnel_outbound",
            0,
        ),
        // The app's own listener.
        (&scene.b, &scene.server, "app_inbound", "tunnel_inbound", 1),
    ];
    for (node, pod, app, tunnel, own_listeners) in legs {
        wait_until(node, pod, "200 connections in the ledger", |held| {
            let tunnels = held.tunnels().len() as u64;
            held.sockets(app) == 200
                && held.streams() == 200
                && held.sockets(tunnel) == tunnels
                && held.pod["tasks"] == LISTENERS + 200 + 2 * tunnels
                && held.is_equal(200 + tunnels)
        });
        // What the test itself sees in the pod: the app's end and the agent's of each leg.
        let held = Held::of(node, pod);
        let sockets = pod.sockets();
        let listening = sockets
            .iter()
            .filter(|s| s.state == TcpState::Listen)
            .count() as u64;
        assert_eq!(listening, LISTENERS + own_listeners);
        let open = sockets.iter().filter(|s| s.state == TcpState::Established);
        assert_eq!(open.count() as u64, 400 + held.tunnels().len() as u64);
    }
    drop(live);
    for (node, pod, ..) in legs {
        wait_until(node, pod, "no connection in the ledger", |held| {
            held.streams() == 0 && held.is_at_rest(held.tunnels().len() as u64)
        });
    }
}

#[test]
fn after_connections_of_every_kind_and_end_the_ledger_equals_the_kernel() {
    let mut scene = scene();
    let (a, b) = (Arc::clone(&scene.a), Arc::clone(&scene.b));
    let stranger = scene
        .bed
        .pod(&b, PodSpec::new("stranger").unmeshed())
        .unwrap();
    let (client, server) = (Arc::clone(&scene.client), Arc::clone(&scene.server));
    let _apps = [client.echo(PORT).unwrap(), stranger.echo(PORT).unwrap()];
    // Meshed both ways, plaintext both ways.
    let pairs = [
        (&client, &server),
        (&server, &client),
        (&client, &stranger),
        (&stranger, &client),
        (&stranger, &server),
    ];
    for (from, to) in pairs {
        for address in to.addresses() {
            for _ in 0..5 {
                every_end(from, (*address, PORT).into());
            }
            // Nobody listens there.
            let fate = from.caller().call((*address, 9));
            assert!(matches!(fate, Fate::Refused | Fate::Reset), "{fate:?}");
        }
    }
    for (node, pod) in [(&a, &client), (&b, &server)] {
        wait_until(node, pod, "the ledger to be at rest", |held| {
            held.streams() == 0 && held.is_at_rest(held.tunnels().len() as u64)
        });
    }
    // New agents have no tunnel yet, and the old ones end with theirs: so do the peers' pools.
    for node in [&a, &b] {
        let old = scene.bed.upgrade_agent(node).unwrap();
        assert!(old.wait_ended(PATIENCE).unwrap().success());
    }
    for (node, pod) in [(&a, &client), (&b, &server)] {
        wait_until(node, pod, "nothing to be left", |held| held.is_at_rest(0));
    }
}

/// One connection for each way to end.
fn every_end(from: &Pod, to: SocketAddr) {
    let open = || {
        let mut stream = from.connect(to).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        stream
    };
    let (reset, half_closed) = (open(), open());
    SockRef::from(&reset)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(reset);
    half_closed.shutdown(Shutdown::Write).unwrap();
    drop(open());
    assert_eq!(
        std::io::copy(&mut &half_closed, &mut std::io::sink()).unwrap(),
        0
    );
}

#[test]
fn traffic_raises_no_alarm() {
    let scene = scene();
    let end = Instant::now() + TRAFFIC;
    let opened = AtomicUsize::new(0);
    let call = |turn: usize| {
        let addresses = scene.server.addresses();
        let caller = scene.client.caller();
        while Instant::now() < end {
            let fate = caller.call((addresses[turn % addresses.len()], PORT));
            assert_eq!(fate, Fate::Echoed);
            opened.fetch_add(1, Ordering::Relaxed);
            // The test's own descriptors are limited, and its app keeps one of each connection.
            thread::sleep(Duration::from_millis(10));
        }
    };
    thread::scope(|scope| {
        for turn in 0..4 {
            let call = &call;
            scope.spawn(move || call(turn));
        }
    });
    assert!(opened.load(Ordering::Relaxed) > 1000);
    for node in [&scene.a, &scene.b] {
        let agent = scene.bed.agent(node);
        let log = agent.log();
        assert!(!log.contains("differ"), "{log}");
        let metrics = agent.metrics().unwrap();
        let differences = metrics.sum("malla_ledger_differences", &[]);
        assert!(differences.abs() < f64::EPSILON, "{differences}");
        assert!(metrics.sum("malla_ledger_look_cpu_seconds", &[]) > 0.0);
    }
}

fn descriptors(pid: i32) -> HashSet<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let numbers = entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse());
    numbers.map(Result::unwrap).collect()
}

#[test]
fn a_leaked_socket_raises_an_alarm_that_ends_with_it() {
    let scene = scene();
    let open = || {
        let mut stream = scene.client.connect((scene.server.v6(), PORT)).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        stream
    };
    let agent = scene.bed.agent(&scene.a);
    let pid = agent.process().pid();
    // So that each worker has its tunnel.
    let _before: Vec<_> = (0..8).map(|_| open()).collect();
    let before = descriptors(pid);
    let _connection = open();
    let leg = *descriptors(pid).difference(&before).next().unwrap();
    let leaked = system_call(pid, libc::SYS_dup, [leg, 0, 0]).unwrap();
    assert!(leaked >= 0, "dup returned {leaked}");

    let log = agent.process();
    log.wait_for_log("the ledger and the kernel differ for 10 s", ALARM)
        .unwrap();
    let log_line = agent.log();
    let line = log_line
        .lines()
        .find(|line| line.contains("differ for 10 s"))
        .unwrap();
    for part in [
        "error",
        "difference=\"unaccounted\"",
        "kind=\"connection\"",
        "workload=default/client",
        "count=1",
        &format!("descriptor={leaked}"),
        &format!("[{}]:{PORT}", scene.server.v6()),
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    let labels = [("difference", "unaccounted"), ("kind", "connection")];
    let metrics = agent.metrics().unwrap();
    let differences = metrics.sum("malla_ledger_differences", &labels);
    assert!((differences - 1.0).abs() < f64::EPSILON, "{differences}");
    let config = scene.a.config().unwrap();
    assert_eq!(config["ledger"]["differences"][0]["descriptor"], leaked);
    assert!(config["ledger"]["differences"][0]["forSeconds"].as_u64() >= Some(10));
    let other = scene.bed.agent(&scene.b).log();
    assert!(!other.contains("differ"), "{other}");

    let closed = system_call(pid, libc::SYS_close, [leaked.cast_unsigned(), 0, 0]).unwrap();
    assert_eq!(closed, 0);
    log.wait_for_log("the ledger and the kernel agree again", ALARM)
        .unwrap();
}
