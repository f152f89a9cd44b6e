//! The bed: what a test starts from.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::Agent,
    capture::Capture,
    forwarder::WireStats,
    leftovers::Claim,
    link::{self, Link, Linked},
    mesh_file::{self, MeshWide},
    netns::Netns,
    node::Node,
    pod::Pod,
    process::{self, replace_file},
    spec::PodSpec,
};

/// The number of a node's first pod: below are the bridge's own address and room for a test's.
const FIRST_POD: u16 = 10;

/// Nodes, pods and agents of one test. Dropping it removes all of it.
#[derive(Debug)]
pub struct Testbed {
    // Fields are dropped in this order: the claim removes what is left of everything else.
    agents: HashMap<String, Agent>,
    pods: Vec<Arc<Pod>>,
    links: Vec<Linked>,
    nodes: Vec<Arc<Node>>,
    link: Link,
    wire_mtu: u32,
    mesh: MeshWide,
    agent_program: Option<PathBuf>,
    agent_arguments: Vec<String>,
    agent_cpu: Option<usize>,
    agents_started: bool,
    next_pod: u16,
    claim: Claim,
}

impl Testbed {
    /// An empty bed. `name` makes its namespaces easy to recognise; it needn't be unique.
    ///
    /// Removes what beds of dead owners left behind first.
    pub fn new(name: &str) -> Result<Self> {
        let claim = Claim::new(name)?;
        Ok(Self {
            agents: HashMap::new(),
            pods: Vec::new(),
            links: Vec::new(),
            nodes: Vec::new(),
            link: Link::Veth,
            wire_mtu: 1500,
            mesh: MeshWide::default(),
            agent_program: None,
            agent_arguments: Vec::new(),
            agent_cpu: None,
            agents_started: false,
            next_pod: FIRST_POD,
            claim,
        })
    }

    /// How nodes made from now on are linked to those that there are; a veth pair by default.
    #[must_use]
    pub fn with_link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// The MTU of links between nodes made from now on, in bytes (1500).
    #[must_use]
    pub fn with_wire_mtu(mut self, mtu: u32) -> Self {
        self.wire_mtu = mtu;
        self
    }

    /// The settings of the whole mesh: lines of YAML, such as `mtls: strict`.
    #[must_use]
    pub fn with_settings(mut self, yaml: impl Into<String>) -> Self {
        self.mesh.settings = yaml.into();
        self
    }

    /// The settings of one namespace, as lines of YAML.
    #[must_use]
    pub fn with_namespace(mut self, name: impl Into<String>, settings: impl Into<String>) -> Self {
        self.mesh.namespaces.push((name.into(), settings.into()));
        self
    }

    /// How long the agents' certificates are valid, such as `24h`, the default.
    #[must_use]
    pub fn with_certificate_lifetime(mut self, lifetime: impl Into<String>) -> Self {
        self.mesh.certificate_lifetime = lifetime.into();
        self
    }

    #[must_use]
    pub fn with_trust_domain(mut self, trust_domain: impl Into<String>) -> Self {
        self.mesh.trust_domain = trust_domain.into();
        self
    }

    /// More arguments for every agent started from now on, such as `--log-ebpf debug`.
    #[must_use]
    pub fn with_agent_arguments<S: Into<String>>(
        mut self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        self.agent_arguments
            .extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The program that agents started from now on are, in place of [`process::binary`]'s.
    #[must_use]
    pub fn with_agent_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.agent_program = Some(program.into());
        self
    }

    /// The only processor that agents started from now on run on; any by default.
    #[must_use]
    pub fn with_agents_on_cpu(mut self, cpu: impl Into<Option<usize>>) -> Self {
        self.agent_cpu = cpu.into();
        self
    }

    /// The bed's name, which everything of it bears.
    pub fn name(&self) -> &str {
        &self.claim.bed
    }

    /// The bed's folder: the mesh file, identities, logs.
    pub fn folder(&self) -> &Path {
        &self.claim.folder
    }

    /// The file that the agents read.
    pub fn mesh_path(&self) -> PathBuf {
        self.claim.folder.join("mesh.yaml")
    }

    /// Makes a node, linked to every other. Its name has at most 12 letters, digits and `-`.
    pub fn node(&mut self, name: &str) -> Result<Arc<Node>> {
        ensure!(
            name.len() <= 12 && self.nodes.iter().all(|node| node.name() != name),
            "node name `{name}` is too long or taken"
        );
        let index = u8::try_from(self.nodes.len() + 1)?;
        ensure!(index <= 50, "no addresses for more than 50 nodes");
        let node = Arc::new(Node::create(&self.claim, name, index)?);
        for other in &self.nodes {
            let linked = Linked::create(other, &node, self.link, self.wire_mtu)?;
            self.links.push(linked);
        }
        self.nodes.push(Arc::clone(&node));
        self.update_mesh()?;
        Ok(node)
    }

    /// Makes a pod. Agents that run learn of it.
    pub fn pod(&mut self, node: &Arc<Node>, spec: PodSpec) -> Result<Arc<Pod>> {
        Ok(self.pods(node, [spec])?.remove(0))
    }

    /// Makes many pods of one node, of which agents that run learn at once.
    pub fn pods(
        &mut self,
        node: &Arc<Node>,
        specs: impl IntoIterator<Item = PodSpec>,
    ) -> Result<Vec<Arc<Pod>>> {
        let specs: Vec<_> = specs.into_iter().zip(self.next_pod..).collect();
        let mut names: HashSet<&str> = self.pods.iter().map(|pod| pod.name()).collect();
        for (spec, _) in &specs {
            let is_new = names.insert(&spec.name);
            ensure!(is_new, "pod name `{}` is taken", spec.name);
        }
        self.next_pod += u16::try_from(specs.len())?;
        let pods = Pod::create_all(node, specs)?.into_iter().map(Arc::new);
        let pods: Vec<_> = pods.collect();
        for address in pods.iter().flat_map(|pod| &pod.spec().addresses) {
            link::route_address(&self.nodes, node, *address)?;
        }
        self.pods.extend(pods.iter().map(Arc::clone));
        self.update_mesh()?;
        Ok(pods)
    }

    /// Ends a pod: its processes, its namespace's name, its place in the mesh file.
    pub fn remove_pod(&mut self, pod: &Pod) -> Result<()> {
        self.remove_pods([pod])
    }

    /// Ends many pods, of which agents that run learn at once.
    pub fn remove_pods<'a>(&mut self, pods: impl IntoIterator<Item = &'a Pod>) -> Result<()> {
        for pod in pods {
            self.pods.retain(|other| other.name() != pod.name());
            pod.remove()?;
        }
        self.update_mesh()
    }

    /// Takes a pod out of the mesh file, as when its node was lost, and leaves it as it is.
    pub fn forget_pod(&mut self, pod: &Pod) -> Result<()> {
        self.pods.retain(|other| other.name() != pod.name());
        self.update_mesh()
    }

    /// Ends a pod and makes one like it in its place, as when its sandbox is replaced: a new network
    /// namespace under the same name, with the same addresses. The mesh file stays as it is.
    pub fn replace_pod(&mut self, pod: &Pod) -> Result<Arc<Pod>> {
        pod.remove()?;
        let next = Arc::new(pod.recreate()?);
        let place = self.pods.iter_mut().find(|p| p.name() == next.name());
        *place.context("a pod that was removed")? = Arc::clone(&next);
        Ok(next)
    }

    /// Replaces the settings of one workload by other lines of YAML. Agents that run learn of it.
    pub fn change_settings(&self, pod: &Pod, yaml: &str) -> Result<()> {
        pod.change_settings(yaml);
        self.update_mesh()
    }

    /// Replaces the settings of the whole mesh by other lines of YAML.
    pub fn change_mesh_settings(&mut self, yaml: impl Into<String>) -> Result<()> {
        self.mesh.settings = yaml.into();
        self.update_mesh()
    }

    /// Makes a Service or replaces the one of this name: its other fields, as lines of YAML. Agents
    /// that run learn of it.
    pub fn service(&mut self, name: &str, yaml: impl Into<String>) -> Result<()> {
        let yaml = yaml.into();
        let known = self
            .mesh
            .services
            .iter_mut()
            .find(|(known, _)| known == name);
        match known {
            Some((_, fields)) => *fields = yaml,
            None => self.mesh.services.push((name.to_owned(), yaml)),
        }
        self.update_mesh()
    }

    /// Does something of which agents that run don't learn until the mesh file is written again.
    pub fn untold<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let told = std::mem::take(&mut self.agents_started);
        let result = work(self);
        self.agents_started = told;
        result
    }

    /// Makes one more network namespace, with nothing but its loopback in it.
    pub fn extra_netns(&self, name: &str) -> Result<Netns> {
        Netns::create(&format!("{}-{name}", self.name()))
    }

    /// The statistics of the wire between two nodes. An error where it is a veth pair.
    pub fn wire(&self, a: &Node, b: &Node) -> Result<WireStats> {
        let linked = self.links.iter().find(|linked| linked.joins(a, b));
        let forwarder = linked.and_then(|linked| linked.forwarder.as_ref());
        let forwarder = forwarder
            .with_context(|| format!("nodes {} and {} have no wire to ask", a.name(), b.name()))?;
        Ok(forwarder.stats())
    }

    /// Captures what passes the wire between two nodes, on the first one's interface.
    pub fn capture_wire(&self, a: &Node, b: &Node) -> Result<Capture> {
        Capture::start(a.netns(), &a.wire_to(b))
    }

    /// The mesh's configuration, made from what the bed has.
    pub fn mesh_yaml(&self) -> String {
        let nodes = self.nodes.iter().map(AsRef::as_ref);
        let pods = self.pods.iter().map(AsRef::as_ref);
        mesh_file::write(&self.claim, &self.mesh, nodes, pods)
    }

    /// Replaces the mesh file by [`Self::mesh_yaml`].
    pub fn write_mesh(&self) -> Result<()> {
        self.write_mesh_text(&self.mesh_yaml())
    }

    /// Replaces the mesh file by `text`, in one step.
    pub fn write_mesh_text(&self, text: &str) -> Result<()> {
        replace_file(&self.mesh_path(), text)
    }

    /// Takes a pod out of the mesh and leaves it running, until the mesh is written again.
    pub fn withdraw(&self, pod: &Pod) -> Result<()> {
        let text = self.mesh_yaml();
        let entry = format!("- name: {}\n", pod.name());
        let (head, tail) = text.split_once(&entry).context("the pod isn't there")?;
        let tail = tail.replacen("mesh: enabled", "mesh: disabled", 1);
        self.write_mesh_text(&format!("{head}{entry}{tail}"))
    }

    /// Starts an agent on every node that has none, and waits until they are ready.
    pub fn start_agents(&mut self) -> Result<()> {
        self.write_mesh()?;
        self.agents_started = true;
        for node in self.nodes.clone() {
            if !self.agents.contains_key(node.name()) {
                let agent = self.launch_agent(&node)?;
                self.agents.insert(node.name().to_owned(), agent);
            }
        }
        self.agents.values().try_for_each(Agent::wait_ready)
    }

    /// Starts an agent on a node and waits until it is ready. Returns the one from before, which
    /// may still be running.
    pub fn start_agent(&mut self, node: &Arc<Node>) -> Result<Option<Agent>> {
        self.write_mesh()?;
        self.agents_started = true;
        let agent = self.launch_agent(node)?;
        let ready = agent.wait_ready();
        let before = self.agents.insert(node.name().to_owned(), agent);
        ready.map(|()| before)
    }

    /// Starts an agent that takes the place of a node's, and waits until it has. Returns the one
    /// from before, which goes on with what it carries.
    pub fn upgrade_agent(&mut self, node: &Arc<Node>) -> Result<Agent> {
        let agent = Agent::start(node, self.agent_command(node)?.argument("--takeover"))?;
        agent.wait_in_charge()?;
        let before = self.agents.insert(node.name().to_owned(), agent);
        before.context("the node had no agent")
    }

    /// The agent of a node. Panics if none was started.
    pub fn agent(&self, node: &Node) -> &Agent {
        let agent = self.agents.get(node.name());
        agent.unwrap_or_else(|| panic!("no agent was started on node {}", node.name()))
    }

    /// The command line of a node's agent, as the bed starts it.
    pub fn agent_command(&self, node: &Node) -> Result<process::Command> {
        let program = match &self.agent_program {
            Some(program) => program.clone(),
            None => process::binary("malla")?,
        };
        let mut arguments = vec![
            program.into_os_string(),
            "agent".into(),
            "--config".into(),
            self.mesh_path().into_os_string(),
            "--node".into(),
            node.name().into(),
        ];
        arguments.extend(self.agent_arguments.iter().map(Into::into));
        Ok(node.command(arguments).on_cpu(self.agent_cpu))
    }

    fn launch_agent(&self, node: &Arc<Node>) -> Result<Agent> {
        Agent::start(node, self.agent_command(node)?)
    }

    fn update_mesh(&self) -> Result<()> {
        if self.agents_started {
            self.write_mesh()?;
        }
        Ok(())
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if thread::panicking() {
            for agent in self.agents.values() {
                eprintln!("{}\n", agent.log_tail());
            }
        }
        // Agents end first: they would report the end of everything else as faults.
        self.agents.clear();
        let _ = fs::remove_file(self.mesh_path());
    }
}
