//! TC ingress of a pod's loopback: steered packets, on their way to the agent's sockets, and what the
//! agent sends to the app.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use malla_common::STEER_MARK;

use crate::{
    maps::OWN_DIAL,
    packet::{ETHERNET, Kind, Packet, TCP_LISTEN, TCP_TIME_WAIT, receiver},
};

/// The packet is for this host.
const PACKET_HOST: u32 = 0;

/// The longest SYN: the headers of Ethernet, IPv6 and TCP, the last with all its options.
const LONGEST_SYN: u32 = 14 + 40 + 60;

#[classifier]
pub fn loopback(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { (*ctx.skb.skb).mark } == STEER_MARK {
        // The redirect took it for another host's, by its MAC address, and the stack would drop
        // it. Should the change fail, it does just that.
        let _ = ctx.change_type(PACKET_HOST);
        return TC_ACT_UNSPEC;
    }
    // Most of what an app says to itself isn't looked at any closer.
    if ctx.len() > LONGEST_SYN {
        return TC_ACT_UNSPEC;
    }
    let (kind, packet) = Packet::read(&ctx, ETHERNET);
    if kind == Kind::Tcp && packet.opens() && OWN_DIAL.get_ptr(&packet.flow).is_some() {
        return dial(&ctx, &packet);
    }
    TC_ACT_UNSPEC
}

/// The SYN of a connection that the agent opens to the app. One that the app's side of the tuple still
/// has would answer in the listener's stead, and be reset for it by the agent's end: such a SYN is
/// dropped, and its entry with it, by which the agent knows. One that is over is in nobody's way (RFC
/// 6191). A request is a client's, whose SYN came just before, or that of this SYN, whose answer the kernel
/// repeats by itself.
#[inline(always)]
fn dial(ctx: &TcContext, packet: &Packet) -> i32 {
    match receiver(ctx, &packet.flow) {
        None | Some(TCP_LISTEN | TCP_TIME_WAIT) => TC_ACT_UNSPEC,
        Some(_) => {
            let _ = OWN_DIAL.remove(&packet.flow);
            TC_ACT_SHOT
        }
    }
}
