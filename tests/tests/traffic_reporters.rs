//! The labels and totals of both ends' agents, compared with each other.

#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use malla_testbed::{
    Fate, Metrics, PORT, PodSpec, Sample, Services, WEB, eventually, say, service_address,
};

const LIMIT: Duration = Duration::from_secs(10);
const CALLS: u32 = 20;
/// What each call says, and hears.
const WORDS: &[u8] = b"ten bytes.";

const FAMILIES: [&str; 5] = [
    "tcp_open_total",
    "tcp_open_connections",
    "tcp_close_total",
    "tcp_read_bytes_total",
    "tcp_write_bytes_total",
];

/// Connections and bytes in both directions between two pods, as one of the ends' agents says.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Totals {
    opened: f64,
    closed: f64,
    to_server: f64,
    to_client: f64,
}

/// By source and destination, what both agents say of the legs between them.
fn totals(all: &[Metrics; 2], direction: &str) -> BTreeMap<[String; 2], Totals> {
    let outbound = direction == "outbound";
    let between = if outbound { "dst" } else { "src" };
    let mut totals = BTreeMap::<_, Totals>::new();
    for sample in all.iter().flat_map(Metrics::iter) {
        if sample.label("direction") != direction || sample.label("peer") != between {
            continue;
        }
        let pair = ["src_pod", "dst_pod"].map(|label| sample.label(label).to_owned());
        let totals = totals.entry(pair).or_default();
        match sample.name.as_str() {
            "tcp_open_total" => totals.opened += sample.value,
            "tcp_close_total" => totals.closed += sample.value,
            "tcp_read_bytes_total" if outbound => totals.to_client += sample.value,
            "tcp_read_bytes_total" => totals.to_server += sample.value,
            "tcp_write_bytes_total" if outbound => totals.to_server += sample.value,
            "tcp_write_bytes_total" => totals.to_client += sample.value,
            _ => {}
        }
    }
    totals
}

/// That a sample names both ends by all of their labels, but for who isn't in the mesh.
fn ends_are_named(sample: &Sample) {
    const NAMES: [&str; 3] = ["pod", "namespace", "serviceaccount"];
    let reporter = NAMES.map(|name| sample.label(name));
    assert_eq!(reporter[1..], ["default", "default"], "{sample:?}");
    let [source, destination] = ["src", "dst"].map(|end| {
        let labels = NAMES.map(|name| format!("{end}_{name}"));
        labels.map(|label| sample.label(&label).to_owned())
    });
    let is_named = |end: &[String; 3]| {
        end[1..] == ["default", "default"] && !["", "unknown"].contains(&end[0].as_str())
    };
    assert!(is_named(&destination), "{sample:?}");
    if sample.label("direction") == "outbound" {
        assert_eq!(source, reporter, "{sample:?}");
    } else {
        assert_eq!(destination, reporter, "{sample:?}");
    }
    // Who isn't in the mesh is unknown, on all legs alike, and proves no identity.
    if !is_named(&source) {
        assert_eq!(source, ["unknown"; 3], "{sample:?}");
        assert_eq!(sample.label("direction"), "inbound", "{sample:?}");
        assert_ne!(sample.label("tls"), "true", "{sample:?}");
        assert_eq!(sample.label("client_id"), "", "{sample:?}");
    }
}

/// As istio/ztunnel#404 has it, where metrics of calls between nodes had unknown labels and two
/// reporters disagreed.
#[test]
fn both_reporters_name_both_ends_and_agree_however_a_pod_is_called() {
    let mut services = Services::new(2).unwrap();
    let nodes = services.nodes.clone();
    let stranger = PodSpec::new("stranger").unlisted();
    let stranger = services.bed.pod(&nodes[0], stranger).unwrap();
    let doomed = PodSpec::new("doomed").port(PORT);
    let doomed = services.bed.pod(&nodes[1], doomed).unwrap();
    let doomed_app = doomed.echo(PORT).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let client = Arc::clone(&services.client);
    let caller = client.caller().saying(WORDS);

    let (mut by_service, mut by_pod, mut unmeshed) = (0, 0, 0);
    for _ in 0..CALLS {
        for ip in WEB {
            assert_eq!(caller.call(service_address(ip)), Fate::Echoed);
            by_service += 1;
        }
        for pod in &services.endpoints {
            for ip in pod.addresses() {
                let to = SocketAddr::new(*ip, PORT);
                assert_eq!(caller.call(to), Fate::Echoed);
                by_pod += 1;
                let plain = stranger.caller().saying(WORDS);
                assert_eq!(plain.call(to), Fate::Echoed);
                unmeshed += 1;
            }
        }
    }
    // One lives while its pod goes, one has just ended.
    let to = SocketAddr::new(doomed.v4().into(), PORT);
    let mut live = caller.connect(to).unwrap();
    assert_eq!(say(&mut live, WORDS), Fate::Echoed);
    assert_eq!(caller.call(to), Fate::Echoed);
    services.bed.remove_pod(&doomed).unwrap();
    drop((doomed, doomed_app));
    let end = live.read(&mut [0]).map_err(|error| error.kind());
    assert!(
        matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)),
        "{end:?}"
    );
    drop(live);

    let metrics = || [&nodes[0], &nodes[1]].map(|node| services.bed.agent(node).metrics().unwrap());
    eventually("the ends of all connections", LIMIT, || {
        let open = metrics()
            .iter()
            .map(|all| all.sum("tcp_open_connections", &[]))
            .sum::<f64>();
        open == 0.0
    })
    .unwrap();
    let metrics = metrics();
    for family in FAMILIES {
        for all in &metrics {
            all.samples(family, &[]).for_each(ends_are_named);
        }
    }
    let [outbound, inbound] = ["outbound", "inbound"].map(|way| totals(&metrics, way));
    for (pair, said) in &outbound {
        assert_eq!(Some(said), inbound.get(pair), "{pair:?}");
    }
    let sum = |totals: &BTreeMap<[String; 2], Totals>, source: &str, destination: &[&str]| {
        let ours = totals
            .iter()
            .filter(|([from, to], _)| from == source && destination.contains(&to.as_str()));
        ours.map(|(_, totals)| totals.opened).sum::<f64>()
    };
    let web = ["web-0", "web-1"];
    assert_eq!(
        sum(&outbound, "client", &web),
        f64::from(by_service + by_pod)
    );
    assert_eq!(sum(&inbound, "unknown", &web), f64::from(unmeshed));
    assert_eq!(sum(&outbound, "client", &["doomed"]), 2.0);
    let of_service = [
        ("peer", "dst"),
        ("dst_service", "web"),
        ("direction", "outbound"),
    ];
    assert_eq!(
        metrics[0].sum("tcp_open_total", &of_service),
        f64::from(by_service)
    );
    let all = outbound.values().chain(inbound.values());
    assert!(all.clone().all(|totals| totals.opened == totals.closed));
}
