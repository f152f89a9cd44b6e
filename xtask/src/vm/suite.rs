//! Which tests run in the VM.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{ebpf, packages, shell, workspace};

use super::script::Script;

/// What runs on each kernel: file of tests/tests, then tests of it.
///
/// Emulation takes ten times as long as the machine itself, and a run at most six minutes: an agent
/// needs some 8 s until its programs are verified. So this is one test for each thing that hangs on
/// the kernel: loading, steering, what the programs do alone while no agent lives, adoption by the
/// next agent, withdrawal. Left out is what asks the same of the kernel again, what the agent alone
/// decides (identities, limits, the command line), and what measures time or needs a thousand
/// connections.
const CHOSEN: &[(&str, &[&str])] = &[
    (
        "steering_start",
        &[
            "a_folder_that_is_no_cgroup_is_refused",
            "a_folder_that_is_on_no_bpffs_is_refused",
            "the_root_cgroup_is_refused",
        ],
    ),
    (
        "steering_apps",
        &["a_multipath_socket_is_meshed_or_refused"],
    ),
    (
        "death",
        &["a_killed_agents_closed_pods_are_refused_reset_and_unheard_and_served_by_the_next"],
    ),
    (
        "steering_remains",
        &["a_pod_that_left_while_no_agent_lived_gets_its_plain_networking_back"],
    ),
    (
        "withdrawal",
        &["what_lives_when_a_pod_leaves_goes_on_and_what_is_new_passes"],
    ),
    (
        "probes",
        &["while_no_agent_lives_the_kernel_reads_the_requests"],
    ),
    (
        "services",
        &["a_service_without_endpoints_and_a_port_that_it_has_not_are_refused_at_once"],
    ),
];

/// Builds the tests, and says how to run those that are chosen, or all whose file or name contains
/// `text`.
pub(super) fn script(text: Option<&str>) -> Result<Script> {
    packages::ensure(packages::FOR_TESTS, "testing")?;
    ebpf::build()?;
    let agent = agent()?.display().to_string();
    let mut body = format!("export MALLA_BIN={}\ncode=0\n", shell::quote(&[agent]));
    let programs = programs()?;
    let run = match text {
        None => chosen(&programs)?,
        Some(text) => containing(&programs, text)?,
    };
    for (file, tests) in run {
        // One at a time: how long they wait is meant for a whole machine.
        let program = programs[file].display().to_string();
        let mut words = vec![
            program.as_str(),
            "--test-threads=1",
            "--color=never",
            "--exact",
        ];
        words.extend(tests.iter().map(String::as_str));
        let command = shell::quote(&words);
        body.push_str(&format!("echo '== {file}'\n{command} || code=1\n"));
    }
    Ok(Script {
        name: "test".to_owned(),
        has_tests: true,
        body,
    })
}

/// The agent that tests start: the one that the environment names, or else the one built now.
fn agent() -> Result<PathBuf> {
    if let Some(path) = env::var_os("MALLA_BIN") {
        return Ok(PathBuf::from(path));
    }
    shell::run(shell::cargo().args(["build", "--quiet", "--workspace"]))?;
    Ok(workspace::target().join("debug/malla"))
}

type Programs = BTreeMap<String, PathBuf>;
type Chosen<'a> = Vec<(&'a str, Vec<String>)>;

fn chosen(programs: &Programs) -> Result<Chosen<'_>> {
    let mut run = Vec::new();
    for (file, tests) in CHOSEN {
        let (file, program) = programs
            .get_key_value(*file)
            .with_context(|| format!("there is no tests/tests/{file}.rs"))?;
        let there_are = names(program)?;
        for test in *tests {
            let is_there = there_are.iter().any(|name| name == test);
            ensure!(is_there, "tests/tests/{file}.rs has no test {test}");
        }
        let tests = tests.iter().map(|test| (*test).to_owned());
        run.push((file.as_str(), tests.collect()));
    }
    Ok(run)
}

fn containing<'a>(programs: &'a Programs, text: &str) -> Result<Chosen<'a>> {
    let mut run = Vec::new();
    for (file, program) in programs {
        let mut tests = names(program)?;
        tests.retain(|test| file.contains(text) || test.contains(text));
        if !tests.is_empty() {
            run.push((file.as_str(), tests));
        }
    }
    ensure!(
        !run.is_empty(),
        "no file and no test has `{text}` in its name"
    );
    Ok(run)
}

/// The names of a program's tests.
fn names(program: &Path) -> Result<Vec<String>> {
    let mut list = std::process::Command::new(program);
    let said = String::from_utf8(shell::output(list.args(["--list", "--format", "terse"]))?)?;
    let names = said.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// The programs of tests/tests by the names of their files, built.
fn programs() -> Result<Programs> {
    let mut cargo = shell::cargo();
    cargo.args(["test", "--quiet", "--package", "malla-testbed", "--tests"]);
    cargo.args(["--no-run", "--message-format", "json"]);
    let said = String::from_utf8(shell::output(&mut cargo)?)?;
    let mut programs = Programs::new();
    for line in said.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let name = message["target"]["name"].as_str();
        let is_test = message["target"]["kind"][0] == "test";
        if let (Some(name), Some(program), true) = (name, message["executable"].as_str(), is_test) {
            programs.insert(name.to_owned(), PathBuf::from(program));
        }
    }
    Ok(programs)
}
