//! Lines over TCP: a request is one line, its answer is one that begins with `OK` or `ERROR`.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};

/// How long an end waits for the other one.
const LIMIT: Duration = Duration::from_secs(10);

/// The longest line, in bytes.
const LONGEST: u64 = 16 * 1024;

/// Answers requests on `port`, a thread for each connection, until the process ends.
pub(crate) fn serve(
    port: u16,
    answer: impl Fn(&str) -> Result<String> + Send + Sync + 'static,
) -> Result<()> {
    // Dual stack: IPv4 clients come as IPv4-mapped addresses.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .with_context(|| format!("listening on port {port}"))?;
    let answer = Arc::new(answer);
    loop {
        // A client that has gone before it was accepted is no reason to end.
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        let answer = Arc::clone(&answer);
        thread::spawn(move || {
            if let Err(error) = serve_connection(stream, &*answer) {
                eprintln!("a connection ended: {error}");
            }
        });
    }
}

fn serve_connection(
    stream: TcpStream,
    answer: &(impl Fn(&str) -> Result<String> + ?Sized),
) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut requests = BufReader::new(stream);
    while let Some(request) = read_line(&mut requests)? {
        let line = match answer(&request) {
            Ok(text) => format!("OK {text}\n"),
            Err(error) => format!("ERROR {error:#}\n"),
        };
        requests.get_mut().write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Sends one request over a connection of its own. An `ERROR` of the service is an error here.
pub(crate) fn ask(service: SocketAddr, request: &str) -> Result<String> {
    let exchange = || -> io::Result<Option<String>> {
        let mut stream = TcpStream::connect_timeout(&service, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        read_line(&mut BufReader::new(stream))
    };
    let line = exchange().with_context(|| format!("asking {service}"))?;
    let line = line.with_context(|| format!("{service} closed without an answer"))?;
    match line.split_once(' ') {
        Some(("OK", text)) => Ok(text.to_owned()),
        Some(("ERROR", text)) => bail!("{text}"),
        _ => bail!("{service} answered `{line}`"),
    }
}

/// The next line without its end; `None` where the other side has finished.
fn read_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    stream.by_ref().take(LONGEST).read_line(&mut line)?;
    match line.strip_suffix('\n') {
        Some(whole) => Ok(Some(whole.to_owned())),
        None if line.is_empty() => Ok(None),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
