//! What the workers need of an enrolled pod.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use arc_swap::ArcSwap;

use super::{
    acceleration::DialTag, dial_ports::DialPorts, listeners::ListenerPorts, netns::Netns,
    routes::Routes,
};

/// A pod whose traffic is steered.
#[derive(Debug)]
pub struct Pod {
    pub id: u32,
    pub netns: Arc<Netns>,
    pub home: Arc<Netns>,
    pub listener_ports: ListenerPorts,
    pub dial_ports: DialPorts,
    pub(super) routes: Routes,
    pub(super) addresses: ArcSwap<HashSet<IpAddr>>,
    pub(super) dial_tag: DialTag,
}

impl Pod {
    /// Whether `address` is one of the pod's netns, as the kernel says.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses.load().contains(&address)
    }

    /// The addresses of the pod's netns, as the kernel says.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.addresses.load().iter().copied().collect()
    }
}
