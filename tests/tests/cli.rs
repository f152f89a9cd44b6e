//! What the command line says of a healthy, a degraded and a dead agent, as a user sees it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{fs, net::SocketAddr, sync::Arc, thread, time::Duration};

use malla_testbed::{
    Caller, Fate, Node, Output, PORT, Pod, PodSpec, Scene, Testbed, binary, eventually, say,
};
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

/// Runs `malla` as a user does on a node.
fn malla(node: &Node, arguments: &[&str]) -> Output {
    let program = binary("malla").unwrap().display().to_string();
    let line = std::iter::once(program.as_str()).chain(arguments.iter().copied());
    node.command(line).output().unwrap()
}

/// [`malla`] with the words that say which agent is meant.
fn ask(bed: &Testbed, node: &Node, arguments: &[&str]) -> Output {
    let config = bed.mesh_path().display().to_string();
    let which = ["--config", &config, "--node", node.name()];
    malla(node, &[arguments, &which].concat())
}

fn succeeds(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        output.stderr,
        output.stdout
    );
    assert_eq!(output.stderr, "");
    output.stdout
}

fn json(bed: &Testbed, node: &Node, arguments: &[&str]) -> Value {
    let output = ask(bed, node, &[arguments, &["-o", "json"]].concat());
    serde_json::from_str(&succeeds(output)).unwrap()
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
    let scene = Scene::new("", "").unwrap();
    let caller = scene.client.caller();
    assert_eq!(caller.call((scene.server.v4(), PORT)), Fate::Echoed);
    eventually("the first audit", LIMIT, || {
        let config = scene.a.config();
        config.is_ok_and(|config| !config["audit"]["lastWhole"].is_null())
    })
    .unwrap();

    let check = succeeds(ask(&scene.bed, &scene.a, &["check"]));
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
    assert_eq!(json(&scene.bed, &scene.a, &["check"])["success"], true);

    let version = succeeds(ask(&scene.bed, &scene.a, &["version", "--short"]));
    let numbers: Vec<&str> = version.lines().collect();
    assert_eq!(numbers.len(), 2);
    assert_eq!(numbers[0], numbers[1]);

    let edges = succeeds(ask(&scene.bed, &scene.a, &["edges", "-o", "wide"]));
    assert_eq!(
        edges,
        "SRC      DST      SRC_NS    DST_NS    CLIENT_ID         SERVER_ID         SECURED\n\
         client   server   default   default   default.default   default.default   √\n"
    );
    let stat = succeeds(ask(&scene.bed, &scene.b, &["stat", "-n", "default"]));
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
    let ledger = succeeds(ask(&scene.bed, &scene.a, &["diagnostics", "ledger"]));
    assert!(ledger.contains("\ndefault/client "), "{ledger}");
    let config = succeeds(ask(&scene.bed, &scene.a, &["diagnostics", "config"]));
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["node"], "a");
    let metrics = succeeds(ask(&scene.bed, &scene.a, &["diagnostics", "metrics"]));
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
    let output = malla(&scene.b, &[&["check"], &which[..]].concat());
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
        succeeds(malla(&scene.b, &[command, &which[..]].concat()));
    }
}

#[test]
fn a_dead_agent_is_one_line_with_the_fix_and_a_failure() {
    let scene = Scene::new("", "").unwrap();
    scene.bed.agent(&scene.a).kill9();
    for command in ASKING.into_iter().chain([&["version"][..]]) {
        let output = ask(&scene.bed, &scene.a, command);
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
    let version = ask(&scene.bed, &scene.a, &["version"]);
    assert!(version.stdout.ends_with("\nServer version: unavailable\n"));
    succeeds(malla(&scene.a, &["version", "--client"]));
    let check = ask(&scene.bed, &scene.a, &["check"]).stdout;
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
        let output = malla(&scene.a, &arguments);
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
        let script = succeeds(malla(&scene.a, &["completion", shell]));
        assert!(script.contains("diagnostics"), "{script}");
    }
    let folder = scene.bed.folder().join("man");
    succeeds(malla(&scene.a, &["man", &folder.display().to_string()]));
    for page in ["malla.1", "malla-check.1", "malla-diagnostics-ledger.1"] {
        let text = fs::read_to_string(folder.join(page)).unwrap();
        assert!(text.contains(".TH "), "{page}: {text}");
    }
}

/// Calls in threads, and says how many had this fate.
fn call_many(pod: &Pod, to: SocketAddr, calls: usize, fate: Fate) -> usize {
    const THREADS: usize = 8;
    let call = |share: usize| {
        let caller = Caller::new(pod.netns());
        (0..share).filter(|_| caller.call(to) == fate).count()
    };
    thread::scope(|scope| {
        let shares = (0..THREADS).map(|thread| (calls + thread) / THREADS);
        let callers: Vec<_> = shares
            .map(|share| scope.spawn(move || call(share)))
            .collect();
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .sum()
    })
}

/// Lines of an agent's access log of connections that ended with `error`, or in good order.
fn lines_of(bed: &Testbed, node: &Node, direction: &str, src: &str, error: Option<&str>) -> usize {
    let log = bed.agent(node).log();
    let (direction, src) = (
        format!(" direction=\"{direction}\""),
        format!(" src.workload=\"{src}\""),
    );
    let ended = |line: &&str| match error {
        Some(error) => line.ends_with(&format!(" error=\"{error}\"")),
        None => !line.contains(" error="),
    };
    log.lines()
        .filter(|line| line.contains("\tconnection complete\t"))
        .filter(|line| line.contains(&direction) && line.contains(&src))
        .filter(ended)
        .count()
}

/// The number that `malla edges -o json` has of a pair, secured or for a reason.
fn edge(edges: &Value, src: &str, reason: Option<&str>) -> u64 {
    let edges = edges.as_array().unwrap().iter();
    edges
        .filter(|edge| edge["src"] == src && edge["dst"] == "server")
        .filter(|edge| edge["reason"].as_str() == reason)
        .filter(|edge| edge["secured"] == reason.is_none())
        .map(|edge| edge["opened"].as_u64().unwrap())
        .sum()
}

#[test]
fn the_numbers_of_ten_thousand_connections_agree_everywhere() {
    const ECHOED: usize = 8_000;
    const NOBODY_LISTENS: usize = 1_000;
    const REFUSED: usize = 1_000;
    const OPEN: usize = 5;
    let mut scene = Scene::new("", "mtls: strict").unwrap();
    let (a, b) = (Arc::clone(&scene.a), Arc::clone(&scene.b));
    let stranger = scene
        .bed
        .pod(&a, PodSpec::new("stranger").unmeshed())
        .unwrap();
    let to = SocketAddr::from((scene.server.v4(), PORT));
    let nowhere = SocketAddr::from((scene.server.v4(), 81));
    assert_eq!(call_many(&scene.client, to, ECHOED, Fate::Echoed), ECHOED);
    let refused = call_many(&scene.client, nowhere, NOBODY_LISTENS, Fate::Reset);
    assert_eq!(refused, NOBODY_LISTENS);
    assert_eq!(call_many(&stranger, to, REFUSED, Fate::Reset), REFUSED);
    let mut held: Vec<_> = (0..OPEN)
        .map(|_| scene.client.connect(to).unwrap())
        .collect();
    for stream in &mut held {
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }

    let number = |count: usize| count as u64;
    let mut seen = Value::Null;
    let settled = eventually("the counters of the last connections", LIMIT, || {
        seen = json(&scene.bed, &b, &["stat", "server", "-t", "1ms"]);
        seen[0]["tcpConnections"] == number(OPEN)
    });
    settled.unwrap_or_else(|error| panic!("{error}: {seen:#}"));
    eventually("the client's too", LIMIT, || {
        let stat = json(
            &scene.bed,
            &a,
            &["stat", "client", "--outbound", "-t", "1ms"],
        );
        stat[0]["tcpConnections"] == number(OPEN)
    })
    .unwrap();

    // The client's side.
    let stat = json(
        &scene.bed,
        &a,
        &["stat", "client", "--outbound", "-t", "1ms"],
    );
    assert_eq!(stat[0]["tcpOpened"], number(ECHOED + NOBODY_LISTENS + OPEN));
    assert_eq!(stat[0]["tcpClosed"][""], number(ECHOED));
    assert_eq!(stat[0]["tcpClosed"]["peer_refused"], number(NOBODY_LISTENS));
    let edges = json(&scene.bed, &a, &["edges"]);
    assert_eq!(edge(&edges, "client", None), number(ECHOED + OPEN));
    assert_eq!(
        edge(&edges, "client", Some("peer_refused")),
        number(NOBODY_LISTENS)
    );
    let lines = |node, direction, src, error| lines_of(&scene.bed, node, direction, src, error);
    assert_eq!(lines(&a, "outbound", "client", None), ECHOED);
    assert_eq!(
        lines(&a, "outbound", "client", Some("peer_refused")),
        NOBODY_LISTENS
    );

    // The server's side.
    let stat = json(&scene.bed, &b, &["stat", "server", "-t", "1ms"]);
    assert_eq!(
        stat[0]["tcpOpened"],
        number(ECHOED + NOBODY_LISTENS + REFUSED + OPEN)
    );
    let closed = &stat[0]["tcpClosed"];
    assert_eq!(closed[""], number(ECHOED));
    assert_eq!(closed["connect_refused"], number(NOBODY_LISTENS));
    assert_eq!(closed["plaintext_refused"], number(REFUSED));
    let edges = json(&scene.bed, &b, &["edges"]);
    assert_eq!(edge(&edges, "client", None), number(ECHOED + OPEN));
    assert_eq!(
        edge(&edges, "client", Some("connect_refused")),
        number(NOBODY_LISTENS)
    );
    assert_eq!(
        edge(&edges, "stranger", Some("plaintext_refused")),
        number(REFUSED)
    );
    assert_eq!(edge(&edges, "stranger", Some("no_tls_from_remote")), 0);
    assert_eq!(lines(&b, "inbound", "client", None), ECHOED);
    assert_eq!(
        lines(&b, "inbound", "client", Some("connect_refused")),
        NOBODY_LISTENS
    );
    assert_eq!(
        lines(&b, "inbound", "stranger", Some("plaintext_refused")),
        REFUSED
    );
}

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
            told = json(&scene.bed, a, &["explain", "client", "server:8080"]);
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
    let before = succeeds(ask(&scene.bed, &a, &explain));
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
    let after = succeeds(ask(&scene.bed, &a, &explain));
    let row = after.lines().find(|line| line.starts_with("b ")).unwrap();
    let row: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(row[..3], ["b", "inbound", "3"], "{after}");
    assert_eq!(row[4], "plaintext_refused", "{after}");
    // By addresses, and from the agent alone, it is the same.
    let socket = scene.b.config_socket().display().to_string();
    let [from, to] = [&*stranger, &*scene.server].map(|pod| pod.v4().to_string());
    let named = ["explain", &from, &format!("{to}:8080"), "--socket", &socket];
    let named = succeeds(malla(&scene.b, &named));
    assert!(named.contains("plaintext_refused"), "{named}");
}

#[test]
fn explain_answers_for_a_dead_agent_from_the_mesh_file_and_fails() {
    let mut scene = Scene::new("", "").unwrap();
    let (a, to) = (Arc::clone(&scene.a), (scene.server.v4(), PORT));
    scene.bed.agent(&a).kill9();
    let output = ask(&scene.bed, &a, &["explain", "client", "server:8080"]);
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
    let told = json(&scene.bed, &a, &["explain", "client", "server:8080"]);
    let kernel = told["kernelRefused"].as_array().unwrap().iter();
    let mut same = kernel.filter(|refused| refused["reason"] == "no_agent");
    let same = same.next().unwrap_or_else(|| panic!("{told:#}"));
    assert_eq!(
        (&same["node"], &same["direction"]),
        (&"a".into(), &"outbound".into())
    );
    assert_eq!(told["outcome"], "meshed");
}
