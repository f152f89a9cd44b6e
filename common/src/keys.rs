//! Keys and values of the maps.

use crate::{Address, Direction, Reason};

/// What the programs know of a pod, found by each of its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PodEntry {
    /// Number of the pod on this node, never 0.
    pub pod: u32,
    /// Bits of [`pod_flags`].
    pub flags: u32,
    /// Port that the agent's outbound listeners are bound to in the pod's netns.
    pub outbound_port: u16,
    pub reserved: u16,
}

/// Bits of [`PodEntry::flags`].
pub mod pod_flags {
    /// Without an agent, new connections pass unmeshed instead of being refused.
    pub const FAIL_OPEN: u32 = 1 << 0;
    /// Plaintext never reaches the app, whether an agent lives or not.
    pub const STRICT: u32 = 1 << 1;
    /// SYNs without a socket of the pod's netns are steered instead of refused.
    pub const NESTED_ALLOW: u32 = 1 << 2;
    /// The pod is leaving the mesh: new connections pass, those that are steered stay so.
    pub const WITHDRAWN: u32 = 1 << 3;
    /// The pod has probes: rules say on which ports, and where they come from.
    pub const PROBES: u32 = 1 << 4;
    /// The agent in charge accelerates what it accepts of the pod.
    pub const ACCELERATED: u32 = 1 << 5;
}

/// What a rule of a pod is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RuleKind {
    /// A port or network that the app dials without the mesh.
    SkipOutbound = 0,
    /// A port of the app, or a network of clients, that never reach the agent.
    SkipInbound = 1,
    /// A port of the app that is probed, with [`probe_flags`], or a network that probes come from.
    Probe = 2,
}

impl RuleKind {
    /// The opt-outs of one direction.
    #[inline(always)]
    pub const fn skip(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::SkipOutbound,
            Direction::Inbound => Self::SkipInbound,
        }
    }
}

/// What is probed on a port: the value of a [`RuleKind::Probe`] rule.
pub mod probe_flags {
    /// Whether something listens.
    pub const TCP: u32 = 1 << 0;
    /// An HTTP request.
    pub const HTTP: u32 = 1 << 1;
    /// A gRPC health check.
    pub const GRPC: u32 = 1 << 2;
    /// Other plaintext never reaches the app there.
    pub const STRICT: u32 = 1 << 3;
}

/// What a listener of the agent is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Takes what the app opens.
    Outbound = 0,
    /// Takes plaintext to the app.
    Inbound = 1,
    /// Takes mutual TLS from other agents.
    Mesh = 2,
}

/// Key of a listening socket of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ListenerKey {
    pub pod: u32,
    pub role: u16,
    /// The worker whose socket it is.
    pub slot: u16,
}

impl ListenerKey {
    #[inline(always)]
    pub const fn new(pod: u32, role: Role, slot: u16) -> Self {
        Self {
            pod,
            role: role as u16,
            slot,
        }
    }
}

/// One direction of a TCP connection. Ports in host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow {
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
}

impl Flow {
    /// The other direction of the connection.
    #[inline(always)]
    #[must_use]
    pub const fn turned(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }
}

/// Data of a longest-prefix rule over the ports of one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PortRule {
    pub pod: u32,
    /// A [`RuleKind`].
    pub kind: u16,
    /// In network order, so that a prefix of bits is a range of ports.
    pub port: u16,
}

impl PortRule {
    /// Bits that are always compared: pod and kind.
    pub const FIXED_BITS: u32 = 48;
    pub const BITS: u32 = 64;
}

/// Data of a longest-prefix rule over the peer addresses of one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct NetRule {
    pub pod: u32,
    /// A [`RuleKind`].
    pub kind: u32,
    pub peer: Address,
}

impl NetRule {
    /// Bits that are always compared: pod and kind.
    pub const FIXED_BITS: u32 = 64;
    pub const BITS: u32 = 192;
}

/// The target of a request that is probed, as it stands in the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ProbeTarget {
    pub pod: u32,
    pub port: u16,
    pub length: u16,
    /// A zero at least behind its end.
    pub bytes: [u8; Self::LONGEST + 1],
}

impl ProbeTarget {
    /// Most bytes that a target may have.
    pub const LONGEST: usize = 247;

    /// None where `target` is too long.
    pub fn new(pod: u32, port: u16, target: &str) -> Option<Self> {
        if target.len() > Self::LONGEST {
            return None;
        }
        let mut bytes = [0; Self::LONGEST + 1];
        for (place, byte) in bytes.iter_mut().zip(target.bytes()) {
            *place = byte;
        }
        Some(Self {
            pod,
            port,
            length: u16::try_from(target.len()).ok()?,
            bytes,
        })
    }
}

/// How far a connection is that the kernel reads the requests of. Sequence numbers in host order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ProbeFlow {
    /// Where the last request began.
    pub last: u32,
    /// Where the next one must begin.
    pub next: u32,
}

/// What was decided about a connection, at its SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Verdict {
    Undecided = 0,
    Steer = 1,
    Pass = 2,
    Refuse = 3,
}

/// Kept with an app's socket. Outlives the agent that made it: its layout may only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketState {
    pub destination: Address,
    /// Sequence number of the SYN that was decided about, in network order.
    pub sequence: u32,
    pub destination_port: u16,
    pub source_port: u16,
    /// A [`Verdict`].
    pub verdict: u8,
    /// The [`Reason`] of the verdict.
    pub reason: u8,
    pub reserved: [u8; 6],
}

impl SocketState {
    pub const UNDECIDED: Self = Self {
        destination: Address([0; 4]),
        sequence: 0,
        destination_port: 0,
        source_port: 0,
        verdict: Verdict::Undecided as u8,
        reason: Reason::Meshed as u8,
        reserved: [0; 6],
    };
}

/// An address and port that apps connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Destination {
    pub address: Address,
    /// In 32 bits, so that there is no padding. 0: each port without an entry of its own.
    pub port: u32,
}

/// Two ends whose connections share workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Pair {
    pub source: Address,
    pub destination: Address,
}

/// The workers of a [`Pair`]: `count` of them, from `first` on, round the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PairSlots {
    /// When the last connection came, in nanoseconds since boot.
    pub last_at: u64,
    pub first: u16,
    pub count: u16,
    /// The worker that the last connection went to.
    pub last: u16,
    /// How many in a row went there.
    pub in_row: u16,
}

/// What a worker that should get no new connection adds to its number of them: it then weighs more
/// than any that doesn't, and where all do, their connections decide as ever.
pub const OVERLOADED: u32 = 1 << 20;

/// What a worker says of itself, for the choice of the next connection's worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct WorkerLoad {
    pub connections: u32,
    /// Share of the last interval that the worker was busy, 0 to 100.
    pub busy_percent: u32,
}

#[cfg(feature = "user")]
mod user {
    use super::{
        Address, Destination, Flow, ListenerKey, NetRule, Pair, PairSlots, PodEntry, PortRule,
        ProbeTarget, SocketState, WorkerLoad,
    };

    macro_rules! pod {
        ($($type:ty),+) => {
            $(
                // SAFETY: `repr(C)` of integers only, without padding (see the layout test).
                unsafe impl aya::Pod for $type {}
            )+
        };
    }

    pod!(
        Address,
        Destination,
        Flow,
        ListenerKey,
        NetRule,
        Pair,
        PairSlots,
        PodEntry,
        PortRule,
        ProbeTarget,
        SocketState,
        WorkerLoad
    );
}

#[cfg(test)]
mod tests {
    use core::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_have_no_padding_and_stay_as_they_are() {
        assert_eq!(size_of::<Address>(), 16);
        assert_eq!(size_of::<PodEntry>(), 12);
        assert_eq!(size_of::<ListenerKey>(), 8);
        assert_eq!(size_of::<Flow>(), 36);
        assert_eq!(size_of::<PortRule>(), 8);
        assert_eq!(size_of::<NetRule>(), 24);
        assert_eq!(size_of::<ProbeTarget>(), 256);
        assert_eq!(size_of::<ProbeFlow>(), 8);
        assert_eq!(size_of::<SocketState>(), 32);
        assert_eq!(size_of::<Destination>(), 20);
        assert_eq!(size_of::<Pair>(), 32);
        assert_eq!(size_of::<PairSlots>(), 16);
        assert_eq!(size_of::<WorkerLoad>(), 8);
        assert_eq!(offset_of!(Flow, source_port), 32);
        assert_eq!(offset_of!(PortRule, port), 6);
        assert_eq!(offset_of!(NetRule, peer), 8);
        assert_eq!(offset_of!(SocketState, sequence), 16);
        assert_eq!(offset_of!(SocketState, verdict), 24);
    }
}
