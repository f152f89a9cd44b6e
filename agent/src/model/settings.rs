//! What a user can choose for a workload, resolved.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a meshed pod does with clients that have no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MtlsMode {
    /// Plaintext clients reach the app.
    #[default]
    Permissive,
    /// Plaintext clients are reset.
    Strict,
}

/// Where a meshed pod may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EgressMode {
    /// Anywhere.
    #[default]
    Any,
    /// To meshed pods, and to networks that are allowed.
    MeshOnly,
}

/// What becomes of new connections while no agent lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// They are refused at once.
    #[default]
    Closed,
    /// They pass unmeshed. Never opens a strict pod's inbound side.
    Open,
}

/// What becomes of connections from sockets that aren't in the pod's own netns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NestedMode {
    #[default]
    Refuse,
    Allow,
}

/// What becomes of an interface that can't be steered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InterfaceMode {
    /// It is set down.
    #[default]
    Refuse,
    /// It is left as it is, and the pod is degraded.
    Allow,
}

/// How far connections between an app and its agent are taken past the network stack.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Default,
    Deserialize,
    Serialize,
    JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Accelerate {
    /// Not at all.
    Off,
    /// What the app sends, where the kernel lets no app notice.
    Safe,
    /// Both directions. The app must read with non-blocking sockets, and not by splice(2).
    Full,
    /// As the agent's own option says, and without one where it is known to help and to be noticed
    /// by no app, which is nowhere yet.
    #[default]
    Auto,
}

impl Accelerate {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Safe => "safe",
            Self::Full => "full",
            Self::Auto => "auto",
        }
    }
}

/// An inclusive range of TCP ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

/// The settings of one workload. `Default` has the documented defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// On ports without a mode of their own.
    pub mtls: MtlsMode,
    /// Modes of single ports. Where ranges overlap, they agree.
    pub mtls_by_port: Vec<(PortRange, MtlsMode)>,
    pub egress: EgressMode,
    /// Networks outside of the mesh that the app may connect to where egress is mesh-only.
    pub egress_allow_subnets: Vec<IpNet>,
    pub fail_mode: FailMode,
    pub nested: NestedMode,
    pub interfaces: InterfaceMode,
    pub accelerate: Accelerate,
    /// Ports that the app dials without the mesh.
    pub skip_outbound_ports: Vec<PortRange>,
    /// Ports of the app that never reach the agent.
    pub skip_inbound_ports: Vec<PortRange>,
    /// Networks that the app dials without the mesh.
    pub skip_outbound_subnets: Vec<IpNet>,
    /// Networks whose clients reach the app without the mesh.
    pub skip_inbound_subnets: Vec<IpNet>,
    /// Source ports that the agent uses towards the app.
    pub dial_ports: PortRange,
    /// Limit for opening a connection to a meshed peer or to the app.
    pub mesh_connect_timeout: Duration,
    /// Limit for opening a connection to an unmeshed destination.
    pub connect_timeout: Duration,
    /// A connection without a byte in either direction for so long is reset. `None`: never.
    pub idle_timeout: Option<Duration>,
    /// Connections and tunnels of the pod that live at once; one more is reset.
    pub max_connections: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mtls: MtlsMode::default(),
            mtls_by_port: Vec::new(),
            egress: EgressMode::default(),
            egress_allow_subnets: Vec::new(),
            fail_mode: FailMode::default(),
            nested: NestedMode::default(),
            interfaces: InterfaceMode::default(),
            accelerate: Accelerate::default(),
            skip_outbound_ports: Vec::new(),
            skip_inbound_ports: Vec::new(),
            skip_outbound_subnets: Vec::new(),
            skip_inbound_subnets: Vec::new(),
            dial_ports: PortRange {
                first: 10_000,
                last: 32_000,
            },
            // More than a lost SYN costs, which the kernel sends again after 1 s and 3 s.
            mesh_connect_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: None,
            max_connections: 20_000,
        }
    }
}

impl Settings {
    /// What clients without identity meet on a port of the app.
    pub fn mtls_on(&self, port: u16) -> MtlsMode {
        let own = self.mtls_by_port.iter();
        own.copied()
            .find(|(range, _)| range.contains(port))
            .map_or(self.mtls, |(_, mode)| mode)
    }

    /// Whether any port is strict.
    pub fn is_strict_somewhere(&self) -> bool {
        let own = self.mtls_by_port.iter().map(|(_, mode)| *mode);
        own.chain([self.mtls]).any(|mode| mode == MtlsMode::Strict)
    }

    /// Whether the app may connect to this address in plaintext.
    pub fn allows_plaintext_to(&self, destination: IpAddr) -> bool {
        self.egress == EgressMode::Any
            || self
                .egress_allow_subnets
                .iter()
                .any(|net| net.contains(&destination))
    }

    pub fn skips_inbound_port(&self, port: u16) -> bool {
        self.skip_inbound_ports
            .iter()
            .any(|range| range.contains(port))
    }

    pub fn skips_inbound_from(&self, client: IpAddr) -> bool {
        self.skip_inbound_subnets
            .iter()
            .any(|net| net.contains(&client))
    }
}
