//! Certificates, issuers and trust anchors that change while traffic goes on, and certificates that
//! are revoked.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use malla_testbed::{
    Agent, Authority, EchoApp, Fate, IdentityVolume, Node, Pod, PodSpec, Testbed, eventually,
    hbone::{Certificate, Client},
    say, until,
};

const LIMIT: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_hours(24);
const PORT: u16 = 8080;

/// A client and a server on two nodes with an agent each, and a third node without one.
struct World {
    bed: Testbed,
    a: Arc<Node>,
    b: Arc<Node>,
    without_agent: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    _app: EchoApp,
    guests: u32,
}

impl World {
    fn new(mut bed: Testbed) -> Self {
        let [a, b, without_agent] = ["a", "b", "c"].map(|name| bed.node(name).unwrap());
        let client = bed.pod(&a, PodSpec::new("client").account("client"));
        let server = PodSpec::new("server").account("server");
        let server = bed.pod(&b, server.settings("mtls: strict")).unwrap();
        bed.start_agent(&a).unwrap();
        bed.start_agent(&b).unwrap();
        Self {
            _app: server.echo(PORT).unwrap(),
            client: client.unwrap(),
            server,
            a,
            b,
            without_agent,
            bed,
            guests: 0,
        }
    }

    fn agents(&self) -> [&Agent; 2] {
        [self.bed.agent(&self.a), self.bed.agent(&self.b)]
    }

    fn to(&self) -> SocketAddr {
        (self.server.v4(), PORT).into()
    }

    /// A pod more beside the client, once it is enrolled.
    fn neighbour(&mut self, name: &str, account: &str) -> Arc<Pod> {
        let spec = PodSpec::new(name).account(account);
        let pod = self.bed.pod(&self.a, spec).unwrap();
        let enrolled = format!("enrolled\tworkload=default/{name} ");
        let agent = self.bed.agent(&self.a).process();
        agent.wait_for_log(&enrolled, LIMIT).unwrap();
        pod
    }

    /// What becomes of the first connection of a new pod, for which there is no tunnel yet.
    fn newcomer(&mut self) -> Fate {
        self.guests += 1;
        let name = format!("guest-{}", self.guests);
        let guest = self.neighbour(&name, "guest");
        guest.caller().call(self.to())
    }

    /// Waits until the metric of both agents' identity has reached `least`.
    fn wait_for(&self, name: &str, labels: &[(&str, &str)], least: f64) {
        for agent in self.agents() {
            eventually(&format!("{name} {labels:?} at {least}"), LIMIT, || {
                agent.metrics().unwrap().sum(name, labels) >= least
            })
            .unwrap();
        }
    }

    /// Handshakes of both agents that failed, by their reasons.
    fn failed_handshakes(&self) -> Vec<String> {
        let both = self.agents().map(|agent| agent.metrics().unwrap());
        let all = both
            .iter()
            .flat_map(|one| one.samples("malla_handshakes_total", &[]));
        let failed = all.filter(|sample| sample.label("result") != "ok");
        failed.map(|sample| format!("{sample:?}")).collect()
    }

    /// The number of the certificate that the agent of a node has got last for an account.
    fn serial(&self, node: &Node, account: &str) -> String {
        let line = until("a certificate to be told of", LIMIT, || {
            let log = self.bed.agent(node).log();
            let mut lines = log.lines().filter(|line| {
                line.contains("certificate obtained") && line.contains(&format!("/sa/{account}"))
            });
            lines.next_back().map(str::to_owned)
        });
        let line = line.unwrap();
        let rest = line.split_once("serial=").unwrap().1;
        let digits = rest.trim_start_matches('"').chars();
        digits.take_while(char::is_ascii_hexdigit).collect()
    }
}

/// One connection that lives and says something again and again, and short ones beside it.
struct Traffic {
    ends: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
    failures: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn start(world: &World) -> Self {
        let mut traffic = Self {
            ends: Arc::default(),
            calls: Arc::default(),
            failures: Arc::default(),
            threads: Vec::new(),
        };
        let (client, to) = (Arc::clone(&world.client), world.to());
        let mut live = client.connect(to).unwrap();
        traffic.repeat("the live connection", move || say(&mut live, b"beat"));
        traffic.repeat("a short connection", move || client.caller().call(to));
        traffic
    }

    fn repeat(&mut self, what: &'static str, mut work: impl FnMut() -> Fate + Send + 'static) {
        let (ends, calls) = (Arc::clone(&self.ends), Arc::clone(&self.calls));
        let failures = Arc::clone(&self.failures);
        self.threads.push(thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                match work() {
                    Fate::Echoed => {}
                    other => failures.lock().unwrap().push(format!("{what}: {other:?}")),
                }
                calls.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
        }));
    }

    /// Ends it. Nothing of it may have failed.
    fn end(self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        assert_eq!(*self.failures.lock().unwrap(), Vec::<String>::new());
        assert!(self.calls.load(Ordering::Relaxed) > 100);
    }
}

/// The files of an issuer under `anchors`.
fn pair(anchors: &[&Authority], issuer: &Authority) -> [(&'static str, String); 3] {
    let anchors = anchors.iter().map(|anchor| anchor.certificate().unwrap());
    [
        ("ca.crt", anchors.collect()),
        ("issuer.crt", issuer.certificate().unwrap()),
        ("issuer.key", issuer.key().unwrap()),
    ]
}

fn put(volume: &mut IdentityVolume, files: &[(&'static str, String)]) {
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, &**text)).collect();
    volume.put(&files).unwrap();
}

fn reloaded<'a>(object: &'a str, result: &'a str) -> [(&'a str, &'a str); 2] {
    [("object", object), ("result", result)]
}

#[test]
fn certificates_renew_under_traffic_and_nothing_fails() {
    let bed = Testbed::new("renewals").unwrap();
    let mut world = World::new(bed.with_certificate_lifetime("4s"));
    let traffic = Traffic::start(&world);
    for renewals in [3.0, 5.0, 7.0] {
        world.wait_for(
            "control_identity_cert_refreshes_total",
            &[("result", "ok")],
            renewals,
        );
        assert_eq!(world.newcomer(), Fate::Echoed);
    }
    traffic.end();
    assert_eq!(world.failed_handshakes(), Vec::<String>::new());
}

#[test]
fn issuer_and_anchor_are_replaced_under_traffic_and_nothing_fails() {
    let bed = Testbed::new("anchors").unwrap();
    let mut volume = IdentityVolume::new(&bed).unwrap();
    let [old, new] = ["old", "new"].map(|name| Authority::anchor(&bed, name, DAY).unwrap());
    let (first, second) = (
        old.issuer("first", DAY).unwrap(),
        new.issuer("second", DAY).unwrap(),
    );
    put(&mut volume, &pair(&[&old], &first));
    let mut world = World::new(bed);
    let traffic = Traffic::start(&world);

    // A bad pair: refused by name.
    let mut bad = pair(&[&old], &second);
    bad[2].1 = first.key().unwrap();
    put(&mut volume, &bad);
    for agent in world.agents() {
        let said = "issuer.key is not the key of the certificate in";
        agent.process().wait_for_log(said, LIMIT).unwrap();
    }
    assert_eq!(world.newcomer(), Fate::Echoed);
    // Both anchors and the new issuer in one step, which agents see at different moments: whoever
    // comes meanwhile makes a handshake.
    put(&mut volume, &pair(&[&old, &new], &second));
    let second_signs = [("object", "issuer"), ("subject", "CN=second")];
    eventually("both agents to sign with the new issuer", LIMIT, || {
        assert_eq!(world.newcomer(), Fate::Echoed);
        world.agents().iter().all(|agent| {
            let metrics = agent.metrics().unwrap();
            let name = "malla_identity_expiration_timestamp_seconds";
            metrics.samples(name, &second_signs).next().is_some()
        })
    })
    .unwrap();
    world.wait_for(
        "control_identity_cert_refreshes_total",
        &[("result", "ok")],
        2.0,
    );
    assert_eq!(world.newcomer(), Fate::Echoed);
    // The old anchor goes.
    put(&mut volume, &pair(&[&new], &second));
    world.wait_for(
        "malla_identity_reloads_total",
        &reloaded("trust_anchors", "ok"),
        3.0,
    );
    assert_eq!(world.newcomer(), Fate::Echoed);

    traffic.end();
    assert_eq!(world.failed_handshakes(), Vec::<String>::new());
}

/// As linkerd/linkerd2#15109 has it, where a replacement was missed.
#[test]
fn a_hundred_issuers_in_a_row_and_bad_ones_between_leave_the_last_one_in_use() {
    let bed = Testbed::new("issuers").unwrap();
    let mut volume = IdentityVolume::new(&bed).unwrap();
    let anchor = Authority::anchor(&bed, "anchor", DAY).unwrap();
    let issuers: Vec<_> = (0..10)
        .map(|number| anchor.issuer(&format!("issuer-{number}"), DAY).unwrap())
        .collect();
    put(&mut volume, &pair(&[&anchor], &issuers[0]));
    let world = World::new(bed);
    let traffic = Traffic::start(&world);
    for turn in 1..=100 {
        let issuer = &issuers[turn % issuers.len()];
        if turn % 5 == 0 {
            let mut bad = pair(&[&anchor], issuer);
            bad[2].1 = issuers[(turn + 1) % issuers.len()].key().unwrap();
            put(&mut volume, &bad);
        }
        put(&mut volume, &pair(&[&anchor], issuer));
        // Each second one stays for less than 10 ms; the time itself is what is tried.
        if turn % 2 == 0 {
            thread::sleep(Duration::from_millis(30));
        }
        if turn % 50 == 0 {
            let signs = format!("CN=issuer-{}", turn % issuers.len());
            world.wait_for(
                "malla_identity_expiration_timestamp_seconds",
                &[("object", "issuer"), ("subject", &signs)],
                1.0,
            );
        }
    }
    traffic.end();
    assert_eq!(world.failed_handshakes(), Vec::<String>::new());
}

#[test]
fn an_expired_anchor_is_told_of_before_and_its_successor_mends_the_mesh_without_a_restart() {
    let bed = Testbed::new("expiry").unwrap();
    let mut volume = IdentityVolume::new(&bed).unwrap();
    let life = Duration::from_secs(12);
    let old = Authority::anchor(&bed, "old", life).unwrap();
    put(
        &mut volume,
        &pair(&[&old], &old.issuer("first", DAY).unwrap()),
    );
    let new = Authority::anchor(&bed, "new", DAY).unwrap();
    let mut world = World::new(bed);
    assert_eq!(world.newcomer(), Fate::Echoed);
    for agent in world.agents() {
        agent
            .process()
            .wait_for_log("nears its end", LIMIT)
            .unwrap();
        agent
            .process()
            .wait_for_log("ca.crt expired at", LIMIT)
            .unwrap();
    }
    // Its leaf has ended with the anchor, whatever lifetime was asked for.
    eventually("no identity for a newcomer", LIMIT, || {
        world.newcomer() == Fate::Reset
    })
    .unwrap();

    put(
        &mut volume,
        &pair(&[&new], &new.issuer("second", DAY).unwrap()),
    );
    let began = std::time::Instant::now();
    eventually("a newcomer to be served", LIMIT, || {
        world.client.caller().call(world.to()) == Fate::Echoed && world.newcomer() == Fate::Echoed
    })
    .unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_revoked_certificate_is_refused_and_its_live_tunnel_cut() {
    let bed = Testbed::new("revoked").unwrap();
    let mut volume = IdentityVolume::new(&bed).unwrap();
    let anchor = Authority::anchor(&bed, "anchor", DAY).unwrap();
    let issuer = anchor.issuer("issuer", DAY).unwrap();
    put(&mut volume, &pair(&[&anchor], &issuer));
    let mut world = World::new(bed);
    let neighbour = world.neighbour("neighbour", "neighbour");
    let stranger = PodSpec::new("stranger").account("stranger");
    let stranger = world.bed.pod(&world.without_agent, stranger).unwrap();
    let certificate = Certificate::of("spiffe://cluster.local/ns/default/sa/stranger");
    let certificate = certificate.issue(&world.bed).unwrap();
    let connect = |pod: &Pod| pod.connect(world.to()).unwrap();
    let (mut cut, mut kept) = (connect(&world.client), connect(&neighbour));
    let alive = |stream: &mut TcpStream| say(stream, b"alive") == Fate::Echoed;
    assert!(alive(&mut cut) && alive(&mut kept));
    let leaked = world.serial(&world.a, "client");

    let list = issuer
        .list(&[leaked.clone(), certificate.serial().unwrap()])
        .unwrap();
    let mut files = pair(&[&anchor], &issuer).to_vec();
    files.push(("crl.pem", list));
    put(&mut volume, &files);

    eventually("the revoked one's connection to be cut", LIMIT, || {
        !alive(&mut cut)
    })
    .unwrap();
    assert!(alive(&mut kept), "a good certificate's connection was cut");
    let server = world.bed.agent(&world.b);
    let line = until("the connection in the access log", LIMIT, || {
        let log = server.log();
        let mut lines = log.lines().filter(|line| line.contains("\taccess\t"));
        lines
            .find(|line| line.contains("certificate_revoked"))
            .map(str::to_owned)
    });
    assert!(line.unwrap().contains("/sa/client"));
    // The pod itself has a new key and certificate, and goes on.
    eventually("a new certificate", LIMIT, || {
        world.serial(&world.a, "client") != leaked
    })
    .unwrap();
    eventually("the client to be served", LIMIT, || {
        world.client.caller().call(world.to()) == Fate::Echoed
    })
    .unwrap();

    let refused = || {
        let count = [("direction", "inbound"), ("result", "certificate_revoked")];
        server
            .metrics()
            .unwrap()
            .sum("malla_handshakes_total", &count)
    };
    let is_refused = || {
        let before = refused();
        let client = Client::new(&world.bed, &stranger).with(&certificate);
        let said = client.talk(world.server.v4(), "certificate\n").unwrap();
        said.last().unwrap().starts_with("closed") && refused() > before
    };
    assert!(is_refused());
    // A list that can't be read changes nothing.
    files[3].1.truncate(100);
    put(&mut volume, &files);
    server
        .process()
        .wait_for_log("crl.pem cannot be used", LIMIT)
        .unwrap();
    world.wait_for(
        "malla_identity_reloads_total",
        &reloaded("revocation_list", "error"),
        1.0,
    );
    assert!(is_refused());
    assert!(alive(&mut kept));
}
