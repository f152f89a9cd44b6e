//! Who is chosen, with counts and time as a worker sees them.

use std::collections::HashMap;

use super::*;
use crate::model::{
    Endpoint, EndpointState, ServiceId, ServicePort, TargetPort, TrafficDistribution,
};

const SERVICE: &str = "10.96.0.1:80";

/// A Service with an endpoint `10.1.0.N` for each state, the first one on node `a`.
fn service(states: &[EndpointState]) -> Service {
    let service = Service {
        id: ServiceId {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
        },
        host: String::new(),
        addresses: vec![address(SERVICE).ip()],
        ports: vec![ServicePort::new(None, 80, TargetPort::Number(8080), None)],
        publish_not_ready_addresses: false,
        traffic_distribution: None,
        client_ip_affinity: None,
        endpoints: Vec::new(),
    };
    let endpoint = |(place, state): (usize, &EndpointState)| Endpoint {
        addresses: vec![target(place).ip()],
        workload: None,
        node: if place == 0 { "a" } else { "b" }.to_owned(),
        state: *state,
        ports: vec![Some(8080)],
    };
    let endpoints = states.iter().enumerate().map(endpoint).collect();
    service.with_endpoints(endpoints)
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn target(place: usize) -> SocketAddr {
    address(&format!("10.1.0.{}:8080", place + 1))
}

fn wish(tried: &[SocketAddr]) -> Wish<'_> {
    Wish {
        service: address(SERVICE),
        client: [10, 1, 9, 9].into(),
        node: "a",
        tried,
    }
}

/// How often each endpoint is chosen of 1,000 times.
fn counts(
    balancer: &Balancer,
    service: &Service,
    tried: &[SocketAddr],
) -> HashMap<SocketAddr, u32> {
    let mut counts = HashMap::new();
    for _ in 0..1_000 {
        let chosen = balancer.choose(service, wish(tried)).unwrap().address;
        *counts.entry(chosen).or_default() += 1;
    }
    counts
}

#[test]
fn the_endpoint_with_more_connections_is_left_out() {
    let (balancer, service) = (Balancer::default(), service(&[EndpointState::Ready; 3]));
    let busy = balancer.enter(target(1));
    let shares = counts(&balancer, &service, &[]);
    // Of any two, the other one.
    assert_eq!(shares.get(&target(1)), None, "{shares:?}");
    assert!(shares.values().all(|share| *share > 300), "{shares:?}");
    drop(busy);
    assert_eq!(counts(&balancer, &service, &[]).len(), 3);
}

#[test]
fn all_workers_count_together() {
    let shared = Balance::default();
    let [one, other] = [(); 2].map(|()| Balancer::new(shared.clone()));
    let service = service(&[EndpointState::Ready; 2]);
    let busy = one.enter(target(0));
    assert_eq!(counts(&other, &service, &[]).len(), 1);
    one.forget();
    other.forget();
    assert_eq!(shared.outstanding().len(), 1);
    drop(busy);
    other.forget();
    assert_eq!(shared.outstanding().len(), 0);
}

#[test]
fn an_endpoint_that_was_tried_is_not_tried_again() {
    let (balancer, service) = (Balancer::default(), service(&[EndpointState::Ready; 3]));
    let tried = [target(0), target(2)];
    assert_eq!(counts(&balancer, &service, &tried).len(), 1);
    let all = [target(0), target(1), target(2)];
    assert_eq!(balancer.choose(&service, wish(&all)), None);
}

#[test]
fn serving_endpoints_take_over_where_none_is_ready() {
    use EndpointState::{NotReady, Ready, Serving};
    let balancer = Balancer::default();
    for (states, chosen) in [
        (&[Serving, Ready, NotReady][..], Some(target(1))),
        (&[NotReady, NotReady, Serving], Some(target(2))),
        (&[NotReady], None),
        (&[], None),
    ] {
        let service = service(states);
        let first = balancer.choose(&service, wish(&[]));
        assert_eq!(first.map(|target| target.address), chosen, "{states:?}");
    }
}

#[test]
fn near_endpoints_come_first_where_the_service_says_so() {
    let balancer = Balancer::default();
    let mut service = service(&[EndpointState::Ready; 3]);
    service.traffic_distribution = Some(TrafficDistribution::PreferClose);
    let _busy = balancer.enter(target(0));
    assert_eq!(counts(&balancer, &service, &[]).len(), 1);
    let far = counts(&balancer, &service, &[target(0)]);
    assert_eq!(far.len(), 2, "{far:?}");
}

#[test]
fn a_client_keeps_its_endpoint_while_it_is_there_and_the_time_lasts() {
    let balancer = Balancer::default();
    let mut service = service(&[EndpointState::Ready; 3]);
    service.client_ip_affinity = Some(Duration::from_mins(1));
    let asked = Asked {
        source: address("10.1.9.9:40000"),
        destination: address(SERVICE),
    };
    balancer.reached(&service, &asked, target(1));
    assert_eq!(counts(&balancer, &service, &[]).len(), 1);
    // It failed: the next one is another.
    assert!(!counts(&balancer, &service, &[target(1)]).contains_key(&target(1)));

    service.client_ip_affinity = Some(Duration::ZERO);
    balancer.reached(&service, &asked, target(1));
    assert_eq!(counts(&balancer, &service, &[]).len(), 3);
}
