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
}

impl Scenario {
    pub(super) const ALL: [Self; 4] = [
        Self::Direct,
        Self::HaproxyTcpMtls,
        Self::Malla,
        Self::Enrolment,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::HaproxyTcpMtls => "haproxy-tcp-mtls",
            Self::Malla => "malla",
            Self::Enrolment => "enrolment",
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
