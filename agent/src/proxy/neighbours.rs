//! Pods of this node that speak to each other: through memory, under both identities.
//!
//! Nothing of it leaves the process, so nothing is encrypted: which pods they are is known from the
//! netns that their sockets are in, and each has a certificate that the other would accept. The
//! network keeps its say by a [`Witness`] for each pair of pods. Where either pod is not this
//! agent's, or leaves, or has no such certificate, a tunnel is taken, and its handshake says why not.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::IpAddr,
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use futures_util::future::{AbortHandle, Abortable, Aborted};
use malla_common::Reason;
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{Mutex, Notify},
    time::Instant,
};

use super::{
    pod::PodContext,
    witness::{self, End, NoWitness, Witness},
    worker::Worker,
};
use crate::{model::Workload, telemetry::Failure};

/// A network that has come to refuse a pair is noticed within this time.
const NOTICED: Duration = Duration::from_secs(30);
/// So long after a witness was opened the next one is, which may take its time to fail.
const RENEWAL: Duration = NOTICED.saturating_sub(witness::LIMIT);
/// A pair without a connection for so long closes its witness.
const UNUSED_LIMIT: Duration = Duration::from_mins(1);
/// How often a pair looks whether it is unused.
const LOOK: Duration = Duration::from_secs(5);

/// Who speaks to whom. Rules of the network may be of one family, so each address counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: u32,
    destination: u32,
    address: IpAddr,
}

/// A pair as it was when somebody asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The numbers of the pods.
    pub source: u32,
    pub destination: u32,
    /// The destination's address that is dialled.
    pub address: IpAddr,
    /// What the network says of the pair: `asked`, `allowed`, or the reason why it is over.
    pub network: &'static str,
    /// Whether new connections go through memory. Else they take a tunnel.
    pub takes: bool,
    /// Connections that go through memory.
    pub connections: usize,
}

/// The pairs of one worker.
#[derive(Default)]
pub(super) struct Neighbours {
    pairs: RefCell<HashMap<Key, Rc<Pair>>>,
}

impl Neighbours {
    /// Cuts what goes to a pod that was removed and forgets its pairs, which it gives.
    pub(super) fn remove_pod(&self, pod: u32, cause: Reason) -> Vec<Rc<Pair>> {
        let mut pairs = self.pairs.borrow_mut();
        let gone = pairs.extract_if(|key, _| key.source == pod || key.destination == pod);
        let gone: Vec<_> = gone.map(|(_, pair)| pair).collect();
        drop(pairs);
        for pair in &gone {
            pair.cut(cause);
        }
        gone
    }

    pub(super) fn list(&self) -> Vec<Neighbour> {
        let pairs = self.pairs.borrow();
        let told = pairs.iter().map(|(key, pair)| Neighbour {
            source: key.source,
            destination: key.destination,
            address: key.address,
            network: match pair.state.get() {
                State::Opening => "asked",
                State::Open => "allowed",
                State::Over(reason) => reason.as_str(),
            },
            takes: pair.takes.get(),
            connections: pair.live.borrow().len(),
        });
        told.collect()
    }

    fn forget(&self, key: &Key, pair: &Rc<Pair>) {
        let mut pairs = self.pairs.borrow_mut();
        if pairs.get(key).is_some_and(|known| Rc::ptr_eq(known, pair)) {
            pairs.remove(key);
        }
    }
}

/// What the connections from one pod to another have in common.
pub(super) struct Pair {
    pub(super) destination: Rc<PodContext>,
    state: Cell<State>,
    /// Held by who waits for the witness: the others stand in line, and so does who comes later.
    turn: Mutex<()>,
    /// The state has changed, or the last connection of a pair that is over has ended.
    changed: Notify,
    /// Whether it takes new connections: both pods have certificates, and the witness is where it
    /// should be. Else they take a tunnel.
    takes: Cell<bool>,
    live: RefCell<HashMap<u64, AbortHandle>>,
    next: Cell<u64>,
    unused_since: Cell<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The witness is being opened.
    Opening,
    Open,
    /// Nothing goes on, for this reason.
    Over(Reason),
}

/// What both pods would show each other in a handshake.
type Chains = [Vec<CertificateDer<'static>>; 2];

/// The pair by which `pod` speaks to `workload` at `address` through memory. None where it takes a
/// tunnel.
pub(super) fn pair(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    workload: &Workload,
    address: IpAddr,
) -> Option<Rc<Pair>> {
    let destination = worker.enrolled(&workload.id)?;
    let is_leaving = worker.is_leaving() || pod.is_leaving() || destination.is_leaving();
    // Discovery may be ahead of the enrolment.
    let is_the_one =
        destination.pod.owns(address) && destination.workload().identity == workload.identity;
    if is_leaving || !is_the_one {
        return None;
    }
    let key = Key {
        source: pod.pod.id,
        destination: destination.pod.id,
        address,
    };
    if let Some(pair) = worker.neighbours.pairs.borrow().get(&key) {
        return pair.takes.get().then(|| Rc::clone(pair));
    }
    let chains = proven(worker, pod, &destination)?;
    let pair = Rc::new(Pair {
        destination,
        state: Cell::new(State::Opening),
        turn: Mutex::default(),
        changed: Notify::new(),
        takes: Cell::new(true),
        live: RefCell::default(),
        next: Cell::new(0),
        unused_since: Cell::new(Instant::now()),
    });
    let keeping = {
        let (worker, source, pair) = (Rc::clone(worker), Rc::clone(pod), Rc::clone(&pair));
        async move {
            let cause = pair.watch(&worker, &source, address, chains).await;
            worker.neighbours.forget(&key, &pair);
            if let Some(cause) = cause {
                pair.cut(cause);
            }
        }
    };
    pod.spawn(keeping)?;
    worker
        .neighbours
        .pairs
        .borrow_mut()
        .insert(key, Rc::clone(&pair));
    Some(pair)
}

fn proven(worker: &Worker, source: &PodContext, destination: &PodContext) -> Option<Chains> {
    let chain = |pod: &PodContext| worker.certificates().proven(&pod.workload().identity);
    Some([chain(source)?, chain(destination)?])
}

impl Pair {
    /// Waits until the network is known to let the pair through. Not, where that can't be known: a
    /// tunnel is taken. Those that ask are told in their order.
    pub(super) async fn allowed(&self) -> Result<bool, Reason> {
        let _turn = self.turn.lock().await;
        loop {
            match self.state.get() {
                State::Open => return Ok(self.takes.get()),
                State::Over(reason) => return Err(reason),
                State::Opening => self.changed.notified().await,
            }
        }
    }

    /// Runs what carries a connection until its end or the pair's.
    pub(super) async fn unless_cut<T>(
        &self,
        carried: Pin<&mut impl Future<Output = Result<T, Failure>>>,
    ) -> Result<T, Failure> {
        let (handle, registration) = AbortHandle::new_pair();
        let number = self.next.get();
        self.next.set(number + 1);
        self.live.borrow_mut().insert(number, handle);
        let _live = Live { pair: self, number };
        match Abortable::new(carried, registration).await {
            Ok(result) => result,
            Err(Aborted) => Err(self.cause().into()),
        }
    }

    /// Why it is over.
    fn cause(&self) -> Reason {
        match self.state.get() {
            State::Over(reason) => reason,
            State::Opening | State::Open => Reason::Shutdown,
        }
    }

    fn set(&self, state: State) {
        self.state.set(state);
        self.changed.notify_waiters();
    }

    /// Resets what lives, and refuses what waits.
    fn cut(&self, cause: Reason) {
        self.set(State::Over(cause));
        for connection in self.live.borrow().values() {
            connection.abort();
        }
    }

    /// Waits until nothing lives of a pair that was cut.
    pub(super) async fn ended(&self) {
        while !self.live.borrow().is_empty() {
            self.changed.notified().await;
        }
    }

    async fn over(&self) {
        while !matches!(self.state.get(), State::Over(_)) {
            self.changed.notified().await;
        }
    }

    async fn unused(&self) {
        loop {
            let left = if self.live.borrow().is_empty() {
                UNUSED_LIMIT.saturating_sub(self.unused_since.get().elapsed())
            } else {
                UNUSED_LIMIT
            };
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }

    /// Keeps the witness until the pair is over. Gives the reason why what lives is to be cut.
    async fn watch(
        &self,
        worker: &Worker,
        source: &PodContext,
        address: IpAddr,
        mut chains: Chains,
    ) -> Option<Reason> {
        let mut witness = None;
        let mut strayed = match self.renew(worker, source, address, &mut witness).await {
            Ok(strayed) => strayed,
            Err(reason) => return Some(reason),
        };
        let mut renewal = Instant::now() + RENEWAL;
        loop {
            let certificates = worker.certificates();
            let [own, other] = &chains;
            let end = tokio::select! {
                biased;
                () = self.over() => return None,
                () = certificates.revoked(own) => return Some(Reason::CertificateRevoked),
                () = certificates.revoked(other) => return Some(Reason::CertificateRevoked),
                end = end_of(&mut witness) => Some(end),
                () = self.unused() => return None,
                () = tokio::time::sleep_until(renewal) => None,
            };
            if end.is_some() {
                witness = None;
            }
            if end == Some(End::LetGo) {
                // The next one is opened when it is due: whoever closes each at once is not pressed.
                continue;
            }
            if worker.is_leaving() || source.is_leaving() || self.destination.is_leaving() {
                // Who would accept another is not this agent any more, or is about to close.
                if end == Some(End::Cut) {
                    return Some(Reason::NetworkPolicy);
                }
                renewal = Instant::now() + RENEWAL;
                continue;
            }
            let proven = proven(worker, source, &self.destination);
            let has_certificates = proven.is_some();
            chains = proven.unwrap_or(chains);
            if end.is_some() {
                self.set(State::Opening);
            }
            let strayed_before = strayed;
            strayed = match self.renew(worker, source, address, &mut witness).await {
                // It is no upgrade, of which this worker would have heard.
                Ok(true) if strayed_before && !self.live.borrow().is_empty() => {
                    return Some(Reason::NetworkPolicy);
                }
                Ok(strayed) => strayed,
                Err(reason) => return Some(reason),
            };
            // As with a tunnel, what lives goes on without a certificate.
            self.takes.set(has_certificates && !strayed);
            renewal = Instant::now() + RENEWAL;
        }
    }

    /// Opens the next witness in the place of `witness`. A pod needs none to speak to itself. Whether
    /// it has strayed; an error where nothing may go on.
    async fn renew(
        &self,
        worker: &Worker,
        source: &PodContext,
        address: IpAddr,
        witness: &mut Option<Witness>,
    ) -> Result<bool, Reason> {
        let (from, to) = (&source.pod, &self.destination.pod);
        let strayed = if from.id == to.id {
            false
        } else {
            match Witness::open(worker.witnesses(), from, to, address).await {
                Ok(next) => {
                    *witness = Some(next);
                    false
                }
                Err(NoWitness::Strayed) => true,
                // For want of descriptors, say: the one that is there goes on to bear witness.
                Err(NoWitness::Failed(reason))
                    if witness.is_some() && reason != Reason::NetworkPolicy =>
                {
                    false
                }
                Err(NoWitness::Failed(reason)) => return Err(reason),
            }
        };
        self.takes.set(self.takes.get() && !strayed);
        // It may be over meanwhile, and stays so.
        if self.state.get() == State::Opening {
            self.set(State::Open);
        }
        Ok(strayed)
    }
}

/// Never, where there is none.
async fn end_of(witness: &mut Option<Witness>) -> End {
    match witness {
        Some(witness) => witness.end().await,
        None => std::future::pending().await,
    }
}

/// A connection of the pair.
struct Live<'a> {
    pair: &'a Pair,
    number: u64,
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        let mut live = self.pair.live.borrow_mut();
        live.remove(&self.number);
        if live.is_empty() {
            self.pair.unused_since.set(Instant::now());
            if matches!(self.pair.state.get(), State::Over(_)) {
                self.pair.changed.notify_waiters();
            }
        }
    }
}
