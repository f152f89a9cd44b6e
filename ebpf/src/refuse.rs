//! The RST that answers a packet nobody is there to take.
//!
//! The packet itself becomes the answer: turned round and sent back where it came from. Sums are
//! corrected where they are in the packet already; a locally made packet has none yet
//! (CHECKSUM_PARTIAL), and the helpers leave it so.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_PSEUDO_HDR},
    cty::c_long,
    helpers::{bpf_redirect, generated::bpf_skb_change_tail},
    programs::TcContext,
};
use malla_common::STEER_MARK;

use crate::packet::{ACK, ETHERNET, Packet, RST};

/// The mark of an answer on its way out of a pod, so that egress lets it pass: its tuple may be
/// that of a connection of the agent. Harmless in an app's hands: only a RST without a socket
/// counts.
pub const ANSWER_MARK: u32 = 0x2032;

const HOP_LIMIT: u8 = 64;

/// Where an answer is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Towards {
    /// Up the stack that the packet came down.
    App,
    /// To the socket that sent it, though its address may be none of this netns.
    Socket,
    /// Back out on the wire.
    Wire,
}

/// Turns the packet into the RST that answers it, and returns the verdict that sends it.
#[inline(always)]
pub fn answer(ctx: &TcContext, packet: &Packet, towards: Towards) -> Result<i32, c_long> {
    // A payload on its way to the wire stays, since its sum is in the packet: only a SYN with
    // TCP Fast Open data has one, and a RST may carry it (RFC 9293 §3.5.3).
    if towards != Towards::Wire {
        cut(ctx, packet)?;
    }
    swap(ctx, packet)?;

    // RFC 9293 §3.10.7.1: a segment with ACK is answered from its acknowledgement number, any
    // other by acknowledging it.
    let (sequence, acknowledgement, flags) = if packet.has(ACK) {
        (packet.acknowledgement, 0, RST)
    } else {
        (
            0,
            u32::from_be(packet.sequence).wrapping_add(1).to_be(),
            RST | ACK,
        )
    };
    replace(ctx, packet.tcp + 4, packet.tcp, packet.sequence, sequence)?;
    replace(
        ctx,
        packet.tcp + 8,
        packet.tcp,
        packet.acknowledgement,
        acknowledgement,
    )?;
    let old: u16 = ctx.load(packet.tcp as usize + 12)?;
    let new = u16::from_ne_bytes([old.to_ne_bytes()[0], flags]);
    ctx.l4_csum_replace(packet.tcp as usize + 16, u64::from(old), u64::from(new), 2)?;
    ctx.store(packet.tcp as usize + 12, &new, 0)?;
    renew_hop_limit(ctx, packet)?;

    // Steered packets are delivered here whatever their address is.
    ctx.set_mark(match towards {
        Towards::Socket => STEER_MARK,
        Towards::App | Towards::Wire => ANSWER_MARK,
    });
    // SAFETY: the context is valid for the whole run of the program.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    let direction = match towards {
        Towards::App | Towards::Socket => u64::from(BPF_F_INGRESS),
        Towards::Wire => 0,
    };
    // SAFETY: a plain helper call on numbers.
    Ok(unsafe { bpf_redirect(interface, direction) } as i32)
}

/// Takes the payload off a packet whose sum isn't made yet: the receiver of a reset accepts it
/// only where it fits its window.
#[inline(always)]
fn cut(ctx: &TcContext, packet: &Packet) -> Result<(), c_long> {
    let length = packet.tcp + packet.tcp_length;
    if ctx.len() <= length {
        return Ok(());
    }
    let v4 = packet.flow.source.is_v4();
    let (field, headers) = if v4 { (2, 0) } else { (4, 40) };
    let field = (packet.ip + field) as usize;
    let old: u16 = ctx.load(field)?;
    let new = ((length - packet.ip - headers) as u16).to_be();
    ctx.store(field, &new, 0)?;
    if v4 {
        ctx.l3_csum_replace(packet.ip as usize + 10, u64::from(old), u64::from(new), 2)?;
    }
    let pseudo = 2 | u64::from(BPF_F_PSEUDO_HDR);
    ctx.l4_csum_replace(
        packet.tcp as usize + 16,
        u64::from(old),
        u64::from(new),
        pseudo,
    )?;
    // SAFETY: the context is valid; no pointer into the packet is held across the call.
    match unsafe { bpf_skb_change_tail(ctx.skb.skb, length, 0) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Swaps both ends. The sums don't change, since they are sums.
#[inline(always)]
fn swap(ctx: &TcContext, packet: &Packet) -> Result<(), c_long> {
    if packet.ip == ETHERNET {
        let macs: [[u8; 6]; 2] = ctx.load(0)?;
        ctx.store(0, &[macs[1], macs[0]], 0)?;
    }
    let flow = &packet.flow;
    if flow.source.is_v4() {
        let turned = [flow.destination.0[3], flow.source.0[3]];
        ctx.store(packet.ip as usize + 12, &turned, 0)?;
    } else {
        let turned = [flow.destination.0, flow.source.0];
        ctx.store(packet.ip as usize + 8, &turned, 0)?;
    }
    let turned = [flow.destination_port.to_be(), flow.source_port.to_be()];
    ctx.store(packet.tcp as usize, &turned, 0)
}

/// Replaces four bytes of the TCP header at `tcp`.
#[inline(always)]
fn replace(ctx: &TcContext, at: u32, tcp: u32, old: u32, new: u32) -> Result<(), c_long> {
    ctx.l4_csum_replace(tcp as usize + 16, u64::from(old), u64::from(new), 4)?;
    ctx.store(at as usize, &new, 0)
}

/// The way back may be longer than what the sender's hop limit has left.
#[inline(always)]
fn renew_hop_limit(ctx: &TcContext, packet: &Packet) -> Result<(), c_long> {
    if packet.flow.source.is_v4() {
        let at = packet.ip as usize + 8;
        let old: u16 = ctx.load(at)?;
        let new = u16::from_ne_bytes([HOP_LIMIT, old.to_ne_bytes()[1]]);
        ctx.l3_csum_replace(packet.ip as usize + 10, u64::from(old), u64::from(new), 2)?;
        ctx.store(at, &new, 0)
    } else {
        ctx.store(packet.ip as usize + 7, &HOP_LIMIT, 0)
    }
}
