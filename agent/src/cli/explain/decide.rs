//! What would happen to a connection, and by which rule: a function of the mesh and of which agents
//! live. It follows the way of a connection: the kernel at the source, the source's agent, the
//! kernel at the destination, the destination's agent.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use malla_common::Reason;
use serde::Serialize;

use super::probed::{Passing, Probed};
use crate::{
    model::{FailMode, Mesh, MtlsMode, Workload, ports},
    telemetry::NoTls,
};

/// What is known of a node's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AgentState {
    Answers,
    Dead,
    /// It has no socket on this machine.
    Elsewhere,
}

/// What would happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Carried under mutual TLS.
    Meshed,
    /// Carried in plaintext by an agent.
    Plaintext,
    /// No agent has to do with it.
    Direct,
    /// `connect()` fails at once.
    Refused,
    /// `connect()` succeeds, then the connection is reset.
    Reset,
    /// `connect()` succeeds, and no byte comes through.
    Dropped,
}

impl Outcome {
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Meshed => "carried under mutual TLS",
            Self::Plaintext => "carried in plaintext",
            Self::Direct => "let pass without an agent",
            Self::Refused => "refused at once (ECONNREFUSED)",
            Self::Reset => "opened, then reset",
            Self::Dropped => "opened, and each byte on it dropped",
        }
    }
}

/// A rule that was looked at, and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Rule {
    pub(super) rule: &'static str,
    pub(super) says: String,
}

/// What would happen to a connection, and why.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Decision {
    pub(super) outcome: Outcome,
    /// The word of counters and logs.
    pub(super) reason: Option<&'static str>,
    /// Those that were looked at, in their order: the last one decided.
    pub(super) rules: Vec<Rule>,
    /// What passes all the same, as a declared probe.
    pub(super) probes: Vec<Passing>,
}

/// Who connects.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) workload: Option<Arc<Workload>>,
    pub(super) address: IpAddr,
}

/// The mesh and its agents, as far as they are known.
pub(super) struct World<'a> {
    pub(super) mesh: &'a Mesh,
    pub(super) agents: &'a dyn Fn(&str) -> AgentState,
}

pub(super) type Verdict = (Outcome, Option<&'static str>);

impl World<'_> {
    /// Follows a connection.
    pub(super) fn decide(&self, source: &Source, destination: SocketAddr) -> Decision {
        let mut rules = Vec::new();
        let (outcome, reason) = self.leaves(source, destination, &mut rules);
        Decision {
            outcome,
            reason,
            rules,
            probes: self
                .probed(source.address, destination)
                .map_or_else(Vec::new, |probed| probed.passing()),
        }
    }

    /// The probes that a connection may be one of. None where an opt-out lets it pass anyway.
    fn probed(&self, source: IpAddr, to: SocketAddr) -> Option<Probed<'_>> {
        let pod = self.mesh.workload_at(to.ip())?;
        let settings = &pod.settings;
        let asked: Vec<_> = pod.probes.asked(source, to.port()).collect();
        let skipped = settings.skips_inbound_port(to.port()) || settings.skips_inbound_from(source);
        (pod.is_enrolled() && !skipped && !asked.is_empty()).then(|| Probed {
            pod,
            port: to.port(),
            asked,
            agent: (self.agents)(&pod.node),
        })
    }

    /// At the source.
    fn leaves(&self, source: &Source, to: SocketAddr, rules: &mut Vec<Rule>) -> Verdict {
        let mut rule = |rule, says| rules.push(Rule { rule, says });
        let pod = source.workload.as_ref().filter(|pod| pod.is_enrolled());
        let Some(pod) = pod else {
            let says = self.unmeshed(source);
            rule("source", says);
            return self.arrives(source.address, to, rules);
        };
        rule("source", meshed(pod));
        if pod.addresses.contains(&to.ip()) {
            rule(
                "own address",
                "what a pod says to itself never leaves it".to_owned(),
            );
            return (Outcome::Direct, None);
        }
        let settings = &pod.settings;
        let mut ports = settings.skip_outbound_ports.iter();
        if ports.any(|range| range.contains(to.port())) {
            rule("skipOutboundPorts", format!("has port {}", to.port()));
            return self.unsteered(Reason::PortSkipped, source.address, to, rules);
        }
        let mut subnets = settings.skip_outbound_subnets.iter();
        if let Some(subnet) = subnets.find(|subnet| subnet.contains(&to.ip())) {
            rule("skipOutboundSubnets", format!("has {subnet}"));
            return self.unsteered(Reason::SubnetSkipped, source.address, to, rules);
        }
        rule("opt-outs", "none of the source's matches".to_owned());
        match ((self.agents)(&pod.node), settings.fail_mode) {
            (AgentState::Dead, FailMode::Closed) => {
                rule(
                    "agent",
                    format!("none lives on node {}; failMode: closed", pod.node),
                );
                return refused(Reason::NoAgent);
            }
            (AgentState::Dead, FailMode::Open) => {
                rule(
                    "agent",
                    format!("none lives on node {}; failMode: open", pod.node),
                );
                return self.unsteered(Reason::FailOpen, source.address, to, rules);
            }
            (state, _) => rule("agent", living(&pod.node, state)),
        }
        let mut to = to;
        if let Some(service) = self.mesh.service_at(to.ip()) {
            let Some(port) = service.port(to.port()) else {
                rule(
                    "service",
                    format!("{} has no port {}", service.id, to.port()),
                );
                return refused(Reason::NoServicePort);
            };
            let targets = port.targets(to.is_ipv4());
            let Some(target) = targets.first() else {
                let port = to.port();
                rule(
                    "service",
                    format!("{} has no endpoint that takes port {port}", service.id),
                );
                return refused(Reason::NoEndpoint);
            };
            let (id, count, address) = (&service.id, targets.len(), target.address);
            rule(
                "service",
                format!("{id} is balanced over {count} endpoints, such as {address}"),
            );
            to = address;
        }
        let destination = self.mesh.workload_at(to.ip());
        let is_meshed = destination.is_some_and(|workload| workload.meshed);
        if to.port() == ports::MESH && is_meshed {
            rule(
                "own listener",
                format!("port {} is the agents' own", ports::MESH),
            );
            return reset(Reason::OwnListener);
        }
        let why = match destination {
            Some(destination) if destination.serves_mesh_to(source.address, to.port()) => {
                return self.through_mesh(destination, rules);
            }
            Some(destination) if destination.meshed => NoTls::PortSkipped,
            _ => NoTls::NotProvidedByServiceDiscovery,
        };
        if !settings.allows_plaintext_to(to.ip()) {
            let who = named(destination.map(|destination| &**destination), to.ip());
            rule(
                "egress",
                format!("mesh-only, and {who} takes no mesh connections there"),
            );
            return reset(Reason::EgressRefused);
        }
        match self.arrives(source.address, to, rules) {
            // The source's agent carries it this far.
            (Outcome::Direct, _) => (Outcome::Plaintext, Some(why.as_str())),
            other => other,
        }
    }

    /// What is said of a source that no agent serves.
    fn unmeshed(&self, source: &Source) -> String {
        let mut nodes = self.mesh.nodes.values();
        let node = nodes.find(|node| node.addresses.contains(&source.address));
        let who = node.map_or_else(
            || {
                let who = named(source.workload.as_deref(), source.address);
                format!("{who} isn't meshed")
            },
            |node| format!("node {} is no pod", node.name),
        );
        format!("{who}: no agent carries what it opens")
    }

    /// Past the source's agent, for `reason`.
    fn unsteered(
        &self,
        reason: Reason,
        source: IpAddr,
        to: SocketAddr,
        rules: &mut Vec<Rule>,
    ) -> Verdict {
        match self.arrives(source, to, rules) {
            (Outcome::Direct, None) => (Outcome::Direct, Some(reason.as_str())),
            other => other,
        }
    }

    fn through_mesh(&self, destination: &Workload, rules: &mut Vec<Rule>) -> Verdict {
        let mut rule = |rule, says| rules.push(Rule { rule, says });
        rule("destination", meshed(destination));
        let node = &destination.node;
        let state = (self.agents)(node);
        if state == AgentState::Dead {
            rule("agent", format!("none lives on node {node}"));
            return reset(Reason::ConnectRefused);
        }
        rule("agent", living(node, state));
        (Outcome::Meshed, None)
    }

    /// In plaintext at the destination.
    fn arrives(&self, source: IpAddr, to: SocketAddr, rules: &mut Vec<Rule>) -> Verdict {
        let mut rule = |rule, says| rules.push(Rule { rule, says });
        let known = self.mesh.workload_at(to.ip());
        let Some(pod) = known.filter(|pod| pod.is_enrolled()) else {
            let who = named(known.map(|known| &**known), to.ip());
            rule(
                "destination",
                format!("{who} isn't meshed: no agent guards it"),
            );
            return (Outcome::Direct, None);
        };
        rule("destination", meshed(pod));
        let (settings, port) = (&pod.settings, to.port());
        if settings.skips_inbound_port(port) {
            rule("skipInboundPorts", format!("has port {port}"));
            return (Outcome::Direct, Some(Reason::PortSkipped.as_str()));
        }
        if settings.skips_inbound_from(source) {
            rule("skipInboundSubnets", format!("has {source}"));
            return (Outcome::Direct, Some(Reason::SubnetSkipped.as_str()));
        }
        if let Some(probed) = self.probed(source, to) {
            if probed.agent != AgentState::Dead {
                rule("agent", living(&pod.node, probed.agent));
            }
            return probed.verdict(rules);
        }
        let is_strict = settings.mtls_on(port) == MtlsMode::Strict;
        let mode = if is_strict { "strict" } else { "permissive" };
        match ((self.agents)(&pod.node), settings.fail_mode) {
            (AgentState::Dead, FailMode::Open) if !settings.is_strict_somewhere() => {
                rule(
                    "agent",
                    format!("none lives on node {}; failMode: open", pod.node),
                );
                return (Outcome::Direct, Some(Reason::FailOpen.as_str()));
            }
            (AgentState::Dead, _) => {
                rule(
                    "agent",
                    format!(
                        "none lives on node {}, and the pod stays closed meanwhile",
                        pod.node
                    ),
                );
                return refused(Reason::NoAgent);
            }
            (state, _) => rule("agent", living(&pod.node, state)),
        }
        if port == ports::MESH {
            rule(
                "mesh port",
                format!("port {port} takes clients with a certificate alone"),
            );
            return reset(Reason::NoCertificate);
        }
        rule(
            "mtls",
            format!("{mode} on port {port}, and the client shows no identity"),
        );
        if is_strict {
            reset(Reason::PlaintextRefused)
        } else {
            (Outcome::Plaintext, Some(NoTls::PlaintextClient.as_str()))
        }
    }
}

fn refused(reason: Reason) -> Verdict {
    (Outcome::Refused, Some(reason.as_str()))
}

fn reset(reason: Reason) -> Verdict {
    (Outcome::Reset, Some(reason.as_str()))
}

fn living(node: &str, state: AgentState) -> String {
    match state {
        AgentState::Elsewhere => {
            format!("that of node {node} has no socket on this machine: taken for alive")
        }
        AgentState::Answers | AgentState::Dead => format!("that of node {node} answers"),
    }
}

fn meshed(pod: &Workload) -> String {
    format!(
        "{} is meshed on node {} as {}",
        pod.id, pod.node, pod.identity
    )
}

fn named(workload: Option<&Workload>, address: IpAddr) -> String {
    workload.map_or_else(|| address.to_string(), |workload| workload.id.to_string())
}

#[cfg(test)]
mod tests;
