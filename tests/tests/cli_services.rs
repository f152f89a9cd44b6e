//! What the command line says of Services is where their connections go.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use malla_testbed::{EchoApp, Fate, Node, PORT, Pod, PodSpec, Testbed, eventually};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);
const WEB: &str = "10.96.0.10";

/// A client on node `a`, and two pods with an app, one on each node.
struct Scene {
    bed: Testbed,
    a: Arc<Node>,
    client: Arc<Pod>,
    pods: [Arc<Pod>; 2],
    apps: [EchoApp; 2],
}

impl Scene {
    fn new() -> Self {
        let mut bed = Testbed::new("cli-services").unwrap();
        let nodes = ["a", "b"].map(|name| bed.node(name).unwrap());
        let client = bed.pod(&nodes[0], PodSpec::new("client")).unwrap();
        let pods = [0, 1].map(|place| {
            let spec = PodSpec::new(format!("web-{place}")).port(PORT);
            bed.pod(&nodes[place], spec).unwrap()
        });
        let apps = [0, 1].map(|place| pods[place].echo(PORT).unwrap());
        let [a, _] = nodes;
        Self {
            bed,
            a,
            client,
            pods,
            apps,
        }
    }

    /// The Service `web` over `endpoints`, lines of YAML.
    fn web(&mut self, endpoints: &str) {
        let yaml = format!(
            "addresses: [{WEB}]\nports: [{{port: 80, targetPort: {PORT}}}]\n\
             endpoints: [{endpoints}]"
        );
        self.bed.service("web", yaml).unwrap();
    }

    fn endpoint(&self, place: usize, more: &str) -> String {
        format!("{{addresses: [{}]{more}}}", self.pods[place].v4())
    }

    fn call(&self, port: u16) -> Fate {
        let to: SocketAddr = format!("{WEB}:{port}").parse().unwrap();
        self.client.caller().call(to)
    }

    fn accepted(&self) -> [usize; 2] {
        [self.apps[0].accepted(), self.apps[1].accepted()]
    }

    /// What a table of `malla endpoints` has below its titles, as words.
    fn endpoints(&self, arguments: &[&str]) -> Vec<Vec<String>> {
        let line = [&["endpoints"], arguments].concat();
        let told = self.bed.ask(&self.a, &line).unwrap();
        let mut lines = told.lines().map(|line| {
            let words = line.split_whitespace().map(str::to_owned);
            words.collect::<Vec<_>>()
        });
        let titles = lines.next().unwrap();
        assert_eq!(titles.join(" "), "NAMESPACE IP PORT POD SERVICE STATE");
        lines.collect()
    }
}

#[test]
fn endpoints_shows_where_the_connections_go_and_in_which_state_that_is() {
    let mut scene = Scene::new();
    let (ready, not) = (scene.endpoint(0, ""), scene.endpoint(1, ", ready: false"));
    scene.web(&format!("{ready}, {not}"));
    scene.bed.start_agents().unwrap();
    let [first, second] = [0, 1].map(|place| scene.pods[place].v4().to_string());
    let port = PORT.to_string();
    let row = |ip, pod, state| {
        let words = ["default", ip, &*port, pod, "web", state];
        words.map(str::to_owned).to_vec()
    };
    let rows = scene.endpoints(&[]);
    let expected = [
        row(&first, "web-0", "ready"),
        row(&second, "web-1", "not_ready"),
    ];
    assert_eq!(rows, expected);
    for _ in 0..5 {
        assert_eq!(scene.call(80), Fate::Echoed);
    }
    assert_eq!(scene.accepted(), [5, 0]);

    // It follows, and so do the connections.
    let only = scene.endpoint(1, "");
    scene.web(&only);
    eventually("the other endpoint alone", LIMIT, || {
        scene.endpoints(&["web"]) == [row(&second, "web-1", "ready")]
    })
    .unwrap();
    eventually("a connection to it", LIMIT, || {
        scene.call(80) == Fate::Echoed && scene.accepted()[1] > 0
    })
    .unwrap();

    // Of what is asked for alone.
    let json = scene.bed.ask_json(&scene.a, &["endpoints", "default/web"]);
    let json = json.unwrap();
    let [endpoint] = &json.as_array().unwrap()[..] else {
        panic!("{json:#}");
    };
    assert_eq!(endpoint["ip"], second);
    assert_eq!(endpoint["port"], PORT);
    assert_eq!(endpoint["state"], "ready");
    assert!(scene.endpoints(&["-n", "elsewhere"]).is_empty());
}

/// What the kernel and the agents make of a connection to a Service must be what was foretold.
#[test]
fn explain_foretells_what_becomes_of_a_connection_to_a_service() {
    let mut scene = Scene::new();
    let outside = PodSpec::new("outside").unmeshed();
    let outside = scene.bed.pod(&scene.a, outside).unwrap();
    let _app = outside.echo(PORT).unwrap();
    let stranger = format!("{{addresses: [{}]}}", outside.v4());
    let meshed = scene.endpoint(1, "");
    scene.web(&meshed);
    scene.bed.start_agents().unwrap();
    for (endpoints, settings, port, outcome, reason, rule) in [
        (&*meshed, "", 80, "meshed", None, "service"),
        (
            &*stranger,
            "",
            80,
            "plaintext",
            Some("not_provided_by_service_discovery"),
            "service",
        ),
        (
            &*stranger,
            "egress: mesh-only",
            80,
            "reset",
            Some("egress_refused"),
            "egress",
        ),
        ("", "", 80, "refused", Some("no_endpoint"), "service"),
        (
            &*meshed,
            "",
            81,
            "refused",
            Some("no_service_port"),
            "service",
        ),
    ] {
        scene.web(endpoints);
        let client = Arc::clone(&scene.client);
        scene.bed.change_settings(&client, settings).unwrap();
        let expected = match outcome {
            "reset" => Fate::Reset,
            "refused" => Fate::Refused,
            _ => Fate::Echoed,
        };
        let what = format!("{endpoints} on {port} with {settings:?} to be {outcome}");
        // The kernel tells by reason what it refused, the agents tell how connections ended.
        let (told_in, word) = match expected {
            Fate::Refused => ("kernelRefused", "reason"),
            _ => ("past", "result"),
        };
        let ended = match expected {
            Fate::Echoed => "",
            _ => reason.unwrap(),
        };
        let to = format!("web:{port}");
        let mut told = Value::Null;
        let happens = eventually(&what, LIMIT, || {
            let fate = scene.call(port);
            let explain = scene.bed.ask_json(&scene.a, &["explain", "client", &to]);
            told = explain.unwrap();
            let mut all = told[told_in].as_array().unwrap().iter();
            fate == expected && all.any(|one| one[word] == ended)
        });
        happens.unwrap_or_else(|error| panic!("{error}: {told:#}"));
        assert_eq!(told["outcome"], outcome, "{what}: {told:#}");
        assert_eq!(told["reason"].as_str(), reason, "{what}: {told:#}");
        assert_eq!(told["destination"]["name"], "default/web");
        let mut rules = told["rules"].as_array().unwrap().iter();
        let named = rules.any(|asked| asked["rule"] == rule);
        assert!(named, "{what}: {told:#}");
    }
}
