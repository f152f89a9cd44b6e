//! What clients call by a Service's address, under Linkerd's names: routes and balancers.
//!
//! A port of a Service is here from the first connection to it on, as Linkerd's balancers are, and
//! until discovery has it no more and no connection to it lives.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use malla_common::Reason;
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

use super::series::lock;
use crate::{
    model::{EndpointCounts, Service, ServiceId},
    telemetry::collector::{Family, label},
};

/// Ports of Services that a scrape tells one by one. Others are summed.
const MAX_ROUTES: usize = 500;

/// Linkerd's words for why a connection came to nothing. Empty: it ended in good order.
const ERRORS: [&str; 4] = ["", "forbidden", "invalid_backend", "unexpected"];

/// The lines of one port: its endpoints by state, what was opened, and what was closed.
const LINES: usize = 2 + 1 + ERRORS.len();

/// The lines that all ports may have, and those of the sum of others.
pub(super) const MAX_LINES: usize = (MAX_ROUTES + 1) * LINES;

const CLOSE_LABELS: &[&str] = &[
    "error",
    "parent_group",
    "parent_kind",
    "parent_name",
    "parent_namespace",
    "parent_port",
    "parent_section_name",
    "route_group",
    "route_kind",
    "route_name",
    "route_namespace",
];

const OPEN: Family = Family {
    name: "outbound_tcp_route_open_total",
    help: "Connections to the Service's port.",
    kind: MetricType::COUNTER,
    labels: CLOSE_LABELS.split_at(1).1,
};

const CLOSE: Family = Family {
    name: "outbound_tcp_route_close_total",
    help: "Connections to the Service's port that ended, by Linkerd's word for the cause.",
    kind: MetricType::COUNTER,
    labels: CLOSE_LABELS,
};

const ENDPOINTS: Family = Family {
    name: "outbound_tcp_balancer_endpoints",
    help: "Endpoints that have the Service's port: those that get connections are ready.",
    kind: MetricType::GAUGE,
    labels: &[
        "backend_group",
        "backend_kind",
        "backend_name",
        "backend_namespace",
        "backend_port",
        "backend_section_name",
        "endpoint_state",
        "parent_group",
        "parent_kind",
        "parent_name",
        "parent_namespace",
        "parent_port",
        "parent_section_name",
    ],
};

pub(super) const FAMILIES: [Family; 3] = [OPEN, CLOSE, ENDPOINTS];

/// Tells how many endpoints a port of a Service has now. None: discovery has no such port.
pub type ReadEndpoints = Box<dyn Fn(&ServiceId, u16) -> Option<EndpointCounts> + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Parent {
    service: ServiceId,
    port: u16,
}

/// The counters of one port.
#[derive(Debug, Default)]
pub(super) struct Route {
    opened: AtomicU64,
    closed: [AtomicU64; ERRORS.len()],
}

#[derive(Default)]
struct Entries {
    routes: HashMap<Parent, Arc<Route>>,
    /// What is beyond [`MAX_ROUTES`].
    others: Arc<Route>,
    read: Option<ReadEndpoints>,
}

/// All ports of Services that were called.
#[derive(Default)]
pub(super) struct Routes(Mutex<Entries>);

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").finish_non_exhaustive()
    }
}

impl Routes {
    pub(super) fn set_endpoints(&self, read: ReadEndpoints) {
        lock(&self.0).read = Some(read);
    }

    /// The counters of a port. Who keeps them keeps them in the scrape.
    pub(super) fn of(&self, service: &Service, port: u16) -> Arc<Route> {
        let mut entries = lock(&self.0);
        let parent = Parent {
            service: service.id.clone(),
            port,
        };
        if entries.routes.len() >= MAX_ROUTES && !entries.routes.contains_key(&parent) {
            return Arc::clone(&entries.others);
        }
        Arc::clone(entries.routes.entry(parent).or_default())
    }

    /// Reads all, then drops what is gone.
    pub(super) fn families(&self) -> [MetricFamily; 3] {
        let mut samples: [Vec<Metric>; 3] = Default::default();
        let mut entries = lock(&self.0);
        let Entries {
            routes,
            others,
            read,
        } = &mut *entries;
        routes.retain(|parent, route| {
            let endpoints = read
                .as_ref()
                .and_then(|read| read(&parent.service, parent.port));
            if endpoints.is_none() && Arc::strong_count(route) == 1 {
                return false;
            }
            let ServiceId { namespace, name } = &parent.service;
            let port = parent.port.to_string();
            route.sample(&labels("parent", name, namespace, &port), &mut samples);
            if let Some(endpoints) = endpoints {
                sample_endpoints(name, namespace, &port, endpoints, &mut samples[2]);
            }
            true
        });
        if others.opened.load(Ordering::Relaxed) > 0 {
            others.sample(&labels("parent", "other", "other", ""), &mut samples);
        }
        drop(entries);
        let mut samples = samples.into_iter();
        FAMILIES.map(|family| family.with(samples.next().unwrap_or_default()))
    }
}

impl Route {
    fn sample(&self, parent: &[LabelPair], into: &mut [Vec<Metric>; 3]) {
        let [opens, closes, _] = into;
        // Without a route of the user's, as Linkerd names its own.
        let mut labels = parent.to_vec();
        labels.extend([
            label("route_group", ""),
            label("route_kind", "default"),
            label("route_name", "opaq"),
            label("route_namespace", ""),
        ]);
        opens.push(OPEN.sample(labels.clone(), self.opened.load(Ordering::Relaxed)));
        for (word, count) in ERRORS.iter().zip(&self.closed) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 || word.is_empty() {
                let mut labels = labels.clone();
                labels.insert(0, label("error", *word));
                closes.push(CLOSE.sample(labels, count));
            }
        }
    }
}

/// What names a port of a Service, as the `parent` or the `backend`.
fn labels(side: &str, name: &str, namespace: &str, port: &str) -> Vec<LabelPair> {
    [
        ("group", "core"),
        ("kind", "Service"),
        ("name", name),
        ("namespace", namespace),
        ("port", port),
        ("section_name", ""),
    ]
    .map(|(what, value)| label(&format!("{side}_{what}"), value))
    .to_vec()
}

fn sample_endpoints(
    name: &str,
    namespace: &str,
    port: &str,
    endpoints: EndpointCounts,
    into: &mut Vec<Metric>,
) {
    for (state, count) in [("ready", endpoints.ready), ("pending", endpoints.pending)] {
        let mut all = labels("backend", name, namespace, port);
        all.push(label("endpoint_state", state));
        all.extend(labels("parent", name, namespace, port));
        into.push(ENDPOINTS.sample(all, count as u64));
    }
}

/// The metrics of one connection to a Service, from when it is accepted. Dropped without a word, its
/// task was cut.
#[derive(Debug)]
pub struct RouteMetrics {
    route: Arc<Route>,
    /// How it ends, as far as it is known.
    failure: Option<Reason>,
}

impl RouteMetrics {
    pub(super) fn open(route: Arc<Route>) -> Self {
        route.opened.fetch_add(1, Ordering::Relaxed);
        Self {
            route,
            failure: Some(Reason::Shutdown),
        }
    }

    /// It ended: in good order, or for a reason.
    pub fn close(mut self, failure: Option<Reason>) {
        self.failure = failure;
    }
}

impl Drop for RouteMetrics {
    fn drop(&mut self) {
        self.route.closed[error(self.failure)].fetch_add(1, Ordering::Relaxed);
    }
}

/// The place in [`ERRORS`].
const fn error(failure: Option<Reason>) -> usize {
    match failure {
        None => 0,
        Some(Reason::EgressRefused) => 1,
        Some(Reason::NoEndpoint | Reason::NoServicePort) => 2,
        Some(_) => 3,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn service(name: &str) -> Service {
        let text = format!(
            "nodes: []\nworkloads: []\nservices:\n- name: {name}\n  namespace: shop\n  \
             addresses: [10.96.0.1]\n  ports: [{{port: 80}}]\n  selector: {{app: a}}\n"
        );
        let path = std::path::Path::new("mesh.yaml");
        let mesh = crate::discovery::file::check(path, &text).unwrap();
        Service::clone(mesh.services.values().next().unwrap())
    }

    /// Each sample of a family by one of its labels.
    fn values(families: &[MetricFamily], name: &str, by: &str) -> Vec<(String, f64)> {
        let family = families.iter().find(|family| family.name() == name);
        let samples = family.unwrap().get_metric().iter();
        let value = |metric: &Metric| {
            let mut labels = metric.get_label().iter();
            let label = labels.find(|label| label.name() == by).unwrap();
            let value = metric.get_counter().get_value() + metric.get_gauge().get_value();
            (label.value().to_owned(), value)
        };
        samples.map(value).collect()
    }

    fn told(text: &str, value: f64) -> (String, f64) {
        (text.to_owned(), value)
    }

    #[test]
    fn a_services_connections_and_endpoints_are_told_until_it_is_gone() {
        let routes = Routes::default();
        let known = Arc::new(AtomicBool::new(true));
        let reads = Arc::clone(&known);
        routes.set_endpoints(Box::new(move |service, port| {
            assert_eq!((service.to_string().as_str(), port), ("shop/db", 80));
            let counts = EndpointCounts {
                ready: 2,
                pending: 1,
            };
            reads.load(Ordering::Relaxed).then_some(counts)
        }));
        let db = service("db");
        let open = || RouteMetrics::open(routes.of(&db, 80));
        open().close(None);
        open().close(Some(Reason::EgressRefused));
        open().close(Some(Reason::PeerRefused));
        drop(open());
        let living = open();
        let families = routes.families();
        let opened = values(&families, OPEN.name, "parent_name");
        assert_eq!(opened, [told("db", 5.0)]);
        assert_eq!(
            values(&families, CLOSE.name, "error"),
            [
                told("", 1.0),
                told("forbidden", 1.0),
                told("unexpected", 2.0)
            ]
        );
        let states = [told("ready", 2.0), told("pending", 1.0)];
        let endpoints = values(&families, ENDPOINTS.name, "endpoint_state");
        assert_eq!(endpoints, states);

        known.store(false, Ordering::Relaxed);
        let families = routes.families();
        assert!(values(&families, ENDPOINTS.name, "endpoint_state").is_empty());
        assert_eq!(
            values(&families, OPEN.name, "parent_port"),
            [told("80", 5.0)]
        );
        living.close(None);
        let families = routes.families();
        assert!(values(&families, OPEN.name, "parent_name").is_empty());
    }

    #[test]
    fn many_services_do_not_grow_the_scrape_without_bound() {
        let routes = Routes::default();
        let db = service("db");
        let held: Vec<_> = (1..=600)
            .map(|port| RouteMetrics::open(routes.of(&db, port)))
            .collect();
        let families = routes.families();
        let opened = values(&families, OPEN.name, "parent_name");
        assert_eq!(opened.len(), MAX_ROUTES + 1);
        assert_eq!(opened.last(), Some(&told("other", 100.0)));
        drop(held);
        let lines: usize = routes.families().iter().map(|f| f.get_metric().len()).sum();
        assert!(lines <= MAX_LINES, "{lines}");
    }
}
