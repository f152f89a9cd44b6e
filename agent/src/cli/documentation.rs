//! `malla completion` and `malla man`: what clap knows of the command line, for shells and readers.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, print};

#[derive(Debug, clap::Args)]
pub(super) struct Completion {
    /// The shell; `source <(malla completion bash)` uses it at once.
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(super) struct Man {
    /// Folder for the pages, made where it isn't there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub(super) fn complete(arguments: &Completion) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "malla", &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(super) fn write_pages(arguments: &Man) -> anyhow::Result<ExitCode> {
    let folder = &arguments.folder;
    let failed = || format!("can't write manual pages to {}", folder.display());
    fs::create_dir_all(folder).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(failed)?;
    Ok(ExitCode::SUCCESS)
}
