//! A pair of haproxies that carry TCP between two nodes in mutual TLS.

use std::{fs, net::IpAddr, path::Path, sync::Arc};

use anyhow::Result;
use malla_testbed::{Node, Process};

use super::{
    authority::{self, Certificate},
    rival,
    scene::{BETWEEN, PORTS, Pins},
};

/// The port on each node that answers once haproxy serves.
const HEALTH: u16 = 9000;

/// Starts one on each node: the client's side takes the server's ports in plain, and passes them
/// to the other side in TLS.
pub(super) fn start(
    nodes: &[Arc<Node>],
    server: IpAddr,
    folder: &Path,
    pins: Pins,
) -> Result<Vec<Process>> {
    authority::make(folder)?;
    let mut processes = Vec::new();
    for (own, peer) in [(0, 1), (1, 0)] {
        let name = nodes[own].name();
        let certificate = Certificate::make(folder, name)?;
        let (both, ca) = (certificate.both.display(), certificate.authority.display());
        // One certificate of its own, and only the other's accepted.
        let tls = format!(
            "ssl crt {both} ca-file {ca} verify required ssl-min-ver TLSv1.3 \
             ciphersuites TLS_AES_128_GCM_SHA256"
        );
        let other = nodes[peer].addresses()[0];
        let mut config = head();
        for port in PORTS {
            let between = port + BETWEEN;
            config += &if own == 0 {
                let verify = format!("verifyhost {} no-ssl-reuse", nodes[peer].name());
                listen(port, "", &format!("{other}:{between} {tls} {verify}"))
            } else {
                listen(between, &tls, &format!("{server}:{port}"))
            };
        }
        let file = folder.join(format!("haproxy-{name}.cfg"));
        fs::write(&file, config)?;
        let arguments = [
            "haproxy".as_ref(),
            "-db".as_ref(),
            "-f".as_ref(),
            file.as_os_str(),
        ];
        let health = format!("http://127.0.0.1:{HEALTH}/");
        processes.push(rival::start(&nodes[own], &arguments, &health, pins)?);
    }
    Ok(processes)
}

fn head() -> String {
    format!(
        "global\n  nbthread 1\n  maxconn 4000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 5m\n  timeout server 5m\n\
         listen health\n  mode http\n  bind 127.0.0.1:{HEALTH}\n  monitor-uri /\n"
    )
}

fn listen(port: u16, tls: &str, server: &str) -> String {
    format!("listen on-{port}\n  bind :{port} backlog 4096 {tls}\n  server next {server}\n")
}
