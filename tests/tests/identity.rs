//! Who a pod is, and who it speaks with: what its certificate says, and which peers are refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use malla_testbed::{
    Node, Pod, PodSpec, Testbed, eventually,
    hbone::{self, Certificate, Client},
    until,
};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
const MESH: u16 = 15008;

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

/// How often inbound or outbound handshakes ended so.
fn handshakes(bed: &Testbed, node: &Node, direction: &str, result: &str) -> f64 {
    let metrics = bed.agent(node).metrics().unwrap();
    let labels = [("direction", direction), ("result", result)];
    metrics.sum("malla_handshakes_total", &labels)
}

/// A strict pod `server` under an agent, and a pod whose mesh port no agent serves.
struct World {
    bed: Testbed,
    node: Arc<Node>,
    pod: Arc<Pod>,
    stranger: Arc<Pod>,
}

impl World {
    fn new(bed: Testbed) -> Self {
        let mut bed = bed;
        let (node, without_agent) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let spec = PodSpec::new("pod").account("own");
        let pod = bed.pod(&node, spec.settings("mtls: strict")).unwrap();
        let spec = PodSpec::new("stranger").account("stranger");
        let stranger = bed.pod(&without_agent, spec).unwrap();
        bed.start_agent(&node).unwrap();
        Self {
            bed,
            node,
            pod,
            stranger,
        }
    }

    /// Whether the app's connection to the stranger is reset.
    fn is_reset_when_dialling(&self) -> bool {
        let connected = self.pod.connect((self.stranger.v4(), 7));
        let read = connected.and_then(|mut stream| stream.read(&mut [0; 1]));
        read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
    }

    /// What a proper client is told of the certificate of a pod.
    fn certificate_of(&self, pod: &Pod) -> Vec<String> {
        let certificate = Certificate::of(spiffe("stranger"))
            .issue(&self.bed)
            .unwrap();
        let client = Client::new(&self.bed, &self.stranger).with(&certificate);
        let mut said = client.talk(pod.v4(), "certificate\n").unwrap();
        assert_eq!(said.remove(0), "tls TLSv1.3 h2");
        said
    }
}

/// The value of a line `name value`.
fn value<'a>(lines: &'a [String], name: &str) -> &'a str {
    let found = lines.iter().find_map(|line| line.strip_prefix(name));
    found
        .unwrap_or_else(|| panic!("no `{name}` in {lines:?}"))
        .trim()
}

fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

#[test]
fn a_pods_certificate_names_its_service_account_and_nothing_else() {
    let mut world = World::new(Testbed::new("names").unwrap());
    let spec = PodSpec::new("other").namespace("shop").account("till");
    let other = world.bed.pod(&world.node, spec).unwrap();
    let identity = "spiffe://cluster.local/ns/shop/sa/till";
    let agent = world.bed.agent(&world.node);
    agent.process().wait_for_log(identity, LIMIT).unwrap();
    other.wait_listening(MESH).unwrap();

    for (pod, uri) in [(&world.pod, &*spiffe("own")), (&other, identity)] {
        let said = world.certificate_of(pod);
        assert_eq!(value(&said, "uri"), uri);
        assert_eq!(value(&said, "critical"), "True");
        assert_eq!(value(&said, "subject"), "empty");
        assert_eq!(value(&said, "purposes"), "client server");
        assert_eq!(value(&said, "curve"), "secp256r1");
        let (since, until) = (value(&said, "since"), value(&said, "until"));
        let (since, until): (u64, u64) = (since.parse().unwrap(), until.parse().unwrap());
        let now = seconds_since_1970();
        assert!(since <= now && since + 300 > now, "valid since {since}");
        let left = until - now;
        assert!((86_000..=86_400).contains(&left), "valid for {left} s");
    }
}

#[test]
fn openssl_sees_a_chain_to_the_trust_anchor_and_is_asked_for_its_own() {
    let world = World::new(Testbed::new("openssl").unwrap());
    let anchors = hbone::identity_folder(&world.bed).join("ca.crt");
    let (server, anchors) = (format!("{}:{MESH}", world.pod.v4()), anchors.display());
    let line =
        format!("openssl s_client -brief -ign_eof -connect {server} -alpn h2 -CAfile {anchors}");
    let output = world.stranger.command(line.split(' ')).output().unwrap();
    let said = output.stdout + &output.stderr;
    for part in [
        "Protocol version: TLSv1.3",
        "Signature type: ECDSA",
        "Verification: OK",
        "alert certificate required",
    ] {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
}

#[test]
fn a_client_that_is_not_who_it_should_be_is_refused_by_name() {
    let world = World::new(Testbed::new("clients").unwrap());
    let own = || Certificate::of(spiffe("stranger"));
    let foreign = "spiffe://elsewhere.example/ns/default/sa/stranger";
    for (what, certificate, reason) in [
        ("none", None, "no_certificate"),
        ("expired", Some(own().expired()), "certificate_expired"),
        (
            "not yet valid",
            Some(own().not_yet_valid()),
            "certificate_expired",
        ),
        (
            "another authority's",
            Some(own().of_a_strange_authority()),
            "untrusted_certificate",
        ),
        (
            "a server's",
            Some(own().for_servers_only()),
            "untrusted_certificate",
        ),
        (
            "of another trust domain",
            Some(Certificate::of(foreign)),
            "foreign_trust_domain",
        ),
        (
            "without a name",
            Some(Certificate::of_nobody()),
            "foreign_trust_domain",
        ),
        (
            "of no workload",
            Some(Certificate::of("spiffe://cluster.local/stranger")),
            "foreign_trust_domain",
        ),
        (
            "not of this address",
            Some(Certificate::of(spiffe("other"))),
            "identity_mismatch",
        ),
    ] {
        let mut client = Client::new(&world.bed, &world.stranger);
        if let Some(certificate) = certificate {
            client = client.with(&certificate.issue(&world.bed).unwrap());
        }
        let before = handshakes(&world.bed, &world.node, "inbound", reason);
        let steps = format!("connect 1 {}:{PORT}\nstatus 1\n", world.pod.v4());
        let said = client.talk(world.pod.v4(), &steps).unwrap();
        let last = said.last().unwrap();
        assert!(last.starts_with("closed"), "{what}: {said:?}");
        eventually(&format!("{what}: {reason} counted"), LIMIT, || {
            handshakes(&world.bed, &world.node, "inbound", reason) > before
        })
        .unwrap();
    }
    assert_eq!(
        value(&world.certificate_of(&world.pod), "uri"),
        spiffe("own")
    );
}

#[test]
fn a_server_that_is_not_who_it_should_be_gets_no_byte() {
    let world = World::new(Testbed::new("servers").unwrap());
    let own = || Certificate::of(spiffe("stranger"));
    let foreign = "spiffe://elsewhere.example/ns/default/sa/stranger";
    for (what, certificate, reason) in [
        (
            "another workload's",
            Certificate::of(spiffe("own")),
            "identity_mismatch",
        ),
        (
            "of another trust domain",
            Certificate::of(foreign),
            "foreign_trust_domain",
        ),
        ("expired", own().expired(), "certificate_expired"),
        (
            "another authority's",
            own().of_a_strange_authority(),
            "untrusted_certificate",
        ),
        (
            "a client's",
            own().for_clients_only(),
            "untrusted_certificate",
        ),
        (
            "without a name",
            Certificate::of_nobody(),
            "foreign_trust_domain",
        ),
    ] {
        let certificate = certificate.issue(&world.bed).unwrap();
        let server = hbone::serve(&world.bed, &world.stranger, &certificate, &[]).unwrap();
        let before = handshakes(&world.bed, &world.node, "outbound", reason);
        assert!(world.is_reset_when_dialling(), "{what}");
        let after = handshakes(&world.bed, &world.node, "outbound", reason);
        assert!(after > before, "{what}: {reason} isn't counted");
        assert!(!server.log().contains("request"), "{what}");
    }
    let certificate = own().issue(&world.bed).unwrap();
    let _server = hbone::serve(&world.bed, &world.stranger, &certificate, &[]).unwrap();
    let mut stream = world.pod.connect((world.stranger.v4(), 7)).unwrap();
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn the_access_log_names_no_identity_that_was_not_proved() {
    let world = World::new(Testbed::new("unproved").unwrap());
    let certificate = Certificate::of(spiffe("other")).issue(&world.bed).unwrap();
    let _server = hbone::serve(&world.bed, &world.stranger, &certificate, &[]).unwrap();
    assert!(world.is_reset_when_dialling());
    let agent = world.bed.agent(&world.node);
    let line = until("the connection's line in the access log", LIMIT, || {
        let log = agent.log();
        let mut lines = log.lines().filter(|line| line.contains("\taccess\t"));
        lines
            .find(|line| line.contains("identity_mismatch"))
            .map(str::to_owned)
    });
    let line = line.unwrap();
    assert!(!line.contains("dst.identity"), "{line}");
}

#[test]
fn certificates_are_renewed_without_touching_live_connections() {
    let bed = Testbed::new("renewal").unwrap();
    let world = World::new(bed.with_certificate_lifetime("10s"));
    let certificate = Certificate::of(spiffe("stranger"))
        .issue(&world.bed)
        .unwrap();
    let server = hbone::serve(&world.bed, &world.stranger, &certificate, &[]).unwrap();
    let first = world.certificate_of(&world.pod);
    let mut live = world.pod.connect((world.stranger.v4(), 7)).unwrap();
    let mut beat = || {
        live.write_all(b"beat").unwrap();
        live.read_exact(&mut [0; 4]).unwrap();
    };

    let end: u64 = value(&first, "until").parse().unwrap();
    let second = until("another certificate", LIMIT, || {
        beat();
        let now = world.certificate_of(&world.pod);
        (value(&now, "serial") != value(&first, "serial")).then_some(now)
    });
    let second = second.unwrap();
    assert_eq!(value(&second, "uri"), spiffe("own"));
    assert!(seconds_since_1970() < end, "it was renewed after its end");
    eventually("the first certificate's end", LIMIT, || {
        beat();
        seconds_since_1970() > end
    })
    .unwrap();
    beat();
    assert_eq!(server.log().matches("tunnel ").count(), 1);
    world.certificate_of(&world.pod);
    let metrics = world.bed.agent(&world.node).metrics().unwrap();
    let renewed = metrics.sum("control_identity_cert_refreshes_total", &[("result", "ok")]);
    assert!(renewed >= 2.0, "{renewed}");
}

#[test]
fn an_issuer_that_breaks_on_disk_goes_on_signing_from_memory() {
    let bed = Testbed::new("no-issuer").unwrap();
    let world = World::new(bed.with_certificate_lifetime("10s"));
    let folder = hbone::identity_folder(&world.bed);
    // Made before, since this client's certificate is from the same issuer.
    let certificate = Certificate::of(spiffe("stranger"))
        .issue(&world.bed)
        .unwrap();
    let client = Client::new(&world.bed, &world.stranger).with(&certificate);
    let serial = || {
        let said = client.talk(world.pod.v4(), "certificate\n").unwrap();
        value(&said, "serial").to_owned()
    };
    let first = serial();
    let (key, hidden) = (folder.join("issuer.key"), folder.join("hidden"));
    fs::rename(&key, &hidden).unwrap();
    let agent = world.bed.agent(&world.node).process();
    agent.wait_for_log("issuer.key is missing", LIMIT).unwrap();
    eventually("another certificate", LIMIT, || serial() != first).unwrap();
    let reloads = |result| {
        let metrics = world.bed.agent(&world.node).metrics().unwrap();
        let labels = [("object", "issuer"), ("result", result)];
        metrics.sum("malla_identity_reloads_total", &labels)
    };
    assert!(reloads("error") >= 1.0);
    fs::rename(&hidden, &key).unwrap();
    eventually("the issuer to be good again", LIMIT, || {
        reloads("ok") >= 2.0
    })
    .unwrap();
}
