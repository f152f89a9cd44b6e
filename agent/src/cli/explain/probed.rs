//! What becomes of a connection that may be a probe: it comes from where a pod's probes come from, to
//! a port that is probed.
//!
//! Where it comes from proves nothing, so what happens depends on what it says. What isn't declared
//! is told as the connection's outcome, and beside it each declared probe that passes all the same.

use malla_common::Reason;
use serde::Serialize;

use super::decide::{AgentState, Outcome, Rule, Verdict};
use crate::{
    model::{Ask, FailMode, MtlsMode, Workload},
    telemetry::NoTls,
};

/// A declared probe, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Passing {
    pub(super) asks: String,
    pub(super) outcome: Outcome,
    pub(super) reason: &'static str,
}

/// The probes of one port.
pub(super) struct Probed<'a> {
    pub(super) pod: &'a Workload,
    pub(super) port: u16,
    /// Never empty.
    pub(super) asked: Vec<&'a Ask>,
    /// Of the pod's node.
    pub(super) agent: AgentState,
}

impl Probed<'_> {
    /// What becomes of whatever isn't declared, and by which rules.
    pub(super) fn verdict(&self, rules: &mut Vec<Rule>) -> Verdict {
        let mut rule = |rule, says| rules.push(Rule { rule, says });
        let port = self.port;
        let asked: Vec<String> = self.asked.iter().map(|ask| asks(ask)).collect();
        rule(
            "probes",
            format!("asked of port {port} from there: {}", asked.join(", ")),
        );
        if self.is_dead() {
            return self.verdict_of_kernel(rules);
        }
        if !self.is_strict() {
            rule(
                "mtls",
                format!(
                    "permissive on port {port}: where probes come from is a client like others"
                ),
            );
            return (Outcome::Plaintext, Some(PLAINTEXT));
        }
        let strict = format!("strict on port {port}: only what is declared passes");
        if self.is_apps() {
            rule("mtls", format!("{strict}, a handshake and no byte"));
            return (Outcome::Dropped, Some(Reason::ProbePayload.as_str()));
        }
        rule("mtls", format!("{strict}, whoever asks it"));
        (Outcome::Reset, Some(Reason::ProbeUndeclared.as_str()))
    }

    /// Without an agent.
    fn verdict_of_kernel(&self, rules: &mut Vec<Rule>) -> Verdict {
        let mut rule = |says: &str| {
            rules.push(Rule {
                rule: "agent",
                says: format!("none lives on node {}: {says}", self.pod.node),
            });
        };
        let passes = (Outcome::Direct, Some(Reason::ProbeWithoutAgent.as_str()));
        if !self.is_strict() && self.pod.settings.fail_mode == FailMode::Open {
            rule("failMode: open");
            return passes;
        }
        if self.asks_grpc() {
            rule("the kernel can't read HTTP/2, so this port is open to the node");
            return passes;
        }
        rule("the kernel lets only what is declared pass, whole in one packet");
        (Outcome::Dropped, Some(Reason::ProbePayload.as_str()))
    }

    /// The declared probes. None where whatever else comes passes as well.
    pub(super) fn passing(&self) -> Vec<Passing> {
        let (outcome, _) = self.verdict(&mut Vec::new());
        if matches!(outcome, Outcome::Direct | Outcome::Plaintext) {
            return Vec::new();
        }
        let (outcome, reason) = if self.is_dead() {
            (Outcome::Direct, Reason::ProbeWithoutAgent.as_str())
        } else if self.is_apps() {
            (Outcome::Direct, Reason::Probe.as_str())
        } else {
            (Outcome::Plaintext, PLAINTEXT)
        };
        let asked = self.asked.iter().map(|ask| Passing {
            asks: asks(ask),
            outcome,
            reason,
        });
        asked.collect()
    }

    fn is_dead(&self) -> bool {
        self.agent == AgentState::Dead
    }

    fn is_strict(&self) -> bool {
        self.pod.settings.mtls_on(self.port) == MtlsMode::Strict
    }

    /// Whether the app's own listener answers, since it is asked for nothing else.
    fn is_apps(&self) -> bool {
        self.asked.iter().all(|ask| **ask == Ask::TcpSocket)
    }

    fn asks_grpc(&self) -> bool {
        let mut asked = self.asked.iter();
        asked.any(|ask| matches!(ask, Ask::Grpc { .. }))
    }
}

const PLAINTEXT: &str = NoTls::PlaintextClient.as_str();

/// What a probe asks, in words.
fn asks(ask: &Ask) -> String {
    match ask {
        Ask::HttpGet { path } => format!("GET {path} (httpGet)"),
        Ask::TcpSocket => "a handshake without a byte, which fails where the app doesn't listen \
                           (tcpSocket)"
            .to_owned(),
        Ask::Grpc { service } if service.is_empty() => "a health check (grpc)".to_owned(),
        Ask::Grpc { service } => format!("a health check of {service} (grpc)"),
    }
}
