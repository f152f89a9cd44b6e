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

use malla_common::Reason;
use prometheus::proto::{LabelPair, Metric, MetricFamily};

use super::{
    ConnectionLabels, Failure, Peer,
    families::{AUTHORIZATION, FAMILIES, RETRIES},
    key::{Key, ReporterKey},
    reporter::{self, Reporter},
    routes::{self, ReadEndpoints, Routes},
};
use crate::{
    model::MtlsMode,
    telemetry::{
        collector::{Family, label},
        errno_label,
    },
};

/// The lines that a scrape may have of connections and Services.
const MAX_ALL_LINES: usize = 20_000;

/// Those of connections. A port scan makes some for each port.
pub(super) const MAX_LINES: usize = MAX_ALL_LINES - routes::MAX_LINES;

/// The lines of one series: five families of two transports, two kinds of failure, and one of a retry
/// or, inbound, two of authorization.
const LINES: usize = 14;

/// The series that one reporting workload may have in a direction, so that one's port scan doesn't
/// leave the others without: half of all.
pub(super) const MAX_OF_ONE: usize = MAX_LINES / LINES / 2;

/// How long a series without connections may stand still before a scrape drops it.
const RETAIN_IDLE: Duration = Duration::from_mins(10);

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

    /// As [`Series::activity`].
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
    reporter: Arc<Reporter>,
    src: Counters,
    dst: Counters,
    /// Connections that failed here and were tried elsewhere, by why. A handful of entries.
    retried: Mutex<Vec<(Reason, u64)>>,
    /// Of an inbound one, by the port's mode and what it said: allowed, denied.
    authorized: [[AtomicU64; 2]; 2],
    /// Connections that count here and haven't ended.
    connections: AtomicU64,
    /// No scrape sees this series any more.
    retired: AtomicBool,
}

impl Series {
    /// Keeps the series for a connection, unless it is retired: then false.
    pub(super) fn enter(&self) -> bool {
        self.connections.fetch_add(1, Ordering::SeqCst);
        if self.retired.load(Ordering::SeqCst) {
            self.leave();
            return false;
        }
        true
    }

    pub(super) fn retried(&self, reason: Reason) {
        let mut retried = lock(&self.retried);
        match retried.iter_mut().find(|(seen, _)| *seen == reason) {
            Some((_, count)) => *count += 1,
            None => retried.push((reason, 1)),
        }
    }

    pub(super) fn authorized(&self, mode: MtlsMode, is_allowed: bool) {
        let [permissive, strict] = &self.authorized;
        let [allowed, denied] = match mode {
            MtlsMode::Permissive => permissive,
            MtlsMode::Strict => strict,
        };
        let count = if is_allowed { allowed } else { denied };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Under the names that Linkerd has for a port's policy where no resource says another one.
    fn sample_authorization(&self, key: &Key, into: &mut [Vec<Metric>; 2]) {
        let policies = ["all-unauthenticated", "all-authenticated"];
        for (policy, counts) in policies.iter().zip(&self.authorized) {
            let each = counts.iter().zip(&AUTHORIZATION).zip(into.iter_mut());
            for ((count, family), samples) in each {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    samples.push(family.sample(authorization_labels(key, policy, family), count));
                }
            }
        }
    }

    /// A number that stands still while nothing happens.
    fn activity(&self) -> u64 {
        let retried = lock(&self.retried).iter().map(|(_, count)| *count).sum();
        let transports = [&self.src, &self.dst].map(Counters::activity);
        transports.into_iter().fold(retried, u64::wrapping_add)
    }

    fn sample_retries(&self, key: &Key, into: &mut Vec<Metric>) {
        let retried = lock(&self.retried);
        if retried.is_empty() {
            return;
        }
        let mut labels = key.labels(Peer::Dst);
        labels.retain(|label| RETRIES.labels.contains(&label.name()));
        for (reason, count) in retried.iter() {
            let mut labels = labels.clone();
            labels.push(label("reason", reason.as_str()));
            labels.sort_by(|a, b| a.name().cmp(b.name()));
            into.push(RETRIES.sample(labels, *count));
        }
    }

    pub(super) fn leave(&self) {
        self.connections.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn reporter(&self) -> &Reporter {
        &self.reporter
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
    /// What [`Series::activity`] said at the last scrape that saw a change, and when that was.
    activity: u64,
    changed: Instant,
}

#[derive(Default)]
struct Entries {
    series: HashMap<Key, Entry>,
    reporters: HashMap<ReporterKey, (Arc<Reporter>, usize)>,
}

impl Entries {
    /// Whether a new series would make the scrape, or its reporter's part of it, too long.
    fn is_full(&self, reporter: &ReporterKey) -> bool {
        let lines = self.series.len() * LINES + self.reporters.len() * reporter::LINES;
        let series = self
            .reporters
            .get(reporter)
            .map_or(0, |(_, series)| *series);
        lines + LINES + reporter::LINES > MAX_LINES || series >= MAX_OF_ONE
    }

    fn insert(&mut self, key: Key) -> Arc<Series> {
        let (reporter, count) = self.reporters.entry(key.reporter()).or_default();
        *count += 1;
        let series = Arc::new(Series {
            reporter: Arc::clone(reporter),
            ..Series::default()
        });
        let entry = Entry {
            series: Arc::clone(&series),
            activity: 0,
            changed: Instant::now(),
        };
        self.series.insert(key, entry);
        series
    }

    /// Forgets what has stood still for too long at the time `now`.
    fn retire(&mut self, now: Instant) {
        self.series.retain(|key, entry| {
            let activity = entry.series.activity();
            let in_use = entry.series.connections.load(Ordering::Relaxed) > 0;
            if in_use || activity != entry.activity {
                entry.activity = activity;
                entry.changed = now;
            }
            let stays = now.duration_since(entry.changed) < RETAIN_IDLE || !entry.series.retire();
            if !stays && let Some((_, count)) = self.reporters.get_mut(&key.reporter()) {
                *count -= 1;
            }
            stays
        });
        self.reporters.retain(|_, (_, series)| *series > 0);
    }
}

/// All series.
#[derive(Default)]
pub(in crate::telemetry) struct Transports {
    entries: Mutex<Entries>,
    pub(super) routes: Routes,
}

/// What names a client, the port that it came to, and that one's policy.
fn authorization_labels(key: &Key, policy: &str, family: &Family) -> Vec<LabelPair> {
    let mut labels = key.labels(Peer::Src);
    let port = labels
        .iter()
        .find(|label| label.name() == "target_port")
        .map_or_else(String::new, |port| port.value().to_owned());
    for object in ["authz", "srv"] {
        let named = [("group", ""), ("kind", "default"), ("name", policy)];
        labels.extend(named.map(|(what, value)| label(&format!("{object}_{what}"), value)));
    }
    labels.push(label("srv_port", port));
    labels.retain(|label| family.labels.contains(&label.name()));
    labels.sort_by(|a, b| a.name().cmp(b.name()));
    labels
}

impl Transports {
    /// Finds or makes the series of `labels`, and enters it.
    pub(super) fn enter(&self, labels: &ConnectionLabels) -> Arc<Series> {
        let mut key = Key::of(labels);
        let mut entries = lock(&self.entries);
        if !entries.series.contains_key(&key) && entries.is_full(&key.reporter()) {
            key = key.summed();
        }
        let series = match entries.series.get(&key) {
            Some(entry) => Arc::clone(&entry.series),
            None => entries.insert(key),
        };
        let entered = series.enter();
        // Series are retired under the lock that is held here, and leave the map with it.
        debug_assert!(entered, "a retired series is never in the map");
        series
    }

    pub(in crate::telemetry) fn set_endpoints(&self, read: ReadEndpoints) {
        self.routes.set_endpoints(read);
    }

    /// Reads every series at the time `now`, then drops those that are idle.
    pub(in crate::telemetry) fn families(&self, now: Instant) -> Vec<MetricFamily> {
        let mut samples: [Vec<Metric>; 5] = Default::default();
        let mut retries = Vec::new();
        let mut authorized: [Vec<Metric>; 2] = Default::default();
        let mut of_reporters: [Vec<Metric>; 3] = Default::default();
        let mut entries = lock(&self.entries);
        for (key, entry) in &entries.series {
            for peer in [Peer::Src, Peer::Dst] {
                let counters = entry.series.counters(peer);
                counters.sample(&key.labels(peer), &mut samples);
            }
            entry.series.sample_retries(key, &mut retries);
            entry.series.sample_authorization(key, &mut authorized);
        }
        for (key, (reporter, _)) in &entries.reporters {
            let (namespace, pod) = key.pod();
            reporter.sample(key.direction, namespace, pod, &mut of_reporters);
        }
        entries.retire(now);
        drop(entries);
        let families = FAMILIES.iter().zip(samples);
        let families = families.map(|(family, samples)| family.with(samples));
        let authorized = AUTHORIZATION.iter().zip(authorized);
        let authorized = authorized.map(|(family, samples)| family.with(samples));
        let families = families.chain([RETRIES.with(retries)]).chain(authorized);
        let families = families.chain(self.routes.families());
        families.chain(reporter::families(of_reporters)).collect()
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transports").finish_non_exhaustive()
    }
}

/// No change under these locks is left half done, so a panic elsewhere doesn't spoil them.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
