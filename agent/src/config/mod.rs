//! `/config`: what the agent now believes, as JSON on a unix socket.
//!
//! Read-only, like the admin endpoint, whose paths are there too. What it tells is asked of the
//! agent's main task for each request: `document` has its shape, `sections` fills it.

mod acceleration;
mod document;
mod probes;
mod sections;
mod services;
mod socket;

use std::{
    convert::Infallible, io, os::unix::net::UnixListener as StdListener, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    ledger::{Accounted, Entry, Kind},
    telemetry::{Admin, Role, only_get, serve_http, text},
};

pub use document::{Audit, AuditDifference, Document, WholeAudit};
pub use sections::{Carried, MeshStatus, Sections, certificates};
pub use services::services;
pub use socket::{Folder, NAME as SOCKET_NAME};

/// Requests that may wait for the agent.
const QUEUE: usize = 8;
/// How long one may wait: the agent may be enrolling many pods.
const PATIENCE: Duration = Duration::from_secs(20);

/// Wants a document.
pub type Request = oneshot::Sender<Document>;

/// Asks the agent.
#[derive(Debug, Clone)]
pub struct Asker(mpsc::Sender<Request>);

/// A queue of requests for the agent.
pub fn requests() -> (Asker, mpsc::Receiver<Request>) {
    let (asker, requests) = mpsc::channel(QUEUE);
    (Asker(asker), requests)
}

/// Serves `/config` and the admin endpoint's paths until dropped. Returns only with an error, if the
/// listener can't be used.
pub async fn serve(
    listener: Accounted<StdListener>,
    asker: Asker,
    admin: &Admin,
) -> io::Result<Infallible> {
    let (_entry, listener) = listener.into_parts();
    let listener = UnixListener::from_std(listener)?;
    let listener = Arc::new(listener);
    let accept = || {
        let listener = Arc::clone(&listener);
        async move {
            let (stream, _client) = listener.accept().await?;
            Ok((Entry::new(&stream, 0, Kind::Admin), stream))
        }
    };
    let failed = |error: &io::Error| admin.metrics().accept_error(Role::Admin, error);
    let admin = admin.clone();
    let answer = move |method: Method, path: String| {
        let (asker, admin) = (asker.clone(), admin.clone());
        async move {
            match (path.as_str(), method) {
                ("/config", Method::GET) => asker.answer().await,
                ("/config", _) => only_get(),
                (path, method) => admin.answer(&method, path),
            }
        }
    };
    Ok(serve_http(accept, failed, answer).await)
}

impl Asker {
    async fn answer(&self) -> Response<Full<Bytes>> {
        let (request, document) = oneshot::channel();
        let asked = async {
            self.0.send(request).await.ok()?;
            document.await.ok()
        };
        match timeout(PATIENCE, asked).await {
            Ok(Some(document)) => json(&document),
            Ok(None) => text(StatusCode::SERVICE_UNAVAILABLE, "the agent is ending\n"),
            Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "the agent is busy\n"),
        }
    }
}

fn json(document: &Document) -> Response<Full<Bytes>> {
    match serde_json::to_vec_pretty(document) {
        Ok(mut body) => {
            body.push(b'\n');
            let mut response = text(StatusCode::OK, body);
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        Err(error) => {
            tracing::error!(%error, "the configuration can't be written");
            text(StatusCode::INTERNAL_SERVER_ERROR, "see the log\n")
        }
    }
}
