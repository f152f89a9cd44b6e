//! What `/config` tells of socket acceleration.

use serde::Serialize;

use crate::{
    model::Accelerate,
    steer::{InForce, Verdict},
};

/// How new connections between the app and the agent are accelerated.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AccelerationInForce {
    pub mode: Accelerate,
    pub reason: &'static str,
    /// What a human wants to know of the reason.
    pub why: &'static str,
}

/// Whether this kernel may accelerate connections.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Acceleration {
    /// None: nobody has asked for it.
    pub verdict: Option<&'static str>,
    /// Why no connection is accelerated.
    pub failure: Option<String>,
    /// What an app may notice of it.
    pub limits: Vec<String>,
}

impl From<InForce> for AccelerationInForce {
    fn from(in_force: InForce) -> Self {
        Self {
            mode: in_force.mode,
            reason: in_force.reason,
            why: in_force.why(),
        }
    }
}

impl From<Option<Verdict>> for Acceleration {
    fn from(verdict: Option<Verdict>) -> Self {
        Self {
            verdict: verdict.as_ref().map(Verdict::as_str),
            failure: verdict.as_ref().and_then(|it| it.failure.clone()),
            limits: verdict.map(|it| it.limits).unwrap_or_default(),
        }
    }
}
