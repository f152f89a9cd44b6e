//! What is compared.

use std::fmt;

use clap::ValueEnum;

/// What stands between the client and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Scenario {
    /// Nothing: pod to pod over two nodes' routing.
    Direct,
    /// Nothing: two pods on one node's bridge.
    DirectSameNode,
    /// Two haproxies that pass TCP on, one TLS connection a stream, certificates on both ends.
    HaproxyTcpMtls,
    /// Two Envoys that do the same.
    EnvoyTcpMtls,
    /// Two agents in their default mode of acceleration.
    Malla,
    /// Two agents that accelerate both directions between app and agent.
    MallaFull,
    /// Two agents that accelerate nothing.
    MallaOff,
    /// One agent, which has both pods.
    MallaSameNode,
    /// The same, and it accelerates both directions.
    MallaSameNodeFull,
    /// One agent and many pods: how long it takes to have them.
    Enrolment,
    /// A meshed client and server, while another pod of the server's node is flooded that isn't
    /// meshed.
    FloodUnmeshed,
    /// The same, and the flooded pod is meshed too.
    FloodMeshed,
}

impl Scenario {
    pub(super) const ALL: [Self; 12] = [
        Self::Direct,
        Self::DirectSameNode,
        Self::HaproxyTcpMtls,
        Self::EnvoyTcpMtls,
        Self::Malla,
        Self::MallaFull,
        Self::MallaOff,
        Self::MallaSameNode,
        Self::MallaSameNodeFull,
        Self::Enrolment,
        Self::FloodUnmeshed,
        Self::FloodMeshed,
    ];

    /// Whether it needs the agent.
    pub(super) fn has_agent(self) -> bool {
        !matches!(
            self,
            Self::Direct | Self::DirectSameNode | Self::HaproxyTcpMtls | Self::EnvoyTcpMtls
        )
    }

    /// Whether client and server are on one node.
    pub(super) fn is_one_node(self) -> bool {
        matches!(
            self,
            Self::DirectSameNode | Self::MallaSameNode | Self::MallaSameNodeFull
        )
    }

    /// The mode of acceleration that the mesh file sets, where it does.
    pub(super) const fn mode(self) -> Option<&'static str> {
        match self {
            Self::MallaFull | Self::MallaSameNodeFull => Some("full"),
            Self::MallaOff => Some("off"),
            _ => None,
        }
    }

    /// What it stands beside: nothing between as many nodes.
    pub(super) fn direct(self) -> Self {
        if self.is_one_node() {
            Self::DirectSameNode
        } else {
            Self::Direct
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectSameNode => "direct-same-node",
            Self::HaproxyTcpMtls => "haproxy-tcp-mtls",
            Self::EnvoyTcpMtls => "envoy-tcp-mtls",
            Self::Malla => "malla",
            Self::MallaFull => "malla-full",
            Self::MallaOff => "malla-off",
            Self::MallaSameNode => "malla-same-node",
            Self::MallaSameNodeFull => "malla-same-node-full",
            Self::Enrolment => "enrolment",
            Self::FloodUnmeshed => "flood-unmeshed",
            Self::FloodMeshed => "flood-meshed",
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
