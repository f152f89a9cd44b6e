//! Answering HTTP requests one a connection, so that no client can hold the agent.
//!
//! Headers have a time limit, a connection has one too, and when [`MAX_CONNECTIONS`] are open the
//! oldest makes room for the newest. So a probe is answered however many slow clients there are.

use std::{collections::VecDeque, convert::Infallible, io, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::ledger::Entry;

/// Open connections of one listener at most.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// Limit for a request's headers to arrive.
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Limit for a connection's whole life: a scrape of 100 MB at 30 Mbit/s.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause after `accept` failed, which it does at once again while descriptors are used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Gives what `answer` says of a method and path to each client that `accept` yields, until dropped;
/// open connections end with it. `failed` hears of errors of `accept`.
pub async fn serve<S, A, F>(
    accept: impl Fn() -> A,
    failed: impl Fn(&io::Error),
    answer: impl Fn(Method, String) -> F + Clone + Send + 'static,
) -> Infallible
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Future<Output = io::Result<(Entry, S)>>,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut by_age = VecDeque::<AbortHandle>::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    failed(&error);
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
        by_age.push_back(connections.spawn(serve_connection(accepted, answer.clone())));
    }
}

async fn serve_connection<S, F>(
    (_entry, stream): (Entry, S),
    answer: impl Fn(Method, String) -> F + Send + 'static,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method().clone(), request.uri().path().to_owned());
        async move { Ok::<_, Infallible>(answer.await) }
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

/// An answer of plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}
