//! Two apps of one node whose bytes the kernel moves past the agent: bytes, order, ends, counts and
//! what cuts them are as when the agent moves them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]
#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use malla_testbed::{
    Agent, Node, PATIENCE, Pod, PodSpec, Polled, Testbed, accept, eventually, listen, nginx,
    payload,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use socket2::SockRef;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Turns of a conversation after which both directions are joined.
const TURNS: u64 = 10;
const MESSAGE: usize = 500;
/// What each side has said by then.
const SAID: usize = 10 * MESSAGE;
/// Within which a rule of the network's is honoured, and what a busy machine adds.
const HONOURED: Duration = Duration::from_secs(30 + 5);

/// A client and a server beside each other, whose apps are accelerated.
struct OneNode {
    bed: Testbed,
    node: Arc<Node>,
    client: Arc<Pod>,
    server: Arc<Pod>,
    listener: TcpListener,
}

impl OneNode {
    fn new(server_settings: &str) -> Self {
        let mut bed = Testbed::new("joined").unwrap();
        let node = bed.node("a").unwrap();
        let settings = "accelerate: full";
        let client = PodSpec::new("client").account("client").settings(settings);
        let client = bed.pod(&node, client).unwrap();
        let settings = format!("{settings}\n{server_settings}");
        let server = PodSpec::new("server").account("server").settings(settings);
        let server = bed.pod(&node, server).unwrap();
        let listener = listen(&server, 0).unwrap();
        bed.start_agents().unwrap();
        bed.agent(&node).wait_for_acceleration("full").unwrap();
        let one = Self {
            bed,
            node,
            client,
            server,
            listener,
        };
        one.wait_for_both();
        one
    }

    fn agent(&self) -> &Agent {
        self.bed.agent(&self.node)
    }

    fn wait_for_both(&self) {
        eventually("both pods to be accelerated", PATIENCE, || {
            let metrics = self.agent().metrics().unwrap();
            metrics.sum("malla_acceleration_pods", &[("mode", "full")]) == 2.0
        })
        .unwrap();
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        let port = self.listener.local_addr().unwrap().port();
        let addresses = self.server.addresses().iter();
        addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
    }

    fn connection(&self, to: SocketAddr) -> (Polled, Polled) {
        let client = Polled::new(self.client.connect(to).unwrap()).unwrap();
        (
            client,
            Polled::new(accept(&self.listener).unwrap()).unwrap(),
        )
    }

    /// A connection that is joined both ways, and how many bytes each side has said. A connection whose
    /// first message is sent before the kernel has both ends goes by TCP, and is none.
    fn joined_by(&self, to: SocketAddr) -> (Polled, Polled, usize) {
        // What was dropped before is to be gone.
        let mut before = self.joins();
        eventually("joins to be gone", PATIENCE, || {
            thread::sleep(Duration::from_millis(50));
            std::mem::replace(&mut before, self.joins()) == before
        })
        .unwrap();
        let mut others = Vec::new();
        for _ in 0..20 {
            let before = self.joins();
            let (client, server) = self.connection(to);
            converse(&client, &server, TURNS);
            if self.joins() == before + 2 {
                return (client, server, SAID);
            }
            others.push((client, server));
        }
        panic!("no connection to {to} is joined");
    }

    /// Directions that are joined now.
    fn joins(&self) -> usize {
        self.agent().joins(&self.node).unwrap()
    }

    /// How often the kernel has taken over by now: the agent tells of it once a second.
    fn times(&self) -> usize {
        thread::sleep(Duration::from_millis(1500));
        self.agent().directions("joined").unwrap()
    }

    fn joined(&self) -> (Polled, Polled, usize) {
        self.joined_by(self.addresses()[0])
    }

    /// That the kernel alone moves what is said.
    fn without_the_agent(&self, says: impl FnOnce()) {
        let process = self.agent().process();
        process.signal(Signal::SIGSTOP).unwrap();
        says();
        process.signal(Signal::SIGCONT).unwrap();
    }

    /// The bytes that a reporter has counted of what clients and servers have said.
    fn counted(&self, direction: &str) -> [usize; 2] {
        let metrics = self.agent().metrics().unwrap();
        ["src", "dst"].map(|peer| {
            let labels = [("direction", direction), ("peer", peer)];
            let sum = metrics.sum("tcp_read_bytes_total", &labels);
            format!("{sum}").parse().unwrap()
        })
    }

    /// Waits until both reporters' lines of the access log have these numbers of bytes, and this reason.
    fn wait_for_lines(&self, from_client: usize, from_server: usize, reason: Option<&str>) {
        let parts = [
            ("outbound", from_client, from_server),
            ("inbound", from_server, from_client),
        ];
        for (direction, sent, received) in parts {
            let bytes = format!(" bytes_sent={sent} bytes_recv={received} ");
            let direction = format!("direction=\"{direction}\"");
            let told = eventually("a line of the access log", PATIENCE, || {
                self.agent().log().lines().any(|line| {
                    let reason = match reason {
                        Some(reason) => line.contains(&format!("error=\"{reason}\"")),
                        None => line.contains("connection complete"),
                    };
                    line.contains(&bytes) && line.contains(&direction) && reason
                })
            });
            told.unwrap_or_else(|error| panic!("{error}: {bytes} {}", self.agent().log()));
        }
    }

    fn nothing_is_left(&self) {
        eventually("no connection to be left", PATIENCE, || {
            let metrics = self.agent().metrics().unwrap();
            let open = metrics.sum("tcp_open_connections", &[]);
            open == 0.0 && self.joins() == 0
        })
        .unwrap();
    }
}

/// Messages in turns.
fn converse(client: &Polled, server: &Polled, turns: u64) {
    for turn in 0..turns {
        for (from, to) in [(client, server), (server, client)] {
            payload::send(from, turn, MESSAGE).unwrap();
            payload::receive(to, turn, MESSAGE).unwrap();
        }
    }
}

/// What is a client's and what is its server's, in this order or the other way round.
fn either<T>(client_first: bool, client: T, server: T) -> (T, T) {
    if client_first {
        (client, server)
    } else {
        (server, client)
    }
}

fn reset(socket: Polled) {
    let without_fin = SockRef::from(&socket.0).set_linger(Some(Duration::ZERO));
    without_fin.unwrap();
    drop(socket);
}

fn is_reset(mut from: &Polled) {
    let error = from.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn what_is_said_in_turns_goes_past_the_agent_in_both_families() {
    let one = OneNode::new("");
    assert_eq!(one.addresses().len(), 2);
    for to in one.addresses() {
        let (client, server, said) = one.joined_by(to);
        assert_eq!(one.joins(), 2);
        one.without_the_agent(|| converse(&client, &server, 1000));
        client.0.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(&server, 0, 0).unwrap();
        drop(server);
        payload::receive_all(&client, 0, 0).unwrap();
        let all = said + 1000 * MESSAGE;
        one.wait_for_lines(all, all, None);
    }
    one.nothing_is_left();
}

/// Lengths from one byte to 100 KB, most of them short.
fn lengths(seed: u64) -> impl Iterator<Item = usize> {
    let mut state = seed;
    std::iter::from_fn(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(seed | 1);
        let random = usize::try_from(state >> 40).unwrap();
        Some(
            1 + random
                % if random.is_multiple_of(8) {
                    100_000
                } else {
                    3000
                },
        )
    })
}

#[test]
fn messages_of_all_lengths_both_ways_at_once_are_exact_through_joins_and_ends_of_joins() {
    const MESSAGES: usize = 4000;
    let one = OneNode::new("");
    for turn in 0..4 {
        let (client, server, _) = one.joined();
        thread::scope(|scope| {
            for (seed, from, to) in [(1, &client, &server), (2, &server, &client)] {
                let lengths = move || lengths(turn * 2 + seed).take(MESSAGES);
                scope.spawn(move || {
                    for (number, length) in (0..).zip(lengths()) {
                        payload::send(from, number, length).unwrap();
                        // So that the reader catches up.
                        if number % 64 == 0 {
                            thread::sleep(Duration::from_millis(number / 64 % 3));
                        }
                    }
                });
                scope.spawn(move || {
                    for (number, length) in (0..).zip(lengths()) {
                        payload::receive(to, number, length).unwrap();
                        // One that reads slowly now and then, so that there is no room for more.
                        if number % 256 == 255 {
                            thread::sleep(Duration::from_millis(turn * 5));
                        }
                    }
                });
            }
        });
    }
    one.nothing_is_left();
}

#[test]
fn a_reader_that_stalls_gets_all_in_order_and_stops_its_writer() {
    let one = OneNode::new("");
    for turn in 0..6_u64 {
        let (client, server, said) = one.joined();
        let is_client = turn % 2 == 0;
        let (writer, reader) = either(is_client, &client, &server);
        let (mut payload, mut pushed) = (payload::Payload::new(turn), 0);
        let is_full = || {
            let mut polled = [PollFd::new(writer.0.as_fd(), PollFlags::POLLOUT)];
            poll(&mut polled, PollTimeout::from(1000_u16)).unwrap() == 0
        };
        // Each piece as far as it goes: the last one may be cut.
        let mut pieces = Vec::new();
        while !is_full() {
            let piece = payload.next(48 * KIB);
            match { &writer.0 }.write(piece) {
                Ok(written) => {
                    pieces.push(piece[..written].to_vec());
                    pushed += written;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            assert!(pushed < 48 * MIB, "a stalled reader has {pushed} bytes");
        }
        assert!(pushed > 512 * KIB, "{pushed}");
        for piece in &pieces {
            let mut read = vec![0; piece.len()];
            { reader }.read_exact(&mut read).unwrap();
            assert!(read == *piece, "other bytes than were sent");
        }
        // The other way goes on, and so does this one.
        for (from, to) in [(reader, writer), (writer, reader)] {
            thread::scope(|scope| {
                scope.spawn(|| payload::send(from, 9, 3 * MIB).unwrap());
                payload::receive(to, 9, 3 * MIB).unwrap();
            });
        }
        let (much, little) = (said + pushed + 3 * MIB, said + 3 * MIB);
        drop((client, server));
        let (from_client, from_server) = either(is_client, much, little);
        one.wait_for_lines(from_client, from_server, None);
    }
    one.nothing_is_left();
}

#[test]
fn an_end_of_either_side_comes_behind_its_last_bytes_and_leaves_the_other_way() {
    let one = OneNode::new("");
    for turn in 0..20 {
        let (client, server, said) = one.joined();
        let is_client = turn % 2 == 0;
        let (first, second) = either(is_client, &client, &server);
        let length = 1 + usize::try_from(turn).unwrap() * 3001;
        payload::send(first, turn, length).unwrap();
        first.0.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(second, turn, length).unwrap();
        for number in 0..50 {
            payload::send(second, number, MESSAGE).unwrap();
            payload::receive(first, number, MESSAGE).unwrap();
        }
        second.0.shutdown(Shutdown::Write).unwrap();
        payload::receive_all(first, 0, 0).unwrap();
        let (first, second) = (said + length, said + 50 * MESSAGE);
        let (from_client, from_server) = either(is_client, first, second);
        one.wait_for_lines(from_client, from_server, None);
    }
    one.nothing_is_left();
}

#[test]
fn a_reset_of_either_side_is_a_reset_of_the_other() {
    let one = OneNode::new("");
    for client_resets in [true, false, true, false] {
        let (client, server, said) = one.joined();
        converse(&client, &server, 7);
        let (resets, hears) = either(client_resets, client, server);
        let (reason, _) = either(client_resets, "client_reset", "server_reset");
        reset(resets);
        is_reset(&hears);
        let all = said + 7 * MESSAGE;
        one.wait_for_lines(all, all, Some(reason));
    }
    one.nothing_is_left();
}

/// As of an app under TCP whose peer is gone, but that the kernel doesn't see what waits there.
#[test]
fn who_closes_without_reading_ends_the_other_as_well() {
    let one = OneNode::new("");
    for client_closes in [true, false] {
        let (client, server, _) = one.joined();
        let (closes, writes) = either(client_closes, client, server);
        payload::send(&writes, 1, 200 * KIB).unwrap();
        drop(closes);
        // An end or a reset, and then nothing more is taken.
        let _ = { &writes }.read(&mut [0]);
        let error = payload::send(&writes, 2, 64 * MIB).unwrap_err();
        let error = error.downcast_ref::<std::io::Error>().unwrap().kind();
        let is_end = matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
        assert!(is_end, "{error:?}");
        drop(writes);
        one.nothing_is_left();
    }
}

#[test]
fn counters_move_while_a_joined_connection_lives() {
    let one = OneNode::new("");
    let (client, server, _) = one.joined();
    // With connections that weren't joined.
    thread::sleep(Duration::from_secs(3));
    let [mut said, _] = one.counted("outbound");
    assert!(said.is_multiple_of(SAID), "{said}");
    for turns in [100, 1, 20] {
        one.without_the_agent(|| converse(&client, &server, turns));
        said += usize::try_from(turns).unwrap() * MESSAGE;
        let began = Instant::now();
        eventually("counters to be exact", Duration::from_secs(10), || {
            let counted = ["outbound", "inbound"].map(|direction| one.counted(direction));
            counted == [[said; 2]; 2]
        })
        .unwrap();
        println!("counted after {:?}", began.elapsed());
    }
}

#[test]
fn a_killed_agents_joined_connections_are_reset_at_both_ends() {
    let mut one = OneNode::new("");
    let rest = one.joined();
    let moving = one.joined();
    let told = thread::scope(|scope| {
        let speaks = scope.spawn(|| {
            let (client, server, _) = &moving;
            for turn in 0.. {
                let sent = payload::send(client, turn, MESSAGE);
                if sent
                    .and_then(|()| payload::receive(server, turn, MESSAGE))
                    .is_err()
                {
                    break;
                }
            }
            for mut end in [client, server] {
                let error = end.write(&[1]).unwrap_err().kind();
                let is_end = matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
                assert!(is_end, "{error:?}");
            }
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!speaks.is_finished());
        one.agent().kill9();
        is_reset(&rest.0);
        is_reset(&rest.1);
        speaks.join()
    });
    told.unwrap();
    let node = Arc::clone(&one.node);
    drop(one.bed.start_agent(&node).unwrap());
    one.wait_for_both();
    let (client, server, _) = one.joined();
    converse(&client, &server, 10);
}

/// An agent that drains has let go of what tells of its connections' ends.
#[test]
fn what_a_killed_old_agent_had_joined_goes_on_in_no_way() {
    let mut one = OneNode::new("");
    let (client, server, _) = one.joined();
    let node = Arc::clone(&one.node);
    let old = one.bed.upgrade_agent(&node).unwrap();
    one.without_the_agent(|| converse(&client, &server, 20));
    old.kill9();
    // Once it was told, the kernel's own look at a socket sees nothing amiss any more.
    is_reset(&client);
    is_reset(&server);
    for (from, to) in [(&client, &server), (&server, &client)] {
        let error = { from }.write(&[1]).unwrap_err().kind();
        assert_eq!(error, ErrorKind::BrokenPipe);
        let heard = { to }.read(&mut [0]);
        assert!(!matches!(heard, Ok(1..)), "{heard:?}");
    }
}

#[test]
fn what_is_written_behind_an_end_goes_nowhere() {
    let one = OneNode::new("");
    for client_ends in [true, false] {
        let (client, server, said) = one.joined();
        let (ends, hears) = either(client_ends, &client, &server);
        ends.0.shutdown(Shutdown::Write).unwrap();
        let error = { ends }.write(&[1]).unwrap_err().kind();
        assert_eq!(error, ErrorKind::BrokenPipe);
        payload::receive_all(hears, 0, 0).unwrap();
        drop((client, server));
        one.wait_for_lines(said, said, None);
    }
    one.nothing_is_left();
}

#[test]
fn the_idle_time_out_counts_what_is_joined() {
    let one = OneNode::new("idleTimeout: 3s");
    let (client, server, said) = one.joined();
    let began = Instant::now();
    let mut turns = 0;
    while began.elapsed() < Duration::from_secs(8) {
        converse(&client, &server, 1);
        turns += 1;
        thread::sleep(Duration::from_millis(700));
    }
    let rests = Instant::now();
    is_reset(&client);
    is_reset(&server);
    let rested = rests.elapsed();
    println!("cut after {rested:?}");
    assert!((1.5..7.0).contains(&rested.as_secs_f64()), "{rested:?}");
    let all = said + turns * MESSAGE;
    one.wait_for_lines(all, all, Some("idle_timeout"));
    one.nothing_is_left();
}

#[test]
fn a_withdrawn_pods_joined_connections_are_reset_and_counted() {
    let mut one = OneNode::new("");
    let (client, server, said) = one.joined();
    converse(&client, &server, 33);
    let pod = Arc::clone(&one.server);
    one.bed.remove_pod(&pod).unwrap();
    is_reset(&client);
    let all = said + 33 * MESSAGE;
    one.wait_for_lines(all, all, Some("withdrawn"));
    one.nothing_is_left();
    drop(server);
}

#[test]
fn a_pair_that_the_network_refuses_loses_its_joined_connections() {
    let one = OneNode::new("");
    let (client, server, said) = one.joined();
    converse(&client, &server, 5);
    let (from, to) = (one.client.v4(), one.server.v4());
    let table = format!(
        "table bridge cni {{ chain forward {{ type filter hook forward priority 0\n\
         ip saddr {from} ip daddr {to} drop\n}}\n}}\n"
    );
    let nft = one.node.command(["nft", "-f", "-"]);
    nft.input(table).run().unwrap();
    let began = Instant::now();
    // The pair's next witness tells of it, and the connection speaks until then.
    let mut turns = 5;
    while began.elapsed() < HONOURED
        && payload::send(&client, 1, MESSAGE).is_ok()
        && payload::receive(&server, 1, MESSAGE).is_ok()
    {
        turns += 1;
        thread::sleep(Duration::from_millis(50));
    }
    assert!(began.elapsed() < HONOURED);
    println!("cut after {:?}", began.elapsed());
    one.nothing_is_left();
    let from_client = said + turns * MESSAGE;
    one.wait_for_lines(from_client, said + 5 * MESSAGE, Some("network_policy"));
}

#[test]
fn pods_that_are_not_both_accelerated_are_not_joined() {
    let one = OneNode::new("");
    one.bed
        .change_settings(&one.server, "accelerate: off")
        .unwrap();
    one.agent().wait_for_acceleration("off").unwrap();
    for to in one.addresses() {
        for _ in 0..5 {
            let (client, server) = one.connection(to);
            converse(&client, &server, 3 * TURNS);
        }
    }
    assert_eq!(one.times(), 0);
    assert!(one.agent().directions("redirected").unwrap() > 0);
}

#[test]
fn a_client_that_keeps_its_connection_to_nginx_gets_each_page() {
    let one = OneNode::new("");
    let folder = one.bed.folder().join("nginx");
    for part in ["", "pages"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
    }
    let page: String = (0..5000).fold(String::new(), |page, number| page + &format!("{number},"));
    std::fs::write(folder.join("pages/page"), &page).unwrap();
    let root = folder.join("pages");
    let http = format!(
        "server {{ listen 80; listen [::]:80; root {}; }}",
        root.display()
    );
    let _nginx = nginx(&one.server, &folder, &http).unwrap().spawn().unwrap();
    let url = format!("http://{}/page", one.server.v4());
    let ask = |count: usize| {
        let urls = std::iter::repeat_n(url.as_str(), count);
        let words = ["curl", "-sS", "--fail", "--fail-early"];
        one.client.run(words.into_iter().chain(urls))
    };
    eventually("nginx to answer", PATIENCE, || ask(1).is_ok()).unwrap();
    eventually("an exchange to be joined", PATIENCE, || {
        assert!(ask(300).unwrap().stdout == page.repeat(300));
        one.times() > 0
    })
    .unwrap();
    one.nothing_is_left();
}
