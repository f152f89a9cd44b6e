//! TC egress of a pod's interfaces: what the app sends.
//!
//! In this order: the agent's own packets pass; a SYN is decided about, and the decision kept in
//! the app's socket; packets of a steered socket go to the loopback, whether an agent lives or
//! not; answers to connections that the agent opened with a client's address go there too; what the
//! kernel still says of either, once app and agent have forgotten it, is dropped; the rest is older
//! than the enrolment, or opted out, and passes.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    cty::c_long,
    helpers::{
        bpf_redirect,
        generated::{bpf_skb_cgroup_id, bpf_skb_change_head},
    },
    macros::classifier,
    programs::TcContext,
};
use malla_common::{
    Direction, Flow, Outcome, Reason, Role, STEER_MARK, SocketState, Unit, Verdict, pod_flags,
    ports,
};

use crate::{
    decision::record,
    maps::{
        AGENTS, OWN_DIAL, SCOPES, STEERED, count, listener_lives, note_urgent, opt_out, pod_at,
        refusal,
    },
    packet::{
        ETH_P_IP, ETH_P_IPV6, ETHERNET, FIN, Kind, NO_LINK_HEADER, Packet, RST, socket_receives,
    },
    probes::probed,
    refuse::{ANSWER_MARK, Towards, answer},
    sockets::{NO_POD, Socket, pod_here, sender, sent_by_listener},
};

/// The loopback's index in every netns.
const LOOPBACK: u32 = 1;

#[classifier]
pub fn egress(ctx: TcContext) -> i32 {
    steer(&ctx, ETHERNET)
}

#[classifier]
pub fn egress_l3(ctx: TcContext) -> i32 {
    steer(&ctx, NO_LINK_HEADER)
}

#[inline(always)]
fn steer(ctx: &TcContext, ip: u32) -> i32 {
    let (kind, packet) = Packet::read(ctx, ip);
    if kind == Kind::Other {
        return TC_ACT_UNSPEC;
    }
    if sent_by_agent(ctx) {
        return agents_own(ctx, kind, &packet);
    }
    if kind == Kind::Unparsable {
        return drop(ctx, &packet, Reason::Unparsable);
    }
    note_urgent(&packet);
    let socket = sender(ctx);
    if packet.opens() {
        return open(ctx, &packet, socket);
    }
    if let Some(state) = socket.and_then(Socket::state) {
        if state.verdict == Verdict::Steer as u8 {
            return follow(ctx, &packet);
        }
        if state.verdict == Verdict::Pass as u8 {
            return TC_ACT_UNSPEC;
        }
    }
    if is_answer(ctx, &packet, socket) {
        return TC_ACT_UNSPEC;
    }
    if socket_receives(ctx, &packet.flow) {
        // Carried by the agent: nothing of it may pass once the agent's socket is gone.
        if let Some(state) = socket.and_then(Socket::state_or_new) {
            state.verdict = Verdict::Steer as u8;
        }
        remember(&packet.flow);
        return to_loopback(ctx, &packet);
    }
    if socket.is_none() && STEERED.get_ptr(&packet.flow).is_some() {
        return drop(ctx, &packet, Reason::KernelReply);
    }
    pass_unsteered(&packet, socket);
    TC_ACT_UNSPEC
}

/// Notes a connection without whose sockets, the app's and the agent's, nothing may pass of what the
/// kernel still says.
#[inline(always)]
fn remember(flow: &Flow) {
    if STEERED.get_ptr(flow).is_none() {
        // The map forgets the oldest when it is full.
        let _ = STEERED.insert(flow, 1, 0);
    }
}

/// The agent's packets are known by the cgroup of their socket, which no app can choose; a mark
/// could be set by any container with CAP_NET_RAW.
#[inline(always)]
fn sent_by_agent(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for the whole run of the program.
    let cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
    AGENTS.get_ptr(cgroup).is_some()
}

/// The agent's packets pass, but for one: what its connection to an app sends once the app's socket
/// is gone meets a listener of the agent, and since Linux 6.13 the RST counts as the listener's.
/// It is for the agent itself, and tells it that the app has gone; once the agent has forgotten the
/// connection too, it is for nobody.
#[inline(always)]
fn agents_own(ctx: &TcContext, kind: Kind, packet: &Packet) -> i32 {
    if kind != Kind::Tcp || !packet.has(RST) || !sent_by_listener(ctx) {
        return TC_ACT_UNSPEC;
    }
    if socket_receives(ctx, &packet.flow) {
        return to_loopback(ctx, packet);
    }
    if STEERED.get_ptr(&packet.flow).is_some() {
        return drop(ctx, packet, Reason::KernelReply);
    }
    TC_ACT_UNSPEC
}

/// Decides about a connection that the app opens, or repeats what was decided.
#[inline(always)]
fn open(ctx: &TcContext, packet: &Packet, socket: Option<Socket>) -> i32 {
    let flow = &packet.flow;
    let Some(pod) = pod_at(&flow.source) else {
        return refuse_stranger(ctx, packet, socket);
    };
    let here = pod_here(ctx, pod);
    // The map is the node's, and the address may be another pod's: bound to with IP_FREEBIND, or
    // sent by a container inside this pod. Where no agent listens, nobody can say.
    if here != NO_POD && here != pod.pod {
        return refuse_stranger(ctx, packet, socket);
    }
    let mut state = socket.and_then(Socket::state_or_new);
    if let Some(state) = &state
        && state.sequence == packet.sequence
        && state.destination_port == flow.destination_port
        && state.source_port == flow.source_port
        && state.destination == flow.destination
    {
        if state.verdict == Verdict::Pass as u8 {
            return TC_ACT_UNSPEC;
        }
        if state.verdict == Verdict::Steer as u8 {
            return if listener_lives(pod.pod, Role::Outbound) {
                to_loopback(ctx, packet)
            } else {
                refuse(ctx, packet, Unit::Syns, Reason::NoAgent)
            };
        }
    }

    let listens = here != NO_POD && listener_lives(pod.pod, Role::Outbound);
    let fails_open = pod.flags & pod_flags::FAIL_OPEN != 0;
    let nested = pod.flags & pod_flags::NESTED_ALLOW != 0;
    let (verdict, reason) = if let Some(skipped) = opt_out(
        pod.pod,
        Direction::Outbound,
        flow.destination_port,
        &flow.destination,
    ) {
        (Verdict::Pass, skipped)
    } else if pod.flags & pod_flags::WITHDRAWN != 0 {
        (Verdict::Pass, Reason::Withdrawn)
    } else if !listens && fails_open {
        (Verdict::Pass, Reason::FailOpen)
    } else if !listens {
        (Verdict::Refuse, Reason::NoAgent)
    } else if state.is_none() && !nested {
        (Verdict::Refuse, Reason::Forwarded)
    } else if ports::is_agents(flow.destination_port) && pod_at(&flow.destination).is_some() {
        (Verdict::Refuse, Reason::OwnListener)
    } else if let Some(reason) = refusal(&flow.destination, flow.destination_port) {
        (Verdict::Refuse, reason)
    } else if OWN_DIAL.get_ptr(flow).is_some() {
        // Another pod of this node is being dialled with this very tuple: sk_lookup, which
        // can't tell one netns from another, would leave this SYN to the app's listeners.
        (Verdict::Refuse, Reason::PortClash)
    } else {
        (Verdict::Steer, Reason::Meshed)
    };
    if let Some(state) = &mut state {
        **state = SocketState {
            destination: flow.destination,
            sequence: packet.sequence,
            destination_port: flow.destination_port,
            source_port: flow.source_port,
            verdict: verdict as u8,
            reason: reason as u8,
            ..SocketState::UNDECIDED
        };
    }
    match verdict {
        Verdict::Steer => {
            tell(ctx, packet, Unit::Syns, Outcome::Steered, reason);
            // The agent may reset it before the app says anything more.
            remember(flow);
            if flow.destination.is_v6_link_local() {
                // SAFETY: the context is valid for the whole run of the program.
                let interface = unsafe { (*ctx.skb.skb).ifindex };
                // When the map is full of newer ones, the agent refuses for want of a scope.
                let _ = SCOPES.insert(flow, interface, 0);
            }
            to_loopback(ctx, packet)
        }
        Verdict::Pass => {
            // Its predecessor with these addresses and ports may have been steered.
            let _ = STEERED.remove(flow);
            tell(ctx, packet, Unit::Syns, Outcome::Passed, reason);
            TC_ACT_UNSPEC
        }
        Verdict::Refuse | Verdict::Undecided => refuse(ctx, packet, Unit::Syns, reason),
    }
}

/// A later packet of a steered socket. It never reaches the wire.
#[inline(always)]
fn follow(ctx: &TcContext, packet: &Packet) -> i32 {
    if packet.has(FIN) || packet.has(RST) {
        // A TIME_WAIT socket, which no decision can be kept in, comes after its own side's FIN. By
        // now a connection that lived for long may have been forgotten.
        remember(&packet.flow);
    }
    if socket_receives(ctx, &packet.flow) {
        return to_loopback(ctx, packet);
    }
    // No socket takes it. With a listener the kernel knows what to do (a SYN cookie's ACK makes a
    // connection, the rest meets a RST); without one, nobody answers but this program.
    if let Some(pod) = pod_at(&packet.flow.source)
        && listener_lives(pod.pod, Role::Outbound)
    {
        return to_loopback(ctx, packet);
    }
    if packet.has(RST) {
        return drop(ctx, packet, Reason::AgentGone);
    }
    refuse(ctx, packet, Unit::Packets, Reason::AgentGone)
}

/// The RST that `ingress` made on this pod's behalf.
#[inline(always)]
fn is_answer(ctx: &TcContext, packet: &Packet, socket: Option<Socket>) -> bool {
    // SAFETY: the context is valid for the whole run of the program.
    let (mark, sender) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).__bindgen_anon_2.sk) };
    mark == ANSWER_MARK && packet.has(RST) && socket.is_none() && sender.is_null()
}

/// Counts, once a connection, what goes past the agent without a decision at its SYN.
#[inline(always)]
fn pass_unsteered(packet: &Packet, socket: Option<Socket>) {
    let Some(socket) = socket else {
        return count(
            Direction::Outbound,
            Unit::Packets,
            Outcome::Passed,
            Reason::KernelReply,
        );
    };
    let flow = &packet.flow;
    // A connection that came in on a port or from a network that is opted out, or as a probe.
    let reason = pod_at(&flow.source)
        .and_then(|pod| {
            opt_out(
                pod.pod,
                Direction::Inbound,
                flow.source_port,
                &flow.destination,
            )
            .or_else(|| (probed(pod, &flow.turned()) != 0).then_some(Reason::Probe))
        })
        .unwrap_or(Reason::DirectBeforeEnrolment);
    if let Some(state) = socket.state_or_new() {
        state.verdict = Verdict::Pass as u8;
        state.reason = reason as u8;
        count(Direction::Outbound, Unit::Packets, Outcome::Passed, reason);
    }
}

#[inline(always)]
fn to_loopback(ctx: &TcContext, packet: &Packet) -> i32 {
    let leaves_interface = !packet.flow.destination.is_v6_link_local();
    if packet.ip == NO_LINK_HEADER && leaves_interface && add_link_header(ctx, packet).is_err() {
        return drop(ctx, packet, Reason::Unparsable);
    }
    ctx.set_mark(STEER_MARK);
    // A link-local address is delivered only on its own interface.
    let interface = if packet.flow.destination.is_v6_link_local() {
        // SAFETY: the context is valid for the whole run of the program.
        unsafe { (*ctx.skb.skb).ifindex }
    } else {
        LOOPBACK
    };
    // SAFETY: a plain helper call on numbers.
    unsafe { bpf_redirect(interface, u64::from(BPF_F_INGRESS)) as i32 }
}

/// The loopback's packets have an Ethernet header, whose addresses are zero.
#[inline(always)]
fn add_link_header(ctx: &TcContext, packet: &Packet) -> Result<(), c_long> {
    // SAFETY: the context is valid; no pointer into the packet is held across the call.
    let added = unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET, 0) };
    if added != 0 {
        return Err(added);
    }
    let protocol = if packet.flow.source.is_v4() {
        ETH_P_IP
    } else {
        ETH_P_IPV6
    };
    ctx.store(12, &protocol.to_be(), 0)
}

#[inline(always)]
fn refuse(ctx: &TcContext, packet: &Packet, unit: Unit, reason: Reason) -> i32 {
    tell(ctx, packet, unit, Outcome::Refused, reason);
    answer(ctx, packet, Towards::App).unwrap_or(TC_ACT_SHOT)
}

/// Refuses a SYN whose source address isn't known as one of this pod.
#[inline(always)]
fn refuse_stranger(ctx: &TcContext, packet: &Packet, socket: Option<Socket>) -> i32 {
    let (outcome, reason) = (Outcome::Refused, Reason::UnknownAddress);
    tell(ctx, packet, Unit::Syns, outcome, reason);
    let towards = if socket.is_some() {
        Towards::Socket
    } else {
        Towards::App
    };
    answer(ctx, packet, towards).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn drop(ctx: &TcContext, packet: &Packet, reason: Reason) -> i32 {
    tell(ctx, packet, Unit::Packets, Outcome::Dropped, reason);
    TC_ACT_SHOT
}

#[inline(always)]
fn tell(ctx: &TcContext, packet: &Packet, unit: Unit, outcome: Outcome, reason: Reason) {
    record(ctx, packet, Direction::Outbound, unit, outcome, reason);
}
