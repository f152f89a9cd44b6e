//! What becomes of connections whose ends go without a word: they are freed, within limits.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read},
    mem,
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use malla_testbed::{
    Agent, EchoApp, Fate, PORT, Pair, Pod, PodSpec, Process, Testbed, Way, accept,
    allow_many_descriptors, eventually, listen, say, set_option,
};

const LIMIT: Duration = Duration::from_secs(20);
/// Five times what it may take until nothing of a deleted pod is held.
const GONE: Duration = Duration::from_secs(5);
/// Keepalive is 10 s and three probes; half of that again for a busy machine.
const KEEPALIVE: Duration = Duration::from_mins(1);
/// The app's kernel forgets its socket after 1 s, and answers the keepalive of 10 s later, or that
/// of 20 s, since the backlog of a loopback that answers many at once has a bound. A stream is given up 30 s
/// after its end.
const FORGOTTEN: Duration = Duration::from_secs(35);
const MESH: u16 = 15008;
const PEERS: usize = 20;

/// A program that takes connections and keeps them, and opens one to each address that it is given.
const KEEPS_ALL: &str = "
import socket, sys, threading, time
listener = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)
kept = []
def accept():
    while True:
        kept.append(listener.accept()[0])
        kept[-1].sendall(kept[-1].recv(100))
threading.Thread(target=accept).start()
for address in sys.argv[1:]:
    kept.append(socket.create_connection((address, 8080)))
    kept[-1].sendall(b'hello')
    assert kept[-1].recv(100) == b'hello'
print('has all', flush=True)
";

/// Peers on node `a`, and the server's node.
struct World {
    bed: Testbed,
    peers: Vec<Arc<Pod>>,
    _apps: Vec<EchoApp>,
    doomed: Arc<Pod>,
    program: Process,
    descriptors: [usize; 2],
}

impl World {
    /// A pod on node `b` with twenty tunnels in and twenty out.
    fn new() -> Self {
        let mut bed = Testbed::new("freed").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let peers = (0..PEERS).map(|number| PodSpec::new(format!("peer-{number}")));
        let peers: Vec<_> = peers.map(|spec| bed.pod(&a, spec).unwrap()).collect();
        let apps = peers.iter().map(|peer| peer.echo(PORT).unwrap()).collect();
        bed.start_agents().unwrap();
        let descriptors = [&a, &b].map(|node| bed.agent(node).open_descriptors().unwrap());
        let doomed = bed.pod(&b, PodSpec::new("doomed")).unwrap();
        let log = |text| bed.agent(&b).process().wait_for_log(text, LIMIT);
        log("enrolled\tworkload=default/doomed").unwrap();
        let mut command = vec!["python3".to_owned(), "-c".to_owned(), KEEPS_ALL.to_owned()];
        command.extend(peers.iter().map(|peer| peer.v6().to_string()));
        let program = doomed.spawn(command).unwrap();
        program.wait_for_log("has all", LIMIT).unwrap();
        Self {
            bed,
            peers,
            _apps: apps,
            doomed,
            program,
            descriptors,
        }
    }

    fn agents(&self) -> [&Agent; 2] {
        [&self.peers[0], &self.doomed].map(|pod| self.bed.agent(pod.node()))
    }
}

fn open_tunnels(agent: &Agent, direction: &str) -> f64 {
    let metrics = agent.metrics().unwrap();
    metrics.sum("malla_tunnels_open", &[("direction", direction)])
}

#[test]
fn a_pod_that_is_deleted_with_twenty_tunnels_each_way_is_gone_and_holds_nothing() {
    let mut world = World::new();
    let node = Arc::clone(world.doomed.node());
    let links = || {
        let links = ["ip", "-o", "link", "show", "type", "veth"];
        node.run(links).unwrap().stdout.lines().count()
    };
    let connect = |peer: &Arc<Pod>| {
        let mut stream = peer.connect((world.doomed.v4(), PORT)).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        stream
    };
    let streams: Vec<TcpStream> = world.peers.iter().map(connect).collect();
    for direction in ["inbound", "outbound"] {
        assert!(open_tunnels(world.agents()[1], direction) >= 20.0);
    }
    let before = links();

    let began = Instant::now();
    let doomed = Arc::clone(&world.doomed);
    world.bed.remove_pod(&doomed).unwrap();
    assert!(!world.program.is_running());
    // The kernel takes the host's end of its link away when nobody holds the netns any more.
    eventually("the link to be gone", GONE, || links() < before).unwrap();
    println!("its netns was gone after {:?}", began.elapsed());
    for mut stream in streams {
        stream.set_read_timeout(Some(GONE)).unwrap();
        let read = stream.read(&mut [0]);
        assert!(!read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    }
    for (agent, before) in world.agents().into_iter().zip(world.descriptors) {
        eventually("all to be freed", GONE, || {
            let tunnels = open_tunnels(agent, "inbound") + open_tunnels(agent, "outbound");
            tunnels == 0.0 && agent.open_descriptors().unwrap() <= before + 4
        })
        .unwrap();
    }
}

/// A pair of pods with many connections, both ends of which are kept.
struct Connected {
    pair: Pair,
    clients: Vec<TcpStream>,
    servers: Vec<TcpStream>,
}

impl Connected {
    fn new(way: Way, number: usize) -> Self {
        let pair = Pair::new(way).unwrap();
        let listener = listen(&pair.server, 0).unwrap();
        let addresses = pair.addresses(listener.local_addr().unwrap().port());
        let connect = |to| (way.dial(to).unwrap(), accept(&listener).unwrap());
        let connect_all = || {
            addresses
                .into_iter()
                .cycle()
                .take(number)
                .map(connect)
                .unzip()
        };
        let (clients, servers) = pair.client.enter(connect_all);
        Self {
            pair,
            clients,
            servers,
        }
    }
}

fn connected_on_each_way(number: usize) -> [Connected; 3] {
    allow_many_descriptors().unwrap();
    [Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed].map(|way| Connected::new(way, number))
}

/// Waits until the agents hold nothing, while the apps keep their ends.
fn all_are_freed(began: Instant, limit: Duration, all: &[Connected]) {
    for Connected { pair, .. } in all {
        while let Err(error) = pair.nothing_is_held() {
            assert!(began.elapsed() < limit, "{:?}: {error:#}", pair.way);
        }
        println!("{:?}: all freed after {:?}", pair.way, began.elapsed());
        assert!(began.elapsed() < limit);
    }
}

/// By PINGs in a tunnel and by keepalive elsewhere: each takes 30 to 40 s to be sure.
#[test]
#[ignore = "long: a peer is believed alive for 40 s"]
fn a_thousand_connections_of_a_link_that_was_cut_are_freed() {
    let all = connected_on_each_way(1_000);
    let began = Instant::now();
    for Connected { pair, .. } in &all {
        let down = format!("link set {} down\n", pair.a.wire_to(&pair.b));
        pair.a.netns().ip(&down).unwrap();
    }
    all_are_freed(began, KEEPALIVE, &all);
}

/// Gives the pod and all sockets of one side, to be dropped.
type Close = fn(&mut Connected) -> (&Pod, Vec<TcpStream>);

/// A kernel forgets a socket that its app has closed, and answers a later keepalive with a reset,
/// which is for the agent and for nobody on the network.
fn are_freed_after(number: usize, close: Close) {
    let mut all = connected_on_each_way(number);
    let meshed = &all[0].pair;
    let wire = meshed.bed.capture_wire(&meshed.a, &meshed.b).unwrap();
    let began = Instant::now();
    for connected in &mut all {
        let (pod, closed) = close(connected);
        let forgets = [("ipv4/tcp_fin_timeout", "1")];
        pod.netns().sysctls(&forgets).unwrap();
        drop(closed);
    }
    all_are_freed(began, FORGOTTEN, &all);
    let packets = wire.tcp().into_iter();
    let strays = packets.filter(|packet| ![packet.from.port(), packet.to.port()].contains(&MESH));
    assert_eq!(strays.collect::<Vec<_>>(), []);
}

fn close_clients(connected: &mut Connected) -> (&Pod, Vec<TcpStream>) {
    (&connected.pair.client, mem::take(&mut connected.clients))
}

fn close_servers(connected: &mut Connected) -> (&Pod, Vec<TcpStream>) {
    (&connected.pair.server, mem::take(&mut connected.servers))
}

#[test]
fn connections_that_only_the_client_closes_are_freed() {
    are_freed_after(200, close_clients);
}

#[test]
fn connections_that_only_the_server_closes_are_freed() {
    are_freed_after(200, close_servers);
}

/// Which would go on for them to its limit.
#[test]
fn an_old_agents_connections_that_only_one_side_closes_are_freed() {
    let sides: [Close; 2] = [close_clients, close_servers];
    let all = sides.map(|close| {
        let mut connected = Connected::new(Way::Mesh, 20);
        let nodes = [&connected.pair.a, &connected.pair.b].map(Arc::clone);
        let bed = &mut connected.pair.bed;
        let olds = nodes.map(|node| bed.upgrade_agent(&node).unwrap());
        let (pod, closed) = close(&mut connected);
        let forgets = [("ipv4/tcp_fin_timeout", "1")];
        pod.netns().sysctls(&forgets).unwrap();
        drop(closed);
        (connected, olds)
    });
    for (_connected, olds) in all {
        for old in olds {
            assert!(old.wait_ended(FORGOTTEN).unwrap().success());
            assert!(!old.log().contains("differ"), "{}", old.log());
        }
    }
}

#[test]
#[ignore = "long: a kernel's backlog takes them in two turns of the keepalive"]
fn a_thousand_connections_that_one_side_alone_closes_are_freed() {
    are_freed_after(1_000, close_clients);
    are_freed_after(1_000, close_servers);
}

/// As when the reset of a killed app is lost on a loopback whose backlog is full.
#[test]
fn a_connection_whose_app_vanishes_without_a_word_is_freed() {
    let mut all = connected_on_each_way(20);
    let began = Instant::now();
    for connected in &mut all {
        let vanished = match connected.pair.way {
            Way::FromUnmeshed => &mut connected.servers,
            _ => &mut connected.clients,
        };
        for socket in mem::take(vanished) {
            // One that is closed in this state says nothing.
            let repair = (libc::IPPROTO_TCP, libc::TCP_REPAIR);
            set_option(&socket, repair, &1_i32.to_ne_bytes()).unwrap();
        }
    }
    all_are_freed(began, FORGOTTEN, &all);
    for Connected {
        clients, servers, ..
    } in &mut all
    {
        for mut left in clients.drain(..).chain(servers.drain(..)) {
            let error = left.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
}
