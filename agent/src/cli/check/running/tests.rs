use super::*;
use crate::cli::check::Outcome;

const NOW: &str = "2026-06-01T00:00:00Z";

fn now() -> SystemTime {
    time(NOW).unwrap()
}

fn config(json: serde_json::Value) -> Config {
    serde_json::from_value(json).unwrap()
}

/// The checks that don't hold, each with its reason and whether it is an error.
fn faults(checks: &[Check]) -> Vec<(&str, bool)> {
    checks
        .iter()
        .filter_map(|check| match &check.outcome {
            Outcome::Success => None,
            Outcome::Warning(fault) => Some((fault.reason.as_str(), false)),
            Outcome::Error(fault) => Some((fault.reason.as_str(), true)),
        })
        .collect()
}

#[test]
fn each_degraded_refused_and_leaving_pod_is_told_with_its_reason() {
    let config = config(serde_json::json!({
        "workloads": [
            {"workload": "default/a"},
            {"workload": "default/b", "degraded": [{"reason": "mesh_port", "what": "app has 15008"}]},
            {"workload": "default/c", "leavingWithinSeconds": 12},
        ],
        "refused": [{"workload": "default/d", "why": "no netns"}],
    }));
    let checks = steering(&config);
    assert_eq!(checks[0], Check::good("2 pods are steered"));
    assert_eq!(
        faults(&checks),
        [
            ("degraded, mesh_port: app has 15008", true),
            ("it is leaving: what is open has 12 s more", false),
            ("no netns", true),
        ]
    );
}

#[test]
fn anchors_and_issuers_are_told_of_sixty_days_before_their_end() {
    let part = |object: &str, begins: &str, expires: &str| {
        serde_json::json!({"object": object, "subject": "CN=x", "path": "/x",
            "begins": begins, "expires": expires})
    };
    let (before, soon) = ("2026-01-01T00:00:00Z", "2026-07-30T00:00:00Z");
    for (part, expected) in [
        (part("issuer", before, "2026-08-01T00:00:00Z"), None),
        (
            part("issuer", before, soon),
            Some(("it ends in 59 days", false)),
        ),
        (
            part("trust_anchor", before, NOW),
            Some(("it ended at 2026-06-01T00:00:00Z", true)),
        ),
        (
            part("issuer", "2026-06-02T00:00:00Z", soon),
            Some((
                "it begins at 2026-06-02T00:00:00Z, which is later than now",
                true,
            )),
        ),
        (part("revocation_list", before, soon), None),
    ] {
        let config = config(serde_json::json!({"certificates": {"authority": [part]}}));
        let checks = identity(&config.certificates, &config, None, now());
        assert_eq!(faults(&checks), Vec::from_iter(expected));
    }
}

#[test]
fn a_workloads_certificate_that_is_late_missing_or_over_is_told() {
    let day = Some(Duration::from_hours(24));
    let id = "spiffe://cluster.local/ns/a/sa/b";
    for (expires, expected) in [
        (Some("2026-06-01T10:00:00Z"), None),
        (
            Some("2026-06-01T04:00:00Z"),
            Some(("it ends in 4 h and isn't renewed yet", false)),
        ),
        (Some(NOW), Some(("it ended at 2026-06-01T00:00:00Z", true))),
        (
            None,
            Some((
                "none could be had for spiffe://cluster.local/ns/a/sa/b",
                true,
            )),
        ),
    ] {
        let certificate = |end| serde_json::json!({"identity": id, "expires": end});
        let config = config(serde_json::json!({
            "workloads": [{"workload": "a/b", "identity": id}],
            "certificates": {"workloads": Vec::from_iter(expires.map(certificate))},
        }));
        let checks = identity(&config.certificates, &config, day, now());
        assert_eq!(faults(&checks), Vec::from_iter(expected));
    }
}

#[test]
fn a_difference_of_the_ledger_is_a_leak_after_ten_seconds() {
    for (seconds, expected) in [(9, None), (10, Some(("orphaned listener of a/b", true)))] {
        let config = config(serde_json::json!({"ledger": {"differences": [
            {"difference": "orphaned", "kind": "listener", "workload": "a/b",
                "forSeconds": seconds},
        ]}}));
        assert_eq!(faults(&[ledger(&config.ledger)]), Vec::from_iter(expected));
    }
}

#[test]
fn what_an_audit_could_not_heal_is_told_and_an_old_audit_too() {
    let config = config(serde_json::json!({"audit": {
        "lastWhole": {"ended": "2026-05-31T23:50:00Z"},
        "unhealed": 1,
        "recent": [
            {"kind": "route", "what": "no route", "failure": null},
            {"kind": "rule", "what": "no rule", "workload": "a/b", "failure": "EPERM"},
        ],
    }}));
    assert_eq!(
        faults(&audit(&config.audit, now())),
        [
            ("it ended 10 min ago", false),
            ("1 differences stand\nrule of a/b: no rule: EPERM", true),
        ]
    );
}

#[test]
fn descriptors_that_run_out_are_told() {
    for (open, holds) in [(79, true), (80, false)] {
        let scrape = format!("process_open_fds {open}\nprocess_max_fds 100\n");
        let check = descriptors(&Metrics::parse(&scrape));
        assert_eq!(check.outcome == Outcome::Success, holds);
    }
}

#[test]
fn who_asks_for_more_acceleration_than_the_kernel_may_do_is_told() {
    let pod = |asked: &str, mode: &str, reason: &str| {
        serde_json::json!({
            "workload": format!("default/{asked}"),
            "settings": {"accelerate": asked},
            "acceleration": {"mode": mode, "reason": reason, "why": "it says why"},
        })
    };
    let checks = acceleration(&config(serde_json::json!({
        "workloads": [
            pod("auto", "off", "default"),
            pod("full", "full", "configured"),
            pod("safe", "off", "blocking_read"),
        ],
        "acceleration": {"verdict": "limited", "limits": ["blocking_read", "splice"]},
    })));
    assert_eq!(checks.len(), 2);
    assert_eq!(
        checks[0].description,
        "is possible on this kernel (limited: blocking_read, splice)"
    );
    assert_eq!(checks[1].description, "default/safe gets `safe`");
    assert!(matches!(&checks[1].outcome, Outcome::Warning(fault) if fault.reason == "it says why"));
    let untried = acceleration(&config(serde_json::json!({})));
    assert!(matches!(untried[0].outcome, Outcome::Success));
}
