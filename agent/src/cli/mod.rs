//! The command line.
//!
//! Each command has a file. Those that look at a mesh get their documents from the agent's unix
//! socket (`client`, read by `view` and `metrics`) and from the mesh file (`mesh`), turn them into
//! rows by functions of plain data, and print those with `table`.

mod agent;
mod check;
mod client;
mod diagnostics;
mod documentation;
mod edges;
mod endpoints;
mod explain;
mod mesh;
mod metrics;
mod stat;
mod style;
mod table;
mod version;
mod view;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::discovery;

/// A node-level service mesh: eBPF steers pods' TCP into one shared proxy per node.
#[derive(Debug, Parser)]
#[command(name = "malla", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of one node.
    Agent(agent::Arguments),
    /// Check all that must hold on this machine and in the running agent, with the fix beside what
    /// doesn't.
    Check(check::Arguments),
    /// Print what the agent counts, believes and holds, as it is.
    #[command(visible_alias = "dg", subcommand)]
    Diagnostics(diagnostics::Command),
    /// Who talks to whom, under which identities, and whether that is secured.
    Edges(edges::Arguments),
    /// Where the Services of the mesh lead.
    Endpoints(endpoints::Arguments),
    /// What would happen to a connection, by which rule, and what became of the last ones.
    Explain(explain::Arguments),
    /// What the pods of the agent's node carry.
    Stat(stat::Arguments),
    /// Print the versions of this program and of the running agent.
    Version(version::Arguments),
    /// Print the JSON schema of the configuration file.
    Schema,
    /// Print a script that completes this program's arguments in a shell.
    Completion(documentation::Completion),
    /// Write the manual pages of every command into a folder.
    Man(documentation::Man),
}

/// The form of what a command prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// [`Output`], where there is more to see than fits a narrow table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WideOutput {
    Table,
    Wide,
    Json,
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Agent(arguments) => agent::run(arguments).map(|()| ExitCode::SUCCESS),
        Command::Check(arguments) => check::run(&arguments),
        Command::Diagnostics(command) => diagnostics::run(&command),
        Command::Edges(arguments) => edges::run(&arguments),
        Command::Endpoints(arguments) => endpoints::run(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Stat(arguments) => stat::run(&arguments),
        Command::Version(arguments) => version::run(&arguments),
        Command::Schema => print(&discovery::file::json_schema()),
        Command::Completion(arguments) => documentation::complete(&arguments),
        Command::Man(arguments) => documentation::write_pages(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("malla: {error:#}");
        ExitCode::FAILURE
    })
}

/// Prints what a command has to say. Whoever reads it may have had enough (`| head`): no failure.
fn print(text: &str) -> anyhow::Result<ExitCode> {
    use std::io::{ErrorKind, Write};

    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("can't write the output"))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// [`print`] of a document as JSON.
fn print_json(document: &impl serde::Serialize) -> anyhow::Result<ExitCode> {
    print(&(serde_json::to_string_pretty(document)? + "\n"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }
}
