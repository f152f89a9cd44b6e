//! What one pod's flood leaves to another pod of its node.
//!
//! A client without the mesh opens connections to one pod as fast as it can, while a meshed client asks
//! another pod of that node. The flooded pod is meshed or not; what the other one's slowest answers take
//! is compared.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use malla_testbed::{Pod, PodSpec, Process, Testbed};

use super::{
    results::{Outcome, Row, median},
    scene::{Pins, WEB, serve_web},
};
use crate::interrupt;

/// How often it is measured in a turn.
const SAMPLES: usize = 5;
/// Connections that the flood keeps opening.
const FLOOD: &str = "-c256";
/// How long the flood has begun before answers are timed, and until it ends after that.
const MARGIN: Duration = Duration::from_secs(1);
/// How long answers are timed.
const TIMED: Duration = Duration::from_secs(2);

/// One turn. `meshed`: whether the flooded pod is.
pub(super) fn measure(malla: &Path, pins: Pins, meshed: bool) -> Result<Outcome> {
    let bed = Testbed::new("bench")?.with_agents_on_cpu(pins.proxies);
    let mut bed = bed.with_agent_program(malla);
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    let client = bed.pod(&a, PodSpec::new("client"))?;
    let server = bed.pod(&b, PodSpec::new("server").port(WEB))?;
    let stranger = bed.pod(&a, PodSpec::new("stranger").unlisted())?;
    let flooded = PodSpec::new("flooded").port(WEB);
    let flooded = if meshed { flooded } else { flooded.unlisted() };
    let flooded = bed.pod(&b, flooded)?;
    let _programs = [
        serve_web(&server, bed.folder(), pins)?,
        serve_web(&flooded, bed.folder(), pins)?,
    ];
    bed.start_agents()?;
    let web = |pod: &Pod| SocketAddr::new(pod.v4().into(), WEB);
    let mut times = Vec::new();
    for _ in 0..SAMPLES {
        interrupt::check()?;
        let flood = flood(&stranger, web(&flooded), pins)?;
        interrupt::wait_for("the flood", 2 * MARGIN, has_lasted(MARGIN))?;
        times.push(slowest(&client, web(&server), pins)?);
        // The next sample's flood is to begin after this one's end.
        interrupt::wait_for("the end of the flood", 4 * MARGIN, || !flood.is_running())?;
    }
    let mut outcome = Outcome::default();
    let time = median(times.into_iter()).context("no sample")?;
    outcome.set(Row::FloodHigh, time);
    Ok(outcome)
}

fn has_lasted(time: Duration) -> impl Fn() -> bool {
    let began = Instant::now();
    move || began.elapsed() >= time
}

fn flood(stranger: &Pod, to: SocketAddr, pins: Pins) -> Result<Process> {
    let time = format!("-d{}s", (TIMED + 2 * MARGIN).as_secs());
    let url = format!("http://{to}/");
    let wrk = ["wrk", "-t1", FLOOD, &time, "-H", "Connection: close", &url];
    stranger.command(wrk).on_cpu(pins.ends).spawn()
}

/// The 99th percentile of the time that an answer takes, in milliseconds.
fn slowest(client: &Pod, to: SocketAddr, pins: Pins) -> Result<f64> {
    let (time, url) = (format!("-d{}s", TIMED.as_secs()), format!("http://{to}/"));
    let wrk = ["wrk", "-t1", "-c8", "--latency", &time, &url];
    let wrk = client.command(wrk).on_cpu(pins.ends);
    let said = wrk.limit(8 * TIMED).run()?.stdout;
    percentile(&said).with_context(|| format!("no 99th percentile in what wrk says:\n{said}"))
}

/// Reads it from what `wrk --latency` has printed, such as `99%    1.20ms`.
fn percentile(said: &str) -> Option<f64> {
    let mut lines = said.lines().map(str::trim);
    let time = lines.find_map(|line| line.strip_prefix("99%"))?.trim();
    let units = [("us", 0.001), ("ms", 1.0), ("s", 1000.0), ("m", 60_000.0)];
    units.into_iter().find_map(|(unit, milliseconds)| {
        let number: f64 = time.strip_suffix(unit)?.parse().ok()?;
        Some(number * milliseconds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_all_units_are_read() {
        for (said, expected) in [
            (
                "  Latency Distribution\n     90%    1.00ms\n     99%    2.50ms\n",
                2.5,
            ),
            ("     99%  250.00us\n", 0.25),
            ("     99%    1.50s \n", 1500.0),
        ] {
            let found = percentile(said).unwrap();
            assert!((found - expected).abs() < 1e-9, "{said}: {found}");
        }
        assert_eq!(percentile("nothing"), None);
    }
}
