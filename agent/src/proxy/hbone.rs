//! HBONE, as Istio's ztunnel speaks it: what stands in a CONNECT and in the HTTP/2 settings.

use std::{fmt::Write, net::SocketAddr, time::Duration};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{FORWARDED, HeaderName},
    uri::{Authority, Uri},
};
use malla_common::Reason;

use super::buffers::MAX_CHUNK;
use crate::model::Workload;

/// What stands before a frame's payload (RFC 9113 §4.1).
pub(super) const FRAME_HEAD: u32 = 9;
/// What a stream may be sent before its reader has read: two of the largest chunks, since what is left
/// of a window would be a frame of its own.
pub(super) const STREAM_WINDOW: u32 = 2 * MAX_CHUNK;
/// Room for every stream's, so that streams that nobody reads stop no other, however many they are.
pub(super) const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;
pub(super) const MAX_FRAME: u32 = 1024 * 1024;
pub(super) const MAX_HEADERS: u32 = 64 * 1024;
/// What waits in the agent for a stream to send, beyond what was read from its socket last.
pub(super) const MAX_SEND_BUFFER: usize = 256 * 1024;
/// Streams that a peer may have open in one tunnel: what a tunnel costs in memory is shared by as many, and
/// h2's table of them, which doubles, is full then. ztunnel takes 200.
pub(super) const MAX_STREAMS: u32 = 256;
/// Refused and reset streams that are remembered for a second: data may be on its way to each, and where one isn't
/// known any more h2 takes that for a fault, of which it counts no more than 1,024.
pub(super) const MAX_RESET_STREAMS: usize = 1024;
/// Streams that this agent opens in one tunnel whose peer takes as many.
pub(super) const MAX_OWN_STREAMS: usize = MAX_STREAMS as usize;
/// Streams that this agent opens before a peer has said how many it takes (RFC 9113 §6.5.2 recommends that
/// a peer takes no fewer).
pub(super) const FIRST_STREAMS: usize = 100;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// An agent that answers with this takes data that comes with a CONNECT, before its answer, and keeps
/// to [`CONNECT_WITHIN`]. A boolean (RFC 9651 §3.3.6); the word is that of
/// draft-ietf-httpbis-optimistic-upgrade.
const OPTIMISTIC_DATA: HeaderName = HeaderName::from_static("malla-optimistic-data");
const TRUE: HeaderValue = HeaderValue::from_static("?1");
/// How long the server may take to accept, in milliseconds, before the client goes another way: an
/// integer (RFC 9651 §3.3.1). A number that isn't one is as none.
const CONNECT_WITHIN: HeaderName = HeaderName::from_static("malla-connect-within");

/// Why a request isn't carried: what is told to the peer, and the word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub reason: Reason,
}

/// The CONNECT that opens a tunnel to `destination` for `client`, a connection of `source`. The peer is
/// told when another destination will be tried.
pub(super) fn connect(
    source: &Workload,
    client: SocketAddr,
    destination: SocketAddr,
    within: Option<Duration>,
) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    let mut parts = http::uri::Parts::default();
    // An address and port are an authority by RFC 3986.
    parts.authority = Authority::try_from(destination.to_string()).ok();
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    let headers = request.headers_mut();
    insert(headers, BAGGAGE, &baggage(source));
    insert(headers, FORWARDED, &format!("for=\"{client}\""));
    insert(headers, TRACEPARENT, &traceparent());
    if let Some(within) = within {
        insert(headers, CONNECT_WITHIN, &within.as_millis().to_string());
    }
    request
}

/// The time that the server has to accept, where the peer has said one.
pub(super) fn within<B>(request: &Request<B>) -> Option<Duration> {
    let said = request.headers().get(CONNECT_WITHIN)?.to_str().ok()?;
    said.parse().ok().map(Duration::from_millis)
}

/// The answer to a CONNECT whose server is connected.
pub(super) fn connected(tells_of_optimistic_data: bool) -> Response<()> {
    let mut response = Response::new(());
    if tells_of_optimistic_data {
        response.headers_mut().insert(OPTIMISTIC_DATA, TRUE);
    }
    response
}

/// Whether the peer that has answered so takes data before its answer.
pub(super) fn takes_optimistic_data<B>(response: &Response<B>) -> bool {
    response.headers().get(OPTIMISTIC_DATA) == Some(&TRUE)
}

/// A header is left out where a workload's name doesn't fit in one.
fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Who sends, for the peer's telemetry.
fn baggage(source: &Workload) -> String {
    format!(
        "k8s.namespace.name={},k8s.pod.name={}",
        source.id.namespace, source.id.name
    )
}

/// W3C Trace Context: a trace of this connection alone, not sampled.
fn traceparent() -> String {
    let mut text = String::with_capacity(55);
    // Writing to a string can't fail.
    let _ = write!(
        text,
        "00-{:032x}-{:016x}-00",
        fastrand::u128(1..),
        fastrand::u64(1..)
    );
    text
}

/// The address that a request asks to be connected to.
pub(super) fn destination<B>(request: &Request<B>) -> Result<SocketAddr, Refusal> {
    let bad = Refusal {
        status: StatusCode::BAD_REQUEST,
        reason: Reason::BadRequest,
    };
    if request.method() != Method::CONNECT {
        return Err(bad);
    }
    // A host name or an authority without a port doesn't parse: there are no Services to look up.
    let authority = request.uri().authority().ok_or(bad)?;
    authority.as_str().parse::<SocketAddr>().map_err(|_| bad)
}

/// What is told to the peer when the app can't be reached.
pub(super) const UNREACHABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::model::{Probes, Settings, WorkloadId};

    fn web() -> Workload {
        Workload {
            id: WorkloadId {
                namespace: "emojivoto".into(),
                name: "web-1".into(),
            },
            identity: Arc::new(
                "spiffe://cluster.local/ns/emojivoto/sa/web"
                    .parse()
                    .unwrap(),
            ),
            node: "a".into(),
            netns: None,
            addresses: vec![],
            ports: vec![],
            probes: Probes::default(),
            labels: vec![],
            meshed: true,
            ready: true,
            serving: true,
            settings: Settings::default(),
        }
    }

    #[test]
    fn a_connect_has_an_authority_and_ztunnels_headers() {
        for (destination_, authority) in [
            ("10.1.0.2:8080", "10.1.0.2:8080"),
            ("[fd00::2]:80", "[fd00::2]:80"),
        ] {
            let client = "10.0.0.1:40000".parse().unwrap();
            let request = connect(&web(), client, destination_.parse().unwrap(), None);
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri().authority().unwrap().as_str(), authority);
            assert_eq!(request.uri().scheme(), None);
            assert_eq!(request.headers()["forwarded"], "for=\"10.0.0.1:40000\"");
            assert_eq!(
                request.headers()["baggage"],
                "k8s.namespace.name=emojivoto,k8s.pod.name=web-1"
            );
            assert_eq!(request.headers()["traceparent"].len(), 55);
            assert_eq!(
                destination(&request).unwrap(),
                destination_.parse().unwrap()
            );
        }
    }

    #[test]
    fn what_is_not_a_connect_to_an_address_and_port_is_refused() {
        let request = |method: Method, uri: &str| {
            Request::builder().method(method).uri(uri).body(()).unwrap()
        };
        assert!(destination(&request(Method::GET, "http://10.0.0.1:80/")).is_err());
        for uri in ["web.ns.svc:80", "10.0.0.1", "host:80"] {
            let refusal = destination(&request(Method::CONNECT, uri)).unwrap_err();
            assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            assert_eq!(refusal.reason, Reason::BadRequest);
        }
    }
}
