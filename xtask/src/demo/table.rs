//! Who talks to whom, as the agents' metrics tell it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use malla_testbed::{Metrics, Sample};

/// All connections from one pod to another.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Row {
    /// The Service by whose address the client called; empty without one.
    pub(super) service: String,
    /// The identity that the server's agent has seen.
    pub(super) client: String,
    /// The identity that the client's agent has seen.
    pub(super) server: String,
    pub(super) is_encrypted: bool,
    /// Why it isn't, in the metrics' word.
    plain_reason: String,
    /// Why connections didn't end in good order, in the metrics' words.
    failures: BTreeSet<String>,
    outbound: Counts,
    inbound: Counts,
}

/// What one agent has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Counts {
    open: f64,
    opened: f64,
    bytes: f64,
}

/// Rows by source and destination.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Table(BTreeMap<(String, String), Row>);

impl Table {
    pub(super) fn of(metrics: &[Metrics]) -> Self {
        let mut table = Self::default();
        for sample in metrics.iter().flat_map(Metrics::iter) {
            table.add(sample);
        }
        table
    }

    pub(super) fn row(&self, from: &str, to: &str) -> Option<&Row> {
        self.0.get(&(from.to_owned(), to.to_owned()))
    }

    fn add(&mut self, sample: &Sample) {
        let outbound = match (sample.label("direction"), sample.label("peer")) {
            ("outbound", "dst") => true,
            ("inbound", "src") => false,
            // The other leg is the one between the agent and its pod's app.
            _ => return,
        };
        let ends = ["src_pod", "dst_pod"].map(|label| sample.label(label).to_owned());
        let row = self.0.entry(ends.into()).or_default();
        let reason = sample.label("reason");
        if !reason.is_empty() && sample.value > 0.0 {
            row.failures.insert(reason.to_owned());
        }
        let counter: fn(&mut Counts) -> &mut f64 = match sample.name.as_str() {
            "tcp_open_total" => |counts| &mut counts.opened,
            "tcp_open_connections" => |counts| &mut counts.open,
            "tcp_read_bytes_total" | "tcp_write_bytes_total" => |counts| &mut counts.bytes,
            _ => return,
        };
        if outbound {
            *counter(&mut row.outbound) += sample.value;
        } else {
            *counter(&mut row.inbound) += sample.value;
        }
        for (to, label) in [
            (&mut row.client, "client_id"),
            (&mut row.server, "server_id"),
            (&mut row.service, "dst_service"),
        ] {
            if !sample.label(label).is_empty() {
                sample.label(label).clone_into(to);
            }
        }
        if sample.label("tls") == "true" {
            row.is_encrypted = true;
        } else {
            sample
                .label("no_tls_reason")
                .clone_into(&mut row.plain_reason);
        }
    }
}

impl Row {
    /// How many connections were opened.
    pub(super) fn opened(&self) -> f64 {
        self.counts().opened
    }

    /// What the client's agent has counted, or the server's where the client has none.
    fn counts(&self) -> Counts {
        if self.outbound.opened > 0.0 {
            self.outbound
        } else {
            self.inbound
        }
    }

    fn failures(&self) -> Vec<&str> {
        self.failures.iter().map(String::as_str).collect()
    }

    fn security(&self) -> String {
        match (self.is_encrypted, self.plain_reason.as_str()) {
            (true, "") => "mutual TLS".to_owned(),
            // Some of the connections were encrypted and some not.
            (true, reason) => format!("partly: {reason}"),
            (false, reason) => format!("none: {reason}"),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heads = [
            "FROM", "TO", "SERVICE", "CLIENT", "SERVER", "TLS", "OPEN", "OPENED", "KIB", "FAILED",
        ];
        let mut lines = vec![heads.map(str::to_owned)];
        for ((from, to), row) in &self.0 {
            let counts = row.counts();
            lines.push([
                from.clone(),
                to.clone(),
                or_dash(&row.service).to_owned(),
                or_dash(&row.client).to_owned(),
                or_dash(&row.server).to_owned(),
                row.security(),
                counts.open.to_string(),
                counts.opened.to_string(),
                format!("{:.1}", counts.bytes / 1024.0),
                or_dash(&row.failures().join(" ")).to_owned(),
            ]);
        }
        let longest = |column: usize| lines.iter().map(|line| line[column].len()).max();
        let widths: Vec<usize> = (0..heads.len()).filter_map(longest).collect();
        for line in &lines {
            let cells = line.iter().zip(&widths);
            let cells = cells.map(|(cell, width)| format!("{cell:width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_joins_what_both_agents_have_seen_and_leaves_the_apps_legs_out() {
        let ends = "src_pod=\"web\",dst_pod=\"voting\"";
        let [a, b] = [
            format!(
                "tcp_open_total{{direction=\"outbound\",peer=\"dst\",tls=\"true\",{ends},server_id=\"v\"}} 3\n\
                 tcp_close_total{{direction=\"outbound\",peer=\"dst\",tls=\"true\",{ends},reason=\"server_reset\"}} 1\n\
                 tcp_close_total{{direction=\"outbound\",peer=\"dst\",tls=\"true\",{ends},reason=\"\"}} 2\n\
                 tcp_open_total{{direction=\"outbound\",peer=\"src\",tls=\"no_identity\",{ends}}} 3\n\
                 tcp_read_bytes_total{{direction=\"outbound\",peer=\"dst\",tls=\"true\",{ends}}} 2048\n"
            ),
            format!(
                "tcp_open_total{{direction=\"inbound\",peer=\"src\",tls=\"true\",{ends},client_id=\"w\"}} 2\n"
            ),
        ];
        let table = Table::of(&[Metrics::parse(&a), Metrics::parse(&b)]);
        let row = table.row("web", "voting").unwrap();
        assert_eq!((row.client.as_str(), row.server.as_str()), ("w", "v"));
        assert!(row.is_encrypted);
        assert_eq!(row.security(), "mutual TLS");
        let text = table.to_string();
        assert!(
            text.ends_with("mutual TLS  0     3       2.0  server_reset\n"),
            "{text}"
        );
        assert!(table.row("voting", "web").is_none());
    }
}
