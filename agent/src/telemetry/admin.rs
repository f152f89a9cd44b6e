//! The agent's read-only HTTP endpoint: `/metrics`, `/ready`, `/live`.
//!
//! Nothing here changes state or shows configuration. It stands on the node's address, where
//! anybody may connect, so no client can hold it: headers have a time limit, a connection carries
//! one request and has a time limit too, and when [`MAX_CONNECTIONS`] are open the oldest makes
//! room for the newest. So a probe is answered however many slow clients there are.

use std::{
    collections::VecDeque, convert::Infallible, io, net::TcpListener as StdListener, sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::try_join_all;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};

use super::{Metrics, Readiness, Role};

/// Open connections of one listener at most.
const MAX_CONNECTIONS: usize = 64;

/// Limit for a request's headers to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Limit for a connection's whole life: a scrape of 100 MB at 30 Mbit/s.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause after `accept` failed, which it does at once again while descriptors are used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves `listeners` until dropped; open connections end with it. Returns only with an error, if
/// a listener can't be used.
pub async fn serve(
    listeners: Vec<StdListener>,
    metrics: Arc<Metrics>,
    readiness: Readiness,
) -> io::Result<Infallible> {
    let shared = Arc::new(Shared { metrics, readiness });
    let serving = listeners.into_iter().map(|listener| {
        let shared = Arc::clone(&shared);
        async move {
            listener.set_nonblocking(true)?;
            serve_one(TcpListener::from_std(listener)?, shared).await
        }
    });
    try_join_all(serving).await?;
    // Without a listener there is nothing to do, and no reason to end the agent.
    std::future::pending().await
}

#[derive(Debug)]
struct Shared {
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

async fn serve_one(listener: TcpListener, shared: Arc<Shared>) -> io::Result<Infallible> {
    let mut connections = JoinSet::new();
    let mut by_age = VecDeque::<AbortHandle>::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _client)) => stream,
                Err(error) => {
                    shared.metrics.accept_error(Role::Admin, &error);
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_ended) = connections.join_next() => {
                by_age.retain(|connection| !connection.is_finished());
                continue;
            }
        };
        if by_age.len() >= MAX_CONNECTIONS
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        by_age.push_back(connections.spawn(serve_connection(stream, Arc::clone(&shared))));
    }
}

async fn serve_connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &shared);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "admin connection failed"),
        Err(_elapsed) => tracing::debug!("admin connection took too long"),
    }
}

/// The whole of the endpoint's behaviour.
fn answer(method: &Method, path: &str, shared: &Shared) -> Response<Full<Bytes>> {
    if !matches!(path, "/metrics" | "/ready" | "/live") {
        return text(StatusCode::NOT_FOUND, "not found\n");
    }
    if method != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        let headers = response.headers_mut();
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    match path {
        "/live" => text(StatusCode::OK, "live\n"),
        "/ready" => {
            let pending = shared.readiness.pending();
            if pending.is_empty() {
                text(StatusCode::OK, "ready\n")
            } else {
                text(StatusCode::SERVICE_UNAVAILABLE, pending.join("\n") + "\n")
            }
        }
        _ => match shared.metrics.scrape() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                let headers = response.headers_mut();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
                response
            }
            Err(error) => {
                tracing::error!(%error, "metrics can't be written");
                text(StatusCode::INTERNAL_SERVER_ERROR, "see the log\n")
            }
        },
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests;
