//! Two pods of one node whose connections are joined, and what shows that they are.

use std::{
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{
    Agent, Node, PATIENCE, Pod, PodSpec, Polled, Testbed, accept, eventually, listen, payload,
};
use nix::sys::signal::Signal;
use socket2::SockRef;

/// Turns of a conversation after which both directions are joined.
pub const TURNS: u64 = 10;
pub const MESSAGE: usize = 500;
/// What each side has said by then.
pub const SAID: usize = 10 * MESSAGE;
/// A client and a server beside each other, whose apps are accelerated.
pub struct OneNode {
    pub bed: Testbed,
    pub node: Arc<Node>,
    pub client: Arc<Pod>,
    pub server: Arc<Pod>,
    pub listener: TcpListener,
}

impl OneNode {
    pub fn new(server_settings: &str) -> Self {
        let mut bed = Testbed::new("joined").unwrap();
        let node = bed.node("a").unwrap();
        let settings = "accelerate: full";
        let client = PodSpec::new("client").account("client").settings(settings);
        let client = bed.pod(&node, client).unwrap();
        let settings = format!("{settings}\n{server_settings}");
        let server = PodSpec::new("server").account("server").settings(settings);
        let server = bed.pod(&node, server).unwrap();
        let listener = listen(&server, 0).unwrap();
        bed.start_agents().unwrap();
        bed.agent(&node).wait_for_acceleration("full").unwrap();
        let one = Self {
            bed,
            node,
            client,
            server,
            listener,
        };
        one.wait_for_both();
        one
    }

    pub fn agent(&self) -> &Agent {
        self.bed.agent(&self.node)
    }

    pub fn wait_for_both(&self) {
        eventually("both pods to be accelerated", PATIENCE, || {
            let metrics = self.agent().metrics().unwrap();
            metrics.sum("malla_acceleration_pods", &[("mode", "full")]) == 2.0
        })
        .unwrap();
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        let port = self.listener.local_addr().unwrap().port();
        let addresses = self.server.addresses().iter();
        addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
    }

    pub fn connection(&self, to: SocketAddr) -> (Polled, Polled) {
        let client = Polled::new(self.client.connect(to).unwrap()).unwrap();
        (
            client,
            Polled::new(accept(&self.listener).unwrap()).unwrap(),
        )
    }

    /// A connection that is joined both ways, and how many bytes each side has said. A connection whose
    /// first message is sent before the kernel has both ends goes by TCP, and is none.
    pub fn joined_by(&self, to: SocketAddr) -> (Polled, Polled, usize) {
        // What was dropped before is to be gone.
        let mut before = self.joins();
        eventually("joins to be gone", PATIENCE, || {
            thread::sleep(Duration::from_millis(50));
            std::mem::replace(&mut before, self.joins()) == before
        })
        .unwrap();
        let mut others = Vec::new();
        for _ in 0..20 {
            let before = self.joins();
            let (client, server) = self.connection(to);
            converse(&client, &server, TURNS);
            if self.joins() == before + 2 {
                return (client, server, SAID);
            }
            others.push((client, server));
        }
        panic!("no connection to {to} is joined");
    }

    /// Directions that are joined now.
    pub fn joins(&self) -> usize {
        self.agent().joins(&self.node).unwrap()
    }

    /// How often the kernel has taken over by now: the agent tells of it once a second.
    pub fn times(&self) -> usize {
        thread::sleep(Duration::from_millis(1500));
        self.agent().directions("joined").unwrap()
    }

    pub fn joined(&self) -> (Polled, Polled, usize) {
        self.joined_by(self.addresses()[0])
    }

    /// That the kernel alone moves what is said.
    pub fn without_the_agent(&self, says: impl FnOnce()) {
        let process = self.agent().process();
        process.signal(Signal::SIGSTOP).unwrap();
        says();
        process.signal(Signal::SIGCONT).unwrap();
    }

    /// The bytes that a reporter has counted of what clients and servers have said.
    pub fn counted(&self, direction: &str) -> [usize; 2] {
        let metrics = self.agent().metrics().unwrap();
        ["src", "dst"].map(|peer| {
            let labels = [("direction", direction), ("peer", peer)];
            let sum = metrics.sum("tcp_read_bytes_total", &labels);
            format!("{sum}").parse().unwrap()
        })
    }

    /// Waits until both reporters' lines of the access log have these numbers of bytes, and this reason.
    pub fn wait_for_lines(&self, from_client: usize, from_server: usize, reason: Option<&str>) {
        let parts = [
            ("outbound", from_client, from_server),
            ("inbound", from_server, from_client),
        ];
        for (direction, sent, received) in parts {
            let bytes = format!(" bytes_sent={sent} bytes_recv={received} ");
            let direction = format!("direction=\"{direction}\"");
            let told = eventually("a line of the access log", PATIENCE, || {
                self.agent().log().lines().any(|line| {
                    let reason = match reason {
                        Some(reason) => line.contains(&format!("error=\"{reason}\"")),
                        None => line.contains("connection complete"),
                    };
                    line.contains(&bytes) && line.contains(&direction) && reason
                })
            });
            told.unwrap_or_else(|error| panic!("{error}: {bytes} {}", self.agent().log()));
        }
    }

    pub fn nothing_is_left(&self) {
        eventually("no connection to be left", PATIENCE, || {
            let metrics = self.agent().metrics().unwrap();
            let open = metrics.sum("tcp_open_connections", &[]);
            open == 0.0 && self.joins() == 0
        })
        .unwrap();
    }
}

/// Messages in turns.
pub fn converse(client: &Polled, server: &Polled, turns: u64) {
    for turn in 0..turns {
        for (from, to) in [(client, server), (server, client)] {
            payload::send(from, turn, MESSAGE).unwrap();
            payload::receive(to, turn, MESSAGE).unwrap();
        }
    }
}

/// What is a client's and what is its server's, in this order or the other way round.
pub fn either<T>(client_first: bool, client: T, server: T) -> (T, T) {
    if client_first {
        (client, server)
    } else {
        (server, client)
    }
}

pub fn reset(socket: Polled) {
    let without_fin = SockRef::from(&socket.0).set_linger(Some(Duration::ZERO));
    without_fin.unwrap();
    drop(socket);
}

pub fn is_reset(mut from: &Polled) {
    let error = from.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}
