//! `malla edges`: who talks to whom, as the agent's TCP metrics have it.
//!
//! A connection has two transports in the metrics, and the one that the agent dialled isn't there
//! where it never came so far. What it came to then is the reason in place of `√`.

use std::{collections::BTreeMap, process::ExitCode};

use serde::Serialize;

use super::{
    WideOutput,
    client::Location,
    metrics::{Metrics, Sample},
    print, print_json,
    style::{Sign, Style},
    table::{Align, Table},
};
use crate::model::SpiffeId;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Location,
    /// Show only what comes from or goes to this namespace.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    #[arg(short, long, value_enum, default_value_t = WideOutput::Table)]
    output: WideOutput,
}

/// Connections of one pair of ends that are alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Edge {
    #[serde(flatten)]
    pair: Pair,
    /// `spiffe://…`, empty where there is none.
    client_id: String,
    server_id: String,
    /// Why there is no mutual TLS, or why the connections came to nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    src: String,
    dst: String,
    src_namespace: String,
    dst_namespace: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct Counts {
    /// Connections so far.
    opened: u64,
    /// Those that live.
    open: u64,
}

/// What tells the connections of a pair apart on the leg to the other end.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Security {
    client_id: String,
    server_id: String,
    no_tls_reason: Option<String>,
}

/// The connections of one pair to one port, as an agent reports them in one direction.
#[derive(Debug, Default)]
struct Reported {
    /// By how the leg to the other end is secured.
    outer: BTreeMap<Security, Counts>,
    /// What ended on that leg, by why it ended badly.
    outer_closed: BTreeMap<(Security, String), u64>,
    accepted_closed: BTreeMap<String, u64>,
    dialled_closed: BTreeMap<String, u64>,
    /// Connections that failed at this end, an endpoint of a Service, and went on to another one.
    retried: BTreeMap<String, u64>,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let metrics = arguments.agent.client()?.metrics()?;
    let mut edges = edges(&metrics);
    if let Some(namespace) = &arguments.namespace {
        edges.retain(|edge, _| {
            [&edge.pair.src_namespace, &edge.pair.dst_namespace].contains(&namespace)
        });
    }
    match arguments.output {
        WideOutput::Json => print_json(&json(&edges)),
        output => print(&table(
            &edges,
            output == WideOutput::Wide,
            Style::of_stdout(),
        )),
    }
}

/// All edges that the metrics tell of, with their numbers.
fn edges(metrics: &Metrics) -> BTreeMap<Edge, Counts> {
    let outbound = reported(metrics, "outbound");
    let inbound = reported(metrics, "inbound");
    let mut edges = BTreeMap::new();
    for ((pair, _port), reported) in &outbound {
        add(&mut edges, pair, reported.outer.clone(), reported.refused());
    }
    for ((pair, port), mut reported) in inbound {
        // Of two pods of this node both sides tell: once is enough.
        if outbound.contains_key(&(pair.clone(), port)) {
            continue;
        }
        let refused = reported.refused();
        reported.take_from_outer(&refused);
        add(&mut edges, &pair, reported.outer, refused);
    }
    edges.retain(|_, counts| counts.opened > 0);
    edges
}

fn add(
    edges: &mut BTreeMap<Edge, Counts>,
    pair: &Pair,
    carried: BTreeMap<Security, Counts>,
    refused: BTreeMap<String, u64>,
) {
    let mut count = |security: Security, reason, counts: Counts| {
        let edge = Edge {
            pair: pair.clone(),
            client_id: security.client_id,
            server_id: security.server_id,
            reason,
        };
        let sum = edges.entry(edge).or_default();
        sum.opened += counts.opened;
        sum.open += counts.open;
    };
    for (security, counts) in carried {
        let reason = security.no_tls_reason.clone();
        count(security, reason, counts);
    }
    for (reason, opened) in refused {
        let counts = Counts { opened, open: 0 };
        count(Security::default(), Some(reason), counts);
    }
}

impl Reported {
    /// Connections that came to nothing here, by why: accepted, and ended before anything was
    /// dialled, or tried elsewhere.
    fn refused(&self) -> BTreeMap<String, u64> {
        let closed = self.accepted_closed.iter();
        let mut refused: BTreeMap<String, u64> = closed
            .map(|(reason, count)| {
                let dialled = self.dialled_closed.get(reason).copied().unwrap_or_default();
                (reason.clone(), count.saturating_sub(dialled))
            })
            .collect();
        for (reason, count) in &self.retried {
            *refused.entry(reason.clone()).or_default() += count;
        }
        refused.retain(|_, count| *count > 0);
        refused
    }

    /// Takes the refused connections out of those of the leg to the other end, where that leg is
    /// the one that was accepted.
    fn take_from_outer(&mut self, refused: &BTreeMap<String, u64>) {
        for (reason, count) in refused {
            let mut left = *count;
            for ((security, why), closed) in &self.outer_closed {
                if let Some(counts) = self.outer.get_mut(security).filter(|_| why == reason) {
                    let taken = left.min(*closed);
                    counts.opened = counts.opened.saturating_sub(taken);
                    left -= taken;
                }
            }
        }
    }
}

fn reported(metrics: &Metrics, direction: &str) -> BTreeMap<(Pair, String), Reported> {
    let outer_leg = if direction == "outbound" {
        "dst"
    } else {
        "src"
    };
    let mut all: BTreeMap<(Pair, String), Reported> = BTreeMap::new();
    let key = |sample: &Sample| {
        let [src, dst, src_namespace, dst_namespace] =
            ["src_pod", "dst_pod", "src_namespace", "dst_namespace"]
                .map(|name| sample.label(name).to_owned());
        let pair = Pair {
            src,
            dst,
            src_namespace,
            dst_namespace,
        };
        (pair, sample.label("target_port").to_owned())
    };
    let of = |family| {
        let samples = metrics.of(family);
        samples.filter(move |sample| sample.label("direction") == direction)
    };
    for sample in of("tcp_open_total").filter(|sample| sample.label("peer") == outer_leg) {
        let reported = all.entry(key(sample)).or_default();
        let counts = reported.outer.entry(security(sample)).or_default();
        counts.opened += sample.count();
    }
    for sample in of("tcp_open_connections").filter(|sample| sample.label("peer") == outer_leg) {
        let reported = all.entry(key(sample)).or_default();
        let counts = reported.outer.entry(security(sample)).or_default();
        counts.open += sample.count();
    }
    for sample in of("tcp_close_total") {
        let reason = sample.label("reason").to_owned();
        let (peer, count) = (sample.label("peer"), sample.count());
        let reported = all.entry(key(sample)).or_default();
        if peer == outer_leg {
            let outer = (security(sample), reason.clone());
            *reported.outer_closed.entry(outer).or_default() += count;
        }
        let closed = match peer {
            "src" => &mut reported.accepted_closed,
            _ => &mut reported.dialled_closed,
        };
        *closed.entry(reason).or_default() += count;
    }
    if direction == "outbound" {
        for sample in metrics.of("malla_outbound_tcp_retries_total") {
            let reason = sample.label("reason").to_owned();
            let reported = all.entry(key(sample)).or_default();
            *reported.retried.entry(reason).or_default() += sample.count();
        }
    }
    all
}

/// What the labels of the leg to the other end say.
fn security(sample: &Sample) -> Security {
    if sample.label("tls") != "true" {
        return Security {
            no_tls_reason: Some(sample.label("no_tls_reason").to_owned()),
            ..Security::default()
        };
    }
    let other = ["client_id", "server_id"].map(|name| sample.label(name).to_owned());
    // The reporter's own identity is of the same trust domain, and named by its other labels.
    let own = || {
        let known: Option<SpiffeId> = other.iter().find_map(|id| id.parse().ok());
        known.map_or_else(String::new, |known| {
            SpiffeId {
                trust_domain: known.trust_domain,
                namespace: sample.label("namespace").to_owned(),
                service_account: sample.label("serviceaccount").to_owned(),
            }
            .to_string()
        })
    };
    let [client_id, server_id] = &other;
    let (client_id, server_id) = if sample.label("direction") == "outbound" {
        (own(), server_id.clone())
    } else {
        (client_id.clone(), own())
    };
    Security {
        client_id,
        server_id,
        no_tls_reason: None,
    }
}

fn table(edges: &BTreeMap<Edge, Counts>, wide: bool, style: Style) -> String {
    let narrow = ["SRC", "DST", "SRC_NS", "DST_NS"];
    let identities: &[&str] = if wide {
        &["CLIENT_ID", "SERVER_ID"]
    } else {
        &[]
    };
    let columns = narrow.iter().chain(identities).chain(&["SECURED"]);
    let mut table = Table::new(columns.map(|title| (*title, Align::Left)));
    for edge in edges.keys() {
        let Pair {
            src,
            dst,
            src_namespace,
            dst_namespace,
        } = &edge.pair;
        let mut row: Vec<String> = [src, dst, src_namespace, dst_namespace]
            .map(Clone::clone)
            .into();
        if wide {
            row.extend([&edge.client_id, &edge.server_id].map(|id| short(id)));
        }
        let secured = edge.reason.clone();
        row.push(secured.unwrap_or_else(|| style.sign(Sign::Good)));
        table.row(row);
    }
    table.render()
}

/// `account.namespace`, as Linkerd writes identities in tables.
fn short(id: &str) -> String {
    let parsed = id.parse::<SpiffeId>();
    parsed.map_or_else(
        |_| id.to_owned(),
        |id| format!("{}.{}", id.service_account, id.namespace),
    )
}

fn json(edges: &BTreeMap<Edge, Counts>) -> Vec<serde_json::Value> {
    #[derive(Serialize)]
    struct Told<'a> {
        #[serde(flatten)]
        edge: &'a Edge,
        secured: bool,
        #[serde(flatten)]
        counts: Counts,
    }
    let told = edges.iter().map(|(edge, counts)| {
        serde_json::json!(Told {
            edge,
            secured: edge.reason.is_none(),
            counts: *counts,
        })
    });
    told.collect()
}

#[cfg(test)]
mod tests;
