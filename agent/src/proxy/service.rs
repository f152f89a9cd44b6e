//! A connection that an app opens to a Service: balanced over its endpoints until one answers.

use std::{
    cell::RefCell,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use malla_common::Reason;
use tokio::time::timeout;

use super::{
    balance::{Outstanding, Wish},
    optimistic::OptimisticData,
    outbound::{self, Asked, Progress, Route, Server, Way},
    pod::PodContext,
    record::{Ends, Record},
    worker::Worker,
};
use crate::{
    model::Service,
    telemetry::{ConnectionLabels, Direction, Failure, RouteMetrics},
};

/// Endpoints that a connection tries before it is refused.
const MAX_ENDPOINTS: usize = 10;

/// What a connection to a Service counts by: the port's metrics, and its endpoint's connections.
pub(super) type Balanced = (RouteMetrics, Outstanding);

/// Chooses and connects. None: it has failed, and that is recorded.
pub(super) async fn open(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    asked: Asked,
    data: &OptimisticData<'_>,
    route: RouteMetrics,
) -> Option<(Server, Record, Balanced)> {
    let mut attempts = Attempts {
        worker,
        pod,
        asked,
        began: Instant::now(),
        tried: Vec::new(),
        progress: RefCell::default(),
        endpoint: None,
        labels: None,
    };
    let connected = attempts.connect(data).await;
    let Some(record) = attempts.record() else {
        let reason = connected.err().map_or(Reason::NoEndpoint, |f| f.reason);
        route.close(Some(reason));
        worker.refuse(Direction::Outbound, asked.source, asked.destination, reason);
        return None;
    };
    match connected {
        Ok((server, outstanding)) => Some((server, record, (route, outstanding))),
        Err(failure) => {
            route.close(Some(failure.reason));
            record.close(Err(failure));
            None
        }
    }
}

/// The way to an endpoint that answers.
///
/// Its labels are those of the endpoint that it has come to, so the record begins when that is
/// settled. Dropped before that, the connection was cut, and is recorded all the same.
struct Attempts<'a> {
    worker: &'a Rc<Worker>,
    pod: &'a Rc<PodContext>,
    asked: Asked,
    began: Instant,
    tried: Vec<SocketAddr>,
    /// What the record is to be told of the endpoint that was tried last.
    progress: RefCell<Vec<Progress>>,
    endpoint: Option<SocketAddr>,
    labels: Option<(ConnectionLabels, Ends)>,
}

impl Attempts<'_> {
    async fn connect(
        &mut self,
        data: &OptimisticData<'_>,
    ) -> Result<(Server, Outstanding), Failure> {
        let mut failure = Failure::from(Reason::NoEndpoint);
        while self.tried.len() < MAX_ENDPOINTS {
            // Endpoints may have changed since the last attempt.
            let mesh = self.worker.mesh();
            let Some(service) = mesh.service_at(self.asked.destination.ip()) else {
                break;
            };
            if service.port(self.asked.destination.port()).is_none() {
                failure = Reason::NoServicePort.into();
                break;
            }
            let workload = self.pod.workload();
            let wish = Wish {
                service: self.asked.destination,
                client: self.asked.source.ip(),
                node: &workload.node,
                tried: &self.tried,
            };
            let Some(target) = self.worker.balancer.choose(service, wish) else {
                break;
            };
            let endpoint = target.address;
            let route = outbound::route(
                self.worker,
                self.pod,
                &mesh,
                self.asked.source.ip(),
                endpoint,
            );
            let Some(left) = self.left(&route) else {
                break;
            };
            // Half of what is left, so that one silent endpoint leaves time for others.
            let another = (!self.is_last(service)).then_some(left / 2);
            if !self.tried.is_empty() {
                self.count_retry(failure.reason);
            }
            self.head_for(service, &route, endpoint);
            let outstanding = self.worker.balancer.enter(endpoint);
            let attempt = async {
                if outbound::is_own_listener(self.pod, &mesh, endpoint) {
                    return Err(Reason::OwnListener.into());
                }
                let told = |progress| self.progress.borrow_mut().push(progress);
                let way = Way {
                    route: &route,
                    source: self.asked.source,
                    destination: endpoint,
                    within: another,
                };
                outbound::connect(self.worker, self.pod, &way, data, told).await
            };
            let mut attempt = pin!(attempt);
            let mut connected = timeout(another.unwrap_or(left), &mut attempt).await;
            if let Some(half) = another
                && connected.is_err()
                && data.is_at_peer()
            {
                // It can't be given to another endpoint before this one's agent, which has the same
                // limit, has said that it has given it to nobody.
                connected = timeout(left.saturating_sub(half), attempt).await;
            }
            match connected.unwrap_or(Err(Reason::ConnectTimeout.into())) {
                Ok(server) => {
                    self.worker.balancer.reached(service, &self.asked, endpoint);
                    return Ok((server, outstanding));
                }
                Err(failed) if data.allows_no_other_try() => return Err(failed),
                Err(failed) => {
                    tracing::debug!(
                        service = service.host, %endpoint, reason = %failed.reason,
                        "an endpoint failed, another is tried",
                    );
                    failure = failed;
                    self.tried.push(endpoint);
                }
            }
        }
        Err(failure)
    }

    /// How long the next attempt may take. `None` when nothing is left.
    fn left(&self, route: &Route) -> Option<Duration> {
        let settings = &self.pod.workload().settings;
        let whole = match route {
            Route::Mesh(_) | Route::Neighbour(..) => settings.mesh_connect_timeout,
            Route::Plain(..) => settings.connect_timeout,
        };
        whole.checked_sub(self.began.elapsed())
    }

    /// Whether no endpoint will be left after the next attempt.
    fn is_last(&self, service: &Service) -> bool {
        let asked = self.asked.destination;
        let targets = service
            .port(asked.port())
            .map_or(0, |port| port.targets(asked.is_ipv4()).len());
        self.tried.len() + 1 >= targets.min(MAX_ENDPOINTS)
    }

    /// The endpoint before failed, and another one is about to be tried: what its agent counts as
    /// a connection is one here too, where only the last one is recorded.
    fn count_retry(&self, reason: Reason) {
        if let Some((labels, _)) = &self.labels {
            self.worker.series.borrow_mut().retried(labels, reason);
        }
    }

    /// Names what is being tried, for the record.
    fn head_for(&mut self, service: &Arc<Service>, route: &Route, endpoint: SocketAddr) {
        self.progress.take();
        self.endpoint = Some(endpoint);
        let service = Some(Arc::clone(service));
        self.labels = Some(outbound::labels(
            self.pod,
            route,
            service,
            &self.asked,
            endpoint,
        ));
    }

    /// The record of the connection. `None` where there was no endpoint to try.
    fn record(&mut self) -> Option<Record> {
        let (labels, ends) = self.labels.take()?;
        let record = Record::open(self.worker, self.pod, &labels, &ends);
        if let Some(endpoint) = self.endpoint {
            let progress = self.progress.take().into_iter();
            progress.for_each(|progress| progress.tell(&record, endpoint));
        }
        Some(record)
    }
}

impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        // A record that is dropped says that its connection was cut.
        drop(self.record());
    }
}
