//! What earlier agents left in the maps, which are pinned and outlive them.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use malla_common::{Address, pod_flags};

use super::{programs::Maps, rules::PodRules};

/// The entries of one pod.
#[derive(Debug, Default)]
pub struct Inherited {
    pub addresses: HashSet<IpAddr>,
    pub rules: PodRules,
}

impl Inherited {
    /// What is in the maps now, by the pod's number.
    pub fn all(maps: &Maps) -> HashMap<u32, Self> {
        let mut found = HashMap::<u32, Self>::new();
        for (address, entry) in maps.pods.iter().flatten() {
            let pod = found.entry(entry.pod).or_default();
            pod.addresses.insert(address.into());
        }
        for (pod, rules) in PodRules::in_force(maps) {
            found.entry(pod).or_default().rules = rules;
        }
        found
    }

    /// Lets new connections pass.
    pub fn let_pass(&self, maps: &mut Maps) {
        for address in &self.addresses {
            let address = Address::from(*address);
            if let Ok(mut entry) = maps.pods.get(&address, 0)
                && entry.flags & pod_flags::WITHDRAWN == 0
            {
                entry.flags |= pod_flags::WITHDRAWN;
                let _ = maps.pods.insert(address, entry, 0);
            }
        }
    }

    /// Takes the entries out of the maps.
    pub fn remove(&self, maps: &mut Maps) {
        for address in &self.addresses {
            let _ = maps.pods.remove(&Address::from(*address));
        }
        let _ = PodRules::default().replace(&self.rules, maps);
    }
}
