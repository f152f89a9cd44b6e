//! The refusal map: addresses that the kernel refuses for the agent.
//!
//! Where the agent carries a connection, its app's `connect` succeeds before the agent has seen
//! anything. So what is known beforehand, that a Service has no endpoint or no such port, is for
//! the kernel to say.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use malla_common::{Destination, Reason};

use super::{
    Steering,
    audit::{Difference, Kind},
    lock,
    programs::Maps,
};
use crate::model::{Mesh, Service};

/// What the map has, which only this agent or one with the same mesh writes.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<Destination, u32>>);

impl Refusals {
    /// What an earlier agent left there.
    pub(super) fn inherited(maps: &Maps) -> Self {
        Self(Mutex::new(held(maps)))
    }

    fn present(&self) -> MutexGuard<'_, HashMap<Destination, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn held(maps: &Maps) -> HashMap<Destination, u32> {
    maps.refusals.iter().flatten().collect()
}

impl Steering {
    /// Compares the map with what was put there.
    pub(super) fn audit_refusals(&self) -> Option<Difference> {
        let present = self.refusals.present();
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        let held = held(maps);
        if held == *present {
            return None;
        }
        let strange = held.keys().filter(|key| !present.contains_key(key));
        let (strange, missing): (Vec<_>, Vec<_>) = (
            strange.collect(),
            present
                .iter()
                .filter(|(key, reason)| held.get(key) != Some(reason))
                .collect(),
        );
        let what = format!(
            "{} entries of Services were missing or other ones, {} stood in their map",
            missing.len(),
            strange.len()
        );
        let removed = strange
            .into_iter()
            .try_for_each(|key| maps.refusals.remove(key));
        let written = missing
            .into_iter()
            .try_for_each(|(key, reason)| maps.refusals.insert(key, reason, 0));
        Some(Difference::new(
            None,
            Kind::Refusal,
            what,
            removed.and(written),
        ))
    }

    /// Puts what the mesh's Services refuse in force, touching only what differs.
    pub fn refuse_for(&self, mesh: &Mesh) {
        let wanted: HashMap<Destination, u32> = mesh
            .services
            .values()
            .flat_map(|service| entries(service))
            .map(|(destination, reason)| (destination, reason as u32))
            .collect();
        let mut present = self.refusals.present();
        let mut programs = lock(&self.programs);
        let map = &mut programs.maps().refusals;
        // Those without a place any more come first: the map has an end.
        present.retain(|destination, _| {
            let stays = wanted.contains_key(destination);
            if !stays {
                // One that isn't there needs no removal.
                let _ = map.remove(destination);
            }
            stays
        });
        let mut failures = 0;
        for (destination, reason) in wanted {
            if present.get(&destination) == Some(&reason) {
                continue;
            }
            match map.insert(destination, reason, 0) {
                Ok(()) => {
                    present.insert(destination, reason);
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::error!(%error, "a Service without endpoints can't be refused early");
                    }
                    failures += 1;
                }
            }
        }
        if failures > 1 {
            tracing::error!(
                failures,
                "so many entries of Services aren't in the kernel's map"
            );
        }
    }
}

/// Each port of a Service at each address, and what isn't one of its ports.
fn entries(service: &Service) -> impl Iterator<Item = (Destination, Reason)> {
    service.addresses.iter().flat_map(|address| {
        let at = |port: u16| Destination {
            address: (*address).into(),
            port: port.into(),
        };
        let ports = service.ports.iter().map(move |port| {
            let refused = port.targets(address.is_ipv4()).is_empty();
            let reason = if refused {
                Reason::NoEndpoint
            } else {
                Reason::Meshed
            };
            (at(port.port), reason)
        });
        ports.chain([(at(0), Reason::NoServicePort)])
    })
}
