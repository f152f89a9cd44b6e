//! Links take the place of the filters that a new pod has first, and nobody notices. Older kernels have
//! none, and filters stay.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use malla_testbed::{Caller, Fate, PORT, Pod, Scene, eventually, kernel};

const LIMIT: Duration = Duration::from_secs(15);
const CALLERS: usize = 16;
/// Calls after the last filter is gone, for what may come with that.
const MORE: usize = 500;

fn has_filters(pod: &Pod) -> bool {
    ["ingress", "egress"].iter().any(|hook| {
        let show = ["tc", "filter", "show", "dev", "eth0", *hook];
        pod.run(show).unwrap().stdout.contains("direct-action")
    })
}

/// Packets of the pod that its interface has lost.
fn lost(pod: &Pod) -> String {
    let shown = pod.run(["ip", "-j", "-s", "link", "show", "eth0"]);
    let shown = shown.unwrap().stdout;
    let (_, sent) = shown.split_once("\"tx\":{").unwrap();
    let (_, lost) = sent.split_once("\"dropped\":").unwrap();
    lost.split(',').next().unwrap().to_owned()
}

#[test]
fn no_packet_is_lost_when_links_take_the_place_of_filters() {
    let scene = Scene::new("", "").unwrap();
    let pods = [&scene.client, &scene.server];
    let takes_links = kernel::release() >= kernel::LINKS;
    let lost_before = pods.map(|pod| lost(pod));
    assert!(pods.iter().all(|pod| has_filters(pod)));
    let to = (scene.server.v4(), PORT);
    let (calls, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    // From the node in plaintext: then the answers are the pod's own packets.
    let callers = [scene.client.caller(), Caller::new(scene.a.netns())];
    thread::scope(|scope| {
        for caller in callers.iter().cycle().take(CALLERS) {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(caller.call(to), Fate::Echoed);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let replaced = || !pods.iter().any(|pod| has_filters(pod));
        let replaced = if takes_links {
            eventually("links", LIMIT, replaced)
        } else {
            Ok(())
        };
        let before = calls.load(Ordering::Relaxed);
        let more = || calls.load(Ordering::Relaxed) > before + MORE;
        let more = eventually("more calls", LIMIT, more);
        done.store(true, Ordering::Relaxed);
        replaced.and(more).unwrap();
    });
    assert_eq!(pods.map(|pod| lost(pod)), lost_before);
    assert_eq!(pods.map(|pod| has_filters(pod)), [!takes_links; 2]);
}
