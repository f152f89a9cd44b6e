//! What a pod's apps meet when no agent lives: a refusal at once, a reset, and never a plaintext
//! byte on the wire.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use malla_testbed::{
    Capture, EchoApp, Fate, Link, Node, PORT, Pod, PodSpec, SECRET, TcpState, Testbed, eventually,
    say,
};

const LIMIT: Duration = Duration::from_secs(10);
/// "At once": the kernel takes microseconds, a busy machine's scheduler some of its time slices.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A meshed client on node `a`, a meshed server with an echoing app on node `b`, and a stranger
/// beside each of them.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    b: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
    app: EchoApp,
    _strangers: [EchoApp; 2],
}

impl Scene {
    fn new(link: Link, settings: &str) -> Self {
        let mut bed = Testbed::new("gone")
            .unwrap()
            .with_link(link)
            .with_settings(settings);
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = bed.pod(&a, PodSpec::new("client")).unwrap();
        let near = bed.pod(&a, PodSpec::new("near").unmeshed()).unwrap();
        let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
        let far = bed.pod(&b, PodSpec::new("far").unmeshed()).unwrap();
        let app = server.echo(PORT).unwrap();
        let strangers = [near.echo(PORT).unwrap(), far.echo(PORT).unwrap()];
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            b,
            client,
            server,
            near,
            far,
            app,
            _strangers: strangers,
        }
    }

    fn kill_agents(&self) {
        self.bed.agent(&self.a).kill9();
        self.bed.agent(&self.b).kill9();
    }

    /// What the wire and the client's own interface show from now on.
    fn watch(&self) -> [Capture; 2] {
        [
            self.bed.capture_wire(&self.a, &self.b).unwrap(),
            self.client.capture().unwrap(),
        ]
    }
}

fn addresses(pod: &Pod) -> Vec<SocketAddr> {
    let addresses = pod.addresses().iter();
    addresses.map(|a| SocketAddr::new(*a, PORT)).collect()
}

fn assert_unseen(captures: &[Capture]) {
    for capture in captures {
        assert!(!capture.contains(SECRET), "plaintext on the wire");
        assert_eq!(capture.missed().unwrap(), 0);
    }
}

fn assert_refused_at_once(from: &Pod, to: &Pod) {
    for address in addresses(to) {
        let (fate, time) = from.caller().timed_call(address);
        assert_eq!(fate, Fate::Refused, "{} to {address}", from.name());
        assert!(time < AT_ONCE, "{} to {address}: {time:?}", from.name());
    }
}

#[test]
fn a_closed_pods_connections_are_refused_at_once_both_ways() {
    for link in [Link::Veth, Link::CLEAN_WIRE] {
        let mut scene = Scene::new(link, "");
        for to in addresses(&scene.server) {
            assert_eq!(scene.client.caller().call(to), Fate::Echoed);
        }
        scene.kill_agents();
        for to in [&scene.near, &scene.far, &scene.server] {
            assert_refused_at_once(&scene.client, to);
        }
        for from in [&scene.near, &scene.far] {
            assert_refused_at_once(from, &scene.server);
        }
        scene.bed.start_agent(&scene.a).unwrap();
        scene.bed.start_agent(&scene.b).unwrap();
        let a = scene.bed.agent(&scene.a).metrics().unwrap();
        let b = scene.bed.agent(&scene.b).metrics().unwrap();
        assert!(a.syns("outbound", "refused", "no_agent") >= 6.0);
        assert!(b.syns("inbound", "refused", "no_agent") >= 4.0);
        for to in addresses(&scene.server) {
            assert_eq!(scene.client.caller().call(to), Fate::Echoed);
        }
    }
}

#[test]
fn a_meshed_client_of_a_pod_without_agent_is_reset() {
    let scene = Scene::new(Link::CLEAN_WIRE, "");
    scene.bed.agent(&scene.b).kill9();
    for to in addresses(&scene.server) {
        // The client's own agent has taken the connection before it dials on.
        let (fate, time) = scene.client.caller().timed_call(to);
        assert!(matches!(fate, Fate::Reset | Fate::Refused), "{fate:?}");
        assert!(time < AT_ONCE, "{time:?}");
    }
}

#[test]
fn an_open_pods_new_connections_pass_in_plaintext() {
    let mut scene = Scene::new(Link::CLEAN_WIRE, "failMode: open");
    scene.kill_agents();
    for (from, to) in [
        (&scene.client, &scene.far),
        (&scene.client, &scene.server),
        (&scene.near, &scene.server),
    ] {
        for address in addresses(to) {
            assert_eq!(from.caller().call(address), Fate::Echoed, "{address}");
        }
    }
    scene.bed.start_agent(&scene.a).unwrap();
    scene.bed.start_agent(&scene.b).unwrap();
    let a = scene.bed.agent(&scene.a).metrics().unwrap();
    let b = scene.bed.agent(&scene.b).metrics().unwrap();
    assert!(a.syns("outbound", "passed", "fail_open") >= 4.0);
    assert!(b.syns("inbound", "passed", "fail_open") >= 4.0);
}

#[test]
fn an_open_but_strict_pod_stays_closed_to_clients() {
    let scene = Scene::new(Link::CLEAN_WIRE, "failMode: open\nmtls: strict");
    scene.kill_agents();
    assert_refused_at_once(&scene.near, &scene.server);
    assert_refused_at_once(&scene.far, &scene.server);
    assert_eq!(scene.app.accepted(), 0);
    for address in addresses(&scene.far) {
        assert_eq!(scene.client.caller().call(address), Fate::Echoed);
    }
}

#[test]
fn an_app_that_writes_after_its_agents_death_is_reset_and_unheard() {
    let scene = Scene::new(Link::Veth, "");
    let watch = scene.watch();
    let connected = addresses(&scene.server).into_iter();
    let mut streams: Vec<_> = connected
        .map(|to| scene.client.caller().connect(to).unwrap())
        .collect();
    for stream in &mut streams {
        assert_eq!(say(stream, SECRET), Fate::Echoed);
    }
    scene.bed.agent(&scene.a).kill9();
    for stream in &mut streams {
        assert_eq!(say(stream, SECRET), Fate::Reset);
    }
    assert_unseen(&watch);
}

#[test]
fn a_server_that_writes_after_its_agents_death_is_reset_and_unheard() {
    let scene = Scene::new(Link::Veth, "");
    let watch = [scene.server.capture().unwrap()];
    let near = scene.client.caller();
    let mut streams: Vec<_> = addresses(&scene.server)
        .into_iter()
        .map(|to| near.connect(to).unwrap())
        .collect();
    for stream in &mut streams {
        assert_eq!(say(stream, SECRET), Fate::Echoed);
    }
    scene.bed.agent(&scene.b).kill9();
    for stream in &mut streams {
        assert!(matches!(say(stream, SECRET), Fate::Reset | Fate::Ended));
    }
    eventually("the app's connections to be gone", LIMIT, || {
        let sockets = scene.server.sockets();
        let mut open = sockets.iter().filter(|s| s.local.port() == PORT);
        open.all(|socket| socket.state != TcpState::Established)
    })
    .unwrap();
    assert_unseen(&watch);
}

#[test]
fn apps_that_write_while_an_agent_dies_are_reset_and_unheard() {
    for clients in [true, false] {
        let scene = Scene::new(Link::Veth, "");
        let watch = scene.watch();
        let servers = [scene.server.capture().unwrap()];
        let streams = addresses(&scene.server).into_iter();
        let streams = streams.map(|to| scene.client.caller().connect(to).unwrap());
        let streams: Vec<_> = streams.collect();
        let echoed = AtomicUsize::new(0);
        thread::scope(|scope| {
            for stream in &streams {
                // The client writes without end, and the server what it has read.
                scope.spawn(move || {
                    let (mut stream, bytes) = (stream, SECRET.repeat(100));
                    while stream.write_all(&bytes).is_ok() {}
                });
                let echoed = &echoed;
                scope.spawn(move || {
                    let (mut stream, mut buffer) = (stream, vec![0; 64 << 10]);
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        echoed.fetch_add(length, Ordering::Relaxed);
                    }
                });
            }
            eventually("bytes to flow", LIMIT, || {
                echoed.load(Ordering::Relaxed) > 1 << 20
            })
            .unwrap();
            let node = if clients { &scene.a } else { &scene.b };
            scene.bed.agent(node).kill9();
        });
        assert_unseen(&watch);
        assert_unseen(&servers);
    }
}

#[test]
fn an_app_that_writes_after_the_agents_half_closed_socket_is_gone_is_reset_and_unheard() {
    let scene = Scene::new(Link::Veth, "");
    scene
        .client
        .netns()
        .sysctls(&[("ipv4/tcp_fin_timeout", "1")])
        .unwrap();
    let watch = scene.watch();
    let mut streams: Vec<_> = addresses(&scene.server)
        .into_iter()
        .map(|to| scene.client.caller().connect(to).unwrap())
        .collect();
    for stream in &mut streams {
        assert_eq!(say(stream, SECRET), Fate::Echoed);
    }
    // The agent's sockets towards the client are in FIN_WAIT2 from here on.
    scene.app.half_close();
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    scene.bed.agent(&scene.a).kill9();
    let from: Vec<IpAddr> = scene.client.addresses().to_vec();
    eventually("the agent's sockets to be gone", LIMIT, || {
        let sockets = scene.client.sockets();
        sockets
            .iter()
            .all(|socket| !from.contains(&socket.remote.ip()))
    })
    .unwrap();
    for stream in &mut streams {
        let fate = say(stream, SECRET);
        assert!(matches!(fate, Fate::Reset | Fate::Ended), "{fate:?}");
        // A first write may still be taken by a socket that hears of the reset only then.
        assert_eq!(say(stream, SECRET), Fate::Reset);
    }
    assert_unseen(&watch);
}

#[test]
fn an_app_that_was_never_told_of_its_agents_death_is_reset_at_its_next_write() {
    for agent_again in [false, true] {
        let mut scene = Scene::new(Link::Veth, "");
        let watch = scene.watch();
        let mut streams: Vec<_> = addresses(&scene.server)
            .into_iter()
            .map(|to| scene.client.caller().connect(to).unwrap())
            .collect();
        for stream in &mut streams {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        let deaf = "table inet deaf { chain input { type filter hook input priority 0;\n\
                    iif lo tcp flags & rst == rst drop\n}\n}\n";
        let nft = scene.client.command(["nft", "-f", "-"]);
        nft.input(deaf).run().unwrap();
        scene.bed.agent(&scene.a).kill9();
        // The kernel has sent its resets by the time that the process is reaped.
        let nft = ["nft", "delete", "table", "inet", "deaf"];
        scene.client.run(nft).unwrap();
        if agent_again {
            scene.bed.start_agent(&scene.a).unwrap();
        }
        for stream in &mut streams {
            assert_eq!(say(stream, SECRET), Fate::Reset);
        }
        if !agent_again {
            scene.bed.start_agent(&scene.a).unwrap();
            let metrics = scene.bed.agent(&scene.a).metrics().unwrap();
            let gone = metrics.steering_packets("outbound", "refused", "agent_gone");
            assert!(gone >= 2.0, "{gone}");
        }
        assert_unseen(&watch);
    }
}

#[test]
fn an_address_that_comes_while_no_agent_lives_is_closed() {
    let scene = Scene::new(Link::Veth, "failMode: open");
    scene.kill_agents();
    for (pod, lines) in [
        (
            &scene.client,
            "addr add 10.101.9.9/16 dev eth0\naddr add fd65::909/64 dev eth0 nodad\n",
        ),
        (
            &scene.server,
            "addr add 10.102.9.9/16 dev eth0\naddr add fd66::909/64 dev eth0 nodad\n",
        ),
    ] {
        pod.netns().ip(lines).unwrap();
    }
    for (own, to, late) in [
        ("10.101.9.9", IpAddr::from(scene.far.v4()), "10.102.9.9"),
        ("fd65::909", IpAddr::from(scene.far.v6()), "fd66::909"),
    ] {
        let (own, late): (IpAddr, IpAddr) = (own.parse().unwrap(), late.parse().unwrap());
        let from = scene.client.caller().from((own, 0).into());
        assert_eq!(from.call((to, PORT)), Fate::Refused);
        assert_eq!(scene.near.caller().call((late, PORT)), Fate::Refused);
    }
    assert_eq!(scene.app.accepted(), 0);
}
