//! The requests of grpc probes: gRPC's health checking protocol, over HTTP/2 without TLS.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use h2::{
    Reason as H2Reason, RecvStream, SendStream,
    client::{self, SendRequest},
    server::{self, SendResponse},
};
use http::{Method, Request, Response};
use malla_common::Reason;
use tokio::{net::TcpStream, time::timeout};

use super::{PATIENCE, Probed};
use crate::{model::Ask, steer::end_orderly, telemetry::Failure};

/// The one method that passes.
const CHECK: &str = "/grpc.health.v1.Health/Check";
/// Most bytes of an answer: a status is a handful.
const LONGEST_ANSWER: usize = 64 * 1024;
const LONGEST_HEADERS: u32 = 16 * 1024;

impl Probed<'_> {
    /// Carries health checks. Each is read and asked anew, on a connection of its own, so that nothing
    /// else of what the client says reaches the app.
    pub(super) async fn carry_check(&self, client: &mut TcpStream) -> Result<(), Failure> {
        let messages = self.asked().filter_map(|ask| match ask {
            Ask::Grpc { service } => Some(message(service)),
            Ask::HttpGet { .. } | Ask::TcpSocket => None,
        });
        let messages: Vec<Bytes> = messages.collect();
        if messages.is_empty() {
            return Err(Reason::ProbeUndeclared.into());
        }
        let opening = async {
            let mut builder = server::Builder::new();
            builder.max_concurrent_streams(1);
            builder.max_header_list_size(LONGEST_HEADERS);
            let mut http = builder.handshake::<_, Bytes>(&mut *client).await.ok()?;
            let first = http.accept().await?;
            Some((http, first))
        };
        let opened = timeout(PATIENCE, opening).await.ok().flatten();
        let (mut http, first) = opened.ok_or(Reason::ProbeUndeclared)?;
        let mut next = Some(first);
        while let Some(accepted) = next {
            let (request, mut respond) = accepted.map_err(|_| Reason::ClientReset)?;
            tokio::select! {
                biased;
                checked = self.check(request, &mut respond, &messages) => checked?,
                _ = poll_fn(|cx| http.poll_closed(cx)) => return Err(Reason::ClientReset.into()),
            }
            next = http.accept().await;
        }
        drop(http);
        end_orderly(client);
        Ok(())
    }

    async fn check(
        &self,
        request: Request<RecvStream>,
        respond: &mut SendResponse<Bytes>,
        messages: &[Bytes],
    ) -> Result<(), Failure> {
        let (head, mut body) = request.into_parts();
        if head.method != Method::POST || head.uri.path_and_query().is_none_or(|p| p != CHECK) {
            return Err(Reason::ProbeUndeclared.into());
        }
        let longest = messages.iter().map(Bytes::len).max().unwrap_or_default();
        let asked = timeout(PATIENCE, collect(&mut body, longest)).await;
        let asked = asked
            .ok()
            .flatten()
            .filter(|asked| messages.contains(asked));
        let asked = asked.ok_or(Reason::ProbeUndeclared)?;
        let mut server = self.dial().await?;
        {
            let handshake = client::handshake(&mut *server);
            let (requests, connection) = handshake.await.map_err(|error| servers(&error))?;
            let exchange = async {
                let (answer, mut send) = ask(requests, Request::from_parts(head, ())).await?;
                self.record.client_sent(asked.len());
                send.send_data(asked, true)?;
                self.answer(answer.await?, respond).await
            };
            let exchanged = tokio::select! {
                biased;
                exchanged = exchange => exchanged,
                ended = connection => Err(ended.err().unwrap_or(H2Reason::NO_ERROR.into())),
            };
            exchanged.map_err(|error| servers(&error))?;
        }
        end_orderly(&*server);
        Ok(())
    }

    /// Hands the app's answer on.
    async fn answer(
        &self,
        answer: Response<RecvStream>,
        respond: &mut SendResponse<Bytes>,
    ) -> Result<(), h2::Error> {
        let (head, mut body) = answer.into_parts();
        let ends = body.is_end_stream();
        let mut send = respond.send_response(Response::from_parts(head, ()), ends)?;
        if ends {
            return Ok(());
        }
        let mut length = 0;
        while let Some(chunk) = body.data().await.transpose()? {
            length += chunk.len();
            if length > LONGEST_ANSWER {
                return Err(H2Reason::ENHANCE_YOUR_CALM.into());
            }
            body.flow_control().release_capacity(chunk.len())?;
            self.record.server_sent(chunk.len());
            send.send_data(chunk, false)?;
        }
        match body.trailers().await? {
            Some(trailers) => send.send_trailers(trailers),
            None => send.send_data(Bytes::new(), true),
        }
    }
}

async fn ask(
    requests: SendRequest<Bytes>,
    request: Request<()>,
) -> Result<(client::ResponseFuture, SendStream<Bytes>), h2::Error> {
    requests.ready().await?.send_request(request, false)
}

fn servers(error: &h2::Error) -> Failure {
    match error.get_io() {
        Some(error) => Failure::new(Reason::ServerReset, error),
        None => Reason::ProtocolError.into(),
    }
}

/// The whole of a body. None where it is longer than `longest`, or breaks.
async fn collect(body: &mut RecvStream, longest: usize) -> Option<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.ok()?;
        if whole.len() + chunk.len() > longest {
            return None;
        }
        whole.extend_from_slice(&chunk);
    }
    Some(whole.freeze())
}

/// The body of a check of `service`: one message, not compressed, of one field where it isn't empty
/// (`string service = 1`).
fn message(service: &str) -> Bytes {
    const SERVICE: u8 = 1 << 3 | 2;
    let mut field = Vec::new();
    if !service.is_empty() {
        field.push(SERVICE);
        let mut length = service.len();
        while length > 0x7f {
            field.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
            length >>= 7;
        }
        field.push(u8::try_from(length).unwrap_or_default());
        field.extend_from_slice(service.as_bytes());
    }
    let mut message = vec![0];
    message.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(field);
    message.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_the_message_that_protobuf_makes_of_it() {
        assert_eq!(message(""), &b"\0\0\0\0\0"[..]);
        assert_eq!(message("db"), &b"\0\0\0\0\x04\x0a\x02db"[..]);
        let long = message(&"x".repeat(300));
        assert_eq!(long[..8], *b"\0\0\0\x01\x2f\x0a\xac\x02");
        assert_eq!(long.len(), 5 + 1 + 2 + 300);
    }
}
