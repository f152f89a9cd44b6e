//! Agents that are killed in the middle of many pods' traffic, and pods that start or are made anew
//! around that.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use malla_testbed::{
    EchoApp, Fate, Node, PORT, Pod, PodSpec, SECRET, Scene, Testbed, eventually, say,
};

const LIMIT: Duration = Duration::from_secs(20);
/// "At once": the kernel takes microseconds, and 40 threads of a busy machine wait their turns.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Five times what it may take until a pod is meshed that an agent finds.
const MESHED: Duration = Duration::from_secs(5);

const PODS: usize = 20;
/// What new connections say, as `SECRET` is what those say that live when the agent dies.
const NEW: &[u8] = b"what a new connection says";

/// Many meshed pods on node `a`, a meshed server on node `b`.
struct World {
    a: Arc<Node>,
    b: Arc<Node>,
    pods: Vec<Arc<Pod>>,
    server: Arc<Pod>,
    _app: EchoApp,
    /// Answers on the live connections so far.
    answers: AtomicUsize,
    /// Pods of which a new connection has ended so far.
    called: AtomicUsize,
    bed: Testbed,
}

/// A new connection: when it began, how long it took, and how it ended.
type Call = (Instant, Duration, Fate);

impl World {
    fn new(settings: &str) -> Self {
        let mut bed = Testbed::new("death").unwrap().with_settings(settings);
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let pods = (0..PODS).map(|number| PodSpec::new(format!("pod-{number}")));
        let pods = pods.map(|spec| bed.pod(&a, spec).unwrap()).collect();
        let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
        let app = server.echo(PORT).unwrap();
        bed.start_agents().unwrap();
        Self {
            a,
            b,
            pods,
            server,
            _app: app,
            answers: AtomicUsize::new(0),
            called: AtomicUsize::new(0),
            bed,
        }
    }

    /// The server's address, IPv4 for every other pod.
    fn address(&self, pod: usize) -> SocketAddr {
        let addresses: &[IpAddr] = self.server.addresses();
        (addresses[pod % addresses.len()], PORT).into()
    }

    /// Talks on a connection of each pod until it ends: how, and when.
    fn talk<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Vec<ScopedJoinHandle<'s, (Fate, Instant)>> {
        let talk = |(number, pod): (usize, &'s Arc<Pod>)| {
            let mut stream = pod.connect(self.address(number)).unwrap();
            scope.spawn(move || {
                loop {
                    match say(&mut stream, SECRET) {
                        Fate::Echoed => self.answers.fetch_add(1, Ordering::Relaxed),
                        fate => return (fate, Instant::now()),
                    };
                }
            })
        };
        self.pods.iter().enumerate().map(talk).collect()
    }

    /// Opens new connections from each pod until `end`, once that is known.
    fn call<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        end: &'s OnceLock<Instant>,
    ) -> Vec<ScopedJoinHandle<'s, Vec<Call>>> {
        let call = |(number, pod): (usize, &'s Arc<Pod>)| {
            scope.spawn(move || {
                let mut calls = Vec::new();
                while end.get().is_none_or(|end| Instant::now() < *end) {
                    let began = Instant::now();
                    let (fate, took) = pod.caller().saying(NEW).timed_call(self.address(number));
                    if calls.is_empty() {
                        self.called.fetch_add(1, Ordering::Relaxed);
                    }
                    calls.push((began, took, fate));
                }
                calls
            })
        };
        self.pods.iter().enumerate().map(call).collect()
    }

    /// Kills the pods' agent in the middle of their traffic. New connections must have the fate
    /// that is `expected`, live ones are reset, and nothing of what those say is on the wire.
    fn kill_in_traffic(&self, expected: Fate) {
        let wire = self.bed.capture_wire(&self.a, &self.b).unwrap();
        let end = OnceLock::new();
        thread::scope(|scope| {
            let talks = self.talk(scope);
            let calls = self.call(scope, &end);
            let flowing = || {
                let [answers, called] =
                    [&self.answers, &self.called].map(|count| count.load(Ordering::Relaxed));
                answers > 10 * PODS && called == PODS
            };
            let flowing = eventually("traffic", LIMIT, flowing);
            let killed = Instant::now();
            self.bed.agent(&self.a).kill9();
            let dead = Instant::now();
            end.set(dead + Duration::from_secs(4)).unwrap();
            flowing.unwrap();
            for talk in talks {
                let (fate, at) = talk.join().unwrap();
                assert_eq!(fate, Fate::Reset);
                assert!(killed < at && at < dead + AT_ONCE, "{:?}", at - dead);
            }
            for calls in calls {
                let calls = calls.join().unwrap();
                let (before, after): (Vec<Call>, Vec<Call>) =
                    calls.into_iter().partition(|(began, ..)| *began < dead);
                assert!(!before.is_empty() && !after.is_empty());
                for (_, took, fate) in after {
                    assert_eq!(fate, expected);
                    assert!(took < AT_ONCE, "{took:?}");
                }
            }
        });
        assert!(!wire.contains(SECRET), "plaintext on the wire");
        assert_eq!(wire.missed().unwrap(), 0);
        assert_eq!(wire.contains(NEW), expected == Fate::Echoed);
    }
}

#[test]
fn a_killed_agents_closed_pods_are_refused_reset_and_unheard_and_served_by_the_next() {
    let mut world = World::new("");
    world.kill_in_traffic(Fate::Refused);
    let node = Arc::clone(&world.a);
    world.bed.start_agent(&node).unwrap();
    for (number, pod) in world.pods.iter().enumerate() {
        let served = || pod.caller().saying(NEW).call(world.address(number)) == Fate::Echoed;
        eventually("a pod to be served", LIMIT, served).unwrap();
    }
    let metrics = world.bed.agent(&node).metrics().unwrap();
    assert!(metrics.syns("outbound", "refused", "no_agent") >= 20.0);
}

#[test]
fn a_killed_agents_open_pods_are_reset_and_unheard_and_their_new_connections_pass() {
    let world = World::new("failMode: open");
    world.kill_in_traffic(Fate::Echoed);
}

/// Whether a connection to each of a server's addresses works, and shows nothing of what it says
/// on its pod's network.
fn is_meshed(client: &Pod, server: &Pod) -> bool {
    let capture = client.capture().unwrap();
    let caller = client.caller().saying(SECRET).patience(AT_ONCE);
    let mut addresses = server.addresses().iter();
    addresses.all(|to| caller.call((*to, PORT)) == Fate::Echoed) && !capture.contains(SECRET)
}

fn assert_meshed_since(began: Instant, what: &str, client: &Pod, server: &Pod) {
    eventually(what, MESHED, || is_meshed(client, server)).unwrap();
    println!("{what}: {:?}", began.elapsed());
    assert!(began.elapsed() < MESHED, "{what}: {:?}", began.elapsed());
}

#[test]
fn a_pod_that_starts_while_no_agent_lives_is_meshed_when_one_does() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.b);
    scene.bed.agent(&node).kill9();
    let late = PodSpec::new("late").port(PORT).settings("mtls: strict");
    let late = scene.bed.pod(&node, late).unwrap();
    let _app = late.echo(PORT).unwrap();
    let began = Instant::now();
    scene.bed.start_agent(&node).unwrap();
    assert_meshed_since(began, "a late pod as a server", &scene.client, &late);
    assert_meshed_since(began, "a late pod as a client", &late, &scene.server);
}

#[test]
fn a_pod_whose_netns_is_made_anew_under_its_name_is_meshed_again() {
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    for _ in 0..3 {
        let began = Instant::now();
        scene.client = scene.bed.replace_pod(&scene.client).unwrap();
        assert_meshed_since(began, "a new client", &scene.client, &scene.server);
        let began = Instant::now();
        scene.server = scene.bed.replace_pod(&scene.server).unwrap();
        scene.app = scene.server.echo(PORT).unwrap();
        assert_meshed_since(began, "a new server", &scene.client, &scene.server);
    }
    eventually("each old netns to be told of", LIMIT, || {
        let log = scene.bed.agent(&scene.b).log();
        log.matches("its netns is gone").count() == 3
    })
    .unwrap();
}

#[test]
fn pods_that_are_made_anew_while_no_agent_lives_are_meshed_when_one_does() {
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    let nodes = [Arc::clone(&scene.a), Arc::clone(&scene.b)];
    for node in &nodes {
        scene.bed.agent(node).kill9();
    }
    scene.client = scene.bed.replace_pod(&scene.client).unwrap();
    scene.server = scene.bed.replace_pod(&scene.server).unwrap();
    scene.app = scene.server.echo(PORT).unwrap();
    let began = Instant::now();
    for node in &nodes {
        scene.bed.start_agent(node).unwrap();
    }
    assert_meshed_since(began, "both of a pair", &scene.client, &scene.server);
}
