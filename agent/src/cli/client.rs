//! Finds the agent's unix socket and asks on it.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use super::{metrics::Metrics, view::Config};
use crate::{
    config::SOCKET_NAME,
    discovery::file,
    model::{Node, RUNTIME_FOLDERS},
};

/// How long each read may take: an agent that enrols many pods answers late.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which agent is meant.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Location {
    /// The agent's unix socket. Where neither this nor --node nor --config says which agent is
    /// meant, it is the only one that has a socket below /run/malla.
    #[arg(long, value_name = "FILE")]
    pub(super) socket: Option<PathBuf>,
    /// The mesh file.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Name of the agent's node in the mesh file.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub(super) node: Option<String>,
}

impl Location {
    /// The agent that is meant; whether it lives is seen when it is asked.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        let socket = match (&self.socket, &self.config, &self.node) {
            (Some(socket), _, _) => socket.clone(),
            (None, Some(config), node) => in_file(config, node.as_deref())?,
            (None, None, Some(node)) => Path::new(RUNTIME_FOLDERS).join(node).join(SOCKET_NAME),
            (None, None, None) => only_one_below(Path::new(RUNTIME_FOLDERS))?,
        };
        Ok(Client {
            socket,
            start: start_command(self.config.as_deref(), self.node.as_deref()),
        })
    }
}

/// How the user starts an agent.
fn start_command(config: Option<&Path>, node: Option<&str>) -> String {
    let config = config.map_or_else(|| "FILE".to_owned(), |config| config.display().to_string());
    let node = node.unwrap_or("NAME");
    format!("malla agent --config {config} --node {node}")
}

/// The socket of a node of the mesh file, which may be bad in other places.
fn in_file(config: &Path, node: Option<&str>) -> anyhow::Result<PathBuf> {
    let path = config.display();
    let text = fs::read_to_string(config).with_context(|| format!("can't read {path}"))?;
    let nodes = file::node_folders(&text);
    let names: Vec<&str> = nodes.iter().map(|entry| entry.name.as_str()).collect();
    let mut fitting = nodes
        .iter()
        .filter(|entry| node.is_none_or(|name| name == entry.name));
    match (fitting.next(), fitting.next(), node) {
        (Some(entry), None, _) => {
            let default = || Path::new(RUNTIME_FOLDERS).join(&entry.name);
            let folder = entry.runtime.clone().unwrap_or_else(default);
            Ok(folder.join(SOCKET_NAME))
        }
        (None, _, Some(node)) => bail!(
            "{path}: no node is named `{node}` (there are: {names:?}): set --node to one of them"
        ),
        (None, _, None) => bail!("{path} has no nodes that can be read: see `malla check`"),
        _ => bail!("{path} has several nodes ({names:?}): say which by --node"),
    }
}

/// The only socket of an agent in a folder of `folders`.
fn only_one_below(folders: &Path) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(folders).into_iter().flatten().flatten();
    let sockets = entries.map(|entry| entry.path().join(SOCKET_NAME));
    let is_socket = |path: &PathBuf| {
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
    };
    let mut sockets: Vec<PathBuf> = sockets.filter(is_socket).collect();
    sockets.sort_unstable();
    match &sockets[..] {
        [socket] => Ok(socket.clone()),
        [] => bail!(
            "no agent has a socket below {} that this user can see: start one with `malla agent`, \
             run this as root, or say where it is by --socket, or by --config and --node",
            folders.display()
        ),
        several => bail!(
            "several agents have sockets ({}): say which by --socket, or by --node",
            several
                .iter()
                .map(|socket| socket.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

/// An agent to be asked.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    start: String,
}

/// What an agent answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

impl Client {
    /// The agent of a node of the mesh file, which is `config` where that is known.
    pub(super) fn of_node(node: &Node, config: Option<&Path>) -> Self {
        Self {
            socket: node.runtime.join(SOCKET_NAME),
            start: start_command(config, Some(&node.name)),
        }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for a path, whatever the status of the answer.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Answer> {
        let socket = self.socket.display();
        let mut stream = UnixStream::connect(&self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "this user may not ask the agent at {socket}: run this as the agent's user (root)"
            ),
            _ => anyhow::anyhow!(
                "no agent answers at {socket} ({error}): start it with `{}`, or read in its log \
                 why it ended",
                self.start
            ),
        })?;
        exchange(&mut stream, path).with_context(|| format!("asking {socket} for {path}"))
    }

    /// What the agent now believes.
    pub(super) fn config(&self) -> anyhow::Result<Config> {
        let text = self.text("/config")?;
        serde_json::from_str(&text).with_context(|| {
            let socket = self.socket.display();
            format!("what {socket} says in /config isn't an agent's: is the socket malla's?")
        })
    }

    /// What the agent counts.
    pub(super) fn metrics(&self) -> anyhow::Result<Metrics> {
        Ok(Metrics::parse(&self.text("/metrics")?))
    }

    /// The text of a path that must be there.
    pub(super) fn text(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.get(path)?;
        ensure!(
            answer.status == 200,
            "the agent at {} answers {path} with {}: {}; try again when it has started",
            self.socket.display(),
            answer.status,
            answer.body.trim_end()
        );
        Ok(answer.body)
    }
}

fn exchange(stream: &mut UnixStream, path: &str) -> anyhow::Result<Answer> {
    stream.set_read_timeout(Some(PATIENCE))?;
    // With HTTP/1.0 the body is never chunked and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nhost: agent\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the answer has no end of its head")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok(Answer {
        status: status.context("the answer has no status")?,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::scratch::ScratchFolder;

    fn node(below: &ScratchFolder, name: &str) -> PathBuf {
        let folder = below.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder.join(SOCKET_NAME)
    }

    #[test]
    fn the_only_socket_is_found_and_several_are_named() {
        let scratch = ScratchFolder::new();
        let none = only_one_below(scratch.path()).unwrap_err().to_string();
        assert!(none.contains("--socket"), "{none}");
        fs::write(node(&scratch, "no-socket"), "").unwrap();
        let a = node(&scratch, "a");
        let _listener = UnixListener::bind(&a).unwrap();
        assert_eq!(only_one_below(scratch.path()).unwrap(), a);
        let b = node(&scratch, "b");
        let _other = UnixListener::bind(&b).unwrap();
        let several = only_one_below(scratch.path()).unwrap_err().to_string();
        for socket in [a, b] {
            assert!(several.contains(&socket.display().to_string()), "{several}");
        }
    }

    #[test]
    fn the_mesh_file_says_where_a_nodes_socket_is() {
        let scratch = ScratchFolder::new();
        let config = scratch.path().join("mesh.yaml");
        let node = |name: &str, more: &str| {
            format!("- {{name: {name}, addresses: [10.0.0.1], cgroup: /c, bpffs: /b{more}}}\n")
        };
        let write = |nodes: &str| fs::write(&config, format!("nodes:\n{nodes}workloads: 5\n"));
        write(&node("a", "")).unwrap();
        let default = in_file(&config, None).unwrap();
        assert_eq!(default, Path::new("/run/malla/a/agent.sock"));
        write(&(node("a", "") + &node("b", ", runtime: /elsewhere"))).unwrap();
        let named = in_file(&config, Some("b")).unwrap();
        assert_eq!(named, Path::new("/elsewhere/agent.sock"));
        for (node, said) in [(None, "--node"), (Some("c"), "`c`")] {
            let error = in_file(&config, node).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains("\"b\""), "{error}");
        }
    }
}
