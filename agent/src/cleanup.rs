//! `malla agent --cleanup`: takes away what the agents of this node leave on purpose, and says what.
//!
//! What it needs of the configuration is two folders. Where the file is bad or missing it looks for
//! them elsewhere, and says what it has chosen.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::bail;

use crate::{discovery::file, steer};

/// What the command line says.
#[derive(Debug)]
pub struct Options {
    pub config: Option<PathBuf>,
    pub node: Option<String>,
    /// The node's bpffs folder, said outright.
    pub bpffs: Option<PathBuf>,
}

/// What is cleaned up, and why that.
#[derive(Debug)]
struct Choice {
    bpffs: PathBuf,
    cgroup: Option<PathBuf>,
    why: String,
}

/// Cleans up and prints what was done, a line each.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let Some(choice) = choose(options)? else {
        println!("no agent has left anything on a bpffs: nothing to remove");
        return Ok(());
    };
    println!("cleaning up {} ({})", choice.bpffs.display(), choice.why);
    let cleaned = steer::cleanup(&choice.bpffs, choice.cgroup.as_deref()).await?;
    for what in &cleaned {
        println!("{what}");
    }
    if cleaned.is_empty() {
        println!("nothing to remove");
    }
    Ok(())
}

fn choose(options: &Options) -> anyhow::Result<Option<Choice>> {
    let doubt = match &options.config {
        None => "no --config".to_owned(),
        Some(config) => match configured(config, options.node.as_deref())? {
            Ok(choice) => return Ok(Some(choice)),
            Err(doubt) => doubt,
        },
    };
    if let Some(bpffs) = &options.bpffs {
        return Ok(Some(Choice {
            bpffs: bpffs.clone(),
            cgroup: None,
            why: format!("{doubt}; --bpffs says so"),
        }));
    }
    let mut found = steer::folders_of_agents();
    if found.len() > 1
        && let Some(node) = &options.node
    {
        found.retain(|folder| folder.file_name().is_some_and(|name| *name == **node));
    }
    match &found[..] {
        [] => Ok(None),
        [bpffs] => Ok(Some(Choice {
            bpffs: bpffs.clone(),
            cgroup: None,
            why: format!("{doubt}; the only folder that an agent has left something in"),
        })),
        _ => bail!(
            "{doubt}, and agents have left something in several folders ({}): say which by --bpffs",
            list(&found)
        ),
    }
}

/// What the file says of the node; where it is bad or missing, maybe why it says nothing.
fn configured(config: &Path, node: Option<&str>) -> anyhow::Result<Result<Choice, String>> {
    let path = config.display();
    let text = match fs::read_to_string(config) {
        Ok(text) => text,
        Err(error) => return Ok(Err(format!("can't read {path}: {error}"))),
    };
    let fault = file::check(config, &text).err().map(|error| {
        let said = error.to_string();
        format!("bad: {}", said.lines().next().unwrap_or_default())
    });
    let nodes = file::node_folders(&text);
    let mut fitting = nodes
        .iter()
        .filter(|entry| node.is_none_or(|name| *name == entry.name));
    let found = match (fitting.next(), fitting.next()) {
        (Some(entry), None) => Ok(Choice {
            bpffs: entry.bpffs.clone(),
            cgroup: Some(entry.cgroup.clone()),
            why: format!("node {} of {path}", entry.name),
        }),
        (None, _) => Err(format!("{path} has no such node")),
        _ => Err(format!("{path} has several nodes, and there is no --node")),
    };
    match (found, fault) {
        (Ok(choice), Some(fault)) => Ok(Ok(Choice {
            why: format!("{}, which is {fault}", choice.why),
            ..choice
        })),
        (Err(doubt), Some(fault)) => Ok(Err(format!("{doubt}; it is {fault}"))),
        (Err(doubt), None) => {
            let names: Vec<&str> = nodes.iter().map(|entry| entry.name.as_str()).collect();
            bail!("{doubt} (there are: {names:?}): set --node to one of them")
        }
        (found, None) => Ok(found),
    }
}

fn list(folders: &[PathBuf]) -> String {
    let folders = folders.iter().map(|folder| folder.display().to_string());
    folders.collect::<Vec<_>>().join(", ")
}
