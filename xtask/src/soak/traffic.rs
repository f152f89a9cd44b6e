//! Connections that live for a while: conversations, and bytes in bulk both ways at once.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use malla_testbed::{
    EchoApp, Node, Pod, PodSpec, Polled, Testbed,
    payload::{Payload, receive_all, send},
};

const PORT: u16 = 8080;
/// Conversations of each pair of pods at a time.
const TALKERS: u64 = 4;
/// Messages of one connection, and the longest.
const MESSAGES: u64 = 25;
const LONGEST: u64 = 48 << 10;
const BETWEEN: Duration = Duration::from_millis(40);
/// What a connection in bulk carries each way.
const BULK: usize = 8 << 20;
const BETWEEN_BULKS: Duration = Duration::from_millis(500);

/// A client, and a server whose app echoes.
struct Pair {
    client: Arc<Pod>,
    server: Arc<Pod>,
    _app: EchoApp,
}

/// Pairs of pods, and what they have said.
pub(super) struct Traffic {
    pairs: Vec<Pair>,
    done: AtomicBool,
    connections: AtomicU64,
    bytes: AtomicU64,
}

impl Traffic {
    /// Makes the pods: a pair across the nodes, one on one node, and an accelerated one. The agents
    /// are yet to be started.
    pub(super) fn new(bed: &mut Testbed, nodes: &[Arc<Node>; 2]) -> Result<Self> {
        let [a, b] = nodes;
        let mut pair = |name: &str, on: &Arc<Node>, accelerate: &str| -> Result<Pair> {
            let settings = format!("accelerate: {accelerate}");
            let spec = |end: &str| PodSpec::new(format!("{name}-{end}")).settings(&settings);
            let client = bed.pod(a, spec("client"))?;
            let server = bed.pod(on, spec("server").port(PORT))?;
            let app = server.polled_echo(PORT)?;
            Ok(Pair {
                client,
                server,
                _app: app,
            })
        };
        let pairs = vec![
            pair("far", b, "auto")?,
            pair("beside", a, "auto")?,
            pair("swift", b, "full")?,
        ];
        Ok(Self {
            pairs,
            done: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// Connections so far, and the bytes that came back on them.
    pub(super) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Lets [`Self::run`] come to its end.
    pub(super) fn stop(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// Opens connection after connection, until it is stopped. An error at the first byte that
    /// doesn't come back.
    pub(super) fn run(&self) -> Result<()> {
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, pair) in (0_u64..).zip(&self.pairs) {
                for talker in 0..TALKERS {
                    let seed = number * 1_000_000 + talker * 10_000;
                    threads.push(scope.spawn(move || self.again(pair, seed, Self::talk)));
                }
                let seed = number * 1_000_000 + 900_000;
                threads.push(scope.spawn(move || self.again(pair, seed, Self::bulk)));
            }
            let mut outcome = Ok(());
            for thread in threads {
                let ended = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
                outcome = outcome.and(ended);
            }
            outcome
        })
    }

    /// One connection after the other.
    fn again(
        &self,
        pair: &Pair,
        seed: u64,
        work: fn(&Self, &Polled, u64) -> Result<()>,
    ) -> Result<()> {
        for turn in seed.. {
            if self.done.load(Ordering::Relaxed) {
                break;
            }
            let addresses = pair.server.addresses();
            let address = usize::try_from(turn)? % addresses.len();
            let to = SocketAddr::new(addresses[address], PORT);
            let stream = pair.client.caller().connect(to);
            let spoken = stream
                .and_then(Polled::new)
                .context("connecting")
                .and_then(|stream| work(self, &stream, turn));
            if let Err(error) = spoken {
                self.stop();
                bail!(
                    "connection {turn} of {} to {to}: {error:#}",
                    pair.client.name()
                );
            }
            self.connections.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Messages of many lengths, each of which comes back before the next one is sent.
    fn talk(&self, mut stream: &Polled, seed: u64) -> Result<()> {
        let mut payload = Payload::new(seed);
        for message in 0..MESSAGES {
            // Lengths that repeat late, from a byte on.
            let length = usize::try_from((seed * 7919 + message * message * 31) % LONGEST + 1)?;
            let sent = payload.next(length);
            stream.write_all(sent).context("sending")?;
            let mut received = vec![0; length];
            stream.read_exact(&mut received).context("receiving")?;
            ensure!(
                received == sent,
                "other bytes came back in message {message}"
            );
            self.bytes.fetch_add(length as u64, Ordering::Relaxed);
            thread::sleep(BETWEEN);
        }
        stream.0.shutdown(Shutdown::Write)?;
        ensure!(stream.read(&mut [0])? == 0, "bytes in place of the end");
        Ok(())
    }

    /// Bytes without a pause both ways at once.
    fn bulk(&self, stream: &Polled, seed: u64) -> Result<()> {
        thread::scope(|scope| {
            let sending = scope.spawn(move || {
                send(stream, seed, BULK)?;
                Ok(stream.0.shutdown(Shutdown::Write)?)
            });
            let received = receive_all(stream, seed, BULK);
            let sent: Result<()> = sending.join().unwrap_or_else(|panic| resume_unwind(panic));
            received.and(sent)
        })?;
        self.bytes.fetch_add(BULK as u64, Ordering::Relaxed);
        thread::sleep(BETWEEN_BULKS);
        Ok(())
    }
}
