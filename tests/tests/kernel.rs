//! All that malla asks of a kernel, in one story: programs load, steer, close, are adopted, leave.
//!
//! It is what `cargo xtask vm` runs first on each kernel, by emulation ten to twenty times slower
//! than natively: so it starts few agents, and each wait is a limit that nothing good comes near.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{IpAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use malla_testbed::{
    BpfObjects, EchoApp, Fate, Metrics, Node, PORT, Pod, PodSpec, SECRET, Testbed, eventually,
    kernel, say,
};

const LIMIT: Duration = Duration::from_mins(1);
/// What is said past the mesh, as `SECRET` is what agents carry.
const PLAIN: &[u8] = b"what no agent carries";
/// Of the agent's rules in a pod.
const RULE: &str = "133";

/// A meshed client on node `a` that asks for acceleration, a meshed server on node `b`, and a
/// stranger to the mesh beside the client.
struct World {
    a: Arc<Node>,
    b: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    app: EchoApp,
    bed: Testbed,
    began: Instant,
}

impl World {
    fn new() -> Self {
        let began = Instant::now();
        let mut bed = Testbed::new("kernel").unwrap();
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = PodSpec::new("client").settings("accelerate: full");
        let stranger = PodSpec::new("stranger").unmeshed();
        let mut pods = bed.pods(&a, [client, stranger]).unwrap().into_iter();
        let (client, stranger) = (pods.next().unwrap(), pods.next().unwrap());
        let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
        let app = server.echo(PORT).unwrap();
        Self {
            a,
            b,
            client,
            server,
            stranger,
            app,
            bed,
            began,
        }
    }

    fn tell(&self, what: &str) {
        println!("{:6.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    fn metrics(&self, node: &Node) -> Metrics {
        self.bed.agent(node).metrics().unwrap()
    }

    /// What becomes of a connection of `from` to each of the server's addresses, IPv4 and IPv6.
    fn fates(&self, from: &Pod, bytes: &[u8]) -> [Fate; 2] {
        let caller = from.caller().saying(bytes).patience(LIMIT);
        [self.server.v4().into(), self.server.v6().into()].map(|to: IpAddr| caller.call((to, PORT)))
    }

    fn open(&self) -> [TcpStream; 2] {
        let caller = self.client.caller().patience(LIMIT);
        [self.server.v4().into(), self.server.v6().into()]
            .map(|to: IpAddr| caller.connect((to, PORT).into()).unwrap())
    }

    /// The client's connections are carried by both agents, under its own address, and encrypted.
    fn is_steered(&self) {
        let wire = self.bed.capture_wire(&self.a, &self.b).unwrap();
        assert_eq!(self.fates(&self.client, SECRET), [Fate::Echoed; 2]);
        eventually("TLS on the wire", LIMIT, || wire.tls().handshakes > 0).unwrap();
        assert!(!wire.contains(SECRET), "plaintext on the wire");
        assert_eq!(wire.missed().unwrap(), 0);
        let peers = self.app.peers();
        for address in self.client.addresses() {
            let is_seen = peers.iter().any(|peer| peer.ip() == *address);
            assert!(is_seen, "{address} among {peers:?}");
        }
        let out = self.metrics(&self.a);
        assert!(out.syns("outbound", "steered", "meshed") >= 2.0);
        // Past its own pod's programs, and to the agent by those of the server's.
        assert_eq!(self.fates(&self.stranger, PLAIN), [Fate::Echoed; 2]);
        let into = self.metrics(&self.b);
        assert!(into.syns("inbound", "steered", "meshed") >= 2.0);
        let carried = [("direction", "inbound"), ("tls", "true")];
        assert!(into.sum("tcp_open_total", &carried) >= 2.0);
    }

    /// The verdict on this kernel: that it accelerates, and then messages are redirected, or that
    /// it can't, which every place says where a user would look.
    fn accelerates_or_says_why_not(&self) {
        let agent = self.bed.agent(&self.a);
        let tried = "socket acceleration was tried";
        agent.process().wait_for_log(tried, LIMIT).unwrap();
        let verdict = |verdict| {
            let name = "malla_acceleration_verdict";
            self.metrics(&self.a).sum(name, &[("verdict", verdict)]) > 0.0
        };
        let pods = |mode, reason| {
            let labels = [("mode", mode), ("reason", reason)];
            self.metrics(&self.a)
                .sum("malla_acceleration_pods", &labels)
                > 0.0
        };
        let told = self.bed.try_ask(&self.a, &["check"]).unwrap().stdout;
        if kernel::release() < kernel::ACCELERATES {
            eventually("the verdict", LIMIT, || verdict("refused")).unwrap();
            eventually("the mode", LIMIT, || pods("off", "self_test")).unwrap();
            for said in ["doesn't tell what is read", "gets `full`"] {
                assert!(told.contains(said), "{said}: {told}");
            }
            return;
        }
        eventually("the mode", LIMIT, || pods("full", "configured")).unwrap();
        assert!(!verdict("refused"), "{}", agent.log());
        assert!(told.contains("is possible on this kernel"), "{told}");
        let refuses = self.a.refuses_splices().unwrap();
        assert_eq!(refuses, kernel::asks_programs(), "{told}");
        let redirected = || {
            let labels = [("event", "redirected")];
            let name = "malla_acceleration_directions_total";
            self.metrics(&self.a).sum(name, &labels)
        };
        // Both ends must be known when the first message is sent, or it goes by TCP.
        let before = redirected();
        eventually("messages to be redirected", LIMIT, || {
            for mut stream in self.open() {
                assert_eq!(say(&mut stream, SECRET), Fate::Echoed);
            }
            redirected() > before
        })
        .unwrap();
    }

    /// What lives is reset when the client's agent is killed, and what is new is refused and unheard,
    /// until the next one has taken over what the dead one has left.
    fn is_closed_without_an_agent_and_adopted_by_the_next(&mut self) {
        if kernel::release() >= kernel::LINKS {
            let linked = || self.client.has_no_filters().unwrap();
            eventually("links in the place of filters", LIMIT, linked).unwrap();
        }
        let before = self.bpf_objects();
        let mut live = self.open();
        for stream in &mut live {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        let wire = self.bed.capture_wire(&self.a, &self.b).unwrap();
        self.bed.agent(&self.a).kill9();
        for stream in &mut live {
            // A read of an accelerated socket that the reset wakes may have to be asked again.
            eventually("a reset", LIMIT, || match say(stream, PLAIN) {
                Fate::Silence => false,
                fate => {
                    assert_eq!(fate, Fate::Reset);
                    true
                }
            })
            .unwrap();
        }
        assert_eq!(self.fates(&self.client, PLAIN), [Fate::Refused; 2]);
        assert!(!wire.contains(PLAIN), "plaintext on the wire");
        drop(wire);
        self.tell("closed");

        self.bed.start_agent(&self.a.clone()).unwrap();
        let metrics = self.metrics(&self.a);
        assert!(metrics.syns("outbound", "refused", "no_agent") >= 2.0);
        self.is_steered();
        // Taken over, and not added to.
        let adopted = || self.bpf_objects() == before;
        eventually("as many programs, maps and links as before", LIMIT, adopted)
            .unwrap_or_else(|error| panic!("{error}: {before:?}, {:?}", self.bpf_objects()));
    }

    fn bpf_objects(&self) -> BpfObjects {
        self.a.bpf_objects().unwrap()
    }

    /// What lives goes on encrypted when the client leaves the mesh, and what is new passes.
    fn withdraws(&self) {
        let mut live = self.open();
        for stream in &mut live {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        let wire = self.bed.capture_wire(&self.a, &self.b).unwrap();
        self.bed.withdraw(&self.client).unwrap();
        eventually("new connections to pass", LIMIT, || {
            self.fates(&self.client, PLAIN) == [Fate::Echoed; 2]
                && self
                    .metrics(&self.a)
                    .syns("outbound", "passed", "withdrawn")
                    >= 1.0
        })
        .unwrap();
        eventually("plaintext on the wire", LIMIT, || wire.contains(PLAIN)).unwrap();
        for stream in &mut live {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        assert!(!wire.contains(SECRET), "plaintext on the wire");
        drop(live);
        let what = "nothing of the agent to be left in the pod";
        eventually(what, LIMIT, || !is_enrolled(&self.client, &self.a)).unwrap();
    }

    /// A cleanup takes away what a killed agent leaves, and its pod is as it was.
    fn is_cleaned_up(&self) {
        self.bed.agent(&self.b).kill9();
        assert!(is_enrolled(&self.server, &self.b));
        assert_eq!(self.fates(&self.stranger, PLAIN), [Fate::Refused; 2]);
        let done = self.bed.try_ask(&self.b, &["agent", "--cleanup"]).unwrap();
        assert!(done.status.success(), "{done:?}");
        assert!(!is_enrolled(&self.server, &self.b));
        assert!(!self.b.bpffs().exists());
        // There is no agent that could carry it.
        assert_eq!(self.fates(&self.stranger, PLAIN), [Fate::Echoed; 2]);
    }
}

/// Whether an agent's rules or programs are in a pod, or its pins in its node's folder.
fn is_enrolled(pod: &Pod, node: &Node) -> bool {
    let pins = node.bpffs().join("links/default").join(pod.name());
    let says = |command: &str| pod.run(command.split(' ')).unwrap().stdout;
    let has_rules = says("ip rule").contains(RULE) || says("ip -6 rule").contains(RULE);
    let programs = says("bpftool net show");
    let has_programs = programs.contains("egress") || programs.contains("lookup");
    pins.exists() || has_rules || has_programs
}

#[test]
fn a_kernel_does_what_is_asked_of_it_from_the_first_agent_to_the_cleanup() {
    let mut world = World::new();
    world.tell("made");
    world.bed.start_agents().unwrap();
    assert!(is_enrolled(&world.client, &world.a));
    world.tell("loaded and enrolled");
    world.is_steered();
    world.tell("steered");
    world.accelerates_or_says_why_not();
    world.tell("acceleration judged");
    world.is_closed_without_an_agent_and_adopted_by_the_next();
    world.tell("adopted");
    world.withdraws();
    world.tell("withdrawn");
    world.is_cleaned_up();
    world.tell("cleaned up");
}
