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

const fn family(name: &'static str, help: &'static str, kind: MetricType) -> Family {
    Family {
        name,
        help,
        kind,
        labels: &[],
    }
}

const CPU: Family = family(
    "process_cpu_seconds_total",
    "Processor time of user and kernel, in seconds.",
    MetricType::COUNTER,
);
const VIRTUAL: Family = family(
    "process_virtual_memory_bytes",
    "Virtual memory in bytes.",
    MetricType::GAUGE,
);
const RESIDENT: Family = family(
    "process_resident_memory_bytes",
    "Resident memory in bytes.",
    MetricType::GAUGE,
);
const OPEN_FDS: Family = family(
    "process_open_fds",
    "Open file descriptors.",
    MetricType::GAUGE,
);
const MAX_FDS: Family = family(
    "process_max_fds",
    "File descriptors that the process may open.",
    MetricType::GAUGE,
);
const THREADS: Family = family("process_threads", "Threads.", MetricType::GAUGE);
const START: Family = family(
    "process_start_time_seconds",
    "When the process began, in seconds since 1970.",
    MetricType::GAUGE,
);
const CLOCK: Family = family(
    "process_clock_time_seconds",
    "The process's clock, in seconds since 1970.",
    MetricType::GAUGE,
);
const RECEIVED: Family = family(
    "process_network_receive_bytes_total",
    "Bytes that the interfaces of the process's netns received.",
    MetricType::COUNTER,
);
const TRANSMITTED: Family = family(
    "process_network_transmit_bytes_total",
    "Bytes that the interfaces of the process's netns sent.",
    MetricType::COUNTER,
);

pub(super) const FAMILIES: [Family; 10] = [
    CPU,
    VIRTUAL,
    RESIDENT,
    OPEN_FDS,
    MAX_FDS,
    THREADS,
    START,
    CLOCK,
    RECEIVED,
    TRANSMITTED,
];

/// Reads everything. `started` is when the process began.
pub(super) fn families(started: SystemTime) -> Vec<MetricFamily> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let devices = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let kib = |key| status_field(&status, key).map(|kib| kib * 1024);
    let network = network_bytes(&devices);
    let whole = [
        (VIRTUAL, kib("VmSize:")),
        (RESIDENT, kib("VmRSS:")),
        (THREADS, status_field(&status, "Threads:")),
        (OPEN_FDS, open_descriptors(Path::new("/proc/self/fd"))),
        (
            MAX_FDS,
            getrlimit(Resource::RLIMIT_NOFILE)
                .ok()
                .map(|(soft, _)| soft),
        ),
        (RECEIVED, network.map(|(received, _)| received)),
        (TRANSMITTED, network.map(|(_, transmitted)| transmitted)),
    ];
    let fractional = [
        (CPU, cpu_seconds()),
        (START, seconds_since_epoch(started)),
        (CLOCK, seconds_since_epoch(SystemTime::now())),
    ];
    let whole = whole.into_iter().filter_map(|(family, value)| {
        value.map(|value| family.with(vec![family.sample(Vec::new(), value)]))
    });
    let fractional = fractional.into_iter().filter_map(|(family, value)| {
        value.map(|value| family.with(vec![family.sample_f64(Vec::new(), value)]))
    });
    whole.chain(fractional).collect()
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

/// A number of `/proc/self/status`, without its unit.
fn status_field(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Since Linux 6.2 the folder's size is the number of descriptors; before, it is 0, and they are
/// counted. With 100,000 of them that takes milliseconds.
fn open_descriptors(folder: &Path) -> Option<u64> {
    match fs::metadata(folder).ok()?.len() {
        // One of the entries is the descriptor that reads the folder.
        0 => (fs::read_dir(folder).ok()?.count() as u64).checked_sub(1),
        descriptors => Some(descriptors),
    }
}

/// Sums of received and sent bytes over the interfaces of `/proc/net/dev`.
fn network_bytes(devices: &str) -> Option<(u64, u64)> {
    let mut sums = None;
    for (_, counters) in devices.lines().filter_map(|line| line.split_once(':')) {
        let counters: Vec<&str> = counters.split_whitespace().collect();
        // Eight columns of receiving stand before those of sending; bytes are first in each.
        let received: u64 = counters.first()?.parse().ok()?;
        let transmitted: u64 = counters.get(8)?.parse().ok()?;
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
        let mut wanted = FAMILIES.map(|family| family.name.to_owned());
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
        assert_eq!(network_bytes(devices), Some((15, 27)));
        assert_eq!(network_bytes(""), None);
    }
}
