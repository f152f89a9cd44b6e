//! What the agent says when it can't steer, and what its programs say of each decision.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use malla_testbed::{Fate, Output, PORT, PodSpec, Testbed, binary, eventually, kernel};

const LIMIT: Duration = Duration::from_secs(10);

/// Starts the agent of a node whose configuration differs in one line, by `wrapper` if there is
/// one, and returns how it ended.
fn start(change: impl Fn(&Testbed, String) -> String, wrapper: &[&str]) -> Output {
    let mut bed = Testbed::new("start").unwrap();
    let node = bed.node("a").unwrap();
    bed.pod(&node, PodSpec::new("pod")).unwrap();
    bed.write_mesh_text(&change(&bed, bed.mesh_yaml())).unwrap();
    let (malla, config) = (binary("malla").unwrap(), bed.mesh_path());
    let agent = [malla.to_str().unwrap(), "agent", "--node", "a", "--config"];
    let command = wrapper.iter().copied().chain(agent);
    let command = command.map(PathBuf::from).chain([config]);
    node.command(command).limit(LIMIT).output().unwrap()
}

/// Replaces the value of a field of the file's first node.
fn with(field: &str, value: &Path) -> impl Fn(&Testbed, String) -> String {
    let (field, value) = (format!("  {field}: "), value.display().to_string());
    move |_, text| {
        let (head, tail) = text.split_once(&field).unwrap();
        let (_, rest) = tail.split_once('\n').unwrap();
        format!("{head}{field}{value}\n{rest}")
    }
}

/// One message of one line that has all of `parts`, and a status that isn't 0.
fn assert_says(output: &Output, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = output.stderr.trim_end();
    assert!(
        said.starts_with("malla: ") && said.lines().count() == 1,
        "{output:?}"
    );
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    assert!(!output.stdout.contains("error"), "{}", output.stdout);
}

/// Where the machine's cgroup v2 hierarchy is mounted.
fn cgroup_root() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts
        .lines()
        .find(|line| line.contains(" cgroup2 "))
        .unwrap();
    mount.split(' ').nth(1).unwrap().into()
}

#[test]
fn without_a_capability_the_agent_names_it_and_the_fix() {
    for (capability, name) in [
        ("bpf", "CAP_BPF"),
        ("net_admin", "CAP_NET_ADMIN"),
        ("net_raw", "CAP_NET_RAW"),
        ("sys_admin", "CAP_SYS_ADMIN"),
    ] {
        let without = format!("-{capability}");
        let wrapper = ["setpriv", "--bounding-set", &without];
        let output = start(|_, text| text, &wrapper);
        assert_says(&output, &[name, "run it as root, or grant the container"]);
    }
}

#[test]
fn the_root_cgroup_is_refused() {
    let output = start(with("cgroup", &cgroup_root()), &[]);
    assert_says(
        &output,
        &["root of the cgroup hierarchy", "`cgroup`", "below it"],
    );
}

#[test]
fn a_folder_that_is_no_cgroup_is_refused() {
    let output = start(with("cgroup", Path::new("/run")), &[]);
    assert_says(
        &output,
        &["/run is not on a cgroup v2", "mount cgroup2", "`cgroup`"],
    );
    let output = start(with("cgroup", Path::new("/run/no/such/folder")), &[]);
    assert_says(&output, &["/run/no/such/folder"]);
}

#[test]
fn a_folder_that_is_on_no_bpffs_is_refused() {
    let output = start(with("bpffs", Path::new("/run/malla-no-bpffs/a")), &[]);
    assert_says(
        &output,
        &["/run/malla-no-bpffs/a is not on a bpffs", "mount -t bpf"],
    );
    assert!(!Path::new("/run/malla-no-bpffs").exists());
}

#[test]
fn a_node_that_the_file_lacks_is_named() {
    let rename = |_: &Testbed, text: String| text.replace("name: a\n", "name: other\n");
    let output = start(
        move |bed, text| rename(bed, text).replace("node: a\n", "node: other\n"),
        &[],
    );
    assert_says(&output, &["no node is named `a`", "other", "--node"]);
}

#[test]
fn each_decision_is_logged_with_its_addresses_where_that_is_asked_for() {
    for asked in [true, false] {
        let mut bed = Testbed::new("log").unwrap();
        if asked {
            bed = bed.with_agent_arguments(["--log-ebpf", "debug"]);
        }
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = PodSpec::new("client").settings("skipOutboundPorts: [9090]");
        let client = bed.pod(&a, client).unwrap();
        let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
        let _apps = [PORT, 9090].map(|port| server.echo(port).unwrap());
        bed.start_agents().unwrap();
        for to in server.addresses() {
            assert_eq!(client.caller().call((*to, PORT)), Fate::Echoed);
            assert_eq!(client.caller().call((*to, 9090)), Fate::Echoed);
        }
        let [client, server] = [&client, &server].map(|pod| (pod.v4(), pod.v6()));
        let decisions = [
            (
                &a,
                format!("egress {}:", client.0),
                format!(" -> {}:8080 outcome=steered reason=meshed", server.0),
            ),
            (
                &a,
                format!("egress {}:", client.1),
                format!(" -> {}:8080 outcome=steered reason=meshed", server.1),
            ),
            (
                &a,
                format!("egress {}:", client.0),
                format!(" -> {}:9090 outcome=passed reason=port_skipped", server.0),
            ),
            (
                &b,
                format!("ingress {}:", client.0),
                format!(" -> {}:15008 outcome=steered reason=meshed", server.0),
            ),
            (
                &b,
                format!("ingress {}:", client.0),
                format!(" -> {}:9090 outcome=steered reason=meshed", server.0),
            ),
        ];
        for (node, head, tail) in decisions {
            let says = || {
                let log = bed.agent(node).log();
                log.lines()
                    .any(|line| line.contains(&head) && line.ends_with(&tail))
            };
            if asked && kernel::release() < kernel::TAKES_LOGS {
                let log = bed.agent(node).process();
                log.wait_for_log("so they are loaded without", LIMIT)
                    .unwrap();
            } else if asked {
                eventually(&format!("`{head}…{tail}`"), LIMIT, says).unwrap();
            } else {
                assert!(!says());
            }
        }
        if !asked {
            for node in [&a, &b] {
                assert!(!bed.agent(node).log().contains("outcome="));
            }
        }
    }
}
