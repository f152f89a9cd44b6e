//! What an agent does when a worker of its has too much to do, while others have not.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::TcpStream,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use malla_testbed::{Agent, EchoApp, Fate, Node, Pod, PodSpec, Testbed, eventually, say};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
/// Skipped by the client's agent, and so in plaintext: all of its cost is the server's agent's.
const PLAIN: u16 = 9090;

/// A client whose agent has one worker, so that all its streams go by one tunnel, and a server.
struct World {
    client: Arc<Pod>,
    server: Arc<Pod>,
    node: Arc<Node>,
    bed: Testbed,
    _apps: [EchoApp; 2],
}

impl World {
    fn new(workers: &str) -> Self {
        let mut bed = Testbed::new("hot").unwrap();
        let (clients, node) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let spec = PodSpec::new("client").settings(format!("skipOutboundPorts: [{PLAIN}]"));
        let client = bed.pod(&clients, spec).unwrap();
        let server = bed.pod(&node, PodSpec::new("server")).unwrap();
        bed = bed.with_agents_on_cpu(0);
        bed.start_agent(&clients).unwrap();
        run_anywhere(bed.agent(&clients));
        bed = bed
            .with_agents_on_cpu(None)
            .with_agent_arguments(["--workers", workers]);
        bed.start_agent(&node).unwrap();
        Self {
            _apps: [PORT, PLAIN].map(|port| server.echo(port).unwrap()),
            client,
            server,
            node,
            bed,
        }
    }

    fn connect(&self, port: u16) -> TcpStream {
        let to = (self.server.v4(), port).into();
        self.client.caller().connect(to).unwrap()
    }

    /// One new connection through the tunnel.
    fn ask(&self) -> TcpStream {
        let mut stream = self.connect(PORT);
        assert_eq!(say(&mut stream, b"new"), Fate::Echoed);
        stream
    }

    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        metrics.sum(name, labels)
    }

    /// What the server's agent says of its workers, for an error.
    fn loads(&self) -> String {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        let workers = metrics
            .iter()
            .filter(|s| s.name.starts_with("malla_worker_"));
        format!("{:?}", workers.collect::<Vec<_>>())
    }

    fn handed_over(&self) -> f64 {
        self.metric("malla_tunnels_handed_over_total", &[])
    }

    /// Connections of each of the server's workers.
    fn carried(&self) -> Vec<f64> {
        let metrics = self.bed.agent(&self.node).metrics().unwrap();
        let workers = metrics.samples("malla_worker_connections", &[]);
        workers.map(|sample| sample.value).collect()
    }

    /// Streams through the one tunnel, and in plaintext, all of them one worker's.
    fn open(&self) -> Vec<TcpStream> {
        let mut streams: Vec<TcpStream> = (0..32).map(|_| self.ask()).collect();
        while streams.len() < 40 {
            // A busy worker would be helped by another.
            eventually("the workers to be calm", LIMIT, || {
                self.metric("malla_worker_busy_ratio", &[]) < 0.5
            })
            .unwrap();
            streams.push(self.connect(PLAIN));
            let open = f64::from(u32::try_from(streams.len()).unwrap());
            eventually("the stream to be counted", LIMIT, || {
                self.carried().iter().sum::<f64>() >= open
            })
            .unwrap();
            if self.carried().iter().filter(|open| **open > 0.0).count() > 1 {
                streams.pop();
                break;
            }
        }
        streams
    }

    /// Streams that are as busy as they can be while `work` runs. All must be whole at the end.
    fn while_hot(&self, work: impl FnOnce()) {
        let is_over = AtomicBool::new(false);
        let opened = self.open();
        let be_hot = |mut stream: TcpStream| {
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(say(&mut stream, &[7; 16 * 1024]), Fate::Echoed);
            }
        };
        thread::scope(|scope| {
            let streams = opened.into_iter().map(|s| scope.spawn(|| be_hot(s)));
            let streams: Vec<_> = streams.collect();
            // However the work ends: a panic waits for the threads of its scope.
            let over = Over(&is_over);
            work();
            drop(over);
            for stream in streams {
                stream.join().unwrap();
            }
        });
    }
}

/// Takes an agent off the processor that it was started on, which has told it to have one worker.
fn run_anywhere(agent: &Agent) {
    let processors = thread::available_parallelism().unwrap().get() - 1;
    let arguments = ["-a", "-p", "-c", &format!("0-{processors}")].map(str::to_owned);
    let mut set = Command::new("taskset");
    let set = set
        .args(arguments)
        .arg(agent.process().pid().to_string())
        .output();
    assert!(set.unwrap().status.success());
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_streams_of_a_hot_tunnel_come_to_be_carried_by_two_workers_and_none_is_cut() {
    let world = World::new("2");
    world.while_hot(|| {
        eventually("a tunnel to be handed over", LIMIT, || {
            // What is new is carried all the while.
            drop(world.ask());
            world.handed_over() > 0.0
        })
        .unwrap_or_else(|error| panic!("{error}; {}", world.loads()));
        let mut new = Vec::new();
        eventually("both workers to carry streams", LIMIT, || {
            new.push(world.ask());
            world.carried().iter().all(|streams| *streams > 0.0)
        })
        .unwrap_or_else(|error| panic!("{error}; {}", world.loads()));
        let mut answers = new.iter_mut().map(|stream| say(stream, b"still here"));
        assert!(answers.all(|answer| answer == Fate::Echoed));
    });
    let broken = [("errno", "ECONNRESET")];
    assert!(world.metric("tcp_close_total", &broken) == 0.0);
}

#[test]
fn the_only_worker_hands_nothing_over_however_busy_it_is() {
    let world = World::new("1");
    world.while_hot(|| {
        let busy = || world.metric("malla_worker_busy_ratio", &[("worker", "0")]);
        // Longer than a second worker would have been given time.
        for _ in 0..30 {
            eventually("the worker to be busy", LIMIT, || busy() > 0.9).unwrap();
            drop(world.ask());
        }
        assert!(world.handed_over() == 0.0);
    });
}
