//! The namespaces and programs of one scenario.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use malla_testbed::{Agent, Capture, Node, Pod, PodSpec, Process, Testbed, nginx, until};

use super::{envoy, haproxy, scenario::Scenario};

/// The server pod's ports: nginx with HTTP/1.1, with HTTP/2, and iperf3.
pub(super) const WEB: u16 = 80;
const HTTP2: u16 = 81;
const BULK: u16 = 5201;
pub(super) const PORTS: [u16; 3] = [WEB, HTTP2, BULK];

/// What other proxies add to a port of the server for its way between the nodes.
pub(super) const BETWEEN: u16 = 10_000;

/// What nginx serves, in bytes.
pub(super) const BODY: usize = 1024;

/// How long a proxy may take until it listens.
pub(super) const START_LIMIT: Duration = Duration::from_secs(10);

/// How long an agent may try the kernel's acceleration.
const TRIAL_LIMIT: Duration = Duration::from_secs(30);

/// Which processor does what; any where there is none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pins {
    /// The client's and the server's.
    pub(super) ends: Option<usize>,
    /// Both proxies'.
    pub(super) proxies: Option<usize>,
}

impl Pins {
    pub(super) const NONE: Self = Self {
        ends: None,
        proxies: None,
    };
    pub(super) const TWO: Self = Self {
        ends: Some(0),
        proxies: Some(1),
    };
}

/// The programs of what is compared that the machine doesn't have from Debian.
#[derive(Debug, Default)]
pub(super) struct Programs {
    pub(super) malla: Option<PathBuf>,
    pub(super) envoy: Option<PathBuf>,
}

/// A scenario that stands. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Scene {
    /// nginx, iperf3 and other proxies than malla's: ended before the bed.
    _programs: Vec<Process>,
    pub(super) client: Arc<Pod>,
    /// What the client asks for nginx and for iperf3.
    pub(super) web: SocketAddr,
    pub(super) http2: SocketAddr,
    pub(super) bulk: SocketAddr,
    pub(super) proxies: Vec<i32>,
    pub(super) pins: Pins,
    /// The client's and the server's, or both's.
    nodes: Vec<Arc<Node>>,
    has_agents: bool,
    pub(super) bed: Testbed,
}

impl Scene {
    pub(super) fn set_up(scenario: Scenario, pins: Pins, programs: &Programs) -> Result<Self> {
        let mut bed = Testbed::new("bench")?.with_agents_on_cpu(pins.proxies);
        let mut nodes = vec![bed.node("a")?];
        if !scenario.is_one_node() {
            nodes.push(bed.node("b")?);
        }
        let has_agents = scenario.has_agent();
        let spec = |name| {
            let spec = PodSpec::new(name);
            if has_agents { spec } else { spec.unlisted() }
        };
        let client = bed.pod(&nodes[0], spec("client"))?;
        let server = PORTS.into_iter().fold(spec("server"), PodSpec::port);
        let server = bed.pod(nodes.last().context("a node")?, server)?;
        let mut running = serve(&server, bed.folder(), pins)?;
        let mut destination = IpAddr::from(server.v4());
        let mut proxies = Vec::new();
        let others = match scenario {
            Scenario::HaproxyTcpMtls => haproxy::start(&nodes, destination, bed.folder(), pins)?,
            Scenario::EnvoyTcpMtls => {
                let program = programs.envoy.as_ref().context("no Envoy to measure")?;
                envoy::start(program, &nodes, destination, bed.folder(), pins)?
            }
            _ => Vec::new(),
        };
        if !others.is_empty() {
            proxies.extend(others.iter().map(Process::pid));
            destination = nodes[0].addresses()[0];
            running.extend(others);
        }
        if has_agents {
            let malla = programs.malla.as_ref().context("no agent to measure")?;
            bed = bed.with_agent_program(malla);
            if let Some(mode) = scenario.mode() {
                bed = bed.with_settings(format!("accelerate: {mode}"));
            }
            bed.start_agents()?;
            if let Some(mode) = scenario.mode() {
                for node in &nodes {
                    wait_in_force(bed.agent(node), mode)?;
                }
            }
            proxies.extend(nodes.iter().map(|node| bed.agent(node).process().pid()));
        }
        Ok(Self {
            _programs: running,
            client,
            web: SocketAddr::new(destination, WEB),
            http2: SocketAddr::new(destination, HTTP2),
            bulk: SocketAddr::new(destination, BULK),
            proxies,
            pins,
            nodes,
            has_agents,
            bed,
        })
    }

    /// Ends the agents as an upgrade would, which takes as long as connections live.
    pub(super) fn stop_agents(&self) -> Result<()> {
        for node in &self.nodes {
            self.bed.agent(node).stop()?;
        }
        Ok(())
    }

    /// Captures what passes between the nodes, where there are two.
    pub(super) fn capture(&self) -> Result<Option<Capture>> {
        let [client, server] = self.nodes.as_slice() else {
            return Ok(None);
        };
        self.bed.capture_wire(client, server).map(Some)
    }

    /// Connections that the client's agent has carried, where there is one.
    pub(super) fn carried(&self) -> Result<Option<f64>> {
        if !self.has_agents {
            return Ok(None);
        }
        let metrics = self.bed.agent(&self.nodes[0]).metrics()?;
        Ok(Some(
            metrics.sum("tcp_open_total", &[("direction", "outbound")]),
        ))
    }
}

/// Waits until an agent accelerates its pods as it is told to: it tries the kernel first. Fails where
/// the kernel may not, so that nothing is measured under another name.
fn wait_in_force(agent: &Agent, mode: &str) -> Result<()> {
    until(&format!("acceleration `{mode}`"), TRIAL_LIMIT, || {
        let metrics = agent.metrics().ok()?;
        let pods = metrics.sum("malla_acceleration_pods", &[("mode", mode)]);
        (pods > 0.0).then_some(())
    })
}

/// Starts nginx and an iperf3 server.
fn serve(server: &Pod, folder: &Path, pins: Pins) -> Result<Vec<Process>> {
    let web = serve_web(server, folder, pins)?;
    let iperf = ["iperf3".to_owned(), "-s".to_owned(), format!("-p{BULK}")];
    let bulk = server.command(iperf).on_cpu(pins.ends).spawn()?;
    server.wait_listening(BULK).with_context(|| bulk.log())?;
    Ok(vec![web, bulk])
}

/// Starts nginx.
pub(super) fn serve_web(server: &Pod, folder: &Path, pins: Pins) -> Result<Process> {
    let folder = folder.join(format!("nginx-{}", server.name()));
    let root = folder.join("root");
    fs::create_dir_all(&root)?;
    fs::write(root.join("index.html"), "x".repeat(BODY))?;
    let nginx = nginx(server, &folder, &http_of(&root))?;
    let nginx = nginx.on_cpu(pins.ends).spawn()?;
    server.wait_listening(WEB).with_context(|| nginx.log())?;
    Ok(nginx)
}

/// A server that does nothing but answer: no file is opened again, and no connection ended but by the
/// client.
fn http_of(root: &Path) -> String {
    let root = root.display();
    format!(
        "sendfile off;\n\
         open_file_cache max=10;\n\
         keepalive_requests 1000000000;\n\
         keepalive_timeout 5m;\n\
         server {{\n\
         listen {WEB} backlog=4096; listen {HTTP2} http2; root {root};\n\
         }}"
    )
}
