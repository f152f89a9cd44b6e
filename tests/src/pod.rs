//! A pod: a network namespace on its node's bridge, with a cgroup below the node's.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    caller::{Caller, EchoApp},
    capture::Capture,
    cgroup,
    netns::Netns,
    node::{Network, Node},
    process::{Place, works_inside},
    raw::RawSender,
    sockets::{self, TcpSocket, TcpState},
    spec::{Families, PodSpec},
    wait::eventually,
};

/// How long [`Pod::connect`] and what it returns wait.
const STREAM_LIMIT: Duration = Duration::from_secs(20);

/// A pod of a bed.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    settings: Mutex<String>,
    node: Arc<Node>,
    netns: Netns,
    addresses: Vec<IpAddr>,
    place: Place,
    cgroup: PathBuf,
}

works_inside!(Pod);

impl Pod {
    /// `host` is the pod's number, unique on its node and at least 2.
    pub(crate) fn create(node: &Arc<Node>, spec: PodSpec, host: u16) -> Result<Self> {
        let node_place = node.place();
        let netns = Netns::create(format!("{}-pod-{}", node_place.bed, spec.name))?;
        netns.sysctls(&[
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
        ])?;
        if spec.families == Families::V4Disabled6 {
            netns.sysctls(&[
                ("ipv6/conf/all/disable_ipv6", "1"),
                ("ipv6/conf/default/disable_ipv6", "1"),
            ])?;
        }
        let mut addresses = Vec::new();
        for bridge in 0..=u8::from(spec.second_interface) {
            addresses.extend(connect(node, &netns, &spec, bridge, host)?);
        }
        let cgroup = node.cgroup().join(format!("pod-{}", spec.name));
        cgroup::create(&cgroup)?;
        let place = Place {
            netns: netns.path().to_owned(),
            cgroup: cgroup.clone(),
            ..node_place.clone()
        };
        Ok(Self {
            settings: Mutex::new(spec.settings.clone()),
            spec,
            node: Arc::clone(node),
            netns,
            addresses,
            place,
            cgroup,
        })
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The workload's settings as they are now, as lines of YAML.
    pub(crate) fn settings(&self) -> String {
        let settings = self.settings.lock();
        settings.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn change_settings(&self, yaml: &str) {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        yaml.clone_into(&mut settings);
    }

    /// Every address, link-local ones left out: IPv4 before IPv6, the first interface first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The IPv4 address. Panics if the pod has none.
    pub fn v4(&self) -> Ipv4Addr {
        let found = self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        found.unwrap_or_else(|| panic!("pod {} has no IPv4 address", self.name()))
    }

    /// The IPv6 address. Panics if the pod has none.
    pub fn v6(&self) -> Ipv6Addr {
        let found = self.addresses.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        found.unwrap_or_else(|| panic!("pod {} has no IPv6 address", self.name()))
    }

    /// Opens a connection from the pod. Connecting, reads and writes time out after 20 s.
    ///
    /// A connection that its agent resets at once may be told as an error here or by the first
    /// read, as the kernel likes.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = self.enter(|| TcpStream::connect_timeout(&to, STREAM_LIMIT))?;
        stream.set_read_timeout(Some(STREAM_LIMIT))?;
        stream.set_write_timeout(Some(STREAM_LIMIT))?;
        Ok(stream)
    }

    /// A client in the pod, about to connect.
    pub fn caller(&self) -> Caller<'_> {
        Caller::new(&self.netns)
    }

    /// Starts an app in the pod that sends back what it receives.
    pub fn echo(&self, port: u16) -> Result<EchoApp> {
        EchoApp::start(&self.netns, port)
    }

    /// Captures what passes the pod's first interface.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.netns, "eth0")
    }

    /// Sends packets of one's own making from the pod.
    pub fn raw_sender(&self) -> Result<RawSender<'_>> {
        RawSender::new(&self.netns)
    }

    /// Waits until something in the pod listens on a TCP port, without connecting to it.
    pub fn wait_listening(&self, port: u16) -> Result<()> {
        let what = format!("a listener on port {port} of pod {}", self.name());
        eventually(&what, Duration::from_secs(20), || self.listens_on(port))
    }

    /// Whether a TCP socket of the pod listens on `port`, on whatever address.
    pub fn listens_on(&self, port: u16) -> bool {
        let mut sockets = self.sockets().into_iter();
        sockets.any(|socket| socket.state == TcpState::Listen && socket.local.port() == port)
    }

    /// The TCP sockets in the pod's network namespace, the agent's included.
    pub fn sockets(&self) -> Vec<TcpSocket> {
        self.enter(sockets::list)
    }

    /// Kills every process of the pod.
    pub fn kill_processes(&self) -> Result<()> {
        cgroup::kill_all(&self.cgroup)
    }

    /// Ends the pod: its processes, its namespace's name, its cgroup. The namespace itself goes
    /// when nobody holds it any more.
    pub(crate) fn remove(&self) -> Result<()> {
        cgroup::remove(&self.cgroup)?;
        self.netns.remove();
        Ok(())
    }
}

/// Gives the pod an interface on one of its node's bridges, and returns its addresses.
fn connect(node: &Node, pod: &Netns, spec: &PodSpec, bridge: u8, host: u16) -> Result<Vec<IpAddr>> {
    let network = Network {
        node: node.index,
        bridge,
    };
    let (mtu, port) = (spec.mtu, format!("pod{host}-{bridge}"));
    node.netns()
        .ip(&format!(
            "link add {port} mtu {mtu} type veth peer name eth{bridge} mtu {mtu} netns {pod}\n\
             link set {port} master br{bridge} up\n",
            pod = pod.name()
        ))
        .with_context(|| format!("connecting pod {}", spec.name))?;
    let mut addresses = Vec::new();
    let mut lines = format!("link set eth{bridge} up\n");
    if spec.families.has_v4() {
        let (own, gateway) = (network.v4(host), network.v4(1));
        lines += &format!("addr add {own}/16 dev eth{bridge}\n");
        if bridge == 0 {
            lines += &format!("route add default via {gateway}\n");
        }
        addresses.push(own.into());
    }
    if spec.families.has_v6() {
        let (own, gateway) = (network.v6(host), network.v6(1));
        lines += &format!("addr add {own}/64 dev eth{bridge} nodad\n");
        if bridge == 0 {
            lines += &format!("route add default via {gateway}\n");
        }
        addresses.push(own.into());
    }
    pod.ip(&lines)?;
    pod.wait_addresses_settled()?;
    Ok(addresses)
}
