//! What a Service may say of its endpoints and of who goes to which.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Fate, PORT, Pod, PodSpec, Services, WEB, eventually, service_address as address,
};

const LIMIT: Duration = Duration::from_secs(10);
/// So many connections show where they go.
const CALLS: usize = 12;

/// How many of a client's connections to each family's address each endpoint gets.
fn shares(services: &Services, client: &Pod) -> Vec<usize> {
    let before = services.accepted();
    for ip in WEB {
        for _ in 0..CALLS {
            assert_eq!(client.caller().call(address(ip)), Fate::Echoed, "{ip}");
        }
    }
    let after = services.accepted().into_iter();
    after
        .zip(before)
        .map(|(after, before)| after - before)
        .collect()
}

/// Waits until `client` reaches an endpoint, and no other one any more.
fn wait_for_only(services: &Services, client: &Pod, place: usize) {
    let only = || {
        let shares = shares(services, client);
        shares[place] == shares.iter().sum::<usize>()
    };
    eventually(&format!("endpoint {place} alone"), LIMIT, only).unwrap();
}

/// Waits until connections to either address end so.
fn wait_for(client: &Pod, fate: Fate) {
    for ip in WEB {
        let ends = || client.caller().call(address(ip)) == fate;
        eventually(&format!("{ip}: {fate:?}"), LIMIT, ends).unwrap();
    }
}

#[test]
fn endpoints_of_the_clients_node_get_all_while_there_are_any() {
    for preference in ["PreferClose", "PreferSameNode"] {
        // Of the endpoints, 0 and 2 are on the other node.
        let mut services = Services::new(3).unwrap();
        let far_node = Arc::clone(&services.nodes[1]);
        let far = services.bed.pod(&far_node, PodSpec::new("far-client"));
        let (far, near) = (far.unwrap(), Arc::clone(&services.client));
        services
            .web(&format!("trafficDistribution: {preference}"))
            .unwrap();
        services.bed.start_agents().unwrap();
        assert_eq!(shares(&services, &near), [0, 2 * CALLS, 0]);
        let of_far = shares(&services, &far);
        assert_eq!(of_far[1], 0, "{of_far:?}");
        assert!(of_far[0] > 0 && of_far[2] > 0, "{of_far:?}");

        services.declare(&[(1, "ready: false")]).unwrap();
        let gone = || shares(&services, &near)[1] == 0;
        eventually("the near endpoint to be left", LIMIT, gone).unwrap();
        services.declare(&[]).unwrap();
        wait_for_only(&services, &near, 1);
        // Its app is gone, and discovery doesn't know.
        services.apps.remove(1);
        for ip in WEB {
            assert_eq!(near.caller().call(address(ip)), Fate::Echoed);
        }
    }
}

/// As a pod does that terminates: it serves, and isn't ready.
#[test]
fn what_still_serves_is_an_endpoint_where_none_is_ready() {
    let mut services = Services::new(3).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let client = Arc::clone(&services.client);
    let (serving, unready) = ("ready: false\n  serving: true", "ready: false");
    services
        .declare(&[(0, serving), (1, unready), (2, unready)])
        .unwrap();
    wait_for_only(&services, &client, 0);
    services.declare(&[(0, serving), (1, unready)]).unwrap();
    wait_for_only(&services, &client, 2);
    services
        .declare(&[(0, unready), (1, unready), (2, unready)])
        .unwrap();
    wait_for(&client, Fate::Refused);
    services.declare(&[]).unwrap();
    wait_for(&client, Fate::Echoed);
    let all = || shares(&services, &client).iter().all(|share| *share > 0);
    eventually("all endpoints", LIMIT, all).unwrap();
}

#[test]
fn a_named_target_port_is_each_endpoints_own_and_who_has_none_is_no_endpoint() {
    const OTHER: u16 = 9090;
    let mut services = Services::new(1).unwrap();
    let nodes = services.nodes.clone();
    let other = PodSpec::new("other").named_port("http", OTHER);
    services.endpoint_on(&nodes[0], other, OTHER).unwrap();
    // It listens where the first one does, and calls the port otherwise.
    let nameless = PodSpec::new("nameless").named_port("admin", PORT);
    services.endpoint_on(&nodes[0], nameless, PORT).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let client = Arc::clone(&services.client);
    let shares = shares(&services, &client);
    assert!(shares[0] > 0 && shares[1] > 0, "{shares:?}");
    assert_eq!(shares[2], 0, "{shares:?}");
}

#[test]
fn each_family_has_the_endpoints_that_have_an_address_of_it() {
    let mut services = Services::new(0).unwrap();
    let nodes = services.nodes.clone();
    let v4 = PodSpec::new("v4").ipv4_only();
    services.endpoint(&nodes[1], v4).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let call = |services: &Services, ip| services.client.caller().call(address(ip));
    assert_eq!(call(&services, WEB[0]), Fate::Echoed);
    assert_eq!(call(&services, WEB[1]), Fate::Refused);
    let v6 = PodSpec::new("v6").ipv6_only();
    services.endpoint(&nodes[0], v6).unwrap();
    let has_v6 = || call(&services, WEB[1]) == Fate::Echoed;
    eventually("an endpoint of the other family", LIMIT, has_v6).unwrap();
    let before = services.accepted();
    for ip in WEB {
        for _ in 0..CALLS {
            assert_eq!(call(&services, ip), Fate::Echoed, "{ip}");
        }
    }
    let after = services.accepted().into_iter();
    let shares: Vec<usize> = after.zip(before).map(|(now, then)| now - then).collect();
    assert_eq!(shares, [CALLS, CALLS]);
}

#[test]
fn a_headless_service_leaves_its_endpoints_to_those_who_dial_them() {
    let mut services = Services::new(2).unwrap();
    let headless = format!(
        "headless: true\nports: [{{port: 80, targetPort: {PORT}}}]\nselector: {{app: web}}"
    );
    services.bed.service("web", headless).unwrap();
    services.bed.start_agents().unwrap();
    for pod in &services.endpoints {
        for ip in pod.addresses() {
            let to = SocketAddr::new(*ip, PORT);
            assert_eq!(services.client.caller().call(to), Fate::Echoed, "{to}");
        }
    }
    assert_eq!(services.accepted(), [2, 2]);
    let config = services.nodes[0].config().unwrap();
    let web = &config["services"][0];
    assert_eq!(web["service"], "default/web");
    assert_eq!(web["addresses"], serde_json::json!([]));
    assert_eq!(web["endpoints"].as_array().unwrap().len(), 2);
}

#[test]
fn a_client_keeps_its_endpoint_until_it_has_not_come_for_the_time_out() {
    const TIME_OUT: Duration = Duration::from_millis(1_500);
    let mut services = Services::new(4).unwrap();
    services
        .web("sessionAffinity: ClientIP\nsessionAffinityTimeout: 1500ms")
        .unwrap();
    services.bed.start_agents().unwrap();
    let client: IpAddr = services.client.v4().into();
    let reached = || {
        let before = services.accepted();
        let call = services.client.caller().from((client, 0).into());
        assert_eq!(call.call(address(WEB[0])), Fate::Echoed);
        let after = services.accepted();
        after.iter().zip(before).position(|(now, then)| *now > then)
    };
    // While it comes, it stays, for longer than the time-out too. A machine that stops for so
    // long that the time has run out begins anew.
    let (mut since, mut last) = (Instant::now(), Instant::now());
    let mut endpoint = reached();
    while since.elapsed() < 2 * TIME_OUT {
        thread::sleep(TIME_OUT / 10);
        let began = Instant::now();
        let now = reached();
        if last.elapsed() < TIME_OUT {
            assert_eq!(now, endpoint);
        } else {
            (since, endpoint) = (began, now);
        }
        last = began;
    }
    // When it hasn't come for so long, it is drawn for anew: one of four, so that 20 times the
    // same are not to be expected.
    let moved = (0..20).any(|_| {
        thread::sleep(TIME_OUT + TIME_OUT / 10);
        reached() != endpoint
    });
    assert!(moved, "it kept {endpoint:?}");
}

/// As linkerd/linkerd2#10406 has it, where a client that was seldom used went on calling an address
/// that was another pod's.
#[test]
fn a_client_that_was_idle_never_reaches_who_has_an_endpoints_old_address() {
    let mut services = Services::new(1).unwrap();
    services.web("").unwrap();
    services.bed.start_agents().unwrap();
    let client = Arc::clone(&services.client);
    // A tunnel to it is open from here on.
    let old = services.endpoints.remove(0);
    assert_eq!(client.caller().call(address(WEB[0])), Fate::Echoed);
    services.apps.remove(0);
    services.bed.remove_pod(&old).unwrap();
    // On the other node: neighbours don't go on with another's hardware address.
    let [near, far] = services.nodes.clone();
    let heir = PodSpec::new("heir").account("heir").at(old.addresses());
    let heir = services.bed.pod(&near, heir.port(PORT)).unwrap();
    let heirs_app = heir.echo(PORT).unwrap();
    wait_for(&client, Fate::Refused);
    services.endpoint(&far, PodSpec::new("new")).unwrap();
    wait_for(&client, Fate::Echoed);
    for ip in WEB {
        for _ in 0..CALLS {
            assert_eq!(client.caller().call(address(ip)), Fate::Echoed);
        }
    }
    assert_eq!(heirs_app.accepted(), 0);
    // By its own address it is who it is now.
    for ip in heir.addresses() {
        let called = || client.caller().call((*ip, PORT)) == Fate::Echoed;
        eventually("the address's next pod", LIMIT, called).unwrap();
    }
}
