//! What the command line says of a healthy, a degraded and a dead agent, as a user sees it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{fs, sync::Arc, time::Duration};

use malla_testbed::{Fate, Node, PORT, Scene, binary, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Commands that ask an agent, in the [`scene`]. Those that print JSON alone are marked so.
const ASKING: [(&[&str], Form); 9] = [
    (&["check"], Form::Both),
    (&["edges"], Form::Both),
    (&["endpoints"], Form::Both),
    (&["explain", "client", "web:80"], Form::Both),
    (&["stat"], Form::Both),
    (&["diagnostics", "metrics"], Form::Text),
    (&["diagnostics", "config"], Form::Json),
    (&["diagnostics", "ledger"], Form::Both),
    (&["version"], Form::Text),
];

/// In which form a command prints.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
    /// As a table, and with `-o json` as JSON.
    Both,
}

/// A scene whose server is behind the Service `web`.
fn scene() -> Scene {
    let mut scene = Scene::new("", "").unwrap();
    let v4 = scene.server.v4();
    let web = format!(
        "addresses: [10.96.0.10]\nports: [{{port: 80, targetPort: {PORT}}}]\n\
         endpoints: [{{addresses: [{v4}]}}]"
    );
    scene.bed.service("web", web).unwrap();
    for node in [&scene.a, &scene.b] {
        eventually("the Service", LIMIT, || {
            let config = node.config();
            config.is_ok_and(|config| config["services"][0]["service"] == "default/web")
        })
        .unwrap();
    }
    scene
}

/// That every command but those of `except` answers, in each of its forms.
fn assert_answers(node: &Node, except: &[&str]) {
    let socket = node.config_socket().display().to_string();
    let asked = ASKING
        .iter()
        .filter(|(command, _)| !except.contains(&command[0]));
    for (command, form) in asked {
        let answer = |more: &[&str]| {
            let line = [*command, &["--socket", &socket], more].concat();
            let told = node.malla(&line).unwrap().succeeded();
            let told = told.unwrap_or_else(|error| panic!("{line:?}: {error:#}"));
            assert!(!told.is_empty(), "{line:?}");
            told
        };
        let json = match form {
            Form::Text => {
                answer(&[]);
                continue;
            }
            Form::Json => answer(&[]),
            Form::Both => {
                let table = answer(&[]);
                let parsed = serde_json::from_str::<Value>(&table);
                assert!(parsed.is_err(), "{command:?}: {table}");
                answer(&["-o", "json"])
            }
        };
        let parsed = serde_json::from_str::<Value>(&json);
        parsed.unwrap_or_else(|error| panic!("{command:?}: {error}: {json}"));
    }
}

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
    let scene = scene();
    let caller = scene.client.caller();
    assert_eq!(caller.call((scene.server.v4(), PORT)), Fate::Echoed);
    eventually("the first audit", LIMIT, || {
        let config = scene.a.config();
        config.is_ok_and(|config| !config["audit"]["lastWhole"].is_null())
    })
    .unwrap();
    assert_answers(&scene.a, &[]);

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
    let mut scene = scene();
    let b = Arc::clone(&scene.b);
    assert!(scene.bed.agent(&b).stop().unwrap().success());
    let _app = scene.server.echo(15008).unwrap();
    scene.bed.start_agent(&b).unwrap();
    eventually("a degraded pod", LIMIT, || {
        let config = scene.b.config();
        config.is_ok_and(|config| config["workloads"][0]["degraded"][0]["reason"] == "mesh_port")
    })
    .unwrap();
    assert_answers(&scene.b, &["check"]);
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

    // What explains by the file says what is wrong with it.
    assert_answers(&scene.b, &["check", "explain"]);
    let explain = ["explain", "client", "web:80", "--socket", &socket];
    let explain = scene.b.malla(&explain).unwrap();
    assert_eq!(explain.status.code(), Some(1));
    let said = &explain.stderr;
    assert!(said.contains("nodes: expected a list"), "{said}");
}

#[test]
fn a_dead_agent_is_one_line_with_the_fix_and_a_failure() {
    let scene = scene();
    scene.bed.agent(&scene.a).kill9();
    for (command, _) in ASKING {
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
    let scene = scene();
    let config = scene.bed.mesh_path().display().to_string();
    let of_a = ["--config", &config, "--node", "a"];
    let of_nobody = ["--socket", "/nowhere.sock"];
    for (command, more, code, said) in [
        ("nonsense", &[][..], 2, "unrecognized subcommand"),
        ("check -o yaml", &[], 2, "table, json"),
        ("check", &["--config", &config], 1, "--node"),
        ("edges -o yaml", &[], 2, "table, wide, json"),
        ("edges surplus", &of_a, 2, "'surplus'"),
        ("edges", &["--node"], 2, "--node <NAME>"),
        ("endpoints -o wide", &of_a, 2, "table, json"),
        ("endpoints db", &of_a, 1, "no Service db"),
        ("endpoints shop/web", &of_a, 1, "no Service shop/web"),
        ("endpoints", &["--config", &config], 1, "--node"),
        ("explain client", &[], 2, "<DST:PORT>"),
        ("explain client server", &of_a, 1, "DST:PORT"),
        ("explain client server:0", &of_a, 1, "1 to 65535"),
        ("explain nobody server:80", &of_a, 1, "`nobody`"),
        ("explain client nobody:80", &of_a, 1, "`nobody`"),
        ("explain node web:80", &of_a, 1, "is no pod"),
        ("explain client web:80 -o yaml", &of_a, 2, "table, json"),
        ("explain client web:80", &of_nobody, 1, "--config"),
        ("stat", &["--config", &config], 1, "--node"),
        ("stat --node z", &["--config", &config], 1, "[\"a\", \"b\"]"),
        (
            "stat",
            &["--config", "/nowhere.yaml"],
            1,
            "can't read /nowhere.yaml",
        ),
        ("stat no-pod", &of_a, 1, "no pod no-pod"),
        ("stat -t soon", &[], 2, "--time-window"),
        ("diagnostics", &[], 2, "ledger"),
        ("diagnostics metric", &of_a, 2, "metrics"),
        ("diagnostics metrics", &of_nobody, 1, "/nowhere.sock"),
        ("diagnostics config surplus", &of_a, 2, "'surplus'"),
        ("diagnostics ledger -o yaml", &of_a, 2, "table, json"),
        ("version --shrt", &[], 2, "--short"),
        ("schema surplus", &[], 2, "'surplus'"),
        ("completion dos", &[], 2, "bash"),
        ("man", &[], 2, "<DIR>"),
        ("man /proc/no-folder", &[], 1, "/proc/no-folder"),
    ] {
        let arguments: Vec<&str> = command.split(' ').chain(more.iter().copied()).collect();
        let output = scene.a.malla(&arguments).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        // A check tells what is wrong among what it checks.
        let told = match command {
            "check" => output.stdout,
            _ => output.stderr,
        };
        assert!(told.contains(said), "{arguments:?}: {told}");
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
