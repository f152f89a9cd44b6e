//! What became of the last connections between two ends, from what their agents remember and count.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use serde::Serialize;

use super::{End, meaning};
use crate::cli::{
    metrics::{Metrics, Sample},
    style::{Sign, Style},
    table::{Align, Table},
    view::Config,
};

/// What stands for connections that live.
const OPEN: &str = "open";

/// Connections that ended alike.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Past {
    /// The node whose agent tells.
    node: String,
    direction: String,
    /// Why they ended; empty in good order, `open` for those that live.
    result: String,
    /// Whether that was at an endpoint of a Service, and the connection went on to another one.
    retried: bool,
    connections: u64,
    /// When the last one ended, where that is remembered. RFC 3339.
    last: Option<String>,
}

/// What the kernel refused on a node, of whichever connection.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct KernelRefusals {
    node: String,
    direction: String,
    reason: String,
    connections: u64,
}

/// What a node's agent says of the pair. Its counts are those of all connections between two pods;
/// where an end is no pod of the mesh file, they are those that the agent remembers.
pub(super) fn of_pair(
    node: &str,
    config: &Config,
    metrics: &Metrics,
    source: &End,
    destination: &End,
    port: u16,
) -> Vec<Past> {
    let mut all: BTreeMap<(String, String), Past> = BTreeMap::new();
    let mut entry = |direction: &str, result: &str, change: &dyn Fn(&mut Past)| {
        let past = all.entry((direction.to_owned(), result.to_owned()));
        change(past.or_insert_with(|| Past {
            node: node.to_owned(),
            direction: direction.to_owned(),
            result: result.to_owned(),
            ..Past::default()
        }));
    };
    let counted = source.workload.is_some() && destination.workload.is_some();
    if counted {
        let samples = |family| {
            let of = metrics.of(family);
            of.filter(|sample| is_of(sample, source, destination, port))
        };
        for sample in samples("tcp_open_connections") {
            entry(sample.label("direction"), OPEN, &|past| {
                past.connections += sample.count();
            });
        }
        for sample in samples("tcp_close_total") {
            let (direction, reason) = (sample.label("direction"), sample.label("reason"));
            entry(direction, reason, &|past| {
                past.connections += sample.count();
            });
        }
    }
    for ended in &config.ended {
        let from = ended.source.parse::<IpAddr>();
        let to = ended.destination.parse::<SocketAddr>();
        if !from.is_ok_and(|from| source.addresses.contains(&from))
            || !to.is_ok_and(|to| destination.is_at(to, port))
        {
            continue;
        }
        let reason = ended.reason.as_deref().unwrap_or_default();
        entry(&ended.direction, reason, &|past| {
            if past.last.as_ref().is_none_or(|last| *last < ended.at) {
                past.last = Some(ended.at.clone());
            }
            // What was refused before the agent knew the ends has no series of the pair.
            if !counted || past.connections < ended.times {
                past.connections = past.connections.max(ended.times);
            }
        });
    }
    let mut all: Vec<Past> = all
        .into_values()
        .filter(|past| past.connections > 0)
        .collect();
    all.extend(retries(node, metrics, source, destination, port));
    all.sort_by(|a, b| b.last.cmp(&a.last));
    all
}

/// Connections that failed at this end, or at an endpoint of this Service, and went on to another.
fn retries(node: &str, metrics: &Metrics, source: &End, destination: &End, port: u16) -> Vec<Past> {
    let samples = metrics.of("malla_outbound_tcp_retries_total");
    let of_pair = samples.filter(|sample| {
        let there = match destination.service_id() {
            // A Service's endpoints that are pods are those of its own namespace.
            Some(service) => {
                let namespace = sample.label("dst_namespace");
                sample.label("dst_service") == service.name
                    && (namespace.is_empty() || namespace == service.namespace)
            }
            None => {
                is_named(sample, destination, "dst")
                    && sample.label("target_port").parse() == Ok(port)
            }
        };
        there && is_named(sample, source, "src")
    });
    let mut by_reason: BTreeMap<&str, u64> = BTreeMap::new();
    for sample in of_pair {
        *by_reason.entry(sample.label("reason")).or_default() += sample.count();
    }
    let past = by_reason.into_iter().map(|(reason, connections)| Past {
        node: node.to_owned(),
        direction: "outbound".to_owned(),
        result: reason.to_owned(),
        retried: true,
        connections,
        last: None,
    });
    past.collect()
}

/// Whether a sample is of the transport that was accepted of the pair's connections.
fn is_of(sample: &Sample, source: &End, destination: &End, port: u16) -> bool {
    sample.label("peer") == "src"
        && sample.label("target_port").parse() == Ok(port)
        && is_named(sample, source, "src")
        && is_named(sample, destination, "dst")
}

/// Whether a sample names this pod as its `src` or `dst`.
fn is_named(sample: &Sample, end: &End, side: &str) -> bool {
    end.workload.as_ref().is_some_and(|workload| {
        sample.label(&format!("{side}_namespace")) == workload.id.namespace
            && sample.label(&format!("{side}_pod")) == workload.id.name
    })
}

/// The SYNs that a node's kernel has refused. It keeps no addresses.
pub(super) fn kernel_refusals(node: &str, metrics: &Metrics) -> Vec<KernelRefusals> {
    let refused = metrics
        .of("malla_steering_syns_total")
        .filter(|sample| sample.label("verdict") == "refused" && sample.count() > 0);
    refused
        .map(|sample| KernelRefusals {
            node: node.to_owned(),
            direction: sample.label("direction").to_owned(),
            reason: sample.label("reason").to_owned(),
            connections: sample.count(),
        })
        .collect()
}

pub(super) fn render(
    past: &[Past],
    kernel: &[KernelRefusals],
    now: SystemTime,
    style: Style,
) -> String {
    let mut text = String::new();
    let mut meanings = BTreeMap::new();
    if past.is_empty() {
        text.push_str("\nNo agent that was asked remembers a connection between the two.\n");
    } else {
        let mut table = Table::new([
            ("NODE", Align::Left),
            ("DIRECTION", Align::Left),
            ("CONNECTIONS", Align::Right),
            ("LAST", Align::Right),
            ("RESULT", Align::Left),
        ]);
        for past in past {
            let result = match past.result.as_str() {
                "" => style.sign(Sign::Good),
                result if past.retried => format!("{result}, then another endpoint"),
                result => result.to_owned(),
            };
            meanings.insert(past.result.as_str(), meaning(&past.result));
            let last = past.last.as_deref().map(|last| ago(last, now));
            table.row([
                past.node.clone(),
                past.direction.clone(),
                past.connections.to_string(),
                last.unwrap_or_default(),
                result,
            ]);
        }
        text.push_str("\nwhat became of the last ones:\n");
        text.push_str(&table.render());
    }
    if !kernel.is_empty() {
        let mut table = Table::new([
            ("NODE", Align::Left),
            ("DIRECTION", Align::Left),
            ("CONNECTIONS", Align::Right),
            ("REASON", Align::Left),
        ]);
        for refused in kernel {
            meanings.insert(refused.reason.as_str(), meaning(&refused.reason));
            table.row([
                refused.node.clone(),
                refused.direction.clone(),
                refused.connections.to_string(),
                refused.reason.clone(),
            ]);
        }
        text.push_str("\nwhat these nodes' kernels refused, of anybody's:\n");
        text.push_str(&table.render());
    }
    let mut meanings = meanings
        .into_iter()
        .filter_map(|(word, meaning)| Some(format!("{word}: {}\n", meaning?)))
        .peekable();
    if meanings.peek().is_some() {
        text.push('\n');
    }
    text.extend(meanings);
    text
}

fn ago(at: &str, now: SystemTime) -> String {
    let seconds = humantime::parse_rfc3339(at)
        .ok()
        .map(|at| now.duration_since(at).unwrap_or_default().as_secs());
    match seconds {
        None => String::new(),
        Some(seconds @ 0..120) => format!("{seconds}s"),
        Some(seconds @ 120..7_200) => format!("{}m", seconds / 60),
        Some(seconds) => format!("{}h", seconds / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::discovery::file;

    const NOW: &str = "2026-06-01T00:00:10Z";

    #[test]
    fn counts_are_the_metrics_and_times_are_what_the_agent_remembers() {
        let mesh = "nodes: []\nworkloads:\n\
            - {name: web, namespace: a, addresses: [10.1.0.2]}\n\
            - {name: db, namespace: a, addresses: [10.1.0.9]}\n";
        let mesh = file::check(Path::new("mesh.yaml"), mesh).unwrap();
        let [web, db] = ["web", "db"].map(|name| End::parse(&mesh, name).unwrap());
        let labels = "direction=\"inbound\",peer=\"src\",target_port=\"80\",src_namespace=\"a\",\
                      src_pod=\"web\",dst_namespace=\"a\",dst_pod=\"db\"";
        let scrape = format!(
            "tcp_open_connections{{{labels}}} 2\n\
             tcp_close_total{{{labels},reason=\"\"}} 0\n\
             tcp_close_total{{{labels},reason=\"client_reset\"}} 7\n\
             malla_outbound_tcp_retries_total{{src_namespace=\"a\",src_pod=\"web\",dst_namespace=\"a\",\
             dst_pod=\"db\",target_port=\"80\",reason=\"peer_refused\"}} 5\n\
             malla_steering_syns_total{{direction=\"outbound\",reason=\"no_agent\",verdict=\"refused\"}} 3\n"
        );
        let ended = |at: &str, port, reason: &str, times: u64| {
            serde_json::json!({"at": at, "direction": "inbound", "source": "10.1.0.2",
                "destination": format!("10.1.0.9:{port}"), "reason": reason, "times": times})
        };
        let config: Config = serde_json::from_value(serde_json::json!({"ended": [
            ended("2026-06-01T00:00:05Z", 80, "client_reset", 1),
            ended("2026-06-01T00:00:09Z", 80, "handshake_limit", 4),
            ended("2026-06-01T00:00:09Z", 81, "connect_refused", 4),
        ]}))
        .unwrap();
        let metrics = Metrics::parse(&scrape);
        let past = of_pair("b", &config, &metrics, &web, &db, 80);
        let kernel = kernel_refusals("b", &metrics);
        let now = humantime::parse_rfc3339(NOW).unwrap();
        assert_eq!(
            render(&past, &kernel, now, Style::PLAIN),
            "\n\
             what became of the last ones:\n\
             NODE   DIRECTION   CONNECTIONS   LAST   RESULT\n\
             b      inbound               4     1s   handshake_limit\n\
             b      inbound               7     5s   client_reset\n\
             b      inbound               2      -   open\n\
             b      outbound              5      -   peer_refused, then another endpoint\n\
             \n\
             what these nodes' kernels refused, of anybody's:\n\
             NODE   DIRECTION   CONNECTIONS   REASON\n\
             b      outbound              3   no_agent\n\
             \n\
             client_reset: The client reset the connection.\n\
             handshake_limit: Too many handshakes at once.\n\
             no_agent: No agent lives, and the pod fails closed.\n\
             peer_refused: The peer's agent refused the connection.\n"
        );
    }
}
