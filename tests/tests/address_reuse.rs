//! An address that goes from one pod to another, of another identity on another node: what was
//! meant for the old one never reaches the new one.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{self, ErrorKind, Write},
    net::{IpAddr, TcpStream},
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Capture, EchoApp, Fate, Metrics, Node, PORT, Pod, PodSpec, Process, Testbed, binary,
    eventually, say,
};

const LIMIT: Duration = Duration::from_secs(20);
/// "Within a second" of the old pod's end; five times that, on a busy machine.
const REUSED: Duration = Duration::from_secs(5);
/// A silent peer is given up after 30 s, one that answers for somebody else at once.
const OLD_TUNNELS: Duration = Duration::from_secs(30);

const FOR_OLD: &[u8] = b"meant for the old pod alone";
const FOR_NEW: &[u8] = b"meant for the new pod alone";

/// How the old pod ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// Its netns is deleted by force; its agent lives on.
    Deleted,
    /// Its node falls off the network: nobody sends a FIN or a reset.
    CutOff,
}

/// A client on node `a`, whose agent may hear of changes later than others, a server on node `b`,
/// and node `c`, where its address goes.
struct World {
    a: Arc<Node>,
    b: Arc<Node>,
    c: Arc<Node>,
    client: Arc<Pod>,
    old: Arc<Pod>,
    old_app: EchoApp,
    news: PathBuf,
    agent: Process,
    bed: Testbed,
}

impl World {
    fn new() -> Self {
        let mut bed = Testbed::new("reuse").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let c = bed.node("c").unwrap();
        let client = bed.pod(&a, PodSpec::new("client")).unwrap();
        let old = bed.pod(&b, PodSpec::new("old").account("old")).unwrap();
        let old_app = old.echo(PORT).unwrap();
        bed.start_agent(&b).unwrap();
        bed.start_agent(&c).unwrap();
        let news = bed.folder().join("news-of-a.yaml");
        fs::copy(bed.mesh_path(), &news).unwrap();
        let agent = [
            binary("malla").unwrap().into_os_string(),
            "agent".into(),
            "--config".into(),
            news.clone().into(),
            "--node".into(),
            "a".into(),
        ];
        let agent = a.spawn(agent).unwrap();
        let ready = || a.get("/ready").is_ok_and(|said| said.status == 200);
        eventually("the client's agent to be ready", LIMIT, ready).unwrap();
        Self {
            a,
            b,
            c,
            client,
            old,
            old_app,
            news,
            agent,
            bed,
        }
    }

    /// Ten connections to each address of the old pod, over which bytes have come and gone.
    fn connect(&self) -> Vec<TcpStream> {
        let addresses = self.old.addresses().iter().cycle().take(20);
        let open = |to: &IpAddr| {
            let mut stream = self.client.connect((*to, PORT)).unwrap();
            assert_eq!(say(&mut stream, FOR_OLD), Fate::Echoed);
            stream.set_read_timeout(Some(2 * OLD_TUNNELS)).unwrap();
            stream.set_write_timeout(Some(2 * OLD_TUNNELS)).unwrap();
            stream
        };
        addresses.map(open).collect()
    }

    /// Ends the old pod, and gives its addresses to a new one.
    fn reuse(&mut self, end: End) -> New {
        let began = Instant::now();
        let addresses = self.old.addresses().to_vec();
        match end {
            End::Deleted => self.bed.remove_pod(&self.old).unwrap(),
            End::CutOff => {
                let cut = "table inet cut { chain forwarded { type filter hook forward priority 0\n\
                           policy drop\n}\n}\n";
                let nft = self.b.command(["nft", "-f", "-"]);
                nft.input(cut).run().unwrap();
                self.bed.forget_pod(&self.old).unwrap();
            }
        }
        let new = PodSpec::new("new").account("new").at(&addresses);
        let new = self.bed.pod(&self.c, new).unwrap();
        let app = new.echo(PORT).unwrap();
        let seen = ["lo", "eth0"].map(|name| Capture::start(new.netns(), name).unwrap());
        let took = began.elapsed();
        assert!(took < REUSED, "the address was free for {took:?}");
        New {
            pod: new,
            app,
            seen,
        }
    }

    /// Lets the client's agent hear of what has changed.
    fn tell(&self) {
        let beside = self.news.with_extension("new");
        fs::copy(self.bed.mesh_path(), &beside).unwrap();
        fs::rename(beside, &self.news).unwrap();
    }

    /// Handshakes of the client's agent with a pod that wasn't the one that it wanted.
    fn mismatches(&self) -> f64 {
        let metrics = Metrics::parse(&self.a.get("/metrics").unwrap().body);
        let labels = [("direction", "outbound"), ("result", "identity_mismatch")];
        metrics.sum("malla_handshakes_total", &labels)
    }

    /// Connections that the client's agent has carried to a service account, by its certificate.
    fn carried_to(&self, account: &str) -> usize {
        let identity = format!("dst.identity=\"spiffe://cluster.local/ns/default/sa/{account}\"");
        let log = self.agent.log();
        log.lines().filter(|line| line.contains(&identity)).count()
    }
}

/// The pod that has got the address.
struct New {
    pod: Arc<Pod>,
    app: EchoApp,
    /// All that passes to its app and on its network.
    seen: [Capture; 2],
}

impl New {
    fn has_seen(&self, bytes: &[u8]) -> bool {
        for capture in &self.seen {
            assert_eq!(capture.missed().unwrap(), 0);
        }
        self.seen.iter().any(|capture| capture.contains(bytes))
    }
}

/// Writes all the while what is meant for the old pod, and returns how that ended.
fn write_until_cut(mut stream: &TcpStream) -> io::Error {
    let began = Instant::now();
    while began.elapsed() < 2 * OLD_TUNNELS {
        if let Err(error) = stream.write_all(FOR_OLD) {
            return error;
        }
        thread::sleep(Duration::from_millis(1));
    }
    ErrorKind::TimedOut.into()
}

/// Opens connections, ends the old pod, and gives its address away, whether or not the client's
/// agent is told of it.
fn nothing_meant_for_the_old_pod_reaches_the_new_one(end: End, told_at_once: bool) {
    let mut world = World::new();
    let old = world.connect();
    thread::scope(|scope| {
        let began = Instant::now();
        let writers: Vec<_> = old
            .iter()
            .map(|stream| scope.spawn(move || write_until_cut(stream)))
            .collect();
        let new = world.reuse(end);
        if told_at_once {
            world.tell();
        } else {
            // By what its agent knows these are meant for the old pod too.
            for to in new.pod.addresses() {
                let before = world.mismatches();
                eventually("the new pod to be found out", LIMIT, || {
                    let caller = world.client.caller().saying(FOR_OLD).patience(LIMIT);
                    let fate = caller.call((*to, PORT));
                    assert!(matches!(fate, Fate::Reset | Fate::Refused), "{fate:?}");
                    world.mismatches() > before
                })
                .unwrap();
            }
        }
        for writer in writers {
            let error = writer.join().unwrap();
            let cut = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
            assert!(cut.contains(&error.kind()), "{error}");
        }
        println!("{end:?}: old tunnels ended in {:?}", began.elapsed());
        assert!(began.elapsed() < OLD_TUNNELS);
        assert_eq!(new.app.accepted(), 0);
        assert!(!new.has_seen(FOR_OLD));

        world.tell();
        for to in new.pod.addresses() {
            eventually("connections to the new pod", LIMIT, || {
                let caller = world.client.caller().saying(FOR_NEW);
                caller.call((*to, PORT)) == Fate::Echoed
            })
            .unwrap();
        }
        let carried = || world.carried_to("new") >= 2;
        eventually("both to be in the access log", LIMIT, carried).unwrap();
        assert!(!new.has_seen(FOR_OLD));
        // To its app, and not in plaintext to its network.
        assert!(new.seen[0].contains(FOR_NEW) && !new.seen[1].contains(FOR_NEW));
    });
    assert!(world.agent.is_running());
    drop(world.old_app);
}

#[test]
fn a_deleted_pods_address_brings_its_successor_nothing_of_it() {
    nothing_meant_for_the_old_pod_reaches_the_new_one(End::Deleted, true);
}

#[test]
fn a_deleted_pods_address_brings_its_successor_nothing_of_it_before_its_client_is_told() {
    nothing_meant_for_the_old_pod_reaches_the_new_one(End::Deleted, false);
}

#[test]
fn a_vanished_pods_address_brings_its_successor_nothing_of_it() {
    nothing_meant_for_the_old_pod_reaches_the_new_one(End::CutOff, true);
}

#[test]
fn a_vanished_pods_address_brings_its_successor_nothing_of_it_before_its_client_is_told() {
    nothing_meant_for_the_old_pod_reaches_the_new_one(End::CutOff, false);
}
