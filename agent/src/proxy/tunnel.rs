//! One tunnel: an HTTP/2 connection over mutual TLS, seen from the side that opens streams.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{
    Reason as H2Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{Request, StatusCode};
use malla_common::Reason;
use rustls::{Side, pki_types::ServerName};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{
    coalesce::coalescing,
    cut::{self, Cause},
    handshakes, hbone,
    optimistic::OptimisticData,
    pod::PodContext,
    read_ahead::ReadAhead,
    relay::End,
    tunnels::{Stream, TunnelState},
    worker::Worker,
};
use crate::{
    identity::reason_of,
    ledger::{Accounted, Entry, Kind},
    model::{SpiffeId, ports},
    steer::{end_orderly, to_network},
    telemetry::{Direction, Failure},
};

/// What was sent into a tunnel is acknowledged within this time, or its peer is gone.
pub(super) const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// What of a tunnel's bytes waits encrypted for its socket, and so what one write has. With rustls'
/// 64 KiB each write filled a segment of that size and put the records' overhead into a second one.
pub(super) const WRITE_BUFFER: usize = 256 * 1024;
/// A PING this long after the last one's answer, and how long its answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a peer may take to answer a CONNECT beyond its own limit for reaching the app.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A tunnel that streams can be opened in.
pub(super) struct Tunnel {
    requests: SendRequest<Bytes>,
    state: Rc<TunnelState>,
    /// Fewer streams than the peer said, where it has refused one.
    refused_above: Cell<usize>,
    idle_since: Cell<Instant>,
    ended: CancellationToken,
    cause: Cause,
    /// The peer takes no new streams (GOAWAY), while old ones may go on.
    closing: Cell<bool>,
    /// The peer has said that it takes data that comes before its answer.
    takes_optimistic_data: Cell<bool>,
    /// When the first stream was opened that nothing has been heard since.
    asked: Cell<Option<Instant>>,
}

/// A tunnel that a request has waited in for so long is sent no more data before an answer: where the
/// peer is gone, its connections can still go another way, which an app that was perhaps heard can't.
const ANSWERS_WITHIN: Duration = Duration::from_millis(100);

/// A stream's place in its tunnel.
pub(super) struct Lease {
    tunnel: Rc<Tunnel>,
    _stream: Stream,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.tunnel.idle_since.set(Instant::now());
    }
}

/// A stream whose peer was asked to connect the app.
pub(super) struct Requested {
    lease: Lease,
    response: ResponseFuture,
    send: SendStream<Bytes>,
    awaits_data: bool,
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenError {
    /// Nothing came of the request: another tunnel may carry it.
    Again(Reason),
    Failed(Failure),
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Again(reason) => reason.into(),
            OpenError::Failed(failure) => failure,
        }
    }
}

impl Tunnel {
    /// A place for one more stream, up to `first` of them as long as the peer may not have said how many
    /// it takes. None when the tunnel is full, or takes no more.
    pub(super) fn lease(self: &Rc<Self>, first: usize) -> Option<Lease> {
        let limit = match self.max_streams() {
            said if said > hbone::FIRST_STREAMS => said.min(hbone::MAX_OWN_STREAMS),
            said => said.min(first),
        };
        let limit = limit.min(self.refused_above.get());
        if self.is_ended() || self.state.streams.get() >= limit {
            return None;
        }
        Some(Lease {
            tunnel: Rc::clone(self),
            _stream: self.state.stream(),
        })
    }

    /// How many streams the peer allows, once its SETTINGS have come; before that, [`hbone::FIRST_STREAMS`].
    pub(super) fn max_streams(&self) -> usize {
        self.requests.current_max_send_streams()
    }

    /// Whether a stream may be sent data before its answer.
    fn may_take_data(&self) -> bool {
        let owes = |since: Instant| since.elapsed() >= ANSWERS_WITHIN;
        self.takes_optimistic_data.get() && !self.asked.get().is_some_and(owes)
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended.is_cancelled() || self.closing.get()
    }

    /// Whether no stream has used it for `limit`.
    pub(super) fn is_unused_for(&self, limit: Duration) -> bool {
        self.state.streams.get() == 0 && self.idle_since.get().elapsed() >= limit
    }
}

impl Lease {
    /// Opens a stream: it takes its place behind those that were opened before.
    pub(super) fn request(self, request: Request<()>) -> Result<Requested, OpenError> {
        let mut requests = self.tunnel.requests.clone();
        match requests.send_request(request, false) {
            Ok((response, send)) => {
                let tunnel = &self.tunnel;
                let awaits_data = tunnel.may_take_data();
                if tunnel.asked.get().is_none() {
                    tunnel.asked.set(Some(Instant::now()));
                }
                Ok(Requested {
                    lease: self,
                    response,
                    send,
                    awaits_data,
                })
            }
            Err(error) => {
                self.tunnel.closing.set(true);
                Err(self.unanswered(&error))
            }
        }
    }

    /// A request without an answer. Without one no byte was sent either, but for optimistic data, so it
    /// is safe to ask again where the tunnel is lost; a stream may be refused before anything is done
    /// (RFC 9113 §8.7).
    fn unanswered(&self, error: &h2::Error) -> OpenError {
        if !error.is_reset() {
            return OpenError::Again(self.tunnel.cause.reason());
        }
        if error.reason() != Some(H2Reason::REFUSED_STREAM) {
            return OpenError::Failed(Reason::PeerRefused.into());
        }
        // This stream still counts, and all above the peer's limit are refused one by one.
        let others = self.tunnel.state.streams.get() - 1;
        self.tunnel.refused_above.set(others);
        if others == 0 {
            self.tunnel.closing.set(true);
        }
        OpenError::Again(Reason::PeerRefused)
    }

    /// The same of a request that data may have gone with.
    fn without_answer(&self, error: &h2::Error, data: &OptimisticData<'_>) -> OpenError {
        // A stream above the last one that a GOAWAY names was not processed (RFC 9113 §6.8).
        let is_unprocessed = error.is_remote()
            && (error.is_go_away() || error.reason() == Some(H2Reason::REFUSED_STREAM));
        if is_unprocessed {
            data.came_back();
        }
        match self.unanswered(error) {
            OpenError::Again(reason) if data.is_at_peer() => OpenError::Failed(reason.into()),
            error => error,
        }
    }

    /// How a connection in this place failed.
    pub(super) fn failed(&self, end: End) -> Failure {
        self.tunnel.cause.of(end)
    }
}

impl Requested {
    /// Waits for the peer's word that the app is connected. All that was taken from the client is sent
    /// then, before it where the peer takes it.
    pub(super) async fn answered(
        self,
        data: &OptimisticData<'_>,
    ) -> Result<(Lease, SendStream<Bytes>, RecvStream), OpenError> {
        let Self {
            lease,
            mut response,
            mut send,
            mut awaits_data,
        } = self;
        let answered = poll_fn(|cx| {
            // First, so that it leaves in one record with the CONNECT.
            if awaits_data && data.poll(cx).is_ready() {
                // Once: what an app says later than the tunnel owes answers waits as well.
                awaits_data = false;
                if data.kept().is_empty()
                    && let Some(failure) = data.failure()
                {
                    return Poll::Ready(Err(failure));
                }
                if lease.tunnel.may_take_data() {
                    data.send(&mut send);
                }
            }
            Pin::new(&mut response).poll(cx).map(Ok)
        });
        let response = match timeout(ANSWER_TIMEOUT, answered).await {
            Ok(answered) => answered
                .map_err(OpenError::Failed)?
                .map_err(|error| lease.without_answer(&error, data))?,
            Err(_) => return Err(OpenError::Failed(Reason::ConnectTimeout.into())),
        };
        let tunnel = &lease.tunnel;
        tunnel.asked.set(None);
        if response.status() != StatusCode::OK {
            data.came_back();
            tracing::debug!(status = %response.status(), "the peer refused a CONNECT");
            return Err(OpenError::Failed(Reason::PeerRefused.into()));
        }
        if hbone::takes_optimistic_data(&response) {
            tunnel.takes_optimistic_data.set(true);
        }
        data.send(&mut send);
        Ok((lease, send, response.into_body()))
    }
}

/// Opens a tunnel from `pod` to the mesh port of `destination`, which must prove to be `expected`.
pub(super) async fn open(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    destination: IpAddr,
    expected: &SpiffeId,
) -> Result<Rc<Tunnel>, Failure> {
    let workload = pod.workload();
    let config = worker
        .certificates()
        .client_config(&workload.identity, expected)
        .map_err(|_| Reason::NoIdentity)?;
    let address = SocketAddr::new(destination, ports::MESH);
    let limit = workload.settings.mesh_connect_timeout;
    let socket = to_network(&pod.pod, address, limit)
        .await
        .map_err(|error| error.reason())?
        .turned_into(Kind::Handshake);

    let handshake = async {
        let name = ServerName::IpAddress(destination.into());
        let mut tls = TlsConnector::from(config)
            .connect(name, Socket::new(socket))
            .await
            .map_err(|error| reason_of(&error, Side::Client))?;
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let chain = chain.to_vec();
        let (socket, session) = tls.get_mut();
        socket.turn_into(Kind::TunnelOutbound);
        session.set_buffer_limit(Some(WRITE_BUFFER));
        let (stream, flusher) = coalescing(tls);
        let (requests, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(hbone::STREAM_WINDOW)
            .initial_connection_window_size(hbone::CONNECTION_WINDOW)
            .max_frame_size(hbone::MAX_FRAME)
            .max_header_list_size(hbone::MAX_HEADERS)
            .max_send_buffer_size(hbone::MAX_SEND_BUFFER)
            .max_concurrent_reset_streams(hbone::MAX_RESET_STREAMS)
            .initial_max_send_streams(hbone::FIRST_STREAMS)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(|error| match reason_of(&error, Side::Client) {
                Reason::TlsFailed => Reason::ProtocolError,
                precise => precise,
            })?;
        Ok((requests, connection, flusher, chain))
    };
    let shaken = match timeout(handshakes::TIMEOUT, handshake).await {
        Ok(shaken) => shaken,
        Err(_) => Err(Reason::HandshakeTimeout),
    };
    worker.metrics().handshake(
        Direction::Outbound,
        shaken.as_ref().map(|_| ()).map_err(|reason| *reason),
    );
    let (requests, mut connection, flusher, chain) = shaken?;

    let ended = CancellationToken::new();
    let pings = connection.ping_pong();
    let open = worker.metrics().tunnel_opened(Direction::Outbound);
    let identity = Arc::new(expected.clone());
    let (state, listed) =
        TunnelState::open(worker, Direction::Outbound, pod.pod.id, address, identity);
    let guard = ended.clone().drop_guard();
    let task = pod.spawn(async move {
        let _ended = guard;
        let _open = (open, listed);
        tokio::select! {
            biased;
            result = flusher.after(|cx| Pin::new(&mut connection).poll(cx)) => if let Err(error) = result {
                tracing::debug!(%error, peer = %address, "a tunnel broke");
            },
            () = unanswered(pings) => tracing::info!(peer = %address, "a tunnel's peer is silent"),
        }
    });
    let task = task.ok_or(Reason::Withdrawn)?;
    let cause = Cause::default();
    cut::when_revoked(worker, pod, (address, chain), task, &cause, ended.clone());
    Ok(Rc::new(Tunnel {
        requests,
        state,
        refused_above: Cell::new(usize::MAX),
        idle_since: Cell::new(Instant::now()),
        ended,
        cause,
        closing: Cell::new(false),
        takes_optimistic_data: Cell::new(false),
        asked: Cell::new(None),
    }))
}

/// Asks the peer again and again; returns when it doesn't answer in time.
pub(super) async fn unanswered(pings: Option<h2::PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection is gone, which its own task notices.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// The socket of a tunnel: read in large pieces, and closed in good order, since what ends with it
/// has been told to each stream.
pub(super) struct Socket {
    entry: Entry,
    stream: ReadAhead<TcpStream>,
}

impl Socket {
    pub(super) fn new(stream: Accounted<TcpStream>) -> Self {
        let (entry, stream) = stream.into_parts();
        end_orderly(&stream);
        // The reader is an agent, which always reads. Fails only where the kernel is too old for it.
        let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(USER_TIMEOUT));
        let stream = ReadAhead::new(stream);
        Self { entry, stream }
    }

    /// What it is for from now on.
    pub(super) fn turn_into(&mut self, kind: Kind) {
        self.entry.turn_into(kind);
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream.stream).poll_shutdown(cx)
    }
}
