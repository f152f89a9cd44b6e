//! What somebody breaks in a pod by hand is seen, told and put right: DESIGN §8.2's promise that
//! the kernel's truth is compared with what the agent believes.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{fs, path::PathBuf, time::Duration};

use malla_testbed::{
    Capture, Fate, Node, PORT, Pod, PodSpec, SECRET, Scene, Testbed, eventually, say,
};

/// Five times the interval of the audit.
const HEALED: Duration = Duration::from_secs(25);
/// Five times what is told at once may take.
const AT_ONCE: Duration = Duration::from_millis(2500);

/// What the pins of a pod's programs end with.
const HOOKS: [&str; 4] = ["_egress", "_ingress", "_loopback", "lookup"];

/// A client whose settings include opt-outs, and a strict server.
struct Broken {
    scene: Scene,
}

impl Broken {
    fn new() -> Self {
        let scene = Scene::new("skipOutboundPorts: [3306]", "mtls: strict").unwrap();
        let broken = Self { scene };
        broken.meshed();
        broken.wait_for_links();
        broken
    }

    /// A new pod has filters, until links take their place.
    fn wait_for_links(&self) {
        let is_link = |hook: &str| !PathBuf::from(self.pin(hook)).is_symlink();
        let linked = || HOOKS.into_iter().all(is_link);
        eventually("links to be there", HEALED, linked).unwrap();
    }

    fn differences(&self, kind: &str, outcome: &str) -> f64 {
        let metrics = self.scene.metrics(&self.scene.a).unwrap();
        let labels = [("kind", kind), ("outcome", outcome)];
        metrics.sum("malla_audit_differences_total", &labels)
    }

    /// A new connection of each family goes encrypted: a strict server takes no other.
    fn meshed(&self) {
        for to in self.scene.server.addresses() {
            let fate = self.scene.client.caller().call((*to, PORT));
            assert_eq!(fate, Fate::Echoed, "{to}");
        }
    }

    /// Breaks something, and waits until the agent has told of it and put it right.
    fn heals(&self, kind: &str, limit: Duration, break_it: impl FnOnce()) {
        let before = self.differences(kind, "healed");
        break_it();
        eventually(&format!("a healed {kind}"), limit, || {
            self.differences(kind, "healed") > before
        })
        .unwrap();
        let agent = self.scene.bed.agent(&self.scene.a).process();
        let told = format!("put it right\tworkload=default/client kind=\"{kind}\"");
        agent.wait_for_log(&told, HEALED).unwrap();
        let audit = self.scene.a.config().unwrap()["audit"].clone();
        let recent = audit["recent"].as_array().unwrap();
        let is_told =
            |found: &serde_json::Value| found["kind"] == kind && found["failure"].is_null();
        assert!(recent.iter().any(is_told), "{audit}");
        self.meshed();
    }

    fn client(&self) -> &Pod {
        &self.scene.client
    }

    fn run(&self, line: &str) {
        self.client().run(line.split_whitespace()).unwrap();
    }

    /// The folder of the client's pins.
    fn pins(&self) -> PathBuf {
        let pod = self.scene.a.bpffs().join("links/default/client");
        let mut folders = fs::read_dir(pod).unwrap();
        folders.next().unwrap().unwrap().path()
    }

    fn pin(&self, ending: &str) -> String {
        let mut pins = fs::read_dir(self.pins()).unwrap().flatten();
        let named = |pin: &fs::DirEntry| pin.file_name().to_string_lossy().ends_with(ending);
        let pin = pins.find(named).unwrap().path();
        pin.to_str().unwrap().to_owned()
    }

    fn map(&self, arguments: &str) {
        let mut words = arguments.split_whitespace();
        let (operation, name) = (words.next().unwrap(), words.next().unwrap());
        let path = self.scene.a.pinned_map(name);
        let mut command = vec![
            "bpftool",
            "map",
            operation,
            "pinned",
            path.to_str().unwrap(),
        ];
        command.extend(words);
        self.scene.a.run(command).unwrap();
    }
}

#[test]
fn rules_routes_and_a_sysctl_that_are_taken_away_come_back() {
    let broken = Broken::new();
    for family in ["-4", "-6"] {
        broken.heals("rule", AT_ONCE, || {
            broken.run(&format!("ip {family} rule del priority 133"));
        });
        broken.heals("route", AT_ONCE, || {
            broken.run(&format!("ip {family} route flush table 133"));
        });
    }
    broken.heals("loopback", AT_ONCE, || broken.run("ip link set lo down"));
    broken.heals("loopback", HEALED, || {
        broken.run("sysctl -w net.ipv4.conf.lo.accept_local=0");
    });
}

/// One interface's route once took the place of the other's, and the audit put them back in turn.
#[test]
fn each_of_two_interfaces_has_its_route_and_nothing_is_mended() {
    let mut bed = Testbed::new("interfaces").unwrap();
    let node = bed.node("a").unwrap();
    let pod = PodSpec::new("two").second_interface();
    let pod = bed.pod(&node, pod).unwrap();
    bed.start_agents().unwrap();
    let routes = || {
        let list = ["ip", "-6", "route", "show", "table", "133"];
        pod.run(list).unwrap().stdout
    };
    eventually("a link-local route of each interface", HEALED, || {
        let routes = routes();
        let of = |name: &str| {
            let mut lines = routes.lines();
            lines.any(|line| line.contains("fe80::/10") && line.contains(&format!("dev {name} ")))
        };
        of("eth0") && of("eth1")
    })
    .unwrap_or_else(|error| panic!("{error}:\n{}", routes()));
    let audited = || {
        let audit = node.config().unwrap()["audit"].clone();
        (audit["lastWhole"].to_string(), audit["recent"].to_string())
    };
    let (first, _) = audited();
    eventually("another audit", HEALED, || audited().0 != first).unwrap();
    assert!(!audited().1.contains("link-local"), "{}", audited().1);
}

#[test]
fn programs_that_are_detached_or_pushed_aside_are_first_again() {
    let broken = Broken::new();
    for hook in HOOKS {
        broken.heals("program", HEALED, || {
            let pin = broken.pin(hook);
            let detach = ["bpftool", "link", "detach", "pinned", &pin];
            broken.client().run(detach).unwrap();
        });
        if hook == "_egress" {
            // It hangs on a filter, until a link takes its place again.
            broken.heals("program", AT_ONCE, || {
                broken.run("tc filter del dev eth0 egress");
            });
        }
    }
    broken.wait_for_links();
    // A program that passes all it sees, in front of the agent's.
    broken.heals("program", HEALED, || {
        put_first(broken.client(), &broken.pin("_loopback"));
    });
}

/// Attaches a copy of the program that a link has, before all others at the egress of eth0.
fn put_first(pod: &Pod, link: &str) {
    // bpftool attaches at the end; BPF_F_BEFORE without a neighbour is the front.
    const ATTACH: &str = "import ctypes, socket, struct, sys\n\
        libc = ctypes.CDLL(None, use_errno=True)\n\
        def bpf(command, attributes):\n\
        \x20   memory = ctypes.create_string_buffer(attributes, len(attributes))\n\
        \x20   answer = libc.syscall(321, command, memory, len(attributes))\n\
        \x20   assert answer >= 0, ctypes.get_errno()\n\
        \x20   return answer\n\
        program = bpf(13, struct.pack('III', int(sys.argv[1]), 0, 0))\n\
        index = socket.if_nametoindex('eth0')\n\
        bpf(8, struct.pack('IIIIIIQ', index, program, 47, 1 << 3, 0, 0, 0))\n";
    let shown = pod
        .run(["bpftool", "-j", "link", "show", "pinned", link])
        .unwrap()
        .stdout;
    let (_, id) = shown.split_once("\"prog_id\":").unwrap();
    let id: String = id.chars().take_while(char::is_ascii_digit).collect();
    pod.run(["python3", "-c", ATTACH, &id]).unwrap();
}

#[test]
fn a_pin_that_is_removed_opens_nothing_and_comes_back() {
    let broken = Broken::new();
    let wire = Capture::start(broken.client().netns(), "eth0").unwrap();
    for hook in HOOKS {
        broken.heals("pin", AT_ONCE, || {
            fs::remove_file(broken.pin(hook)).unwrap();
            for to in broken.scene.server.addresses() {
                let caller = broken.client().caller().saying(SECRET);
                assert_eq!(caller.call((*to, PORT)), Fate::Echoed);
            }
        });
        assert!(fs::exists(broken.pin(hook)).unwrap());
    }
    broken.heals("pin", AT_ONCE, || {
        fs::remove_dir_all(broken.pins()).unwrap();
    });
    assert!(!wire.contains(SECRET));
    let node = &broken.scene.a;
    for map in ["PODS", "SOCKETS"] {
        let path = node.pinned_map(map);
        fs::remove_file(&path).unwrap();
        let pinned = || fs::exists(&path).unwrap();
        eventually("the map to be pinned again", AT_ONCE, pinned).unwrap();
    }
    let charge = node.bpffs().join("in_charge");
    fs::remove_file(&charge).unwrap();
    let named = || charge.is_symlink();
    eventually("the agent to be in charge again", AT_ONCE, named).unwrap();
    broken.meshed();
}

#[test]
fn entries_that_are_changed_in_the_maps_are_put_right() {
    let broken = Broken::new();
    let [a, b, c, d] = broken.client().v4().octets();
    let key = format!("key hex 0 0 0 0 0 0 0 0 0 0 ff ff {a:x} {b:x} {c:x} {d:x}");
    broken.heals("entry", HEALED, || {
        broken.map(&format!("delete PODS {key}"));
    });
    broken.heals("entry", HEALED, || {
        let value = "value hex 1 0 0 0 1 0 0 0 0 0 0 0";
        broken.map(&format!("update PODS {key} {value}"));
    });
    // A stranger's entry, and an opt-out of the client's that isn't in its settings.
    broken.map(
        "update PODS key hex fd 0 0 0 0 0 0 0 0 0 0 0 0 0 0 9 value hex f 27 0 0 0 0 0 0 0 0 0 0",
    );
    broken.heals("opt_out", HEALED, || {
        let key = "key hex 40 0 0 0 1 0 0 0 0 0 1f 90";
        broken.map(&format!("update PORT_RULES {key} value hex 1 0 0 0"));
    });
    for role in 0..3 {
        broken.heals("listener", HEALED, || {
            broken.map(&format!("delete LISTENERS key hex 1 0 0 0 {role} 0 0 0"));
        });
    }
    let agent = broken.scene.bed.agent(&broken.scene.a).process();
    agent
        .wait_for_log("entries of a pod 9999 that there isn't", HEALED)
        .unwrap();
    broken.map("update WORKERS key hex 0 0 0 0 value hex 1 0 0 0");
    agent.wait_for_log("WORKERS said 1", HEALED).unwrap();
    broken.meshed();
}

#[test]
fn what_the_kernel_is_to_refuse_of_services_is_put_right() {
    let mut broken = Broken::new();
    let service = "addresses: [10.96.0.10]\nports: [{port: 80}]\nselector: {app: none}";
    broken.scene.bed.service("none", service).unwrap();
    let refused = || broken.client().caller().call(([10, 96, 0, 10], 80)) == Fate::Refused;
    eventually("the Service to be refused", HEALED, refused).unwrap();
    let key = "key hex 0 0 0 0 0 0 0 0 0 0 ff ff a 60 0 a 50 0 0 0";
    broken.map(&format!("delete REFUSALS {key}"));
    let another = "key hex 0 0 0 0 0 0 0 0 0 0 ff ff a 60 0 b 50 0 0 0";
    broken.map(&format!("update REFUSALS {another} value hex 1 0 0 0"));
    let agent = broken.scene.bed.agent(&broken.scene.a).process();
    let told = "1 entries of Services were missing or other ones, 1 stood in their map";
    agent.wait_for_log(told, HEALED).unwrap();
    assert!(refused());
    broken.meshed();
}

/// Shuts the sockets of a process down that listen above port 15000.
fn close_listeners(node: &Node, process: i32) {
    const CLOSE: &str = "import ctypes, os, socket, sys\n\
        libc = ctypes.CDLL(None)\n\
        process = int(sys.argv[1])\n\
        pidfd = os.pidfd_open(process)\n\
        closed = 0\n\
        for fd in os.listdir(f'/proc/{process}/fd'):\n\
        \x20   if os.readlink(f'/proc/{process}/fd/{fd}').startswith('socket:'):\n\
        \x20       own = socket.socket(fileno=libc.syscall(438, pidfd, int(fd), 0))\n\
        \x20       if own.family == socket.AF_INET6 and own.type == socket.SOCK_STREAM \\\n\
        \x20               and own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) \\\n\
        \x20               and own.getsockname()[1] > 15000:\n\
        \x20           own.shutdown(socket.SHUT_RDWR)\n\
        \x20           closed += 1\n\
        assert closed\n";
    node.run(["python3", "-c", CLOSE, &process.to_string()])
        .unwrap();
}

#[test]
fn listeners_that_somebody_closes_are_opened_again_and_what_lives_goes_on() {
    let broken = Broken::new();
    let mut live = broken
        .client()
        .connect((broken.scene.server.v4(), PORT))
        .unwrap();
    broken.heals("listener", HEALED, || {
        let agent = broken.scene.bed.agent(&broken.scene.a).process();
        close_listeners(&broken.scene.a, agent.pid());
    });
    assert_eq!(say(&mut live, b"still here"), Fate::Echoed);
}

#[test]
fn an_address_of_the_workload_that_goes_degrades_the_pod_until_it_is_back() {
    let broken = Broken::new();
    let degraded = || {
        let metrics = broken.scene.metrics(&broken.scene.a).unwrap();
        metrics.sum("malla_pods_degraded", &[("reason", "unhealed")])
    };
    let address = broken.client().v4();
    broken.run(&format!("ip addr add {address}/32 dev lo"));
    broken.run(&format!("ip addr del {address}/16 dev eth0"));
    broken.run(&format!("ip addr del {address}/32 dev lo"));
    eventually("a degraded pod", HEALED, || degraded() > 0.5).unwrap();
    broken.run(&format!("ip addr add {address}/16 dev eth0"));
    eventually("no degraded pod", HEALED, || degraded() < 0.5).unwrap();
}
