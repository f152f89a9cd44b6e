//! The agent's own use of the machine, with the names that Linkerd's proxies have.
//!
//! Read from `/proc/self` at each scrape. What can't be read is left out of that scrape. The
//! network bytes are those of the netns of the process's first thread, which never enters a pod's.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use prometheus::proto::{MetricFamily, MetricType};

use super::collector::Family;

/// A family of one sample, and how its value is read.
type Reading = (Family, fn(&Sources) -> Option<f64>);

/// What several readings are made from.
struct Sources {
    /// `/proc/self/status`
    status: String,
    /// Bytes received and sent.
    network: Option<(f64, f64)>,
    /// When the process began.
    started: SystemTime,
}

const READINGS: [Reading; 10] = [
    (
        counter(
            "process_cpu_seconds_total",
            "Processor time of user and kernel, in seconds.",
        ),
        |_| cpu_seconds(),
    ),
    (
        gauge("process_virtual_memory_bytes", "Virtual memory in bytes."),
        |sources| sources.kib("VmSize:"),
    ),
    (
        gauge("process_resident_memory_bytes", "Resident memory in bytes."),
        |sources| sources.kib("VmRSS:"),
    ),
    (gauge("process_open_fds", "Open file descriptors."), |_| {
        open_descriptors(Path::new("/proc/self/fd"))
    }),
    (
        gauge(
            "process_max_fds",
            "File descriptors that the process may open.",
        ),
        |_| {
            let limits = getrlimit(Resource::RLIMIT_NOFILE).ok();
            limits.map(|(soft, _)| number(soft))
        },
    ),
    (gauge("process_threads", "Threads."), |sources| {
        sources.status_field("Threads:")
    }),
    (
        gauge(
            "process_start_time_seconds",
            "When the process began, in seconds since 1970.",
        ),
        |sources| seconds_since_epoch(sources.started),
    ),
    (
        gauge(
            "process_clock_time_seconds",
            "The process's clock, in seconds since 1970.",
        ),
        |_| seconds_since_epoch(SystemTime::now()),
    ),
    (
        counter(
            "process_network_receive_bytes_total",
            "Bytes that the interfaces of the process's netns received.",
        ),
        |sources| sources.network.map(|(received, _)| received),
    ),
    (
        counter(
            "process_network_transmit_bytes_total",
            "Bytes that the interfaces of the process's netns sent.",
        ),
        |sources| sources.network.map(|(_, sent)| sent),
    ),
];

const fn counter(name: &'static str, help: &'static str) -> Family {
    family(name, help, MetricType::COUNTER)
}

const fn gauge(name: &'static str, help: &'static str) -> Family {
    family(name, help, MetricType::GAUGE)
}

const fn family(name: &'static str, help: &'static str, kind: MetricType) -> Family {
    Family {
        name,
        help,
        kind,
        labels: &[],
    }
}

/// What [`families`] may have.
pub(super) fn described() -> [Family; 10] {
    READINGS.map(|(family, _)| family)
}

/// Reads everything. `started` is when the process began.
pub(super) fn families(started: SystemTime) -> Vec<MetricFamily> {
    let sources = Sources {
        status: fs::read_to_string("/proc/self/status").unwrap_or_default(),
        network: network_bytes(&fs::read_to_string("/proc/self/net/dev").unwrap_or_default()),
        started,
    };
    let read = READINGS.iter().filter_map(|(family, read)| {
        let value = read(&sources)?;
        Some(family.with(vec![family.sample_f64(Vec::new(), value)]))
    });
    read.collect()
}

impl Sources {
    /// A number of the status, without its unit.
    fn status_field(&self, key: &str) -> Option<f64> {
        let mut lines = self.status.lines();
        let line = lines.find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    }

    fn kib(&self, key: &str) -> Option<f64> {
        self.status_field(key).map(|kib| kib * 1024.0)
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the text format has doubles only"
)]
fn number(value: u64) -> f64 {
    value as f64
}

fn seconds_since_epoch(time: SystemTime) -> Option<f64> {
    let since = time.duration_since(UNIX_EPOCH).ok();
    since.as_ref().map(Duration::as_secs_f64)
}

fn cpu_seconds() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let total = usage.user_time() + usage.system_time();
    let total = Duration::new(
        u64::try_from(total.tv_sec()).ok()?,
        u32::try_from(total.tv_usec()).ok()? * 1000,
    );
    Some(total.as_secs_f64())
}

/// Since Linux 6.2 the folder's size is the number of descriptors; before, it is 0, and they are
/// counted. With 100,000 of them that takes milliseconds.
fn open_descriptors(folder: &Path) -> Option<f64> {
    let open = match fs::metadata(folder).ok()?.len() {
        // One of the entries is the descriptor that reads the folder.
        0 => (fs::read_dir(folder).ok()?.count() as u64).checked_sub(1)?,
        descriptors => descriptors,
    };
    Some(number(open))
}

/// Sums of received and sent bytes over the interfaces of `/proc/net/dev`.
fn network_bytes(devices: &str) -> Option<(f64, f64)> {
    let mut sums = None;
    for (_, counters) in devices.lines().filter_map(|line| line.split_once(':')) {
        let counters: Vec<&str> = counters.split_whitespace().collect();
        // Eight columns of receiving stand before those of sending; bytes are first in each.
        let received: f64 = counters.first()?.parse().ok()?;
        let transmitted: f64 = counters.get(8)?.parse().ok()?;
        let (receive_sum, transmit_sum) = sums.unwrap_or_default();
        sums = Some((receive_sum + received, transmit_sum + transmitted));
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_can_be_read_on_linux() {
        let mut found: Vec<String> = families(SystemTime::now())
            .iter()
            .map(|family| family.name().to_owned())
            .collect();
        let mut wanted = described().map(|family| family.name.to_owned());
        found.sort();
        wanted.sort();
        assert_eq!(found, wanted);
    }

    #[test]
    fn network_bytes_are_summed_over_interfaces() {
        let devices = "Inter-|   Receive                 |  Transmit\n\
                       face |bytes    packets errs drop fifo frame compressed multicast|bytes\n\
                       lo: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n\
                       eth0:5 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n";
        assert_eq!(network_bytes(devices), Some((15.0, 27.0)));
        assert_eq!(network_bytes(""), None);
    }
}
