//! The maps, and the look-ups that more than one hook makes.
//!
//! All but the counters are shared by the programs of every pod of the node, and pinned, so that
//! they outlive the agent.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_sock},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockHash, lpm_trie::Key},
    cty::c_void,
    helpers::{bpf_sk_release, generated::bpf_map_lookup_elem},
    macros::btf_map,
};
use malla_common::{
    Address, Counter, Destination, Direction, Flow, ListenerKey, MAX_WORKERS, NetRule, Outcome,
    Pair, PairSlots, PodEntry, PortRule, ProbeFlow, ProbeTarget, Reason, Role, RuleKind, Unit,
    WorkerLoad,
};

use crate::packet::{Packet, URG};

/// Ids of the cgroups that living agents run in.
#[btf_map]
pub static AGENTS: HashMap<u64, u32, 64> = HashMap::new();

/// Every address of every enrolled pod.
#[btf_map]
pub static PODS: HashMap<Address, PodEntry, 4096> = HashMap::new();

/// The agent's listening sockets.
#[btf_map]
pub static LISTENERS: SockHash<ListenerKey, 16384> = SockHash::new();

/// Connections that the agent is opening to an app right now.
#[btf_map]
pub static OWN_DIAL: LruHashMap<Flow, u32, 65536> = LruHashMap::new();

/// Rules about ports: opt-outs, probes.
#[btf_map]
pub static PORT_RULES: LpmTrie<PortRule, u32, 65536> = LpmTrie::new();

/// Rules about networks: opt-outs, where probes come from.
#[btf_map]
pub static NET_RULES: LpmTrie<NetRule, u32, 65536> = LpmTrie::new();

/// Requests that are probed.
#[btf_map]
pub static PROBE_TARGETS: HashMap<ProbeTarget, u32, 8192> = HashMap::new();

/// Connections that the app has with who probes it while no agent lives.
#[btf_map]
pub static PROBE_FLOWS: LruHashMap<Flow, ProbeFlow, 16384> = LruHashMap::new();

/// Connections that were steered, by what the app sends, and those that the agent has given up
/// dialling. What the kernel sends for one without a socket of the app's, from TIME_WAIT, for a
/// request or for no socket at all, isn't for the wire, whether the agent's socket lives or not.
#[btf_map]
pub static STEERED: LruHashMap<Flow, u32, 16384> = LruHashMap::new();

/// Interface that a SYN to a link-local address left by.
#[btf_map]
pub static SCOPES: LruHashMap<Flow, u32, 4096> = LruHashMap::new();

/// The [`Reason`] for which connections to a Service's port are refused; [`Reason::Meshed`] where
/// they aren't. Filled by need: most nodes have a few of so many.
#[btf_map]
pub static REFUSALS: HashMap<Destination, u32, 131072, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// How many workers the agent has.
#[btf_map]
pub static WORKERS: Array<u32, 1> = Array::new();

/// 1 once a pod has said or heard something urgent.
#[btf_map]
pub static URGENT: Array<u32, 1> = Array::new();

#[btf_map]
pub static WORKER_LOADS: Array<WorkerLoad, { MAX_WORKERS as usize }> = Array::new();

#[btf_map]
pub static PAIRS: LruHashMap<Pair, PairSlots, 65536> = LruHashMap::new();

#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::SLOTS }> = PerCpuArray::new();

/// Notes a packet with urgent data (RFC 6093): reads of it end early, which its reader must know.
#[inline(always)]
pub fn note_urgent(packet: &Packet) {
    if packet.has(URG)
        && let Some(seen) = URGENT.get_ptr_mut(0)
    {
        // SAFETY: all write the same word.
        unsafe { *seen = 1 };
    }
}

/// Counts one SYN or packet.
#[inline(always)]
pub fn count(direction: Direction, unit: Unit, outcome: Outcome, reason: Reason) {
    let slot = Counter {
        direction,
        unit,
        outcome,
        reason,
    }
    .slot();
    if let Some(count) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: the pointer is to this CPU's own slot, and a program isn't preempted by another
        // one on the same CPU.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}

/// The pod that `address` belongs to.
#[inline(always)]
pub fn pod_at(address: &Address) -> Option<&'static PodEntry> {
    // SAFETY: an entry outlives the program's run, and a torn read of its words is harmless: an
    // address changes hands only after its pod was withdrawn. It isn't copied: the compiler would
    // pack an option of the copy in a way that the verifier forbids.
    unsafe { PODS.get(address) }
}

/// Whether an agent listens in this role for `pod`. Every worker listens or none does.
#[inline(always)]
pub fn listener_lives(pod: u32, role: Role) -> bool {
    let key = ListenerKey::new(pod, role, 0);
    // SAFETY: map and key are valid for the call; a socket found is referenced, and released once.
    unsafe {
        let map = core::ptr::from_ref(&LISTENERS).cast_mut().cast::<c_void>();
        let socket = bpf_map_lookup_elem(map, core::ptr::from_ref(&key).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast::<bpf_sock>().cast());
    }
    true
}

/// Whether the pod opted out of `port` (its own inbound, the peer's outbound) or of the network
/// that `peer` is in.
#[inline(always)]
pub fn opt_out(pod: u32, direction: Direction, port: u16, peer: &Address) -> Option<Reason> {
    let kind = RuleKind::skip(direction);
    if port_rule(pod, kind, port).is_some() {
        return Some(Reason::PortSkipped);
    }
    if net_rule(pod, kind, peer) {
        return Some(Reason::SubnetSkipped);
    }
    None
}

/// What the pod's rule about `port` says, where it has one of this kind.
#[inline(always)]
pub fn port_rule(pod: u32, kind: RuleKind, port: u16) -> Option<&'static u32> {
    let rule = PortRule {
        pod,
        kind: kind as u16,
        port: port.to_be(),
    };
    PORT_RULES.get(&Key::new(PortRule::BITS, rule))
}

/// Whether the pod has a rule of this kind about a network that `peer` is in.
#[inline(always)]
pub fn net_rule(pod: u32, kind: RuleKind, peer: &Address) -> bool {
    let rule = NetRule {
        pod,
        kind: kind as u32,
        peer: *peer,
    };
    NET_RULES.get(&Key::new(NetRule::BITS, rule)).is_some()
}

/// Why no connection is to be opened to this address and port.
#[inline(always)]
pub fn refusal(address: &Address, port: u16) -> Option<Reason> {
    let own = Destination {
        address: *address,
        port: u32::from(port),
    };
    let others = Destination { port: 0, ..own };
    // SAFETY: the value is one word, which is written whole; an entry that is removed meanwhile may
    // be another's by now, and then this connection met a change of it.
    let reason = unsafe { REFUSALS.get(&own).or_else(|| REFUSALS.get(&others)) };
    match *reason? {
        reason if reason == Reason::NoEndpoint as u32 => Some(Reason::NoEndpoint),
        reason if reason == Reason::NoServicePort as u32 => Some(Reason::NoServicePort),
        _ => None,
    }
}
