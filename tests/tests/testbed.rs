//! The testbed itself: that its nodes, pods and wires are what they claim to be.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use malla_testbed::{Impairment, Link, Pod, PodSpec, Testbed, eventually, leftovers, packet};

const LIMIT: Duration = Duration::from_secs(10);

/// Sends `bytes` from one pod to another, and returns what came back from there.
fn echo(client: &Pod, server: &Pod, address: IpAddr, bytes: &[u8]) -> Vec<u8> {
    let listener = server.enter(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let mut stream = client.enter(|| TcpStream::connect_timeout(&to, LIMIT).unwrap());
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
        });
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    })
}

#[test]
fn pods_of_two_nodes_reach_each_other_over_both_families() {
    let mut bed = Testbed::new("reach").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let neighbour = bed.pod(&a, PodSpec::new("neighbour")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    for pod in [&neighbour, &server] {
        for address in pod.addresses() {
            assert_eq!(echo(&client, pod, *address, b"hello"), b"hello");
        }
    }
}

#[test]
fn a_pod_has_the_interfaces_and_families_that_were_asked_for() {
    let mut bed = Testbed::new("kinds").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let kinds = [
        PodSpec::new("v4").ipv4_only(),
        PodSpec::new("v6").ipv6_only(),
        PodSpec::new("no6").disable_ipv6(),
        PodSpec::new("two").second_interface().mtu(1400),
    ];
    let client = bed.pod(&b, PodSpec::new("client")).unwrap();
    let pods = kinds.map(|spec| bed.pod(&a, spec).unwrap());
    let counts = pods.each_ref().map(|pod| pod.addresses().len());
    assert_eq!(counts, [1, 1, 1, 4]);
    for pod in &pods {
        for address in pod.addresses() {
            assert_eq!(echo(&client, pod, *address, b"hello"), b"hello");
        }
    }
    let mtu = pods[3].run(["ip", "link", "show", "eth1"]).unwrap().stdout;
    assert!(mtu.contains("mtu 1400"), "{mtu}");
}

#[test]
fn commands_run_in_the_pods_namespace_and_cgroup() {
    let mut bed = Testbed::new("commands").unwrap();
    let node = bed.node("a").unwrap();
    let pod = bed.pod(&node, PodSpec::new("pod")).unwrap();
    let script = "cat /proc/self/cgroup; ip -o addr show eth0; cat; echo loud >&2; exit 3";
    let output = pod.command(["sh", "-c", script]).input("typed\n").output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stderr, "loud\n");
    assert!(output.stdout.contains("/a/pod-pod\n"), "{}", output.stdout);
    assert!(output.stdout.contains(&pod.v4().to_string()));
    assert!(output.stdout.ends_with("typed\n"));

    let late = pod
        .command(["sleep", "60"])
        .limit(Duration::from_millis(50));
    assert!(late.run().is_err());
    let sleeper = pod.spawn(["sh", "-c", "echo ready; sleep 60"]).unwrap();
    sleeper.wait_for_log("ready", LIMIT).unwrap();
    pod.kill_processes().unwrap();
    eventually("the sleeper to end", LIMIT, || !sleeper.is_running()).unwrap();
}

#[test]
fn a_listener_is_found_without_connecting_to_it() {
    let mut bed = Testbed::new("listen").unwrap();
    let node = bed.node("a").unwrap();
    let pod = bed.pod(&node, PodSpec::new("pod")).unwrap();
    let listener = pod.enter(|| TcpListener::bind("[::]:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    pod.wait_listening(port).unwrap();
    drop(listener);
    // Another test's thread may be about to start a program, which has all descriptors until then.
    eventually("it to be gone", LIMIT, || !pod.listens_on(port)).unwrap();
}

#[test]
fn a_capture_of_the_wire_shows_what_was_sent() {
    let mut bed = Testbed::new("capture").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    let capture = bed.capture_wire(&a, &b).unwrap();
    echo(&client, &server, server.v6().into(), b"recognisable");
    capture
        .wait_for("both ends to finish", LIMIT, |packets| {
            let fins = packets.iter().filter(|p| p.flags & packet::FIN != 0);
            fins.count() >= 2
        })
        .unwrap();
    assert!(capture.contains("recognisable"));
    assert!(!capture.contains("something else"));
    assert_eq!(capture.tls().other.len(), 2);
    assert_eq!(capture.missed().unwrap(), 0);
}

#[test]
fn a_wire_completes_checksums_and_a_veth_does_not() {
    for (link, complete) in [(Link::CLEAN_WIRE, true), (Link::Veth, false)] {
        let mut bed = Testbed::new("checksums").unwrap().with_link(link);
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = bed.pod(&a, PodSpec::new("client")).unwrap();
        let server = bed.pod(&b, PodSpec::new("server")).unwrap();
        let capture = bed.capture_wire(&a, &b).unwrap();
        let bytes = vec![7; 100_000];
        for address in server.addresses() {
            assert_eq!(echo(&client, &server, *address, &bytes), bytes);
        }
        let packets = capture.packets();
        let tcp = packets
            .iter()
            .filter(|p| packet::TcpPacket::parse(p).is_some());
        let (mut all, mut valid) = (0, 0);
        for packet in tcp {
            all += 1;
            valid += usize::from(packet::has_valid_sum(packet));
            assert!(!complete || packet.len() <= 1500);
        }
        assert!(all > 0);
        assert_eq!(valid == all, complete, "{valid} of {all} sums are valid");
    }
}

#[test]
fn a_lossy_wire_loses_delays_and_reorders_and_tcp_copes() {
    let delay = Duration::from_millis(5);
    let link = Link::Wire(Impairment {
        loss: 0.05,
        delay,
        reorder: 0.05,
    });
    let mut bed = Testbed::new("lossy").unwrap().with_link(link);
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    let bytes: Vec<u8> = (0..200_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let started = std::time::Instant::now();
    assert!(echo(&client, &server, server.v4().into(), &bytes) == bytes);
    assert!(started.elapsed() >= 4 * delay);
    let stats = bed.wire(&a, &b).unwrap();
    assert!(
        stats.carried > 200 && stats.lost > 0 && stats.reordered > 0,
        "{stats:?}"
    );
}

#[test]
fn a_packet_of_ones_own_making_arrives_as_it_was_made() {
    let mut bed = Testbed::new("raw").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    let capture = server.capture().unwrap();
    let sender = client.raw_sender().unwrap();
    let port = 7777;
    for to in server.addresses() {
        let from: IpAddr = match to {
            IpAddr::V4(_) => client.v4().into(),
            IpAddr::V6(_) => client.v6().into(),
        };
        let syn = packet::TcpPacket {
            payload: b"sixteen bytes...".to_vec(),
            ..packet::TcpPacket::syn((from, 1234).into(), (*to, port).into(), 99)
        };
        sender.send(&syn.to_bytes()).unwrap();
        let fragments = packet::fragments(&syn.to_bytes(), 24);
        sender.send(&fragments[0]).unwrap();
        sender.send(&fragments[1]).unwrap();
        // Each SYN, put together again where it was cut, is answered: nobody listens.
        let what = format!("two resets from {to}");
        capture
            .wait_for(&what, LIMIT, |packets| {
                let resets = packets.iter().filter(|p| p.flags & packet::RST != 0);
                resets
                    .filter(|p| p.from.ip() == *to && p.ack == 116)
                    .count()
                    == 2
            })
            .unwrap();
    }
    let syn = packet::TcpPacket::syn((client.v6(), 1235).into(), (server.v6(), port).into(), 99);
    let hidden = packet::behind_destination_options(&syn.to_bytes());
    sender.send(&hidden).unwrap();
    capture
        .wait_for("a reset to port 1235", LIMIT, |packets| {
            packets.iter().any(|p| p.to.port() == 1235)
        })
        .unwrap();
}

#[test]
fn the_mesh_file_lists_what_the_bed_has() {
    let mut bed = Testbed::new("file")
        .unwrap()
        .with_settings("mtls: permissive")
        .with_namespace("shop", "mtls: strict");
    let node = bed.node("a").unwrap();
    let spec = PodSpec::new("web").namespace("shop").account("front");
    let spec = spec.named_port("http", 80).label("app", "web");
    let web = bed.pod(&node, spec).unwrap();
    bed.pod(&node, PodSpec::new("outsider").unmeshed()).unwrap();
    bed.pod(&node, PodSpec::new("unknown").unlisted()).unwrap();
    bed.change_settings(&web, "failMode: open").unwrap();
    let text = bed.mesh_yaml();
    for part in [
        "settings:\n  mtls: permissive\n",
        "- name: a\n  addresses: [\"10.77.0.1\", \"fd77::1\"]\n",
        "- name: shop\n  settings:\n    mtls: strict\n",
        "- name: web\n  namespace: shop\n  serviceAccount: front\n  node: a\n",
        "  ports: [{name: http, port: 80}]\n  labels: {app: web}\n  mesh: enabled\n",
        "  settings:\n    failMode: open\n",
        "- name: outsider\n",
        "  mesh: disabled\n",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    assert!(!text.contains("unknown"));
}

#[test]
fn a_dropped_bed_leaves_nothing() {
    let mut bed = Testbed::new("gone").unwrap().with_link(Link::CLEAN_WIRE);
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let pod = bed.pod(&a, PodSpec::new("pod")).unwrap();
    let removed = bed.pod(&b, PodSpec::new("removed")).unwrap();
    // A process that has left its group, its pod's handle and its environment.
    pod.run(["sh", "-c", "setsid env -i sleep 600 &"]).unwrap();
    let kept = pod.spawn(["sleep", "600"]).unwrap();
    bed.remove_pod(&removed).unwrap();
    let places = [
        removed.netns().path(),
        pod.netns().path(),
        pod.cgroup(),
        a.cgroup(),
        a.bpffs(),
        b.netns().path(),
        bed.folder(),
    ]
    .map(Path::to_owned);
    let is_there = places.each_ref().map(|place| place.exists());
    assert_eq!(is_there, [false, true, true, true, true, true, true]);
    let name = bed.name().to_owned();
    drop(bed);
    for place in &places {
        assert!(!place.exists(), "{} is left", place.display());
    }
    assert!(!kept.is_running());
    let left = leftovers::list().unwrap();
    assert!(
        left.iter().all(|left| !left.to_string().contains(&name)),
        "{left:?}"
    );
}
