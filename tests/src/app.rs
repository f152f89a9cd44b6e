//! An app in a pod, made of a closure.

use std::{
    io::{self, ErrorKind},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

use crate::{pod::Pod, wait::eventually};

/// How often an app looks for a client.
const PAUSE: Duration = Duration::from_millis(2);

/// How long an app waits for a byte, or for room to write one.
const STREAM_LIMIT: Duration = Duration::from_secs(20);

/// How long [`App::results`] waits.
const RESULTS_LIMIT: Duration = Duration::from_secs(30);

/// An app that serves as many connections as it was told, each on a thread of its own. Dropping it
/// ends its listening.
#[derive(Debug)]
pub struct App<T> {
    thread: Option<JoinHandle<Result<Vec<T>>>>,
    stop: Arc<AtomicBool>,
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
        let (serve, stop) = (Arc::new(serve), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut serving = Vec::new();
            while serving.len() < connections {
                let Some(stream) = accept(&listener, &stopped)? else {
                    return Err(anyhow!("the app was stopped"));
                };
                let serve = Arc::clone(&serve);
                serving.push(thread::spawn(move || serve(stream)));
            }
            let results = serving.into_iter().map(JoinHandle::join);
            results
                .map(|result| result.map_err(|_| anyhow!("the app panicked")))
                .collect()
        });
        Ok(Self {
            thread: Some(thread),
            stop,
        })
    }

    /// Waits until every connection is served: what the closure gave for each, in the order in
    /// which they came.
    pub fn results(mut self) -> Result<Vec<T>> {
        let thread = self.thread.take().context("the app has ended")?;
        let all_served = || thread.is_finished();
        eventually("all connections of an app", RESULTS_LIMIT, all_served)?;
        thread.join().map_err(|_| anyhow!("the app panicked"))?
    }
}

impl<T> Drop for App<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The next client. None when the app is stopped.
fn accept(listener: &TcpListener, stop: &AtomicBool) -> io::Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(STREAM_LIMIT))?;
                stream.set_write_timeout(Some(STREAM_LIMIT))?;
                return Ok(Some(stream));
            }
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}
