//! Settings of one level, laid over those of the next wider one.

use std::fmt;

use ipnet::IpNet;

use super::{Checker, values};
use crate::{
    discovery::file::schema::{At, PortMtls, PortsText, SettingsSection},
    model::{MtlsMode, PortRange, Settings},
};

/// In `idleTimeout`: no limit, whatever a wider level says.
const NEVER: &str = "never";

/// `wider` with every field replaced that `section`, found at `path`, sets.
pub(super) fn resolve(
    checker: &mut Checker,
    section: Option<&SettingsSection>,
    path: &dyn fmt::Display,
    wider: &Settings,
) -> Settings {
    let mut settings = wider.clone();
    let Some(section) = section else {
        return settings;
    };
    set(&mut settings.mtls, section.mtls);
    set(&mut settings.egress, section.egress);
    let by_port = section.mtls_by_port.as_ref();
    let by_port = by_port.map(|entries| mtls_by_port(checker, entries, path));
    set(&mut settings.mtls_by_port, by_port);
    set(&mut settings.fail_mode, section.fail_mode);
    set(&mut settings.nested, section.nested);
    set(&mut settings.interfaces, section.interfaces);
    set(&mut settings.accelerate, section.accelerate);

    let mut port_list = |name, list: Option<&Vec<At<PortsText>>>| -> Option<Vec<PortRange>> {
        let parse = |text: &PortsText| values::port_range(&text.0);
        list.map(|list| checker.list(list, &format_args!("{path}.{name}"), parse))
    };
    let outbound = port_list("skipOutboundPorts", section.skip_outbound_ports.as_ref());
    let inbound = port_list("skipInboundPorts", section.skip_inbound_ports.as_ref());
    set(&mut settings.skip_outbound_ports, outbound);
    set(&mut settings.skip_inbound_ports, inbound);

    let mut subnet_list = |name, list: Option<&Vec<At<String>>>| -> Option<Vec<IpNet>> {
        let parse = |text: &String| values::subnet(text);
        list.map(|list| checker.list(list, &format_args!("{path}.{name}"), parse))
    };
    let outbound = subnet_list(
        "skipOutboundSubnets",
        section.skip_outbound_subnets.as_ref(),
    );
    let inbound = subnet_list("skipInboundSubnets", section.skip_inbound_subnets.as_ref());
    set(&mut settings.skip_outbound_subnets, outbound);
    set(&mut settings.skip_inbound_subnets, inbound);

    let allowed = subnet_list("egressAllowSubnets", section.egress_allow_subnets.as_ref());
    set(&mut settings.egress_allow_subnets, allowed);

    let dial_ports = checker.optional(
        section.dial_ports.as_ref(),
        &format_args!("{path}.dialPorts"),
        |text| values::dial_ports(&text.0),
    );
    set(&mut settings.dial_ports, dial_ports);

    let mesh_connect_timeout = checker.optional(
        section.mesh_connect_timeout.as_ref(),
        &format_args!("{path}.meshConnectTimeout"),
        |text| values::duration(&text.0),
    );
    set(&mut settings.mesh_connect_timeout, mesh_connect_timeout);
    let connect_timeout = checker.optional(
        section.connect_timeout.as_ref(),
        &format_args!("{path}.connectTimeout"),
        |text| values::duration(&text.0),
    );
    set(&mut settings.connect_timeout, connect_timeout);
    let idle_timeout = checker.optional(
        section.idle_timeout.as_ref(),
        &format_args!("{path}.idleTimeout"),
        |text| match text.0.as_str() {
            NEVER => Ok(None),
            text => values::duration(text).map(Some),
        },
    );
    set(&mut settings.idle_timeout, idle_timeout);
    let max_connections = checker.optional(
        section.max_connections.as_ref(),
        &format_args!("{path}.maxConnections"),
        |number| match number {
            0 => Err("a pod without connections is no part of a mesh; write at least 1".to_owned()),
            number => Ok(*number),
        },
    );
    set(&mut settings.max_connections, max_connections);
    settings
}

/// One mode for each port: an order of entries that meant something would open ports by mistake.
fn mtls_by_port(
    checker: &mut Checker,
    entries: &[PortMtls],
    path: &dyn fmt::Display,
) -> Vec<(PortRange, MtlsMode)> {
    let mut modes: Vec<(PortRange, MtlsMode)> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let field = format_args!("{path}.mtlsByPort[{index}].ports");
        let parse = |text: &PortsText| values::port_range(&text.0);
        let Some(range) = checker.parsed(&entry.ports, &field, parse) else {
            continue;
        };
        let clash = modes.iter().find(|(other, mode)| {
            *mode != entry.mode && other.first <= range.last && range.first <= other.last
        });
        if let Some((other, _)) = clash {
            let port = range.first.max(other.first);
            let reason = format!("port {port} has another mode in an earlier entry; write it once");
            checker.problem(entry.ports.line, &field, reason);
        }
        modes.push((range, entry.mode));
    }
    modes
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}
