//! The counters behind the TCP metrics, and their way into a scrape.
//!
//! A [`Series`] is retired only under the lock of [`Transports`] and only while no connection is
//! in it. A worker that remembers it enters first and looks at `retired` after, the scrape marks
//! first and looks for connections after, both in one total order: at least one sees the other.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

use super::{
    ConnectionLabels, Failure, Peer,
    key::{Key, LABELS},
};
use crate::telemetry::{
    collector::{Family, label},
    errno_label,
};

/// The series that may stand at a time. A port scan makes one a port.
pub(super) const MAX_SERIES: usize = 10_000;

/// How long a series without connections may stand still before a scrape drops it.
const RETAIN_IDLE: Duration = Duration::from_mins(10);

const CLOSE_LABELS: &[&str] = &[
    "client_id",
    "direction",
    "dst_namespace",
    "dst_pod",
    "dst_serviceaccount",
    "errno",
    "namespace",
    "no_tls_reason",
    "peer",
    "pod",
    "reason",
    "server_id",
    "serviceaccount",
    "src_namespace",
    "src_pod",
    "src_serviceaccount",
    "target_port",
    "tls",
];

pub(in crate::telemetry) const FAMILIES: [Family; 5] = [
    Family {
        name: "tcp_open_total",
        help: "Transports opened.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
    Family {
        name: "tcp_close_total",
        help: "Transports closed. In good order: errno and reason are empty.",
        kind: MetricType::COUNTER,
        labels: CLOSE_LABELS,
    },
    Family {
        name: "tcp_open_connections",
        help: "Transports that are open now.",
        kind: MetricType::GAUGE,
        labels: LABELS,
    },
    Family {
        name: "tcp_read_bytes_total",
        help: "Bytes read from transports.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
    Family {
        name: "tcp_write_bytes_total",
        help: "Bytes written to transports.",
        kind: MetricType::COUNTER,
        labels: LABELS,
    },
];

/// The counters of one transport.
#[derive(Debug, Default)]
pub(super) struct Counters {
    opened: AtomicU64,
    open: AtomicU64,
    read: AtomicU64,
    written: AtomicU64,
    closed_in_order: AtomicU64,
    /// A handful of entries, so a list is the quickest map.
    failed: Mutex<Vec<(Failure, u64)>>,
}

impl Counters {
    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn closed(&self, failure: Option<Failure>) {
        match failure {
            None => {
                self.closed_in_order.fetch_add(1, Ordering::Relaxed);
            }
            Some(failure) => {
                let mut failed = lock(&self.failed);
                match failed.iter_mut().find(|(seen, _)| *seen == failure) {
                    Some((_, count)) => *count += 1,
                    None => failed.push((failure, 1)),
                }
            }
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// A number that stands still while nothing happens.
    fn activity(&self) -> u64 {
        let counters = [&self.opened, &self.read, &self.written];
        let sum = counters.map(|counter| counter.load(Ordering::Relaxed));
        // How far a connection's end moves it doesn't matter: open connections keep a series.
        sum.into_iter().fold(0, u64::wrapping_add)
    }

    fn sample(&self, labels: &[LabelPair], into: &mut [Vec<Metric>; 5]) {
        let opened = self.opened.load(Ordering::Relaxed);
        if opened == 0 {
            return;
        }
        let [open_total, close_total, open_connections, read, written] = &FAMILIES;
        let [opens, closes, gauges, reads, writes] = into;
        opens.push(open_total.sample(labels.to_vec(), opened));
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        gauges.push(open_connections.sample(labels.to_vec(), load(&self.open)));
        reads.push(read.sample(labels.to_vec(), load(&self.read)));
        writes.push(written.sample(labels.to_vec(), load(&self.written)));
        let mut close = |errno: String, reason: &str, count| {
            let mut labels = labels.to_vec();
            labels.extend([label("errno", errno), label("reason", reason)]);
            labels.sort_by(|a, b| a.name().cmp(b.name()));
            closes.push(close_total.sample(labels, count));
        };
        close(String::new(), "", load(&self.closed_in_order));
        for (failure, count) in lock(&self.failed).iter() {
            close(errno_label(failure.errno), failure.reason.as_str(), *count);
        }
    }
}

/// The counters of all connections with the same labels.
#[derive(Debug, Default)]
pub(super) struct Series {
    src: Counters,
    dst: Counters,
    /// Connections that count here and haven't ended.
    connections: AtomicU64,
    /// No scrape sees this series any more.
    retired: AtomicBool,
}

impl Series {
    /// Counts a new connection, unless the series is retired: then false.
    pub(super) fn enter(&self) -> bool {
        self.connections.fetch_add(1, Ordering::SeqCst);
        if self.retired.load(Ordering::SeqCst) {
            self.leave();
            return false;
        }
        self.src.opened();
        true
    }

    pub(super) fn leave(&self) {
        self.connections.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn counters(&self, peer: Peer) -> &Counters {
        match peer {
            Peer::Src => &self.src,
            Peer::Dst => &self.dst,
        }
    }

    /// True if no connection is in the series, and from then on none can enter.
    fn retire(&self) -> bool {
        self.retired.store(true, Ordering::SeqCst);
        let empty = self.connections.load(Ordering::SeqCst) == 0;
        if !empty {
            self.retired.store(false, Ordering::SeqCst);
        }
        empty
    }
}

#[derive(Debug)]
struct Entry {
    series: Arc<Series>,
    /// What [`Counters::activity`] said at the last scrape that saw a change, and when that was.
    activity: u64,
    changed: Instant,
}

/// All series.
#[derive(Default)]
pub(in crate::telemetry) struct Transports {
    entries: Mutex<HashMap<Key, Entry>>,
}

impl Transports {
    /// Finds or makes the series of `labels`, and enters it.
    pub(super) fn enter(&self, labels: &ConnectionLabels) -> Arc<Series> {
        let mut key = Key::of(labels);
        let mut entries = lock(&self.entries);
        if entries.len() >= MAX_SERIES && !entries.contains_key(&key) {
            key = key.summed();
        }
        let entry = entries.entry(key).or_insert_with(|| Entry {
            series: Arc::default(),
            activity: 0,
            changed: Instant::now(),
        });
        let entered = entry.series.enter();
        // Series are retired under the lock that is held here, and leave the map with it.
        debug_assert!(entered, "a retired series is never in the map");
        Arc::clone(&entry.series)
    }

    /// Reads every series at the time `now`, then drops those that are idle.
    pub(in crate::telemetry) fn families(&self, now: Instant) -> Vec<MetricFamily> {
        let mut samples: [Vec<Metric>; 5] = Default::default();
        let mut entries = lock(&self.entries);
        for (key, entry) in entries.iter() {
            for peer in [Peer::Src, Peer::Dst] {
                let counters = entry.series.counters(peer);
                counters.sample(&key.labels(peer), &mut samples);
            }
        }
        entries.retain(|_, entry| {
            let activity = [Peer::Src, Peer::Dst].map(|p| entry.series.counters(p).activity());
            let activity = activity[0].wrapping_add(activity[1]);
            let in_use = entry.series.connections.load(Ordering::Relaxed) > 0;
            if in_use || activity != entry.activity {
                entry.activity = activity;
                entry.changed = now;
            }
            now.duration_since(entry.changed) < RETAIN_IDLE || !entry.series.retire()
        });
        drop(entries);
        let families = FAMILIES.iter().zip(samples);
        families
            .map(|(family, samples)| family.with(samples))
            .collect()
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transports").finish_non_exhaustive()
    }
}

/// No change under these locks is left half done, so a panic elsewhere doesn't spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
