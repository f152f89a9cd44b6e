//! One agent takes the place of another: nothing is refused, cut or lost.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{Agent, Fate, PORT, Pod, Process, Scene, eventually, nginx, payload::Payload};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LIMIT: Duration = Duration::from_secs(20);
const MESH: u16 = 15008;
const STORM: u16 = 8081;
/// Between two messages on long-lived connections.
const BETWEEN_WORDS: Duration = Duration::from_millis(1);

/// What goes on while agents come and go.
struct Traffic {
    client: Arc<Pod>,
    server: Arc<Pod>,
    long_lived: Vec<TcpStream>,
    opened: AtomicUsize,
    done: AtomicBool,
}

impl Traffic {
    fn new(scene: &Scene, long_lived: usize) -> Self {
        let addresses: Vec<IpAddr> = scene.server.addresses().to_vec();
        let open = |to: &IpAddr| {
            let stream = scene.client.connect((*to, PORT)).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream
        };
        Self {
            client: Arc::clone(&scene.client),
            server: Arc::clone(&scene.server),
            long_lived: addresses
                .iter()
                .cycle()
                .take(long_lived)
                .map(open)
                .collect(),
            opened: AtomicUsize::new(0),
            done: AtomicBool::new(false),
        }
    }

    /// Runs `work` in the middle of the traffic. Panics where a connection isn't answered whole.
    ///
    /// `callers` threads open connections one after the other.
    fn during<T>(&self, callers: usize, work: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            let callers: Vec<_> = (0..callers)
                .map(|number| scope.spawn(move || self.call_again_and_again(number)))
                .collect();
            let talker = scope.spawn(|| self.talk());
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            self.done.store(true, Ordering::Relaxed);
            for caller in callers {
                caller.join().unwrap();
            }
            talker.join().unwrap();
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn call_again_and_again(&self, number: usize) {
        let addresses = self.server.addresses();
        let caller = self.client.caller();
        for turn in number.. {
            if self.done.load(Ordering::Relaxed) {
                return;
            }
            let to = addresses[turn % addresses.len()];
            let fate = caller.call((to, PORT));
            assert_eq!(fate, Fate::Echoed, "connection {turn} of caller {number}");
            self.opened.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends something on each long-lived connection in turn, and reads it again.
    fn talk(&self) {
        let mut payloads: Vec<Payload> = (0..self.long_lived.len())
            .map(|number| Payload::new(number as u64))
            .collect();
        while !self.done.load(Ordering::Relaxed) {
            for (mut stream, payload) in self.long_lived.iter().zip(&mut payloads) {
                let sent = payload.next(1000);
                stream.write_all(sent).unwrap();
                let mut received = vec![0; sent.len()];
                stream.read_exact(&mut received).unwrap();
                assert!(received == sent, "other bytes came back");
                // The processors are for those that open connections.
                thread::sleep(BETWEEN_WORDS);
            }
        }
    }
}

/// Requests to nginx without a pause, each on a connection of its own.
struct Storm {
    nginx: Process,
    wrk: Process,
}

impl Storm {
    fn new(scene: &Scene) -> Self {
        let http = format!("server {{ listen {STORM}; location / {{ return 200 'answer'; }} }}");
        let nginx = nginx(&scene.server, scene.bed.folder(), &http).unwrap();
        let nginx = nginx.spawn().unwrap();
        scene.server.wait_listening(STORM).unwrap();
        let url = format!("http://{}:{STORM}/", scene.server.v4());
        let wrk = [
            "wrk",
            "-t1",
            "-c32",
            "-d1h",
            "-H",
            "Connection: close",
            &url,
        ];
        let wrk = scene.client.spawn(wrk).unwrap();
        Self { nginx, wrk }
    }

    /// Ends it. How many connections it has opened; panics where one of them failed.
    fn connections(self) -> u32 {
        self.wrk.signal(Signal::SIGINT).unwrap();
        assert!(self.wrk.wait(LIMIT).unwrap().success());
        let said = self.wrk.log();
        assert!(!said.contains("Socket errors"), "{said}");
        assert!(!said.contains("Non-2xx"), "{said}");
        let line = said.lines().find(|line| line.contains("requests in"));
        let number = line.and_then(|line| line.split_whitespace().next());
        let number = number.unwrap_or_else(|| panic!("no number: {said}"));
        assert!(self.nginx.is_running(), "{}", self.nginx.log());
        number.parse().unwrap()
    }
}

/// Upgrades both nodes' agents in turn, `upgrades` times in all, with `long_lived` connections open
/// all the while, while `callers` open new ones, and a storm of them where it is asked for.
fn upgrade(upgrades: usize, long_lived: usize, callers: usize, storm: bool) {
    let mut scene = Scene::new("", "").unwrap();
    let traffic = Traffic::new(&scene, long_lived);
    let storm = storm.then(|| Storm::new(&scene));
    let nodes = [Arc::clone(&scene.a), Arc::clone(&scene.b)];
    let mut old: Vec<Agent> = Vec::new();
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    let began = Instant::now();
    traffic.during(callers, || {
        for node in nodes.iter().cycle().take(upgrades) {
            old.push(scene.bed.upgrade_agent(node).unwrap());
            let before = traffic.opened.load(Ordering::Relaxed);
            let served = || traffic.opened.load(Ordering::Relaxed) > before + 100;
            eventually("connections through the new agent", LIMIT, served).unwrap();
        }
    });
    let stormed = storm.map_or(0, Storm::connections);
    let took = began.elapsed();
    let opened = u32::try_from(traffic.opened.load(Ordering::Relaxed)).unwrap() + stormed;
    let rate = f64::from(opened) / took.as_secs_f64();
    println!("{opened} connections in {took:?}: {rate:.0} a second");
    let packets = wire.tcp().into_iter();
    let past = packets.filter(|packet| ![packet.from.port(), packet.to.port()].contains(&MESH));
    let past: Vec<_> = past.collect();
    assert!(past.is_empty(), "past the agents: {past:?}");
    assert_eq!(wire.missed().unwrap(), 0);
    drop(wire);
    let living = old.iter().filter(|agent| agent.is_running()).count();
    assert!(living > 0, "none carries the long-lived connections");
    drop(traffic);
    for agent in &old {
        assert!(agent.wait_ended(LIMIT).unwrap().success());
    }
}

#[test]
fn upgrades_refuse_cut_and_lose_nothing() {
    upgrade(6, 40, 4, false);
}

#[test]
#[ignore = "long: 20 upgrades with 200 long-lived connections"]
fn twenty_upgrades_refuse_cut_and_lose_nothing() {
    upgrade(20, 200, 4, true);
}

#[test]
fn metrics_and_probes_are_the_new_agents() {
    let mut scene = Scene::new("", "").unwrap();
    for _ in 0..3 {
        assert_eq!(
            scene.client.caller().call((scene.server.v4(), PORT)),
            Fate::Echoed
        );
    }
    let node = Arc::clone(&scene.a);
    // While both have the port, what waits to be accepted by the old one is reset.
    let opened = |scene: &Scene| {
        let metrics = scene.metrics(&scene.a);
        metrics.map(|metrics| metrics.sum("tcp_open_total", &[]))
    };
    assert!(opened(&scene).unwrap() >= 3.0);
    let old = scene.bed.upgrade_agent(&node).unwrap();
    eventually("the old agent to leave its port", LIMIT, || {
        opened(&scene).is_ok_and(|opened| opened == 0.0)
    })
    .unwrap();
    assert_eq!(node.get("/ready").unwrap().status, 200);
    assert!(old.wait_ended(LIMIT).unwrap().success());
}

/// The old one, which may not have heard yet that it is the old one, sees the new one's programs come.
#[test]
fn an_old_agent_leaves_its_successors_programs_in_their_place() {
    let upgraded = [(); 4].map(|()| {
        let mut scene = Scene::new("", "").unwrap();
        let nodes = [&scene.a, &scene.b].map(Arc::clone);
        let olds = nodes.map(|node| scene.bed.upgrade_agent(&node).unwrap());
        (scene, olds)
    });
    for (scene, olds) in upgraded {
        for (node, old) in [&scene.a, &scene.b].into_iter().zip(olds) {
            assert!(old.wait_ended(LIMIT).unwrap().success());
            let metrics = scene.metrics(node).unwrap();
            let differences = metrics.sum("malla_audit_differences_total", &[]);
            assert!(differences == 0.0, "{}", scene.bed.agent(node).log());
        }
    }
}

#[test]
fn a_second_agent_that_is_not_told_to_take_over_is_refused() {
    let scene = Scene::new("", "").unwrap();
    let second = scene.bed.agent_command(&scene.a).unwrap().output().unwrap();
    assert!(!second.status.success());
    assert!(second.stderr.contains("--takeover"), "{}", second.stderr);
    assert_eq!(
        scene.client.caller().call((scene.server.v4(), PORT)),
        Fate::Echoed
    );
}

#[test]
fn a_new_agent_that_dies_at_its_start_leaves_the_old_one_in_place() {
    let mut scene = Scene::new("", "").unwrap();
    let call = |scene: &Scene| scene.client.caller().call((scene.server.v4(), PORT));
    for delay in (0..).map(|step| Duration::from_millis(step * 25)) {
        let command = scene.bed.agent_command(&scene.a).unwrap();
        let new = command.argument("--takeover").spawn().unwrap();
        thread::sleep(delay);
        new.kill9();
        // The new one may have taken over just before its end, with no time left to say so.
        let mut has_taken_over = false;
        eventually("the old agent to serve or to be replaced", LIMIT, || {
            let old = scene.bed.agent(&scene.a).log();
            has_taken_over = old.contains("another agent has taken over");
            has_taken_over || call(&scene) == Fate::Echoed
        })
        .unwrap();
        if has_taken_over {
            break;
        }
    }
    let node = Arc::clone(&scene.a);
    scene.bed.upgrade_agent(&node).unwrap();
    assert_eq!(call(&scene), Fate::Echoed);
}

#[test]
fn an_agent_that_is_told_to_end_serves_until_its_successor_does() {
    let mut scene = Scene::new("", "").unwrap();
    let traffic = Traffic::new(&scene, 4);
    let node = Arc::clone(&scene.a);
    let old = Pid::from_raw(scene.bed.agent(&node).process().pid());
    let old = traffic.during(4, || {
        let next = node.bpffs().join("next");
        thread::scope(|scope| {
            let upgraded = scope.spawn(|| scene.bed.upgrade_agent(&node).unwrap());
            // The kubelet may tell the old one to end as soon as the new one has started.
            while std::fs::read_link(&next).is_err() && !upgraded.is_finished() {
                thread::yield_now();
            }
            kill(old, Signal::SIGTERM).unwrap();
            upgraded.join().unwrap()
        })
    });
    drop(traffic);
    assert!(old.wait_ended(LIMIT).unwrap().success());
}
