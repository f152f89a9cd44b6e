//! Connections without number that end in every way there is: nothing of them stays.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use malla_testbed::{
    Agent, Node, PATIENCE, Pod, PodSpec, Testbed, Way, accept, eventually, listen,
};
use socket2::SockRef;

/// Five times what it may take until nothing is held.
const FREED: Duration = Duration::from_secs(50);
/// Threads of each calling pod, and of each server.
const THREADS: usize = 8;
const MESH: u16 = 15008;
/// A port whose SYNs are lost on the way to the app: the agent waits for its 5 s.
const LOST: u16 = 9;
/// Connections for each pod that comes and goes, and what it has open when it does.
const CONNECTS_PER_POD: usize = 2_500;
const OPEN_IN_A_POD: usize = 50;
/// Descriptors of what asks for an agent's metrics, and of files that are read now and then.
const SPARE: u32 = 4;

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Client,
    Server,
    ClientResets,
    ServerResets,
    /// The client resets as soon as it is connected: a CONNECT is on its way at most.
    InConnect,
    /// The same, while the server's agent dials an app that doesn't answer.
    InDial,
    /// A peer of the mesh port goes in the middle of its hello.
    InHandshake,
}

impl End {
    /// All of them in turn, but few that wait for a time-out.
    fn of(turn: usize) -> Self {
        match turn % 60 {
            59 => Self::InDial,
            other => [
                Self::Client,
                Self::Server,
                Self::ClientResets,
                Self::ServerResets,
                Self::InConnect,
                Self::InHandshake,
            ][other % 6],
        }
    }
}

/// A meshed client and a meshed server on two nodes, and an unmeshed neighbour of each.
struct Apps {
    client: Arc<Pod>,
    server: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
}

impl Apps {
    fn start(bed: &mut Testbed, nodes: &[Arc<Node>; 2]) -> Self {
        let [a, b] = nodes;
        let mut pod = |node, spec| bed.pod(node, spec).unwrap();
        let client = pod(a, PodSpec::new("client"));
        let near = pod(a, PodSpec::new("near").unmeshed());
        let server = pod(b, PodSpec::new("server"));
        let far = pod(b, PodSpec::new("far").unmeshed());
        let lose = format!(
            "table inet lose {{ chain incoming {{ type filter hook input priority 0\n\
             iif lo tcp dport {LOST} drop\n}}\n}}\n"
        );
        let nft = server.command(["nft", "-f", "-"]);
        nft.input(lose).run().unwrap();
        Self {
            client,
            server,
            near,
            far,
        }
    }
}

/// The connections, and who takes them.
struct Round<'a> {
    apps: &'a Apps,
    /// Of the server and of its neighbour.
    listeners: [TcpListener; 2],
    number: usize,
    next: AtomicUsize,
    done: AtomicBool,
}

impl<'a> Round<'a> {
    fn new(apps: &'a Apps, number: usize) -> Self {
        Self {
            apps,
            listeners: [&apps.server, &apps.far].map(|pod| listen(pod, 0).unwrap()),
            number,
            next: AtomicUsize::new(0),
            done: AtomicBool::new(false),
        }
    }

    /// Opens the connections, while pods with some of their own come and go.
    fn run(&self, bed: &mut Testbed) {
        let began = Instant::now();
        thread::scope(|scope| {
            for listener in &self.listeners {
                for _ in 0..THREADS {
                    scope.spawn(|| self.answer(listener));
                }
            }
            // Whatever happens: a panic waits for the threads of its scope.
            let _ending = Ending(self);
            thread::scope(|scope| {
                for pod in [&self.apps.client, &self.apps.near] {
                    for _ in 0..THREADS {
                        scope.spawn(move || pod.enter(|| self.call_all(pod)));
                    }
                }
                for threshold in (0..self.number).step_by(CONNECTS_PER_POD) {
                    let reached = || self.next.load(Ordering::Relaxed) >= threshold;
                    eventually("connections", 6 * PATIENCE, reached).unwrap();
                    self.come_and_go(bed, threshold / CONNECTS_PER_POD);
                }
            });
        });
        println!("{} connections in {:?}", self.number, began.elapsed());
    }

    /// Opens connections from one of the pods, in whose namespace this thread is.
    fn call_all(&self, pod: &Pod) {
        let meshed = pod.name() == self.apps.client.name();
        loop {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            if turn >= self.number {
                return;
            }
            let end = match End::of(turn) {
                End::InHandshake if meshed => End::InConnect,
                end => end,
            };
            // Every eighth of a meshed client goes to a pod that isn't.
            let to_far = meshed && turn % 8 == 7 && end != End::InDial;
            let server = if to_far {
                &self.apps.far
            } else {
                &self.apps.server
            };
            let addresses: &[IpAddr] = server.addresses();
            let port = match end {
                End::InHandshake => MESH,
                End::InDial => LOST,
                _ => self.listeners[usize::from(to_far)]
                    .local_addr()
                    .unwrap()
                    .port(),
            };
            let to = SocketAddr::new(addresses[turn / 60 % addresses.len()], port);
            if let Err(error) = call(to, end) {
                // Who waits for more connections needn't.
                self.next.store(self.number, Ordering::Relaxed);
                panic!("{turn}, {end:?} of {}: {error}", pod.name());
            }
        }
    }

    fn answer(&self, listener: &TcpListener) {
        while !self.done.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            // The client tells what went wrong.
            let _ = serve(stream);
        }
    }

    /// A pod comes, opens or takes connections, and is deleted in the middle of them.
    fn come_and_go(&self, bed: &mut Testbed, number: usize) {
        let takes = number.is_multiple_of(2);
        let like = if takes {
            &self.apps.server
        } else {
            &self.apps.client
        };
        let spec = PodSpec::new(format!("passing-{number}"));
        let pod = bed.pod(like.node(), spec).unwrap();
        let enrolled = format!("enrolled\tworkload=default/passing-{number} ");
        let agent = bed.agent(like.node()).process();
        agent.wait_for_log(&enrolled, PATIENCE).unwrap();
        let [from, to] = if takes {
            [&self.apps.client, &pod]
        } else {
            [&pod, &self.apps.server]
        };
        let listener = listen(to, 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let addresses = to.addresses().iter().cycle().take(OPEN_IN_A_POD);
        let open = |to: &IpAddr| {
            let client = from.connect((*to, port)).unwrap();
            (client, accept(&listener).unwrap())
        };
        let open: Vec<_> = addresses.map(open).collect();
        bed.remove_pod(&pod).unwrap();
        drop((open, listener));
    }
}

/// Ends the answering when it is dropped.
struct Ending<'a>(&'a Round<'a>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Relaxed);
        for listener in &self.0.listeners {
            // accept(2) of a listener that is shut down returns, in every thread.
            let _ = SockRef::from(listener).shutdown(Shutdown::Both);
        }
    }
}

/// Opens a connection that ends as it is told, and has heard its answer before where it can.
fn call(to: SocketAddr, end: End) -> io::Result<()> {
    let mut stream = match (Way::Mesh.dial(to), end) {
        // One mid-handshake too many is reset before it is told that it is connected.
        (Err(error), End::InHandshake) if error.kind() == ErrorKind::ConnectionReset => {
            return Ok(());
        }
        (dialled, _) => dialled?,
    };
    match end {
        End::InHandshake => {
            // Of a hello of 512 bytes, the first ones.
            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
            return Ok(());
        }
        End::InConnect | End::InDial => return reset(&stream),
        _ => stream.write_all(&[end as u8])?,
    }
    if end == End::ServerResets {
        let told = stream.read(&mut [0]).unwrap_err();
        assert_eq!(told.kind(), ErrorKind::ConnectionReset);
        return Ok(());
    }
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, [end as u8]);
    match end {
        End::ClientResets => return reset(&stream),
        End::Client => stream.shutdown(Shutdown::Write)?,
        _ => {}
    }
    assert_eq!(stream.read(&mut answer)?, 0);
    Ok(())
}

/// Lets a stream end with a reset when it is dropped.
fn reset(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut end = [0];
    stream.read_exact(&mut end)?;
    if end == [End::ServerResets as u8] {
        return reset(&stream);
    }
    stream.write_all(&end)?;
    if end != [End::Server as u8] {
        stream.read_exact(&mut end)?;
    }
    Ok(())
}

/// What an agent holds when it rests.
#[derive(Debug, Clone, Copy)]
struct Held {
    descriptors: u32,
    /// Sockets of other kinds than TCP, and of TCP those that no kernel knows any more.
    outside: u32,
}

impl Held {
    fn now(agent: &Agent, apps: &Apps, nodes: &[Arc<Node>; 2]) -> Self {
        let pods = [&apps.client, &apps.server].map(|pod| pod.netns());
        let nodes = nodes.each_ref().map(|node| node.netns());
        let outside = agent.sockets_outside([pods, nodes].concat()).unwrap();
        Self {
            descriptors: agent.open_descriptors().unwrap().try_into().unwrap(),
            outside: outside.try_into().unwrap(),
        }
    }

    /// Waits until the agent has no connection, and as much as this beside its tunnels.
    fn wait(self, agent: &Agent, apps: &Apps, nodes: &[Arc<Node>; 2]) {
        let (began, mut seen) = (Instant::now(), String::new());
        let rests = eventually("an agent to hold nothing", FREED, || {
            let metrics = agent.metrics().unwrap();
            let open = metrics.sum("tcp_open_connections", &[]);
            let tunnels = metrics.sum("malla_tunnels_open", &[]);
            let now = Self::now(agent, apps, nodes);
            seen = format!("{open} connections, {tunnels} tunnels, {self:?} before, {now:?}");
            let allowed = f64::from(self.descriptors + SPARE) + tunnels;
            open == 0.0 && f64::from(now.descriptors) <= allowed && now.outside <= self.outside
        });
        rests.context(seen).unwrap();
        println!("at rest after {:?}", began.elapsed());
    }
}

fn churn_leaves_nothing(number: usize) {
    // A line for each connection would fill the disk, not the agent.
    let quiet = ["--log", "malla=info"];
    let mut bed = Testbed::new("churn").unwrap().with_agent_arguments(quiet);
    let nodes = ["a", "b"].map(|name| bed.node(name).unwrap());
    let apps = Apps::start(&mut bed, &nodes);
    bed.start_agents().unwrap();
    let before = nodes
        .each_ref()
        .map(|node| Held::now(bed.agent(node), &apps, &nodes));
    let memory = nodes
        .each_ref()
        .map(|node| bed.agent(node).anonymous_memory().unwrap());
    Round::new(&apps, number).run(&mut bed);
    for ((node, before), memory) in nodes.iter().zip(before).zip(memory) {
        let agent = bed.agent(node);
        before.wait(agent, &apps, &nodes);
        let mut now = 0;
        let within_a_fifth = eventually("memory to be what it was", FREED, || {
            now = agent.anonymous_memory().unwrap();
            now * 5 <= memory * 6
        });
        println!("{memory} bytes of memory before, {now} after");
        within_a_fifth.unwrap();
    }
}

#[test]
fn connections_of_every_end_leave_nothing() {
    churn_leaves_nothing(5_000);
}

#[test]
#[ignore = "long: 400,000 connections"]
fn four_hundred_thousand_connections_of_every_end_leave_nothing() {
    churn_leaves_nothing(400_000);
}
