//! Faults in what an agent is told: its mesh file, the netns paths in it, its authority.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{Read, Write},
    sync::Arc,
    time::Duration,
};

use malla_testbed::{App, Node, Pod, PodSpec, Testbed, eventually, hbone};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;

/// A meshed client and server on one node, and a client without an identity.
struct World {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    plain: Arc<Pod>,
    _app: App<()>,
}

impl World {
    fn without_agent(name: &str) -> Self {
        let mut bed = Testbed::new(name).unwrap();
        let node = bed.node("a").unwrap();
        let client = bed.pod(&node, PodSpec::new("client")).unwrap();
        let server = bed.pod(&node, PodSpec::new("server").account("server"));
        let server = server.unwrap();
        let plain = bed.pod(&node, PodSpec::new("plain").unmeshed()).unwrap();
        let app = App::start(&server, PORT, usize::MAX, |mut stream| {
            // Fails where the client is refused meanwhile, which the client notices.
            let _ = stream.write_all(b"served");
        });
        Self {
            bed,
            node,
            client,
            server,
            plain,
            _app: app.unwrap(),
        }
    }

    fn new(name: &str) -> Self {
        let mut world = Self::without_agent(name);
        world.bed.start_agents().unwrap();
        world
    }

    /// Whether the server's app answers a client.
    fn is_served(&self, client: &Pod) -> bool {
        let connected = client.connect((self.server.v4(), PORT));
        connected.is_ok_and(|mut stream| stream.read_exact(&mut [0; 6]).is_ok())
    }

    fn reloads(&self, result: &str) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        metrics.sum("malla_discovery_reloads_total", &[("result", result)])
    }

    /// Waits for a text in what the agent has logged after its first `from` bytes.
    fn agent_logs(&self, from: usize, text: &str) {
        let agent = self.bed.agent(&self.node);
        let what = format!("`{text}` in the agent's log");
        let logs = || agent.log()[from..].contains(text);
        eventually(&what, LIMIT, logs).unwrap();
    }

    fn log_length(&self) -> usize {
        self.bed.agent(&self.node).log().len()
    }
}

/// The number of the first line that contains `text`.
fn line_of(file: &str, text: &str) -> usize {
    file.lines().position(|line| line.contains(text)).unwrap() + 1
}

#[test]
fn a_bad_mesh_file_changes_nothing_and_says_what_is_wrong_where() {
    let world = World::new("bad-file");
    let good = world.bed.mesh_yaml();
    let (client, server) = (world.client.v4(), world.server.v4());
    // Everything bad comes with a change that is good by itself.
    let strict = good.replace("nodes:\n", "settings:\n  mtls: strict\nnodes:\n");
    let broken = strict.replace("- name: plain\n", "- name: [plain\n");
    let unknown = strict.replace("- name: plain\n", "- name: plain\n  adresses: []\n");
    let twice = strict.replace(&format!("\"{server}\""), &format!("\"{client}\""));
    let no_account = strict.replace(
        "  serviceAccount: server\n",
        "  serviceAccount: \"no one\"\n",
    );
    for (file, line, says) in [
        (&broken, None, ""),
        (&unknown, Some(line_of(&unknown, "adresses")), "adresses"),
        (
            &twice,
            Some(line_of(&twice, "name: server") + 5),
            "workloads[1].addresses[0]: ",
        ),
        (
            &no_account,
            Some(line_of(&no_account, "no one")),
            "workloads[1].serviceAccount: ",
        ),
        (&String::new(), None, ""),
    ] {
        let (before, log) = (world.reloads("error"), world.log_length());
        world.bed.write_mesh_text(file).unwrap();
        let refused = || world.reloads("error") > before;
        eventually("a file to be refused", LIMIT, refused).unwrap();
        world.agent_logs(log, "the last good state stays in force");
        let place = line.map_or("mesh.yaml:".to_owned(), |line| format!("mesh.yaml:{line}:"));
        world.agent_logs(log, &place);
        world.agent_logs(log, says);
        assert!(
            world.is_served(&world.plain),
            "a bad file is in force:\n{file}"
        );
        assert!(world.is_served(&world.client));
    }
    world.bed.write_mesh_text(&strict).unwrap();
    let refused = || !world.is_served(&world.plain);
    eventually("the good file to be in force", LIMIT, refused).unwrap();
    assert!(world.is_served(&world.client));
}

#[test]
fn a_pod_with_a_wrong_netns_is_refused_alone_and_by_name() {
    let mut world = World::new("bad-netns");
    let bad = world.bed.pod(&world.node, PodSpec::new("bad")).unwrap();
    world.agent_logs(0, "workload=default/bad");
    let (path, folder) = (bad.netns().path(), world.bed.folder());
    let no_netns = folder.join("not-a-netns");
    fs::write(&no_netns, "").unwrap();
    let fifo = folder.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The host's, which is that of this test.
    let own = |kind: &str| format!("/proc/{}/ns/{kind}", std::process::id());
    let good = world.bed.mesh_yaml();
    for (wrong, says) in [
        (folder.join("nothing"), "No such file"),
        (no_netns, "not a network namespace"),
        (folder.to_owned(), "not a network namespace"),
        (fifo, "not a network namespace"),
        (own("mnt").into(), "not a network namespace"),
        (world.node.netns().path().to_owned(), "the agent's own"),
        (own("net").into(), "isn't in its netns"),
    ] {
        let log = world.log_length();
        let (right, wrong) = (path.display().to_string(), wrong.display().to_string());
        world
            .bed
            .write_mesh_text(&good.replace(&right, &wrong))
            .unwrap();
        world.agent_logs(log, "can't enrol a workload");
        world.agent_logs(log, says);
        assert!(world.is_served(&world.client), "{wrong}");
    }
    let log = world.log_length();
    world.bed.write_mesh().unwrap();
    world.agent_logs(log, "enrolled\tworkload=default/bad");
    assert!(world.is_served(&bad));
    let metrics = world.bed.agent(&world.node).metrics().unwrap();
    assert!(metrics.sum("malla_enrolment_errors_total", &[]) >= 7.0);
}

#[test]
fn an_expired_trust_anchor_is_named_and_a_new_one_is_taken_without_a_restart() {
    let mut world = World::without_agent("bad-anchor");
    hbone::write_anchor(&world.bed, 7200, 3600).unwrap();
    world.bed.start_agents().unwrap();
    world.agent_logs(0, "trust anchor in");
    world.agent_logs(0, "expired at");
    assert!(!world.is_served(&world.client));
    world.agent_logs(0, "error=\"no_identity\"");
    assert!(
        world.is_served(&world.plain),
        "plaintext needs no certificate"
    );

    hbone::write_anchor(&world.bed, 60, -3600).unwrap();
    let served = || world.is_served(&world.client);
    eventually("the new anchor to be in use", LIMIT, served).unwrap();
}
