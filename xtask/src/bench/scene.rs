//! The namespaces and programs of one scenario.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use malla_testbed::{Capture, Node, Pod, PodSpec, Process, Testbed};

use super::{haproxy, scenario::Scenario};

/// The server pod's ports.
pub(super) const WEB: u16 = 80;
pub(super) const BULK: u16 = 5201;

/// What nginx serves, in bytes.
pub(super) const BODY: usize = 1024;

/// How long a proxy may take until it listens.
pub(super) const START_LIMIT: Duration = Duration::from_secs(10);

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

/// A scenario that stands. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Scene {
    /// nginx, iperf3 and where there are some haproxies: ended before the bed.
    _programs: Vec<Process>,
    pub(super) client: Arc<Pod>,
    /// What the client asks for nginx and for iperf3.
    pub(super) web: SocketAddr,
    pub(super) bulk: SocketAddr,
    pub(super) proxies: Vec<i32>,
    pub(super) pins: Pins,
    nodes: [Arc<Node>; 2],
    bed: Testbed,
}

impl Scene {
    /// `malla` is the agent's program, which only its own scenario needs.
    pub(super) fn set_up(scenario: Scenario, pins: Pins, malla: Option<&Path>) -> Result<Self> {
        let mut bed = Testbed::new("bench")?.with_agents_on_cpu(pins.proxies);
        let nodes = [bed.node("a")?, bed.node("b")?];
        let spec = |name| match scenario {
            Scenario::Direct | Scenario::HaproxyTcpMtls => PodSpec::new(name).unlisted(),
            _ => PodSpec::new(name),
        };
        let client = bed.pod(&nodes[0], spec("client"))?;
        let server = bed.pod(&nodes[1], spec("server").port(WEB).port(BULK))?;
        let mut programs = serve(&server, bed.folder(), pins)?;
        let mut destination = IpAddr::from(server.v4());
        let proxies = match scenario {
            Scenario::Direct => Vec::new(),
            Scenario::HaproxyTcpMtls => {
                let pair = haproxy::start(&nodes, destination, bed.folder(), pins)?;
                let proxies = pair.iter().map(Process::pid).collect();
                destination = nodes[0].addresses()[0];
                programs.extend(pair);
                proxies
            }
            _ => {
                bed = bed.with_agent_program(malla.context("no agent to measure")?);
                bed.start_agents()?;
                let pid = |node| bed.agent(node).process().pid();
                nodes.iter().map(|node| pid(node)).collect()
            }
        };
        Ok(Self {
            _programs: programs,
            client,
            web: SocketAddr::new(destination, WEB),
            bulk: SocketAddr::new(destination, BULK),
            proxies,
            pins,
            nodes,
            bed,
        })
    }

    /// Captures what passes between the nodes.
    pub(super) fn capture(&self) -> Result<Capture> {
        self.bed.capture_wire(&self.nodes[0], &self.nodes[1])
    }
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
    let file = folder.join("nginx.conf");
    fs::write(&file, nginx_config(&folder, &root))?;
    let nginx = ["nginx".as_ref(), "-c".as_ref(), file.as_os_str()];
    let nginx = server.command(nginx).on_cpu(pins.ends).spawn()?;
    server.wait_listening(WEB).with_context(|| nginx.log())?;
    Ok(nginx)
}

/// One worker that does nothing but answer: no access log, no end of a connection but the
/// client's.
fn nginx_config(folder: &Path, root: &Path) -> String {
    let (folder, root) = (folder.display(), root.display());
    format!(
        "daemon off;\n\
         user root;\n\
         worker_processes 1;\n\
         worker_rlimit_nofile 20000;\n\
         pid {folder}/nginx.pid;\n\
         error_log stderr warn;\n\
         events {{ worker_connections 10000; }}\n\
         http {{\n\
         access_log off;\n\
         sendfile off;\n\
         open_file_cache max=10;\n\
         keepalive_requests 1000000000;\n\
         keepalive_timeout 5m;\n\
         server {{ listen {WEB} backlog=4096; root {root}; }}\n\
         }}\n"
    )
}
