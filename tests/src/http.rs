//! One GET, enough for an agent's metrics, probes and configuration.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};

/// What a server answered.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// Asks for `path` from the calling thread's network namespace. `limit` holds for the connection
/// and for each read.
pub fn get(address: SocketAddr, path: &str, limit: Duration) -> Result<Response> {
    let asked = || {
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        exchange(stream, path)
    };
    asked().with_context(|| format!("GET http://{address}{path}"))
}

/// Asks for `path` on a unix socket. `limit` holds for each read.
pub fn get_unix(socket: &Path, path: &str, limit: Duration) -> Result<Response> {
    let asked = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        exchange(stream, path)
    };
    asked().with_context(|| format!("GET {path} at {}", socket.display()))
}

fn exchange(mut stream: impl Read + Write, path: &str) -> Result<Response> {
    // With HTTP/1.0 the body is never chunked and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nhost: agent\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without an end of its head")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok(Response {
        status: status.context("an answer without status")?,
        body: body.to_owned(),
    })
}
