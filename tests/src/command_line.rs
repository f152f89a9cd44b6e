//! `malla` as a user calls it on a node.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    bed::Testbed,
    node::Node,
    process::{Output, binary},
};

impl Node {
    /// Runs `malla` to its end, whatever that is.
    pub fn malla(&self, arguments: &[&str]) -> Result<Output> {
        let program = binary("malla")?.display().to_string();
        let line = std::iter::once(program.as_str()).chain(arguments.iter().copied());
        self.command(line).output()
    }
}

impl Testbed {
    /// [`Node::malla`] with the words that say which agent is meant: the node's own.
    pub fn try_ask(&self, node: &Node, arguments: &[&str]) -> Result<Output> {
        let config = self.mesh_path().display().to_string();
        let which = ["--config", &config, "--node", node.name()];
        node.malla(&[arguments, &which].concat())
    }

    /// What a command of [`Self::try_ask`] says, which must be a success.
    pub fn ask(&self, node: &Node, arguments: &[&str]) -> Result<String> {
        self.try_ask(node, arguments)?.succeeded()
    }

    /// [`Self::ask`] for JSON.
    pub fn ask_json(&self, node: &Node, arguments: &[&str]) -> Result<Value> {
        let told = self.ask(node, &[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&told).with_context(|| format!("{arguments:?}: {told}"))
    }
}

impl Output {
    /// What was said in success, with no word of complaint.
    pub fn succeeded(self) -> Result<String> {
        ensure!(
            self.status.success() && self.stderr.is_empty(),
            "{}: {}{}",
            self.status,
            self.stderr,
            self.stdout
        );
        Ok(self.stdout)
    }
}
