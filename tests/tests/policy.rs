//! Who a pod lets in on which port, and where its app may go.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{sync::Arc, time::Duration};

use malla_testbed::{EchoApp, Fate, Node, PORT, Pod, PodSpec, Testbed, eventually};

const PORTS: [u16; 3] = [80, 81, 82];
/// A change takes effect within 100 ms; a busy machine gets five times that.
const LIVE: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(10);

/// Two meshed pods and an unmeshed one, each on another node than the one that it calls.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    _apps: Vec<EchoApp>,
}

impl Scene {
    fn new(client_settings: &str, namespace_settings: &str) -> Self {
        let mut bed = Testbed::new("policy").unwrap();
        if !namespace_settings.is_empty() {
            bed = bed.with_namespace("default", namespace_settings);
        }
        let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let client = PodSpec::new("client").settings(client_settings);
        let client = bed.pod(&a, client).unwrap();
        let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
        let stranger = bed.pod(&b, PodSpec::new("stranger").unlisted()).unwrap();
        let mut apps = vec![server.echo(PORT).unwrap(), stranger.echo(PORT).unwrap()];
        apps.extend(PORTS.map(|port| server.echo(port).unwrap()));
        bed.start_agents().unwrap();
        Self {
            bed,
            a,
            client,
            server,
            stranger,
            _apps: apps,
        }
    }

    /// What the client's agent counted of connections that it carried in plaintext or refused.
    fn refused(&self) -> f64 {
        let metrics = self.bed.agent(&self.a).metrics().unwrap();
        metrics.sum("tcp_close_total", &[("reason", "egress_refused")])
    }
}

fn calls(from: &Pod, to: &Pod, port: u16) -> Vec<Fate> {
    let calls = to.addresses().iter();
    calls
        .map(|address| from.caller().call((*address, port)))
        .collect()
}

fn all(fates: &[Fate], expected: Fate) -> bool {
    fates.iter().all(|fate| *fate == expected)
}

#[test]
fn strict_ports_are_strict_in_every_order_and_the_others_are_not() {
    let scene = Scene::new("", "");
    let entries = [
        "{ports: 80, mode: strict}",
        "{ports: 81, mode: strict}",
        "{ports: 82, mode: permissive}",
    ];
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for wider in ["permissive", "strict"] {
        for order in orders {
            let list = order.map(|place| entries[place]).join(", ");
            let settings = format!("mtls: {wider}\nmtlsByPort: [{list}]");
            let change = scene.bed.change_settings(&scene.server, &settings);
            change.unwrap();
            for (port, expected) in PORTS
                .into_iter()
                .zip([Fate::Reset, Fate::Reset, Fate::Echoed])
            {
                eventually(&format!("{settings}: {port}"), LIVE, || {
                    all(&calls(&scene.stranger, &scene.server, port), expected)
                })
                .unwrap();
                let meshed = calls(&scene.client, &scene.server, port);
                assert!(all(&meshed, Fate::Echoed), "{port}: {meshed:?}");
            }
            let undeclared = if wider == "strict" {
                Fate::Reset
            } else {
                Fate::Echoed
            };
            // The one port that tells a change of the wider mode from the settings before it.
            eventually(&format!("{settings}: {PORT}"), LIVE, || {
                all(&calls(&scene.stranger, &scene.server, PORT), undeclared)
            })
            .unwrap();
        }
    }
}

#[test]
fn egress_of_the_mesh_only_resets_what_would_leave_in_plaintext() {
    let scene = Scene::new("egress: mesh-only", "");
    let plain = calls(&scene.client, &scene.stranger, PORT);
    assert!(all(&plain, Fate::Reset), "{plain:?}");
    eventually("the refusals to be counted", LIVE, || {
        let counted = scene.refused();
        counted >= 2.0
    })
    .unwrap();
    let log = scene.bed.agent(&scene.a).process();
    log.wait_for_log("error=\"egress_refused\"", LIMIT).unwrap();
    let meshed = calls(&scene.client, &scene.server, PORT);
    assert!(all(&meshed, Fate::Echoed), "{meshed:?}");
}

#[test]
fn allowed_networks_and_opt_outs_stay_open_and_settings_change_live() {
    let scene = Scene::new("", "egress: mesh-only");
    let becomes = |settings: &str, [v4, v6]: [Fate; 2]| {
        scene.bed.change_settings(&scene.client, settings).unwrap();
        eventually(settings, LIVE, || {
            let caller = || scene.client.caller();
            let fates = [
                caller().call((scene.stranger.v4(), PORT)),
                caller().call((scene.stranger.v6(), PORT)),
            ];
            fates == [v4, v6]
        })
        .unwrap();
    };
    let v4 = scene.stranger.v4();
    let (open, reset) = (Fate::Echoed, Fate::Reset);
    becomes("", [reset, reset]);
    let allowed = format!("egressAllowSubnets: [\"{v4}/32\"]");
    becomes(&allowed, [open, reset]);
    let metrics = scene.bed.agent(&scene.a).metrics().unwrap();
    let plain = [
        ("direction", "outbound"),
        ("peer", "dst"),
        ("no_tls_reason", "not_provided_by_service_discovery"),
    ];
    assert!(metrics.sum("tcp_open_total", &plain) >= 1.0);
    becomes(&format!("skipOutboundPorts: [{PORT}]"), [open, open]);
    becomes("egress: any", [open, open]);
    becomes("egress: mesh-only", [reset, reset]);
}
