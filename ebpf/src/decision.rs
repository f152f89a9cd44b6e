//! Telling what was decided: the counters, and the log where it is asked for.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use malla_common::{Direction, Outcome, Reason, Unit};

use crate::{maps::count, packet::Packet};

/// Counts one decision about a packet, and logs it.
#[inline(always)]
pub fn record(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    unit: Unit,
    outcome: Outcome,
    reason: Reason,
) {
    let hook = match direction {
        Direction::Outbound => "egress",
        Direction::Inbound => "ingress",
    };
    let flow = &packet.flow;
    debug!(
        ctx,
        "{} {:i}:{} -> {:i}:{} outcome={} reason={}",
        hook,
        flow.source.octets(),
        flow.source_port,
        flow.destination.octets(),
        flow.destination_port,
        outcome as u8,
        reason as u8
    );
    count(direction, unit, outcome, reason);
}
