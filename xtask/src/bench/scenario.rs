//! What is compared.

use std::fmt;

use clap::ValueEnum;

/// What stands between the client and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Scenario {
    /// Nothing: pod to pod over the nodes' routing.
    Direct,
    /// Two haproxies that pass TCP on, one TLS connection a stream, certificates on both ends.
    HaproxyTcpMtls,
    /// Two agents.
    Malla,
    /// One agent and many pods: how long it takes to have them.
    Enrolment,
    /// A meshed client and server, while another pod of the server's node is flooded that isn't
    /// meshed.
    FloodUnmeshed,
    /// The same, and the flooded pod is meshed too.
    FloodMeshed,
}

impl Scenario {
    pub(super) const ALL: [Self; 6] = [
        Self::Direct,
        Self::HaproxyTcpMtls,
        Self::Malla,
        Self::Enrolment,
        Self::FloodUnmeshed,
        Self::FloodMeshed,
    ];

    /// Whether it needs the agent.
    pub(super) fn has_agent(self) -> bool {
        !matches!(self, Self::Direct | Self::HaproxyTcpMtls)
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::HaproxyTcpMtls => "haproxy-tcp-mtls",
            Self::Malla => "malla",
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
