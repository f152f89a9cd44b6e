//! The refusal map: addresses that the kernel refuses for the agent.
//!
//! Where the agent carries a connection, its app's `connect` succeeds before the agent has seen
//! anything. So what is known beforehand, that a Service has no endpoint or no such port, is for
//! the kernel to say.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use malla_common::{Destination, Reason};

use super::{Steering, lock, programs::Maps};
use crate::model::{Mesh, Service};

/// What the map has, which only this agent or one with the same mesh writes.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<Destination, u32>>);

impl Refusals {
    /// What an earlier agent left there.
    pub(super) fn inherited(maps: &Maps) -> Self {
        Self(Mutex::new(maps.refusals.iter().flatten().collect()))
    }
}

impl Steering {
    /// Puts what the mesh's Services refuse in force, touching only what differs.
    pub fn refuse_for(&self, mesh: &Mesh) {
        let wanted: HashMap<Destination, u32> = mesh
            .services
            .values()
            .flat_map(|service| entries(service))
            .map(|(destination, reason)| (destination, reason as u32))
            .collect();
        let mut present = self
            .refusals
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
