//! The agent's read-only HTTP endpoint: `/metrics`, `/ready`, `/live`.
//!
//! Nothing here changes state or shows configuration. It stands on the node's address, where
//! anybody may connect: [`super::http`] keeps clients from holding it.

use std::{convert::Infallible, io, net::TcpListener as StdListener, sync::Arc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use http::{
    HeaderValue, Method, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use tokio::net::TcpListener;

use super::{
    Metrics, Readiness, Role,
    http::{serve, text},
};
use crate::ledger::{Accounted, Entry, Kind};

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the endpoint tells.
#[derive(Debug, Clone)]
pub struct Admin {
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

impl Admin {
    pub fn new(metrics: Arc<Metrics>, readiness: Readiness) -> Self {
        Self { metrics, readiness }
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Serves `listeners` until dropped; open connections end with it. Returns only with an error,
    /// if a listener can't be used.
    pub async fn serve(&self, listeners: Vec<StdListener>) -> io::Result<Infallible> {
        let serving = listeners
            .into_iter()
            .map(|listener| self.clone().serve_one(listener));
        try_join_all(serving).await?;
        // Without a listener there is nothing to do, and no reason to end the agent.
        std::future::pending().await
    }

    async fn serve_one(self, listener: StdListener) -> io::Result<Infallible> {
        listener.set_nonblocking(true)?;
        let listener = Accounted::new(TcpListener::from_std(listener)?, 0, Kind::Admin);
        let listener = Arc::new(listener);
        let accept = || {
            let listener = Arc::clone(&listener);
            async move {
                let (stream, _client) = listener.accept().await?;
                Ok((Entry::new(&stream, 0, Kind::Admin), stream))
            }
        };
        let failed = |error: &io::Error| self.metrics.accept_error(Role::Admin, error);
        let told = self.clone();
        let answer =
            move |method: Method, path: String| std::future::ready(told.answer(&method, &path));
        Ok(serve(accept, failed, answer).await)
    }

    /// The whole of the endpoint's behaviour.
    pub fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if !matches!(path, "/metrics" | "/ready" | "/live") {
            return text(StatusCode::NOT_FOUND, "not found\n");
        }
        if method != Method::GET {
            return only_get();
        }
        match path {
            "/live" => text(StatusCode::OK, "live\n"),
            "/ready" => {
                let pending = self.readiness.pending();
                if pending.is_empty() {
                    text(StatusCode::OK, "ready\n")
                } else {
                    text(StatusCode::SERVICE_UNAVAILABLE, pending.join("\n") + "\n")
                }
            }
            _ => match self.metrics.scrape() {
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
}

/// What any other method is answered.
pub fn only_get() -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    let headers = response.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static("GET"));
    response
}

#[cfg(test)]
mod tests;
