//! Connections to many servers at once: each reaches the one that it dialled, as the pod whose
//! netns it is opened in.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use malla_testbed::{
    EchoApp, Fate, Node, PATIENCE, PORT, Pair, Pod, PodSpec, Testbed, WEB, WEB_PORT, Way,
    dial_from, eventually, listen, say, service_address,
};
use socket2::SockRef;

const THREADS: usize = 16;
const CONNECTIONS: usize = 10_000;

/// A server that says its name to whoever connects, and that it was heard.
struct Banner {
    addresses: Vec<SocketAddr>,
    name: Vec<u8>,
}

/// Two servers of the mesh and two beside it, on both nodes, and one behind a Service.
fn banners(bed: &mut Testbed, nodes: &[Arc<Node>; 2]) -> Vec<Banner> {
    let specs = [true, false].map(|meshed| {
        let spec = |name| PodSpec::new(format!("{name}-{meshed}"));
        let specs = ["near", "far"].map(spec);
        if meshed {
            specs
        } else {
            specs.map(PodSpec::unmeshed)
        }
    });
    let behind = PodSpec::new("behind").label("app", "behind");
    let specs = specs.into_iter().flatten().chain([behind]);
    let mut banners = Vec::new();
    for (spec, node) in specs.zip(nodes.iter().rev().cycle()) {
        let pod = bed.pod(node, spec).unwrap();
        let listener = listen(&pod, PORT).unwrap();
        let name = pod.name().as_bytes().to_vec();
        let said = name.clone();
        // Ends with the test's process.
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                // The client may have gone already.
                let _ = stream.write_all(&said);
            }
        });
        let addresses = pod.addresses().iter();
        let addresses = addresses.map(|ip| SocketAddr::new(*ip, PORT)).collect();
        banners.push(Banner { addresses, name });
    }
    let [v4, v6] = WEB;
    let service = format!(
        "addresses: [{v4}, \"{v6}\"]\nports: [{{port: {WEB_PORT}, targetPort: {PORT}}}]\n\
         selector: {{app: behind}}"
    );
    bed.service("banner", service).unwrap();
    let behind = banners.last_mut().unwrap();
    behind.addresses = WEB.map(service_address).to_vec();
    banners
}

/// As kmesh-net/kmesh#1192 has it, where a destination was kept under a socket's address.
#[test]
fn each_of_many_connections_hears_the_server_that_it_dialled() {
    let mut bed = Testbed::new("banners").unwrap();
    let nodes = ["a", "b"].map(|name| bed.node(name).unwrap());
    let banners = banners(&mut bed, &nodes);
    let client = bed.pod(&nodes[0], PodSpec::new("client")).unwrap();
    bed.start_agents().unwrap();
    let next = AtomicUsize::new(0);
    let call_all = || {
        loop {
            let turn = next.fetch_add(1, Ordering::Relaxed);
            if turn >= CONNECTIONS {
                return;
            }
            let banner = &banners[turn % banners.len()];
            let to = banner.addresses[turn / banners.len() % banner.addresses.len()];
            let mut stream = Way::Mesh.dial(to).unwrap();
            if turn.is_multiple_of(7) {
                // Aborted: its places are another's at once.
                SockRef::from(&stream)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                continue;
            }
            let mut said = Vec::new();
            stream.read_to_end(&mut said).unwrap();
            assert_eq!(said, banner.name, "connection {turn} to {to}");
        }
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| client.enter(call_all));
        }
    });
}

/// As cilium/cilium#36427 has it.
#[test]
fn one_source_port_is_connected_to_two_ports_and_both_addresses_at_once() {
    const SOURCE: u16 = 45_000;
    for way in [Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed] {
        let pair = Pair::new(way).unwrap();
        let ports = [PORT, PORT + 1];
        let apps = ports.map(|port| pair.server.echo(port).unwrap());
        let targets = ports.into_iter().flat_map(|port| pair.addresses(port));
        let mut streams: Vec<_> = targets
            .map(|to| pair.client.enter(|| dial_from(SOURCE, to)).unwrap())
            .collect();
        for _ in 0..2 {
            for stream in &mut streams {
                assert_eq!(say(stream, b"hello"), Fate::Echoed, "{way:?}");
            }
        }
        let peers = apps.iter().flat_map(EchoApp::peers);
        let own = pair.client.addresses();
        assert!(peers.map(|peer| peer.ip()).all(|peer| own.contains(&peer)));
    }
}

/// As istio/ztunnel#864 has it.
#[test]
fn two_hundred_destinations_leave_no_descriptor_and_no_memory() {
    const DESTINATIONS: u8 = 200;
    let pair = Pair::new(Way::ToUnmeshed).unwrap();
    let address = |number: u8| Ipv4Addr::new(10, 102, 200, number);
    let mut lines = String::new();
    for number in 0..DESTINATIONS {
        writeln!(lines, "addr add {}/32 dev eth0", address(number)).unwrap();
    }
    pair.server.netns().ip(&lines).unwrap();
    let app = pair.server.echo(PORT).unwrap();
    let agent = pair.agents()[0];
    let round = || {
        for number in 0..DESTINATIONS {
            let fate = pair.client.caller().call((address(number), PORT));
            assert_eq!(fate, Fate::Echoed);
        }
    };
    round();
    pair.nothing_is_held().unwrap();
    let before = agent.anonymous_memory().unwrap();
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(round);
        }
    });
    assert_eq!(app.accepted(), 6 * usize::from(DESTINATIONS));
    pair.nothing_is_held().unwrap();
    eventually("memory to be what it was", PATIENCE, || {
        agent.anonymous_memory().unwrap() < before + (1 << 20)
    })
    .unwrap();
    let series = agent.metrics().unwrap();
    let series = series.samples("tcp_open_total", &[("direction", "outbound")]);
    assert!(series.count() < 10, "a series for each address");
}

/// As istio/istio#55139 has it, where an agent took a pod's netns for that of a process in it.
#[test]
fn a_process_of_another_pod_speaks_as_the_pod_whose_netns_it_is_in() {
    let mut bed = Testbed::new("guest").unwrap();
    let node = bed.node("a").unwrap();
    let pod = |bed: &mut Testbed, name: &str| {
        let spec = PodSpec::new(name).account(name);
        bed.pod(&node, spec).unwrap()
    };
    let (host, guest) = (pod(&mut bed, "host"), pod(&mut bed, "guest"));
    let server: Arc<Pod> = pod(&mut bed, "server");
    let _app = server.echo(PORT).unwrap();
    // It is in the guest's cgroup, and in the host's netns from before the enrolment on.
    let call = format!(
        "import socket, time\n\
         while True:\n\
         \x20   try:\n\
         \x20       s = socket.create_connection(('{}', {PORT}), 2); s.sendall(b'x'); s.recv(1)\n\
         \x20       s.close()\n\
         \x20   except OSError: pass\n\
         \x20   time.sleep(0.02)\n",
        server.v4()
    );
    let netns = format!("--net={}", host.netns().path().display());
    let _process = guest
        .spawn(["nsenter", &netns, "python3", "-c", &call])
        .unwrap();
    bed.start_agents().unwrap();
    let spoken = |account: &str| {
        let identity = format!("src.identity=\"spiffe://cluster.local/ns/default/sa/{account}\"");
        bed.agent(&node).log().matches(&identity).count()
    };
    eventually("connections of the process", PATIENCE, || {
        spoken("host") > 4
    })
    .unwrap();
    assert_eq!(spoken("guest"), 0);
    let fate = guest.caller().call((server.v4(), PORT));
    assert_eq!(fate, Fate::Echoed);
    eventually("the guest's own connection", PATIENCE, || {
        spoken("guest") > 0
    })
    .unwrap();
}
