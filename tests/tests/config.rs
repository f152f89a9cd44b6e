//! `/config` tells what the agent now believes, to root alone.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use malla_testbed::{Fate, Node, PORT, PodSpec, Scene, eventually, get_unix, say};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Waits until the configuration is as it should be. While one agent takes another's place, there
/// may be none for a moment.
fn wait_until(node: &Node, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let seen = eventually(what, LIMIT, || {
        let Ok(config) = node.config() else {
            return false;
        };
        last = config;
        is(&last)
    });
    seen.unwrap_or_else(|error| panic!("{error:#}: {last:#}"));
    last
}

#[test]
fn only_root_may_read_it() {
    let scene = Scene::new("", "").unwrap();
    let socket = scene.a.config_socket();
    let mode = |path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(socket.as_path()), 0o600);
    assert_eq!(mode(&scene.a.runtime_folder()), 0o700);
    let path = socket.display().to_string();
    let curl = ["curl", "-sS", "--unix-socket", &path, "http://agent/config"];
    let root = scene.a.run(curl).unwrap();
    let config: Value = serde_json::from_str(&root.stdout).unwrap();
    assert_eq!(config["node"], "a");
    let nobody = scene.a.command(curl).user("nobody").output().unwrap();
    assert!(!nobody.status.success(), "{}", nobody.stdout);
    let agent = scene.bed.agent(&scene.a).process();
    let said = agent.wait_for_log(&format!("socket={path}"), LIMIT);
    said.unwrap();
}

#[test]
fn it_tells_pods_tunnels_and_certificates_and_no_key() {
    let scene = Scene::new("", "skipInboundPorts: [25]").unwrap();
    let mut streams = Vec::new();
    for address in scene.server.addresses() {
        let mut stream = scene.client.connect((*address, PORT)).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        streams.push(stream);
    }
    let identity = "spiffe://cluster.local/ns/default/sa/default";
    for (node, pod, peer, direction) in [
        (&scene.a, &scene.client, &scene.server, "outbound"),
        (&scene.b, &scene.server, &scene.client, "inbound"),
    ] {
        let config = node.config().unwrap();
        let workload = &config["workloads"][0];
        assert_eq!(workload["identity"], identity);
        assert_eq!(workload["netns"], pod.netns().path().to_str().unwrap());
        assert_eq!(workload["interfaces"][0]["name"], "eth0");
        assert_eq!(workload["interfaces"][0]["steered"], true);
        let told = workload["addresses"].as_array().unwrap();
        for address in pod.addresses() {
            assert!(told.iter().any(|a| *a == address.to_string().as_str()));
        }
        assert_eq!(config["certificates"]["workloads"][0]["identity"], identity);
        let tunnels = config["tunnels"].as_array().unwrap();
        assert_eq!(tunnels.len(), 2, "one of each family");
        for tunnel in tunnels {
            assert_eq!(tunnel["direction"], direction);
            assert_eq!(tunnel["identity"], identity);
            assert_eq!(tunnel["streams"], 1);
            let end: std::net::SocketAddr = tunnel["peer"].as_str().unwrap().parse().unwrap();
            assert!(peer.addresses().contains(&end.ip()));
        }
        let text = config.to_string();
        let key = fs::read_to_string(scene.bed.folder().join("identity/issuer.key")).unwrap();
        assert!(!text.contains("PRIVATE KEY"));
        assert!(!text.contains(key.lines().nth(1).unwrap()));
    }
    let server = &scene.b.config().unwrap()["workloads"][0];
    assert_eq!(server["settings"]["skipInboundPorts"][0], "25");
}

#[test]
fn it_follows_settings_pods_and_a_bad_mesh_file() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.b);
    scene
        .bed
        .change_settings(&scene.server, "mtls: strict")
        .unwrap();
    wait_until(&node, "the changed setting", |config| {
        config["workloads"][0]["settings"]["mtls"] == "strict"
    });
    let second = scene.bed.pod(&node, PodSpec::new("second")).unwrap();
    wait_until(&node, "the second pod", |config| {
        config["workloads"][0]["workload"] == "default/second"
            && config["ledger"]["workloads"][0]["kernel"]["listeners"] != 0
    });
    scene.bed.remove_pod(&second).unwrap();
    wait_until(&node, "one pod", |config| {
        config["workloads"].as_array().unwrap().len() == 1
    });
    scene.bed.write_mesh_text("nodes: 5").unwrap();
    let bad = wait_until(&node, "the refusal", |config| {
        config["mesh"]["inForce"] == false
    });
    let report = bad["mesh"]["lastRefusal"]["report"].as_str().unwrap();
    assert!(report.contains("nodes: expected a list"), "{report}");
    assert_eq!(bad["workloads"].as_array().unwrap().len(), 1);
    scene.bed.write_mesh().unwrap();
    let good = wait_until(&node, "the good file", |config| {
        config["mesh"]["inForce"] == true
    });
    assert_eq!(good["mesh"]["lastRefusal"], bad["mesh"]["lastRefusal"]);
}

#[test]
fn a_pod_that_can_not_be_enrolled_is_told_with_the_reason() {
    let scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.a);
    let text = scene.bed.mesh_yaml();
    let path = scene.client.netns().path().display().to_string();
    scene
        .bed
        .write_mesh_text(&text.replace(&path, "/run/netns/malla-no-such-pod"))
        .unwrap();
    let config = wait_until(&node, "the refused pod", |config| {
        config["refused"][0]["workload"] == "default/client"
    });
    let why = config["refused"][0]["why"].as_str().unwrap();
    assert!(why.contains("malla-no-such-pod"), "{why}");
}

#[test]
fn the_one_in_charge_has_the_socket() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.a);
    let pid = |scene: &Scene| scene.bed.agent(&node).process().pid();
    assert_eq!(node.config().unwrap()["pid"], pid(&scene));

    // The old one lives on with a connection.
    let mut held = scene.client.connect((scene.server.v4(), PORT)).unwrap();
    assert_eq!(say(&mut held, b"hello"), Fate::Echoed);
    let old = scene.bed.upgrade_agent(&node).unwrap();
    let new = pid(&scene);
    wait_until(&node, "the new agent's", |config| config["pid"] == new);
    assert!(old.is_running());
    drop(held);
    assert!(old.wait_ended(LIMIT).unwrap().success());
    assert_eq!(node.config().unwrap()["pid"], new);

    scene.bed.agent(&node).kill9();
    assert!(node.config_socket().exists(), "what a crash leaves");
    assert!(node.config().is_err());
    scene.bed.start_agent(&node).unwrap();
    assert_eq!(node.config().unwrap()["pid"], pid(&scene));
}

#[test]
fn metrics_and_probes_are_there_too_and_configuration_is_nowhere_else() {
    let scene = Scene::new("", "").unwrap();
    let socket = scene.a.config_socket();
    let status = |path| get_unix(&socket, path, LIMIT).unwrap().status;
    for path in ["/metrics", "/ready", "/live", "/config"] {
        assert_eq!(status(path), 200, "{path}");
    }
    assert_eq!(status("/"), 404);
    assert_eq!(scene.a.get("/config").unwrap().status, 404);
}

#[test]
fn a_runtime_folder_that_is_a_link_is_refused_before_the_pods_are_touched() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.a);
    assert!(scene.bed.agent(&node).stop().unwrap().success());
    let folder = node.runtime_folder();
    let elsewhere = folder.with_extension("elsewhere");
    fs::rename(&folder, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &folder).unwrap();
    let refused = scene.bed.agent_command(&node).unwrap().output().unwrap();
    assert!(!refused.status.success());
    assert!(refused.stderr.contains("no link"), "{}", refused.stderr);
    fs::remove_file(&folder).unwrap();
    scene.bed.start_agent(&node).unwrap();
}

#[test]
fn it_tells_the_probes_of_a_pod_and_where_they_come_from() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.b);
    let probed = PodSpec::new("probed")
        .named_port("http", PORT)
        .probe("httpGet: {path: \"/healthz?x=1\", port: http}")
        .probe("tcpSocket: {port: 5432}")
        .probe("grpc: {port: 9090, service: ready}");
    scene.bed.pod(&node, probed).unwrap();
    let config = wait_until(&node, "the probed pod", |config| {
        config["workloads"][0]["workload"] == "default/probed"
    });
    let [probed, server] = [&config["workloads"][0], &config["workloads"][1]];
    assert_eq!(
        probed["probes"],
        serde_json::json!([
            {"httpGet": {"path": "/healthz?x=1", "port": PORT}},
            {"tcpSocket": {"port": 5432}},
            {"grpc": {"port": 9090, "service": "ready"}},
        ])
    );
    let from = node.addresses().map(|address| address.to_string());
    assert_eq!(probed["probesFrom"], serde_json::json!(from));
    assert_eq!(server["probes"], serde_json::json!([]));
}

#[test]
fn it_tells_the_pairs_of_one_node_and_what_the_network_says_of_them() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.b);
    let caller = scene.bed.pod(&node, PodSpec::new("beside")).unwrap();
    wait_until(&node, "the pod beside", |config| {
        config["workloads"].as_array().unwrap().len() == 2
    });
    assert_eq!(node.config().unwrap()["neighbours"], serde_json::json!([]));
    let mut stream = caller.connect((scene.server.v4(), PORT)).unwrap();
    assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
    let pair = |connections: usize| {
        serde_json::json!([{
            "source": "default/beside",
            "destination": "default/server",
            "address": scene.server.v4().to_string(),
            "network": "allowed",
            "takesConnections": true,
            "connections": connections,
        }])
    };
    let config = node.config().unwrap();
    assert_eq!(config["neighbours"], pair(1));
    assert_eq!(config["tunnels"], serde_json::json!([]), "none is needed");
    drop(stream);
    wait_until(&node, "the end of the connection", |config| {
        config["neighbours"] == pair(0)
    });
}
