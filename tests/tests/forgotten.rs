//! What an app has said before it closed reaches who reads late, when the app's kernel has forgotten the
//! closed socket long since (tcp(7), `tcp_fin_timeout`) and answers whoever asks for it with a reset.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{self, ErrorKind, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{PATIENCE, PORT, Pair, Pod, PodSpec, Testbed, Way, accept, listen, payload};

/// The app's kernel forgets its socket after 1 s, agents ask for it 10 to 30 s later, and say of a stream that
/// nothing comes any more 30 s after its end.
const PAUSE: Duration = Duration::from_secs(45);
/// So long nothing moves any more where all on the way have taken what they can.
const FULL: Duration = Duration::from_millis(500);
/// What the reader's kernel takes, what waits in an agent or two, and more than all on the way take: its
/// rest waits in the kernel of who has closed, which doesn't forget it then.
const AMOUNTS: [usize; 6] = [100_000, 300_000, 1_000_000, 2_000_000, 4_000_000, 1 << 30];
const SEED: u64 = 7;

/// Writes what is taken, and fails where nothing has been for long.
struct Filling<'a> {
    to: &'a TcpStream,
    written: usize,
}

impl Write for Filling<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            match self.to.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && began.elapsed() < FULL => {
                    thread::sleep(Duration::from_millis(5));
                }
                written => {
                    self.written += written.as_ref().map_or(0, |written| *written);
                    return written;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an app reads late of another that has closed.
struct Late {
    what: String,
    reader: TcpStream,
    said: usize,
}

/// Says a few bytes or as many as are taken, and closes.
fn say_and_close(what: String, says: TcpStream, reader: TcpStream, most: usize) -> Late {
    says.set_nonblocking(true).unwrap();
    let mut filling = Filling {
        to: &says,
        written: 0,
    };
    let sent = payload::send(&mut filling, SEED, most);
    let said = filling.written;
    assert_eq!(said == most, sent.is_ok());
    println!("{what}: {said}");
    drop(says);
    Late { what, reader, said }
}

/// Connections of two pods, of each of which one side has closed.
fn close_each_side(way: &str, client: &Pod, server: &Pod, to: SocketAddr) -> Vec<Late> {
    for pod in [client, server] {
        let forgets = [("ipv4/tcp_fin_timeout", "1")];
        pod.netns().sysctls(&forgets).unwrap();
    }
    let listener = listen(server, to.port()).unwrap();
    let connect = || {
        let connected = client.connect((to.ip(), to.port())).unwrap();
        let accepted = accept(&listener).unwrap();
        connected.set_read_timeout(Some(PATIENCE)).unwrap();
        (connected, accepted)
    };
    let close = |most| {
        let (connected, accepted) = connect();
        let by_client = format!("{way}: the client says {most}");
        let by_client = say_and_close(by_client, connected, accepted, most);
        let (connected, accepted) = connect();
        let by_server = format!("{way}: the server says {most}");
        [
            by_client,
            say_and_close(by_server, accepted, connected, most),
        ]
    };
    AMOUNTS.into_iter().flat_map(close).collect()
}

#[test]
fn what_an_app_said_before_it_closed_reaches_who_reads_when_its_kernel_has_forgotten_it() {
    let ways = [Way::Direct, Way::Mesh, Way::ToUnmeshed, Way::FromUnmeshed];
    let pairs = ways.map(|way| Pair::new(way).unwrap());
    let of_pair = |pair: &Pair| {
        let way = format!("{:?}", pair.way);
        close_each_side(&way, &pair.client, &pair.server, pair.address(PORT))
    };
    let mut late: Vec<Late> = pairs.iter().flat_map(of_pair).collect();

    let mut bed = Testbed::new("forgotten").unwrap();
    let node = bed.node("a").unwrap();
    let [client, server] =
        ["client", "server"].map(|name| bed.pod(&node, PodSpec::new(name)).unwrap());
    bed.start_agents().unwrap();
    let to = (server.v4(), PORT).into();
    late.extend(close_each_side("one node", &client, &server, to));

    thread::sleep(PAUSE);
    let failed = late.iter().filter_map(|Late { what, reader, said }| {
        let received = payload::receive_all(reader, SEED, *said);
        Some(format!("{what}, {said}: {:#}", received.err()?))
    });
    let failed: Vec<String> = failed.collect();
    assert!(failed.is_empty(), "{failed:#?}");
    drop(late);
    for pair in &pairs {
        pair.nothing_is_held().unwrap();
    }
}
