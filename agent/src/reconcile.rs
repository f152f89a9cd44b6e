//! Holds the ledger beside the kernel every few seconds, and tells what differs for long.
//!
//! A look reads `/proc/self/fd` and the sockets of the pods' netns, off the workers and off the
//! control thread. It may take long on a large node (the kernel walks its whole table for each
//! netns), so it asks pods in turn for a bounded time, and looks take at most one fiftieth of one
//! processor: the more there is to look at, the rarer. Where something is about to be told of, all
//! pods are asked at once, to say whose it is.
//!
//! A look also sees legs whose app has gone without a word, and has the kernel ask for it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use tokio::task::{JoinError, JoinHandle, spawn_blocking};

use crate::{
    ledger::{
        self, Account, Alarms, Descriptor, Descriptors, Difference, DifferenceKind, Event, Group,
        KernelAccount, Kind, Persistence, PodSockets,
    },
    model::WorkloadId,
    steer::{Pod, ends_of, notice_gone, sockets_of},
    telemetry::Metrics,
};

/// How long after a look the next one comes at the earliest, and how much later at most: what
/// happens each second must not fall together with each look.
const INTERVAL: Duration = Duration::from_secs(2);
const JITTER: Duration = Duration::from_millis(500);
/// Of so much time a look takes one part of a processor at most.
const SHARE: u32 = 50;
/// How long the pods' sockets are asked for in one look.
const ASKING: Duration = Duration::from_millis(20);

/// A pod that is served, as a look needs it.
#[derive(Debug, Clone)]
pub struct Served {
    pub workload: WorkloadId,
    pub pod: Arc<Pod>,
    pub tasks: u32,
}

/// What looks, and what it has seen.
pub struct Reconciler {
    shared: Arc<Shared>,
    looking: Option<JoinHandle<()>>,
}

struct Shared {
    metrics: Arc<Metrics>,
    /// Descriptors that were open before anything was entered.
    from_start: HashSet<Descriptor>,
    descriptors: Mutex<Descriptors>,
    seen: Mutex<Seen>,
}

struct Seen {
    next: Instant,
    /// Whether descriptors couldn't be read the last time.
    is_blind: bool,
    /// The pod that was asked last.
    asked: u32,
    /// What the kernel said of each pod last.
    kernel: HashMap<u32, KernelAccount>,
    persistence: Persistence,
    alarms: Alarms,
}

impl Reconciler {
    /// To be made when the agent has opened what it keeps for its life, and before it serves pods:
    /// whatever is open now is accounted for.
    pub fn new(metrics: Arc<Metrics>) -> io::Result<Self> {
        let seen = Seen {
            next: Instant::now(),
            is_blind: false,
            asked: 0,
            kernel: HashMap::new(),
            persistence: Persistence::default(),
            alarms: Alarms::default(),
        };
        let mut descriptors = Descriptors::default();
        let shared = Shared {
            metrics,
            from_start: descriptors.list(&[])?.into_iter().collect(),
            descriptors: Mutex::new(descriptors),
            seen: Mutex::new(seen),
        };
        Ok(Self {
            shared: Arc::new(shared),
            looking: None,
        })
    }

    /// Begins a look where one is due.
    pub fn look(&mut self, served: impl FnOnce() -> Vec<Served>) {
        let is_looking = self
            .looking
            .as_ref()
            .is_some_and(|look| !look.is_finished());
        if is_looking || Instant::now() < self.shared.seen().next {
            return;
        }
        let (shared, served) = (Arc::clone(&self.shared), served());
        self.looking = Some(spawn_blocking(move || shared.look(&served)));
    }

    /// Looks at everything now, for who has asked.
    pub fn account(
        &self,
        served: Vec<Served>,
    ) -> impl Future<Output = Result<io::Result<Account>, JoinError>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        spawn_blocking(move || shared.account(&served, None))
    }

    /// How long a difference has been there at each look.
    pub fn persistence(&self) -> impl Fn(&Difference) -> Duration + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move |difference| shared.seen().persistence.age(difference, Instant::now())
    }
}

/// What was seen is whole between any two calls, so a panic elsewhere doesn't spoil it.
fn lock<T>(seen: &Mutex<T>) -> MutexGuard<'_, T> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    fn look(&self, served: &[Served]) {
        let began = processor_time();
        let has_suspects = self.seen().persistence.has_suspects(Instant::now());
        let budget = (!has_suspects).then_some(ASKING);
        match self.account(served, budget) {
            Ok(account) => self.conclude(served, &account),
            Err(error) => self.stay_blind(&error),
        }
        let took = processor_time().saturating_sub(began);
        self.metrics.ledger().set_look(took);
        let jitter = JITTER.mul_f64(fastrand::f64());
        self.seen().next = Instant::now() + (took * SHARE).max(INTERVAL) + jitter;
    }

    /// The agent's descriptors can't be read, as while all are in use. Any of its legs may stand alone, and take
    /// one that it needs.
    fn stay_blind(&self, error: &io::Error) {
        for line in ledger::lines() {
            if line.kind.is_to_app() {
                notice_gone(line.descriptor);
            }
        }
        // Told once, until they can be read again.
        if !mem::replace(&mut self.seen().is_blind, true) {
            tracing::warn!(%error, "the agent's descriptors can't be read");
        }
    }

    fn account(&self, served: &[Served], budget: Option<Duration>) -> io::Result<Account> {
        let sockets = self.ask(served, budget);
        let descriptors = lock(&self.descriptors).list(&ledger::lines())?;
        let lines = ledger::lines();
        let mut account = ledger::compare(&lines, &descriptors, &self.from_start, &sockets);
        if budget.is_none() {
            find_ends(served, &mut account.differences);
        }
        Ok(account)
    }

    /// Asks the kernel for the sockets of pods, one at least, from the one after that was asked last.
    fn ask(&self, served: &[Served], budget: Option<Duration>) -> PodSockets {
        let mut sockets: PodSockets = served.iter().map(|s| (s.pod.id, None)).collect();
        let mut in_turn: Vec<&Served> = served.iter().collect();
        let last = self.seen().asked;
        in_turn.sort_unstable_by_key(|served| (served.pod.id <= last, served.pod.id));
        let began = Instant::now();
        for served in in_turn {
            match sockets_of(&served.pod) {
                Ok(found) => {
                    sockets.insert(served.pod.id, Some(found));
                }
                // Its netns is going, which others tell.
                Err(error) => {
                    tracing::debug!(workload = %served.workload, %error, "no list of sockets");
                }
            }
            self.seen().asked = served.pod.id;
            if budget.is_some_and(|budget| began.elapsed() >= budget) {
                break;
            }
        }
        sockets
    }

    fn conclude(&self, served: &[Served], account: &Account) {
        let names: HashMap<u32, &WorkloadId> =
            served.iter().map(|s| (s.pod.id, &s.workload)).collect();
        let mut seen = self.seen();
        seen.is_blind = false;
        seen.kernel.retain(|pod, _| names.contains_key(pod));
        let asked = account.pods.iter();
        let asked = asked.filter_map(|(pod, account)| Some((*pod, account.kernel?)));
        seen.kernel.extend(asked);
        account.alone.iter().copied().for_each(notice_gone);
        self.export(served, account, &seen.kernel);
        let stay = seen
            .persistence
            .update(account.differences.clone(), Instant::now());
        let mut counts: BTreeMap<(DifferenceKind, &str), usize> = BTreeMap::new();
        for difference in &stay {
            *counts
                .entry((difference.kind, &difference.what))
                .or_default() += 1;
        }
        let counts = counts.iter();
        self.metrics
            .ledger()
            .set_differences(counts.map(|((kind, what), count)| (kind.as_str(), *what, *count)));
        for event in seen.alarms.update(&stay) {
            tell(&event, &names, account);
        }
    }

    fn export(&self, served: &[Served], account: &Account, kernel: &HashMap<u32, KernelAccount>) {
        let metrics = self.metrics.ledger();
        for kind in Kind::ALL {
            let count = account.entered.get(&kind).copied().unwrap_or(0);
            metrics.set_descriptors(kind.as_str(), count);
        }
        metrics.set_tasks(served.iter().map(|served| served.tasks as usize).sum());
        let sum = |part: fn(&KernelAccount) -> usize| kernel.values().map(part).sum();
        metrics.set_kernel_sockets("listener", sum(|kernel| kernel.listeners));
        metrics.set_kernel_sockets("connection", sum(|kernel| kernel.connections));
        metrics.set_kernel_sockets("closed", sum(|kernel| kernel.closed));
    }
}

/// Asks for the ends of the pods' sockets that nobody entered.
fn find_ends(served: &[Served], differences: &mut [Difference]) {
    for served in served {
        let of_pod = |d: &&mut Difference| d.pod == Some(served.pod.id);
        let inodes: HashSet<u32> = differences
            .iter_mut()
            .filter(of_pod)
            .filter_map(|difference| difference.inode)
            .collect();
        if inodes.is_empty() {
            continue;
        }
        // Where its netns is going, others tell.
        let ends = ends_of(&served.pod, &inodes).unwrap_or_default();
        for difference in differences.iter_mut().filter(of_pod) {
            difference.ends = difference.inode.and_then(|inode| ends.get(&inode).copied());
        }
    }
}

/// Processor time that the calling thread has used.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn tell(event: &Event, names: &HashMap<u32, &WorkloadId>, account: &Account) {
    let workload = |group: &Group| {
        let name = names.get(&group.pod?)?;
        Some(tracing::field::display((*name).clone()))
    };
    match event {
        Event::Begins(group, count, example) => {
            let (believed, kernel) = numbers(group, account);
            let ends = example
                .ends
                .map(|(local, remote)| format!("{local} to {remote}"));
            tracing::error!(
                difference = group.kind.as_str(),
                kind = group.what,
                workload = workload(group),
                count,
                believed,
                kernel,
                descriptor = example.descriptor,
                identity = example.identity,
                ends,
                "the ledger and the kernel differ for 10 s: something is leaked"
            );
        }
        Event::Ends(group) => tracing::info!(
            difference = group.kind.as_str(),
            kind = group.what,
            workload = workload(group),
            "the ledger and the kernel agree again"
        ),
    }
}

/// How many the ledger has, and how many the kernel: of the pod where it is one's, else of all.
fn numbers(group: &Group, account: &Account) -> (usize, usize) {
    let pod = group.pod.and_then(|pod| account.pods.get(&pod));
    if let Some((pod, kernel)) = pod.and_then(|pod| Some((pod, pod.kernel?))) {
        return (
            pod.listeners() + pod.connections(),
            kernel.listeners + kernel.connections,
        );
    }
    let entered: usize = account.entered.values().sum();
    let from_start: usize = account.from_start.values().sum();
    (entered + from_start, account.open)
}
