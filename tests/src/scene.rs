//! The scene of most tests: who calls whom.

use std::sync::Arc;

use anyhow::Result;

use crate::{bed::Testbed, caller::EchoApp, metrics::Metrics, node::Node, pod::Pod, spec::PodSpec};

/// The port of a scene's app.
pub const PORT: u16 = 8080;

/// Bytes that a test looks for on the wire.
pub const SECRET: &[u8] = b"plaintext that is looked for";

/// A meshed client on node `a`, and a meshed server with an echoing app on node `b`.
#[derive(Debug)]
pub struct Scene {
    pub bed: Testbed,
    pub a: Arc<Node>,
    pub b: Arc<Node>,
    pub client: Arc<Pod>,
    pub server: Arc<Pod>,
    pub app: EchoApp,
}

impl Scene {
    /// Starts all of it. The settings of both pods are lines of YAML; none are the defaults.
    pub fn new(client_settings: &str, server_settings: &str) -> Result<Self> {
        let mut bed = Testbed::new("scene")?;
        let (a, b) = (bed.node("a")?, bed.node("b")?);
        let client = PodSpec::new("client").settings(client_settings);
        let client = bed.pod(&a, client)?;
        let server = PodSpec::new("server").port(PORT).settings(server_settings);
        let server = bed.pod(&b, server)?;
        let app = server.echo(PORT)?;
        bed.start_agents()?;
        Ok(Self {
            bed,
            a,
            b,
            client,
            server,
            app,
        })
    }

    /// What the agent of a node counts now.
    pub fn metrics(&self, node: &Node) -> Result<Metrics> {
        self.bed.agent(node).metrics()
    }
}
