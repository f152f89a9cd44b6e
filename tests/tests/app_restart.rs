//! An app that is restarted while clients go on calling. Where it takes its port without
//! `SO_REUSEADDR`, a socket of the agent that has the port in the pod's netns is in its way.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use malla_testbed::{Fate, PATIENCE, PORT, Pair, Pod, Way, eventually, say};
use socket2::{Domain, SockRef, Socket, Type};

const RESTARTS: usize = 20;
const CALLERS: usize = 8;
/// The last connection's end takes microseconds, and a busy machine some slices of time.
const AT_ONCE: Duration = Duration::from_millis(200);

/// A server that serves its connections to their end before it goes.
struct App {
    listener: Arc<TcpListener>,
    threads: Vec<JoinHandle<()>>,
}

impl App {
    fn start(pod: &Pod, reuse: bool) -> io::Result<Self> {
        let listener = Arc::new(bind(pod, Ipv6Addr::UNSPECIFIED.into(), reuse)?);
        let serve_all = |listener: Arc<TcpListener>| {
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    // The client tells what went wrong, where that matters.
                    let _ = serve(stream);
                }
            }
        };
        let threads = (0..CALLERS).map(|_| thread::spawn(serve_all(Arc::clone(&listener))));
        Ok(Self {
            threads: threads.collect(),
            listener,
        })
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// Takes the port of a pod's app.
fn bind(pod: &Pod, address: IpAddr, reuse: bool) -> io::Result<TcpListener> {
    let address = SocketAddr::new(address, PORT);
    pod.enter(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(reuse)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        Ok(socket.into())
    })
}

/// Answers one byte, and ends when the client has.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)
}

/// Asks one byte, and ends first.
fn ask(way: Way, to: SocketAddr) -> io::Result<()> {
    let mut stream = way.dial(to)?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    stream.shutdown(Shutdown::Write)?;
    let length = stream.read(&mut [0])?;
    assert_eq!(length, 0);
    Ok(())
}

/// Starts an app as soon as it gets its port, and gives how long that took.
fn start_again(pod: &Pod, reuse: bool) -> io::Result<(App, Duration)> {
    let began = Instant::now();
    loop {
        match App::start(pod, reuse) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && began.elapsed() < PATIENCE => {}
            started => return started.map(|app| (app, began.elapsed())),
        }
    }
}

/// Restarts an app under load again and again, and gives how long at most its port was taken.
fn restart_under_load(way: Way, reuse: bool) -> Duration {
    let pair = Pair::new(way).unwrap();
    let addresses = pair.addresses(PORT);
    let (answered, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let call = || {
        for turn in 0.. {
            if done.load(Ordering::Relaxed) {
                return;
            }
            // Between two lives of the app nobody answers.
            if ask(way, addresses[turn % addresses.len()]).is_ok() {
                answered.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let restart = |app: App| -> anyhow::Result<(App, Duration)> {
        let before = answered.load(Ordering::Relaxed);
        let served = || answered.load(Ordering::Relaxed) > before + 100;
        eventually("answers", PATIENCE, served)?;
        drop(app);
        Ok(start_again(&pair.server, reuse)?)
    };
    let app = App::start(&pair.server, reuse).unwrap();
    let longest = thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| pair.client.enter(call));
        }
        let restarted = (0..RESTARTS).try_fold((app, Duration::ZERO), |(app, longest), _| {
            let (app, took) = restart(app)?;
            anyhow::Ok((app, longest.max(took)))
        });
        done.store(true, Ordering::Relaxed);
        restarted.map(|(_, longest)| longest)
    });
    let longest = longest.unwrap();
    println!("{way:?}, SO_REUSEADDR {reuse}: at most {longest:?}");
    longest
}

/// Restarts an app whose port is free whenever it has ended.
fn an_app_takes_its_port_at_once(way: Way, reuse: bool) {
    let longest = restart_under_load(way, reuse);
    assert!(longest < AT_ONCE, "{way:?}: {longest:?}");
}

#[test]
fn an_app_whose_clients_are_meshed_takes_its_port_at_once() {
    for way in [Way::Direct, Way::Mesh, Way::RandomPorts] {
        an_app_takes_its_port_at_once(way, false);
    }
}

#[test]
fn an_app_with_so_reuseaddr_takes_its_port_at_once() {
    for way in [Way::Direct, Way::Mesh, Way::FromUnmeshed] {
        an_app_takes_its_port_at_once(way, true);
    }
}

/// The agent has each of those calls, on the app's port in the app's netns, until it knows that
/// nobody serves it.
#[test]
fn an_app_whose_clients_call_in_plaintext_takes_its_port_between_their_calls() {
    restart_under_load(Way::FromUnmeshed, false);
}

/// The agent's end of such a connection has the other pod's address, but this pod's port.
#[test]
fn a_port_that_a_pod_has_connections_to_is_free_at_the_pods_address_or_with_so_reuseaddr() {
    let pair = Pair::new(Way::Mesh).unwrap();
    let _app = pair.server.echo(PORT).unwrap();
    for to in pair.addresses(PORT) {
        let mut stream = pair.dial(to).unwrap();
        assert_eq!(say(&mut stream, b"hello"), Fate::Echoed);
        let any = Ipv6Addr::UNSPECIFIED.into();
        let taken = bind(&pair.client, any, false).unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);
        bind(&pair.client, any, true).unwrap();
        for own in pair.client.addresses() {
            bind(&pair.client, *own, false).unwrap();
        }
        drop(stream);
        let free = || bind(&pair.client, any, false).is_ok();
        eventually("the port to be free again", PATIENCE, free).unwrap();
    }
}
