//! The requests of httpGet probes.

use bytes::{Bytes, BytesMut};
use malla_common::Reason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::tcp::{ReadHalf, WriteHalf},
};

use crate::telemetry::Failure;

/// Most bytes that the head of a request may have.
const LONGEST_HEAD: usize = 16 * 1024;
/// Most fields that it may have.
const MOST_FIELDS: usize = 64;

/// Fields by which a request has a body, or turns its connection into one of something else.
const FORBIDDEN: [&str; 2] = ["transfer-encoding", "upgrade"];

/// It isn't a declared request.
#[derive(Debug, PartialEq, Eq)]
struct Undeclared;

/// The requests that a client sends, as long as each is a declared one.
pub(super) struct Heads {
    /// How they begin.
    lines: Vec<String>,
    read: BytesMut,
}

impl Heads {
    pub(super) fn new<'a>(targets: impl Iterator<Item = &'a str>) -> Self {
        Self {
            lines: targets.map(request_line).collect(),
            read: BytesMut::new(),
        }
    }

    /// The next one, byte for byte. None at the end of what the client sends.
    pub(super) async fn next(
        &mut self,
        client: &mut ReadHalf<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        loop {
            match length(&self.read, &self.lines) {
                Ok(Some(length)) => return Ok(Some(self.read.split_to(length).freeze())),
                Ok(None) if self.read.len() < LONGEST_HEAD => {}
                Ok(None) | Err(Undeclared) => return Err(Reason::ProbeUndeclared.into()),
            }
            let read = client.read_buf(&mut self.read).await;
            match read.map_err(|error| Failure::new(Reason::ClientReset, &error))? {
                0 if self.read.is_empty() => return Ok(None),
                0 => return Err(Reason::ProbeUndeclared.into()),
                _ => {}
            }
        }
    }
}

/// Sends a request on to the app.
pub(super) async fn send(app: &mut WriteHalf<'_>, head: &[u8]) -> Result<(), Failure> {
    let sent = app.write_all(head).await;
    sent.map_err(|error| Failure::new(Reason::ServerReset, &error))
}

/// Tells the app that no more requests come.
pub(super) async fn finish(app: &mut WriteHalf<'_>) -> Result<(), Failure> {
    let ended = app.shutdown().await;
    ended.map_err(|error| Failure::new(Reason::ServerReset, &error))
}

/// How the request for a target begins.
fn request_line(target: &str) -> String {
    format!("GET {target} HTTP/1.")
}

/// How long the request is that `bytes` begin with, which must begin as one of `lines` and have no
/// body. None where its end hasn't come yet.
fn length(bytes: &[u8], lines: &[String]) -> Result<Option<usize>, Undeclared> {
    // As far as it has come: nobody waits for the end of what is another one.
    let is_begun = |line: &String| {
        let common = line.len().min(bytes.len());
        line.as_bytes()[..common] == bytes[..common]
    };
    if !lines.iter().any(is_begun) {
        return Err(Undeclared);
    }
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(bytes).map_err(|_| Undeclared)?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let is_forbidden = |field: &httparse::Header<'_>| {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        FORBIDDEN.into_iter().any(is) || is("content-length") && field.value != b"0"
    };
    if request.headers.iter().any(is_forbidden) {
        return Err(Undeclared);
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(bytes: &[u8]) -> Result<Option<usize>, Undeclared> {
        super::length(bytes, &["/healthz", "/h?x=1"].map(request_line))
    }

    #[test]
    fn a_get_of_a_declared_target_passes_and_ends_with_its_head() {
        for request in [
            "GET /healthz HTTP/1.1\r\nHost: 10.1.0.2:8080\r\nUser-Agent: kube-probe/1.34\r\n\
             Accept: */*\r\nConnection: close\r\n\r\n",
            "GET /h?x=1 HTTP/1.0\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        ] {
            let all = request.len();
            assert_eq!(length(request.as_bytes()), Ok(Some(all)));
            let followed = format!("{request}POST /admin HTTP/1.1\r\n\r\n");
            assert_eq!(length(followed.as_bytes()), Ok(Some(all)));
            for end in 0..all {
                assert_eq!(length(&request.as_bytes()[..end]), Ok(None), "{end}");
            }
        }
    }

    #[test]
    fn nothing_else_passes() {
        for request in [
            "POST /healthz HTTP/1.1\r\n\r\n",
            "HEAD /healthz HTTP/1.1\r\n\r\n",
            "get /healthz HTTP/1.1\r\n\r\n",
            "GET /healthz?x=1 HTTP/1.1\r\n\r\n",
            "GET /h HTTP/1.1\r\n\r\n",
            "GET /healthz/ HTTP/1.1\r\n\r\n",
            "GET /healthz/../admin HTTP/1.1\r\n\r\n",
            "GET /%68ealthz HTTP/1.1\r\n\r\n",
            "GET http://10.1.0.2/healthz HTTP/1.1\r\n\r\n",
            "GET * HTTP/1.1\r\n\r\n",
            "GET  /healthz HTTP/1.1\r\n\r\n",
            "GET /healthz HTTP/2.0\r\n\r\n",
            "GET /healthz\r\n\r\n",
            "\r\nGET /healthz HTTP/1.1\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
            "GET /healthz HTTP/1.1\r\ncontent-length:0, 5\r\n\r\nhello",
            "GET /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
            "GET /healthz HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "\0\0\0\0",
            "\u{16}\u{3}\u{1}\u{2}\0",
        ] {
            assert_eq!(length(request.as_bytes()), Err(Undeclared), "{request:?}");
        }
    }

    #[test]
    fn a_wrong_target_is_refused_before_the_head_has_ended() {
        for begun in [&b"GET /a"[..], b"GET /healthz/", b"hello", b"\0"] {
            assert_eq!(length(begun), Err(Undeclared));
        }
    }
}
