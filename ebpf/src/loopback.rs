//! TC ingress of a pod's loopback: steered packets, on their way to the agent's sockets.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};
use malla_common::STEER_MARK;

/// The packet is for this host.
const PACKET_HOST: u32 = 0;

#[classifier]
pub fn loopback(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { (*ctx.skb.skb).mark } == STEER_MARK {
        // The redirect took it for another host's, by its MAC address, and the stack would drop
        // it. Should the change fail, it does just that.
        let _ = ctx.change_type(PACKET_HOST);
    }
    TC_ACT_UNSPEC
}
