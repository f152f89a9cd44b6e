//! What processes have used, as /proc tells it.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// The processor time that the processes have used so far, in user space and in the kernel, all
/// threads together.
pub(super) fn cpu_time(pids: &[i32]) -> Result<Duration> {
    let ticks = pids.iter().map(|pid| {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).context(path)?;
        ticks(&stat).with_context(|| format!("processor time in `{stat}`"))
    });
    let ticks: u64 = ticks.sum::<Result<u64>>()?;
    let second = sysconf(SysconfVar::CLK_TCK)?.context("clock ticks a second")?;
    let second = u64::try_from(second)?.max(1);
    Ok(Duration::from_millis(ticks * 1000 / second))
}

/// Memory of the processes that is in RAM, in bytes, counted page by page: the sum in
/// /proc/PID/status may lag by some hundred KiB.
pub(super) fn rss(pids: &[i32]) -> Result<u64> {
    let bytes = pids.iter().map(|pid| {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        resident(&text).with_context(|| format!("no Rss in {path}"))
    });
    bytes.sum()
}

/// Fields 14 and 15 of a stat line. The name before them may contain anything but `)`.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn resident(smaps: &str) -> Option<u64> {
    let line = smaps.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_with_spaces_and_brackets() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 900 0 3 0 120 34 0 0 20 0 4 0 100 1 2";
        assert_eq!(ticks(stat), Some(154));
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        let text = "5500-7fff ---p 00000000 00:00 0 [rollup]\nRss:      12 kB\nPss:   3 kB\n";
        assert_eq!(resident(text), Some(12 * 1024));
    }
}
