//! One vocabulary for why a connection was refused, reset or let past the agent.
//!
//! The same word stands in the kernel's counters, the metrics, the access log and the CLI.

macro_rules! reasons {
    ($($(#[doc = $meaning:literal])+ $variant:ident = $word:literal,)+) => {
        /// Why a connection was refused, reset or let past the agent.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $meaning])+ $variant,)+ }

        impl Reason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The word for output.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// What it means, in a sentence for users.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($meaning),+).trim_ascii_start(),)+ }
            }

            /// The reason that a word of output stands for.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.as_str() == word)
            }
        }
    };
}

reasons! {
    /// Nothing is wrong: the connection is carried by the agent.
    Meshed = "meshed",

    // Decided in the kernel, per SYN or packet.
    /// The agent's own packet.
    Agent = "agent",
    /// The port is opted out.
    PortSkipped = "port_skipped",
    /// The network is opted out.
    SubnetSkipped = "subnet_skipped",
    /// No agent lives, and the pod fails open.
    FailOpen = "fail_open",
    /// No agent lives, and the pod fails closed.
    NoAgent = "no_agent",
    /// The agent that carried this connection is gone.
    AgentGone = "agent_gone",
    /// The address isn't known as the pod's (yet), or is another pod's.
    UnknownAddress = "unknown_address",
    /// The sender isn't a socket of the pod's own netns.
    Forwarded = "forwarded",
    /// The packet can't be read up to its TCP flags.
    Unparsable = "unparsable",
    /// The client uses a source port that the agent uses towards the app.
    PortClash = "port_clash",
    /// The socket is older than the enrolment of its pod.
    DirectBeforeEnrolment = "direct_before_enrolment",
    /// A packet that the kernel sends without a socket.
    KernelReply = "kernel_reply",
    /// The destination is one of the agent's own listeners.
    OwnListener = "own_listener",
    /// A probe that asks only whether the app listens.
    Probe = "probe",
    /// A declared probe, while no agent lives.
    ProbeWithoutAgent = "probe_without_agent",
    /// Bytes that no declared probe sends, from where probes come from.
    ProbePayload = "probe_payload",
    /// The Service has no endpoint that takes connections.
    NoEndpoint = "no_endpoint",
    /// The Service has no such port.
    NoServicePort = "no_service_port",

    // Decided by the agent, per connection.
    /// A strict pod takes no plaintext.
    PlaintextRefused = "plaintext_refused",
    /// The destination refused the connection.
    ConnectRefused = "connect_refused",
    /// The destination did not answer within the connect time-out.
    ConnectTimeout = "connect_timeout",
    /// The connection could not be opened for another cause (no route, no such address).
    ConnectFailed = "connect_failed",
    /// Every port of the dial range is taken for this client and address.
    DialPortsExhausted = "dial_ports_exhausted",
    /// This workload has no valid certificate of its own.
    NoIdentity = "no_identity",
    /// The peer showed no certificate.
    NoCertificate = "no_certificate",
    /// The peer's certificate is of another identity than discovery says.
    IdentityMismatch = "identity_mismatch",
    /// The peer's certificate has expired or isn't valid yet.
    CertificateExpired = "certificate_expired",
    /// The peer's certificate isn't signed by the mesh's trust anchor.
    UntrustedCertificate = "untrusted_certificate",
    /// The peer's certificate carries no SPIFFE identity of the mesh's trust domain.
    ForeignTrustDomain = "foreign_trust_domain",
    /// The TLS handshake failed for another cause.
    TlsFailed = "tls_failed",
    /// The TLS handshake took too long.
    HandshakeTimeout = "handshake_timeout",
    /// Too many handshakes at once.
    HandshakeLimit = "handshake_limit",
    /// The pod has as many connections as it may have.
    ConnectionLimit = "connection_limit",
    /// The peer does not speak HTTP/2 as HBONE asks for it.
    ProtocolError = "protocol_error",
    /// The request in the tunnel isn't a CONNECT to `address:port`.
    BadRequest = "bad_request",
    /// The address in the CONNECT isn't the pod's.
    WrongDestination = "wrong_destination",
    /// The peer's agent refused the connection.
    PeerRefused = "peer_refused",
    /// The tunnel that carried the connection broke.
    TunnelLost = "tunnel_lost",
    /// The client reset the connection.
    ClientReset = "client_reset",
    /// The server reset the connection.
    ServerReset = "server_reset",
    /// No byte moved within the idle time-out.
    IdleTimeout = "idle_timeout",
    /// The pod was withdrawn from the mesh.
    Withdrawn = "withdrawn",
    /// The agent ended.
    Shutdown = "shutdown",
    /// The peer's certificate, or one above it, was revoked.
    CertificateRevoked = "certificate_revoked",
    /// The destination isn't in the mesh, and the pod's egress is `mesh-only`.
    EgressRefused = "egress_refused",
    /// The network lets nothing through from the one pod to the other's agent, both of this node.
    NetworkPolicy = "network_policy",
    /// It comes from where probes come from, and is none of those that are declared.
    ProbeUndeclared = "probe_undeclared",
}

impl Reason {
    /// How many reasons there are: the size of the kernel's counter arrays.
    pub const COUNT: usize = Self::ALL.len();
}

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_word_of_its_own_and_its_number_is_its_place() {
        for (place, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
            let same = Reason::ALL
                .iter()
                .filter(|other| other.as_str() == reason.as_str());
            assert_eq!(same.count(), 1, "{reason}");
            assert_eq!(Reason::from_word(reason.as_str()), Some(*reason));
        }
        assert_eq!(Reason::from_word("nonsense"), None);
    }

    #[test]
    fn each_reason_is_explained_in_a_sentence() {
        for reason in Reason::ALL {
            let meaning = reason.meaning();
            assert!(
                meaning.ends_with('.') && !meaning.starts_with(' '),
                "{reason}: {meaning}"
            );
        }
        let meaning = Reason::PlaintextRefused.meaning();
        assert_eq!(meaning, "A strict pod takes no plaintext.");
    }
}
