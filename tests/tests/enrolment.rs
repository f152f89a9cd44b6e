//! How fast pods come under the agent's care, and that agents and pods that come and go leave
//! nothing. Limits of time are five times what the agent promises.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::time::{Duration, Instant};

use malla_testbed::{Crowd, End, Fate, Testbed, eventually};

const LIMIT: Duration = Duration::from_secs(20);
const MANY: usize = 200;

fn crowd(pods: usize) -> Crowd {
    Crowd::new(Testbed::new("crowd").unwrap(), pods).unwrap()
}

fn enrolled(crowd: &Crowd) -> f64 {
    let metrics = crowd.agent().metrics().unwrap();
    assert!(metrics.sum("malla_enrolment_errors_total", &[]) < 0.5);
    metrics.sum("malla_pods_enrolled", &[])
}

/// That so many pods are enrolled, and no enrolment has failed.
fn assert_enrolled(crowd: &Crowd, pods: usize) {
    assert_eq!(enrolled(crowd).to_string(), pods.to_string());
}

/// Waits until links stand in the place of all filters, and nothing changes any more by itself.
fn wait_settled(crowd: &Crowd) {
    eventually("links in the place of filters", LIMIT, || {
        crowd.pods.iter().all(|pod| pod.has_no_filters().unwrap())
    })
    .unwrap();
}

#[test]
fn two_hundred_pods_are_served_at_the_start_and_after_a_restart() {
    let mut crowd = crowd(MANY);
    let took = crowd.start().unwrap();
    assert!(took < 5 * Duration::from_secs(3), "{took:?}");
    assert_enrolled(&crowd, MANY);
    for end in [End::Kill, End::Stop] {
        let took = crowd.restart(end).unwrap();
        assert!(took < 5 * Duration::from_secs(1), "{end:?}: {took:?}");
        assert_enrolled(&crowd, MANY);
    }
}

#[test]
fn a_pod_that_joins_is_steered_at_once() {
    let mut crowd = crowd(1);
    crowd.start().unwrap();
    let mut times = crowd.enrol_one_by_one(21).unwrap();
    times.sort_by_key(|enrolled| enrolled.from_outside);
    let median = times[10].from_outside;
    assert!(median < 5 * Duration::from_millis(20), "{times:?}");
    assert_enrolled(&crowd, 22);
}

/// Lets pods come and go, which must be enrolled each, and leave nothing.
fn come_and_go(rate: usize, time: Duration) {
    let mut crowd = crowd(2);
    crowd.start().unwrap();
    wait_settled(&crowd);
    let before = crowd.node.bpf_objects().unwrap();
    let (took, pods) = crowd.come_and_go(rate, time).unwrap();
    assert!(took < 5 * time, "{pods} pods took {took:?}");
    eventually("each to be told of once", LIMIT, || {
        crowd.agent().log().matches("\tenrolled\t").count() == pods + 2
    })
    .unwrap();
    eventually("nothing of them to be left", LIMIT, || {
        enrolled(&crowd) < 2.5 && crowd.node.bpf_objects().unwrap() == before
    })
    .unwrap();
    for pod in &crowd.pods {
        assert_eq!(crowd.call(pod), Fate::Echoed);
    }
}

#[test]
fn pods_that_come_and_go_are_all_enrolled_and_leave_nothing() {
    come_and_go(20, Duration::from_secs(10));
}

#[test]
#[ignore = "long: 50 pods a second for a minute"]
fn fifty_pods_a_second_come_and_go_for_a_minute() {
    come_and_go(50, Duration::from_mins(1));
}

#[test]
fn twenty_restarts_with_changes_between_leave_as_much_as_there_was() {
    let mut crowd = crowd(4);
    crowd.start().unwrap();
    wait_settled(&crowd);
    let before = crowd.node.bpf_objects().unwrap();
    for turn in 0..20 {
        // Pods and settings change while an agent lives, and while none does.
        let changes_first = turn % 4 < 2;
        let change = |crowd: &mut Crowd| {
            let skipped = format!("skipOutboundPorts: [{}]", 3000 + turn);
            crowd.bed.change_mesh_settings(skipped).unwrap();
            let gone = crowd.pods.remove(0);
            crowd.bed.remove_pod(&gone).unwrap();
            let come = crowd.come(1).unwrap();
            crowd.pods.extend(come);
        };
        if changes_first {
            change(&mut crowd);
        }
        if turn % 2 == 0 {
            crowd.agent().kill9();
        } else {
            crowd.agent().stop().unwrap();
        }
        if !changes_first {
            change(&mut crowd);
        }
        let took = crowd.start().unwrap();
        assert!(took < 5 * Duration::from_secs(5), "turn {turn}: {took:?}");
        assert_enrolled(&crowd, crowd.pods.len());
        for pod in &crowd.pods {
            assert_eq!(crowd.call(pod), Fate::Echoed, "turn {turn}: {}", pod.name());
        }
    }
    wait_settled(&crowd);
    let began = Instant::now();
    let mut after = crowd.node.bpf_objects().unwrap();
    while after != before && began.elapsed() < LIMIT {
        after = crowd.node.bpf_objects().unwrap();
    }
    assert_eq!(after, before);
    let cgroups = std::fs::read_dir(crowd.node.cgroup()).unwrap().flatten();
    let agents = cgroups.filter(|cgroup| {
        let name = cgroup.file_name();
        name.to_string_lossy().starts_with("malla-agent-")
    });
    assert_eq!(agents.count(), 1);
    let records = std::fs::read_dir(crowd.node.bpffs().join("links/default")).unwrap();
    assert_eq!(records.count(), crowd.pods.len());
}
