//! TC ingress of a pod's interfaces: what reaches the pod from outside.
//!
//! Which listener takes a SYN is `lookup`'s choice. Here stands only what must happen before the
//! stack: the RST where no agent lives or the client's tuple is taken, that no entry of
//! `OWN_DIAL` outlives the dial it was made for, and that of a probe which the app meets itself
//! nothing but what was declared gets through.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NOT_FWDED, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_fib_lookup},
    helpers::bpf_fib_lookup as bpf_fib_lookup_helper,
    macros::classifier,
    programs::TcContext,
};
use malla_common::{
    Direction, Outcome, PodEntry, Reason, Role, RuleKind, STEER_MARK, Unit, pod_flags, ports,
    probe_flags,
};

use crate::{
    decision::record,
    maps::{OWN_DIAL, STEERED, listener_lives, net_rule, note_urgent, opt_out, pod_at},
    packet::{ETHERNET, Kind, NO_LINK_HEADER, Packet, socket_answers},
    probes::{app_listens, is_apps, probed},
    refuse::{Towards, answer},
    requests::{await_requests, is_declared},
    sockets::agent_receives,
};

/// The packet is for this host.
const PACKET_HOST: u32 = 0;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    receive(&ctx, ETHERNET)
}

#[classifier]
pub fn ingress_l3(ctx: TcContext) -> i32 {
    receive(&ctx, NO_LINK_HEADER)
}

#[inline(always)]
fn receive(ctx: &TcContext, ip: u32) -> i32 {
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { (*ctx.skb.skb).mark } == STEER_MARK {
        // Steered to a link-local address. What comes from outside the netns has no mark.
        let _ = ctx.change_type(PACKET_HOST);
        return TC_ACT_UNSPEC;
    }
    let (kind, packet) = Packet::read(ctx, ip);
    match kind {
        Kind::Other => TC_ACT_UNSPEC,
        Kind::Tcp if packet.opens() => open(ctx, &packet),
        Kind::Tcp => {
            note_urgent(&packet);
            follow(ctx, &packet)
        }
        Kind::Unparsable => unparsable(ctx, &packet),
    }
}

#[inline(always)]
fn open(ctx: &TcContext, packet: &Packet) -> i32 {
    let flow = &packet.flow;
    if socket_answers(ctx, flow) {
        return refuse(ctx, packet, Reason::PortClash);
    }
    let Some(pod) = pod_at(&flow.destination) else {
        if is_forwarded(ctx, packet) {
            // For or from a netns inside the pod: egress decides, by the interface it leaves by.
            return TC_ACT_UNSPEC;
        }
        return refuse(ctx, packet, Reason::UnknownAddress);
    };
    // The tuple of a dial that is about to begin: the client would take its SYN. Without an agent
    // the entry is a dead one's, and would let the client past it.
    if OWN_DIAL.get_ptr(flow).is_some() {
        if listener_lives(pod.pod, Role::Inbound) {
            return refuse(ctx, packet, Reason::PortClash);
        }
        let _ = OWN_DIAL.remove(flow);
    }
    // Who comes with the ports of a connection that was steered and has ended hears what the kernel
    // answers: a client's RST ends the TIME_WAIT that is in its way.
    let _ = STEERED.remove(flow.turned());
    if let Some(skipped) = opt_out(
        pod.pod,
        Direction::Inbound,
        flow.destination_port,
        &flow.source,
    ) {
        return pass(ctx, packet, Outcome::Passed, skipped);
    }
    if pod.flags & pod_flags::WITHDRAWN != 0 {
        return pass(ctx, packet, Outcome::Passed, Reason::Withdrawn);
    }
    let role = if flow.destination_port == ports::MESH {
        Role::Mesh
    } else {
        Role::Inbound
    };
    let probed = probed(pod, flow);
    if probed != 0 {
        return probe(ctx, packet, pod, probed);
    }
    if listener_lives(pod.pod, role) {
        return pass(ctx, packet, Outcome::Steered, Reason::Meshed);
    }
    let opens = pod.flags & (pod_flags::FAIL_OPEN | pod_flags::STRICT) == pod_flags::FAIL_OPEN;
    if opens && role == Role::Inbound {
        return pass(ctx, packet, Outcome::Passed, Reason::FailOpen);
    }
    refuse(ctx, packet, Reason::NoAgent)
}

/// Decides about a connection that may be a probe: it comes from where probes come from, to a port
/// that is probed.
#[inline(always)]
fn probe(ctx: &TcContext, packet: &Packet, pod: &PodEntry, probed: u32) -> i32 {
    let lives = listener_lives(pod.pod, Role::Inbound);
    if is_apps(probed) || !lives {
        if packet.payload(ctx) != 0 {
            // TCP Fast Open. Its client sends the SYN again, without bytes.
            return drop(ctx, packet, Reason::ProbePayload);
        }
        let reason = if lives {
            Reason::Probe
        } else {
            await_requests(packet);
            Reason::ProbeWithoutAgent
        };
        return pass(ctx, packet, Outcome::Passed, reason);
    }
    // The agent's handshake succeeds, whether the app listens or not.
    if probed & probe_flags::TCP != 0 && !app_listens(ctx, &packet.flow) {
        return refuse(ctx, packet, Reason::ConnectRefused);
    }
    pass(ctx, packet, Outcome::Steered, Reason::Meshed)
}

/// A later packet. Of one that comes from where probes come from the app gets no byte by itself but
/// of a declared request, while no agent is there to read it.
#[inline(always)]
fn follow(ctx: &TcContext, packet: &Packet) -> i32 {
    let flow = &packet.flow;
    let Some(pod) = pod_at(&flow.destination) else {
        return TC_ACT_UNSPEC;
    };
    let probed = probed(pod, flow);
    if probed == 0 || pod.flags & pod_flags::WITHDRAWN != 0 {
        return TC_ACT_UNSPEC;
    }
    let payload = packet.payload(ctx);
    if payload == 0 {
        return TC_ACT_UNSPEC;
    }
    let lives = listener_lives(pod.pod, Role::Inbound);
    let takes_plaintext = probed & probe_flags::STRICT == 0;
    if takes_plaintext && (lives || pod.flags & pod_flags::FAIL_OPEN != 0) {
        return TC_ACT_UNSPEC;
    }
    if agent_receives(ctx, flow) {
        return TC_ACT_UNSPEC;
    }
    // HTTP/2 can't be read here.
    if !lives && probed & probe_flags::GRPC != 0 {
        return TC_ACT_UNSPEC;
    }
    if !lives && probed & probe_flags::HTTP != 0 && is_declared(ctx, packet, pod.pod, payload) {
        return TC_ACT_UNSPEC;
    }
    drop(ctx, packet, Reason::ProbePayload)
}

/// Whether the pod's kernel sends the packet on, in place of taking it.
#[inline(always)]
fn is_forwarded(ctx: &TcContext, packet: &Packet) -> bool {
    let flow = &packet.flow;
    // SAFETY: all zeros is a value of every field, and the structure is whole for the size that is
    // passed; the context is valid for the whole run of the program.
    let answer = unsafe {
        let mut question: bpf_fib_lookup = core::mem::zeroed();
        question.l4_protocol = IPPROTO_TCP;
        question.ifindex = (*ctx.skb.skb).ifindex;
        if flow.source.is_v4() {
            question.family = AF_INET;
            question.__bindgen_anon_3.ipv4_src = flow.source.0[3];
            question.__bindgen_anon_4.ipv4_dst = flow.destination.0[3];
        } else {
            question.family = AF_INET6;
            question.__bindgen_anon_3.ipv6_src = flow.source.0;
            question.__bindgen_anon_4.ipv6_dst = flow.destination.0;
        }
        let size = core::mem::size_of::<bpf_fib_lookup>() as i32;
        bpf_fib_lookup_helper(ctx.skb.skb.cast(), &raw mut question, size, 0)
    };
    answer >= 0 && answer != i64::from(BPF_FIB_LKUP_RET_NOT_FWDED)
}

/// A fragment is whole again when `lookup` sees it.
#[inline(always)]
fn unparsable(ctx: &TcContext, packet: &Packet) -> i32 {
    if let Some(pod) = pod_at(&packet.flow.destination)
        && listener_lives(pod.pod, Role::Inbound)
        && !may_hide_payload(pod, packet)
    {
        return TC_ACT_UNSPEC;
    }
    drop(ctx, packet, Reason::Unparsable)
}

/// Whether it may be bytes for a port whose probes the app meets itself, from where they come from.
#[inline(always)]
fn may_hide_payload(pod: &PodEntry, packet: &Packet) -> bool {
    pod.flags & pod_flags::PROBES != 0 && net_rule(pod.pod, RuleKind::Probe, &packet.flow.source)
}

#[inline(always)]
fn drop(ctx: &TcContext, packet: &Packet, reason: Reason) -> i32 {
    tell(ctx, packet, Unit::Packets, Outcome::Dropped, reason);
    TC_ACT_SHOT
}

#[inline(always)]
fn pass(ctx: &TcContext, packet: &Packet, outcome: Outcome, reason: Reason) -> i32 {
    tell(ctx, packet, Unit::Syns, outcome, reason);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn refuse(ctx: &TcContext, packet: &Packet, reason: Reason) -> i32 {
    tell(ctx, packet, Unit::Syns, Outcome::Refused, reason);
    answer(ctx, packet, Towards::Wire).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn tell(ctx: &TcContext, packet: &Packet, unit: Unit, outcome: Outcome, reason: Reason) {
    record(ctx, packet, Direction::Inbound, unit, outcome, reason);
}
