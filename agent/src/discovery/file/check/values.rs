//! Single values: text to what it means, or the reason why it means nothing.
//!
//! Every function here is pure and knows neither line nor field; the caller adds them.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use malla_common::ProbeTarget;

use crate::model::{PortRange, WorkloadPort, ports};

/// The agent needs a choice of source ports: with fewer, clients that come and go clash.
const FEWEST_DIAL_PORTS: usize = 1000;

/// Ten years. A limit keeps sums with a point in time from overflowing.
const LONGEST_DURATION: Duration = Duration::from_hours(10 * 365 * 24);

/// An RFC 1123 label: what Kubernetes takes as the name of a namespace.
pub(super) fn label(text: &str) -> Result<(), String> {
    if text.len() <= 63 && is_label(text) {
        return Ok(());
    }
    Err(format!(
        "`{text}` is no RFC 1123 label: at most 63 of a-z, 0-9 and -, with a letter or digit at \
         both ends"
    ))
}

/// An RFC 1123 subdomain: what Kubernetes takes as the name of a pod, node or service account.
pub(super) fn subdomain(text: &str) -> Result<(), String> {
    if text.len() <= 253 && text.split('.').all(is_label) {
        return Ok(());
    }
    Err(format!(
        "`{text}` is no RFC 1123 subdomain: at most 253 of a-z, 0-9, - and ., with a letter or \
         digit at both ends of each part"
    ))
}

fn is_label(text: &str) -> bool {
    let is_alphanumeric = |c: &u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.first().is_some_and(is_alphanumeric)
        && bytes.last().is_some_and(is_alphanumeric)
        && bytes.iter().all(|c| is_alphanumeric(c) || *c == b'-')
}

/// A trust domain (SPIFFE-ID §2.1).
pub(super) fn trust_domain(text: &str) -> Result<(), String> {
    let is_allowed =
        |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
    if !text.is_empty() && text.len() <= 255 && text.bytes().all(is_allowed) {
        return Ok(());
    }
    Err(format!(
        "`{text}` is no trust domain: 1 to 255 of a-z, 0-9, ., - and _, such as cluster.local"
    ))
}

/// The address of a node or workload: one that a packet of one pod to another can carry.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| {
        if text.contains('/') {
            format!("`{text}` is a network; write the address alone")
        } else {
            format!("`{text}` is no IP address")
        }
    })?;
    let canonical = address.to_canonical();
    let kind = if canonical != address {
        return Err(format!("{text} is IPv4-mapped; write {canonical}"));
    } else if address.is_unspecified() {
        "the unspecified address"
    } else if address.is_loopback() {
        "a loopback address"
    } else if address.is_multicast() || address == IpAddr::from([255; 4]) {
        "a multicast or broadcast address"
    } else {
        return Ok(address);
    };
    Err(format!("{text} is {kind}; write one that others can reach"))
}

pub(super) fn subnet(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| {
        text.parse::<IpAddr>().map_or_else(
            |_| format!("`{text}` is no network such as 10.9.0.0/16 or fd00::/8"),
            |address| {
                format!(
                    "{text} has no prefix length; write {}",
                    IpNet::from(address)
                )
            },
        )
    })?;
    if net.trunc() != net {
        return Err(format!(
            "{text} has bits set beyond its prefix; write {}",
            net.trunc()
        ));
    }
    if net.addr().to_canonical() != net.addr() {
        return Err(format!("{text} is IPv4-mapped; write the IPv4 network"));
    }
    Ok(net)
}

/// A port, or an inclusive range of them.
pub(super) fn port_range(text: &str) -> Result<PortRange, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.trim().parse::<u16>().ok();
    let (Some(first), Some(last)) = (port(first), port(last)) else {
        return Err(format!(
            "`{text}` is no port and no range of ports such as 3000-3010"
        ));
    };
    if first == 0 {
        return Err("port 0 stands for no port; write 1 to 65535".to_owned());
    }
    if first > last {
        return Err(format!(
            "the first port is after the last; write {last}-{first}"
        ));
    }
    Ok(PortRange { first, last })
}

/// A port by its number, or by its name among the `declared` ones.
pub(super) fn port(text: &str, declared: &[WorkloadPort]) -> Result<u16, String> {
    if text.bytes().all(|c| c.is_ascii_digit() || c == b'-') {
        return match text.parse() {
            Ok(0) => Err("port 0 stands for no port; write 1 to 65535".to_owned()),
            Ok(port) if ports::is_agents(port) => Err(format!(
                "{port} is a port of the agent; write the app's own"
            )),
            Ok(port) => Ok(port),
            Err(_) => Err(format!("`{text}` is no port; write 1 to 65535, or a name")),
        };
    }
    let is_it = |port: &&WorkloadPort| port.name.as_deref() == Some(text);
    declared
        .iter()
        .find(is_it)
        .map(|port| port.port)
        .ok_or_else(|| {
            let names: Vec<_> = declared.iter().filter_map(|p| p.name.as_deref()).collect();
            let known = if names.is_empty() {
                "`ports` of the workload names none".to_owned()
            } else {
                format!("named are: {}", names.join(", "))
            };
            format!("there is no port {text}; {known}")
        })
}

/// The path of a request, with its query where it has one, as it stands in the request (RFC 9112
/// §3.2.1).
pub(super) fn request_target(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err(format!("`{text}` is no path; write one that begins with /"));
    }
    let is_allowed = |c: u8| c.is_ascii_graphic() && c != b'#';
    if let Some(c) = text
        .chars()
        .find(|c| !c.is_ascii() || !is_allowed(*c as u8))
    {
        return Err(format!(
            "`{}` has {c:?}, which no request has in its path; write it percent-encoded",
            text.escape_debug()
        ));
    }
    // The kernel reads it too.
    if text.len() > ProbeTarget::LONGEST {
        return Err(format!(
            "has {} bytes; the path of a probe may have at most {}",
            text.len(),
            ProbeTarget::LONGEST
        ));
    }
    Ok(text.to_owned())
}

/// The source ports that the agent uses towards the app.
pub(super) fn dial_ports(text: &str) -> Result<PortRange, String> {
    let range = port_range(text)?;
    let agents = [ports::OUTBOUND, ports::INBOUND, ports::MESH];
    if let Some(port) = agents.into_iter().find(|port| range.contains(*port)) {
        return Err(format!(
            "{text} contains {port}, a port of the agent; write a range before {} or after {}",
            ports::OUTBOUND,
            ports::MESH
        ));
    }
    let count = (range.first..=range.last).len();
    if count < FEWEST_DIAL_PORTS {
        return Err(format!(
            "{text} has {count} ports; at least {FEWEST_DIAL_PORTS} are needed"
        ));
    }
    Ok(range)
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| format!("`{text}` is no duration such as 500ms, 5s or 24h"))?;
    if duration.is_zero() {
        return Err("a duration of zero leaves no time at all; write at least 1ms".to_owned());
    }
    if duration > LONGEST_DURATION {
        return Err(format!("{text} is longer than ten years"));
    }
    Ok(duration)
}

/// An absolute path, without the repeated slashes and dots that would hide that two are the same.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if text.contains('\0') || !path.is_absolute() {
        return Err(format!("`{text}` is no absolute path"));
    }
    Ok(path.components().collect())
}
