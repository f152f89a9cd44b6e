use std::time::Duration;

use super::*;
use crate::telemetry::{Unit, Verdict};

/// Whether the scrape has this line.
fn has(metrics: &Metrics, line: &str) -> bool {
    let text = metrics.scrape().unwrap();
    text.lines().any(|found| found == line)
}

#[test]
fn an_agent_that_did_nothing_yet_can_be_scraped() {
    let metrics = Metrics::new();
    assert!(has(&metrics, "malla_pods_enrolled 0"));
    let text = metrics.scrape().unwrap();
    assert!(text.contains("malla_build_info{profile="), "{text}");
    assert!(text.contains("# TYPE process_open_fds gauge\n"), "{text}");
    assert!(!text.contains("expiration_timestamp"), "{text}");
}

#[test]
fn the_kernels_counters_are_read_at_each_scrape() {
    let metrics = Metrics::new();
    let count = |unit, direction, verdict, reason, value| KernelCount {
        unit,
        direction,
        verdict,
        reason,
        value,
    };
    let reads = std::sync::atomic::AtomicU64::new(0);
    metrics.set_kernel_counters(Box::new(move || {
        let value = reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        vec![
            count(
                Unit::Syns,
                Direction::Outbound,
                Verdict::Steered,
                Reason::Meshed,
                value,
            ),
            count(
                Unit::Packets,
                Direction::Inbound,
                Verdict::Dropped,
                Reason::Unparsable,
                7,
            ),
        ]
    }));
    let steered = "malla_steering_syns_total\
                   {direction=\"outbound\",reason=\"meshed\",verdict=\"steered\"}";
    assert!(has(&metrics, &format!("{steered} 0")));
    assert!(has(&metrics, &format!("{steered} 1")));
    assert!(has(
        &metrics,
        "malla_steering_packets_total\
         {direction=\"inbound\",reason=\"unparsable\",verdict=\"dropped\"} 7"
    ));
}

#[test]
fn handshakes_count_by_the_word_of_their_reason() {
    let metrics = Metrics::new();
    metrics.handshake(Direction::Inbound, Ok(()));
    metrics.handshake(Direction::Outbound, Err(Reason::UntrustedCertificate));
    for line in [
        "malla_handshakes_total{direction=\"inbound\",result=\"ok\"} 1",
        "malla_handshakes_total{direction=\"outbound\",result=\"untrusted_certificate\"} 1",
    ] {
        assert!(has(&metrics, line), "{line}");
    }
}

#[test]
fn a_tunnel_is_open_until_it_is_dropped() {
    let metrics = Metrics::new();
    let tunnel = metrics.tunnel_opened(Direction::Outbound);
    assert!(has(
        &metrics,
        "malla_tunnels_open{direction=\"outbound\"} 1"
    ));
    drop(tunnel);
    assert!(has(
        &metrics,
        "malla_tunnels_open{direction=\"outbound\"} 0"
    ));
    assert!(has(
        &metrics,
        "malla_tunnels_total{direction=\"outbound\"} 1"
    ));
}

#[test]
fn the_control_side_counts_results() {
    let metrics = Metrics::new();
    metrics.discovery_reload(true);
    metrics.discovery_reload(false);
    metrics.accept_error(Role::Mesh, &io::Error::from(Errno::EMFILE));
    metrics.identity().set_refreshes(1, 0);
    metrics.set_pods_enrolled(3);
    metrics.steering().set_pods_degraded("mesh_port", 2);
    metrics.steering().set_cgroup_left(true);
    metrics.enrolment_error("netns_gone");
    for line in [
        "malla_discovery_reloads_total{result=\"ok\"} 1",
        "malla_discovery_reloads_total{result=\"error\"} 1",
        "malla_accept_errors_total{errno=\"EMFILE\",role=\"mesh\"} 1",
        "control_identity_cert_refreshes_total{result=\"ok\"} 1",
        "malla_pods_enrolled 3",
        "malla_pods_degraded{reason=\"mesh_port\"} 2",
        "malla_agent_cgroup_left 1",
        "malla_enrolment_errors_total{reason=\"netns_gone\"} 1",
    ] {
        assert!(has(&metrics, line), "{line}");
    }
}

#[test]
fn the_expiration_is_absent_while_there_is_no_certificate() {
    let metrics = Metrics::new();
    let name = "control_identity_cert_expiration_timestamp_seconds";
    metrics
        .identity()
        .set_expiration(Some(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000)));
    assert!(has(&metrics, &format!("{name} 1000000")));
    metrics.identity().set_expiration(None);
    assert!(!metrics.scrape().unwrap().contains(name));
}
