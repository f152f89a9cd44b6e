//! The kubelet's probes in strict pods: declared ones pass, from the node's own address, and nothing
//! else from there does.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use malla_testbed::{
    App, Caller, EchoApp, Fate, Metrics, Node, Pod, PodSpec, Process, Testbed, eventually, say,
};

const LIMIT: Duration = Duration::from_secs(10);

const HTTP: u16 = 8080;
const TCP: u16 = 5432;
const GRPC: u16 = 9090;
/// Asked by a request, and by whether the app listens.
const BOTH: u16 = 8081;
/// Probed by nobody.
const OTHER: u16 = 7070;

/// What the kubelet sends, whose server's answer is whatever the app makes of it: an echo.
const PROBE: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: 10.1.0.2:8080\r\n\
    User-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close\r\n\r\n";
const WITH_QUERY: &[u8] = b"GET /h?x=1 HTTP/1.1\r\nHost: a\r\n\r\n";

/// What isn't declared, though it comes from where probes do.
const UNDECLARED: [&[u8]; 8] = [
    b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /healthz?x=1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /h HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi",
    b"GET /healthz HTTP/1.1\r\nUpgrade: raw\r\nConnection: Upgrade\r\n\r\n",
    b"\0\x01raw bytes",
];

/// A probed pod and a stranger on node `a`.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
}

impl Scene {
    fn new(settings: &str) -> Self {
        let mut bed = Testbed::new("probes").unwrap();
        let a = bed.node("a").unwrap();
        let server = PodSpec::new("server")
            .named_port("http", HTTP)
            .named_port("db", TCP)
            .port(GRPC)
            .probe("httpGet: {path: /healthz, port: http}")
            .probe("httpGet: {path: \"/h?x=1\", port: 8080}")
            .probe("tcpSocket: {port: db}")
            .probe("grpc: {port: 9090, service: ready}")
            .probe("httpGet: {path: /healthz, port: 8081}")
            .probe("tcpSocket: {port: 8081}")
            .settings(settings);
        let server = bed.pod(&a, server).unwrap();
        let stranger = bed.pod(&a, PodSpec::new("stranger").unmeshed()).unwrap();
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            server,
            stranger,
        }
    }

    fn metrics(&self) -> Metrics {
        self.bed.agent(&self.a).metrics().unwrap()
    }

    fn addresses(&self, port: u16) -> Vec<SocketAddr> {
        let addresses = self.server.addresses().iter();
        addresses.map(|address| (*address, port).into()).collect()
    }

    /// What becomes of `bytes` that the node sends.
    fn probe(&self, to: SocketAddr, bytes: &[u8]) -> Fate {
        self.a.caller(to.ip()).saying(bytes).call(to)
    }

    fn assert_all_from_the_node(&self, app: &EchoApp) {
        for peer in app.peers() {
            assert!(self.a.addresses().contains(&peer.ip()), "{peer}");
        }
    }

    /// What the node's agent counts of inbound connections that ended for a reason.
    fn failed(&self, reason: &str) -> f64 {
        let metrics = self.metrics();
        metrics.sum(
            "tcp_close_total",
            &[("direction", "inbound"), ("reason", reason)],
        )
    }

    fn health_server(&self) -> Process {
        let port = GRPC.to_string();
        let server = self.server.spawn(health(&["serve", &port])).unwrap();
        server.wait_for_log("ready", LIMIT).unwrap();
        server
    }

    /// What a gRPC client on the node says that it got.
    fn check(&self, to: IpAddr, path: &str, service: &str) -> String {
        let [v4, v6] = self.a.addresses();
        let own = if to.is_ipv4() { v4 } else { v6 };
        let (own, to, port) = (own.to_string(), to.to_string(), GRPC.to_string());
        let asked = health(&["ask", &own, &to, &port, path, service]);
        self.a.run(asked).unwrap().stdout.trim().to_owned()
    }
}

/// `tests/peers/health.py`.
fn health(arguments: &[&str]) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/health.py");
    let script = script.display().to_string();
    let command = ["/usr/bin/python3", "-B", &script];
    let words = command.into_iter().chain(arguments.iter().copied());
    words.map(str::to_owned).collect()
}

#[test]
fn a_declared_request_passes_to_a_strict_app_which_sees_the_node() {
    let scene = Scene::new("mtls: strict");
    let app = scene.server.echo(HTTP).unwrap();
    for to in scene.addresses(HTTP) {
        assert_eq!(scene.probe(to, PROBE), Fate::Echoed, "{to}");
        assert_eq!(scene.probe(to, WITH_QUERY), Fate::Echoed, "{to}");
        // In as many packets as it likes, and again on the same connection.
        let mut stream = scene.a.caller(to.ip()).connect(to).unwrap();
        for part in PROBE.chunks(7) {
            stream.write_all(part).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut answer = vec![0; PROBE.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, PROBE);
        assert_eq!(say(&mut stream, WITH_QUERY), Fate::Echoed);
    }
    assert_eq!(app.accepted(), 6);
    scene.assert_all_from_the_node(&app);
}

#[test]
fn nothing_else_from_the_node_reaches_a_strict_app() {
    let scene = Scene::new("mtls: strict");
    let (app, other) = (
        scene.server.echo(HTTP).unwrap(),
        scene.server.echo(OTHER).unwrap(),
    );
    for (number, to) in scene.addresses(HTTP).into_iter().enumerate() {
        for bytes in UNDECLARED {
            let said = String::from_utf8_lossy(bytes);
            let before = app.accepted();
            assert_eq!(scene.probe(to, bytes), Fate::Reset, "{to}: {said}");
            assert_eq!(app.accepted(), before);
        }
        // What follows a declared request on its connection is read as well.
        let mut stream = scene.a.caller(to.ip()).connect(to).unwrap();
        assert_eq!(say(&mut stream, PROBE), Fate::Echoed);
        assert_eq!(say(&mut stream, UNDECLARED[0]), Fate::Reset);
        let smuggled = [PROBE, UNDECLARED[0]].concat();
        assert_ne!(scene.probe(to, &smuggled), Fate::Echoed);
        // Each began with what is declared, and the app may hear of it later than its client.
        let both = || app.accepted() == 2 * (number + 1);
        eventually("the app to accept what was declared", LIMIT, both).unwrap();
        // Nor does a stranger's request that is like a probe.
        assert_eq!(scene.stranger.caller().saying(PROBE).call(to), Fate::Reset);
        assert_eq!(scene.probe((to.ip(), OTHER).into(), PROBE), Fate::Reset);
    }
    assert_eq!(other.accepted(), 0);
    scene.assert_all_from_the_node(&app);
    assert!(scene.failed("probe_undeclared") >= 18.0);
    assert!(scene.failed("plaintext_refused") >= 4.0);
}

#[test]
fn a_probe_of_a_socket_is_the_apps_to_answer_and_brings_no_byte() {
    let scene = Scene::new("mtls: strict");
    for to in scene.addresses(TCP) {
        assert_eq!(scene.probe(to, b"x"), Fate::Refused, "{to}");
    }
    let app = scene.server.echo(TCP).unwrap();
    for (number, to) in scene.addresses(TCP).into_iter().enumerate() {
        let caller = scene.a.caller(to.ip());
        drop(caller.connect(to).unwrap());
        let accepted = || app.accepted() == 2 * number + 1;
        eventually("the app to accept", LIMIT, accepted).unwrap();
        let patience = Duration::from_secs(1);
        let caller = caller.saying(b"no probe").patience(patience);
        assert_eq!(caller.call(to), Fate::Silence, "{to}");
        assert_eq!(scene.stranger.caller().call(to), Fate::Reset);
    }
    assert_eq!(app.accepted(), 4);
    scene.assert_all_from_the_node(&app);
    let metrics = scene.metrics();
    assert!(metrics.syns("inbound", "passed", "probe") >= 4.0);
    assert!(metrics.steering_packets("inbound", "dropped", "probe_payload") >= 2.0);
}

#[test]
fn a_port_that_is_asked_in_both_ways_fails_where_the_app_doesnt_listen() {
    let scene = Scene::new("mtls: strict");
    for to in scene.addresses(BOTH) {
        assert_eq!(scene.probe(to, PROBE), Fate::Refused, "{to}");
    }
    let app = scene.server.echo(BOTH).unwrap();
    for to in scene.addresses(BOTH) {
        drop(scene.a.caller(to.ip()).connect(to).unwrap());
        assert_eq!(scene.probe(to, PROBE), Fate::Echoed, "{to}");
        assert_eq!(scene.probe(to, UNDECLARED[0]), Fate::Reset, "{to}");
    }
    assert_eq!(app.accepted(), 2);
    scene.assert_all_from_the_node(&app);
}

#[test]
fn a_health_check_passes_and_no_other_call_does() {
    const CHECK: &str = "/grpc.health.v1.Health/Check";
    let scene = Scene::new("mtls: strict");
    let app = scene.health_server();
    for to in scene.server.addresses() {
        let answered = scene.check(*to, CHECK, "ready");
        assert_eq!(answered, "answered 00000000020801 grpc-status=0", "{to}");
        for (path, service) in [
            ("/grpc.health.v1.Health/Watch", "ready"),
            (CHECK, "other"),
            (CHECK, ""),
            ("/admin.Admin/Drop", "ready"),
        ] {
            let failed = scene.check(*to, path, service);
            assert!(failed.starts_with("failed"), "{failed}");
        }
        let to = (*to, GRPC).into();
        assert_eq!(scene.probe(to, PROBE), Fate::Reset);
        assert_eq!(scene.probe(to, b"raw"), Fate::Reset);
    }
    let log = app.log();
    let called: Vec<_> = log.lines().filter(|line| line.contains("called")).collect();
    assert_eq!(called.len(), 2, "{log}");
    for (line, own) in called.iter().zip(scene.a.addresses()) {
        let expected = format!("called {own} {CHECK} 00000000070a057265616479");
        assert!(line.ends_with(&expected), "{line}");
    }
}

#[test]
fn an_answer_of_any_kind_goes_back_to_who_probes() {
    let scene = Scene::new("mtls: strict");
    let redirect = "HTTP/1.1 301 Moved Permanently\r\nLocation: /h/\r\nContent-Length: 0\r\n\r\n";
    let app = App::start(&scene.server, HTTP, 2, move |mut stream| {
        let mut request = vec![0; WITH_QUERY.len()];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(redirect.as_bytes()).unwrap();
        request == WITH_QUERY
    });
    let app = app.unwrap();
    for to in scene.addresses(HTTP) {
        let mut stream = scene.a.caller(to.ip()).connect(to).unwrap();
        stream.write_all(WITH_QUERY).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, redirect);
    }
    assert_eq!(app.results().unwrap(), [true; 2]);
}

#[test]
fn while_no_agent_lives_probes_pass_and_nothing_else_does() {
    let scene = Scene::new("mtls: strict");
    let http = scene.server.echo(HTTP).unwrap();
    let (tcp, other) = (
        scene.server.echo(TCP).unwrap(),
        scene.server.echo(OTHER).unwrap(),
    );
    scene.bed.agent(&scene.a).kill9();
    for to in scene.server.addresses() {
        let to = |port: u16| SocketAddr::from((*to, port));
        assert_eq!(scene.probe(to(HTTP), PROBE), Fate::Echoed);
        let mut stream = scene.a.caller(to(HTTP).ip()).connect(to(HTTP)).unwrap();
        assert_eq!(say(&mut stream, WITH_QUERY), Fate::Echoed);
        assert_eq!(say(&mut stream, PROBE), Fate::Echoed);
        drop(scene.a.caller(to(TCP).ip()).connect(to(TCP)).unwrap());
        let caller = scene.a.caller(to(TCP).ip()).saying(b"no probe");
        let caller = caller.patience(Duration::from_secs(1));
        assert_eq!(caller.call(to(TCP)), Fate::Silence);
        assert_eq!(scene.probe(to(OTHER), PROBE), Fate::Refused);
        for port in [HTTP, TCP, OTHER] {
            let stranger = scene.stranger.caller().saying(PROBE);
            assert_eq!(stranger.call(to(port)), Fate::Refused, "{port}");
        }
    }
    assert_eq!(
        (http.accepted(), tcp.accepted(), other.accepted()),
        (4, 4, 0)
    );
    scene.assert_all_from_the_node(&http);
    // The app's end of a probe that it has closed is gone, as without a mesh.
    drop(tcp);
    let mut scene = scene;
    let node = Arc::clone(&scene.a);
    scene.bed.start_agent(&node).unwrap();
    assert!(
        scene
            .metrics()
            .syns("inbound", "passed", "probe_without_agent")
            >= 6.0
    );
    let to = scene.addresses(HTTP)[0];
    let served = || scene.probe(to, PROBE) == Fate::Echoed;
    eventually("the next agent to carry probes", LIMIT, served).unwrap();
    assert_eq!(scene.probe(to, UNDECLARED[0]), Fate::Reset);
}

#[test]
fn while_no_agent_lives_the_kernel_reads_the_requests() {
    let scene = Scene::new("mtls: strict");
    let app = scene.server.echo(HTTP).unwrap();
    scene.bed.agent(&scene.a).kill9();
    let smuggled = [PROBE, UNDECLARED[0]].concat();
    let line_feeds = b"GET /healthz HTTP/1.1\n\nGET /admin HTTP/1.1\r\n\r\n";
    let more: [&[u8]; 4] = [
        &smuggled,
        line_feeds,
        // Not in one packet.
        &PROBE[..40],
        b"GET /healthz HTTP/1.1",
    ];
    // An upgrade asks for an answer to a declared request: what would follow it is refused.
    let upgrade = b"Upgrade".as_slice();
    let asks_upgrade = |bytes: &[u8]| bytes.windows(upgrade.len()).any(|at| at == upgrade);
    let all = UNDECLARED.into_iter().chain(more);
    for bytes in all.filter(|bytes| !asks_upgrade(bytes)) {
        let to = scene.addresses(HTTP)[bytes.len() % 2];
        let caller = scene.a.caller(to.ip()).saying(bytes);
        let caller = caller.patience(Duration::from_millis(300));
        let said = String::from_utf8_lossy(bytes);
        assert_eq!(caller.call(to), Fate::Silence, "{to}: {said}");
    }
    scene.assert_all_from_the_node(&app);
    let to = scene.addresses(HTTP)[0];
    let caller = scene.a.caller(to.ip());
    let caller = caller.patience(Duration::from_millis(500));
    let mut followed = caller.connect(to).unwrap();
    assert_eq!(say(&mut followed, PROBE), Fate::Echoed);
    assert_eq!(say(&mut followed, UNDECLARED[0]), Fate::Silence);
    // Nor does what lives from then get past the next agent.
    let mut old = caller.connect(to).unwrap();
    assert_eq!(say(&mut old, PROBE), Fate::Echoed);
    let mut scene = scene;
    let node = Arc::clone(&scene.a);
    scene.bed.start_agent(&node).unwrap();
    let served = || scene.probe(to, PROBE) == Fate::Echoed;
    eventually("the next agent to carry probes", LIMIT, served).unwrap();
    assert_eq!(say(&mut old, UNDECLARED[0]), Fate::Silence);
    let metrics = scene.metrics();
    let dropped = metrics.steering_packets("inbound", "dropped", "probe_payload");
    assert!(dropped >= 12.0, "{dropped}");
}

/// As a CNI's policy that lets the kubelet in (istio/istio#58531).
#[test]
fn probes_pass_a_rule_that_accepts_only_the_node() {
    let scene = Scene::new("mtls: strict");
    let [v4, v6] = scene.a.addresses();
    let rules = format!(
        "table inet cni {{\n chain input {{\n type filter hook input priority 0;\n\
         tcp dport {{ {HTTP}, {TCP} }} ip saddr != {v4} drop\n\
         tcp dport {{ {HTTP}, {TCP} }} ip6 saddr != {v6} drop\n }}\n}}\n"
    );
    let nft = scene.server.command(["nft", "-f", "-"]);
    nft.input(rules).run().unwrap();
    let (app, _tcp) = (
        scene.server.echo(HTTP).unwrap(),
        scene.server.echo(TCP).unwrap(),
    );
    for to in scene.server.addresses() {
        assert_eq!(scene.probe((*to, HTTP).into(), PROBE), Fate::Echoed);
        scene.a.caller(*to).connect((*to, TCP).into()).unwrap();
    }
    assert_eq!(app.accepted(), 2);
    scene.assert_all_from_the_node(&app);
}

#[test]
fn only_the_nodes_own_declared_addresses_probe() {
    let mut bed = Testbed::new("probes").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let spec = PodSpec::new("server").settings("mtls: strict");
    let spec = spec.probe("httpGet: {path: /healthz, port: 8080}");
    let server = bed.pod(&a, spec.probe("tcpSocket: {port: 5432}")).unwrap();
    bed.start_agents().unwrap();
    let apps = [HTTP, TCP].map(|port| server.echo(port).unwrap());
    for to in server.addresses() {
        for port in [HTTP, TCP] {
            let to = SocketAddr::from((*to, port));
            // Another node, and the bridge, whose address isn't in the file.
            for caller in [b.caller(to.ip()), Caller::new(a.netns())] {
                assert_eq!(caller.saying(PROBE).call(to), Fate::Reset, "{to}");
            }
        }
    }
    assert!(apps.iter().all(|app| app.accepted() == 0));
}

#[test]
fn what_a_probed_port_takes_else_is_the_ports_own_mode() {
    let scene = Scene::new("mtlsByPort: [{ports: 8080, mode: strict}]");
    let _apps = [HTTP, BOTH].map(|port| scene.server.echo(port).unwrap());
    for (port, expected) in [(HTTP, Fate::Reset), (BOTH, Fate::Echoed)] {
        let to = scene.addresses(port)[0];
        assert_eq!(scene.probe(to, PROBE), Fate::Echoed);
        assert_eq!(scene.probe(to, UNDECLARED[0]), expected);
    }
}

#[test]
fn in_permissive_mode_the_node_is_a_client_like_others() {
    let scene = Scene::new("");
    let to = scene.addresses(TCP)[0];
    assert_eq!(scene.probe(to, b"x"), Fate::Refused);
    let apps = [HTTP, TCP, BOTH, OTHER].map(|port| (port, scene.server.echo(port).unwrap()));
    for (port, app) in apps {
        for to in scene.addresses(port) {
            for bytes in [PROBE, UNDECLARED[0], b"raw bytes"] {
                assert_eq!(scene.probe(to, bytes), Fate::Echoed, "{to}");
            }
        }
        scene.assert_all_from_the_node(&app);
    }
}

#[test]
fn probes_come_and_go_with_the_file() {
    let mut bed = Testbed::new("probes").unwrap();
    let a = bed.node("a").unwrap();
    let spec = PodSpec::new("server").settings("mtls: strict");
    let server = bed.pod(&a, spec.probe("tcpSocket: {port: 5432}")).unwrap();
    bed.start_agents().unwrap();
    let _app = server.echo(TCP).unwrap();
    let to: SocketAddr = (server.v4(), TCP).into();
    let caller = a.caller(to.ip()).patience(Duration::from_millis(500));
    assert_eq!(caller.call(to), Fate::Silence);
    let with_probes = bed.mesh_yaml();
    let without = with_probes.replace("  probes:\n  - {tcpSocket: {port: 5432}}\n", "");
    assert_ne!(with_probes, without);
    bed.write_mesh_text(&without).unwrap();
    eventually("the probe to go", LIMIT, || caller.call(to) == Fate::Reset).unwrap();
    // A bad one changes nothing.
    let bad = with_probes.replace("{port: 5432}", "{port: nowhere}");
    bed.write_mesh_text(&bad).unwrap();
    let refused = || bed.agent(&a).log().contains("there is no port nowhere");
    eventually("the refusal", LIMIT, refused).unwrap();
    assert_eq!(caller.call(to), Fate::Reset);
    bed.write_mesh_text(&with_probes).unwrap();
    eventually("the probe to be back", LIMIT, || {
        caller.call(to) == Fate::Silence
    })
    .unwrap();
}
