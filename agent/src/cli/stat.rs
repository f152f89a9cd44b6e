//! `malla stat`: what the pods of the agent's node carry. The HTTP columns are there and empty
//! until malla speaks HTTP.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    WideOutput,
    client::Location,
    metrics::Metrics,
    print, print_json,
    table::{Align, Table},
    view::Config,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The pods to show, as NAME or NAMESPACE/NAME; all without any.
    #[arg(value_name = "POD")]
    pods: Vec<String>,
    #[command(flatten)]
    agent: Location,
    /// Show only pods of this namespace.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// Show what the pods call, in place of what calls them.
    #[arg(long)]
    outbound: bool,
    /// How long bytes are counted, for their number in a second.
    #[arg(short, long, value_parser = humantime::parse_duration, default_value = "1s", value_name = "DURATION")]
    time_window: Duration,
    #[arg(short, long, value_enum, default_value_t = WideOutput::Table)]
    output: WideOutput,
}

/// The numbers of a pod.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    namespace: String,
    name: String,
    /// Whether the agent serves it.
    meshed: bool,
    /// Connections that are open.
    tcp_connections: u64,
    tcp_opened: u64,
    /// Connections that have ended, by reason; the empty one is in good order.
    tcp_closed: BTreeMap<String, u64>,
    read_bytes: u64,
    write_bytes: u64,
    #[serde(rename = "readBytesPerSecond")]
    read_rate: Option<f64>,
    #[serde(rename = "writeBytesPerSecond")]
    write_rate: Option<f64>,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let agent = arguments.agent.client()?;
    let config = agent.config()?;
    let read = || {
        agent
            .metrics()
            .map(|metrics| rows(&config, &metrics, arguments.outbound))
    };
    let mut shown = read()?;
    if arguments.output != WideOutput::Table {
        let began = Instant::now();
        thread::sleep(arguments.time_window);
        let before = std::mem::replace(&mut shown, read()?);
        add_rates(&mut shown, &before, began.elapsed());
    }
    shown.retain(|row| is_wanted(row, arguments.namespace.as_deref(), &arguments.pods));
    for pod in &arguments.pods {
        let found = shown
            .iter()
            .any(|row| is_wanted(row, None, std::slice::from_ref(pod)));
        anyhow::ensure!(
            found,
            "no pod {pod} is on node {}: `malla stat` without a name shows those that are",
            config.node
        );
    }
    match arguments.output {
        WideOutput::Json => print_json(&shown),
        output => {
            let wide = output == WideOutput::Wide;
            print(&table(&shown, arguments.namespace.is_none(), wide))
        }
    }
}

fn is_wanted(row: &Row, namespace: Option<&str>, pods: &[String]) -> bool {
    let named = |wanted: &String| match wanted.split_once('/') {
        Some((namespace, name)) => row.namespace == namespace && row.name == name,
        None => row.name == *wanted,
    };
    namespace.is_none_or(|namespace| row.namespace == namespace)
        && (pods.is_empty() || pods.iter().any(named))
}

/// The pods that the agent serves or should, with what it has counted.
fn rows(config: &Config, metrics: &Metrics, outbound: bool) -> Vec<Row> {
    let enrolled = config.workloads.iter().map(|pod| (&pod.id, true));
    let refused = config.refused.iter().map(|pod| (&pod.workload, false));
    let mut rows: BTreeMap<(String, String), Row> = enrolled
        .chain(refused)
        .map(|(id, meshed)| {
            let (namespace, name) = id.split_once('/').unwrap_or(("", id));
            let (namespace, name) = (namespace.to_owned(), name.to_owned());
            let row = Row {
                namespace: namespace.clone(),
                name: name.clone(),
                meshed,
                ..Row::default()
            };
            ((namespace, name), row)
        })
        .collect();
    let direction = if outbound { "outbound" } else { "inbound" };
    let mut count = |family: &str, add: fn(&mut Row, &str, u64)| {
        // The transport that was accepted: one for each connection.
        let samples = metrics.of(family).filter(|sample| {
            sample.label("direction") == direction && sample.label("peer") == "src"
        });
        for sample in samples {
            let id = ["namespace", "pod"].map(|name| sample.label(name).to_owned());
            if let Some(row) = rows.get_mut(&id.into()) {
                add(row, sample.label("reason"), sample.count());
            }
        }
    };
    count("tcp_open_connections", |row, _, n| row.tcp_connections += n);
    count("tcp_open_total", |row, _, n| row.tcp_opened += n);
    count("tcp_close_total", |row, reason, n| {
        *row.tcp_closed.entry(reason.to_owned()).or_default() += n;
    });
    count("tcp_read_bytes_total", |row, _, n| row.read_bytes += n);
    count("tcp_write_bytes_total", |row, _, n| row.write_bytes += n);
    rows.into_values().collect()
}

/// Bytes since `before` in a second. A series that was dropped meanwhile counts from nothing.
// Numbers of bytes that a rate is made of are far below 2^53.
#[expect(clippy::cast_precision_loss)]
fn add_rates(rows: &mut [Row], before: &[Row], elapsed: Duration) {
    for row in rows {
        let same = |old: &&Row| old.namespace == row.namespace && old.name == row.name;
        let old = before.iter().find(same);
        let rate = |now: u64, bytes: fn(&Row) -> u64| {
            let then = old.map(bytes).unwrap_or_default();
            now.checked_sub(then).unwrap_or(now) as f64 / elapsed.as_secs_f64()
        };
        row.read_rate = Some(rate(row.read_bytes, |row| row.read_bytes));
        row.write_rate = Some(rate(row.write_bytes, |row| row.write_bytes));
    }
}

fn table(rows: &[Row], namespaces: bool, wide: bool) -> String {
    const HTTP: [&str; 5] = [
        "SUCCESS",
        "RPS",
        "LATENCY_P50",
        "LATENCY_P95",
        "LATENCY_P99",
    ];
    let mut columns = Vec::new();
    if namespaces {
        columns.push(("NAMESPACE", Align::Left));
    }
    columns.push(("NAME", Align::Left));
    columns.push(("MESHED", Align::Right));
    columns.extend(HTTP.map(|title| (title, Align::Right)));
    columns.push(("TCP_CONN", Align::Right));
    if wide {
        columns.push(("READ_BYTES/SEC", Align::Right));
        columns.push(("WRITE_BYTES/SEC", Align::Right));
    }
    let mut table = Table::new(columns);
    for row in rows {
        let mut cells = Vec::new();
        if namespaces {
            cells.push(row.namespace.clone());
        }
        cells.push(row.name.clone());
        cells.push(if row.meshed { "1/1" } else { "0/1" }.to_owned());
        cells.extend(HTTP.map(|_| String::new()));
        // Nothing was counted of what isn't served.
        let shown = |cell: String| if row.meshed { cell } else { String::new() };
        cells.push(shown(row.tcp_connections.to_string()));
        if wide {
            let rate = |rate: Option<f64>| {
                shown(rate.map_or_else(String::new, |rate| format!("{rate:.1}B/s")))
            };
            cells.extend([rate(row.read_rate), rate(row.write_rate)]);
        }
        table.row(cells);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "\
tcp_open_total{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\",target_port=\"1\"} 3
tcp_open_total{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\",target_port=\"2\"} 4
tcp_open_total{direction=\"inbound\",peer=\"dst\",namespace=\"shop\",pod=\"db\"} 7
tcp_open_connections{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\"} 2
tcp_open_connections{direction=\"outbound\",peer=\"src\",namespace=\"shop\",pod=\"db\"} 1
tcp_close_total{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\",reason=\"\"} 4
tcp_close_total{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\",reason=\"client_reset\"} 1
tcp_read_bytes_total{direction=\"inbound\",peer=\"src\",namespace=\"shop\",pod=\"db\"} 2048
";

    fn config() -> Config {
        serde_json::from_value(serde_json::json!({
            "workloads": [{"workload": "shop/db"}],
            "refused": [{"workload": "shop/broken", "why": "no netns"}],
        }))
        .unwrap()
    }

    #[test]
    fn the_table_has_linkerds_columns_and_dashes_where_there_is_nothing_yet() {
        let metrics = Metrics::parse(SCRAPE);
        let mut now = rows(&config(), &metrics, false);
        let before = rows(&config(), &Metrics::default(), false);
        add_rates(&mut now, &before, Duration::from_secs(2));
        assert_eq!(
            table(&now, true, true),
            "NAMESPACE   NAME     MESHED   SUCCESS   RPS   LATENCY_P50   LATENCY_P95   LATENCY_P99   \
             TCP_CONN   READ_BYTES/SEC   WRITE_BYTES/SEC\n\
             shop        broken      0/1         -     -             -             -             -   \
             \x20      -                -                 -\n\
             shop        db          1/1         -     -             -             -             -   \
             \x20      2        1024.0B/s            0.0B/s\n"
        );
    }

    #[test]
    fn a_pods_numbers_are_those_of_what_was_accepted_in_one_direction() {
        let metrics = Metrics::parse(SCRAPE);
        let db = rows(&config(), &metrics, false).pop().unwrap();
        assert_eq!((db.tcp_opened, db.tcp_connections), (7, 2));
        let closed = [(String::new(), 4), ("client_reset".to_owned(), 1)];
        assert_eq!(db.tcp_closed, BTreeMap::from(closed));
        let db = rows(&config(), &metrics, true).pop().unwrap();
        assert_eq!((db.tcp_opened, db.tcp_connections), (0, 1));
    }

    #[test]
    fn pods_are_chosen_by_name_with_or_without_namespace() {
        let rows = rows(&config(), &Metrics::default(), false);
        let chosen = |namespace, pods: &[&str]| {
            let pods: Vec<_> = pods.iter().map(|pod| (*pod).to_owned()).collect();
            rows.iter()
                .filter(|row| is_wanted(row, namespace, &pods))
                .count()
        };
        assert_eq!(chosen(None, &[]), 2);
        assert_eq!(chosen(None, &["db"]), 1);
        assert_eq!(chosen(None, &["shop/db", "broken"]), 2);
        assert_eq!(chosen(Some("other"), &["db"]), 0);
    }
}
