//! Pods that swallow what is sent to them.

use anyhow::Result;

use crate::pod::Pod;

impl Pod {
    /// Swallows what would open a connection to one of its ports, whoever sends it.
    pub fn swallow_openings(&self, port: u16) -> Result<()> {
        self.swallow(&format!("tcp dport {port} tcp flags & (syn | ack) == syn"))
    }

    /// Swallows all that comes to one of its ports.
    pub fn swallow_all(&self, port: u16) -> Result<()> {
        self.swallow(&format!("tcp dport {port}"))
    }

    fn swallow(&self, what: &str) -> Result<()> {
        let rules = format!(
            "table inet deaf {{ chain in {{ type filter hook input priority 0;\n{what} drop\n}}\n}}\n"
        );
        self.command(["nft", "-f", "-"]).input(rules).run()?;
        Ok(())
    }
}
