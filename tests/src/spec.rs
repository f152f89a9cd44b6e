//! What a pod shall be like.

use std::net::IpAddr;

/// The description of a pod, with what a plain pod has as default: dual stack, MTU 1500, meshed,
/// in namespace `default` under the service account `default`.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) account: String,
    pub(crate) mtu: u32,
    pub(crate) families: Families,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) second_interface: bool,
    pub(crate) listing: Listing,
    pub(crate) settings: String,
    pub(crate) ports: Vec<(Option<String>, u16)>,
    pub(crate) labels: Vec<(String, String)>,
    /// Each as YAML in one line.
    pub(crate) probes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Families {
    Both,
    V4,
    /// IPv4, and the kernel's IPv6 turned off.
    V4Disabled6,
    V6,
}

impl Families {
    pub(crate) fn has_v4(self) -> bool {
        self != Self::V6
    }

    pub(crate) fn has_v6(self) -> bool {
        matches!(self, Self::Both | Self::V6)
    }
}

/// How the mesh's configuration mentions the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listing {
    Meshed,
    Unmeshed,
    Unlisted,
}

impl PodSpec {
    /// A pod's name, unique in its bed and at most 40 letters, digits and `-`.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            namespace: "default".to_owned(),
            account: "default".to_owned(),
            mtu: 1500,
            families: Families::Both,
            addresses: Vec::new(),
            second_interface: false,
            listing: Listing::Meshed,
            settings: String::new(),
            ports: Vec::new(),
            labels: Vec::new(),
            probes: Vec::new(),
        }
    }

    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// The pod's service account, the last part of its identity.
    #[must_use]
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.account = account.into();
        self
    }

    /// The MTU of both ends of the pod's link, in bytes. All pods of a node should have one.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// No IPv6 address but the link-local one.
    #[must_use]
    pub fn ipv4_only(mut self) -> Self {
        self.families = Families::V4;
        self
    }

    #[must_use]
    pub fn ipv6_only(mut self) -> Self {
        self.families = Families::V6;
        self
    }

    /// IPv4 only, with `disable_ipv6=1`.
    #[must_use]
    pub fn disable_ipv6(mut self) -> Self {
        self.families = Families::V4Disabled6;
        self
    }

    /// These addresses in place of ones of its node's network: another pod may have had them, on
    /// whatever node. Every node learns the way.
    #[must_use]
    pub fn at(mut self, addresses: &[IpAddr]) -> Self {
        addresses.clone_into(&mut self.addresses);
        self
    }

    /// A second interface `eth1`, on a second bridge of the node.
    #[must_use]
    pub fn second_interface(mut self) -> Self {
        self.second_interface = true;
        self
    }

    /// Listed in the mesh's configuration, but not part of the mesh.
    #[must_use]
    pub fn unmeshed(mut self) -> Self {
        self.listing = Listing::Unmeshed;
        self
    }

    /// Not mentioned in the mesh's configuration at all.
    #[must_use]
    pub fn unlisted(mut self) -> Self {
        self.listing = Listing::Unlisted;
        self
    }

    /// The workload's settings: lines of YAML, such as `mtls: strict`.
    #[must_use]
    pub fn settings(mut self, yaml: impl Into<String>) -> Self {
        self.settings = yaml.into();
        self
    }

    /// Declares a port.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push((None, port));
        self
    }

    /// Declares a port with a name.
    #[must_use]
    pub fn named_port(mut self, name: impl Into<String>, port: u16) -> Self {
        self.ports.push((Some(name.into()), port));
        self
    }

    /// Declares a probe, as YAML in one line, such as `httpGet: {path: /healthz, port: 8080}`.
    #[must_use]
    pub fn probe(mut self, yaml: impl Into<String>) -> Self {
        self.probes.push(yaml.into());
        self
    }

    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.push((name.into(), value.into()));
        self
    }
}
