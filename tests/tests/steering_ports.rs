//! Ports that the agent shares with a pod's apps and their clients: its listeners, and its range
//! of source ports towards the app.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{
    Capture, EchoApp, Fate, Node, PORT, Pod, PodSpec, SECRET, TcpState, Testbed, eventually,
    same_family, say,
};
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(10);
const MESH_PORT: u16 = 15008;
/// Files that the tunnels of a test may hold: two ends for each address and worker.
const TUNNELS: usize = 16;

/// A meshed client on node `a`, a meshed server with an echoing app on node `b`, a neighbour of
/// the client, and a stranger on node `a`.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    b: Arc<Node>,
    client: Arc<Pod>,
    neighbour: Arc<Pod>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    app: EchoApp,
}

impl Scene {
    fn new(server: PodSpec) -> Self {
        let mut bed = Testbed::new("ports").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = bed.pod(&a, PodSpec::new("client")).unwrap();
        let neighbour = bed.pod(&a, PodSpec::new("neighbour")).unwrap();
        let stranger = bed.pod(&a, PodSpec::new("stranger").unmeshed()).unwrap();
        let server = bed.pod(&b, server).unwrap();
        let app = server.echo(PORT).unwrap();
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            b,
            client,
            neighbour,
            server,
            stranger,
            app,
        }
    }

    fn wire(&self) -> Capture {
        self.bed.capture_wire(&self.a, &self.b).unwrap()
    }

    /// Connections that the agents of both nodes have carried or refused, and files they have open.
    fn effort(&self) -> (f64, usize) {
        let nodes = [&self.a, &self.b].map(|node| self.bed.agent(node));
        let opened = nodes.map(|agent| agent.metrics().unwrap().sum("tcp_open_total", &[]));
        let files = nodes.map(|agent| {
            let folder = format!("/proc/{}/fd", agent.process().pid());
            fs::read_dir(folder).unwrap().count()
        });
        (opened.iter().sum(), files.iter().sum())
    }
}

fn server() -> PodSpec {
    PodSpec::new("server").port(PORT)
}

/// Ports that the agent listens on in a pod where no app listens but on [`PORT`].
fn agents_ports(pod: &Pod) -> HashSet<u16> {
    let sockets = pod.sockets().into_iter();
    let listening = sockets.filter(|socket| socket.state == TcpState::Listen);
    let ports = listening.map(|socket| socket.local.port());
    ports.filter(|port| *port != PORT).collect()
}

/// Calls each of the agent's ports at each of `targets`, and sees that it ends there.
fn assert_refused_once(scene: &Scene, targets: &[IpAddr]) {
    let ports = agents_ports(&scene.client);
    assert!(ports.len() == 3 && ports.contains(&MESH_PORT), "{ports:?}");
    let (opened, files) = scene.effort();
    let mut calls = 0.0;
    for to in targets {
        for port in &ports {
            calls += 1.0;
            let fate = scene.client.caller().call((*to, *port));
            let refused = matches!(fate, Fate::Refused | Fate::Reset | Fate::Ended);
            assert!(refused, "{to}:{port}: {fate:?}");
        }
    }
    // A loop would open connections without end.
    let more = scene.effort().0 - opened;
    assert!(more <= 2.0 * calls, "{more} in {calls} calls");
    eventually("the agents to have closed what they opened", LIMIT, || {
        scene.effort().1 <= files + TUNNELS
    })
    .unwrap();
}

#[test]
fn a_call_to_a_listener_of_the_agent_is_refused_once() {
    let scene = Scene::new(server());
    let pods = [&scene.client, &scene.neighbour, &scene.server];
    let targets: Vec<IpAddr> = pods
        .iter()
        .flat_map(|pod| pod.addresses())
        .copied()
        .collect();
    assert_refused_once(&scene, &targets);
}

#[test]
fn a_call_to_a_listener_of_the_agent_over_the_loopback_is_refused_once() {
    let scene = Scene::new(server());
    let targets = ["127.0.0.1", "127.0.0.2", "::1"].map(|address| address.parse().unwrap());
    assert_refused_once(&scene, &targets);
}

#[test]
fn a_strangers_call_to_a_listener_of_the_agent_is_refused_once() {
    let scene = Scene::new(server());
    let (_, files) = scene.effort();
    for port in agents_ports(&scene.server) {
        for to in scene.server.addresses() {
            let fate = scene.stranger.caller().call((*to, port));
            let refused = matches!(fate, Fate::Refused | Fate::Reset | Fate::Ended);
            assert!(refused, "{to}:{port}: {fate:?}");
        }
    }
    eventually("the agents to have closed what they opened", LIMIT, || {
        scene.effort().1 <= files + TUNNELS
    })
    .unwrap();
    assert_eq!(scene.app.accepted(), 0);
}

#[test]
fn with_syn_cookies_connections_are_meshed_as_without() {
    let scene = Scene::new(server());
    for pod in [&scene.client, &scene.server, &scene.stranger] {
        let always = [("ipv4/tcp_syncookies", "2")];
        pod.netns().sysctls(&always).unwrap();
    }
    let wire = scene.wire();
    for to in scene.server.addresses() {
        for _ in 0..20 {
            let caller = scene.client.caller().saying(SECRET);
            assert_eq!(caller.call((*to, PORT)), Fate::Echoed);
        }
    }
    // What is said, with its end, before the agent has heard of the connection.
    let agent = scene.bed.agent(&scene.a).process();
    for to in scene.server.addresses() {
        agent.signal(Signal::SIGSTOP).unwrap();
        let callers: Vec<_> = (0..5)
            .map(|_| {
                let mut caller = scene.client.connect((*to, PORT)).unwrap();
                caller.write_all(SECRET).unwrap();
                caller.shutdown(Shutdown::Write).unwrap();
                caller
            })
            .collect();
        agent.signal(Signal::SIGCONT).unwrap();
        for mut caller in callers {
            let mut heard = Vec::new();
            caller.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, SECRET, "{to}");
        }
    }
    assert!(!wire.contains(SECRET));
    assert_eq!(wire.missed().unwrap(), 0);
    for to in scene.server.addresses() {
        for _ in 0..20 {
            assert_eq!(scene.stranger.caller().call((*to, PORT)), Fate::Echoed);
        }
    }
    for (from, number) in [(&scene.client, 25), (&scene.stranger, 20)] {
        let peers = scene.app.peers();
        for address in from.addresses() {
            let calls = peers.iter().filter(|peer| peer.ip() == *address);
            assert_eq!(calls.count(), number);
        }
    }
}

#[test]
fn an_app_that_calls_its_own_pods_address_reaches_itself_in_strict_mode() {
    let scene = Scene::new(server().settings("mtls: strict"));
    let loopbacks = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    let own: Vec<IpAddr> = scene
        .server
        .addresses()
        .iter()
        .chain(&loopbacks)
        .copied()
        .collect();
    for to in &own {
        assert_eq!(
            scene.server.caller().call((*to, PORT)),
            Fate::Echoed,
            "{to}"
        );
    }
    scene.bed.agent(&scene.b).kill9();
    for to in &own {
        assert_eq!(
            scene.server.caller().call((*to, PORT)),
            Fate::Echoed,
            "{to}"
        );
    }
}

#[test]
fn an_app_without_reuseaddr_listens_on_a_declared_port_of_the_dial_range() {
    const DECLARED: u16 = 20_500;
    let scene = Scene::new(server().port(DECLARED).settings("dialPorts: 20000-20999"));
    // Every port of the range has been used once, and waits for its last packets.
    for _ in 0..1100 {
        assert_eq!(
            scene.client.caller().call((scene.server.v4(), PORT)),
            Fate::Echoed
        );
    }
    assert!(scene.app.peers().iter().all(|peer| peer.port() != DECLARED));
    let app = EchoApp::without_reuse(scene.server.netns(), DECLARED).unwrap();
    for to in scene.server.addresses() {
        assert_eq!(scene.client.caller().call((*to, DECLARED)), Fate::Echoed);
    }
    assert_eq!(app.accepted(), 2);
}

#[test]
fn an_app_without_reuseaddr_listens_in_the_dial_range_and_the_agent_goes_round_it() {
    const UNDECLARED: u16 = 20_500;
    let scene = Scene::new(server().settings("dialPorts: 20000-20999"));
    let app = EchoApp::without_reuse(scene.server.netns(), UNDECLARED).unwrap();
    for turn in 0..1100 {
        let fate = scene.client.caller().call((scene.server.v4(), PORT));
        assert_eq!(fate, Fate::Echoed, "call {turn}");
    }
    let ports: HashSet<u16> = scene.app.peers().iter().map(SocketAddr::port).collect();
    assert!(ports.iter().all(|port| (20_000..=20_999).contains(port)));
    assert!(!ports.contains(&UNDECLARED));
    for to in scene.server.addresses() {
        assert_eq!(scene.client.caller().call((*to, UNDECLARED)), Fate::Echoed);
    }
    assert_eq!(app.accepted(), 2);
}

#[test]
fn a_client_whose_ports_are_those_of_the_dial_range_never_waits() {
    let scene = Scene::new(server().settings("dialPorts: 20000-20999"));
    let client = scene.stranger.v4();
    let call = |port: u16| {
        let caller = scene.stranger.caller().from((client, port).into());
        let (fate, time) = caller.timed_call((scene.server.v4(), PORT));
        assert!(
            matches!(fate, Fate::Echoed | Fate::Refused),
            "port {port}: {fate:?}"
        );
        // Less than the first repetition of a SYN.
        assert!(time < Duration::from_millis(900), "port {port}: {time:?}");
        usize::from(fate == Fate::Refused)
    };
    let refused: usize = thread::scope(|scope| {
        let halves = [20_000..20_500, 20_500..21_000];
        let threads = halves.map(|ports| scope.spawn(move || ports.map(call).sum::<usize>()));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let metrics = scene.bed.agent(&scene.b).metrics().unwrap();
    let clashes = metrics.syns("inbound", "refused", "port_clash");
    let refused = f64::from(u32::try_from(refused).unwrap());
    assert!(
        (clashes - refused).abs() < 0.5,
        "{clashes} clashes, {refused} refused"
    );
}

#[test]
fn a_meshed_client_whose_ports_are_those_of_the_dial_range_is_served() {
    let scene = Scene::new(server().settings("dialPorts: 20000-20999"));
    for to in scene.server.addresses() {
        let client = same_family(scene.client.addresses(), *to).unwrap();
        for port in (20_000..21_000).step_by(10) {
            let caller = scene.client.caller().from((client, port).into());
            let fate = caller.patience(Duration::from_secs(1)).call((*to, PORT));
            assert_eq!(fate, Fate::Echoed, "{client}:{port}");
        }
    }
}

/// An agent's resets that are lost, as by a rule of the pod's own, leave connections of the app's: they
/// aren't reset for it by the next ones, which go round their ports without a wait.
#[test]
fn a_port_whose_connection_the_app_still_has_is_gone_round() {
    const LOSE: &str = "table inet lossy { chain input { type filter hook input priority 0\n\
        iifname lo tcp dport 8080 tcp flags & rst == rst drop\n}\n}\n";
    let scene = Scene::new(server().settings("dialPorts: 20000-20999"));
    for to in scene.server.addresses() {
        let mut held = scene.client.connect((*to, PORT)).unwrap();
        assert_eq!(say(&mut held, SECRET), Fate::Echoed);
        let apps_ends = || {
            let sockets = scene.server.sockets().into_iter();
            let open = sockets.filter(|socket| {
                let (local, remote) = (socket.local, socket.remote);
                socket.state == TcpState::Established
                    && local == SocketAddr::new(*to, PORT)
                    && (20_000..=20_999).contains(&remote.port())
            });
            open.map(|socket| socket.remote).collect::<Vec<_>>()
        };
        let ends = apps_ends();
        assert_eq!(ends.len(), 1, "{ends:?}");
        let nft = scene.server.command(["nft", "-f", "-"]);
        nft.input(LOSE).run().unwrap();
        socket2::SockRef::from(&held)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(held);
        eventually("the agent's end to be gone", LIMIT, || {
            let mut sockets = scene.server.sockets().into_iter();
            !sockets.any(|socket| socket.local == ends[0])
        })
        .unwrap();
        let nft = scene
            .server
            .command(["nft", "delete", "table", "inet", "lossy"]);
        nft.run().unwrap();
        // Once each port, and some.
        for turn in 0..1010 {
            let (fate, time) = scene.client.caller().timed_call((*to, PORT));
            assert_eq!(fate, Fate::Echoed, "call {turn} to {to}");
            // Less than the first repetition of a SYN.
            assert!(time < Duration::from_millis(900), "call {turn}: {time:?}");
        }
        let what = "the app's own end to be as it was, and those of the calls to be gone";
        eventually(what, LIMIT, || apps_ends() == ends).unwrap();
    }
}
