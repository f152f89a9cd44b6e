//! Services whose endpoints say nothing, and Services while no agent lives.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{net::SocketAddr, time::Duration};

use malla_testbed::{
    Fate, PORT, Pod, PodSpec, Services, Testbed, WEB, WEB_PORT, eventually,
    service_address as address,
};

const LIMIT: Duration = Duration::from_secs(10);
/// The port of the mesh.
const MESH: u16 = 15008;
/// The connect time-outs of these tests' client, in the mesh and elsewhere.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);
/// The addresses of a Service without endpoints.
const NONE: [&str; 2] = ["10.96.0.99", "fd96::99"];

/// Calls each address of the Service, of which the first endpoint is silent and the second one
/// isn't, until the silent one was tried.
fn a_silent_first_endpoint_is_passed_by(services: &Services) {
    let heard = services.accepted()[0];
    for ip in WEB {
        let mut passed_by = false;
        for _ in 0..30 {
            let (fate, took) = services.client.caller().timed_call(address(ip));
            assert_eq!(fate, Fate::Echoed, "{ip}");
            assert!(took < CONNECT_LIMIT, "{ip}: {took:?}");
            // An endpoint that is tried in vain has half of the time.
            if took >= CONNECT_LIMIT / 2 {
                passed_by = true;
                break;
            }
        }
        assert!(passed_by, "{ip}: the silent endpoint was never tried");
    }
    let accepted = services.accepted();
    assert_eq!(accepted[0], heard, "{accepted:?}");
}

/// A client with short limits, a first endpoint like `first`, and a second one in good order.
fn two_endpoints(first: PodSpec) -> Services {
    // What a tunnel's peer has said, each worker is told by its own.
    let bed = Testbed::new("services").unwrap();
    let bed = bed.with_agent_arguments(["--workers", "1"]);
    let mut services = Services::on(bed, 0).unwrap();
    let nodes = services.nodes.clone();
    services.endpoint(&nodes[1], first).unwrap();
    let second = PodSpec::new("second");
    services.endpoint(&nodes[1], second).unwrap();
    let limits = format!(
        "meshConnectTimeout: {0}s\nconnectTimeout: {0}s",
        CONNECT_LIMIT.as_secs()
    );
    services
        .bed
        .change_settings(&services.client, &limits)
        .unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    services
}

#[test]
fn a_meshed_endpoint_that_swallows_what_opens_tunnels_is_passed_by() {
    let services = two_endpoints(PodSpec::new("first"));
    services.endpoints[0].swallow_openings(MESH).unwrap();
    a_silent_first_endpoint_is_passed_by(&services);
}

#[test]
fn a_meshed_endpoint_whose_app_swallows_what_opens_connections_is_passed_by() {
    let services = two_endpoints(PodSpec::new("first"));
    services.endpoints[0].swallow_openings(PORT).unwrap();
    a_silent_first_endpoint_is_passed_by(&services);
}

/// Calls both endpoints by both addresses, so that tunnels are there in which their agent has said
/// that it takes what a client says before its app has answered.
fn meet_both_endpoints(services: &Services) {
    for ip in WEB {
        let before = services.accepted();
        let met = || {
            let fate = services.client.caller().call(address(ip));
            assert_eq!(fate, Fate::Echoed, "{ip}");
            let accepted = services.accepted();
            accepted
                .iter()
                .zip(&before)
                .all(|(now, before)| now > before)
        };
        eventually("both endpoints to be called", LIMIT, met).unwrap();
    }
}

#[test]
fn an_endpoint_whose_app_falls_silent_is_passed_by_with_what_the_client_said() {
    let services = two_endpoints(PodSpec::new("first"));
    meet_both_endpoints(&services);
    services.endpoints[0].swallow_openings(PORT).unwrap();
    a_silent_first_endpoint_is_passed_by(&services);
}

/// Nobody knows whether it has heard the first client that spoke to it, which so is reset.
#[test]
fn an_endpoint_whose_agent_falls_silent_fails_one_connection_and_is_passed_by() {
    let services = two_endpoints(PodSpec::new("first"));
    meet_both_endpoints(&services);
    services.endpoints[0].swallow_all(MESH).unwrap();
    let mut failed = 0;
    for _ in 0..30 {
        let (fate, took) = services.client.caller().timed_call(address(WEB[0]));
        if fate != Fate::Echoed {
            assert_eq!(fate, Fate::Reset);
            failed += 1;
        } else if took >= CONNECT_LIMIT / 2 {
            assert!(failed <= 1, "{failed} connections failed");
            return;
        }
    }
    panic!("the silent endpoint was not passed by, and {failed} connections failed");
}

#[test]
fn an_unmeshed_endpoint_that_swallows_what_opens_connections_is_passed_by() {
    let services = two_endpoints(PodSpec::new("first").unmeshed());
    services.endpoints[0].swallow_openings(PORT).unwrap();
    a_silent_first_endpoint_is_passed_by(&services);
}

/// Does on the client's node what kube-proxy does: what goes to the Service goes to this pod.
fn translate_to(services: &Services, pod: &Pod) {
    let rules = format!(
        "table inet translation\ndelete table inet translation\n\
         table inet translation {{ chain pre {{ type nat hook prerouting priority -100;\n\
         ip daddr {} tcp dport {WEB_PORT} dnat ip to {}:{PORT}\n\
         ip6 daddr {} tcp dport {WEB_PORT} dnat ip6 to [{}]:{PORT}\n}}\n}}\n",
        WEB[0],
        pod.v4(),
        WEB[1],
        pod.v6()
    );
    let nft = services.nodes[0].command(["nft", "-f", "-"]);
    nft.input(rules).run().unwrap();
}

/// An open pod's connections are left to the network while no agent lives, and so is what becomes
/// of Services: their refusals are an agent's knowledge, which may be old. What a pod refuses
/// that is closed, or strict, it goes on to refuse.
#[test]
fn while_no_agent_lives_services_are_the_networks_to_open_pods_and_refused_to_closed_ones() {
    let mut services = Services::new(0).unwrap();
    let nodes = services.nodes.clone();
    for (name, settings) in [
        ("open", "failMode: open"),
        ("strict", "failMode: open\nmtls: strict"),
    ] {
        let spec = PodSpec::new(name).settings(settings);
        services.endpoint(&nodes[1], spec).unwrap();
    }
    let fails_open = PodSpec::new("fails-open").settings("failMode: open");
    let fails_open = services.bed.pod(&nodes[0], fails_open).unwrap();
    services.web("").unwrap();
    let none = |selector: &str| {
        let [v4, v6] = NONE;
        format!(
            "addresses: [{v4}, \"{v6}\"]\nports: [{{port: {WEB_PORT}, targetPort: http}}]\n\
             selector: {{app: {selector}}}"
        )
    };
    services.bed.service("none", none("none")).unwrap();
    services.bed.start_agents().unwrap();
    let undefined = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 81);
    let refused: Vec<SocketAddr> = NONE
        .map(address)
        .into_iter()
        .chain(WEB.map(undefined))
        .collect();
    for client in [&services.client, &fails_open] {
        for to in &refused {
            assert_eq!(client.caller().call(*to), Fate::Refused, "{to}");
        }
    }

    for node in &nodes {
        services.bed.agent(node).kill9();
    }
    let wire = fails_open.capture().unwrap();
    let patience = Duration::from_millis(500);
    for to in &refused {
        assert_eq!(services.client.caller().call(*to), Fate::Refused, "{to}");
        // Here is nobody who would answer.
        let fate = fails_open.caller().patience(patience).call(*to);
        assert!(
            !matches!(fate, Fate::Refused | Fate::Echoed),
            "{to}: {fate:?}"
        );
        let seen = || wire.tcp().iter().any(|packet| packet.to == *to);
        eventually("what opens a connection", LIMIT, seen).unwrap();
    }
    for (place, fate) in [(0, Fate::Echoed), (1, Fate::Refused)] {
        translate_to(&services, &services.endpoints[place]);
        for ip in WEB {
            assert_eq!(fails_open.caller().call(address(ip)), fate, "{ip}");
            let closed = services.client.caller().call(address(ip));
            assert_eq!(closed, Fate::Refused, "{ip}");
        }
    }
    assert_eq!(services.accepted(), [2, 0]);

    // What has changed meanwhile the next agent knows, also of what its predecessor refused.
    services
        .bed
        .untold(|bed| bed.service("none", none("web")))
        .unwrap();
    for node in &nodes {
        services.bed.start_agent(node).unwrap();
    }
    for client in [&services.client, &fails_open] {
        for to in NONE.map(address) {
            let served = || client.caller().call(to) == Fate::Echoed;
            eventually("a Service that has endpoints now", LIMIT, served).unwrap();
        }
        for to in WEB.map(undefined) {
            assert_eq!(client.caller().call(to), Fate::Refused, "{to}");
        }
    }
    // Which of the two is drawn is luck.
    eventually("a strict endpoint to take part", LIMIT, || {
        assert_eq!(
            services.client.caller().call(address(NONE[0])),
            Fate::Echoed
        );
        services.accepted()[1] > 0
    })
    .unwrap();
}
