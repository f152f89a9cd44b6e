//! A tunnel from another agent: its handshakes, and the life of each connection in it.

use std::{
    cell::Cell,
    future::poll_fn,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Request, Response, StatusCode};
use malla_common::Reason;
use rustls::{Side as TlsSide, pki_types::CertificateDer};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Beginning, dial};
use crate::{
    identity::{peer_identity, reason_of},
    ledger::{Accounted, Kind},
    model::SpiffeId,
    proxy::{
        canonical,
        coalesce::{Coalescing, Flusher, coalescing},
        cut::{self, Cause},
        handshakes, hbone,
        pod::{Admitted, PodContext},
        record::{Ends, Record},
        relay::{Side, Tunnelled},
        tunnel,
        tunnels::{OpenTunnel, Stream, TunnelState},
        witness,
        worker::{Live, Worker},
    },
    steer::{DialStock, ExpectedDial},
    telemetry::{ConnectionLabels, Direction, Security},
};

/// A tunnel from another agent, with all connections in it.
pub(in crate::proxy) async fn serve_mesh(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    socket: Accounted<TcpStream>,
) {
    let (Ok(peer), Ok(local)) = (socket.peer_addr(), socket.local_addr()) else {
        return;
    };
    let (peer, local) = (canonical(peer), canonical(local));
    if worker.witnesses().accept(pod.pod.id, peer, local) {
        return witness::hold(socket).await;
    }
    let Some(admitted) = pod.admit() else {
        return worker.refuse(Direction::Inbound, peer, local, Reason::ConnectionLimit);
    };
    let shaken = shake_hands(&worker, &pod, socket, peer).await;
    worker.metrics().handshake(
        Direction::Inbound,
        shaken.as_ref().map(|_| ()).map_err(|reason| *reason),
    );
    let (identity, chain, connection) = match shaken {
        Ok(shaken) => shaken,
        Err(reason) => return worker.refuse(Direction::Inbound, peer, local, reason),
    };
    let identity = Arc::new(identity);
    let known = Arc::clone(&identity);
    let (state, listed) = TunnelState::open(&worker, Direction::Inbound, pod.pod.id, peer, known);
    let tunnel = Rc::new(InboundTunnel {
        worker,
        pod,
        peer,
        local,
        identity,
        state,
        cause: Cause::default(),
        told_of_optimistic_data: Cell::new(false),
        dials: Rc::default(),
    });
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    let serving = Rc::clone(&tunnel).serve(connection, (guard, admitted, listed));
    let Some(task) = tunnel.pod.spawn(serving) else {
        return;
    };
    let InboundTunnel {
        worker, pod, cause, ..
    } = &*tunnel;
    cut::when_revoked(worker, pod, (peer, chain), task, cause, ended);
}

type Tls = tokio_rustls::server::TlsStream<tunnel::Socket>;

/// An HTTP/2 connection and what sends its writes.
struct Connection {
    http: h2::server::Connection<Coalescing<Tls>, Bytes>,
    flusher: Flusher<Tls>,
}

type Chain = Vec<CertificateDer<'static>>;

async fn shake_hands(
    worker: &Rc<Worker>,
    pod: &Rc<PodContext>,
    socket: Accounted<TcpStream>,
    peer: SocketAddr,
) -> Result<(SpiffeId, Chain, Connection), Reason> {
    let _slot = worker
        .handshakes
        .begin(pod.pod.id, peer.ip())
        .ok_or(Reason::HandshakeLimit)?;
    let config = worker
        .certificates()
        .server_config(&pod.workload().identity)
        .map_err(|_| Reason::NoIdentity)?;
    let handshake = async {
        let mut tls = TlsAcceptor::from(config)
            .accept(tunnel::Socket::new(socket))
            .await
            .map_err(|error| reason_of(&error, TlsSide::Server))?;
        let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let chain = certificates.to_vec();
        let identity = peer_identity(certificates).map_err(|_| Reason::ForeignTrustDomain)?;
        // An address that discovery knows belongs to one workload: nobody else speaks from it.
        if let Some(workload) = worker.mesh().workload_at(peer.ip())
            && *workload.identity != identity
        {
            return Err(Reason::IdentityMismatch);
        }
        let (socket, session) = tls.get_mut();
        socket.turn_into(Kind::TunnelInbound);
        session.set_buffer_limit(Some(tunnel::WRITE_BUFFER));
        let (stream, flusher) = coalescing(tls);
        let opening = h2::server::Builder::new()
            .initial_window_size(hbone::STREAM_WINDOW)
            .initial_connection_window_size(hbone::CONNECTION_WINDOW)
            .max_frame_size(hbone::MAX_FRAME)
            .max_header_list_size(hbone::MAX_HEADERS)
            .max_send_buffer_size(hbone::MAX_SEND_BUFFER)
            .max_concurrent_streams(hbone::MAX_STREAMS)
            .max_concurrent_reset_streams(hbone::MAX_RESET_STREAMS)
            .handshake(stream);
        tokio::pin!(opening);
        let http = flusher
            .after(|cx| opening.as_mut().poll(cx))
            .await
            .map_err(|_| Reason::ProtocolError)?;
        Ok((identity, chain, Connection { http, flusher }))
    };
    timeout(handshakes::TIMEOUT, handshake)
        .await
        .unwrap_or(Err(Reason::HandshakeTimeout))
}

/// What is known of a tunnel, and so of each connection in it.
struct InboundTunnel {
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    peer: SocketAddr,
    local: SocketAddr,
    identity: Arc<SpiffeId>,
    state: Rc<TunnelState>,
    cause: Cause,
    /// Whether the peer was told that it may send data before an answer.
    told_of_optimistic_data: Cell<bool>,
    dials: Rc<DialStock>,
}

impl InboundTunnel {
    /// Serves its connections until its end, which dropping what is `held` tells.
    async fn serve(
        self: Rc<Self>,
        mut connection: Connection,
        held: (DropGuard, Admitted, OpenTunnel),
    ) {
        let _held = held;
        let _live = self.worker.count_live();
        let _open = self.worker.metrics().tunnel_opened(Direction::Inbound);
        let entry = self
            .worker
            .inbound_tunnels
            .enter(self.pod.pod.id, self.peer.ip());
        let silent = tunnel::unanswered(connection.http.ping_pong());
        let Connection { http, flusher } = &mut connection;
        tokio::pin!(silent);
        loop {
            let turn = |cx: &mut Context<'_>| {
                entry.load.took_turn();
                http.poll_accept(cx)
            };
            let accepted = tokio::select! {
                biased;
                accepted = flusher.after(turn) => accepted,
                // Said once. The peer opens another tunnel for its next streams, which the kernel
                // gives to another worker, and this one ends with its last stream.
                () = entry.load.told_to_leave() => {
                    http.graceful_shutdown();
                    continue;
                }
                () = &mut silent => {
                    tracing::info!(peer = %self.peer, "a tunnel's peer is silent");
                    return;
                }
            };
            match accepted {
                Some(Ok((request, respond))) => {
                    self.pod.spawn(Rc::clone(&self).carry(request, respond));
                    if self.pod.is_leaving() || self.worker.is_leaving() {
                        // Its peer hadn't heard of that yet.
                        http.graceful_shutdown();
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(peer = %self.peer, %error, "a tunnel broke");
                    return;
                }
                None => return,
            }
        }
    }

    /// One connection: check, dial, answer, relay, record.
    fn carry(
        self: Rc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
    ) -> impl Future<Output = ()> {
        // As with what an app opens, which see.
        let expected = self.dials.expect();
        let opening = Box::pin(self.open(request, respond, expected));
        async move {
            let mut opened = opening.await;
            if let Some(opened) = &mut opened {
                opened.carry().await;
            }
        }
    }

    /// None: it was refused, or has failed, and that is recorded and answered.
    async fn open(
        self: Rc<Self>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        expected: ExpectedDial,
    ) -> Option<Opened> {
        let live = self.worker.count_live();
        let stream = self.state.stream();
        let destination = match self.destination(&request) {
            Ok(destination) => destination,
            Err(refusal) => {
                self.refuse(refusal.reason);
                answer(&mut respond, refusal.status);
                return None;
            }
        };
        let Some(admitted) = self.pod.admit() else {
            self.refuse(Reason::ConnectionLimit);
            answer(&mut respond, hbone::UNREACHABLE);
            return None;
        };
        let workload = self.pod.workload();
        let labels = ConnectionLabels {
            direction: Direction::Inbound,
            reporter: Arc::clone(&workload),
            remote: self.worker.mesh().workload_at(self.peer.ip()).cloned(),
            service: None,
            target_port: destination.port(),
            security: Security::MutualTls(Arc::clone(&self.identity)),
        };
        let ends = Ends {
            client: self.peer,
            destination: self.local,
            tunnelled: Some(destination),
        };
        let record = Record::open(&self.worker, &self.pod, &labels, &ends);
        let within = hbone::within(&request);
        let mut receive = request.into_body();
        let said = here(&mut receive, &mut respond).await;
        let mut opening = Beginning {
            within,
            said,
            is_last: receive.is_end_stream(),
            expected: Some(expected),
            ..Beginning::default()
        };
        let dialled = dial(
            &self.worker,
            &self.pod,
            self.peer,
            destination,
            &mut opening,
        )
        .await;
        let server = match dialled {
            Ok(server) => server,
            Err(error) => {
                answer(&mut respond, hbone::UNREACHABLE);
                record.close(Err(error.reason()));
                return None;
            }
        };
        record.dialled();
        record.client_sent(opening.sent);
        // Fails only for a stream that has ended, which the next read tells.
        let _ = receive.flow_control().release_capacity(opening.sent);
        // A peer that has gone another way meanwhile has reset the stream: the app hears nothing of it.
        let answer = hbone::connected(!self.told_of_optimistic_data.get());
        let Ok(send) = respond.send_response(answer, false) else {
            record.close(Err(self.cause.reason()));
            return None;
        };
        self.told_of_optimistic_data.set(true);
        Some(Opened {
            server,
            rest: (!opening.said.is_empty()).then(|| Box::new(opening.said)),
            send,
            receive,
            record,
            tunnel: self,
            _counted: (admitted, stream, live),
        })
    }

    fn refuse(&self, reason: Reason) {
        self.worker
            .refuse(Direction::Inbound, self.peer, self.local, reason);
    }

    /// The address to dial: the pod's own, and never a listener of the agent.
    fn destination(&self, request: &Request<RecvStream>) -> Result<SocketAddr, hbone::Refusal> {
        let destination = canonical(hbone::destination(request)?);
        if !self.pod.pod.owns(destination.ip()) {
            let (status, reason) = (StatusCode::BAD_REQUEST, Reason::WrongDestination);
            return Err(hbone::Refusal { status, reason });
        }
        if self.pod.pod.listener_ports.contains(destination.port()) {
            let (status, reason) = (hbone::UNREACHABLE, Reason::OwnListener);
            return Err(hbone::Refusal { status, reason });
        }
        Ok(destination)
    }
}

/// A connection through a tunnel whose app is connected: all that is kept of it while it is relayed.
struct Opened {
    server: Accounted<TcpStream>,
    /// What came with the CONNECT and wasn't sent yet: hardly ever anything.
    rest: Option<Box<Bytes>>,
    send: SendStream<Bytes>,
    receive: RecvStream,
    record: Record,
    tunnel: Rc<InboundTunnel>,
    _counted: (Admitted, Stream, Live),
}

impl Opened {
    /// Moves bytes until both directions have ended.
    async fn carry(&mut self) {
        let Self {
            server,
            rest,
            send,
            receive,
            record,
            tunnel,
            ..
        } = self;
        let buffers = &tunnel.worker.buffers;
        let idle = record.pod().workload().settings.idle_timeout;
        let (server, stream) = ((Side::Server, &**server), (send, receive));
        let result = Tunnelled::new(buffers, record, server, stream, rest.take(), idle)
            .await
            .map_err(|end| tunnel.cause.of(end));
        record.close(result);
    }
}

/// What came with a CONNECT, as far as it is here; nothing where its peer has reset the stream since.
async fn here(receive: &mut RecvStream, respond: &mut SendResponse<Bytes>) -> Bytes {
    let is_reset = poll_fn(|cx| Poll::Ready(respond.poll_reset(cx).is_ready())).await;
    if is_reset || receive.flow_control().used_capacity() == 0 {
        return Bytes::new();
    }
    receive
        .data()
        .await
        .and_then(Result::ok)
        .unwrap_or_default()
}

/// Answers without a tunnel. Fails only when the peer is gone, and then there is nobody to tell.
fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let _ = respond.send_response(response, true);
}
