//! What the figures were measured on and with.

use std::{fmt, fs, path::Path, thread};

use serde_json::{Map, Value};

use crate::{packages, shell};

/// Facts by name.
#[derive(Debug, Default)]
pub(super) struct Machine(Vec<(String, String)>);

impl Machine {
    /// `malla` is the agent's program, where it is measured.
    pub(super) fn of_this(malla: Option<&Path>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processors = thread::available_parallelism().map_or(0, usize::from);
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "model name").then(|| value.trim().to_owned())
        });
        let model = model.unwrap_or_default();
        let mut facts = vec![
            ("kernel", read("/proc/sys/kernel/osrelease")),
            ("processors", format!("{processors} x {model}")),
            // What else runs takes part in every figure.
            ("load before", read("/proc/loadavg")),
            // Network namespaces that are made have it as well.
            (
                "congestion control",
                read("/proc/sys/net/ipv4/tcp_congestion_control"),
            ),
        ];
        for program in ["nginx", "haproxy", "wrk", "nghttp2-client", "iperf3"] {
            facts.push((program, packages::version(program).unwrap_or_default()));
        }
        if let Some(version) = malla.and_then(|malla| shell::ask(malla, &["--version"])) {
            facts.push(("malla", version));
        }
        let facts = facts.into_iter();
        Self(
            facts
                .map(|(name, fact)| (name.to_owned(), fact.trim().to_owned()))
                .collect(),
        )
    }

    pub(super) fn json(&self) -> Value {
        let facts = self.0.iter();
        let facts: Map<String, Value> = facts
            .map(|(name, fact)| (name.replace(' ', "_"), fact.as_str().into()))
            .collect();
        facts.into()
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, fact) in &self.0 {
            writeln!(f, "{name:18} {fact}")?;
        }
        Ok(())
    }
}
