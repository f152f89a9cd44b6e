//! Requests at a set rate, whatever the answers take (an open loop).
//!
//! An answer's time counts from when its request was due, not from when it could be sent: one that
//! is late makes those behind it late as well, as it does to users. Programs that send at a set rate
//! let all their connections send at once, which measures that.

use std::{
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use malla_testbed::Pod;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::prctl::set_timerslack,
    unistd::Pid,
};

use super::load::{answer, connect};

/// Requests a second, all connections together.
const RATE: u32 = 2_000;

/// Connections, which take turns: each one's answer may take some milliseconds before it makes
/// another request late.
const CONNECTIONS: u32 = 20;

/// What threads may take to start.
const HEAD_START: Duration = Duration::from_millis(100);

/// Asks from `client` for `time`. How long answers took, sorted.
pub(super) fn answers(
    client: &Pod,
    web: SocketAddr,
    time: Duration,
    cpu: Option<usize>,
) -> Result<Vec<Duration>> {
    let opened = || {
        let mut stream = connect(web)?;
        answer(&mut stream, web)?;
        anyhow::Ok(stream)
    };
    let streams = client.enter(|| {
        (0..CONNECTIONS)
            .map(|_| opened())
            .collect::<Result<Vec<_>>>()
    })?;
    let begin = Instant::now() + HEAD_START;
    let one = |number: u32, mut stream: TcpStream| {
        set_up_thread(cpu)?;
        let every = Duration::from_secs(1) * CONNECTIONS / RATE;
        let mut due = begin + Duration::from_secs(1) * number / RATE;
        let mut times = Vec::new();
        while due < begin + time {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            answer(&mut stream, web)?;
            times.push(due.elapsed());
            due += every;
        }
        anyhow::Ok(times)
    };
    let mut times = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(streams)
            .map(|(number, stream)| scope.spawn(move || one(number, stream)))
            .collect();
        let ended = threads.into_iter().map(|thread| {
            let ended = thread.join().map_err(|_| anyhow!("a caller panicked"))?;
            ended.context("requests at a set rate")
        });
        ended.collect::<Result<Vec<_>>>()
    })?
    .concat();
    times.sort_unstable();
    Ok(times)
}

/// Threads sleep to the microsecond, where by default they may be woken 50 later.
fn set_up_thread(cpu: Option<usize>) -> Result<()> {
    set_timerslack(1)?;
    if let Some(cpu) = cpu {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &only)?;
    }
    Ok(())
}
