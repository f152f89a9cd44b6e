//! `malla agent --cleanup`: what agents leave on purpose goes, and pods are as they were before.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use malla_testbed::{EchoApp, Fate, Node, Output, Pod, PodSpec, Testbed, binary, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;

/// Two meshed pods on one node, and a stranger with an echoing app.
struct Scene {
    bed: Testbed,
    node: Arc<Node>,
    pods: Vec<Arc<Pod>>,
    stranger: Arc<Pod>,
    _app: EchoApp,
}

impl Scene {
    fn new() -> Self {
        let mut bed = Testbed::new("cleanup")
            .unwrap()
            .with_settings("skipOutboundPorts: [3306]");
        let node = bed.node("a").unwrap();
        let specs = [
            PodSpec::new("one").second_interface(),
            PodSpec::new("two").ipv4_only(),
        ];
        let pods = bed.pods(&node, specs).unwrap();
        let stranger = bed.pod(&node, PodSpec::new("stranger").unmeshed()).unwrap();
        let app = stranger.echo(PORT).unwrap();
        Self {
            bed,
            node,
            pods,
            stranger,
            _app: app,
        }
    }

    fn call(&self, from: &Pod) -> Fate {
        let caller = from.caller().patience(Duration::from_secs(2));
        caller.call((self.stranger.v4(), PORT))
    }

    fn cleanup(&self, arguments: &[&str]) -> Output {
        let malla = binary("malla").unwrap();
        let command = [malla.to_str().unwrap(), "agent", "--cleanup"];
        let command = self.node.command(command.iter().chain(arguments));
        command.output().unwrap()
    }

    /// The cleanup as it is meant to be called.
    fn cleanup_as_configured(&self) -> Output {
        let path = self.bed.mesh_path();
        self.cleanup(&["--config", path.to_str().unwrap(), "--node", "a"])
    }

    fn agents_cgroups(&self) -> usize {
        let entries = fs::read_dir(self.node.cgroup()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name());
        names
            .filter(|name| name.to_string_lossy().starts_with("malla-agent-"))
            .count()
    }

    /// Everything of each pod that an agent may have a hand in.
    fn networks(&self) -> Vec<String> {
        let network = |pod: &Arc<Pod>| {
            let commands = [
                "ip -d -4 rule",
                "ip -d -6 rule",
                "ip -d -4 route show table all",
                "ip -d -6 route show table all",
                "ip -d link",
                "bpftool net show",
                "tc qdisc show",
                "tc filter show dev lo ingress",
                "tc filter show dev eth0 ingress",
                "tc filter show dev eth0 egress",
                "ss -Hltn",
            ];
            let says = commands.map(|command| pod.run(command.split(' ')).unwrap().stdout);
            says.join("\n") + &pod.enter(sysctls)
        };
        self.pods.iter().map(network).collect()
    }

    /// That nothing of an agent is anywhere, and pods talk plain.
    fn assert_clean(&self, before: &[String]) {
        assert!(!self.node.bpffs().exists());
        assert_eq!(self.agents_cgroups(), 0);
        for (now, before) in self.networks().iter().zip(before) {
            assert_eq!(now, before);
        }
        for pod in &self.pods {
            // No agent lives that could have carried it.
            assert_eq!(self.call(pod), Fate::Echoed);
        }
    }
}

/// What is set for the interfaces of the calling thread's netns.
fn sysctls() -> String {
    let folders = ["ipv4", "ipv6"].map(|family| format!("/proc/sys/net/{family}/conf"));
    let folders = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    let files = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    let line = |path: PathBuf| {
        // Some can't be read, before and after.
        let value = fs::read_to_string(&path).unwrap_or_default();
        format!("{}={value}", path.display())
    };
    let mut lines: Vec<String> = files.map(|file| line(file.unwrap().path())).collect();
    lines.sort();
    lines.concat()
}

#[test]
fn a_cleanup_after_a_kill_leaves_pods_as_they_were_before_their_enrolment() {
    // With filters still in place, and with links.
    for has_links in [false, true] {
        let mut scene = Scene::new();
        let before = scene.networks();
        scene.bed.start_agents().unwrap();
        if has_links {
            eventually("links", LIMIT, || {
                let mut pods = scene.pods.iter();
                pods.all(|pod| pod.has_no_filters().unwrap())
            })
            .unwrap();
        }
        scene.bed.agent(&scene.node).kill9();
        assert_ne!(scene.networks(), before);
        assert_eq!(scene.call(&scene.pods[0]), Fate::Refused);
        let output = scene.cleanup_as_configured();
        assert!(output.status.success(), "{output:?}");
        for said in [
            "node a of",
            "pod default/one",
            "pod default/two",
            "maps",
            "cgroup",
        ] {
            assert!(output.stdout.contains(said), "{said}: {output:?}");
        }
        scene.assert_clean(&before);
        let again = scene.cleanup_as_configured();
        assert!(again.status.success(), "{again:?}");
        assert!(again.stdout.ends_with("\nnothing to remove\n"), "{again:?}");
        // What was removed can be had again.
        scene.bed.start_agent(&scene.node.clone()).unwrap();
        assert_eq!(scene.call(&scene.pods[0]), Fate::Echoed);
    }
}

#[test]
fn a_cleanup_is_refused_while_an_agent_lives() {
    let mut scene = Scene::new();
    scene.bed.start_agents().unwrap();
    let agent = scene.bed.agent(&scene.node);
    let bpffs = scene.node.bpffs().to_str().unwrap();
    let outputs = [
        scene.cleanup_as_configured(),
        scene.cleanup(&["--bpffs", bpffs]),
    ];
    for output in outputs {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let pid = agent.process().pid().to_string();
        for said in ["an agent of this node lives", &pid, "end it first"] {
            assert!(output.stderr.contains(said), "{said}: {output:?}");
        }
    }
    assert_eq!(scene.call(&scene.pods[0]), Fate::Echoed);
    assert!(agent.is_running());
}

#[test]
fn without_a_good_file_a_cleanup_says_what_it_has_chosen() {
    for break_file in [true, false] {
        let mut scene = Scene::new();
        let before = scene.networks();
        scene.bed.start_agents().unwrap();
        scene.bed.agent(&scene.node).stop().unwrap();
        let path = scene.bed.mesh_path();
        let (arguments, said): (Vec<&str>, _) = if break_file {
            let text = scene.bed.mesh_yaml() + "unknown: field\n";
            scene.bed.write_mesh_text(&text).unwrap();
            let path = path.to_str().unwrap();
            (vec!["--config", path, "--node", "a"], "which is bad")
        } else {
            let bpffs = scene.node.bpffs().to_str().unwrap();
            let arguments = vec!["--config", "/no/such/file", "--node", "a", "--bpffs", bpffs];
            (arguments, "--bpffs says so")
        };
        let output = scene.cleanup(&arguments);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.contains(said), "{output:?}");
        scene.assert_clean(&before);
    }
}

#[test]
fn a_cleanup_finds_a_pod_whose_name_is_gone_and_leaves_what_no_agent_has_made() {
    let mut scene = Scene::new();
    let before = scene.networks();
    scene.bed.start_agents().unwrap();
    scene.bed.agent(&scene.node).kill9();
    // The pods live on in their processes.
    let sleep = |pod: &Arc<Pod>| pod.spawn(["sleep", "1000"]).unwrap();
    let processes: Vec<_> = scene.pods.iter().map(sleep).collect();
    for pod in &scene.pods {
        umount2(pod.netns().path(), MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(pod.netns().path()).unwrap();
    }
    let foreign = scene.node.bpffs().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let output = scene.cleanup_as_configured();
    assert!(output.status.success(), "{output:?}");
    for said in [
        "of pod default/one",
        "of pod default/two",
        "foreign, which no agent has made",
    ] {
        assert!(output.stdout.contains(said), "{said}: {output:?}");
    }
    for (pod, process) in scene.pods.iter().zip(&processes) {
        fs::File::create(pod.netns().path()).unwrap();
        let netns = format!("/proc/{}/ns/net", process.pid());
        let (none, bind) = (None::<&str>, MsFlags::MS_BIND);
        mount(Some(&*netns), pod.netns().path(), none, bind, none).unwrap();
    }
    fs::remove_dir(foreign).unwrap();
    fs::remove_dir(scene.node.bpffs()).unwrap();
    scene.assert_clean(&before);
}
