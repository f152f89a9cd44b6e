//! Opt-outs and probes of a pod, as entries of the longest-prefix maps.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    net::IpAddr,
};

use aya::maps::MapError;
use ipnet::IpNet;
use malla_common::{
    Address, NetRule, PodEntry, PortRule, ProbeTarget, RuleKind, pod_flags, probe_flags,
};

use super::{
    pod::Pod,
    programs::{Maps, prefix},
};
use crate::model::{Ask, FailMode, MtlsMode, NestedMode, PortRange, Probes, Settings, Workload};

/// The value of a rule that has nothing to say but that it is there.
const SET: u32 = 1;

/// A prefix of the bits of `T`.
type Prefix<T> = (u32, T);

/// The entries that one pod has in the maps.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PodRules {
    pub flags: u32,
    ports: HashMap<Prefix<PortRule>, u32>,
    nets: HashSet<Prefix<NetRule>>,
    /// Requests that are probed.
    targets: HashSet<ProbeTarget>,
}

impl PodRules {
    pub fn new(pod: u32, workload: &Workload) -> Self {
        let Workload {
            settings, probes, ..
        } = workload;
        let mut rules = Self {
            flags: flags(settings, probes),
            ..Self::default()
        };
        for (kind, ports, nets) in [
            (
                RuleKind::SkipOutbound,
                &settings.skip_outbound_ports,
                &settings.skip_outbound_subnets,
            ),
            (
                RuleKind::SkipInbound,
                &settings.skip_inbound_ports,
                &settings.skip_inbound_subnets,
            ),
        ] {
            for range in ports {
                rules.add_ports(pod, kind, *range, SET);
            }
            for net in nets {
                rules.add_net(pod, kind, net);
            }
        }
        for (port, flags) in probed_ports(settings, probes) {
            let range = PortRange {
                first: port,
                last: port,
            };
            rules.add_ports(pod, RuleKind::Probe, range, flags);
        }
        for probe in &probes.list {
            if let Ask::HttpGet { path } = &probe.ask {
                // A longer one isn't accepted by discovery.
                rules
                    .targets
                    .extend(ProbeTarget::new(pod, probe.port, path));
            }
        }
        for address in probes.from.iter().filter(|_| !probes.list.is_empty()) {
            rules.add_net(pod, RuleKind::Probe, &IpNet::from(*address));
        }
        rules
    }

    fn add_ports(&mut self, pod: u32, kind: RuleKind, range: PortRange, value: u32) {
        for (bits, port) in port_prefixes(range) {
            let rule = PortRule {
                pod,
                kind: kind as u16,
                port: port.to_be(),
            };
            self.ports
                .insert((PortRule::FIXED_BITS + bits, rule), value);
        }
    }

    fn add_net(&mut self, pod: u32, kind: RuleKind, net: &IpNet) {
        let (bits, peer) = net_prefix(net);
        let rule = NetRule {
            pod,
            kind: kind as u32,
            peer,
        };
        self.nets.insert((NetRule::FIXED_BITS + bits, rule));
    }

    /// What the maps hold for each pod now.
    pub fn in_force(maps: &Maps) -> HashMap<u32, Self> {
        let mut found = HashMap::<u32, Self>::new();
        for (key, value) in maps.port_rules.iter().flatten() {
            let (bits, rule) = (key.prefix_len(), key.data());
            let pod = found.entry(rule.pod).or_default();
            pod.ports.insert((bits, rule), value);
        }
        for key in maps.net_rules.keys().flatten() {
            let (bits, rule) = (key.prefix_len(), key.data());
            found.entry(rule.pod).or_default().nets.insert((bits, rule));
        }
        for target in maps.probe_targets.keys().flatten() {
            found.entry(target.pod).or_default().targets.insert(target);
        }
        found
    }

    /// Brings the maps from `old` to this. New rules come first, so that nothing that is opted
    /// out before and after is steered in between.
    pub fn replace(&self, old: &Self, maps: &mut Maps) -> Result<(), MapError> {
        for (place @ (bits, rule), value) in &self.ports {
            if old.ports.get(place) != Some(value) {
                maps.port_rules.insert(&prefix(*bits, *rule), value, 0)?;
            }
        }
        for (bits, rule) in missing(&self.nets, &old.nets) {
            maps.net_rules.insert(&prefix(bits, rule), SET, 0)?;
        }
        for target in self.targets.difference(&old.targets) {
            maps.probe_targets.insert(target, SET, 0)?;
        }
        for place @ (bits, rule) in old.ports.keys() {
            if !self.ports.contains_key(place) {
                unless_absent(maps.port_rules.remove(&prefix(*bits, *rule)))?;
            }
        }
        for (bits, rule) in missing(&old.nets, &self.nets) {
            unless_absent(maps.net_rules.remove(&prefix(bits, rule)))?;
        }
        for target in old.targets.difference(&self.targets) {
            unless_absent(maps.probe_targets.remove(target))?;
        }
        Ok(())
    }

    /// Whether both have the same rules, whatever else the pod's settings are.
    pub fn has_same_rules(&self, other: &Self) -> bool {
        self.ports == other.ports && self.nets == other.nets && self.targets == other.targets
    }

    /// Adds the entries of `other`.
    pub fn absorb(&mut self, other: &Self) {
        self.ports.extend(&other.ports);
        self.nets.extend(&other.nets);
        self.targets.extend(&other.targets);
    }

    pub fn entry(&self, pod: &Pod) -> PodEntry {
        PodEntry {
            pod: pod.id,
            flags: self.flags,
            outbound_port: pod.listener_ports.outbound,
            reserved: 0,
        }
    }
}

fn unless_absent(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn missing<'a, T: Copy + Eq + Hash>(
    from: &'a HashSet<Prefix<T>>,
    other: &'a HashSet<Prefix<T>>,
) -> impl Iterator<Item = Prefix<T>> + 'a {
    from.difference(other).copied()
}

/// What is probed on each port that is, as [`probe_flags`].
fn probed_ports(settings: &Settings, probes: &Probes) -> HashMap<u16, u32> {
    let mut ports = HashMap::new();
    for probe in &probes.list {
        let flags = ports.entry(probe.port).or_default();
        *flags |= match probe.ask {
            Ask::TcpSocket => probe_flags::TCP,
            Ask::HttpGet { .. } => probe_flags::HTTP,
            Ask::Grpc { .. } => probe_flags::GRPC,
        };
        if settings.mtls_on(probe.port) == MtlsMode::Strict {
            *flags |= probe_flags::STRICT;
        }
    }
    ports
}

fn flags(settings: &Settings, probes: &Probes) -> u32 {
    let mut flags = 0;
    if !probes.list.is_empty() {
        flags |= pod_flags::PROBES;
    }
    if settings.fail_mode == FailMode::Open {
        flags |= pod_flags::FAIL_OPEN;
    }
    // The kernel reads it where an open pod has no agent: one strict port keeps all inbound closed.
    if settings.is_strict_somewhere() {
        flags |= pod_flags::STRICT;
    }
    if settings.nested == NestedMode::Allow {
        flags |= pod_flags::NESTED_ALLOW;
    }
    flags
}

/// The fewest prefixes (bits, port) that cover exactly `range`.
fn port_prefixes(range: PortRange) -> Vec<(u32, u16)> {
    let mut prefixes = Vec::new();
    let (mut port, last) = (u32::from(range.first), u32::from(range.last));
    while port <= last {
        // The largest block that begins here and ends within the range.
        let aligned = if port == 0 {
            16
        } else {
            port.trailing_zeros().min(16)
        };
        let fits = (last - port + 1).ilog2();
        let size = aligned.min(fits);
        // Between the ends of the range, which are of this type.
        prefixes.push((16 - size, u16::try_from(port).unwrap_or(u16::MAX)));
        port += 1 << size;
    }
    prefixes
}

fn net_prefix(net: &IpNet) -> (u32, Address) {
    let bits = u32::from(net.prefix_len());
    match net.network() {
        IpAddr::V4(address) => (96 + bits, IpAddr::V4(address).into()),
        IpAddr::V6(address) => (bits, IpAddr::V6(address).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covered(range: PortRange) -> Vec<u16> {
        let mut ports: Vec<u16> = port_prefixes(range)
            .into_iter()
            .flat_map(|(bits, port)| {
                let rest = u16::try_from((1_u32 << (16 - bits)) - 1).unwrap();
                port..=port + rest
            })
            .collect();
        ports.sort_unstable();
        ports
    }

    #[test]
    fn prefixes_cover_exactly_their_range() {
        for (first, last) in [
            (80, 80),
            (1, 65535),
            (0, 65535),
            (3000, 3010),
            (1023, 1025),
            (65535, 65535),
        ] {
            let expected: Vec<u16> = (first..=last).collect();
            assert_eq!(
                covered(PortRange { first, last }),
                expected,
                "{first}-{last}"
            );
        }
    }

    #[test]
    fn a_range_takes_few_prefixes() {
        assert_eq!(
            port_prefixes(PortRange {
                first: 0,
                last: 65535
            }),
            [(0, 0)]
        );
        assert!(
            port_prefixes(PortRange {
                first: 1,
                last: 65534
            })
            .len()
                <= 30
        );
    }

    #[test]
    fn networks_of_both_families_are_prefixes_of_one_address_form() {
        assert_eq!(net_prefix(&"10.0.0.0/8".parse().unwrap()).0, 104);
        assert_eq!(net_prefix(&"fd00::/8".parse().unwrap()).0, 8);
    }
}
