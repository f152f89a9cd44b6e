//! What `malla explain` foretells is what happens, and what happened is what it tells.

use std::{sync::Arc, time::Duration};

use malla_testbed::{Fate, PORT, PodSpec, Scene, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// What `malla explain` foretells must be what happens.
#[test]
fn explain_foretells_what_happens_and_says_why_it_did() {
    let scene = Scene::new("", "").unwrap();
    let (a, to) = (&scene.a, (scene.server.v4(), PORT));
    for (client, server, outcome, reason) in [
        ("", "mtls: strict", "meshed", None),
        (
            "",
            "skipInboundPorts: [8080]",
            "plaintext",
            Some("port_skipped"),
        ),
        (
            "skipOutboundPorts: [8080]",
            "",
            "plaintext",
            Some("no_tls_from_remote"),
        ),
        (
            "skipOutboundPorts: [8080]",
            "mtls: strict",
            "reset",
            Some("plaintext_refused"),
        ),
        (
            "egress: mesh-only",
            "skipInboundPorts: [8080]",
            "reset",
            Some("egress_refused"),
        ),
    ] {
        scene.bed.change_settings(&scene.client, client).unwrap();
        scene.bed.change_settings(&scene.server, server).unwrap();
        let expected = match outcome {
            "reset" => Fate::Reset,
            _ => Fate::Echoed,
        };
        let what = format!("{client:?} to {server:?} to be {outcome}");
        let mut told = Value::Null;
        let happens = eventually(&what, LIMIT, || {
            let fate = scene.client.caller().call(to);
            told = scene
                .bed
                .ask_json(a, &["explain", "client", "server:8080"])
                .unwrap();
            let mut past = told["past"].as_array().unwrap().iter();
            let is_told =
                |reason| past.any(|past| past["result"] == reason && past["last"].is_string());
            // What was reset has its reason among the last ones.
            fate == expected && (expected == Fate::Echoed || reason.is_none_or(is_told))
        });
        happens.unwrap_or_else(|error| panic!("{error}: {told:#}"));
        assert_eq!(told["outcome"], outcome, "{what}: {told:#}");
        assert_eq!(told["reason"].as_str(), reason, "{what}: {told:#}");
    }
}

#[test]
fn explain_tells_of_a_strangers_refused_connections_with_the_reason_in_words() {
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    let a = Arc::clone(&scene.a);
    let stranger = PodSpec::new("stranger").unmeshed();
    let stranger = scene.bed.pod(&a, stranger).unwrap();
    let explain = ["explain", "stranger", "default/server:8080"];
    let before = scene.bed.ask(&a, &explain).unwrap();
    assert!(before.contains("× a connection would be opened, then reset: plaintext_refused\n"));
    assert!(
        before.contains("A strict pod takes no plaintext."),
        "{before}"
    );
    assert!(
        before.contains("remembers a connection between the two"),
        "{before}"
    );
    for _ in 0..3 {
        let to = (scene.server.v4(), PORT);
        assert_eq!(stranger.caller().call(to), Fate::Reset);
    }
    let after = scene.bed.ask(&a, &explain).unwrap();
    let row = after.lines().find(|line| line.starts_with("b ")).unwrap();
    let row: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(row[..3], ["b", "inbound", "3"], "{after}");
    assert_eq!(row[4], "plaintext_refused", "{after}");
    // By addresses, and from the agent alone, it is the same.
    let socket = scene.b.config_socket().display().to_string();
    let [from, to] = [&*stranger, &*scene.server].map(|pod| pod.v4().to_string());
    let named = ["explain", &from, &format!("{to}:8080"), "--socket", &socket];
    let named = scene.b.malla(&named).unwrap().succeeded().unwrap();
    assert!(named.contains("plaintext_refused"), "{named}");
}

#[test]
fn explain_answers_for_a_dead_agent_from_the_mesh_file_and_fails() {
    let mut scene = Scene::new("", "").unwrap();
    let (a, to) = (Arc::clone(&scene.a), (scene.server.v4(), PORT));
    scene.bed.agent(&a).kill9();
    let output = scene
        .bed
        .try_ask(&a, &["explain", "client", "server:8080"])
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let refused = "× a connection would be refused at once (ECONNREFUSED): no_agent\n";
    assert!(output.stdout.contains(refused), "{}", output.stdout);
    assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    assert!(
        output.stderr.contains("malla agent --config"),
        "{}",
        output.stderr
    );
    assert_eq!(scene.client.caller().call(to), Fate::Refused);
    // The kernel counts while no agent lives.
    scene.bed.start_agent(&a).unwrap();
    let told = scene
        .bed
        .ask_json(&a, &["explain", "client", "server:8080"])
        .unwrap();
    let kernel = told["kernelRefused"].as_array().unwrap().iter();
    let mut same = kernel.filter(|refused| refused["reason"] == "no_agent");
    let same = same.next().unwrap_or_else(|| panic!("{told:#}"));
    assert_eq!(
        (&same["node"], &same["direction"]),
        (&"a".into(), &"outbound".into())
    );
    assert_eq!(told["outcome"], "meshed");
}
