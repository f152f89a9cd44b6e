//! The access log: one line for each connection, when it has ended.
//!
//! Keys and their order are ztunnel's, so that tools that read its log read this one. Lines go
//! through `tracing` with the target `access`, at level info, or error where the connection
//! failed; the filter `access=off` turns them off. Then a connection costs one comparison here.

use std::{net::SocketAddr, time::Duration};

use malla_common::Reason;
use tracing::{Level, field};

use super::Direction;
use crate::model::{SpiffeId, Workload};

const TARGET: &str = "access";

/// One end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Party<'a> {
    /// The destination's is the address that the reporter's agent dialled: of an outbound mesh
    /// connection it ends in the mesh port.
    pub address: SocketAddr,
    pub workload: Option<&'a Workload>,
    /// Only what the end has proved: by mutual TLS, or by its netns on this node.
    pub identity: Option<&'a SpiffeId>,
}

/// What the access log says of a connection that has ended.
#[derive(Debug, Clone, Copy)]
pub struct AccessRecord<'a> {
    pub direction: Direction,
    pub src: Party<'a>,
    pub dst: Party<'a>,
    /// The authority of the CONNECT, where the connection went through a tunnel.
    pub hbone_address: Option<SocketAddr>,
    /// Host name of the Service that the client asked for.
    pub service: Option<&'a str>,
    /// Bytes that the reporting workload sent to the other end.
    pub bytes_sent: u64,
    /// Bytes that the reporting workload got from the other end.
    pub bytes_received: u64,
    pub duration: Duration,
    /// Absent: the connection ended in good order.
    pub error: Option<Reason>,
}

/// Both levels need a call site of their own, since `tracing` decides by call site.
macro_rules! write_line {
    ($level:expr, $record:expr) => {{
        let AccessRecord { src, dst, .. } = $record;
        tracing::event!(
            target: TARGET,
            $level,
            src.addr = %src.address,
            src.workload = src.workload.map(|workload| workload.id.name.as_str()),
            src.namespace = src.workload.map(|workload| workload.id.namespace.as_str()),
            src.identity = src.identity.map(SpiffeId::to_string),
            dst.addr = %dst.address,
            dst.hbone_addr = $record.hbone_address.map(field::display),
            dst.service = $record.service,
            dst.workload = dst.workload.map(|workload| workload.id.name.as_str()),
            dst.namespace = dst.workload.map(|workload| workload.id.namespace.as_str()),
            dst.identity = dst.identity.map(SpiffeId::to_string),
            direction = $record.direction.as_str(),
            bytes_sent = $record.bytes_sent,
            bytes_recv = $record.bytes_received,
            duration = format!("{}ms", $record.duration.as_millis()),
            error = $record.error.map(Reason::as_str),
            "connection complete"
        );
    }};
}

impl AccessRecord<'_> {
    /// Writes the line, if the log takes it.
    pub fn write(&self) {
        if self.error.is_some() {
            write_line!(Level::ERROR, self);
        } else {
            write_line!(Level::INFO, self);
        }
    }
}

/// Writes that a connection was refused before anything but its addresses was known: a failed
/// handshake, say. As with ztunnel at level warn, and with fewer keys. `left_out` is how many like it
/// had no line, so that a flood can't fill the log.
pub fn write_refusal(
    direction: Direction,
    src: SocketAddr,
    dst: SocketAddr,
    reason: Reason,
    left_out: u64,
) {
    tracing::event!(
        target: TARGET,
        Level::WARN,
        src.addr = %src,
        dst.addr = %dst,
        direction = direction.as_str(),
        error = reason.as_str(),
        left_out = (left_out > 0).then_some(left_out),
        "connection failed"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{
        LogFormat,
        fixtures::workload,
        logging::tests::{capture, captured},
    };

    /// The line of a connection from `web`, to `voting` through the mesh or to a stranger.
    fn log_one(format: LogFormat, filter: &str, error: Option<Reason>, meshed: bool) -> String {
        let (web, voting) = (workload("web"), workload("voting"));
        captured(format, filter, || {
            AccessRecord {
                direction: Direction::Outbound,
                src: Party {
                    address: "10.1.0.2:40000".parse().unwrap(),
                    workload: Some(&web),
                    identity: meshed.then_some(&web.identity),
                },
                dst: Party {
                    address: "10.1.1.3:15008".parse().unwrap(),
                    workload: meshed.then_some(&voting),
                    identity: meshed.then_some(&voting.identity),
                },
                hbone_address: meshed.then(|| "10.1.1.3:8080".parse().unwrap()),
                service: meshed.then_some("voting.emojivoto.svc.cluster.local"),
                bytes_sent: 10,
                bytes_received: 200,
                duration: Duration::from_millis(12),
                error,
            }
            .write();
        })
    }

    #[test]
    fn a_plain_line_has_ztunnels_keys_in_its_order() {
        let line = log_one(LogFormat::Text, "info", None, true);
        let (_time, rest) = line.split_once('\t').unwrap();
        assert_eq!(
            rest,
            "info\taccess\tconnection complete\tsrc.addr=10.1.0.2:40000 src.workload=\"web\" \
             src.namespace=\"emojivoto\" \
             src.identity=\"spiffe://cluster.local/ns/emojivoto/sa/web\" \
             dst.addr=10.1.1.3:15008 dst.hbone_addr=10.1.1.3:8080 \
             dst.service=\"voting.emojivoto.svc.cluster.local\" dst.workload=\"voting\" \
             dst.namespace=\"emojivoto\" \
             dst.identity=\"spiffe://cluster.local/ns/emojivoto/sa/voting\" \
             direction=\"outbound\" bytes_sent=10 bytes_recv=200 duration=\"12ms\"\n"
        );
    }

    #[test]
    fn a_json_line_has_the_same_keys_after_level_time_and_scope() {
        let line = log_one(
            LogFormat::Json,
            "info",
            Some(Reason::IdentityMismatch),
            true,
        );
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        let time = parsed["time"].as_str().unwrap();
        assert_eq!(
            line,
            format!(
                "{{\"level\":\"error\",\"time\":\"{time}\",\"scope\":\"access\",\
                 \"message\":\"connection complete\",\"src.addr\":\"10.1.0.2:40000\",\
                 \"src.workload\":\"web\",\"src.namespace\":\"emojivoto\",\
                 \"src.identity\":\"spiffe://cluster.local/ns/emojivoto/sa/web\",\
                 \"dst.addr\":\"10.1.1.3:15008\",\"dst.hbone_addr\":\"10.1.1.3:8080\",\
                 \"dst.service\":\"voting.emojivoto.svc.cluster.local\",\
                 \"dst.workload\":\"voting\",\"dst.namespace\":\"emojivoto\",\
                 \"dst.identity\":\"spiffe://cluster.local/ns/emojivoto/sa/voting\",\
                 \"direction\":\"outbound\",\"bytes_sent\":10,\"bytes_recv\":200,\
                 \"duration\":\"12ms\",\"error\":\"identity_mismatch\"}}\n"
            )
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let line = log_one(LogFormat::Text, "info", Some(Reason::ConnectRefused), false);
        let (_time, rest) = line.split_once('\t').unwrap();
        assert_eq!(
            rest,
            "error\taccess\tconnection complete\tsrc.addr=10.1.0.2:40000 src.workload=\"web\" \
             src.namespace=\"emojivoto\" dst.addr=10.1.1.3:15008 direction=\"outbound\" \
             bytes_sent=10 bytes_recv=200 duration=\"12ms\" error=\"connect_refused\"\n"
        );
    }

    #[test]
    fn an_early_refusal_says_who_and_why_and_how_many_like_it_have_no_line() {
        for (left_out, said) in [(0, ""), (999, " left_out=999")] {
            let line = captured(LogFormat::Text, "info", || {
                let (src, dst) = ("10.1.0.2:40000", "10.1.1.3:15008");
                let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
                let reason = Reason::UntrustedCertificate;
                write_refusal(Direction::Inbound, src, dst, reason, left_out);
            });
            let (_time, rest) = line.split_once('\t').unwrap();
            assert_eq!(
                rest,
                format!(
                    "warn\taccess\tconnection failed\tsrc.addr=10.1.0.2:40000 \
                     dst.addr=10.1.1.3:15008 direction=\"inbound\" \
                     error=\"untrusted_certificate\"{said}\n"
                )
            );
        }
    }

    #[test]
    fn the_filter_turns_the_access_log_off_and_leaves_other_logs() {
        let off = log_one(LogFormat::Text, "info,access=off", None, true);
        assert_eq!(off, "");
        let other = captured(LogFormat::Text, "info,access=off", || {
            tracing::info!("still here");
        });
        assert!(other.ends_with("\tstill here\n"), "{other}");
    }

    #[test]
    fn a_line_that_is_off_costs_next_to_nothing() {
        let web = workload("web");
        let party = Party {
            address: "10.1.0.2:40000".parse().unwrap(),
            workload: Some(&web),
            identity: Some(&web.identity),
        };
        let record = AccessRecord {
            direction: Direction::Inbound,
            src: party,
            dst: party,
            hbone_address: None,
            service: None,
            bytes_sent: 1,
            bytes_received: 1,
            duration: Duration::ZERO,
            error: None,
        };
        for (filter, rounds) in [("info,access=off", 1_000_000_u32), ("info", 10_000)] {
            let (_lines, subscriber) = capture(LogFormat::Text, filter);
            tracing::subscriber::with_default(subscriber, || {
                let begun = std::time::Instant::now();
                for _ in 0..rounds {
                    std::hint::black_box(&record).write();
                }
                println!("a line with {filter}: {:?}", begun.elapsed() / rounds);
            });
        }
    }
}
