//! Connections that end in every way there is, while pods come and go, and what an agent holds once
//! they have.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use socket2::SockRef;

use crate::{
    agent::Agent,
    bed::Testbed,
    node::Node,
    pair::{PATIENCE, Way, accept, listen},
    pod::Pod,
    spec::PodSpec,
    wait::eventually,
};

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
#[derive(Debug)]
pub struct Churners {
    client: Arc<Pod>,
    server: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
}

impl Churners {
    /// Makes the pods. The agents are yet to be started.
    pub fn new(bed: &mut Testbed, nodes: &[Arc<Node>; 2]) -> Result<Self> {
        let [a, b] = nodes;
        let client = bed.pod(a, PodSpec::new("client"))?;
        let near = bed.pod(a, PodSpec::new("near").unmeshed())?;
        let server = bed.pod(b, PodSpec::new("server"))?;
        let far = bed.pod(b, PodSpec::new("far").unmeshed())?;
        let lose = format!(
            "table inet lose {{ chain incoming {{ type filter hook input priority 0\n\
             iif lo tcp dport {LOST} drop\n}}\n}}\n"
        );
        let nft = server.command(["nft", "-f", "-"]);
        nft.input(lose).run()?;
        Ok(Self {
            client,
            server,
            near,
            far,
        })
    }

    /// Those that agents serve.
    pub fn meshed(&self) -> [Arc<Pod>; 2] {
        [&self.client, &self.server].map(Arc::clone)
    }
}

/// The connections, and who takes them.
#[derive(Debug)]
pub struct Churn<'a> {
    pods: &'a Churners,
    /// Of the server and of its neighbour.
    listeners: [TcpListener; 2],
    number: usize,
    /// How many a second, at most.
    rate: Option<u32>,
    next: AtomicUsize,
    /// No more are opened.
    stopped: AtomicBool,
    /// None is answered any more.
    done: AtomicBool,
}

impl<'a> Churn<'a> {
    /// `number` connections, yet to be opened.
    pub fn new(pods: &'a Churners, number: usize) -> Result<Self> {
        Ok(Self {
            pods,
            listeners: [listen(&pods.server, 0)?, listen(&pods.far, 0)?],
            number,
            rate: None,
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            done: AtomicBool::new(false),
        })
    }

    /// Opens no more than so many a second.
    #[must_use]
    pub fn at_most(mut self, a_second: u32) -> Self {
        self.rate = Some(a_second);
        self
    }

    /// How many connections were opened so far.
    pub fn opened(&self) -> usize {
        self.next.load(Ordering::Relaxed).min(self.number)
    }

    /// Opens the connections, while pods with some of their own come and go. An error where one
    /// didn't end as it should.
    pub fn run(&self, bed: &mut Testbed) -> Result<()> {
        thread::scope(|scope| {
            for listener in &self.listeners {
                for _ in 0..THREADS {
                    scope.spawn(|| self.answer(listener));
                }
            }
            // Whatever happens: a panic waits for the threads of its scope.
            let _ending = Ending(self);
            self.call_from_all(bed)
        })
    }

    fn call_from_all(&self, bed: &mut Testbed) -> Result<()> {
        let began = Instant::now();
        thread::scope(|scope| {
            let mut callers = Vec::new();
            for pod in [&self.pods.client, &self.pods.near] {
                for _ in 0..THREADS {
                    callers.push(scope.spawn(move || pod.enter(|| self.call_all(pod, began))));
                }
            }
            let mut passed = Ok(());
            for (number, threshold) in (0..self.number).step_by(CONNECTS_PER_POD).enumerate() {
                while self.opened() < threshold && !self.has_stopped() {
                    thread::sleep(Duration::from_millis(5));
                }
                if self.has_stopped() {
                    break;
                }
                passed = self.come_and_go(bed, number);
                if passed.is_err() {
                    self.stop();
                    break;
                }
            }
            let mut callers = callers.into_iter().map(ScopedJoinHandle::join);
            let called = callers.try_for_each(|caller| match caller {
                Ok(called) => called,
                Err(_) => Err(anyhow!("a caller panicked")),
            });
            called.and(passed)
        })
    }

    /// Opens no more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn has_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Opens connections from one of the pods, in whose namespace this thread is.
    fn call_all(&self, pod: &Pod, began: Instant) -> Result<()> {
        loop {
            if self.has_stopped() {
                return Ok(());
            }
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            if turn >= self.number {
                return Ok(());
            }
            if let Some(rate) = self.rate {
                let due = Duration::from_secs(turn as u64) / rate;
                thread::sleep(due.saturating_sub(began.elapsed()));
            }
            if let Err(error) = self.call_one(pod, turn) {
                self.stop();
                return Err(error.context(format!("connection {turn} from {}", pod.name())));
            }
        }
    }

    fn call_one(&self, pod: &Pod, turn: usize) -> Result<()> {
        let meshed = pod.name() == self.pods.client.name();
        let end = match End::of(turn) {
            End::InHandshake if meshed => End::InConnect,
            end => end,
        };
        // Every eighth of a meshed client goes to a pod that isn't.
        let to_far = meshed && turn % 8 == 7 && end != End::InDial;
        let server = if to_far {
            &self.pods.far
        } else {
            &self.pods.server
        };
        let addresses: &[IpAddr] = server.addresses();
        let port = match end {
            End::InHandshake => MESH,
            End::InDial => LOST,
            _ => self.listeners[usize::from(to_far)].local_addr()?.port(),
        };
        let to = SocketAddr::new(addresses[turn / 60 % addresses.len()], port);
        call(to, end).with_context(|| format!("{end:?} to {to}"))
    }

    fn answer(&self, listener: &TcpListener) {
        while !self.done.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            // The client tells what went wrong.
            let _ = stream
                .set_read_timeout(Some(PATIENCE))
                .and_then(|()| serve(stream));
        }
    }

    /// A pod comes, opens or takes connections, and is deleted in the middle of them.
    fn come_and_go(&self, bed: &mut Testbed, number: usize) -> Result<()> {
        let takes = number.is_multiple_of(2);
        let like = if takes {
            &self.pods.server
        } else {
            &self.pods.client
        };
        let spec = PodSpec::new(format!("passing-{number}"));
        let pod = bed.pod(like.node(), spec)?;
        let enrolled = format!("enrolled\tworkload=default/passing-{number} ");
        let agent = bed.agent(like.node()).process();
        agent.wait_for_log(&enrolled, PATIENCE)?;
        let [from, to] = if takes {
            [&self.pods.client, &pod]
        } else {
            [&pod, &self.pods.server]
        };
        let listener = listen(to, 0)?;
        let port = listener.local_addr()?.port();
        let addresses = to.addresses().iter().cycle().take(OPEN_IN_A_POD);
        let open = |to: &IpAddr| -> Result<_> {
            let client = from.connect((*to, port))?;
            Ok((client, accept(&listener)?))
        };
        let open: Vec<_> = addresses.map(open).collect::<Result<_>>()?;
        bed.remove_pod(&pod)?;
        drop((open, listener));
        Ok(())
    }
}

/// Ends the answering when it is dropped.
struct Ending<'a>(&'a Churn<'a>);

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
fn call(to: SocketAddr, end: End) -> Result<()> {
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
        End::InConnect | End::InDial => return Ok(reset(&stream)?),
        _ => stream.write_all(&[end as u8])?,
    }
    if end == End::ServerResets {
        let told = stream.read(&mut [0]).map_err(|error| error.kind());
        ensure!(told == Err(ErrorKind::ConnectionReset), "read {told:?}");
        return Ok(());
    }
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    ensure!(answer == [end as u8], "another answer: {answer:?}");
    match end {
        End::ClientResets => return Ok(reset(&stream)?),
        End::Client => stream.shutdown(Shutdown::Write)?,
        _ => {}
    }
    ensure!(stream.read(&mut answer)? == 0, "bytes in place of the end");
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
pub struct Held {
    descriptors: u32,
    /// Sockets of other kinds than TCP, and of TCP those that no kernel knows any more.
    outside: u32,
    /// Bytes that it has allocated.
    memory: usize,
}

impl Held {
    /// What it holds now. `pods` are all that it serves.
    pub fn now(agent: &Agent, nodes: &[Arc<Node>; 2], pods: &[Arc<Pod>]) -> Result<Self> {
        let pods = pods.iter().map(|pod| pod.netns());
        let outside = agent.sockets_outside(nodes.iter().map(|node| node.netns()).chain(pods))?;
        Ok(Self {
            descriptors: agent.open_descriptors()?.try_into()?,
            outside: outside.try_into()?,
            memory: agent.anonymous_memory()?,
        })
    }

    /// Waits until the agent has no connection, as many descriptors as this beside its tunnels, and
    /// a fifth more memory at most. Returns what it has then.
    pub fn wait(self, agent: &Agent, nodes: &[Arc<Node>; 2], pods: &[Arc<Pod>]) -> Result<Self> {
        let (mut seen, mut now) = (String::new(), self);
        let rests = eventually("an agent to hold nothing", FREED, || {
            let look = || -> Result<_> { Ok((agent.metrics()?, Self::now(agent, nodes, pods)?)) };
            let metrics = match look() {
                Ok((metrics, held)) => {
                    now = held;
                    metrics
                }
                Err(error) => {
                    seen = format!("{error:#}");
                    return false;
                }
            };
            let open = metrics.sum("tcp_open_connections", &[]);
            let tunnels = metrics.sum("malla_tunnels_open", &[]);
            seen = format!("{open} connections, {tunnels} tunnels, {self:?} before, {now:?}");
            let allowed = f64::from(self.descriptors + SPARE) + tunnels;
            open == 0.0
                && f64::from(now.descriptors) <= allowed
                && now.outside <= self.outside
                && now.memory * 5 <= self.memory * 6
        });
        rests.context(seen)?;
        Ok(now)
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kib = self.memory >> 10;
        write!(f, "{} descriptors, {kib} KiB", self.descriptors)
    }
}
