//! Pods, interfaces and addresses that come and go while agents run.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::Path,
    sync::Arc,
    time::Duration,
};

use malla_testbed::{
    Caller, EchoApp, Fate, Node, PORT, Pod, PodSpec, SECRET, Scene, Testbed, eventually, say, until,
};

const LIMIT: Duration = Duration::from_secs(10);

/// Waits until the agent of node `a` has so many pods.
fn wait_enrolled(scene: &Scene, count: f64) {
    let what = format!("{count} pods to be enrolled");
    eventually(&what, LIMIT, || {
        let metrics = scene.metrics(&scene.a).unwrap();
        let enrolled = metrics.sum("malla_pods_enrolled", &[]);
        (enrolled - count).abs() < 0.5
    })
    .unwrap();
}

fn steered(scene: &Scene) -> f64 {
    let metrics = scene.metrics(&scene.a).unwrap();
    metrics.syns("outbound", "steered", "meshed")
}

/// Waits until calls to a pod are echoed.
fn wait_echoed(from: &Pod, to: SocketAddr) {
    let what = format!("{to} to answer {}", from.name());
    let calls = from.caller().patience(Duration::from_secs(1));
    eventually(&what, LIMIT, || calls.call(to) == Fate::Echoed).unwrap();
}

/// The link-local address of a pod's first interface, as `from` the same bridge names it.
fn link_local(pod: &Pod) -> Ipv6Addr {
    let table = pod.enter(|| fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap());
    let line = table
        .lines()
        .find(|line| line.starts_with("fe80") && line.ends_with("eth0"));
    let digits = line.unwrap().split(' ').next().unwrap();
    Ipv6Addr::from(u128::from_str_radix(digits, 16).unwrap())
}

fn scoped(address: Ipv6Addr, from: &Pod) -> SocketAddr {
    let index = from.enter(|| index_of("eth0"));
    SocketAddrV6::new(address, PORT, 0, index).into()
}

/// The index of an interface of the calling thread's namespace.
fn index_of(interface: &str) -> u32 {
    let table = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let line = table
        .lines()
        .find(|line| line.ends_with(interface))
        .unwrap();
    u32::from_str_radix(line.split(' ').nth(1).unwrap(), 16).unwrap()
}

#[test]
fn pods_come_and_go_without_touching_the_connections_of_others() {
    let mut scene = Scene::new("", "").unwrap();
    let to: SocketAddr = (scene.server.v4(), PORT).into();
    let mut stream = scene.client.caller().connect(to).unwrap();
    assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
    for turn in 0..3 {
        let spec = PodSpec::new(format!("late-{turn}"))
            .port(PORT)
            .account("late");
        let late = scene.bed.pod(&scene.a.clone(), spec).unwrap();
        let app = late.echo(PORT).unwrap();
        let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
        wait_enrolled(&scene, 2.0);
        for address in late.addresses() {
            wait_echoed(&scene.server, (*address, PORT).into());
        }
        for address in scene.server.addresses() {
            let fate = late.caller().saying(SECRET).call((*address, PORT));
            assert_eq!(fate, Fate::Echoed);
        }
        assert!(!wire.contains(SECRET));
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        drop(app);
        scene.bed.remove_pod(&late).unwrap();
        wait_enrolled(&scene, 1.0);
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
    }
}

#[test]
fn a_pod_that_leaves_the_mesh_speaks_plaintext_and_no_program_stays() {
    let mut scene = Scene::new("", "").unwrap();
    let spec = PodSpec::new("leaver");
    let leaver = scene.bed.pod(&scene.a.clone(), spec).unwrap();
    wait_echoed(&leaver, (scene.server.v4(), PORT).into());
    scene.bed.withdraw(&leaver).unwrap();
    eventually("the pod to speak for itself", LIMIT, || {
        let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
        let fate = leaver
            .caller()
            .saying(SECRET)
            .call((scene.server.v4(), PORT));
        fate == Fate::Echoed && wire.contains(SECRET)
    })
    .unwrap();
    // A link that nobody pins is detached.
    let links = scene.a.bpffs().join("links/default");
    assert!(links.join("client").exists());
    eventually("the programs and the rules to be gone", LIMIT, || {
        let rules = leaver.run(["ip", "rule"]).unwrap().stdout;
        let rules6 = leaver.run(["ip", "-6", "rule"]).unwrap().stdout;
        !links.join("leaver").exists() && !(rules + &rules6).contains("133")
    })
    .unwrap();
}

#[test]
fn an_interface_that_comes_later_is_steered() {
    let scene = Scene::new("", "").unwrap();
    for turn in 0..2 {
        // The second time under the same name.
        let lines = format!(
            "link add late type veth peer name eth7 netns {}\n\
             addr add 192.0.2.1/24 dev late\n\
             addr add fd02::1/64 dev late nodad\n\
             link set late up\n",
            scene.client.netns().name()
        );
        scene.a.netns().ip(&lines).unwrap();
        let lines = "addr add 192.0.2.2/24 dev eth7\n\
                     addr add fd02::2/64 dev eth7 nodad\n\
                     link set eth7 up\n";
        scene.client.netns().ip(lines).unwrap();
        let app = EchoApp::start(scene.a.netns(), PORT).unwrap();
        let addresses = ["192.0.2.1", "fd02::1"].map(|a| a.parse::<IpAddr>().unwrap());
        for to in addresses {
            until("a steered call over the new interface", LIMIT, || {
                let before = steered(&scene);
                let calls = scene.client.caller().patience(Duration::from_secs(1));
                let echoed = calls.call((to, PORT)) == Fate::Echoed;
                (echoed && steered(&scene) > before).then_some(())
            })
            .unwrap();
        }
        // Its own address is known too: calls from outside are the agent's.
        let own = EchoApp::start(scene.client.netns(), PORT).unwrap();
        let caller = Caller::new(scene.a.netns());
        for to in ["192.0.2.2", "fd02::2"].map(|a| a.parse::<IpAddr>().unwrap()) {
            assert_eq!(caller.call((to, PORT)), Fate::Echoed, "{to} in turn {turn}");
        }
        let steered = scene
            .metrics(&scene.a)
            .unwrap()
            .syns("inbound", "steered", "meshed");
        assert!(steered >= 2.0);
        drop((app, own));
        if turn == 0 {
            scene.a.netns().ip("link del late\n").unwrap();
        }
    }
    scene.bed.agent(&scene.a).kill9();
    let _app = EchoApp::start(scene.a.netns(), PORT).unwrap();
    for to in ["192.0.2.1", "fd02::1"].map(|a| a.parse::<IpAddr>().unwrap()) {
        assert_eq!(scene.client.caller().call((to, PORT)), Fate::Refused);
    }
}

#[test]
fn a_second_address_that_comes_later_works() {
    let scene = Scene::new("", "").unwrap();
    let lines = "addr add 10.101.9.9/16 dev eth0\naddr add fd65::909/64 dev eth0 nodad\n";
    scene.client.netns().ip(lines).unwrap();
    let _own = scene.client.echo(PORT).unwrap();
    let wire = scene.bed.capture_wire(&scene.a, &scene.b).unwrap();
    let seconds = ["10.101.9.9", "fd65::909"].map(|a| a.parse::<IpAddr>().unwrap());
    for second in seconds {
        let servers = scene.server.addresses().iter();
        let to = *servers
            .clone()
            .find(|to| to.is_ipv4() == second.is_ipv4())
            .unwrap();
        let calls = scene
            .client
            .caller()
            .saying(SECRET)
            .from((second, 0).into());
        let what = format!("calls from {second} to be carried");
        eventually(&what, LIMIT, || calls.call((to, PORT)) == Fate::Echoed).unwrap();
        // The mesh's file doesn't list it, so peers see a stranger.
        wait_echoed(&scene.server, (second, PORT).into());
    }
    assert!(scene.app.accepted() >= 2);
    drop(wire);
}

#[test]
fn an_interface_without_link_headers_is_steered() {
    // Makes a TUN interface and takes what is sent there, which nobody answers.
    const SINK: &str = "import fcntl, os, struct\n\
        tun = os.open('/dev/net/tun', os.O_RDWR)\n\
        fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH', b'tun7', 0x1001))\n\
        print('made', flush=True)\n\
        while os.read(tun, 65536): pass\n";
    let scene = Scene::new("", "").unwrap();
    let limit = "connectTimeout: 200ms";
    scene.bed.change_settings(&scene.client, limit).unwrap();
    let sink = scene.client.spawn(["python3", "-c", SINK]).unwrap();
    sink.wait_for_log("made", LIMIT).unwrap();
    let lines = "addr add 192.0.2.2/24 dev tun7\n\
                 addr add fd02::2/64 dev tun7 nodad\n\
                 link set tun7 up\n";
    scene.client.netns().ip(lines).unwrap();
    let peers = ["192.0.2.1", "fd02::1"].map(|a| a.parse::<IpAddr>().unwrap());
    for to in peers {
        until("a steered call over the TUN interface", LIMIT, || {
            let before = steered(&scene);
            let calls = scene.client.caller().patience(Duration::from_secs(1));
            let reset = calls.call((to, PORT)) == Fate::Reset;
            (reset && steered(&scene) > before).then_some(())
        })
        .unwrap();
    }
    scene.bed.agent(&scene.a).kill9();
    for to in peers {
        assert_eq!(scene.client.caller().call((to, PORT)), Fate::Refused);
    }
}

#[test]
fn connections_from_before_the_enrolment_go_on_and_are_counted() {
    let mut bed = Testbed::new("before").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = PodSpec::new("server").port(PORT).settings("mtls: strict");
    let server = bed.pod(&b, server).unwrap();
    let _app = server.echo(PORT).unwrap();
    let connect = |to: &IpAddr| client.caller().connect((*to, PORT).into()).unwrap();
    let mut streams: Vec<_> = server.addresses().iter().map(connect).collect();
    bed.start_agents().unwrap();
    for stream in &mut streams {
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }
    for node in [&a, &b] {
        let metrics = bed.agent(node).metrics().unwrap();
        let direct = metrics.steering_packets("outbound", "passed", "direct_before_enrolment");
        assert!(
            (direct - 2.0).abs() < 0.5,
            "{direct} on node {}",
            node.name()
        );
    }
}

/// A meshed client and server with an echoing app on one node, and a stranger with one beside them.
fn neighbours() -> (Testbed, [Arc<Pod>; 3], [EchoApp; 2]) {
    let mut bed = Testbed::new("linklocal").unwrap();
    let node = bed.node("a").unwrap();
    let client = bed.pod(&node, PodSpec::new("client")).unwrap();
    let server = bed.pod(&node, PodSpec::new("server").port(PORT)).unwrap();
    let stranger = PodSpec::new("stranger").unmeshed();
    let stranger = bed.pod(&node, stranger).unwrap();
    let apps = [&server, &stranger].map(|pod| pod.echo(PORT).unwrap());
    bed.start_agents().unwrap();
    (bed, [client, server, stranger], apps)
}

#[test]
fn a_link_local_destination_is_reached_by_the_agent() {
    let (bed, [client, server, stranger], _apps) = neighbours();
    for to in [&stranger, &server] {
        let address = scoped(link_local(to), &client);
        let caller = client.caller().patience(Duration::from_secs(3));
        assert_eq!(caller.call(address), Fate::Echoed, "{}", to.name());
    }
    let metrics = bed.agent(client.node()).metrics().unwrap();
    assert!(metrics.syns("outbound", "steered", "meshed") >= 2.0);
}

#[test]
fn a_link_local_stranger_reaches_a_permissive_app_by_its_agent() {
    let (bed, [_, server, stranger], [app, _]) = neighbours();
    let address = scoped(link_local(&server), &stranger);
    let caller = stranger.caller().patience(Duration::from_secs(3));
    assert_eq!(caller.call(address), Fate::Echoed);
    assert_eq!(app.accepted(), 1);
    let metrics = bed.agent(server.node()).metrics().unwrap();
    assert!(metrics.syns("inbound", "steered", "meshed") >= 1.0);
}

#[test]
fn a_link_local_stranger_does_not_reach_a_strict_app() {
    let (bed, [_, server, stranger], [app, _]) = neighbours();
    bed.change_settings(&server, "mtls: strict").unwrap();
    let agent = bed.agent(server.node());
    eventually("the change to be told", LIMIT, || {
        agent.log().contains("settings changed")
    })
    .unwrap();
    let address = scoped(link_local(&server), &stranger);
    let fate = stranger
        .caller()
        .patience(Duration::from_secs(3))
        .call(address);
    assert!(matches!(fate, Fate::Reset | Fate::Refused), "{fate:?}");
    assert_eq!(app.accepted(), 0);
}

/// Adds a workload to the mesh's file by hand, and waits until the agent says `what` of it.
fn add_by_hand(bed: &Testbed, node: &Node, address: IpAddr, netns: &Path, what: &str) {
    let entry = format!(
        "- name: second\n  node: {}\n  netns: {}\n  addresses: [\"{address}\"]\n",
        node.name(),
        netns.display()
    );
    bed.write_mesh_text(&(bed.mesh_yaml() + &entry)).unwrap();
    let agent = bed.agent(node);
    eventually(what, LIMIT, || agent.log().contains(what)).unwrap();
}

#[test]
fn a_netns_that_two_workloads_claim_stays_the_firsts() {
    let scene = Scene::new("", "").unwrap();
    let pod = &scene.client;
    pod.netns().ip("addr add 10.101.7.7/16 dev eth0\n").unwrap();
    // Under another name, so that the file alone doesn't show it.
    let process = pod.spawn(["sleep", "600"]).unwrap();
    let netns = format!("/proc/{}/ns/net", process.pid());
    let address = "10.101.7.7".parse().unwrap();
    let said = "is that of default/client already";
    add_by_hand(&scene.bed, &scene.a, address, Path::new(&netns), said);
    let metrics = scene.metrics(&scene.a).unwrap();
    let refused = [("reason", "shared_netns")];
    assert!(metrics.sum("malla_enrolment_errors_total", &refused) >= 1.0);
    for to in scene.server.addresses() {
        assert_eq!(pod.caller().call((*to, PORT)), Fate::Echoed);
    }
}

#[test]
fn a_file_that_gives_one_netns_twice_is_refused_whole() {
    let scene = Scene::new("", "").unwrap();
    let pod = &scene.client;
    let address = "10.101.7.7".parse().unwrap();
    let said = "belongs to default/client on the same node already";
    add_by_hand(&scene.bed, &scene.a, address, pod.netns().path(), said);
    wait_enrolled(&scene, 1.0);
    for to in scene.server.addresses() {
        assert_eq!(pod.caller().call((*to, PORT)), Fate::Echoed);
    }
}

#[test]
fn the_hosts_netns_is_never_enrolled() {
    let scene = Scene::new("", "").unwrap();
    let own: IpAddr = "10.101.0.1".parse().unwrap();
    let said = "a pod on the host network can't be meshed";
    add_by_hand(&scene.bed, &scene.a, own, scene.a.netns().path(), said);
    let metrics = scene.metrics(&scene.a).unwrap();
    let refused = [("reason", "host_netns")];
    assert!(metrics.sum("malla_enrolment_errors_total", &refused) >= 1.0);
    let rules = scene.a.run(["ip", "rule"]).unwrap().stdout;
    assert!(!rules.contains("133"), "{rules}");
    for to in scene.server.addresses() {
        assert_eq!(scene.client.caller().call((*to, PORT)), Fate::Echoed);
    }
}

#[test]
fn the_machines_first_netns_is_not_enrolled_from_another() {
    let scene = Scene::new("", "").unwrap();
    // The agents of a bed live in namespaces of their own: that of the test is a stranger's.
    let said = "isn't in its netns";
    let address = "10.101.7.7".parse().unwrap();
    let netns = format!("/proc/{}/ns/net", std::process::id());
    add_by_hand(&scene.bed, &scene.a, address, Path::new(&netns), said);
    for to in scene.server.addresses() {
        assert_eq!(scene.client.caller().call((*to, PORT)), Fate::Echoed);
    }
}
