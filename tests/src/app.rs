//! An app in a pod, made of a closure.

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

use crate::{pod::Pod, wait::until};

/// How long an app waits for a client, and for each byte.
const LIMIT: Duration = Duration::from_secs(20);

/// An app that serves as many connections as it was told, each on a thread of its own.
#[derive(Debug)]
pub struct App<T> {
    thread: JoinHandle<Result<Vec<T>>>,
}

impl<T: Send + 'static> App<T> {
    /// Listens on a port of the pod, for IPv4 and IPv6. Reads and writes time out after 20 s.
    pub fn start(
        pod: &Pod,
        port: u16,
        connections: usize,
        serve: impl Fn(TcpStream) -> T + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = pod.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
        let listener = listener.with_context(|| format!("listening on port {port}"))?;
        listener.set_nonblocking(true)?;
        let serve = Arc::new(serve);
        let thread = thread::spawn(move || {
            let mut serving = Vec::new();
            for _ in 0..connections {
                let stream = accept(&listener)?;
                let serve = Arc::clone(&serve);
                serving.push(thread::spawn(move || serve(stream)));
            }
            let results = serving.into_iter().map(JoinHandle::join);
            results
                .map(|result| result.map_err(|_| anyhow!("an app panicked")))
                .collect()
        });
        Ok(Self { thread })
    }

    /// Waits until every connection is served: what the closure gave for each, in the order in
    /// which they came.
    pub fn results(self) -> Result<Vec<T>> {
        self.thread
            .join()
            .map_err(|_| anyhow!("an app panicked"))
            .flatten()
    }
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let accepted = until("a client of an app", LIMIT, || match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        accepted => Some(accepted),
    })?;
    let (stream, _) = accepted.context("accepting a client")?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}
