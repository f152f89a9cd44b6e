//! Two pods of one node: what they say to each other goes through their agent's memory, under both
//! identities, as long as the network lets the one reach the other.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]
#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Agent, Authority, Capture, EchoApp, Fate, IdentityVolume, Node, PORT, Pod, PodSpec, SECRET,
    TcpState, Testbed, accept, eventually, listen, payload, same_family, say, until,
};
use socket2::SockRef;

const LIMIT: Duration = Duration::from_secs(10);
/// Within which a rule of the network's is honoured, and what a busy machine adds.
const HONOURED: Duration = Duration::from_secs(30 + 5);
const MESH: u16 = 15008;
const DAY: Duration = Duration::from_hours(24);

/// A meshed client, and a meshed server with an echoing app, beside each other.
struct OneNode {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    app: EchoApp,
}

impl OneNode {
    fn new(server_settings: &str) -> Self {
        Self::on(Testbed::new("onenode").unwrap(), server_settings)
    }

    fn on(mut bed: Testbed, server_settings: &str) -> Self {
        let node = bed.node("a").unwrap();
        let client = PodSpec::new("client").account("client");
        let client = bed.pod(&node, client).unwrap();
        let server = PodSpec::new("server").account("server").port(PORT);
        let server = bed.pod(&node, server.settings(server_settings)).unwrap();
        let app = server.echo(PORT).unwrap();
        bed.start_agents().unwrap();
        Self {
            bed,
            node,
            client,
            server,
            app,
        }
    }

    fn agent(&self) -> &Agent {
        self.bed.agent(&self.node)
    }

    /// The app, by each family.
    fn addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.server.addresses().iter();
        addresses.map(|ip| SocketAddr::new(*ip, PORT)).collect()
    }

    fn call(&self) -> Vec<Fate> {
        let caller = self.client.caller().saying(SECRET);
        let fates = self.addresses().into_iter().map(|to| caller.call(to));
        fates.collect()
    }

    fn open(&self) -> Vec<TcpStream> {
        let open = |to: SocketAddr| {
            let mut stream = self.client.connect(to).unwrap();
            assert_eq!(say(&mut stream, b"before"), Fate::Echoed);
            stream
        };
        self.addresses().into_iter().map(open).collect()
    }

    /// How many witnesses of the network the client has open: one takes another's place while the
    /// kernel's list is read.
    fn witnesses(&self) -> usize {
        let reads = [(); 2].map(|()| self.listed_witnesses());
        reads.into_iter().max().unwrap()
    }

    fn listed_witnesses(&self) -> usize {
        let sockets = self.client.sockets().into_iter();
        sockets
            .filter(|socket| socket.remote.port() == MESH && socket.state == TcpState::Established)
            .count()
    }

    /// Waits for this many lines of the access log with all of `parts`.
    fn wait_for_lines(&self, parts: &[&str], count: usize) {
        let mut lines = Vec::new();
        let found = eventually("lines of the access log", LIMIT, || {
            let log = self.agent().log();
            let all = log.lines().filter(|line| line.contains("\taccess\t"));
            let wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
            lines = all.filter(wanted).map(str::to_owned).collect();
            lines.len() == count
        });
        found.unwrap_or_else(|error| panic!("{error}: {count} with {parts:?}, not {lines:#?}"));
    }

    /// That nothing but the witnesses has passed, and nothing on them.
    fn was_silent(capture: &Capture) {
        assert_eq!(capture.missed().unwrap(), 0);
        let packets = capture.tcp();
        assert!(!packets.is_empty(), "not even a witness");
        for packet in packets {
            let ports = [packet.from.port(), packet.to.port()];
            assert!(ports.contains(&MESH), "{packet:?}");
            assert!(packet.payload.is_empty(), "{packet:?}");
        }
    }
}

#[test]
fn what_two_pods_of_one_node_say_stays_in_memory_under_both_identities() {
    let one = OneNode::new("mtls: strict");
    let captures = [&one.client, &one.server].map(|pod| pod.capture().unwrap());
    for turn in 0..3 {
        assert!(
            one.call().iter().all(|fate| *fate == Fate::Echoed),
            "{turn}"
        );
    }
    for peer in one.app.peers() {
        let client = same_family(one.client.addresses(), peer.ip());
        assert_eq!(client, Some(peer.ip()));
    }
    assert_eq!(one.app.accepted(), 6);
    for capture in &captures {
        OneNode::was_silent(capture);
        assert!(!capture.contains(SECRET));
    }
    assert_eq!(one.witnesses(), 2, "one for each family");
    // Both ends' identities and addresses, in a line of each.
    let identity = |account| format!("spiffe://cluster.local/ns/default/sa/{account}");
    let (client, server) = (identity("client"), identity("server"));
    for to in one.addresses() {
        for direction in ["outbound", "inbound"] {
            let from = same_family(one.client.addresses(), to.ip()).unwrap();
            let from = SocketAddr::new(from, 0).to_string();
            let parts = [
                &format!("src.addr={}", from.strip_suffix('0').unwrap()),
                &format!("src.identity=\"{client}\""),
                &format!("dst.addr={to} "),
                &format!("dst.identity=\"{server}\""),
                &format!("direction=\"{direction}\""),
                "connection complete",
            ];
            one.wait_for_lines(&parts, 3);
        }
    }
    let metrics = one.agent().metrics().unwrap();
    let tls = |direction, leg, id, account| {
        let identity = identity(account);
        let labels = [
            ("direction", direction),
            ("peer", leg),
            ("tls", "true"),
            (id, identity.as_str()),
        ];
        metrics.sum("tcp_open_total", &labels)
    };
    assert_eq!(tls("outbound", "dst", "server_id", "server"), 6.0);
    assert_eq!(tls("inbound", "src", "client_id", "client"), 6.0);
    assert_eq!(metrics.sum("malla_handshakes_total", &[]), 0.0);
}

#[test]
fn bytes_are_exact_and_both_reporters_count_the_same() {
    const ASKED: usize = 3 << 20;
    const ANSWERED: usize = 5 << 20;
    let one = OneNode::new("");
    let listener = listen(&one.server, 0).unwrap();
    let port = listener.local_addr().unwrap().port();
    let captures = [&one.client, &one.server].map(|pod| pod.capture().unwrap());
    for address in one.server.addresses() {
        let client = one.client.connect((*address, port)).unwrap();
        let server = accept(&listener).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| payload::send(&client, 1, ASKED).unwrap());
            scope.spawn(|| payload::send(&server, 2, ANSWERED).unwrap());
            scope.spawn(|| payload::receive(&client, 2, ANSWERED).unwrap());
            payload::receive(&server, 1, ASKED).unwrap();
        });
        client.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(&server, 3, 0).unwrap();
        // What comes after the client's end still arrives.
        payload::send(&server, 4, 1000).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(&client, 4, 1000).unwrap();
    }
    let sums = |direction: &str| {
        let metrics = one.agent().metrics().unwrap();
        ["src", "dst"].map(|peer| {
            let labels = [("direction", direction), ("peer", peer)];
            [
                "tcp_open_total",
                "tcp_close_total",
                "tcp_open_connections",
                "tcp_read_bytes_total",
                "tcp_write_bytes_total",
            ]
            .map(|family| metrics.sum(family, &labels))
        })
    };
    let (asked, answered) = (2.0 * 3_145_728.0, 2.0 * (5_242_880.0 + 1000.0));
    let expected = [
        [2.0, 2.0, 0.0, asked, answered],
        [2.0, 2.0, 0.0, answered, asked],
    ];
    eventually("both ends' counters", LIMIT, || {
        sums("outbound") == expected && sums("inbound") == expected
    })
    .unwrap_or_else(|error| panic!("{error}: {:?}", [sums("outbound"), sums("inbound")]));
    for capture in &captures {
        OneNode::was_silent(capture);
    }
}

#[test]
fn a_reset_of_either_end_is_a_reset_of_the_other_and_one_reason_at_both() {
    let one = OneNode::new("");
    let listener = listen(&one.server, 0).unwrap();
    let port = listener.local_addr().unwrap().port();
    for (client_resets, reason) in [(true, "client_reset"), (false, "server_reset")] {
        let client = one.client.connect((one.server.v4(), port)).unwrap();
        let server = accept(&listener).unwrap();
        payload::send(&client, 1, 1000).unwrap();
        payload::receive(&server, 1, 1000).unwrap();
        let (resetting, mut other) = if client_resets {
            (client, server)
        } else {
            (server, client)
        };
        SockRef::from(&resetting)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(resetting);
        let error = other.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{reason}");
        one.wait_for_lines(&[&format!("error=\"{reason}\"")], 2);
    }
}

#[test]
fn an_app_that_does_not_listen_and_a_pod_that_is_full_refuse_as_through_a_tunnel() {
    let one = OneNode::new("maxConnections: 1");
    let fate = one.client.caller().call((one.server.v4(), PORT + 1));
    assert_eq!(fate, Fate::Reset);
    one.wait_for_lines(&["direction=\"inbound\"", "error=\"connect_refused\""], 1);
    one.wait_for_lines(&["direction=\"outbound\"", "error=\"peer_refused\""], 1);
    let mut first = one.client.connect((one.server.v4(), PORT)).unwrap();
    assert_eq!(say(&mut first, b"first"), Fate::Echoed);
    assert_eq!(
        one.client.caller().call((one.server.v4(), PORT)),
        Fate::Reset
    );
    one.wait_for_lines(&["direction=\"inbound\"", "error=\"connection_limit\""], 1);
    assert_eq!(say(&mut first, b"first"), Fate::Echoed);
}

/// Lets the bridge, as a CNI would, do something with what the client sends to the server.
fn rule(one: &OneNode, verdict: &str) {
    let from = one.client.v4();
    let to = one.server.v4();
    let table = format!(
        "table bridge cni {{ chain forward {{ type filter hook forward priority 0\n\
         ip saddr {from} ip daddr {to} {verdict}\n}}\n}}\n"
    );
    let nft = one.node.command(["nft", "-f", "-"]);
    nft.input(table).run().unwrap();
}

fn lift(one: &OneNode) {
    let delete = ["nft", "delete", "table", "bridge", "cni"];
    one.node.run(delete).unwrap();
}

#[test]
fn a_rule_of_the_network_between_two_pods_is_honoured_and_its_end_as_well() {
    let one = OneNode::new("");
    let mut live = one.client.connect((one.server.v4(), PORT)).unwrap();
    let mut other_family = one.client.connect((one.server.v6(), PORT)).unwrap();
    assert_eq!(say(&mut live, b"before"), Fate::Echoed);
    // As policies are made: what is established passes.
    rule(&one, "tcp flags & (syn | ack) == syn drop");
    live.set_read_timeout(Some(HONOURED)).unwrap();
    let began = Instant::now();
    let error = live.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    println!("a live connection was reset after {:?}", began.elapsed());
    let policy = "error=\"network_policy\"";
    one.wait_for_lines(&[policy, "direction=\"outbound\""], 1);
    one.wait_for_lines(&[policy, "direction=\"inbound\""], 1);
    assert_eq!(say(&mut other_family, b"allowed"), Fate::Echoed);

    let accepted = one.app.accepted();
    let call = || one.client.caller().call((one.server.v4(), PORT));
    assert_eq!(call(), Fate::Reset);
    one.wait_for_lines(&[policy, "direction=\"outbound\""], 2);
    assert_eq!(one.app.accepted(), accepted);
    assert_eq!(say(&mut other_family, b"allowed"), Fate::Echoed);
    lift(&one);
    assert_eq!(call(), Fate::Echoed);
}

/// An app with `CAP_NET_ADMIN` could lead the agent's question elsewhere than to the pod that the
/// network keeps from it.
#[test]
fn a_pod_that_leads_its_witness_astray_is_not_believed() {
    let mut one = OneNode::new("");
    let node = Arc::clone(&one.node);
    let friend = PodSpec::new("friend").account("friend");
    let friend = one.bed.pod(&node, friend).unwrap();
    let enrolled = "enrolled\tworkload=default/friend ";
    one.agent().process().wait_for_log(enrolled, LIMIT).unwrap();
    rule(&one, "drop");
    let (to, friend) = (one.server.v4(), friend.v4());
    let astray = format!(
        "table ip astray {{ chain out {{ type nat hook output priority -100\n\
         ip daddr {to} tcp dport 15008 dnat to {friend}\n}}\n}}\n"
    );
    let nft = one.client.command(["nft", "-f", "-"]);
    nft.input(astray).run().unwrap();
    // Its first connection opens the witness, the others find that it has strayed.
    for _ in 0..3 {
        assert_eq!(one.client.caller().call((to, PORT)), Fate::Reset);
    }
    assert_eq!(one.app.accepted(), 0);
    // A tunnel was taken, where the friend can't prove to be the server.
    let tunnel = format!("dst.addr={to}:15008 dst.hbone_addr={to}:8080");
    one.wait_for_lines(&[&tunnel, "error=\"identity_mismatch\""], 3);
}

#[test]
#[ignore = "long: a pair must be idle for a minute"]
fn an_idle_pair_closes_its_witness_and_a_live_one_renews_it() {
    let one = OneNode::new("");
    let mut live = one.client.connect((one.server.v4(), PORT)).unwrap();
    assert_eq!(say(&mut live, b"hello"), Fate::Echoed);
    let capture = one.client.capture().unwrap();
    thread::sleep(Duration::from_secs(65));
    assert_eq!(one.witnesses(), 1);
    let syns = capture.tcp().into_iter();
    let syns = syns.filter(|packet| packet.flags & malla_testbed::packet::SYN != 0);
    let opened = syns.filter(|packet| packet.to.port() == MESH).count();
    assert!((2..=3).contains(&opened), "{opened} in 65 s");
    assert_eq!(say(&mut live, b"hello"), Fate::Echoed);
    drop(live);
    let began = Instant::now();
    let closed = eventually("the witness to be closed", Duration::from_secs(75), || {
        one.witnesses() == 0
    });
    closed.unwrap();
    assert!(began.elapsed() > Duration::from_secs(55));
    let log = one.agent().log();
    assert!(!log.contains("connection failed"), "{log}");
}

#[test]
fn upgrades_cut_nothing_that_goes_through_memory() {
    let mut one = OneNode::new("");
    let node = Arc::clone(&one.node);
    let mut streams = one.open();
    let (client, to) = (Arc::clone(&one.client), one.addresses());
    let (calls, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let olds = thread::scope(|scope| {
        scope.spawn(|| {
            for to in to.iter().cycle() {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                assert_eq!(client.caller().call(*to), Fate::Echoed);
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for stream in &mut streams {
                    assert_eq!(say(stream, b"through it all"), Fate::Echoed);
                }
            }
        });
        let mut upgrade = || {
            let old = one.bed.upgrade_agent(&node).unwrap();
            let before = calls.load(Ordering::Relaxed);
            let served = || calls.load(Ordering::Relaxed) > before + 50;
            eventually("calls through the new agent", LIMIT, served).unwrap();
            old
        };
        let upgraded = catch_unwind(AssertUnwindSafe(|| [(); 2].map(|()| upgrade())));
        // The first one carries its connections for longer than it takes listeners.
        thread::sleep(Duration::from_secs(6));
        done.store(true, Ordering::Relaxed);
        upgraded.unwrap()
    });
    drop(streams);
    for old in &olds {
        assert!(old.wait_ended(LIMIT).unwrap().success());
    }
}

#[test]
fn what_lives_when_either_pod_leaves_the_mesh_goes_on_and_what_is_new_passes() {
    for client_leaves in [true, false] {
        let one = OneNode::new("");
        let mut live = one.open();
        let leaver = if client_leaves {
            &one.client
        } else {
            &one.server
        };
        one.bed.withdraw(leaver).unwrap();
        let said = format!("leaves the mesh\tworkload=default/{}", leaver.name());
        one.agent().process().wait_for_log(&said, LIMIT).unwrap();
        eventually("new connections to pass", LIMIT, || {
            one.call().iter().all(|fate| *fate == Fate::Echoed)
        })
        .unwrap();
        for stream in &mut live {
            assert_eq!(say(stream, b"goes on"), Fate::Echoed);
        }
        drop(live);
        let said = format!("withdrawn\tworkload=default/{}", leaver.name());
        one.agent().process().wait_for_log(&said, LIMIT).unwrap();
    }
}

#[test]
fn what_outlives_the_limit_of_either_pods_withdrawal_is_reset_and_withdrawn_at_both_ends() {
    for client_leaves in [true, false] {
        let bed = Testbed::new("onenode").unwrap();
        let bed = bed.with_agent_arguments(["--withdraw-limit", "1s"]);
        let one = OneNode::on(bed, "");
        let live = one.open();
        let leaver = if client_leaves {
            &one.client
        } else {
            &one.server
        };
        one.bed.withdraw(leaver).unwrap();
        for mut stream in live {
            let error = stream.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        for direction in ["outbound", "inbound"] {
            let direction = format!("direction=\"{direction}\"");
            one.wait_for_lines(&[&direction, "error=\"withdrawn\""], 2);
        }
    }
}

#[test]
fn a_revoked_certificate_cuts_what_goes_through_memory() {
    let bed = Testbed::new("onenode").unwrap();
    let mut volume = IdentityVolume::new(&bed).unwrap();
    let anchor = Authority::anchor(&bed, "anchor", DAY).unwrap();
    let issuer = anchor.issuer("issuer", DAY).unwrap();
    let mut put = |list: Option<String>| {
        let (ca, own) = (anchor.certificate().unwrap(), issuer.certificate().unwrap());
        let key = issuer.key().unwrap();
        let mut files = vec![
            ("ca.crt", &*ca),
            ("issuer.crt", &*own),
            ("issuer.key", &*key),
        ];
        files.extend(list.as_deref().map(|list| ("crl.pem", list)));
        volume.put(&files).unwrap();
    };
    put(None);
    let one = OneNode::on(bed, "mtls: strict");
    let mut live = one.open();
    let serial = until("the server's certificate to be told of", LIMIT, || {
        let log = one.agent().log();
        let (_, rest) = log.split_once("/sa/server serial=\"")?;
        let (serial, _) = rest.split_once('"')?;
        Some(serial.to_owned())
    })
    .unwrap();
    put(Some(issuer.list(&[serial]).unwrap()));
    for stream in &mut live {
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    for direction in ["outbound", "inbound"] {
        let direction = format!("direction=\"{direction}\"");
        one.wait_for_lines(&[&direction, "error=\"certificate_revoked\""], 2);
    }
    // The pod gets another key and certificate at once.
    eventually("the pods to speak again", LIMIT, || {
        one.call().iter().all(|fate| *fate == Fate::Echoed)
    })
    .unwrap();
}

#[test]
fn a_server_that_is_deleted_takes_its_connections_with_it_and_says_so() {
    let mut one = OneNode::new("");
    let mut live = one.open();
    let server = Arc::clone(&one.server);
    one.bed.remove_pod(&server).unwrap();
    for stream in &mut live {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // The app's own end may be told first.
        match stream.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => panic!("bytes from a pod that is gone"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        let _ = stream.write_all(b"nobody hears it");
    }
    eventually("the agent to hold nothing", LIMIT, || {
        let metrics = one.agent().metrics().unwrap();
        metrics.sum("tcp_open_connections", &[]) == 0.0 && one.witnesses() == 0
    })
    .unwrap();
}

/// All that a pod dials at its own address stays in it, and is the app's own business.
#[test]
fn a_pod_reaches_its_own_address() {
    let one = OneNode::new("mtls: strict");
    let captured = one.server.capture().unwrap();
    let own: Vec<IpAddr> = one.server.addresses().to_vec();
    for address in own {
        assert_eq!(one.server.caller().call((address, PORT)), Fate::Echoed);
    }
    assert!(captured.tcp().is_empty());
}
