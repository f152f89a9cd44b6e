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
    paced,
    results::{Outcome, Row},
    scene::{BODY, Scene},
    usage,
};
use crate::interrupt;

/// How many idle connections are opened, to see what one of them takes.
const IDLE: u32 = 1000;

/// How many connections are few.
const FEW: u32 = 32;

/// HTTP/2: connections, and the streams of each.
const HTTP2: (u32, u32) = (8, 32);

const KIB: f64 = 1024.0;

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
        warm_up: 1,
        load: 3,
    };
    pub(super) const QUICK: Self = Self {
        warm_up: 1,
        load: 1,
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

    /// All loads but that of memory.
    pub(super) fn all(&self, outcome: &mut Outcome) -> Result<()> {
        self.requests(outcome)?;
        self.latency(outcome)?;
        self.http2(outcome)?;
        self.new_connections(outcome)?;
        self.bulk(outcome)
    }

    /// Fails where proxies are said to encrypt and the wire shows something else, or to carry and
    /// don't, so that nothing is measured that isn't there.
    pub(super) fn prove_proxies(&self) -> Result<()> {
        const REQUESTS: u32 = 10;
        let capture = self.scene.capture()?;
        drop(self.connect(REQUESTS)?);
        if self.scene.proxies.is_empty() {
            return Ok(());
        }
        if let Some(capture) = capture {
            let enough = BODY * REQUESTS as usize;
            until("answers in TLS on the wire", ANSWER_LIMIT, || {
                (capture.tls().encrypted >= enough).then_some(())
            })?;
            let other = capture.tls().other;
            ensure!(other.is_empty(), "the wire has plain streams: {other:?}");
        }
        if let Some(carried) = self.scene.carried()? {
            let enough = f64::from(REQUESTS);
            ensure!(carried >= enough, "the agent carried {carried} of {enough}");
        }
        Ok(())
    }

    /// Memory of the proxies at rest, and with connections that have had one answer each.
    pub(super) fn memory(&self, outcome: &mut Outcome) -> Result<()> {
        outcome.set(Row::IdleMemory, self.rss_at_rest()? / KIB);
        // The first connections take what every one after them finds there.
        for _ in 0..20 {
            drop(self.connect(10)?);
        }
        // Allocators give back some seconds later, and what they keep would hide what is measured.
        let before = self.rss_at_rest()?;
        let idle = self.connect(IDLE)?;
        let with_idle = self.still_rss()?;
        drop(idle);
        let each = (with_idle - before) / f64::from(IDLE);
        outcome.set(Row::ConnectionMemory, each.max(0.0) / KIB);
        Ok(())
    }

    /// Requests on one, on few and on many connections, and the processor time of those on few.
    pub(super) fn requests(&self, outcome: &mut Outcome) -> Result<()> {
        // A slow machine may take longer than that for the handshakes: answers aren't counted yet.
        self.run_wrk(FEW, self.times.warm_up, &[])?;
        for (connections, row) in [
            (1, Row::Requests1),
            (FEW, Row::Requests32),
            (256, Row::Requests256),
        ] {
            let before = usage::cpu_time(&self.scene.proxies)?;
            let requests = self.wrk(connections, self.times.load, &[])?;
            let used = usage::cpu_time(&self.scene.proxies)?.saturating_sub(before);
            if connections == FEW && !self.scene.proxies.is_empty() {
                let each = used.as_secs_f64() / requests.total;
                outcome.set(Row::RequestCpu, each * 100_000.0);
            }
            outcome.set(row, requests.rate);
            outcome.errors += requests.errors;
        }
        Ok(())
    }

    /// How long answers take at 2,000 requests a second.
    pub(super) fn latency(&self, outcome: &mut Outcome) -> Result<()> {
        interrupt::check()?;
        let time = Duration::from_secs(self.times.load.into());
        let Scene {
            client, web, pins, ..
        } = self.scene;
        let times = paced::answers(client, *web, time, pins.ends)?;
        let at = |share: usize| {
            let time = times.get(times.len() * share / 100);
            time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
        };
        outcome.set(Row::LatencyMedian, at(50));
        outcome.set(Row::LatencyHigh, at(99));
        Ok(())
    }

    /// Requests on many streams of few connections.
    pub(super) fn http2(&self, outcome: &mut Outcome) -> Result<()> {
        let (connections, streams) = (format!("-c{}", HTTP2.0), format!("-m{}", HTTP2.1));
        let said = self.h2load(self.scene.http2, &[&connections, &streams])?;
        let requests = Requests::parse_h2load(&said).filter(|requests| requests.total > 0.0);
        let requests = requests.with_context(|| format!("no request was answered:\n{said}"))?;
        outcome.set(Row::Http2, requests.rate);
        outcome.errors += requests.errors;
        Ok(())
    }

    /// Connections of one request each, which the server ends.
    pub(super) fn new_connections(&self, outcome: &mut Outcome) -> Result<()> {
        let close = ["-H", "Connection: close"];
        let short = self.wrk(FEW, self.times.load, &close)?;
        outcome.set(Row::NewConnections, short.rate);
        outcome.errors += short.errors;
        Ok(())
    }

    /// Streams from the client to the server, and the processor time of a single one's bytes.
    pub(super) fn bulk(&self, outcome: &mut Outcome) -> Result<()> {
        for (streams, row) in [("1", Row::Bulk1), ("4", Row::Bulk4)] {
            let before = usage::cpu_time(&self.scene.proxies)?;
            let (bytes, rate) = self.iperf3(streams)?;
            let used = usage::cpu_time(&self.scene.proxies)?.saturating_sub(before);
            if streams == "1" && !self.scene.proxies.is_empty() {
                outcome.set(Row::BulkCpu, used.as_secs_f64() / bytes * 1e10);
            }
            outcome.set(row, rate / 1e9);
        }
        Ok(())
    }

    /// Bytes that have come, and bits a second.
    fn iperf3(&self, streams: &str) -> Result<(f64, f64)> {
        let (seconds, bulk) = (self.times.load.to_string(), self.scene.bulk);
        let (address, port) = (bulk.ip().to_string(), bulk.port().to_string());
        let more = ["-t", &seconds, "-P", streams, "-c", &address, "-p", &port];
        let answer = self.run(&[&["iperf3", "-J"], &more[..]].concat())?;
        let answer: serde_json::Value = serde_json::from_str(&answer).context("iperf3's JSON")?;
        let received = &answer["end"]["sum_received"];
        let figure = |name: &str| received[name].as_f64();
        let figures = figure("bytes").zip(figure("bits_per_second"));
        figures.with_context(|| format!("no rate in what iperf3 says:\n{answer}"))
    }

    fn h2load(&self, to: SocketAddr, more: &[&str]) -> Result<String> {
        let time = format!("-D{}", self.times.load);
        let warm_up = format!("--warm-up-time={}", self.times.warm_up);
        let url = format!("http://{to}/");
        self.run(&[&["h2load", &time, &warm_up], more, &[url.as_str()]].concat())
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
                let ask = || {
                    let mut stream = connect(self.scene.web)?;
                    answer(&mut stream, self.scene.web)?;
                    anyhow::Ok(stream)
                };
                ask().with_context(|| format!("after {opened} connections"))
            });
            connections.collect()
        })
    }

    /// Memory of the proxies in bytes, when they have had nothing to do for a while.
    fn rss_at_rest(&self) -> Result<f64> {
        let rested = Instant::now() + REST;
        interrupt::wait_for("proxies at rest", 2 * REST, || Instant::now() >= rested)?;
        self.still_rss()
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

/// Opens a connection to nginx.
pub(super) fn connect(web: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&web, ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks nginx once and reads the answer.
pub(super) fn answer(stream: &mut TcpStream, web: SocketAddr) -> Result<()> {
    let request = format!("GET / HTTP/1.1\r\nHost: {web}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let (mut answer, mut part) = (Vec::new(), [0; 2 * BODY]);
    loop {
        let length = stream.read(&mut part)?;
        ensure!(length > 0, "closed after {} bytes", answer.len());
        answer.extend_from_slice(&part[..length]);
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n");
        if head.is_some_and(|head| answer.len() >= head + 4 + BODY) {
            return Ok(());
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

    /// Reads what h2load has printed.
    fn parse_h2load(said: &str) -> Option<Self> {
        let finished = said.lines().find(|line| line.starts_with("finished in "))?;
        let rate = finished.split(", ").nth(1)?.strip_suffix(" req/s")?;
        let line = said.lines().find(|line| line.starts_with("requests: "))?;
        let number = |what: &str| {
            let mut part = line.trim_start_matches("requests: ").split(", ");
            let number = part.find_map(|part| part.strip_suffix(what))?;
            number.trim().parse::<u32>().ok()
        };
        let failed = u64::from(number(" errored")?) + u64::from(number(" timeout")?);
        Some(Self {
            total: f64::from(number(" succeeded")?),
            rate: rate.parse().ok()?,
            errors: failed,
        })
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

    #[test]
    fn http2_requests_are_read() {
        let said = "\nfinished in 4.00s, 39800.25 req/s, 41.20MB/s\n\
                    requests: 159201 total, 159457 started, 159201 done, 159200 succeeded, 1 failed, 1 errored, 2 timeout\n\
                    status codes: 159201 2xx, 0 3xx, 0 4xx, 0 5xx\n";
        let requests = Requests {
            total: 159_200.0,
            rate: 39_800.25,
            errors: 3,
        };
        assert_eq!(Requests::parse_h2load(said), Some(requests));
    }
}
