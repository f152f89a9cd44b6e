//! Two pods on two nodes, a client and a server, and the ways that connections between them take.
//!
//! A scenario is a function of a [`Pair`]; [`on_each_way`](crate::on_each_way) makes tests of it.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::{BuildHasher, Hasher},
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::{
    agent::Agent,
    bed::Testbed,
    link::Link,
    node::Node,
    pod::Pod,
    spec::PodSpec,
    wait::{eventually, until},
};

/// How long an end of a [`Pair::connection`] waits for a byte, or for room for one.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The port of the Service in front of the server, on both.
pub const SERVICE_PORT: u16 = 7000;

/// The Service's addresses.
const SERVICE: [&str; 2] = ["10.96.0.1", "fd96::1"];

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// The source ports of an agent towards an app, as configured by default.
const DIAL_PORTS: std::ops::RangeInclusive<u16> = 10_000..=32_000;

/// Descriptors that an agent may have more than at its start, beyond those of its tunnels: what
/// asks for its metrics, and files that are read now and then.
const SPARE_DESCRIPTORS: usize = 4;

/// How connections between the pods go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Through both agents, over a veth pair, from ports that the kernel chooses.
    Mesh,
    /// Through both agents, from ports drawn at random.
    RandomPorts,
    /// Through both agents, from ports drawn at random, over a wire that loses, delays, reorders.
    LossyWire,
    /// Through both agents, by the address of a Service, which has [`SERVICE_PORT`] alone.
    ToService,
    /// From a meshed client to an unmeshed server: plain TCP beyond the client's agent.
    ToUnmeshed,
    /// From an unmeshed client to a meshed server that is permissive.
    FromUnmeshed,
    /// Past both agents, as without a mesh: shows that a scenario expects what TCP gives.
    Direct,
}

/// Which source ports a client has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ports {
    Kernel,
    Random,
    /// At random, but none that the agent of the server may use towards the app at that time.
    RandomBesideDialled,
}

impl Way {
    fn ports(self) -> Ports {
        match self {
            Self::Mesh | Self::ToService | Self::Direct => Ports::Kernel,
            Self::FromUnmeshed => Ports::RandomBesideDialled,
            Self::RandomPorts | Self::LossyWire | Self::ToUnmeshed => Ports::Random,
        }
    }

    fn link(self) -> Link {
        match self {
            Self::LossyWire => Link::LOSSY_WIRE,
            _ => Link::Veth,
        }
    }

    /// `many`, or a tenth of it where each round trip takes its time.
    pub fn fewer_if_slow(self, many: usize) -> usize {
        match self {
            Self::LossyWire => many / 10,
            _ => many,
        }
    }

    /// Opens a connection from the calling thread's namespace. Both ends of a read or write then
    /// wait for [`PATIENCE`].
    pub fn dial(self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = match self.ports() {
            Ports::Kernel => TcpStream::connect_timeout(&to, PATIENCE)?,
            ports => dial_from_random_port(ports, to)?,
        };
        be_patient(&stream)?;
        Ok(stream)
    }

    /// A port for the client's side of a connection, for commands that take one.
    pub fn client_port(self) -> u16 {
        loop {
            let port = random_port();
            if self.ports() != Ports::RandomBesideDialled || !DIAL_PORTS.contains(&port) {
                return port;
            }
        }
    }
}

/// A client on node `a` and a server on node `b`, with an agent on each.
#[derive(Debug)]
pub struct Pair {
    pub way: Way,
    pub client: Arc<Pod>,
    pub server: Arc<Pod>,
    pub a: Arc<Node>,
    pub b: Arc<Node>,
    descriptors: [usize; 2],
    pub bed: Testbed,
}

/// The first address of a family.
fn of(addresses: &[IpAddr], v4: bool) -> Option<IpAddr> {
    let mut addresses = addresses.iter();
    addresses.find(|ip| ip.is_ipv4() == v4).copied()
}

impl Pair {
    /// Dual-stack pods named `client` and `server`.
    pub fn new(way: Way) -> Result<Self> {
        Self::of(way, PodSpec::new("client"), PodSpec::new("server"))
    }

    /// Pods as described, but meshed or not as `way` says.
    pub fn of(way: Way, client: PodSpec, server: PodSpec) -> Result<Self> {
        let bed = Testbed::new("pair")?.with_link(way.link());
        Self::on(bed, way, client, server)
    }

    /// The same on a bed that has no node yet, whose link should be the way's.
    pub fn on(mut bed: Testbed, way: Way, client: PodSpec, server: PodSpec) -> Result<Self> {
        let (a, b) = (bed.node("a")?, bed.node("b")?);
        let client = match way {
            Way::FromUnmeshed | Way::Direct => client.unmeshed(),
            _ => client,
        };
        let server = match way {
            Way::ToUnmeshed | Way::Direct => server.unmeshed(),
            _ => server,
        };
        let server = match way {
            Way::ToService => server.label("app", "server"),
            _ => server,
        };
        let (client, server) = (bed.pod(&a, client)?, bed.pod(&b, server)?);
        if way == Way::ToService {
            let [v4, v6] = SERVICE;
            let service = format!(
                "addresses: [{v4}, \"{v6}\"]\nports: [{{port: {SERVICE_PORT}}}]\n\
                 selector: {{app: server}}"
            );
            bed.service("server", service)?;
        }
        bed.start_agents()?;
        let descriptors = [
            bed.agent(&a).open_descriptors()?,
            bed.agent(&b).open_descriptors()?,
        ];
        Ok(Self {
            way,
            client,
            server,
            a,
            b,
            descriptors,
            bed,
        })
    }

    /// Takes what the agents have open now for what they have at their start.
    pub fn count_descriptors(&mut self) -> Result<()> {
        let [a, b] = self.agents().map(Agent::open_descriptors);
        self.descriptors = [a?, b?];
        Ok(())
    }

    pub fn agents(&self) -> [&Agent; 2] {
        [self.bed.agent(&self.a), self.bed.agent(&self.b)]
    }

    /// The server's first address of each family that both pods have, with `port`; that of its
    /// Service where it is called by that.
    pub fn addresses(&self, port: u16) -> Vec<SocketAddr> {
        let service = SERVICE.map(|ip| ip.parse().expect("a Service has an address"));
        let families = [true, false].map(|v4| {
            let of_family = |pod: &Pod| of(pod.addresses(), v4);
            let server = of_family(&self.client).and(of_family(&self.server));
            match self.way {
                Way::ToService => server.and(of(&service, v4)),
                _ => server,
            }
        });
        let found = families.into_iter().flatten();
        found.map(|ip| SocketAddr::new(ip, port)).collect()
    }

    /// The first of [`Self::addresses`]. Panics where the pods have no family in common.
    pub fn address(&self, port: u16) -> SocketAddr {
        self.addresses(port)[0]
    }

    /// Opens a connection from the client.
    pub fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.client.enter(|| self.way.dial(to))
    }

    /// Opens a connection, and gives both apps' ends: the client's and the server's.
    pub fn connection(&self) -> Result<(TcpStream, TcpStream)> {
        let listener = listen(&self.server, 0)?;
        let to = self.address(listener.local_addr()?.port());
        let client = self
            .dial(to)
            .with_context(|| format!("connecting to {to}"))?;
        let server = accept(&listener)?;
        self.check_peer(&server)?;
        Ok((client, server))
    }

    /// That an accepted connection shows the client's address as its peer's.
    pub fn check_peer(&self, accepted: &TcpStream) -> Result<()> {
        let peer = accepted.peer_addr()?.ip().to_canonical();
        ensure!(
            self.client.addresses().contains(&peer),
            "the app sees {peer} as its client"
        );
        Ok(())
    }

    /// Waits until the agents carry no connection and have the descriptors of their start.
    pub fn nothing_is_held(&self) -> Result<()> {
        for (agent, before) in self.agents().into_iter().zip(self.descriptors) {
            let mut seen = String::new();
            let freed = eventually("an agent to hold no connection", PATIENCE, || {
                let (Ok(metrics), Ok(now)) = (agent.metrics(), agent.open_descriptors()) else {
                    return false;
                };
                let open = metrics.sum("tcp_open_connections", &[]);
                let tunnels = metrics.sum("malla_tunnels_open", &[]);
                seen = format!("{open} open, {tunnels} tunnels, {before} descriptors, now {now}");
                // A count of tunnels is a whole number far below the limits of a cast.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let allowed = before + tunnels as usize + SPARE_DESCRIPTORS;
                open == 0.0 && now <= allowed
            });
            freed.with_context(|| seen)?;
        }
        Ok(())
    }
}

impl Agent {
    /// Its resident memory, in bytes.
    pub fn resident_memory(&self) -> Result<usize> {
        self.memory("VmRSS:")
    }

    /// What it has allocated and not given back, in bytes: no pages of files, such as its program.
    pub fn anonymous_memory(&self) -> Result<usize> {
        self.memory("RssAnon:")
    }

    /// Whether it takes huge pages where the kernel gives them to who doesn't ask.
    pub fn takes_huge_pages(&self) -> Result<bool> {
        Ok(self.status("THP_enabled:")? != 0)
    }

    fn memory(&self, kind: &str) -> Result<usize> {
        Ok(self.status(kind)? << 10)
    }

    /// A number that the kernel tells of it (`proc_pid_status(5)`).
    fn status(&self, kind: &str) -> Result<usize> {
        let path = format!("/proc/{}/status", self.process().pid());
        let status = fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = status.lines().find_map(|line| line.strip_prefix(kind));
        let number = line.and_then(|rest| rest.split_ascii_whitespace().next());
        Ok(number.context(path)?.parse()?)
    }
}

/// Makes a test of each scenario (a function of `&Pair`) on each of `ways`; after it, the agents
/// must hold nothing.
///
/// ```no_run
/// fn a_byte_arrives(pair: &malla_testbed::Pair) {}
/// malla_testbed::on_each_way!([Mesh, LossyWire] a_byte_arrives);
/// ```
#[macro_export]
macro_rules! on_each_way {
    ([$($way:ident),+ $(,)?] $($scenario:ident),+ $(,)?) => {
        $crate::on_each_way!(@ways [$($way),+] [$($scenario),+]);
    };
    (@ways [$($way:ident),+] $scenarios:tt) => {
        $($crate::on_each_way!(@one $way $scenarios);)+
    };
    (@one $way:ident [$($scenario:ident),+]) => {
        #[allow(non_snake_case, reason = "named as the way is")]
        mod $way {
            $(
                #[test]
                fn $scenario() {
                    let pair = $crate::Pair::new($crate::Way::$way).unwrap();
                    super::$scenario(&pair);
                    pair.nothing_is_held().unwrap();
                }
            )+
        }
    };
}

/// A listener for both families in a pod; port 0 lets the kernel choose.
pub fn listen(pod: &Pod, port: u16) -> Result<TcpListener> {
    let no_v6 = !pod.addresses().iter().any(IpAddr::is_ipv6);
    let (domain, any) = if no_v6 {
        (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED))
    } else {
        (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
    };
    let listener = pod.enter(|| -> io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    });
    listener.with_context(|| format!("listening on port {port} of pod {}", pod.name()))
}

/// Accepts one connection within [`PATIENCE`], which then also holds for its reads and writes.
pub fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let accepted = until("a connection to accept", PATIENCE, || {
        match listener.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            other => Some(other),
        }
    });
    listener.set_nonblocking(false)?;
    let (stream, _) = accepted??;
    stream.set_nonblocking(false)?;
    be_patient(&stream)?;
    Ok(stream)
}

fn be_patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn dial_from_random_port(ports: Ports, to: SocketAddr) -> io::Result<TcpStream> {
    loop {
        let port = random_port();
        if ports == Ports::RandomBesideDialled && DIAL_PORTS.contains(&port) {
            continue;
        }
        match dial_from(port, to) {
            // Held by another connection of this pod: draw again.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable
                ) => {}
            other => return other,
        }
    }
}

/// Opens a connection from a source port of one's own choice. The port may be one of a connection
/// that has ended a moment ago.
pub fn dial_from(port: u16, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    let any = match to {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}

/// A port that no privilege is needed for.
fn random_port() -> u16 {
    // Each RandomState has keys of its own, and so a number of its own for nothing hashed.
    let number = RandomState::new().build_hasher().finish();
    let drawn = u16::try_from(number % u64::from(u16::MAX - 1023)).unwrap_or_default();
    1024 + drawn
}
