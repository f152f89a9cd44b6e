//! Pods that leave the mesh, and pods whose netns goes: what lives is not cut without need, and
//! nothing is left behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    io::{ErrorKind, Read},
    net::TcpStream,
    sync::Arc,
    thread,
    time::Duration,
};

use malla_testbed::{Capture, Fate, PORT, Pod, Process, SECRET, Scene, Testbed, eventually, say};
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(10);
/// Five times what it may take.
const GONE: Duration = Duration::from_secs(5);

fn open(scene: &Scene) -> Vec<TcpStream> {
    let open = |to: &std::net::IpAddr| {
        let mut stream = scene.client.connect((*to, PORT)).unwrap();
        assert_eq!(say(&mut stream, b"before"), Fate::Echoed);
        stream
    };
    scene.server.addresses().iter().map(open).collect()
}

/// Waits until nothing that an agent set up is in a pod.
fn wait_plain(pod: &Pod) {
    eventually("nothing of the agent to be left in the pod", LIMIT, || {
        let says = |command: &[&str]| pod.run(command).unwrap().stdout;
        let rules = says(&["ip", "rule"]) + &says(&["ip", "-6", "rule"]);
        let programs = says(&["bpftool", "net", "show"]);
        !rules.contains("133") && !programs.contains("egress") && !programs.contains("lookup")
    })
    .unwrap();
}

#[test]
fn what_lives_when_a_pod_leaves_goes_on_and_what_is_new_passes() {
    for client_leaves in [true, false] {
        let scene = Scene::new("", "").unwrap();
        let mut live = open(&scene);
        let (leaver, node) = if client_leaves {
            (&scene.client, &scene.a)
        } else {
            (&scene.server, &scene.b)
        };
        scene.bed.withdraw(leaver).unwrap();
        let capture = Capture::start(leaver.netns(), "eth0").unwrap();
        let direction = if client_leaves { "outbound" } else { "inbound" };
        // The other node may know first and dial plainly what this one still carries: plaintext in
        // the pod alone doesn't show that this node lets it pass.
        eventually("new connections to pass", LIMIT, || {
            let caller = scene.client.caller().saying(SECRET);
            caller.call((scene.server.v4(), PORT)) == Fate::Echoed
                && capture.contains(SECRET)
                && scene
                    .metrics(node)
                    .unwrap()
                    .syns(direction, "passed", "withdrawn")
                    >= 1.0
        })
        .unwrap();
        for stream in &mut live {
            assert_eq!(say(stream, b"what goes on stays encrypted"), Fate::Echoed);
        }
        assert!(!capture.contains(b"stays encrypted"));
        drop(live);
        wait_plain(leaver);
    }
}

#[test]
fn what_outlives_the_limit_of_a_withdrawal_is_reset() {
    let mut scene = Scene::new("", "").unwrap();
    scene.bed = scene.bed.with_agent_arguments(["--withdraw-limit", "1s"]);
    for node in [Arc::clone(&scene.a), Arc::clone(&scene.b)] {
        scene.bed.upgrade_agent(&node).unwrap();
    }
    let live = open(&scene);
    scene.bed.withdraw(&scene.client).unwrap();
    for mut stream in live {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    wait_plain(&scene.client);
    let log = scene.bed.agent(&scene.a).process();
    log.wait_for_log("error=\"withdrawn\"", LIMIT).unwrap();
}

/// Waits until a client's new connections reach a server without its agent.
fn wait_passed(scene: &Scene) {
    eventually("new connections to pass", LIMIT, || {
        let fate = scene.client.caller().call((scene.server.v4(), PORT));
        let metrics = scene.metrics(&scene.a).unwrap();
        fate == Fate::Echoed && metrics.syns("outbound", "passed", "withdrawn") >= 1.0
    })
    .unwrap();
}

#[test]
fn what_an_old_agent_carries_goes_on_when_its_pod_leaves_before_or_after_the_upgrade() {
    for leaves_before in [true, false] {
        let mut scene = Scene::new("", "").unwrap();
        let node = Arc::clone(&scene.a);
        let mut live = open(&scene);
        if leaves_before {
            scene.bed.withdraw(&scene.client).unwrap();
            wait_passed(&scene);
        }
        let old = scene.bed.upgrade_agent(&node).unwrap();
        if !leaves_before {
            scene.bed.withdraw(&scene.client).unwrap();
            wait_passed(&scene);
        }
        // The new one looks what it may take away, every two seconds.
        thread::sleep(Duration::from_secs(3));
        for stream in &mut live {
            assert_eq!(say(stream, b"what goes on"), Fate::Echoed);
        }
        drop(live);
        assert!(old.wait_ended(LIMIT).unwrap().success());
        wait_plain(&scene.client);
        assert_eq!(
            scene.client.caller().call((scene.server.v4(), PORT)),
            Fate::Echoed
        );
    }
}

#[test]
fn what_an_old_agent_carries_is_reset_at_its_own_limit_and_never_steered_past_it() {
    // That of the new one is 3 s, and so is that of the old one or a minute.
    for is_reset in [true, false] {
        let mut scene = Scene::new("", "").unwrap();
        let node = Arc::clone(&scene.a);
        let limited = |bed: Testbed| bed.with_agent_arguments(["--withdraw-limit", "3s"]);
        if is_reset {
            scene.bed = limited(scene.bed);
            drop(scene.bed.upgrade_agent(&node).unwrap());
        }
        let mut live = open(&scene);
        if !is_reset {
            scene.bed = limited(scene.bed);
        }
        let old = scene.bed.upgrade_agent(&node).unwrap();
        let wire = Capture::start(scene.client.netns(), "eth0").unwrap();
        scene.bed.withdraw(&scene.client).unwrap();
        for stream in &mut live {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        if !is_reset {
            thread::sleep(Duration::from_secs(5));
        }
        for mut stream in live {
            if is_reset {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                let error = stream.read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            } else {
                assert_eq!(say(&mut stream, SECRET), Fate::Echoed);
            }
        }
        assert!(old.wait_ended(LIMIT).unwrap().success());
        wait_plain(&scene.client);
        assert!(!wire.contains(SECRET), "plaintext on the wire");
    }
}

#[test]
fn a_pod_that_comes_back_keeps_what_an_old_agent_carries_longer_than_the_new_one_would() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.a);
    let mut live = open(&scene);
    scene.bed = scene.bed.with_agent_arguments(["--withdraw-limit", "1s"]);
    let old = scene.bed.upgrade_agent(&node).unwrap();
    scene.bed.withdraw(&scene.client).unwrap();
    wait_passed(&scene);
    thread::sleep(Duration::from_secs(5));
    let wire = Capture::start(scene.client.netns(), "eth0").unwrap();
    let steered = || {
        let metrics = scene.metrics(&scene.a).unwrap();
        metrics.syns("outbound", "steered", "meshed")
    };
    let before = steered();
    scene.bed.write_mesh().unwrap();
    let enrolled = || {
        for stream in &mut live {
            assert_eq!(say(stream, SECRET), Fate::Echoed);
        }
        scene.client.caller().call((scene.server.v4(), PORT)) == Fate::Echoed && steered() > before
    };
    eventually("the pod to be meshed again", LIMIT, enrolled).unwrap();
    for stream in &mut live {
        assert_eq!(say(stream, SECRET), Fate::Echoed);
    }
    assert!(!wire.contains(SECRET), "plaintext on the wire");
    drop(live);
    assert!(old.wait_ended(LIMIT).unwrap().success());
}

#[test]
fn a_pod_that_leaves_while_its_agent_ends_passes_by_the_next_ones_start() {
    let mut scene = Scene::new("", "").unwrap();
    let node = Arc::clone(&scene.a);
    let mut live = open(&scene);
    let ending = scene.bed.agent(&node).process();
    ending.signal(Signal::SIGTERM).unwrap();
    ending.wait_for_log("draining", LIMIT).unwrap();
    scene.bed.withdraw(&scene.client).unwrap();
    let old = scene.bed.upgrade_agent(&node).unwrap();
    wait_passed(&scene);
    thread::sleep(Duration::from_secs(1));
    for stream in &mut live {
        assert_eq!(say(stream, b"what goes on"), Fate::Echoed);
    }
    drop(live);
    assert!(old.wait_ended(LIMIT).unwrap().success());
    wait_plain(&scene.client);
}

/// Lets the threads that carry connections have what nobody else wants of their processor, and
/// somebody want it all.
fn starve_workers(scene: &Scene) -> Process {
    let pid = scene.bed.agent(&scene.a).process().pid();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap();
        let name = fs::read_to_string(task.path().join("comm")).unwrap();
        if name.starts_with("worker-") {
            let thread = task.file_name().into_string().unwrap();
            let idle = ["chrt", "--idle", "--pid", "0", &*thread];
            scene.a.run(idle).unwrap();
        }
    }
    let hog = ["sh", "-c", "while :; do :; done"];
    scene.a.command(hog).on_cpu(0).spawn().unwrap()
}

#[test]
fn steering_goes_only_when_the_last_connection_was_reset() {
    let mut scene = Scene::new("", "").unwrap();
    let arguments = ["--withdraw-limit", "1s"];
    scene.bed = scene.bed.with_agent_arguments(arguments);
    scene.bed = scene.bed.with_agents_on_cpu(0);
    let node = Arc::clone(&scene.a);
    scene.bed.upgrade_agent(&node).unwrap();
    let live: Vec<_> = (0..10).flat_map(|_| open(&scene)).collect();
    let _hog = starve_workers(&scene);
    scene.bed.withdraw(&scene.client).unwrap();
    wait_plain(&scene.client);
    for mut stream in live {
        stream.set_nonblocking(true).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_pod_that_comes_back_during_its_withdrawal_keeps_its_connections() {
    let scene = Scene::new("", "").unwrap();
    let mut live = open(&scene);
    let agent = scene.bed.agent(&scene.a);
    scene.bed.withdraw(&scene.client).unwrap();
    agent
        .process()
        .wait_for_log("leaves the mesh", LIMIT)
        .unwrap();
    scene.bed.write_mesh().unwrap();
    agent
        .process()
        .wait_for_log("enrolled again", LIMIT)
        .unwrap();
    for stream in &mut live {
        assert_eq!(say(stream, b"after"), Fate::Echoed);
    }
    let capture = Capture::start(scene.client.netns(), "eth0").unwrap();
    let caller = scene.client.caller().saying(SECRET);
    assert_eq!(caller.call((scene.server.v4(), PORT)), Fate::Echoed);
    assert!(!capture.contains(SECRET));
}

#[test]
fn of_a_pod_that_is_gone_nothing_is_held() {
    let scene = Scene::new("", "").unwrap();
    let live: Vec<_> = (0..10).flat_map(|_| open(&scene)).collect();
    let Scene {
        mut bed,
        b,
        server,
        app,
        client: _client,
        ..
    } = scene;
    let links = ["ip", "-o", "link", "show", "type", "veth"];
    let links = || b.run(links).unwrap().stdout.lines().count();
    let before = links();
    // What this test holds of the pod goes first; what an agent holds would keep the netns, and
    // with it the host's end of the pod's link.
    drop(app);
    bed.remove_pod(&server).unwrap();
    drop(server);
    eventually("the host's end of the link to be gone", GONE, || {
        links() < before
    })
    .unwrap();
    for mut stream in live {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let read = stream.read(&mut [0]);
        assert!(!read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    }
}
