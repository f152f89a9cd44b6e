//! The loads of one turn, and what they show.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use malla_testbed::until;

use super::{
    results::{Outcome, Row},
    scene::{BODY, Scene},
    usage,
};
use crate::interrupt;

/// How many idle connections are opened, to see what one of them takes.
const IDLE: u32 = 1000;

/// How many connections the short ones are spread over.
const SHORT: u32 = 32;

/// How long a single answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long memory must stay the same, and how long that is waited for.
const STILL: Duration = Duration::from_millis(300);
const STILL_LIMIT: Duration = Duration::from_secs(3);

/// How long the proxies are left alone before their memory is read: jemalloc keeps for 10 s what
/// the start has freed.
const REST: Duration = Duration::from_secs(12);

/// How long loads last, in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    warm_up: u32,
    load: u32,
}

impl Times {
    pub(super) const FULL: Self = Self {
        warm_up: 2,
        load: 4,
    };
    pub(super) const QUICK: Self = Self {
        warm_up: 1,
        load: 2,
    };
}

/// What puts load on a scene.
#[derive(Debug)]
pub(super) struct Load<'a> {
    scene: &'a Scene,
    times: Times,
    /// When the turn must have ended.
    deadline: Instant,
}

/// What wrk has seen.
#[derive(Debug, Default, PartialEq)]
struct Requests {
    total: f64,
    rate: f64,
    /// Connections and answers that failed.
    errors: u64,
}

impl<'a> Load<'a> {
    pub(super) fn new(scene: &'a Scene, times: Times, deadline: Instant) -> Self {
        Self {
            scene,
            times,
            deadline,
        }
    }

    /// Fails where proxies are said to encrypt and the wire shows something else, so that nothing
    /// is measured that isn't there.
    pub(super) fn prove_encryption(&self) -> Result<()> {
        const REQUESTS: u32 = 10;
        let capture = self.scene.capture()?;
        drop(self.connect(REQUESTS)?);
        if self.scene.proxies.is_empty() {
            return Ok(());
        }
        let enough = BODY * REQUESTS as usize;
        until("answers in TLS on the wire", ANSWER_LIMIT, || {
            (capture.tls().encrypted >= enough).then_some(())
        })?;
        let other = capture.tls().other;
        ensure!(other.is_empty(), "the wire has plain streams: {other:?}");
        Ok(())
    }

    /// Memory of the proxies at rest, and with connections that have had one answer each.
    pub(super) fn memory(&self, outcome: &mut Outcome) -> Result<()> {
        let rested = Instant::now() + REST;
        interrupt::wait_for("proxies at rest", 2 * REST, || Instant::now() >= rested)?;
        outcome.set(Row::IdleMemory, self.still_rss()?);
        // Allocators look for what they can give back while they are used, and what they keep
        // would hide what the connections take.
        for _ in 0..20 {
            drop(self.connect(10)?);
        }
        let before = self.still_rss()?;
        let idle = self.connect(IDLE)?;
        let with_idle = self.still_rss()?;
        drop(idle);
        let each = (with_idle - before) / f64::from(IDLE);
        outcome.set(Row::ConnectionMemory, each.max(0.0));
        Ok(())
    }

    /// Requests on few and on many connections, and the processor time of the former.
    pub(super) fn requests(&self, outcome: &mut Outcome) -> Result<()> {
        // A slow machine may take longer than that for the handshakes: answers aren't counted yet.
        self.run_wrk(32, self.times.warm_up, &[])?;
        let proxies = &self.scene.proxies;
        let before = usage::cpu_time(proxies)?;
        let few = self.wrk(32, self.times.load, &[])?;
        let used = usage::cpu_time(proxies)?.saturating_sub(before);
        let many = self.wrk(256, self.times.load, &[])?;
        if !proxies.is_empty() {
            let each = used.as_secs_f64() / few.total;
            outcome.set(Row::Cpu, each * 100_000.0);
        }
        outcome.set(Row::Requests32, few.rate);
        outcome.set(Row::Requests256, many.rate);
        outcome.errors += few.errors + many.errors;
        Ok(())
    }

    /// Connections of one request each, which the server ends.
    pub(super) fn new_connections(&self, outcome: &mut Outcome) -> Result<()> {
        let close = ["-H", "Connection: close"];
        let short = self.wrk(SHORT, self.times.load, &close)?;
        outcome.set(Row::NewConnections, short.rate);
        outcome.errors += short.errors;
        Ok(())
    }

    /// One stream from the client to the server.
    pub(super) fn bulk(&self, outcome: &mut Outcome) -> Result<()> {
        let (seconds, bulk) = (self.times.load.to_string(), self.scene.bulk);
        let (address, port) = (bulk.ip().to_string(), bulk.port().to_string());
        let answer = self.run(&["iperf3", "-J", "-t", &seconds, "-c", &address, "-p", &port])?;
        let answer: serde_json::Value = serde_json::from_str(&answer).context("iperf3's JSON")?;
        let rate = answer["end"]["sum_received"]["bits_per_second"].as_f64();
        let rate = rate.with_context(|| format!("no rate in what iperf3 says:\n{answer}"))?;
        outcome.set(Row::Bulk, rate / 1e9);
        Ok(())
    }

    fn wrk(&self, connections: u32, seconds: u32, more: &[&str]) -> Result<Requests> {
        let said = self.run_wrk(connections, seconds, more)?;
        let requests = Requests::parse(&said).filter(|requests| requests.total > 0.0);
        requests.with_context(|| format!("no request was answered:\n{said}"))
    }

    fn run_wrk(&self, connections: u32, seconds: u32, more: &[&str]) -> Result<String> {
        let (connections, time) = (format!("-c{connections}"), format!("-d{seconds}s"));
        let url = format!("http://{}/", self.scene.web);
        self.run(&[&["wrk", "-t1", &connections, &time, &url], more].concat())
    }

    /// Runs a program in the client pod, within the time that is left.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        interrupt::check()?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let command = self.scene.client.command(arguments);
        let command = command.on_cpu(self.scene.pins.ends).limit(left);
        Ok(command.run()?.stdout)
    }

    /// Opens connections that have had one answer each.
    fn connect(&self, number: u32) -> Result<Vec<TcpStream>> {
        self.scene.client.enter(|| {
            let connections = (0..number).map(|opened| {
                if Instant::now() > self.deadline {
                    bail!("no time is left");
                }
                ask(self.scene.web).with_context(|| format!("after {opened} connections"))
            });
            connections.collect()
        })
    }

    /// Memory of the proxies in bytes, once it doesn't change any more.
    fn still_rss(&self) -> Result<f64> {
        let limit = Instant::now() + STILL_LIMIT;
        let mut last = usage::rss(&self.scene.proxies)?;
        loop {
            thread::sleep(STILL);
            let now = usage::rss(&self.scene.proxies)?;
            if now == last || Instant::now() > limit {
                // Memory fits into 52 bits.
                #[expect(clippy::cast_precision_loss)]
                return Ok(now as f64);
            }
            last = now;
        }
    }
}

/// Opens a connection and reads one answer from it.
fn ask(address: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")?;
    let (mut answer, mut part) = (Vec::new(), [0; 2 * BODY]);
    loop {
        let length = stream.read(&mut part)?;
        ensure!(length > 0, "closed after {} bytes", answer.len());
        answer.extend_from_slice(&part[..length]);
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n");
        if head.is_some_and(|head| answer.len() >= head + 4 + BODY) {
            return Ok(stream);
        }
    }
}

impl Requests {
    /// Reads what wrk has printed.
    fn parse(said: &str) -> Option<Self> {
        let mut requests = Self::default();
        for line in said.lines().map(str::trim) {
            if let Some((total, _)) = line.split_once(" requests in ") {
                requests.total = total.parse().ok()?;
            } else if let Some(rate) = line.strip_prefix("Requests/sec:") {
                requests.rate = rate.trim().parse().ok()?;
            } else if line.starts_with("Socket errors:") || line.starts_with("Non-2xx") {
                let words = line.split([' ', ',']);
                requests.errors += words
                    .filter_map(|word| word.parse::<u64>().ok())
                    .sum::<u64>();
            }
        }
        Some(requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_all_kinds_of_errors_are_read() {
        let said = "Running 2s test @ http://10.0.0.1/\n\
                    \x20 1 threads and 32 connections\n\
                    \x20 84210 requests in 2.00s, 105.20MB read\n\
                    \x20 Socket errors: connect 1, read 20, write 0, timeout 3\n\
                    \x20 Non-2xx or 3xx responses: 5\n\
                    Requests/sec:  42100.55\n\
                    Transfer/sec:     52.60MB\n";
        let requests = Requests {
            total: 84210.0,
            rate: 42100.55,
            errors: 29,
        };
        assert_eq!(Requests::parse(said), Some(requests));
    }
}
