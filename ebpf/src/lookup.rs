//! sk_lookup of a pod's netns: which of the agent's listeners takes a connection.
//!
//! It runs only where no established, request or TIME_WAIT socket takes the packet, so the reuse
//! of a tuple, SYN cookies and retransmits stay the kernel's. One program serves every netns: the
//! addresses tell the pod.

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup, sk_action},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use malla_common::{
    Address, Direction, Flow, ListenerKey, MAX_WORKERS, Pair, PairSlots, Role, pod_flags, ports,
};

use crate::{
    maps::{LISTENERS, OWN_DIAL, PAIRS, SCOPES, WORKER_LOADS, WORKERS, opt_out, pod_at},
    probes::{is_apps, probed},
};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// The loopback's index in every netns.
const LOOPBACK: u32 = 1;
/// Over this, a pair's worker is helped by one more.
const BUSY_PERCENT: u32 = 70;
/// Most workers that the connections of one pair spread over, and that a choice is made among.
const CHOICES: u16 = 4;
/// Connections of a pair that follow each other within this time (100 ms) keep to one worker, and
/// so reach the server in the order in which they were opened: `connect` succeeds at the agent, so
/// a client that opens one after the other would else see them overtake each other.
const ROW_GAP_NS: u64 = 100_000_000;
/// Most of them, so that a pair that always opens connections uses all its workers.
const ROW_LENGTH: u16 = 64;

const PASS: u32 = sk_action::SK_PASS;
const DROP: u32 = sk_action::SK_DROP;

#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    let lookup = unsafe { &*ctx.lookup };
    if lookup.protocol != IPPROTO_TCP {
        return PASS;
    }
    let flow = flow(ctx.lookup);
    if flow.source.is_loopback() || flow.destination.is_loopback() {
        return PASS;
    }
    if OWN_DIAL.get_ptr(flow).is_some() {
        return PASS;
    }
    let source = pod_at(&flow.source);
    let destination = pod_at(&flow.destination);
    if let (Some(source), Some(destination)) = (source, destination)
        && source.pod == destination.pod
    {
        // The app calls its own pod, or the agent dials it with the pod's own address.
        return PASS;
    }

    // Steered without the loopback, and remembered for it. The destination may be a pod of this
    // node, in whose own netns another tuple arrives: that of the agent's connection.
    let steered_on_its_interface =
        flow.destination.is_v6_link_local() && SCOPES.get_ptr(flow).is_some();
    let (pod, role) = if lookup.ingress_ifindex == LOOPBACK || steered_on_its_interface {
        (source, Role::Outbound)
    } else if flow.destination_port == ports::MESH {
        (destination, Role::Mesh)
    } else {
        (destination, Role::Inbound)
    };
    let Some(pod) = pod else {
        return DROP;
    };
    if role != Role::Outbound
        && opt_out(
            pod.pod,
            Direction::Inbound,
            flow.destination_port,
            &flow.source,
        )
        .is_some()
    {
        return PASS;
    }
    if role != Role::Outbound && pod.flags & pod_flags::WITHDRAWN != 0 {
        return PASS;
    }
    let probed = if role == Role::Inbound {
        probed(pod, &flow)
    } else {
        0
    };
    if is_apps(probed) {
        return PASS;
    }
    let slot = worker(&flow, role);
    if assign(&ctx, pod.pod, role, slot) || (slot != 0 && assign(&ctx, pod.pod, role, 0)) {
        return PASS;
    }
    let opens = pod.flags & (pod_flags::FAIL_OPEN | pod_flags::STRICT) == pod_flags::FAIL_OPEN;
    if (opens && role == Role::Inbound) || probed != 0 {
        PASS
    } else {
        DROP
    }
}

/// Reads both families' addresses, each at its own place: were they read in two branches, the
/// compiler would join the branches and compute the place, which the verifier forbids. The family
/// that isn't the packet's reads as zero.
#[inline(always)]
fn flow(lookup: *const bpf_sk_lookup) -> Flow {
    macro_rules! field {
        ($($field:tt)+) => {
            // SAFETY: the context is valid for the whole run of the program.
            unsafe { core::ptr::read_volatile(&raw const (*lookup).$($field)+) }
        };
    }
    let remote_v4 = field!(remote_ip4);
    let local_v4 = field!(local_ip4);
    let remote_v6 = [
        field!(remote_ip6[0]),
        field!(remote_ip6[1]),
        field!(remote_ip6[2]),
        field!(remote_ip6[3]),
    ];
    let local_v6 = [
        field!(local_ip6[0]),
        field!(local_ip6[1]),
        field!(local_ip6[2]),
        field!(local_ip6[3]),
    ];
    let (source, destination) = if field!(family) == AF_INET {
        (Address::from_v4(remote_v4), Address::from_v4(local_v4))
    } else {
        (Address::from_v6(remote_v6), Address::from_v6(local_v6))
    };
    Flow {
        source,
        destination,
        source_port: u16::from_be(field!(remote_port)),
        destination_port: field!(local_port) as u16,
    }
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, pod: u32, role: Role, slot: u16) -> bool {
    // The workers' listeners share a port, and the kernel would choose among them by its own hash.
    let flags = u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT);
    LISTENERS
        .redirect_sk_lookup(ctx, ListenerKey::new(pod, role, slot), flags)
        .is_ok()
}

/// The worker for a new connection: that of the one just before, or the least loaded of those that
/// its pair uses already, so that a small pair has one tunnel and not one for each core.
#[inline(always)]
fn worker(flow: &Flow, role: Role) -> u16 {
    let workers = match WORKERS.get(0) {
        Some(&workers) if workers > 1 => workers.min(MAX_WORKERS) as u16,
        _ => return 0,
    };
    let pair = Pair {
        source: flow.source,
        destination: flow.destination,
    };
    // SAFETY: a plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    let choices = if workers < CHOICES { workers } else { CHOICES };
    let Some(slots) = PAIRS.get_ptr_mut(pair) else {
        // SAFETY: a plain helper call.
        let start = unsafe { bpf_get_prandom_u32() } % u32::from(workers);
        let first = least_loaded(start as u16, choices, workers);
        let slots = PairSlots {
            last_at: now,
            first,
            count: 1,
            last: first,
            in_row: 1,
        };
        let _ = PAIRS.insert(pair, slots, 0);
        return first;
    };
    // SAFETY: the entry is plain numbers; an update that another CPU's overwrites costs a choice
    // that isn't the best.
    let slots = unsafe { &mut *slots };
    // Tunnels have no order.
    let follows = role != Role::Mesh && now.wrapping_sub(slots.last_at) < ROW_GAP_NS;
    if follows && slots.in_row < ROW_LENGTH {
        slots.last_at = now;
        slots.in_row += 1;
        return slots.last % workers;
    }
    let mut best = least_loaded(slots.first, slots.count, workers);
    if slots.count < choices && busy_percent(best) > BUSY_PERCENT {
        slots.count += 1;
        best = (slots.first + slots.count - 1) % workers;
    }
    slots.last_at = now;
    slots.last = best;
    slots.in_row = 1;
    best
}

/// The least loaded of `count` workers from `first` on. A loop over all of them would be more than
/// the verifier follows.
#[inline(always)]
fn least_loaded(first: u16, count: u16, workers: u16) -> u16 {
    let mut best = first % workers;
    let mut least = u32::MAX;
    for i in 0..CHOICES {
        if i >= count {
            break;
        }
        let slot = (first + i) % workers;
        let Some(load) = WORKER_LOADS.get(u32::from(slot)) else {
            break;
        };
        // A busy worker's connections weigh more.
        let weight = (load.connections + 1).wrapping_mul(load.busy_percent + 10);
        if weight < least {
            least = weight;
            best = slot;
        }
    }
    best
}

#[inline(always)]
fn busy_percent(slot: u16) -> u32 {
    WORKER_LOADS
        .get(u32::from(slot))
        .map_or(0, |load| load.busy_percent)
}
