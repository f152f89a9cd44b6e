//! Which tests run in the VM.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use malla_testbed::kernel::ACCELERATES;

use crate::{ebpf, packages, shell, workspace};

use super::script::Script;

/// Tests that run where none are named.
struct Chosen {
    /// Of tests/tests.
    file: &'static str,
    /// The first kernel that can do what they are about.
    since: (u32, u32),
    tests: &'static [&'static str],
}

/// Emulation takes ten to twenty times as long as the machine itself, and a run at most six minutes:
/// so it is one story of all that is asked of a kernel, and the part of acceleration that hangs on the
/// kernel's own code. Left out is what asks the same again, what the agent alone decides (identities,
/// limits, the command line), and what measures time or needs a thousand connections.
const CHOSEN: &[Chosen] = &[
    Chosen {
        file: "kernel",
        since: (0, 0),
        tests: &["a_kernel_does_what_is_asked_of_it_from_the_first_agent_to_the_cleanup"],
    },
    // Debian's kernels give huge pages to who doesn't ask, the machine's may not.
    Chosen {
        file: "memory",
        since: (0, 0),
        tests: &["an_agent_at_rest_gives_back_what_its_start_took"],
    },
    Chosen {
        file: "accelerate",
        since: ACCELERATES,
        tests: &[
            "bulk_data_is_exact_whether_its_reader_keeps_up_or_not",
            "a_reset_is_a_reset_on_either_side",
            "a_writer_whose_reader_stalls_is_stopped",
        ],
    },
    Chosen {
        file: "accelerate_apps",
        since: ACCELERATES,
        tests: &[
            "two_pods_with_one_four_tuple_read_their_own",
            "haproxy_carries_bytes_between_accelerated_connections_and_splices_where_it_may_try",
        ],
    },
    Chosen {
        file: "accelerate_limits",
        since: ACCELERATES,
        tests: &[
            "an_app_that_closes_with_bytes_unread_resets_its_peer",
            "kernel_tls_and_zero_copy_are_refused_to_accelerated_sockets_alone",
            "a_splice_from_an_accelerated_socket_is_refused_or_finds_nothing_and_a_read_does",
            "what_is_spliced_and_sent_of_a_file_into_an_accelerated_socket_is_the_file",
        ],
    },
];

/// Builds the tests, and says how to run on a kernel of `release` those that are chosen, or all whose
/// file or name contains `text`, with those marked as ignored where `long` ones are to run.
pub(super) fn script(text: Option<&str>, long: bool, release: (u32, u32)) -> Result<Script> {
    packages::ensure(packages::FOR_TESTS, "testing")?;
    ebpf::build()?;
    let agent = agent()?.display().to_string();
    let mut body = format!("export MALLA_BIN={}\ncode=0\n", shell::quote(&[agent]));
    let can_run = || CHOSEN.iter().filter(|chosen| chosen.since <= release);
    let files: Vec<&str> = match text {
        None => can_run().map(|chosen| chosen.file).collect(),
        Some(_) => Vec::new(),
    };
    let programs = programs(&files)?;
    let run = match text {
        None => chosen(&programs, can_run())?,
        Some(text) => containing(&programs, text)?,
    };
    for (file, tests) in run {
        // One at a time: how long they wait is meant for a whole machine.
        let program = programs[file].display().to_string();
        let mut words = vec![
            program.as_str(),
            "--test-threads=1",
            "--color=never",
            // A story tells how far it has come, which shows where a slow machine's time goes.
            "--nocapture",
            "--exact",
        ];
        words.extend(long.then_some("--include-ignored"));
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
type Run<'a> = Vec<(&'a str, Vec<String>)>;

fn chosen<'a>(programs: &'a Programs, of: impl Iterator<Item = &'a Chosen>) -> Result<Run<'a>> {
    let mut run = Vec::new();
    for Chosen { file, tests, .. } in of {
        let program = programs
            .get(*file)
            .with_context(|| format!("there is no tests/tests/{file}.rs"))?;
        let there_are = names(program)?;
        for test in *tests {
            let is_there = there_are.iter().any(|name| name == test);
            ensure!(is_there, "tests/tests/{file}.rs has no test {test}");
        }
        let tests = tests.iter().map(|test| (*test).to_owned());
        run.push((*file, tests.collect()));
    }
    Ok(run)
}

fn containing<'a>(programs: &'a Programs, text: &str) -> Result<Run<'a>> {
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

/// The programs of `files` of tests/tests by their names, built; of all files where there is none.
fn programs(files: &[&str]) -> Result<Programs> {
    let mut cargo = shell::cargo();
    cargo.args(["test", "--quiet", "--package", "malla-testbed"]);
    if files.is_empty() {
        cargo.arg("--tests");
    }
    for file in files {
        cargo.args(["--test", file]);
    }
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
