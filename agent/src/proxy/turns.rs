//! Pods take turns on a worker, by the time that each has used.
//!
//! A pod's tasks have a queue of their own ([`LocalSet`]), of which one turn runs a bounded number.
//! The pod that has used the least of the worker's time goes next, so one with a thousand busy
//! connections delays another's by one turn, and not by a thousand. A pod that was silent has no
//! claim on the time that it left unused.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::{pending, poll_fn},
    pin::pin,
    rc::{Rc, Weak},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;
use tokio::task::{AbortHandle, LocalSet, yield_now};

/// How long pods take turns before the worker looks for what its sockets have.
const ROUND: Duration = Duration::from_micros(500);

/// The pods that share a worker.
#[derive(Default)]
pub(super) struct Turns {
    members: RefCell<HashMap<u64, Rc<Member>>>,
    next: Cell<u64>,
    woken: Arc<Woken>,
}

struct Member {
    tasks: Rc<LocalSet>,
    waker: Waker,
    wake: Arc<MemberWake>,
    used: Cell<Duration>,
}

/// A pod's place in the turns. Holds nothing: [`Turns::remove`] ends its tasks.
#[derive(Clone)]
pub(super) struct Tasks {
    member: u64,
    set: Weak<LocalSet>,
}

impl Tasks {
    /// Runs a task until its end or the pod's; not at all, where the pod has gone already.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) -> Option<AbortHandle> {
        let set = self.set.upgrade()?;
        Some(set.spawn_local(task).abort_handle())
    }
}

/// Members that have something to do.
#[derive(Default)]
struct Woken {
    members: Mutex<Vec<u64>>,
    driver: AtomicWaker,
}

impl Woken {
    /// Moves those that were woken since to the end of `ready`.
    fn take(&self, ready: &mut Vec<u64>) {
        ready.append(&mut self.members());
    }

    /// Waits until one is woken.
    fn poll_any(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.driver.register(cx.waker());
        if self.members().is_empty() {
            return Poll::Pending;
        }
        self.driver.take();
        Poll::Ready(())
    }

    fn members(&self) -> MutexGuard<'_, Vec<u64>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MemberWake {
    member: u64,
    /// Whether it stands among the woken ones already.
    queued: AtomicBool,
    woken: Arc<Woken>,
}

impl Wake for MemberWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.woken.members().push(self.member);
            self.woken.driver.wake();
        }
    }
}

impl Turns {
    /// A place for one more pod.
    pub(super) fn add(&self) -> Tasks {
        let member = self.next.get();
        self.next.set(member + 1);
        let wake = Arc::new(MemberWake {
            member,
            queued: AtomicBool::new(false),
            woken: Arc::clone(&self.woken),
        });
        let tasks = Rc::new(LocalSet::new());
        let set = Rc::downgrade(&tasks);
        let waker = Waker::from(Arc::clone(&wake));
        // Its first turn makes its tasks known to its waker.
        waker.wake_by_ref();
        let used = Cell::new(Duration::ZERO);
        let new = Member {
            tasks,
            waker,
            wake,
            used,
        };
        self.members.borrow_mut().insert(member, Rc::new(new));
        Tasks { member, set }
    }

    /// Drops a pod's tasks. Not to be called by one of them.
    pub(super) fn remove(&self, tasks: &Tasks) {
        let removed = self.members.borrow_mut().remove(&tasks.member);
        drop(removed);
    }

    /// Drops all tasks of all pods. Not to be called by one of them.
    pub(super) fn clear(&self) {
        let removed = self.members.take();
        drop(removed);
    }

    /// Gives turns for ever.
    pub(super) async fn run(&self) {
        let mut ready = Vec::new();
        // What the pod had used that was last seen to have used the least.
        let mut least = Duration::ZERO;
        loop {
            if self.round(&mut ready, &mut least) {
                // The runtime looks at its sockets before it goes on. A waker that was registered would
                // be woken by the round itself, and the next one would begin at once.
                yield_now().await;
            } else {
                poll_fn(|cx| self.woken.poll_any(cx)).await;
            }
        }
    }

    /// One round. Whether some pod has more to do.
    fn round(&self, ready: &mut Vec<u64>, least: &mut Duration) -> bool {
        let began = Instant::now();
        let mut now = began;
        loop {
            let known = ready.len();
            self.woken.take(ready);
            for member in &ready[known..] {
                if let Some(member) = self.members.borrow().get(member) {
                    member.used.set(member.used.get().max(*least));
                }
            }
            if ready.is_empty() {
                return false;
            }
            if now - began >= ROUND {
                return true;
            }
            let Some(member) = self.take_next(ready) else {
                continue;
            };
            *least = member.used.get();
            member.turn();
            let after = Instant::now();
            member.used.set(*least + (after - now));
            now = after;
        }
    }

    /// Of those that are ready, the one that has used the least. None where it has gone.
    fn take_next(&self, ready: &mut Vec<u64>) -> Option<Rc<Member>> {
        let members = self.members.borrow();
        let used = |member: &u64| members.get(member).map(|member| member.used.get());
        let next = (0..ready.len()).min_by_key(|place| used(&ready[*place]))?;
        members.get(&ready.swap_remove(next)).cloned()
    }
}

impl Member {
    /// Runs a bounded number of its tasks.
    fn turn(&self) {
        // What wakes it from here on asks for another turn.
        self.wake.queued.store(false, Ordering::Release);
        let mut cx = Context::from_waker(&self.waker);
        let _ = pin!(self.tasks.run_until(pending::<()>())).poll(&mut cx);
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
    };

    use super::*;
    use crate::proxy::worker::make_runtime;

    /// Runs `test` beside the turns.
    fn run(test: impl AsyncFnOnce(&Turns)) {
        let runtime = make_runtime().unwrap();
        let turns = Rc::new(Turns::default());
        let driven = Rc::clone(&turns);
        runtime.spawn_local(async move { driven.run().await });
        runtime.block_on(test(&turns));
        turns.clear();
    }

    /// Goes to the end of its pod's queue at once, as what other tasks wake does; tokio's `yield_now`
    /// waits for the sockets to be looked at.
    async fn again() {
        let mut been = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut been, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// A task that is never done, and counts its turns of so long each.
    async fn busy(count: Rc<Cell<u32>>, each: Duration) {
        loop {
            let began = Instant::now();
            while began.elapsed() < each {}
            count.set(count.get() + 1);
            again().await;
        }
    }

    /// The longest delay, when so many have been noted.
    async fn longest_of(count: usize, delays: &RefCell<Vec<u32>>) -> u32 {
        while delays.borrow().len() < count {
            yield_now().await;
        }
        delays.borrow().iter().max().copied().unwrap()
    }

    #[test]
    fn a_pod_with_a_thousand_busy_tasks_delays_anothers_by_one_turn() {
        run(async |turns| {
            let (flood, other) = (turns.add(), turns.add());
            let flooded = Rc::new(Cell::new(0));
            for _ in 0..1_000 {
                flood.spawn(busy(Rc::clone(&flooded), Duration::from_micros(10)));
            }
            let delays = Rc::new(RefCell::new(Vec::new()));
            let (noted, seen) = (Rc::clone(&delays), Rc::clone(&flooded));
            other.spawn(async move {
                for _ in 0..100 {
                    let before = seen.get();
                    again().await;
                    noted.borrow_mut().push(seen.get() - before);
                }
            });
            let slowest = longest_of(100, &delays).await;
            // A turn of a `LocalSet`.
            assert!(slowest <= 61, "{slowest} tasks of the flood went first");
            assert!(flooded.get() > 0);
        });
    }

    #[test]
    fn sockets_are_looked_at_after_each_round() {
        run(async |turns| {
            let (flood, other) = (turns.add(), turns.add());
            let flooded = Rc::new(Cell::new(0));
            for _ in 0..100 {
                flood.spawn(busy(Rc::clone(&flooded), Duration::from_micros(50)));
            }
            let delays = Rc::new(RefCell::new(Vec::new()));
            let (noted, seen) = (Rc::clone(&delays), Rc::clone(&flooded));
            other.spawn(async move {
                let (mut here, mut there) = UnixStream::pair().unwrap();
                for _ in 0..20 {
                    there.write_all(b"x").await.unwrap();
                    let before = seen.get();
                    // Less than it asks for: the next one waits for an event.
                    assert_eq!(here.read(&mut [0; 8]).await.unwrap(), 1);
                    noted.borrow_mut().push(seen.get() - before);
                }
            });
            let slowest = longest_of(20, &delays).await;
            // A round is one turn of the flood's `LocalSet` here, and may have begun before the write.
            assert!(slowest <= 2 * 61, "{slowest} tasks of the flood went first");
            assert!(flooded.get() > 0);
        });
    }

    #[test]
    fn pods_share_the_time_and_not_the_number_of_turns() {
        run(async |turns| {
            let counts = [10, 100].map(|micros| {
                let count = Rc::new(Cell::new(0));
                let tasks = turns.add();
                for _ in 0..100 {
                    tasks.spawn(busy(Rc::clone(&count), Duration::from_micros(micros)));
                }
                count
            });
            while counts[1].get() < 1_000 {
                yield_now().await;
            }
            let [short, long] = counts.map(|count| f64::from(count.get()));
            assert!((3.0..30.0).contains(&(short / long)), "{short} and {long}");
        });
    }

    #[test]
    fn a_pod_that_was_silent_has_no_claim_on_the_past() {
        run(async |turns| {
            let (flood, silent) = (turns.add(), turns.add());
            let counts = [(); 2].map(|()| Rc::new(Cell::new(0)));
            flood.spawn(busy(Rc::clone(&counts[0]), Duration::from_micros(100)));
            while counts[0].get() < 1_000 {
                yield_now().await;
            }
            silent.spawn(busy(Rc::clone(&counts[1]), Duration::from_micros(100)));
            while counts[1].get() < 100 {
                yield_now().await;
            }
            let meanwhile = counts[0].get() - 1_000;
            assert!(meanwhile > 20, "the other had {meanwhile} turns");
        });
    }

    #[test]
    fn tasks_end_with_their_pod() {
        run(async |turns| {
            let tasks = turns.add();
            let held = Rc::new(());
            let holds = Rc::clone(&held);
            tasks.spawn(async move {
                pending::<()>().await;
                drop(holds);
            });
            yield_now().await;
            turns.remove(&tasks);
            assert_eq!(Rc::strong_count(&held), 1);
            tasks.spawn(async { unreachable!("the pod has gone") });
            yield_now().await;
        });
    }
}
