use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    model::Settings,
    telemetry::{Metrics, fixtures::workload},
};

fn outbound(remote: Option<&str>, security: Security) -> ConnectionLabels {
    ConnectionLabels {
        direction: Direction::Outbound,
        reporter: Arc::new(workload("web")),
        remote: remote.map(|name| Arc::new(workload(name))),
        service: None,
        target_port: 8080,
        security,
    }
}

fn identity_of(name: &str) -> Arc<SpiffeId> {
    workload(name).identity
}

/// The samples of one family, as lines of the text format.
fn samples(metrics: &Metrics, family: &str) -> Vec<String> {
    let text = metrics.scrape().unwrap();
    let start = format!("{family}{{");
    let lines = text.lines().filter(|line| line.starts_with(&start));
    lines.map(str::to_owned).collect()
}

/// The values of one family, the accepted transport's first where there are both.
fn values(metrics: &Metrics, family: &str) -> Vec<u64> {
    let mut samples = samples(metrics, family);
    samples.sort_by_key(|sample| !sample.contains("peer=\"src\""));
    let value = |sample: &String| sample.rsplit_once(' ').unwrap().1.parse().unwrap();
    samples.iter().map(value).collect()
}

#[test]
fn an_outbound_mesh_connection_reads_as_linkerds() {
    let metrics = Metrics::new();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    let connection = metrics.worker().open(&labels);
    connection.dialled();
    let ends = "dst_namespace=\"emojivoto\",dst_pod=\"voting\",dst_service=\"\",dst_serviceaccount=\"voting\"";
    let source = "src_namespace=\"emojivoto\",src_pod=\"web\",src_serviceaccount=\"web\"";
    assert_eq!(
        samples(&metrics, "tcp_open_total"),
        [
            format!(
                "tcp_open_total{{client_id=\"\",direction=\"outbound\",{ends},\
                 namespace=\"emojivoto\",no_tls_reason=\"\",peer=\"dst\",pod=\"web\",\
                 server_id=\"spiffe://cluster.local/ns/emojivoto/sa/voting\",\
                 serviceaccount=\"web\",{source},target_port=\"8080\",tls=\"true\"}} 1"
            ),
            format!(
                "tcp_open_total{{client_id=\"\",direction=\"outbound\",{ends},\
                 namespace=\"emojivoto\",no_tls_reason=\"loopback\",peer=\"src\",pod=\"web\",\
                 server_id=\"\",serviceaccount=\"web\",{source},target_port=\"8080\",\
                 tls=\"no_identity\"}} 1"
            ),
        ]
    );
}

#[test]
fn inbound_the_accepted_transport_is_the_one_with_the_client() {
    let metrics = Metrics::new();
    let labels = ConnectionLabels {
        direction: Direction::Inbound,
        ..outbound(
            Some("vote-bot"),
            Security::MutualTls(identity_of("vote-bot")),
        )
    };
    let connection = metrics.worker().open(&labels);
    connection.dialled();
    let opened = samples(&metrics, "tcp_open_total");
    let [to_app, from_client] = &opened[..] else {
        panic!("{opened:?}");
    };
    for sample in [to_app, from_client] {
        assert!(sample.contains("src_pod=\"vote-bot\""), "{sample}");
        assert!(sample.contains("dst_pod=\"web\""), "{sample}");
        assert!(sample.contains(",pod=\"web\""), "{sample}");
    }
    assert!(from_client.contains("client_id=\"spiffe://cluster.local/ns/emojivoto/sa/vote-bot\""));
    assert!(from_client.contains("tls=\"true\""), "{from_client}");
    assert!(to_app.contains("client_id=\"\""), "{to_app}");
    assert!(to_app.contains("no_tls_reason=\"loopback\""), "{to_app}");
}

#[test]
fn a_stranger_is_unknown_unless_it_shows_a_certificate() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let reason = NoTls::NotProvidedByServiceDiscovery;
    worker.open(&outbound(None, Security::None(reason))).close();
    let stranger = samples(&metrics, "tcp_open_total").remove(0);
    assert!(
        stranger.contains("dst_namespace=\"unknown\",dst_pod=\"unknown\""),
        "{stranger}"
    );

    let metrics = Metrics::new();
    let identity = identity_of("voting");
    let labels = outbound(None, Security::MutualTls(identity));
    metrics.worker().open(&labels).close();
    let shown = samples(&metrics, "tcp_open_total").remove(0);
    assert!(
        shown.contains("dst_namespace=\"emojivoto\",dst_pod=\"\",dst_service=\"\",dst_serviceaccount=\"voting\""),
        "{shown}"
    );
}

#[test]
fn an_unmeshed_destination_says_why_there_is_no_tls() {
    let metrics = Metrics::new();
    let security = Security::None(NoTls::PortSkipped);
    let connection = metrics.worker().open(&outbound(None, security));
    connection.dialled();
    let open = samples(&metrics, "tcp_open_connections");
    let dst = open.iter().find(|sample| sample.contains("peer=\"dst\""));
    let dst = dst.unwrap();
    assert!(dst.contains("no_tls_reason=\"port_skipped\""), "{dst}");
    assert!(dst.contains("tls=\"no_identity\""), "{dst}");
}

#[test]
fn counters_move_while_a_connection_lives_and_the_gauge_returns_to_zero() {
    let metrics = Metrics::new();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    let connection = metrics.worker().open(&labels);
    assert_eq!(values(&metrics, "tcp_open_connections"), [1]);
    connection.dialled();
    connection.read(Peer::Src, 100);
    connection.wrote(Peer::Dst, 90);
    connection.read(Peer::Dst, 7);
    assert_eq!(values(&metrics, "tcp_open_connections"), [1, 1]);
    assert_eq!(values(&metrics, "tcp_read_bytes_total"), [100, 7]);
    assert_eq!(values(&metrics, "tcp_write_bytes_total"), [0, 90]);
    connection.close();
    assert_eq!(values(&metrics, "tcp_open_connections"), [0, 0]);
    assert_eq!(values(&metrics, "tcp_close_total"), [1, 1]);
    let closed = samples(&metrics, "tcp_close_total").remove(0);
    assert!(closed.contains("errno=\"\""), "{closed}");
    assert!(closed.contains("reason=\"\""), "{closed}");
}

#[test]
fn a_failed_connection_counts_by_reason_and_error_number() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    worker.open(&labels).fail(Reason::ConnectRefused);
    worker.open(&labels).fail(Reason::IdentityMismatch);
    let no_route = io::Error::from_raw_os_error(Errno::EHOSTUNREACH as i32);
    worker
        .open(&labels)
        .fail(Failure::new(Reason::ConnectFailed, &no_route));
    let closed = samples(&metrics, "tcp_close_total").join("\n");
    for (errno, reason) in [
        ("ECONNREFUSED", "connect_refused"),
        ("", "identity_mismatch"),
        ("EHOSTUNREACH", "connect_failed"),
    ] {
        let found = closed.lines().find(|line| line.contains(reason)).unwrap();
        assert!(found.contains(&format!("errno=\"{errno}\"")), "{found}");
        assert!(found.ends_with("} 1"), "{found}");
    }
    assert!(!closed.contains("peer=\"dst\""), "never dialled: {closed}");
    assert_eq!(values(&metrics, "tcp_open_connections"), [0]);
}

#[test]
fn a_dropped_connection_counts_as_closed() {
    let metrics = Metrics::new();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    let connection = metrics.worker().open(&labels);
    connection.dialled();
    drop(connection);
    assert_eq!(values(&metrics, "tcp_open_connections"), [0, 0]);
    let closed = samples(&metrics, "tcp_close_total").join("\n");
    assert_eq!(closed.matches("reason=\"shutdown\"").count(), 2, "{closed}");
}

#[test]
fn workers_and_snapshots_of_discovery_share_the_series_of_a_pod() {
    let metrics = Metrics::new();
    let security = Security::MutualTls(identity_of("voting"));
    let (mut one, mut other) = (metrics.worker(), metrics.worker());
    for worker in [&mut one, &mut other] {
        for _ in 0..2 {
            worker
                .open(&outbound(Some("voting"), security.clone()))
                .close();
        }
    }
    assert_eq!(values(&metrics, "tcp_open_total"), [4]);
}

#[test]
fn what_went_on_to_another_endpoint_counts_as_a_retry_and_as_no_connection() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    worker.retried(&labels, Reason::PeerRefused);
    worker.retried(&labels, Reason::PeerRefused);
    worker.retried(&labels, Reason::ConnectTimeout);
    let mut retries = samples(&metrics, "malla_outbound_tcp_retries_total");
    retries.sort();
    let [timeout, refused] = &retries[..] else {
        panic!("{retries:?}");
    };
    assert!(timeout.contains("reason=\"connect_timeout\"") && timeout.ends_with("} 1"));
    assert!(refused.contains("reason=\"peer_refused\"") && refused.ends_with("} 2"));
    assert!(refused.contains("dst_pod=\"voting\"") && refused.contains(",pod=\"web\""));
    assert!(samples(&metrics, "tcp_open_total").is_empty());
}

#[test]
fn retries_that_stand_still_leave_the_scrape() {
    let transports = Arc::<Transports>::default();
    let mut worker = WorkerMetrics::new(Arc::clone(&transports));
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    worker.retried(&labels, Reason::PeerRefused);
    let begun = Instant::now();
    let at = |minutes: u64| {
        let families = transports.families(begun + Duration::from_mins(minutes));
        let mut families = families.iter();
        let retries = families.find(|family| family.name() == "malla_outbound_tcp_retries_total");
        retries.unwrap().get_metric().len()
    };
    assert_eq!(at(0), 1);
    assert_eq!(at(9), 1);
    assert_eq!(at(11), 1, "the last values are seen once more");
    assert_eq!(at(12), 0);
}

#[test]
fn a_ports_mode_counts_whom_it_lets_in_and_whom_it_refuses() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let strict = Workload {
        settings: Settings {
            mtls: MtlsMode::Strict,
            ..Settings::default()
        },
        ..workload("web")
    };
    let inbound = |reporter, security| ConnectionLabels {
        direction: Direction::Inbound,
        reporter: Arc::new(reporter),
        ..outbound(Some("vote-bot"), security)
    };
    let plain = || Security::None(NoTls::PlaintextClient);
    let meshed = Security::MutualTls(identity_of("vote-bot"));
    worker
        .open(&inbound(strict.clone(), plain()))
        .fail(Reason::PlaintextRefused);
    let living = worker.open(&inbound(strict, meshed));
    living.dialled();
    worker.open(&inbound(workload("web"), plain())).close();
    // Who calls is asked by nobody.
    worker.open(&outbound(Some("voting"), plain())).close();
    let of = |family| {
        let mut samples = samples(&metrics, family);
        samples.sort();
        samples
    };
    let allowed = of("inbound_tcp_authz_allow_total");
    let [authenticated, anybody] = &allowed[..] else {
        panic!("{allowed:?}");
    };
    for (sample, policy, tls) in [
        (authenticated, "all-authenticated", "tls=\"true\""),
        (anybody, "all-unauthenticated", "tls=\"no_identity\""),
    ] {
        assert!(
            sample.contains(&format!("authz_name=\"{policy}\"")),
            "{sample}"
        );
        assert!(
            sample.contains(&format!("srv_name=\"{policy}\"")),
            "{sample}"
        );
        assert!(sample.contains("srv_kind=\"default\",") && sample.contains(tls));
        assert!(sample.ends_with("} 1"), "{sample}");
    }
    let denied = of("inbound_tcp_authz_deny_total");
    let [denied] = &denied[..] else {
        panic!("{denied:?}");
    };
    assert!(denied.contains("srv_name=\"all-authenticated\"") && denied.ends_with("} 1"));
    assert!(denied.contains("src_pod=\"vote-bot\"") && !denied.contains("authz_name"));
}

#[test]
fn an_idle_series_leaves_the_scrape_and_comes_back_with_the_next_connection() {
    let transports = Arc::<Transports>::default();
    let mut worker = WorkerMetrics::new(Arc::clone(&transports));
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    let begun = Instant::now();
    let at = |minutes: u64| {
        let now = begun + Duration::from_secs(60 * minutes);
        transports.families(now)[0].get_metric().len()
    };
    let connection = worker.open(&labels);
    assert_eq!(at(0), 1);
    assert_eq!(at(60), 1, "a connection keeps its series");
    connection.close();
    assert_eq!(at(69), 1);
    assert_eq!(at(71), 1, "the last values are seen once more");
    assert_eq!(at(72), 0);
    worker.open(&labels).close();
    assert_eq!(at(73), 1);
}

#[test]
fn a_port_scan_does_not_grow_the_scrape_without_bound() {
    let transports = Arc::<Transports>::default();
    let mut worker = WorkerMetrics::new(Arc::clone(&transports));
    let security = Security::None(NoTls::NotProvidedByServiceDiscovery);
    let mut labels = outbound(None, security);
    for port in 0..=u16::MAX {
        labels.target_port = port;
        worker.open(&labels).close();
    }
    let another = ConnectionLabels {
        reporter: Arc::new(workload("emoji")),
        target_port: 8080,
        ..labels
    };
    worker.open(&another).close();
    let families = transports.families(Instant::now());
    let opened = families[0].get_metric();
    assert_eq!(opened.len(), series::MAX_OF_ONE + 2);
    let connections: f64 = opened.iter().map(|m| m.get_counter().get_value()).sum();
    assert!((connections - 65_537.0).abs() < 0.5, "{connections}");
    let others = opened.iter().filter(|metric| {
        let mut labels = metric.get_label().iter();
        labels.any(|label| label.value() == "other")
    });
    assert_eq!(others.count(), 1, "another workload's series isn't folded");
}

#[test]
fn many_workloads_do_not_grow_the_scrape_without_bound() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    for number in 0..3000 {
        let labels = ConnectionLabels {
            reporter: Arc::new(workload(&format!("web-{}", number % 100))),
            target_port: number,
            ..outbound(Some("voting"), Security::MutualTls(identity_of("voting")))
        };
        let connection = worker.open(&labels);
        connection.dialled();
        connection.fail(Reason::ServerReset);
    }
    let text = metrics.scrape().unwrap();
    let of_connections = |line: &&str| {
        ["tcp_", "malla_tcp_", "outbound_tcp_"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    let lines = text.lines().filter(of_connections).count();
    // Each of a hundred workloads has a series of its own for what is folded.
    assert!(lines <= series::MAX_LINES + 100 * 12, "{lines}");
    assert!(lines > series::MAX_LINES / 2, "{lines}");
    let opened = samples(&metrics, "tcp_open_total");
    assert!(opened.iter().any(|line| line.contains("dst_pod=\"other\"")));
}

#[test]
fn durations_and_errors_are_the_reporting_workloads() {
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    worker.open(&labels).close();
    worker.open(&labels).fail(Reason::ConnectTimeout);
    worker.open(&labels).fail(Reason::IdentityMismatch);
    let inbound = ConnectionLabels {
        direction: Direction::Inbound,
        ..labels
    };
    worker.open(&inbound).fail(Reason::PlaintextRefused);
    let text = metrics.scrape().unwrap();
    for line in [
        "malla_tcp_connection_duration_seconds_count\
         {direction=\"outbound\",namespace=\"emojivoto\",pod=\"web\"} 3",
        "malla_tcp_connection_duration_seconds_bucket\
         {direction=\"inbound\",namespace=\"emojivoto\",pod=\"web\",le=\"3600\"} 1",
        "outbound_tcp_errors_total{error=\"i/o\",namespace=\"emojivoto\",pod=\"web\"} 1",
        "outbound_tcp_errors_total\
         {error=\"identity required\",namespace=\"emojivoto\",pod=\"web\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    assert!(!text.contains("inbound_tcp_errors_total"), "{text}");
}

#[test]
fn a_remembered_connection_is_cheap() {
    const ROUNDS: u32 = 100_000;
    let metrics = Metrics::new();
    let mut worker = metrics.worker();
    let labels = outbound(Some("voting"), Security::MutualTls(identity_of("voting")));
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        let connection = worker.open(black_box(&labels));
        connection.dialled();
        connection.close();
    }
    println!("open, dial and close: {:?}", begun.elapsed() / ROUNDS);
    let connection = worker.open(&labels);
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        connection.read(black_box(Peer::Src), black_box(1));
    }
    println!("count bytes: {:?}", begun.elapsed() / ROUNDS);
}
