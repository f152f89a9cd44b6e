//! The scene of tests of Services: who calls which Service, over which endpoints.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Result;

use crate::{bed::Testbed, caller::EchoApp, node::Node, pod::Pod, scene::PORT, spec::PodSpec};

/// The cluster addresses of the Service `web`.
pub const WEB: [&str; 2] = ["10.96.0.10", "fd96::10"];
/// The only port of the Service `web`.
pub const WEB_PORT: u16 = 80;

/// A client on node `a` and endpoints of the Service `web`, with its app on each, on both nodes in
/// turn, beginning with `b`. Its agents aren't started.
#[derive(Debug)]
pub struct Services {
    pub bed: Testbed,
    pub nodes: [Arc<Node>; 2],
    pub client: Arc<Pod>,
    pub endpoints: Vec<Arc<Pod>>,
    /// Of each endpoint, in their order.
    pub apps: Vec<EchoApp>,
}

impl Services {
    /// A scene with so many meshed endpoints, `web-0` and so on.
    pub fn new(endpoints: usize) -> Result<Self> {
        Self::on(Testbed::new("services")?, endpoints)
    }

    /// The same on a bed that has no node yet.
    pub fn on(mut bed: Testbed, endpoints: usize) -> Result<Self> {
        let nodes = [bed.node("a")?, bed.node("b")?];
        let client = bed.pod(&nodes[0], PodSpec::new("client"))?;
        let mut services = Self {
            bed,
            nodes,
            client,
            endpoints: Vec::new(),
            apps: Vec::new(),
        };
        for place in 0..endpoints {
            let node = Arc::clone(&services.nodes[(place + 1) % 2]);
            services.endpoint(&node, PodSpec::new(format!("web-{place}")))?;
        }
        Ok(services)
    }

    /// One more endpoint, whose port [`PORT`] is named `http`, with its app.
    pub fn endpoint(&mut self, node: &Arc<Node>, spec: PodSpec) -> Result<()> {
        self.endpoint_on(node, spec.named_port("http", PORT), PORT)
    }

    /// One more endpoint, with its app on this port.
    pub fn endpoint_on(&mut self, node: &Arc<Node>, spec: PodSpec, port: u16) -> Result<()> {
        let pod = self.bed.pod(node, spec.label("app", "web"))?;
        self.apps.push(pod.echo(port)?);
        self.endpoints.push(pod);
        Ok(())
    }

    /// The Service over all pods with the label, with more fields as lines of YAML.
    pub fn web(&mut self, fields: &str) -> Result<()> {
        self.selecting("web", WEB, fields)
    }

    /// A Service like `web`, under another name and at other addresses.
    pub fn selecting(&mut self, name: &str, addresses: [&str; 2], fields: &str) -> Result<()> {
        let [v4, v6] = addresses;
        let yaml = format!(
            "addresses: [{v4}, \"{v6}\"]\n\
             ports: [{{port: {WEB_PORT}, targetPort: http}}]\n\
             selector: {{app: web}}\n{fields}"
        );
        self.bed.service(name, yaml)
    }

    /// The Service over these pods alone.
    pub fn web_over(&mut self, pods: &[&Pod]) -> Result<()> {
        let endpoints = pods.iter().map(|pod| {
            let [v4, v6] = [IpAddr::from(pod.v4()), pod.v6().into()];
            format!("- addresses: [{v4}, \"{v6}\"]\n")
        });
        let endpoints = endpoints.collect::<Vec<_>>().concat();
        let [v4, v6] = WEB;
        let yaml = format!(
            "addresses: [{v4}, \"{v6}\"]\n\
             ports: [{{port: {WEB_PORT}, targetPort: {PORT}}}]\n\
             endpoints:\n{endpoints}"
        );
        self.bed.service("web", yaml)
    }

    /// Gives endpoints more fields of a workload, each as a line of YAML by the endpoint's place.
    /// It holds until the bed writes the mesh file the next time.
    pub fn declare(&self, fields: &[(usize, &str)]) -> Result<()> {
        let mut text = self.bed.mesh_yaml();
        for (place, field) in fields {
            let head = format!("- name: {}\n", self.endpoints[*place].name());
            text = text.replace(&head, &format!("{head}  {field}\n"));
        }
        self.bed.write_mesh_text(&text)
    }

    /// How many connections each endpoint's app has accepted so far.
    pub fn accepted(&self) -> Vec<usize> {
        self.apps.iter().map(EchoApp::accepted).collect()
    }
}

/// A Service's only port at one of its addresses. Panics where `ip` is none.
pub fn service_address(ip: &str) -> SocketAddr {
    let ip = ip
        .parse()
        .unwrap_or_else(|_| panic!("`{ip}` is no address"));
    SocketAddr::new(ip, WEB_PORT)
}
