//! How the ends of a relay end: which of them failed, and how a reset of the one is told to the other.

use std::{
    future::pending,
    io,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason as H2Reason, SendStream};
use malla_common::Reason;
use tokio::{io::Interest, net::TcpStream, task::yield_now};

use crate::{proxy::record::Record, steer::was_found_gone, telemetry::Failure};

/// How one end of a relay failed.
#[derive(Debug)]
pub(in crate::proxy) enum End {
    /// The client's side.
    Client(io::Error),
    /// The server's side.
    Server(io::Error),
    /// No byte moved for too long.
    Idle,
    /// The tunnel that carried it is gone.
    Tunnel,
}

impl From<End> for Failure {
    fn from(end: End) -> Self {
        match end {
            End::Client(error) => Self::new(Reason::ClientReset, &error),
            End::Server(error) => Self::new(Reason::ServerReset, &error),
            End::Idle => Reason::IdleTimeout.into(),
            End::Tunnel => Reason::TunnelLost.into(),
        }
    }
}

/// Which end of the connection a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::proxy) enum Side {
    Client,
    Server,
}

impl Side {
    pub(super) fn failed(self, error: io::Error) -> End {
        match self {
            Self::Client => End::Client(error),
            Self::Server => End::Server(error),
        }
    }

    /// For an array of both.
    pub(super) fn index(self) -> usize {
        usize::from(self == Self::Server)
    }

    pub(super) fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// Counts bytes that this side sent.
    pub(super) fn sent(self, records: &[&Record], bytes: usize) {
        for record in records {
            match self {
                Self::Client => record.client_sent(bytes),
                Self::Server => record.server_sent(bytes),
            }
        }
    }
}

/// How far the direction is that comes out of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    /// The stream is read, which tells of its end.
    Flows,
    /// Nobody reads the stream, since the socket takes nothing.
    Stalls,
    Ended,
}

/// Resets a stream for its socket, behind what was sent. RFC 9113 §8.5: an error of the TCP connection is
/// a stream error of this type.
pub(in crate::proxy) async fn reset_behind(send: &mut SendStream<Bytes>) {
    // A reset takes the place of what waits to be sent. The tunnel, which was woken before this task
    // will be, sends first what its peer has room for.
    yield_now().await;
    reset(send);
}

pub(super) fn reset(send: &mut SendStream<Bytes>) {
    send.send_reset(H2Reason::CONNECT_ERROR);
}

/// Returns when the socket, which is this `side`, has been reset. Not when its app was found gone: what the
/// app said before is still to be moved, and reading on tells what comes behind it.
pub(super) async fn reset_of(socket: &TcpStream, side: Side) -> End {
    match over(socket, side).await {
        Err(end) => end,
        Ok(()) => pending().await,
    }
}

/// Returns when the socket, which is this `side` and has said all it had to say, has been reset, or its app
/// was found gone: then it takes nothing more, and whatever it said arrives as if nobody had asked.
pub(super) async fn over(socket: &TcpStream, side: Side) -> Result<(), End> {
    // Fails only with the runtime.
    let _ = socket.ready(Interest::ERROR).await;
    if was_found_gone(socket) {
        return Ok(());
    }
    // The kernel calls it EPIPE where the peer's FIN came first.
    Err(side.failed(io::Error::from_raw_os_error(libc::ECONNRESET)))
}

/// Whether the peer has reset the stream, where nobody hears of it by reading it.
pub(super) fn poll_reset(
    cx: &mut Context<'_>,
    send: &mut SendStream<Bytes>,
    side: Side,
    receiving: Receiving,
) -> Poll<Result<(), End>> {
    if receiving == Receiving::Flows {
        return Poll::Pending;
    }
    send.poll_reset(cx).map(|told| match told {
        Ok(reason) => was_reset(reason, side.other()),
        Err(error) => stream_ended(&error, side.other()),
    })
}

/// How the peer ended a stream early: without an error when it wants no more of it (RFC 9113
/// §8.1), as a failure of the far side, or with the tunnel.
pub(super) fn stream_ended(error: &h2::Error, far: Side) -> Result<(), End> {
    match error.reason() {
        Some(reason) if error.is_reset() => was_reset(reason, far),
        _ => Err(End::Tunnel),
    }
}

fn was_reset(reason: H2Reason, far: Side) -> Result<(), End> {
    if reason == H2Reason::NO_ERROR {
        return Ok(());
    }
    let error = io::Error::new(io::ErrorKind::ConnectionReset, reason.description());
    Err(far.failed(error))
}
