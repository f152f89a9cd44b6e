//! What outlives an agent, and who takes it away: links, rules, routes, sysctls and map entries
//! belong to the pod.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use malla_testbed::{EchoApp, Fate, Metrics, Node, Pod, PodSpec, Testbed, eventually, kernel};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;
/// How many addresses the pods of a node may have.
const MAX_ADDRESSES: u16 = 4096;

/// Two meshed pods on one node, with an opt-out each, and a stranger with an echoing app.
struct Scene {
    bed: Testbed,
    node: Arc<Node>,
    stayer: Arc<Pod>,
    leaver: Arc<Pod>,
    stranger: Arc<Pod>,
    _app: EchoApp,
}

impl Scene {
    fn new(arguments: &[&str]) -> Self {
        let mut bed = Testbed::new("remains")
            .unwrap()
            .with_settings("skipOutboundPorts: [3306]")
            .with_agent_arguments(arguments.iter().copied());
        let node = bed.node("a").unwrap();
        let stayer = bed.pod(&node, PodSpec::new("stayer")).unwrap();
        let leaver = bed.pod(&node, PodSpec::new("leaver")).unwrap();
        let stranger = PodSpec::new("stranger").unmeshed();
        let stranger = bed.pod(&node, stranger).unwrap();
        let app = stranger.echo(PORT).unwrap();
        Self {
            bed,
            node,
            stayer,
            leaver,
            stranger,
            _app: app,
        }
    }

    fn call(&self, from: &Pod) -> Fate {
        let caller = from.caller().patience(Duration::from_secs(2));
        caller.call((self.stranger.v4(), PORT))
    }

    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        metrics.sum(name, labels)
    }

    fn steered(&self) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        metrics.syns("outbound", "steered", "meshed")
    }

    fn kill_agent(&self) {
        self.bed.agent(&self.node).kill9();
    }

    fn start_agent(&mut self) {
        self.bed.start_agent(&self.node.clone()).unwrap();
    }

    /// How many entries a map has.
    fn entries(&self, map: &str) -> usize {
        let path = self.node.pinned_map(map);
        let path = path.to_str().unwrap();
        let dump = self
            .node
            .run(["bpftool", "-j", "map", "dump", "pinned", path]);
        dump.unwrap().stdout.matches("\"key\":[\"").count()
    }

    /// The folder of all pins of a workload.
    fn pins(&self, pod: &Pod) -> PathBuf {
        let links = self.node.bpffs().join("links/default");
        links.join(pod.name())
    }

    /// Fills the map of addresses, or takes out what it was filled with.
    fn fill(&self, operation: &str) {
        let map = self.node.pinned_map("PODS");
        let line = |number: u16| {
            let [high, low] = number.to_be_bytes();
            let value = match operation {
                "update" => " value hex 0f 27 0 0 0 0 0 0 0 0 0 0",
                _ => "",
            };
            format!(
                "map {operation} pinned {} key hex fd 0 0 0 0 0 0 0 0 0 0 0 0 0 {high:x} {low:x}{value}\n",
                map.display()
            )
        };
        let lines: String = (0..MAX_ADDRESSES).map(line).collect();
        let batch = ["bpftool", "batch", "file", "-"];
        let _ = self.node.command(batch).input(lines).output().unwrap();
    }

    /// Kills the agent and sees to it that the next one can't pin all that it attaches in the
    /// leaver. Returns what is in the way.
    fn obstruct(&self) -> PathBuf {
        self.kill_agent();
        let mut folders = fs::read_dir(self.pins(&self.leaver)).unwrap();
        let pin = folders.next().unwrap().unwrap().path().join("lookup");
        fs::remove_file(&pin).unwrap();
        fs::create_dir(&pin).unwrap();
        pin
    }
}

/// All that the agent has set up in a pod's netns: programs, rules, routes, a sysctl.
fn set_up_in(pod: &Pod) -> String {
    let says = |command: &[&str]| pod.command(command).output().unwrap().stdout;
    let programs = says(&["bpftool", "net", "show"]);
    let mut found: Vec<String> = programs
        .lines()
        .filter(|line| line.contains("egress") || line.contains("ingress"))
        .map(str::to_owned)
        .collect();
    for family in ["-4", "-6"] {
        let rules = says(&["ip", family, "rule"]);
        found.extend(
            rules
                .lines()
                .filter(|l| l.contains("133"))
                .map(str::to_owned),
        );
        let routes = says(&["ip", family, "route", "show", "table", "133"]);
        found.extend(routes.lines().map(str::to_owned));
    }
    if accept_local(pod) {
        found.push("accept_local".to_owned());
    }
    found.join("\n")
}

fn accept_local(pod: &Pod) -> bool {
    let read = || fs::read_to_string("/proc/sys/net/ipv4/conf/lo/accept_local");
    pod.enter(|| read().unwrap()).trim() == "1"
}

#[test]
fn a_pod_that_left_while_no_agent_lived_gets_its_plain_networking_back() {
    let mut scene = Scene::new(&[]);
    scene.bed.start_agents().unwrap();
    assert!(!set_up_in(&scene.leaver).is_empty());
    let (pods, rules) = (scene.entries("PODS"), scene.entries("PORT_RULES"));
    scene.kill_agent();
    assert_eq!(scene.call(&scene.leaver), Fate::Refused);
    // The bed writes its own file before it starts an agent.
    scene.start_agent();
    scene.kill_agent();
    scene.bed.withdraw(&scene.leaver).unwrap();
    let command = scene.bed.agent_command(&scene.node).unwrap();
    let agent = command.spawn().unwrap();
    agent.wait_for_log("enrolled", LIMIT).unwrap();
    assert_eq!(set_up_in(&scene.leaver), "");
    assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
    assert!(!scene.pins(&scene.leaver).exists());
    assert_eq!(scene.entries("PODS") * 2, pods);
    assert_eq!(scene.entries("PORT_RULES") * 2, rules);
}

#[test]
fn of_a_pod_whose_netns_is_gone_nothing_is_left() {
    let mut scene = Scene::new(&[]);
    scene.bed.start_agents().unwrap();
    let (pods, rules) = (scene.entries("PODS"), scene.entries("PORT_RULES"));
    scene.kill_agent();
    let leaver = Arc::clone(&scene.leaver);
    scene.bed.remove_pod(&leaver).unwrap();
    scene.start_agent();
    assert!(!scene.pins(&leaver).exists());
    assert_eq!(scene.entries("PODS") * 2, pods);
    assert_eq!(scene.entries("PORT_RULES") * 2, rules);
}

#[test]
fn an_enrolment_that_fails_leaves_nothing_and_is_tried_again() {
    let scene = Scene::new(&[]);
    scene.bed.withdraw(&scene.leaver).unwrap();
    let command = scene.bed.agent_command(&scene.node).unwrap();
    let agent = command.spawn().unwrap();
    // The audit takes out what no pod owns, the next time after 5 s.
    eventually("the first audit", LIMIT, || {
        let metrics = scene.node.get("/metrics");
        metrics.is_ok_and(|said| {
            let metrics = Metrics::parse(&said.body);
            metrics.sum("malla_audit_last_timestamp_seconds", &[]) > 0.0
        })
    })
    .unwrap();
    scene.fill("update");
    scene.bed.write_mesh().unwrap();
    agent.wait_for_log("can't use the map PODS", LIMIT).unwrap();
    eventually("nothing to be left of an attempt", LIMIT, || {
        !scene.pins(&scene.leaver).exists()
            && set_up_in(&scene.leaver).is_empty()
            && scene.entries("PORT_RULES") == 1
    })
    .unwrap();
    assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
    scene.fill("delete");
    agent
        .wait_for_log("enrolled\tworkload=default/leaver", LIMIT)
        .unwrap();
    agent.kill9();
    assert_eq!(scene.call(&scene.leaver), Fate::Refused);
}

#[test]
fn a_closed_pod_whose_enrolment_fails_stays_closed_until_it_succeeds() {
    let mut scene = Scene::new(&[]);
    scene.bed.start_agents().unwrap();
    let obstacle = scene.obstruct();
    scene.start_agent();
    let failures = [("reason", "programs")];
    assert!(scene.metric("malla_enrolment_errors_total", &failures) >= 1.0);
    for _ in 0..20 {
        let fate = scene.call(&scene.leaver);
        let closed = matches!(fate, Fate::Refused | Fate::Reset);
        assert!(closed, "{fate:?}");
    }
    fs::remove_dir(obstacle).unwrap();
    let calls = || scene.call(&scene.leaver) == Fate::Echoed;
    eventually("the pod to be served again", LIMIT, calls).unwrap();
    assert_eq!(scene.metric("malla_pods_enrolled", &[]).to_string(), "2");
}

#[test]
fn a_closed_pod_whose_enrolment_fails_is_opened_by_its_withdrawal() {
    let mut scene = Scene::new(&[]);
    scene.bed.start_agents().unwrap();
    let pods = scene.entries("PODS");
    let _ = scene.obstruct();
    scene.start_agent();
    scene.bed.withdraw(&scene.leaver).unwrap();
    eventually("plain networking", LIMIT, || {
        set_up_in(&scene.leaver).is_empty() && scene.call(&scene.leaver) == Fate::Echoed
    })
    .unwrap();
    assert!(!scene.pins(&scene.leaver).exists());
    assert_eq!(scene.entries("PODS") * 2, pods);
}

#[test]
fn a_withdrawn_pods_sysctl_is_what_it_was() {
    let mut scene = Scene::new(&[]);
    let set = [("ipv4/conf/lo/accept_local", "1")];
    scene.leaver.netns().sysctls(&set).unwrap();
    scene.bed.start_agents().unwrap();
    scene.kill_agent();
    // The agent that withdraws isn't the one that found it set.
    scene.start_agent();
    scene.bed.withdraw(&scene.leaver).unwrap();
    eventually("plain networking", LIMIT, || {
        set_up_in(&scene.leaver) == "accept_local"
    })
    .unwrap();
}

#[test]
fn opt_outs_of_an_earlier_agent_are_replaced() {
    let mut scene = Scene::new(&[]);
    let skip = format!("skipOutboundPorts: [{PORT}, 4000-4010]");
    scene.bed.change_mesh_settings(skip).unwrap();
    scene.bed.start_agents().unwrap();
    assert!(scene.entries("PORT_RULES") > 2);
    let before = scene.steered();
    assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
    assert!(scene.steered() < before + 0.5);
    scene.kill_agent();
    let skip = "skipOutboundPorts: [3306]";
    scene.bed.change_mesh_settings(skip).unwrap();
    scene.start_agent();
    assert_eq!(scene.entries("PORT_RULES"), 2);
    let before = scene.steered();
    assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
    assert!(scene.steered() > before);
}

fn tc(pod: &Pod, arguments: &str) -> String {
    let words = ["tc"].into_iter().chain(arguments.split(' '));
    pod.run(words).unwrap().stdout
}

/// The agent's filters on an interface.
fn filters(pod: &Pod) -> usize {
    let shown = ["ingress", "egress"].map(|hook| {
        let shown = tc(pod, &format!("filter show dev eth0 {hook}"));
        shown.matches("direct-action").count()
    });
    shown.iter().sum()
}

#[test]
fn without_links_programs_are_filters_that_a_restart_replaces_and_a_withdrawal_detaches() {
    let mut scene = Scene::new(&["--tc-filters"]);
    // A qdisc of somebody else's, with a filter of his.
    tc(&scene.stayer, "qdisc add dev eth0 clsact");
    let foreign = "filter add dev eth0 ingress pref 7 protocol ip u32 match u32 0 0 flowid 1:1";
    tc(&scene.stayer, foreign);
    scene.bed.start_agents().unwrap();
    for _ in 0..2 {
        for pod in [&scene.stayer, &scene.leaver] {
            assert_eq!(filters(pod), 2);
            let before = scene.steered();
            assert_eq!(scene.call(pod), Fate::Echoed);
            assert!(scene.steered() > before);
        }
        scene.kill_agent();
        assert_eq!(scene.call(&scene.leaver), Fate::Refused);
        scene.start_agent();
    }
    let without = scene
        .bed
        .mesh_yaml()
        .replace("mesh: enabled", "mesh: disabled");
    scene.bed.write_mesh_text(&without).unwrap();
    for pod in [&scene.stayer, &scene.leaver] {
        eventually("plain networking", LIMIT, || {
            set_up_in(pod).is_empty() && scene.call(pod) == Fate::Echoed
        })
        .unwrap();
        assert_eq!(filters(pod), 0);
    }
    assert!(!tc(&scene.leaver, "qdisc show").contains("clsact"));
    assert!(tc(&scene.stayer, "filter show dev eth0 ingress").contains("u32"));
}

#[test]
fn links_and_filters_take_each_others_place() {
    if kernel::release() < kernel::LINKS {
        // There are only filters, as in the test before this one.
        return;
    }
    let mut scene = Scene::new(&[]);
    scene.bed.start_agents().unwrap();
    assert_eq!(filters(&scene.leaver), 2);
    eventually("links in the place of filters", LIMIT, || {
        let before = scene.steered();
        assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
        assert!(scene.steered() > before, "went past the agent");
        filters(&scene.leaver) == 0
    })
    .unwrap();
    let links = set_up_in(&scene.leaver);
    scene.kill_agent();
    assert_eq!(scene.call(&scene.leaver), Fate::Refused);
    scene.bed = scene.bed.with_agent_arguments(["--tc-filters"]);
    scene.start_agent();
    assert_eq!(filters(&scene.leaver), 2);
    assert_ne!(set_up_in(&scene.leaver), links);
    assert_eq!(scene.call(&scene.leaver), Fate::Echoed);
    scene.bed.withdraw(&scene.leaver).unwrap();
    eventually("plain networking", LIMIT, || {
        set_up_in(&scene.leaver).is_empty()
    })
    .unwrap();
    assert!(!tc(&scene.leaver, "qdisc show").contains("clsact"));
}
