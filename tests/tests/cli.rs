//! What the command line says of a healthy, a degraded and a dead agent, as a user sees it.

use std::{fs, sync::Arc, time::Duration};

use malla_testbed::{Fate, PORT, Scene, binary, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Commands that ask the agent.
const ASKING: [&[&str]; 6] = [
    &["edges"],
    &["stat"],
    &["diagnostics", "metrics"],
    &["diagnostics", "config"],
    &["diagnostics", "ledger"],
    &["check"],
];

/// The lines that a check which doesn't hold is told with: itself, the reason, the fix.
fn fault<'a>(check: &'a str, what: &str) -> Vec<&'a str> {
    let mut lines = check.lines().skip_while(|line| !line.ends_with(what));
    let first = lines
        .next()
        .unwrap_or_else(|| panic!("no {what} in\n{check}"));
    let rest = lines.take_while(|line| line.starts_with("    "));
    std::iter::once(first).chain(rest).collect()
}

#[test]
fn a_healthy_agent_passes_every_check_and_answers_every_command() {
    let scene = Scene::new("", "").unwrap();
    let caller = scene.client.caller();
    assert_eq!(caller.call((scene.server.v4(), PORT)), Fate::Echoed);
    eventually("the first audit", LIMIT, || {
        let config = scene.a.config();
        config.is_ok_and(|config| !config["audit"]["lastWhole"].is_null())
    })
    .unwrap();

    let check = scene.bed.ask(&scene.a, &["check"]).unwrap();
    assert!(!check.contains('×') && !check.contains('\x1b'), "{check}");
    assert_eq!(check.lines().last(), Some("Status check results are √"));
    for line in [
        "√ has BTF",
        "√ is ready",
        "√ 1 pods are steered",
        "√ the agent's sockets are those that the kernel lists",
        "√ what differed in the kernel was put right",
    ] {
        assert!(check.lines().any(|told| told == line), "{line}:\n{check}");
    }
    assert_eq!(
        scene.bed.ask_json(&scene.a, &["check"]).unwrap()["success"],
        true
    );

    let version = scene.bed.ask(&scene.a, &["version", "--short"]).unwrap();
    let numbers: Vec<&str> = version.lines().collect();
    assert_eq!(numbers.len(), 2);
    assert_eq!(numbers[0], numbers[1]);

    let edges = scene.bed.ask(&scene.a, &["edges", "-o", "wide"]).unwrap();
    assert_eq!(
        edges,
        "SRC      DST      SRC_NS    DST_NS    CLIENT_ID         SERVER_ID         SECURED\n\
         client   server   default   default   default.default   default.default   √\n"
    );
    let stat = scene.bed.ask(&scene.b, &["stat", "-n", "default"]).unwrap();
    let lines: Vec<Vec<&str>> = stat
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines,
        [
            vec![
                "NAME",
                "MESHED",
                "SUCCESS",
                "RPS",
                "LATENCY_P50",
                "LATENCY_P95",
                "LATENCY_P99",
                "TCP_CONN"
            ],
            vec!["server", "1/1", "-", "-", "-", "-", "-", "0"],
        ]
    );
    let ledger = scene.bed.ask(&scene.a, &["diagnostics", "ledger"]).unwrap();
    assert!(ledger.contains("\ndefault/client "), "{ledger}");
    let config = scene.bed.ask(&scene.a, &["diagnostics", "config"]).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["node"], "a");
    let metrics = scene
        .bed
        .ask(&scene.a, &["diagnostics", "metrics"])
        .unwrap();
    assert!(metrics.contains("\ntcp_open_total{"), "{metrics}");
}

#[test]
fn a_degraded_agent_fails_the_check_with_reason_and_fix_and_answers_all_else() {
    let mut scene = Scene::new("", "").unwrap();
    let b = Arc::clone(&scene.b);
    assert!(scene.bed.agent(&b).stop().unwrap().success());
    let _app = scene.server.echo(15008).unwrap();
    scene.bed.start_agent(&b).unwrap();
    eventually("a degraded pod", LIMIT, || {
        let config = scene.b.config();
        config.is_ok_and(|config| config["workloads"][0]["degraded"][0]["reason"] == "mesh_port")
    })
    .unwrap();
    // And a mesh file that the agents refuse.
    scene.bed.write_mesh_text("nodes: 5").unwrap();
    eventually("the refusal", LIMIT, || {
        let config = scene.b.config();
        config.is_ok_and(|config| config["mesh"]["inForce"] == false)
    })
    .unwrap();

    let socket = scene.b.config_socket().display().to_string();
    let which = ["--socket", &socket];
    let output = scene.b.malla(&[&["check"], &which[..]].concat()).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let check = output.stdout;
    assert_eq!(check.lines().last(), Some("Status check results are ×"));
    let degraded = fault(&check, "default/server is served whole");
    assert!(degraded[0].starts_with('×'), "{degraded:?}");
    assert!(degraded[1].contains("mesh_port"), "{degraded:?}");
    assert!(degraded[2].starts_with("    fix: ") && degraded[2].contains("15008"));
    let path = scene.bed.mesh_path().display().to_string();
    let valid = fault(&check, &format!("is valid ({path})"));
    assert!(valid[1].contains("nodes: expected a list"), "{valid:?}");
    let in_force = fault(&check, "in force as it is now");
    assert!(
        in_force[1].contains("nodes: expected a list"),
        "{in_force:?}"
    );

    for command in ASKING.into_iter().filter(|command| *command != ["check"]) {
        scene
            .b
            .malla(&[command, &which[..]].concat())
            .unwrap()
            .succeeded()
            .unwrap();
    }
}

#[test]
fn a_dead_agent_is_one_line_with_the_fix_and_a_failure() {
    let scene = Scene::new("", "").unwrap();
    scene.bed.agent(&scene.a).kill9();
    for command in ASKING.into_iter().chain([&["version"][..]]) {
        let output = scene.bed.try_ask(&scene.a, command).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let (lines, told) = match command {
            ["check"] => (0, &output.stdout),
            _ => (1, &output.stderr),
        };
        assert_eq!(output.stderr.lines().count(), lines, "{}", output.stderr);
        assert!(told.contains("no agent answers at"), "{command:?}: {told}");
        let fix = format!("malla agent --config {}", scene.bed.mesh_path().display());
        assert!(told.contains(&fix), "{command:?}: {told}");
    }
    let version = scene.bed.try_ask(&scene.a, &["version"]).unwrap();
    assert!(version.stdout.ends_with("\nServer version: unavailable\n"));
    scene
        .a
        .malla(&["version", "--client"])
        .unwrap()
        .succeeded()
        .unwrap();
    let check = scene.bed.try_ask(&scene.a, &["check"]).unwrap().stdout;
    assert!(
        check.contains("√ has BTF") && check.contains("√ is valid ("),
        "{check}"
    );
}

#[test]
fn arguments_that_mean_nothing_are_refused_with_what_would() {
    let scene = Scene::new("", "").unwrap();
    let config = scene.bed.mesh_path().display().to_string();
    for (arguments, code, said) in [
        (vec!["nonsense"], 2, "unrecognized subcommand"),
        (vec!["edges", "-o", "yaml"], 2, "table, wide, json"),
        (vec!["stat", "-t", "soon"], 2, "--time-window"),
        (vec!["diagnostics"], 2, "ledger"),
        (vec!["completion", "dos"], 2, "bash"),
        (vec!["explain", "client"], 2, "<DST:PORT>"),
        (
            vec!["explain", "client", "server", "--config", &config],
            1,
            "DST:PORT",
        ),
        (
            vec!["explain", "client", "server:0", "--config", &config],
            1,
            "1 to 65535",
        ),
        (
            vec!["explain", "nobody", "server:80", "--config", &config],
            1,
            "`nobody`",
        ),
        (vec!["stat", "--config", &config], 1, "--node"),
        (
            vec!["stat", "--config", &config, "--node", "z"],
            1,
            "[\"a\", \"b\"]",
        ),
        (
            vec!["stat", "--config", "/nowhere.yaml"],
            1,
            "can't read /nowhere.yaml",
        ),
        (
            vec!["stat", "--config", &config, "--node", "a", "no-pod"],
            1,
            "no pod no-pod",
        ),
    ] {
        let output = scene.a.malla(&arguments).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(
            output.stderr.contains(said),
            "{arguments:?}: {}",
            output.stderr
        );
    }
    let socket = scene.a.config_socket().display().to_string();
    let program = binary("malla").unwrap().display().to_string();
    let nobody = scene.a.command([&*program, "edges", "--socket", &socket]);
    let nobody = nobody.user("nobody").output().unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(nobody.stderr.contains("root"), "{}", nobody.stderr);
}

#[test]
fn colours_are_for_a_terminal_and_for_nobody_who_refuses_them() {
    let scene = Scene::new("", "").unwrap();
    let program = binary("malla").unwrap().display().to_string();
    let socket = scene.a.config_socket().display().to_string();
    let line = format!("{program} check --socket {socket}");
    let on_terminal = |refusal: &str| {
        let command = scene.a.command(["script", "-qec", &line, "/dev/null"]);
        command.env("NO_COLOR", refusal).output().unwrap().stdout
    };
    assert!(on_terminal("").contains("\x1b[32m√\x1b[0m has BTF"));
    assert!(!on_terminal("1").contains('\x1b'));
    let piped = scene.a.command(["sh", "-c", &line]).output().unwrap();
    assert!(!piped.stdout.contains('\x1b'));
}

#[test]
fn shells_and_readers_get_what_the_command_line_knows() {
    let scene = Scene::new("", "").unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = scene
            .a
            .malla(&["completion", shell])
            .unwrap()
            .succeeded()
            .unwrap();
        assert!(script.contains("diagnostics"), "{script}");
    }
    let folder = scene.bed.folder().join("man");
    scene
        .a
        .malla(&["man", &folder.display().to_string()])
        .unwrap()
        .succeeded()
        .unwrap();
    for page in ["malla.1", "malla-check.1", "malla-diagnostics-ledger.1"] {
        let text = fs::read_to_string(folder.join(page)).unwrap();
        assert!(text.contains(".TH "), "{page}: {text}");
    }
}
