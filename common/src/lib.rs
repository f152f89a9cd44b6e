//! The types that cross the boundary between malla's eBPF programs and its agent.
//!
//! Each stands here once; the kernel side and user space both compile this crate. All are
//! `repr(C)` without padding, so that a map key has one byte pattern, and their layouts are
//! tested: maps outlive an agent, and the next one reads them.
#![no_std]
// A BPF program is one function to the verifier: what isn't inlined becomes a call that it checks
// without the caller's knowledge.
#![allow(clippy::inline_always)]

pub mod acceleration;
mod address;
mod counter;
mod keys;
mod reason;

pub use address::Address;
pub use counter::{Counter, Direction, Outcome, Unit};
pub use keys::{
    Destination, Flow, ListenerKey, NetRule, OVERLOADED, Pair, PairSlots, PodEntry, PortRule,
    ProbeFlow, ProbeTarget, Role, RuleKind, SocketState, Verdict, WorkerLoad, pod_flags,
    probe_flags,
};
pub use reason::Reason;

/// The mark of a packet between TC egress and the loopback's ingress.
///
/// Clear of the bits that Kubernetes (0xC000), Cilium (0x0F00), Calico (0xFFFF0000) and others
/// (0x80) use. Only this exact value counts.
pub const STEER_MARK: u32 = 0x2031;

/// Routing table in a pod's netns whose one route delivers steered packets locally.
pub const STEER_TABLE: u32 = 133;

/// Most workers of one agent, and so most listeners of one role and pod.
pub const MAX_WORKERS: u32 = 64;

/// TCP ports of the agent's listeners in a pod's network namespace.
pub mod ports {
    /// Connections that the app opens. A name in output, never on the wire.
    pub const OUTBOUND: u16 = 15001;
    /// Plaintext connections to the app. A name in output, never on the wire.
    pub const INBOUND: u16 = 15006;
    /// Mutual TLS from other agents (HBONE), the only one of the three on the wire.
    pub const MESH: u16 = 15008;

    /// Whether `port` is one of the agent's own listeners.
    pub const fn is_agents(port: u16) -> bool {
        matches!(port, OUTBOUND | INBOUND | MESH)
    }
}
