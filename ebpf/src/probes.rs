//! Probes of the kubelet: which of them the app meets itself, without the agent.
//!
//! They are known by where they come from, an address of the node, which alone proves nothing:
//! others come from there too. So whatever the app meets by itself is no more than what was declared.

use aya_ebpf::programs::TcContext;
use malla_common::{Flow, PodEntry, RuleKind, pod_flags, probe_flags};

use crate::{
    maps::{net_rule, port_rule},
    packet::listener_receives,
};

/// What is probed on the port that `flow` goes to, as [`probe_flags`]. 0 where nothing is, and for
/// what doesn't come from where probes come from.
#[inline(always)]
pub fn probed(pod: &PodEntry, flow: &Flow) -> u32 {
    if pod.flags & pod_flags::PROBES == 0 {
        return 0;
    }
    let Some(&flags) = port_rule(pod.pod, RuleKind::Probe, flow.destination_port) else {
        return 0;
    };
    if net_rule(pod.pod, RuleKind::Probe, &flow.source) {
        flags
    } else {
        0
    }
}

/// Whether the app's own listener takes what is probed in this way: a handshake is all that comes
/// of it, and only the app's can fail. A port that takes plaintext, or is asked by requests too, is
/// the agent's, and `ingress` looks whether the app listens.
#[inline(always)]
pub const fn is_apps(probed: u32) -> bool {
    let asked = probe_flags::TCP | probe_flags::HTTP | probe_flags::GRPC | probe_flags::STRICT;
    probed & asked == probe_flags::TCP | probe_flags::STRICT
}

/// Whether the app listens where `flow` goes.
#[inline(always)]
pub fn app_listens(ctx: &TcContext, flow: &Flow) -> bool {
    // Between two addresses of the pod, where `lookup` leaves the choice to the kernel.
    let within = Flow {
        source: flow.destination,
        destination: flow.destination,
        source_port: 0,
        destination_port: flow.destination_port,
    };
    listener_receives(ctx, &within)
}
