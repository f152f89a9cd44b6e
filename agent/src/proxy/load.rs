//! How busy a worker is: what the kernel is told of it, and what it hands over when it is too busy.
//!
//! A worker that ran, or waited for a processor, for 90 % of 2 s is overloaded. The kernel then
//! gives it no new connection while another worker takes them (but for the rest of a row: `lookup`
//! keeps up to 64 in their order), and its busiest inbound tunnel is asked to take no more streams
//! (GOAWAY): the peer opens another, which the kernel gives to another worker. What is connected
//! stays. Nothing is handed over where no other worker runs clearly less, and no pair of pods
//! twice in 20 s, so that load doesn't swing to and fro.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    net::IpAddr,
    rc::Rc,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use malla_common::{OVERLOADED, WorkerLoad};
use tokio::sync::Notify;

use super::{
    meter::{Meter, Used},
    worker::Worker,
};

/// How often a worker looks at its load.
const INTERVAL: Duration = Duration::from_millis(100);
/// What a worker is judged by.
const WINDOW: Duration = Duration::from_secs(2);
/// Per cent of the window: a worker over the first is overloaded until it is under the second.
const TOO_BUSY: u32 = 90;
const RELIEVED: u32 = 80;
/// How long no tunnel of the same pair of pods is handed over again.
const SETTLED: Duration = Duration::from_secs(20);

/// What the workers of one agent know of each other.
#[derive(Debug)]
pub(super) struct Board {
    /// How long each worker ran in the last window, in microseconds. Waiting for a processor doesn't
    /// count here: where there is none, an idle worker waits at each of its wake-ups.
    ran: Box<[AtomicU32]>,
    handed_over: Mutex<HashMap<Pair, Instant>>,
}

/// The pod whose mesh listener it is, and the peer.
type Pair = (u32, IpAddr);

impl Board {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            ran: (0..workers).map(|_| AtomicU32::new(0)).collect(),
            handed_over: Mutex::default(),
        }
    }

    fn tell(&self, worker: usize, ran: u32) {
        if let Some(slot) = self.ran.get(worker) {
            slot.store(ran, Ordering::Relaxed);
        }
    }

    /// How long the other worker ran that ran least. None where there is no other.
    fn least_of_others(&self, worker: usize) -> Option<u32> {
        let others = self.ran.iter().enumerate().filter(|(i, _)| *i != worker);
        others.map(|(_, ran)| ran.load(Ordering::Relaxed)).min()
    }

    /// Whether a tunnel of this pair may be handed over now, which is then noted.
    fn claim(&self, pair: Pair, now: Instant) -> bool {
        let mut noted = self
            .handed_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        noted.retain(|_, at| now - *at < SETTLED);
        let is_free = !noted.contains_key(&pair);
        if is_free {
            noted.insert(pair, now);
        }
        is_free
    }
}

/// The tunnels from other agents that one worker serves.
#[derive(Debug, Default)]
pub(super) struct InboundTunnels {
    tunnels: RefCell<HashMap<u64, Rc<TunnelLoad>>>,
    next: Cell<u64>,
}

/// What a tunnel costs its worker, counted in turns: each is a read, a write or both.
#[derive(Debug)]
pub(super) struct TunnelLoad {
    pair: Pair,
    turns: Cell<u64>,
    measured: Cell<u64>,
    /// Turns of the last interval.
    recent: Cell<u64>,
    leaves: Cell<bool>,
    leave: Notify,
}

impl TunnelLoad {
    pub(super) fn took_turn(&self) {
        self.turns.set(self.turns.get() + 1);
    }

    /// Returns when the tunnel is to take no more streams, which is said once.
    pub(super) async fn told_to_leave(&self) {
        self.leave.notified().await;
    }
}

/// A tunnel's entry among its worker's.
pub(super) struct Entry<'a> {
    pub(super) load: Rc<TunnelLoad>,
    tunnels: &'a InboundTunnels,
    number: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.tunnels.tunnels.borrow_mut().remove(&self.number);
    }
}

impl InboundTunnels {
    pub(super) fn enter(&self, pod: u32, peer: IpAddr) -> Entry<'_> {
        let number = self.next.get();
        self.next.set(number + 1);
        let load = Rc::new(TunnelLoad {
            pair: (pod, peer),
            turns: Cell::new(0),
            measured: Cell::new(0),
            recent: Cell::new(0),
            leaves: Cell::new(false),
            leave: Notify::new(),
        });
        self.tunnels.borrow_mut().insert(number, Rc::clone(&load));
        Entry {
            load,
            tunnels: self,
            number,
        }
    }

    /// Begins a new interval.
    fn measure(&self) {
        for tunnel in self.tunnels.borrow().values() {
            let turns = tunnel.turns.get();
            tunnel.recent.set(turns - tunnel.measured.replace(turns));
        }
    }

    /// Asks every tunnel, or every one to `pod`, to take no more streams.
    pub(super) fn hand_over_all_of(&self, pod: Option<u32>) {
        for tunnel in self.tunnels.borrow().values() {
            let is_meant = pod.is_none_or(|pod| pod == tunnel.pair.0);
            if is_meant && !tunnel.leaves.replace(true) {
                tunnel.leave.notify_one();
            }
        }
    }

    /// Asks the busiest tunnel whose pair has settled to take no more streams. Whether there is one.
    fn hand_over_busiest(&self, board: &Board, now: Instant) -> bool {
        let tunnels = self.tunnels.borrow();
        let mut busy: Vec<_> = tunnels
            .values()
            .filter(|tunnel| tunnel.recent.get() > 0 && !tunnel.leaves.get())
            .collect();
        busy.sort_unstable_by_key(|tunnel| std::cmp::Reverse(tunnel.recent.get()));
        let Some(chosen) = busy.into_iter().find(|t| board.claim(t.pair, now)) else {
            return false;
        };
        chosen.leaves.set(true);
        chosen.leave.notify_one();
        true
    }
}

/// How busy a worker was, from samples of the time that it has used since it began.
#[derive(Debug, Default)]
struct Window(VecDeque<(Instant, Used)>);

impl Window {
    fn add(&mut self, now: Instant, used: Used) {
        self.0.push_back((now, used));
        while self.0.get(1).is_some_and(|(at, _)| now - *at >= WINDOW) {
            self.0.pop_front();
        }
    }

    /// Microseconds of the window on a processor.
    fn ran(&self) -> u32 {
        let (Some(first), Some(last)) = (self.0.front(), self.0.back()) else {
            return 0;
        };
        let ran = last.1.ran.saturating_sub(first.1.ran);
        u32::try_from(ran.as_micros()).unwrap_or(u32::MAX)
    }

    /// Per cent since the sample before the last.
    fn last(&self) -> u32 {
        let before = self.0.len().checked_sub(2);
        before.map_or(0, |before| self.since(before))
    }

    /// Per cent of the window. None before it is full.
    fn whole(&self) -> Option<u32> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        (last.0 - first.0 >= WINDOW).then(|| self.since(0))
    }

    fn since(&self, place: usize) -> u32 {
        let (Some(first), Some(last)) = (self.0.get(place), self.0.back()) else {
            return 0;
        };
        let wall = (last.0 - first.0).as_micros().max(1);
        let busy = |used: Used| used.ran + used.waited;
        let busy = busy(last.1).saturating_sub(busy(first.1)).as_micros() * 100 / wall;
        u32::try_from(busy.min(100)).unwrap_or(100)
    }
}

/// Whether a worker is overloaded, and when it may hand something over.
#[derive(Debug, Default)]
struct Overload {
    is_overloaded: bool,
    handed_over: Option<Instant>,
}

impl Overload {
    fn judge(&mut self, busy: Option<u32>) {
        let limit = if self.is_overloaded {
            RELIEVED
        } else {
            TOO_BUSY
        };
        self.is_overloaded = busy.is_some_and(|busy| busy >= limit);
    }

    /// Whether a tunnel should go: what went last has shown its effect, and another worker has room.
    fn should_hand_over(&self, now: Instant, own: u32, least_of_others: Option<u32>) -> bool {
        let has_settled = self.handed_over.is_none_or(|at| now - at >= WINDOW);
        let has_room = |other: u32| other <= own / 3 * 2;
        self.is_overloaded && has_settled && least_of_others.is_some_and(has_room)
    }
}

/// Watches a worker's load for ever.
pub(super) async fn watch(worker: Rc<Worker>, index: usize) {
    let meter = Meter::of_this_thread();
    let gauges = worker.metrics().worker_gauges(index);
    let (mut window, mut overload) = (Window::default(), Overload::default());
    let mut told = WorkerLoad::default();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        worker.at_interval();
        let now = Instant::now();
        window.add(now, meter.used());
        worker.inbound_tunnels.measure();
        let ran = window.ran();
        worker.board.tell(index, ran);
        overload.judge(window.whole());
        let others = worker.board.least_of_others(index);
        if overload.should_hand_over(now, ran, others)
            && worker.inbound_tunnels.hand_over_busiest(&worker.board, now)
        {
            overload.handed_over = Some(now);
            worker.metrics().tunnel_handed_over();
            tracing::info!(worker = index, "too busy: a tunnel is handed over");
        }
        gauges.tell(window.last(), worker.connections());
        let load = kernel_load(worker.connections(), window.last(), overload.is_overloaded);
        // Its successor's workers have these numbers now.
        if load != told && !worker.is_leaving() && worker.tell_kernel(index, load) {
            told = load;
        }
    }
}

/// What the kernel is told. In steps of ten per cent, so that an idle worker writes nothing.
fn kernel_load(connections: u32, busy: u32, is_overloaded: bool) -> WorkerLoad {
    if is_overloaded {
        return WorkerLoad {
            connections: connections.saturating_add(OVERLOADED),
            busy_percent: 100,
        };
    }
    WorkerLoad {
        connections,
        busy_percent: busy / 10 * 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A window of a worker that was busy for `each` of each interval.
    fn window(each: impl IntoIterator<Item = u32>) -> (Window, Instant) {
        let (mut window, mut now, mut used) = (Window::default(), Instant::now(), Used::default());
        window.add(now, used);
        for percent in each {
            now += INTERVAL;
            used.ran += INTERVAL * (percent / 2) / 100;
            used.waited += INTERVAL * (percent - percent / 2) / 100;
            window.add(now, used);
        }
        (window, now)
    }

    #[test]
    fn a_worker_is_judged_by_two_seconds_and_told_by_the_last_interval() {
        assert_eq!(window([95; 19]).0.whole(), None, "too early to tell");
        assert_eq!(window([95; 20]).0.whole(), Some(95));
        let (mixed, _) = window([0; 50].into_iter().chain([100; 10]));
        assert_eq!((mixed.whole(), mixed.last()), (Some(50), 100));
    }

    #[test]
    fn overload_begins_over_ninety_per_cent_and_ends_under_eighty() {
        let mut overload = Overload::default();
        for (busy, expected) in [
            (89, false),
            (90, true),
            (85, true),
            (79, false),
            (85, false),
        ] {
            overload.judge(Some(busy));
            assert_eq!(overload.is_overloaded, expected, "at {busy} %");
        }
    }

    #[test]
    fn something_is_handed_over_only_to_a_worker_that_has_room_and_once_in_a_window() {
        let now = Instant::now();
        let mut overload = Overload::default();
        overload.judge(Some(95));
        assert!(
            !overload.should_hand_over(now, 900, None),
            "the only worker"
        );
        assert!(!overload.should_hand_over(now, 900, Some(700)));
        assert!(overload.should_hand_over(now, 900, Some(600)));
        overload.handed_over = Some(now);
        assert!(!overload.should_hand_over(now + INTERVAL, 900, Some(0)));
        assert!(overload.should_hand_over(now + WINDOW, 900, Some(0)));
    }

    #[test]
    fn the_busiest_tunnel_goes_and_its_pair_is_left_alone_for_a_while() {
        let (board, tunnels, now) = (Board::new(2), InboundTunnels::default(), Instant::now());
        let peer = |last| IpAddr::from([10, 0, 0, last]);
        let entries = [(1, 5), (2, 50), (2, 40), (3, 0)].map(|(last, turns)| {
            let entry = tunnels.enter(1, peer(last));
            (0..turns).for_each(|_| entry.load.took_turn());
            entry
        });
        tunnels.measure();
        let leaving = || entries.each_ref().map(|entry| entry.load.leaves.get());
        assert!(tunnels.hand_over_busiest(&board, now));
        assert_eq!(leaving(), [false, true, false, false]);
        assert!(tunnels.hand_over_busiest(&board, now));
        assert_eq!(leaving(), [true, true, false, false]);
        assert!(!tunnels.hand_over_busiest(&board, now));
        assert!(tunnels.hand_over_busiest(&board, now + SETTLED));
        assert_eq!(leaving(), [true, true, true, false]);
        drop(entries);
        assert!(tunnels.tunnels.borrow().is_empty());
    }

    #[test]
    fn an_overloaded_worker_weighs_more_than_any_other() {
        // As `lookup` weighs them.
        let weight = |load: WorkerLoad| (load.connections + 1) * (load.busy_percent + 10);
        let overloaded = weight(kernel_load(0, 92, true));
        assert!(overloaded > weight(kernel_load(100_000, 89, false)));
        let other = weight(kernel_load(10, 99, true));
        assert!(other > overloaded, "where all are, connections decide");
    }
}
