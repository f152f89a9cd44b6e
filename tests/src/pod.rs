//! A pod: a network namespace on its node's bridge, with a cgroup below the node's.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    caller::{Caller, EchoApp, same_family},
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

/// How many threads set up many pods.
const THREADS: usize = 4;

/// A pod of a bed.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    settings: Mutex<String>,
    host: u16,
    node: Arc<Node>,
    netns: Netns,
    addresses: Vec<IpAddr>,
    place: Place,
    cgroup: PathBuf,
}

works_inside!(Pod);

impl Pod {
    /// Makes pods of one node. Each comes with its number, unique on the node and at least 2.
    ///
    /// `ip` is told of many at once: to start it takes longer than what it does.
    pub(crate) fn create_all(node: &Arc<Node>, specs: Vec<(PodSpec, u16)>) -> Result<Vec<Self>> {
        let bed = &node.place().bed;
        let names = specs.iter().map(|(spec, _)| &spec.name);
        let names: Vec<String> = names.map(|name| format!("{bed}-pod-{name}")).collect();
        let netnses = Netns::create_all(&names)?;
        let mut lines = String::new();
        for ((spec, host), netns) in specs.iter().zip(&netnses) {
            prepare(netns, spec)?;
            for bridge in bridges(spec) {
                lines += &connect_lines(netns, spec, bridge, *host);
            }
        }
        node.netns().ip(&lines).context("connecting pods")?;
        let mut all: Vec<_> = specs.into_iter().zip(netnses).collect();
        let share = all.len().div_ceil(THREADS).max(1);
        let made: Result<Vec<Vec<Self>>> = thread::scope(|scope| {
            let shares = std::iter::from_fn(|| {
                let share: Vec<_> = all.drain(..share.min(all.len())).collect();
                (!share.is_empty()).then_some(share)
            });
            let threads: Vec<_> = shares
                .map(|share| {
                    scope.spawn(|| {
                        let pods = share.into_iter();
                        pods.map(|((spec, host), netns)| Self::finish(node, spec, host, netns))
                            .collect()
                    })
                })
                .collect();
            let made = threads.into_iter().map(|thread| {
                let joined = thread.join();
                joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            made.collect()
        });
        Ok(made?.into_iter().flatten().collect())
    }

    /// Gives a connected namespace its addresses, and the pod its cgroup.
    fn finish(node: &Arc<Node>, spec: PodSpec, host: u16, netns: Netns) -> Result<Self> {
        let mut addresses = Vec::new();
        let mut lines = "link set lo up\n".to_owned();
        for bridge in bridges(&spec) {
            lines += &address_lines(node, &spec, bridge, host, &mut addresses);
        }
        netns.ip(&lines)?;
        netns.wait_addresses_settled()?;
        let cgroup = node.cgroup().join(format!("pod-{}", spec.name));
        cgroup::create(&cgroup)?;
        let place = Place {
            netns: netns.path().to_owned(),
            cgroup: cgroup.clone(),
            ..node.place().clone()
        };
        Ok(Self {
            settings: Mutex::new(spec.settings.clone()),
            spec,
            host,
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

    /// The same of an app whose sockets are as `accelerate: full` asks of them.
    pub fn polled_echo(&self, port: u16) -> Result<EchoApp> {
        EchoApp::polled(&self.netns, port)
    }

    /// Captures what passes the pod's first interface.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.netns, "eth0")
    }

    /// Whether no TC filter hangs on its interfaces: its agent's programs hang on links, or there
    /// are none.
    pub fn has_no_filters(&self) -> Result<bool> {
        for (interface, hook) in [("lo", "ingress"), ("eth0", "ingress"), ("eth0", "egress")] {
            let filters = ["tc", "filter", "show", "dev", interface, hook];
            if !self.run(filters)?.stdout.trim().is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
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

    /// Makes a pod like this one, which has been removed, in its place: a new network namespace
    /// under the same name, with the same addresses.
    pub(crate) fn recreate(&self) -> Result<Self> {
        for bridge in bridges(&self.spec) {
            // It may be gone by itself, with the network namespace that its other end was in.
            let line = format!("link del {}\n", port(self.host, bridge));
            let _ = self.node.netns().ip(&line);
        }
        let spec = PodSpec {
            settings: self.settings(),
            ..self.spec.clone()
        };
        let mut made = Self::create_all(&self.node, vec![(spec, self.host)])?;
        Ok(made.remove(0))
    }

    /// Ends the pod: its processes, its namespace's name, its cgroup. The namespace itself goes
    /// when nobody holds it any more.
    pub(crate) fn remove(&self) -> Result<()> {
        cgroup::remove(&self.cgroup)?;
        self.netns.remove();
        Ok(())
    }
}

/// The bridges of the node that the pod has an interface on.
fn bridges(spec: &PodSpec) -> impl Iterator<Item = u8> + use<> {
    0..=u8::from(spec.second_interface)
}

/// What must be set before there is an interface.
fn prepare(netns: &Netns, spec: &PodSpec) -> Result<()> {
    let mut settings = vec![
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
    ];
    if spec.families == Families::V4Disabled6 {
        settings.extend([
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
        ]);
    }
    netns.sysctls(&settings)
}

/// The host's end of a pod's link to one of its node's bridges.
fn port(host: u16, bridge: u8) -> String {
    format!("pod{host}-{bridge}")
}

/// What `ip` does on the node to give the pod an interface on one of its bridges.
fn connect_lines(pod: &Netns, spec: &PodSpec, bridge: u8, host: u16) -> String {
    let (mtu, port) = (spec.mtu, port(host, bridge));
    format!(
        "link add {port} mtu {mtu} type veth peer name eth{bridge} mtu {mtu} netns {pod}\n\
         link set {port} master br{bridge} up\n",
        pod = pod.name()
    )
}

/// What `ip` does in the pod. Adds to the pod's addresses.
fn address_lines(
    node: &Node,
    spec: &PodSpec,
    bridge: u8,
    host: u16,
    addresses: &mut Vec<IpAddr>,
) -> String {
    let network = Network {
        node: node.index,
        bridge,
    };
    let mut lines = format!("link set eth{bridge} up\n");
    let mut own: Vec<IpAddr> = Vec::new();
    if bridge == 0 && !spec.addresses.is_empty() {
        own.clone_from(&spec.addresses);
        for address in &own {
            let alone = if address.is_ipv4() { "32" } else { "128 nodad" };
            lines += &format!("addr add {address}/{alone} dev eth0\n");
        }
        lines += &format!("route add {} dev eth0\n", network.v4(1));
        lines += &format!("route add {} dev eth0\n", network.v6(1));
    } else {
        if spec.families.has_v4() {
            let address = network.v4(host);
            lines += &format!("addr add {address}/16 dev eth{bridge}\n");
            own.push(address.into());
        }
        if spec.families.has_v6() {
            let address = network.v6(host);
            lines += &format!("addr add {address}/64 dev eth{bridge} nodad\n");
            own.push(address.into());
        }
    }
    for gateway in [IpAddr::from(network.v4(1)), network.v6(1).into()] {
        if bridge == 0 && same_family(&own, gateway).is_some() {
            lines += &format!("route add default via {gateway}\n");
        }
    }
    addresses.extend(own);
    lines
}
