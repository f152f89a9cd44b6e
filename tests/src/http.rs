//! One GET, enough for an agent's metrics and probes.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
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
    let context = || format!("GET http://{address}{path}");
    let mut stream = TcpStream::connect_timeout(&address, limit).with_context(context)?;
    stream.set_read_timeout(Some(limit))?;
    // With HTTP/1.0 the body is never chunked and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").with_context(context)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(context)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without an end of its head")
        .with_context(context)?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok(Response {
        status: status
            .context("an answer without status")
            .with_context(context)?,
        body: body.to_owned(),
    })
}
