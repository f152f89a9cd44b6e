//! Connections to a Service's address, balanced over its endpoints.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use malla_testbed::{
    Fate, Node, PORT, Pod, PodSpec, Services, Testbed, WEB, WEB_PORT, eventually, say,
    service_address as address,
};

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn connections_are_balanced_over_the_endpoints_of_both_families() {
    let mut services = Services::new(3).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    for ip in WEB {
        let before = services.accepted();
        let mut streams: Vec<_> = (0..30)
            .map(|_| services.client.connect(address(ip)).unwrap())
            .collect();
        for stream in &mut streams {
            assert_eq!(say(stream, b"hello"), Fate::Echoed);
        }
        // With all of them open, the least of two keeps the endpoints close to each other.
        let shares = services.accepted();
        let shares: Vec<usize> = shares.iter().zip(before).map(|(now, b)| now - b).collect();
        assert!(shares.iter().all(|share| *share >= 6), "{shares:?}");
        assert_eq!(shares.iter().sum::<usize>(), 30);
    }
    let node = &services.nodes[0];
    let metrics = services.bed.agent(node).metrics().unwrap();
    let labels = [
        ("direction", "outbound"),
        ("peer", "dst"),
        ("dst_service", "web"),
        ("dst_namespace", "default"),
        ("tls", "true"),
    ];
    assert_eq!(metrics.sum("tcp_open_total", &labels).to_string(), "60");
    let line = "dst.service=\"web.default.svc.cluster.local\"";
    eventually("lines of the access log", LIMIT, || {
        let log = services.bed.agent(node).log();
        log.matches(line).count() == 60
    })
    .unwrap();
}

#[test]
fn an_endpoint_that_fails_is_passed_by() {
    let mut services = Services::new(3).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    // Its app is gone, and discovery doesn't know.
    services.apps.remove(1);
    for ip in WEB {
        for _ in 0..10 {
            assert_eq!(services.client.caller().call(address(ip)), Fate::Echoed);
        }
    }
    // None is left.
    services.apps.clear();
    let (fate, took) = services.client.caller().timed_call(address(WEB[0]));
    assert_eq!(fate, Fate::Reset);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_pod_calls_its_own_service_and_an_unmeshed_endpoint_and_one_by_its_own_address() {
    let mut services = Services::new(1).unwrap();
    let node = Arc::clone(&services.nodes[0]);
    let stranger = PodSpec::new("stranger").unmeshed();
    services.endpoint(&node, stranger).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let pods = services.endpoints.clone();
    for ip in WEB {
        for only in 0..2 {
            services.web_over(&[&*pods[only]]).unwrap();
            for client in [&pods[0], &services.client] {
                let before = services.apps[only].accepted();
                eventually("the only endpoint", LIMIT, || {
                    client.caller().call(address(ip)) == Fate::Echoed
                        && services.apps[only].accepted() > before
                })
                .unwrap();
            }
        }
    }
    for pod in &pods {
        for ip in pod.addresses() {
            let to = SocketAddr::new(*ip, PORT);
            assert_eq!(services.client.caller().call(to), Fate::Echoed);
        }
    }
}

/// As linkerd/linkerd2#10406 has it: a client that was idle meanwhile finds those that came.
#[test]
fn endpoints_are_replaced_under_long_connections_and_an_idle_client() {
    let mut services = Services::new(3).unwrap();
    let pods = services.endpoints.clone();
    let all: Vec<&Pod> = pods.iter().map(AsRef::as_ref).collect();
    services.web_over(&all).unwrap();
    services.bed.start_agents().unwrap();
    // Through tunnels and through memory, by both families, to those that go and those that stay.
    let both = WEB.iter().cycle().take(12);
    let mut long: Vec<_> = both
        .map(|ip| services.client.connect(address(ip)).unwrap())
        .collect();
    let mut all_echo = |turn: usize| {
        for stream in &mut long {
            assert_eq!(say(stream, b"hello again"), Fate::Echoed, "{turn}");
        }
    };
    all_echo(0);
    let first = services.accepted();
    assert!(first.iter().all(|accepted| *accepted > 0), "{first:?}");
    for turn in 1..=100 {
        let place = 1 + turn % 2;
        services.web_over(&[&*pods[place]]).unwrap();
        eventually("the other endpoint", LIMIT, || {
            let before = services.apps[place].accepted();
            assert_eq!(services.client.caller().call(address(WEB[0])), Fate::Echoed);
            services.apps[place].accepted() > before
        })
        .unwrap();
        all_echo(turn);
    }
    let fates = [(); 5].map(|()| services.client.caller().call(address(WEB[0])));
    assert_eq!(fates, [Fate::Echoed; 5]);
    all_echo(101);
    // The first change has taken it away, and none has brought it back.
    let between = services.apps[0].accepted() - first[0];
    assert!(between < 5, "{between}");
}

#[test]
fn a_client_keeps_its_endpoint_where_the_service_says_so() {
    let mut services = Services::new(3).unwrap();
    services
        .web("sessionAffinity: ClientIP\nsessionAffinityTimeout: 1h")
        .unwrap();
    services.bed.start_agents().unwrap();
    for ip in WEB {
        let before = services.accepted();
        for _ in 0..20 {
            assert_eq!(services.client.caller().call(address(ip)), Fate::Echoed);
        }
        let after = services.accepted();
        let shares = after.iter().zip(before).map(|(now, b)| now - b);
        assert_eq!(shares.max(), Some(20), "{after:?}");
    }
}

/// As istio's release note 60423 has it: what one Service publishes, another one doesn't.
#[test]
fn endpoints_that_are_not_ready_are_published_by_each_service_for_itself() {
    const OTHER: &str = "10.96.0.11";
    let mut services = Services::new(2).unwrap();
    let pods = services.endpoints.clone();
    let fields = |ip: &str, pod: usize, publish: bool| {
        let [v4, v6] = [pods[pod].v4().to_string(), pods[pod].v6().to_string()];
        format!(
            "addresses: [{ip}]\nports: [{{port: {WEB_PORT}, targetPort: http}}]\n\
             publishNotReadyAddresses: {publish}\ntrafficDistribution: PreferClose\n\
             endpoints:\n- {{addresses: [{v4}, \"{v6}\"], ready: false}}\n"
        )
    };
    let publish = |bed: &mut Testbed, [web, peers]: [bool; 2]| {
        bed.untold(|bed| bed.service("web", fields(WEB[0], 0, web)))
            .unwrap();
        bed.service("peers", fields(OTHER, 1, peers)).unwrap();
    };
    publish(&mut services.bed, [false, true]);
    services.bed.start_agents().unwrap();
    for flags in [[false, true], [true, false]] {
        publish(&mut services.bed, flags);
        for (ip, published) in [WEB[0], OTHER].into_iter().zip(flags) {
            let expected = if published {
                Fate::Echoed
            } else {
                Fate::Refused
            };
            let caller = services.client.caller();
            let becomes = || caller.call(address(ip)) == expected;
            eventually(&format!("{ip}: {flags:?}"), LIMIT, becomes).unwrap();
            assert_eq!(caller.call(address(ip)), expected);
        }
    }
    assert!(services.accepted().iter().all(|accepted| *accepted >= 2));
}

/// As cilium/cilium#36427 has it.
#[test]
fn one_source_port_is_connected_to_a_service_and_the_pod_behind_it() {
    const SOURCE: u16 = 45_000;
    let mut services = Services::new(1).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let caller = services.client.caller();
    let source = SocketAddr::new(services.client.v4().into(), SOURCE);
    let pod = SocketAddr::new(services.endpoints[0].v4().into(), PORT);
    let mut streams = [address(WEB[0]), pod].map(|to| caller.clone().from(source).connect(to));
    for stream in &mut streams {
        let stream = stream.as_mut().unwrap();
        assert_eq!(say(stream, b"hello"), Fate::Echoed);
    }
    assert_eq!(services.accepted(), [2]);
}

#[test]
fn a_service_without_endpoints_and_a_port_that_it_has_not_are_refused_at_once() {
    const AT_ONCE: Duration = Duration::from_millis(200);
    let mut services = Services::new(1).unwrap();
    let node = Arc::clone(&services.nodes[0]);
    let open = "failMode: open\nskipOutboundSubnets: [10.96.0.99/32]";
    let open = PodSpec::new("open").settings(open);
    services.endpoint(&node, open).unwrap();
    services.web("").unwrap();
    let selecting = |selector: &str| {
        format!(
            "addresses: [10.96.0.99, \"fd96::99\"]\n\
             ports: [{{port: 80, targetPort: http}}]\nselector: {{app: {selector}}}"
        )
    };
    services.bed.service("none", selecting("none")).unwrap();
    services.bed.start_agents().unwrap();
    let caller = services.client.caller();
    let undefined = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 81);
    for to in [
        address("10.96.0.99"),
        address("fd96::99"),
        undefined(WEB[0]),
        undefined(WEB[1]),
    ] {
        let (fate, took) = caller.timed_call(to);
        assert_eq!(fate, Fate::Refused, "{to}");
        assert!(took < AT_ONCE, "{to}: {took:?}");
    }
    let counted = || {
        let agent = services.bed.agent(&services.nodes[0]);
        let metrics = agent.metrics().unwrap();
        ["no_endpoint", "no_service_port"].map(|reason| {
            let refused = metrics.syns("outbound", "refused", reason);
            refused.to_string()
        })
    };
    assert_eq!(counted(), ["2", "2"]);
    // An opt-out beats the map. Behind it there is nothing here, and nobody who refuses.
    let skipping = services.endpoints[1].caller();
    let skipping = skipping.patience(Duration::from_millis(300));
    assert_ne!(skipping.call(address("10.96.0.99")), Fate::Refused);
    assert_eq!(counted(), ["2", "2"]);

    // With the first endpoint it opens, with the last one it closes.
    for (selector, fate) in [("web", Fate::Echoed), ("none", Fate::Refused)] {
        services.bed.service("none", selecting(selector)).unwrap();
        let caller = services.client.caller();
        for to in [address("10.96.0.99"), address("fd96::99")] {
            eventually("another selector", LIMIT, || caller.call(to) == fate).unwrap();
        }
    }
}

#[test]
fn the_configuration_tells_each_endpoint_and_its_state() {
    let mut services = Services::new(2).unwrap();
    services.web("trafficDistribution: PreferClose").unwrap();
    services.bed.start_agents().unwrap();
    let mut stream = services.client.connect(address(WEB[0])).unwrap();
    assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
    // The second endpoint is on the client's node.
    assert_eq!(services.accepted(), [0, 1]);
    let config = services.nodes[0].config().unwrap();
    let web = &config["services"][0];
    assert_eq!(web["service"], "default/web");
    assert_eq!(web["ports"][0]["targetPort"], "http");
    assert_eq!(web["trafficDistribution"], "PreferClose");
    for (place, (node, connections)) in [("b", 0), ("a", 1)].into_iter().enumerate() {
        let endpoint = &web["endpoints"][place];
        assert_eq!(endpoint["workload"], format!("default/web-{place}"));
        assert_eq!(endpoint["node"], node);
        assert_eq!(endpoint["state"], "ready");
        assert_eq!(
            endpoint["identity"],
            "spiffe://cluster.local/ns/default/sa/default"
        );
        assert_eq!(endpoint["connections"], connections);
        assert_eq!(endpoint["ports"], serde_json::json!([PORT]));
    }
}

/// Linkerd's families of routes, balancers and authorization, as its users' dashboards ask for them.
#[test]
fn linkerds_metrics_tell_a_services_connections_and_endpoints_until_it_is_gone() {
    const CALLS: usize = 5;
    let mut services = Services::new(2).unwrap();
    let [ready, not] = [0, 1].map(|place| services.endpoints[place].v4());
    let web = format!(
        "addresses: [{}]\nports: [{{port: {WEB_PORT}, targetPort: {PORT}}}]\n\
         endpoints: [{{addresses: [{ready}]}}, {{addresses: [{not}], ready: false}}]",
        WEB[0]
    );
    services.bed.service("web", web).unwrap();
    services.bed.start_agents().unwrap();
    for _ in 0..CALLS {
        assert_eq!(services.client.caller().call(address(WEB[0])), Fate::Echoed);
    }
    let [a, b] = &services.nodes;
    let port = WEB_PORT.to_string();
    let of_web = |more| {
        let web = [
            ("parent_kind", "Service"),
            ("parent_name", "web"),
            ("parent_namespace", "default"),
            ("parent_port", &*port),
        ];
        [&web[..], &[more]].concat()
    };
    let sum = |node: &Node, family: &str, labels: &[(&str, &str)]| {
        let metrics = services.bed.agent(node).metrics().unwrap();
        metrics.sum(family, labels).to_string()
    };
    let calls = CALLS.to_string();
    eventually("the ends of all", LIMIT, || {
        let closed = sum(a, "outbound_tcp_route_close_total", &of_web(("error", "")));
        closed == calls
    })
    .unwrap();
    let opened = of_web(("route_name", "opaq"));
    assert_eq!(sum(a, "outbound_tcp_route_open_total", &opened), calls);
    for state in ["ready", "pending"] {
        let endpoints = of_web(("endpoint_state", state));
        let endpoints = sum(a, "outbound_tcp_balancer_endpoints", &endpoints);
        assert_eq!(endpoints, "1", "{state}");
    }
    // The endpoint's agent let them in as it does with anybody.
    let allowed = [
        ("srv_kind", "default"),
        ("srv_name", "all-unauthenticated"),
        ("tls", "true"),
        ("src_pod", "client"),
    ];
    assert_eq!(sum(b, "inbound_tcp_authz_allow_total", &allowed), calls);

    let yaml = services.bed.mesh_yaml();
    let (without, _) = yaml.split_once("services:\n").unwrap();
    services.bed.write_mesh_text(without).unwrap();
    eventually("the Service to leave the scrape", LIMIT, || {
        let agent = services.bed.agent(a);
        let families = [
            "outbound_tcp_route_open_total{",
            "outbound_tcp_balancer_endpoints{",
        ];
        let scrape = a.get("/metrics").unwrap().body;
        agent.is_running() && families.iter().all(|family| !scrape.contains(family))
    })
    .unwrap();
}
