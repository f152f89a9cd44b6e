//! The agent's listeners in the map by which the kernel finds them.

use std::{collections::HashSet, os::fd::AsRawFd};

use malla_common::{ListenerKey, Role};

use super::{
    listeners::PodListeners,
    programs::{Programs, ProgramsError},
};

const ROLES: [Role; 3] = [Role::Outbound, Role::Inbound, Role::Mesh];

/// Tells the programs whose netns it is that these listeners are in, and that what they accept is the
/// agent's.
pub fn tag(
    programs: &mut Programs,
    pod: u32,
    listeners: &[PodListeners],
) -> Result<(), ProgramsError> {
    let error = |name| move |source| ProgramsError::Map { name, source };
    let maps = programs.maps();
    for set in listeners {
        let tagged = maps.listener_pods.insert(&*set.outbound, pod, 0);
        tagged.map_err(error("LISTENER_PODS"))?;
        let tagged = maps.inbound_sockets.insert(&*set.inbound, pod, 0);
        tagged.map_err(error("INBOUND_SOCKETS"))?;
    }
    Ok(())
}

/// Opens a pod: from now on its connections come to these listeners, one set for each worker.
pub fn insert(
    programs: &mut Programs,
    pod: u32,
    listeners: &[PodListeners],
) -> Result<(), ProgramsError> {
    let map = &mut programs.maps().listeners;
    // Slot 0 says that all are there, so it comes last.
    for (slot, set) in (0_u16..)
        .zip(listeners)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
    {
        for role in ROLES {
            let listener = match role {
                Role::Outbound => &set.outbound,
                Role::Inbound => &set.inbound,
                Role::Mesh => &set.mesh,
            };
            map.insert(ListenerKey::new(pod, role, slot), listener.as_raw_fd(), 0)
                .map_err(|source| ProgramsError::Map {
                    name: "LISTENERS",
                    source,
                })?;
        }
    }
    Ok(())
}

/// The keys of all listeners that are there, of this agent or another one. The kernel tells no more
/// of a socket than that.
pub fn present(programs: &mut Programs) -> HashSet<ListenerKey> {
    programs.maps().listeners.keys().flatten().collect()
}

/// Whether every worker of a pod has its listeners among `present`.
pub fn is_whole(present: &HashSet<ListenerKey>, pod: u32, workers: u16) -> bool {
    let mut keys =
        (0..workers).flat_map(|slot| ROLES.map(|role| ListenerKey::new(pod, role, slot)));
    keys.all(|key| present.contains(&key))
}

/// Closes a pod: from now on its SYNs meet no listener.
pub fn remove(programs: &mut Programs, pod: u32, workers: u16) {
    let map = &mut programs.maps().listeners;
    // Slot 0 says that all are there, so it goes first.
    for slot in 0..workers {
        for role in ROLES {
            // Gone already where its socket is.
            let _ = map.remove(&ListenerKey::new(pod, role, slot));
        }
    }
}
