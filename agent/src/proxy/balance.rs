//! Which endpoint of a Service a connection goes to.
//!
//! The one with fewer of this agent's connections, of two that are drawn: nearly as good as the
//! least of all, and no crowd follows the news of who is idle. Connections that are being opened
//! count as well, so that an endpoint which doesn't answer gets few.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::outbound::Asked;
use crate::model::{Service, Target};

/// Clients' places beyond which those are looked for that have run out.
const MANY_KEPT: usize = 4096;

/// What all workers count and keep.
#[derive(Debug, Clone, Default)]
pub struct Balance(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Connections of this agent, by the endpoint's address.
    outstanding: Mutex<HashMap<SocketAddr, Arc<AtomicU32>>>,
    kept: Mutex<Kept>,
}

/// Which endpoint a client keeps, by the Service's address and its own.
#[derive(Debug, Default)]
struct Kept {
    places: HashMap<(SocketAddr, IpAddr), Place>,
    /// So many are looked through next.
    next_sweep: usize,
}

#[derive(Debug)]
struct Place {
    endpoint: SocketAddr,
    until: Instant,
}

/// One worker's way there: no lock for an endpoint that it has been to.
#[derive(Debug, Default)]
pub(super) struct Balancer {
    shared: Balance,
    known: RefCell<HashMap<SocketAddr, Arc<AtomicU32>>>,
}

/// A connection that counts at its endpoint.
#[derive(Debug)]
pub(super) struct Outstanding(Arc<AtomicU32>);

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who wants to connect, and what it has tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish<'a> {
    /// Address and port of the Service.
    pub(super) service: SocketAddr,
    pub(super) client: IpAddr,
    /// The client's node.
    pub(super) node: &'a str,
    pub(super) tried: &'a [SocketAddr],
}

impl Balancer {
    pub(super) fn new(shared: Balance) -> Self {
        Self {
            shared,
            known: RefCell::default(),
        }
    }

    /// The target for a connection, of those that weren't tried yet.
    pub(super) fn choose(&self, service: &Service, wish: Wish<'_>) -> Option<Target> {
        let port = service.port(wish.service.port())?;
        let targets = port.targets(wish.service.is_ipv4());
        if service.client_ip_affinity.is_some()
            && let Some(kept) = self.shared.kept().endpoint(wish.service, wish.client)
            && !wish.tried.contains(&kept)
            && let Some(target) = targets.iter().find(|target| target.address == kept)
        {
            return Some(*target);
        }
        if wish.tried.is_empty() && service.traffic_distribution.is_none() {
            return self.less_loaded(targets);
        }
        let is_new = |target: &&Target| !wish.tried.contains(&target.address);
        let left: Vec<Target> = targets.iter().filter(is_new).copied().collect();
        let is_near = |target: &&Target| service.prefers(**target, wish.node);
        let near: Vec<Target> = left.iter().filter(is_near).copied().collect();
        self.less_loaded(if near.is_empty() { &left } else { &near })
    }

    /// Counts a connection at its endpoint, from before it is opened.
    pub(super) fn enter(&self, endpoint: SocketAddr) -> Outstanding {
        let count = self.count(endpoint);
        count.fetch_add(1, Ordering::Relaxed);
        Outstanding(count)
    }

    /// The client has reached `endpoint`, and keeps it where the Service says so.
    pub(super) fn reached(&self, service: &Service, asked: &Asked, endpoint: SocketAddr) {
        if let Some(lifetime) = service.client_ip_affinity {
            let client = (asked.destination, asked.source.ip());
            self.shared.kept().keep(client, endpoint, lifetime);
        }
    }

    /// Lets go of endpoints without a connection. To be called when discovery has a new snapshot.
    pub(super) fn forget(&self) {
        self.known.borrow_mut().clear();
        self.shared
            .outstanding()
            .retain(|_, count| Arc::strong_count(count) > 1);
    }

    fn less_loaded(&self, targets: &[Target]) -> Option<Target> {
        let first = fastrand::choice(targets)?;
        if targets.len() == 1 {
            return Some(*first);
        }
        let second = loop {
            let second = fastrand::choice(targets)?;
            if second.address != first.address {
                break second;
            }
        };
        let load = |target: &Target| self.count(target.address).load(Ordering::Relaxed);
        let chosen = if load(second) < load(first) {
            second
        } else {
            first
        };
        Some(*chosen)
    }

    fn count(&self, endpoint: SocketAddr) -> Arc<AtomicU32> {
        let mut known = self.known.borrow_mut();
        let count = known.entry(endpoint).or_insert_with(|| {
            let mut outstanding = self.shared.outstanding();
            Arc::clone(outstanding.entry(endpoint).or_default())
        });
        Arc::clone(count)
    }
}

impl Balance {
    /// This agent's connections to any of these ports at any of these addresses.
    pub fn connections(&self, addresses: &[IpAddr], ports: &[Option<u16>]) -> u32 {
        let ports: BTreeSet<u16> = ports.iter().copied().flatten().collect();
        let outstanding = self.outstanding();
        let places = addresses
            .iter()
            .flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port)));
        let counts = places.filter_map(|place| outstanding.get(&place));
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn outstanding(&self) -> MutexGuard<'_, HashMap<SocketAddr, Arc<AtomicU32>>> {
        lock(&self.0.outstanding)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.0.kept)
    }
}

/// Nothing under these locks is left half done, so a panic elsewhere doesn't spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    fn endpoint(&self, service: SocketAddr, client: IpAddr) -> Option<SocketAddr> {
        let place = self.places.get(&(service, client))?;
        (Instant::now() < place.until).then_some(place.endpoint)
    }

    fn keep(&mut self, client: (SocketAddr, IpAddr), endpoint: SocketAddr, lifetime: Duration) {
        let now = Instant::now();
        if self.places.len() >= self.next_sweep.max(MANY_KEPT) {
            self.places.retain(|_, place| now < place.until);
            self.next_sweep = 2 * self.places.len();
        }
        let until = now + lifetime;
        self.places.insert(client, Place { endpoint, until });
    }
}

#[cfg(test)]
mod tests;
