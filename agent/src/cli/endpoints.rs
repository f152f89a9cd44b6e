//! `malla endpoints`: where the Services of the mesh lead, and in which state that is.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    Output,
    client::Location,
    print, print_json,
    table::{Align, Table},
    view::Service,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The Services to show, as NAME or NAMESPACE/NAME; all without any.
    #[arg(value_name = "SERVICE")]
    services: Vec<String>,
    #[command(flatten)]
    agent: Location,
    /// Show only Services of this namespace.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// One address and port that a Service leads to.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    /// The Service's.
    namespace: String,
    ip: String,
    port: u16,
    /// Empty where the address is no pod's of the mesh file.
    pod: String,
    service: String,
    state: String,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = arguments.agent.client()?.config()?;
    let wanted = |service: &&Service, name: &str| service.id == name || service.name() == name;
    for name in &arguments.services {
        anyhow::ensure!(
            config.services.iter().any(|service| wanted(&service, name)),
            "no Service {name} is in the mesh file: `malla endpoints` without a name shows those \
             that are"
        );
    }
    let shown = config.services.iter().filter(|service| {
        let namespace = arguments.namespace.as_deref();
        let mut names = arguments.services.iter();
        namespace.is_none_or(|namespace| service.namespace() == namespace)
            && (arguments.services.is_empty() || names.any(|name| wanted(service, name)))
    });
    let rows: Vec<Row> = shown.flat_map(rows).collect();
    match arguments.output {
        Output::Json => print_json(&rows),
        Output::Table => print(&table(&rows)),
    }
}

fn rows(service: &Service) -> Vec<Row> {
    let mut rows = Vec::new();
    for endpoint in &service.endpoints {
        let pod = endpoint.workload.as_deref().unwrap_or_default();
        for ip in &endpoint.addresses {
            rows.extend(endpoint.ports.iter().flatten().map(|port| Row {
                namespace: service.namespace().to_owned(),
                ip: ip.clone(),
                port: *port,
                pod: pod.split_once('/').map_or(pod, |(_, name)| name).to_owned(),
                service: service.name().to_owned(),
                state: endpoint.state.clone(),
            }));
        }
    }
    rows
}

fn table(rows: &[Row]) -> String {
    let columns = ["NAMESPACE", "IP", "PORT", "POD", "SERVICE", "STATE"];
    let mut table = Table::new(columns.map(|title| (title, Align::Left)));
    for row in rows {
        table.row([
            row.namespace.clone(),
            row.ip.clone(),
            row.port.to_string(),
            row.pod.clone(),
            row.service.clone(),
            row.state.clone(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_and_port_has_a_row_in_linkerds_columns_with_its_state() {
        let service: Service = serde_json::from_value(serde_json::json!({
            "service": "shop/db",
            "endpoints": [
                {"addresses": ["10.1.0.3", "fd01::3"], "workload": "shop/db-1", "state": "ready",
                    "ports": [5432, null]},
                {"addresses": ["192.0.2.7"], "workload": null, "state": "not_ready",
                    "ports": [5432, 9187]},
            ],
        }))
        .unwrap();
        assert_eq!(
            table(&rows(&service)),
            "NAMESPACE   IP          PORT   POD    SERVICE   STATE\n\
             shop        10.1.0.3    5432   db-1   db        ready\n\
             shop        fd01::3     5432   db-1   db        ready\n\
             shop        192.0.2.7   5432   -      db        not_ready\n\
             shop        192.0.2.7   9187   -      db        not_ready\n"
        );
    }
}
