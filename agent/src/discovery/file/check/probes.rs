//! The probes of one workload.

use super::{Checker, Context, values};
use crate::{
    discovery::file::schema::{At, PortText, ProbeEntry, WorkloadEntry},
    model::{Ask, Probe, Probes, WorkloadPort},
};

/// What the entry of a workload, found at `path`, says of its probes. `ports` are those that it
/// declares.
pub(super) fn probes(
    checker: &mut Checker,
    entry: &WorkloadEntry,
    path: &str,
    ports: &[WorkloadPort],
    context: &Context<'_>,
) -> Probes {
    let Some(first) = entry.probes.first() else {
        return Probes::default();
    };
    let Some(node) = &entry.node else {
        checker.problem(
            first.line,
            &format_args!("{path}.probes"),
            "stands without `node`: probes come from the node that the pod is on".to_owned(),
        );
        return Probes::default();
    };
    let mut list = Vec::new();
    for (index, entry) in entry.probes.iter().enumerate() {
        let path = format!("{path}.probes[{index}]");
        let probe = probe(checker, entry, &path, ports);
        // A pod is often asked the same by two of its probes.
        list.extend(probe.filter(|probe| !list.contains(probe)));
    }
    let from = context.nodes.get(node.value.as_str());
    Probes {
        from: from.map_or_else(Vec::new, |addresses| addresses.to_vec()),
        list,
    }
}

fn probe(
    checker: &mut Checker,
    At { value: entry, line }: &At<ProbeEntry>,
    path: &str,
    ports: &[WorkloadPort],
) -> Option<Probe> {
    let mut port = |kind: &str, port: &At<PortText>| {
        let field = format_args!("{path}.{kind}.port");
        checker.parsed(port, &field, |text| values::port(&text.0, ports))
    };
    match (&entry.http_get, &entry.tcp_socket, &entry.grpc) {
        (Some(get), None, None) => {
            let port = port("httpGet", &get.port);
            let field = format_args!("{path}.httpGet.path");
            let target = get.path.as_ref().map_or(Some("/".to_owned()), |path| {
                checker.parsed(path, &field, |text| values::request_target(text))
            });
            let (port, path) = (port?, target?);
            Some(Probe {
                port,
                ask: Ask::HttpGet { path },
            })
        }
        (None, Some(socket), None) => Some(Probe {
            port: port("tcpSocket", &socket.port)?,
            ask: Ask::TcpSocket,
        }),
        (None, None, Some(grpc)) => {
            let service = grpc.service.as_ref();
            Some(Probe {
                port: port("grpc", &grpc.port)?,
                ask: Ask::Grpc {
                    service: service.map_or_else(String::new, |service| service.value.clone()),
                },
            })
        }
        (get, socket, grpc) => {
            let said = [get.is_some(), socket.is_some(), grpc.is_some()];
            let how_many = if said.contains(&true) {
                "several"
            } else {
                "none"
            };
            let reason = format!(
                "has {how_many} of httpGet, tcpSocket and grpc; a probe is exactly one of them"
            );
            checker.problem(*line, &path, reason);
            None
        }
    }
}
