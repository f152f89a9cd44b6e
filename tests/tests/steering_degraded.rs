//! Pods and agents that can't be served as they should be say so: what a user reads of it, and
//! what goes on all the same.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use malla_testbed::{EchoApp, Fate, Node, Pod, PodSpec, Process, Testbed, eventually, until};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;
const MESH_PORT: u16 = 15008;

/// A meshed client and server with an echoing app, on one node.
struct Scene {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    _app: EchoApp,
}

impl Scene {
    fn new() -> Self {
        let mut bed = Testbed::new("degraded").unwrap();
        let node = bed.node("a").unwrap();
        let client = bed.pod(&node, PodSpec::new("client")).unwrap();
        let server = bed.pod(&node, PodSpec::new("server").port(PORT)).unwrap();
        let app = server.echo(PORT).unwrap();
        Self {
            bed,
            node,
            client,
            server,
            _app: app,
        }
    }

    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        metrics.sum(name, labels)
    }

    fn wait_degraded(&self, reason: &str, pods: f64) {
        let what = format!("{pods} pods to be degraded: {reason}");
        eventually(&what, LIMIT, || {
            let degraded = self.sum("malla_pods_degraded", &[("reason", reason)]);
            (degraded - pods).abs() < 0.5
        })
        .unwrap();
    }

    fn log_says(&self, text: &str) {
        let agent = self.bed.agent(&self.node).process();
        agent.wait_for_log(text, LIMIT).unwrap();
    }

    fn call(&self, from: &Pod) -> Fate {
        from.caller().call((self.server.v4(), PORT))
    }

    /// How many connections came through tunnels.
    fn through_tunnels(&self) -> f64 {
        let labels = [("direction", "inbound"), ("tls", "true")];
        self.sum("tcp_open_total", &labels)
    }
}

#[test]
fn a_pod_whose_app_has_the_mesh_port_is_meshed_and_degraded_until_the_port_is_free() {
    let mut scene = Scene::new();
    let app = scene.server.echo(MESH_PORT).unwrap();
    scene.bed.start_agents().unwrap();
    scene.wait_degraded("mesh_port", 1.0);
    scene.log_says("a pod is degraded\tworkload=default/server reason=\"mesh_port\"");
    let before = scene.through_tunnels();
    assert_eq!(scene.call(&scene.client), Fate::Echoed);
    assert!(scene.through_tunnels() > before);
    // From outside, the port is the agent's.
    let caller = scene.client.caller();
    assert_ne!(caller.call((scene.server.v4(), MESH_PORT)), Fate::Echoed);
    assert_eq!(app.accepted(), 0);
    let own = scene.server.caller();
    assert_eq!(own.call((scene.server.v4(), MESH_PORT)), Fate::Echoed);
    drop(app);
    scene.wait_degraded("mesh_port", 0.0);
    scene.log_says("a pod is no longer degraded");
    assert_eq!(scene.call(&scene.client), Fate::Echoed);
}

/// Makes an interface of a kind that the agent doesn't know, which can't be steered.
fn strange_interface(pod: &Pod) -> Process {
    // A TUN interface, whose kind of link is made that of X.25.
    const MAKE: &str = "import fcntl, os, struct, time\n\
        tun = os.open('/dev/net/tun', os.O_RDWR)\n\
        fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH', b'odd0', 0x1001))\n\
        fcntl.ioctl(tun, 0x400454cd, 271)\n\
        print('made', flush=True)\n\
        time.sleep(600)\n";
    let process = pod.spawn(["python3", "-c", MAKE]).unwrap();
    process.wait_for_log("made", LIMIT).unwrap();
    process
}

fn is_up(pod: &Pod, interface: &str) -> bool {
    let shown = pod.run(["ip", "link", "show", interface]).unwrap().stdout;
    shown.contains(",UP") || shown.contains("<UP")
}

#[test]
fn an_interface_that_cannot_be_steered_is_set_down_whenever_it_is_set_up() {
    let mut scene = Scene::new();
    scene.bed.start_agents().unwrap();
    let _tun = strange_interface(&scene.client);
    for _ in 0..3 {
        scene.client.netns().ip("link set odd0 up\n").unwrap();
        let down = || !is_up(&scene.client, "odd0");
        eventually("the interface to be down", LIMIT, down).unwrap();
    }
    scene.wait_degraded("interface_refused", 1.0);
    assert_eq!(scene.call(&scene.client), Fate::Echoed);
}

#[test]
fn an_interface_that_cannot_be_steered_is_left_where_that_is_allowed() {
    let mut scene = Scene::new();
    let client = Arc::clone(&scene.client);
    scene
        .bed
        .change_settings(&client, "interfaces: allow")
        .unwrap();
    scene.bed.start_agents().unwrap();
    let tun = strange_interface(&scene.client);
    scene.client.netns().ip("link set odd0 up\n").unwrap();
    scene.wait_degraded("interface_unsteered", 1.0);
    scene.log_says("reason=\"interface_unsteered\"");
    assert!(is_up(&scene.client, "odd0"));
    drop(tun);
    scene.wait_degraded("interface_unsteered", 0.0);
}

#[test]
fn an_agent_outside_its_cgroup_is_unready_until_it_is_back() {
    let mut scene = Scene::new();
    scene.bed.start_agents().unwrap();
    let pid = scene.bed.agent(&scene.node).process().pid();
    let ready = |wanted: u16, says: &str| {
        eventually("/ready to change", LIMIT, || {
            let answer = scene.node.get("/ready").unwrap();
            answer.status == wanted && answer.body.contains(says)
        })
        .unwrap();
    };
    let move_to = |cgroup: PathBuf| {
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
    };
    move_to(scene.client.cgroup().to_owned());
    ready(503, "cgroup");
    assert!(scene.sum("malla_agent_cgroup_left", &[]) > 0.5);
    scene.log_says("a cgroup that isn't its own");
    move_to(scene.node.cgroup().join(format!("malla-agent-{pid}-0")));
    ready(200, "ready");
    assert!(scene.sum("malla_agent_cgroup_left", &[]) < 0.5);
    assert_eq!(scene.call(&scene.client), Fate::Echoed);
}

#[test]
fn an_address_that_two_pods_hold_stays_its_first_owners() {
    let mut scene = Scene::new();
    scene.bed.start_agents().unwrap();
    let (client, server) = (&scene.client, &scene.server);
    let map = scene.node.pinned_map("PODS");
    let ask = |words: &[&str]| {
        let command = [
            "bpftool",
            "-j",
            "map",
            words[0],
            "pinned",
            map.to_str().unwrap(),
        ];
        let command = command.iter().chain(&words[1..]);
        scene.node.run(command).unwrap().stdout
    };
    let known = || ask(&["dump"]).matches("\"key\":[\"").count();
    let address = client.v4().octets().map(|byte| byte.to_string());
    let owner = || {
        let [a, b, c, d] = &address;
        let mapped = ["0"; 10].into_iter().chain(["255", "255", a, b, c, d]);
        let words: Vec<&str> = ["lookup", "key"].into_iter().chain(mapped).collect();
        ask(&words)
    };
    let (first, before) = (owner(), known());
    let quiet = [("ipv4/conf/all/arp_ignore", "1")];
    server.netns().sysctls(&quiet).unwrap();
    // The second address shows that the agent has seen both.
    for (change, more) in [("add", 1), ("del", 0)] {
        let lines = format!(
            "addr {change} {}/32 dev lo\naddr {change} 198.18.0.1/32 dev lo\n",
            client.v4()
        );
        server.netns().ip(&lines).unwrap();
        let followed = || known() == before + more;
        eventually("the agent to follow", LIMIT, followed).unwrap();
        assert_eq!(owner(), first);
        let answered = client.caller().call((server.v6(), PORT));
        assert_eq!(answered, Fate::Echoed);
    }
    assert_eq!(scene.call(client), Fate::Echoed);
}

/// The time from the moment an interface is there until its programs are attached. README has
/// what it was when it was measured.
#[test]
fn a_new_interface_is_steered_within_the_documented_time() {
    const GAP: Duration = Duration::from_secs(1);
    let mut scene = Scene::new();
    scene.bed.start_agents().unwrap();
    let links = scene.node.bpffs().join("links/default/client");
    let pins = fs::read_dir(links).unwrap().next().unwrap().unwrap().path();
    let programs = || {
        let pins = fs::read_dir(&pins).unwrap().flatten();
        let names = pins.map(|pin| pin.file_name().into_string().unwrap());
        names.filter(|name| name.ends_with("gress")).count()
    };
    let before = programs();
    let mut gaps = Vec::new();
    for number in 1..=20 {
        let line = format!("link add new{number} type veth peer name peer{number}\n");
        let asked = Instant::now();
        scene.client.netns().ip(&line).unwrap();
        let made = Instant::now();
        // Two ends with two programs each.
        until("the programs to be attached", LIMIT, || {
            (programs() == before + 4 * number).then_some(())
        })
        .unwrap();
        assert!(made.elapsed() < GAP, "{:?}", made.elapsed());
        gaps.push((made.elapsed(), asked.elapsed()));
    }
    gaps.sort_unstable();
    let (median, most) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!("from `ip`'s end, and from its start: median {median:?}, most {most:?}");
}
