//! A client of another make, written from the description of HBONE alone, reaches a malla pod.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use malla_testbed::{
    App, Node, Pod, PodSpec, Testbed, eventually,
    hbone::{Certificate, Client, Issued},
};
use socket2::SockRef;

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;
const BULK: usize = 1 << 20;

/// A strict pod, and one on a node without an agent, so that its mesh port is its own.
struct World {
    bed: Testbed,
    node: Arc<Node>,
    server: Arc<Pod>,
    stranger: Arc<Pod>,
    certificate: Issued,
}

impl World {
    fn new(name: &str) -> Self {
        let mut bed = Testbed::new(name)
            .unwrap()
            .with_agent_arguments(["--workers", "1"]);
        let (node, without_agent) = (bed.node("a").unwrap(), bed.node("b").unwrap());
        let spec = PodSpec::new("server").settings("mtls: strict");
        let server = bed.pod(&node, spec).unwrap();
        let spec = PodSpec::new("stranger").account("stranger");
        let stranger = bed.pod(&without_agent, spec).unwrap();
        bed.start_agent(&node).unwrap();
        let certificate = Certificate::of("spiffe://cluster.local/ns/default/sa/stranger");
        let certificate = certificate.issue(&bed).unwrap();
        Self {
            bed,
            node,
            server,
            stranger,
            certificate,
        }
    }

    /// What the client says that does `steps`, in which `APP` stands for the app's authority.
    /// The first line, which is the same for all, is checked and left out.
    fn talk(&self, steps: &str) -> Vec<String> {
        let app = format!("{}:{PORT}", self.server.v4());
        let client = Client::new(&self.bed, &self.stranger).with(&self.certificate);
        let said = client.talk(self.server.v4(), &steps.replace("APP", &app));
        let mut said = said.unwrap();
        assert_eq!(said.remove(0), "tls TLSv1.3 h2");
        said
    }

    fn app<T: Send + 'static>(
        &self,
        connections: usize,
        serve: impl Fn(TcpStream) -> T + Send + Sync + 'static,
    ) -> App<T> {
        App::start(&self.server, PORT, connections, serve).unwrap()
    }
}

fn echo(mut stream: TcpStream) {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    stream.write_all(&received).unwrap();
}

/// Makes a connection end by a reset.
fn linger_zero(stream: &TcpStream) {
    let linger = Some(Duration::ZERO);
    SockRef::from(stream).set_linger(linger).unwrap();
}

#[test]
fn data_flows_both_ways_over_both_families_and_the_app_sees_the_client() {
    let world = World::new("peer-in");
    let app = world.app(2, |stream| {
        let client = stream.peer_addr().unwrap().ip().to_canonical();
        echo(stream);
        client
    });
    for address in world.server.addresses() {
        let authority = match address {
            IpAddr::V4(v4) => format!("{v4}:{PORT}"),
            IpAddr::V6(v6) => format!("[{v6}]:{PORT}"),
        };
        let client = Client::new(&world.bed, &world.stranger).with(&world.certificate);
        let steps = format!("connect 1 {authority}\nsend 1 hello\nend 1\nstatus 1\nfinish 1\n");
        let said = client.talk(*address, &steps).unwrap();
        assert_eq!(said, ["tls TLSv1.3 h2", "1 200", "1 end hello"]);
    }
    assert_eq!(app.results().unwrap(), world.stranger.addresses());
}

/// Dials that come in one piece share a visit to the pod's netns, and the sockets that it makes.
#[test]
fn connects_in_one_packet_are_dialled_each_for_itself_and_leave_no_socket() {
    const TURNS: usize = 6;
    let world = World::new("peer-batch");
    let app = world.app(2 * TURNS, echo);
    let (v4, v6) = (world.server.v4(), world.server.v6());
    let batch = format!("{v4}:{PORT} {v4}:9 [{v6}]:{PORT} ").repeat(TURNS);
    let (mut steps, mut answers) = (format!("batch {batch}\n"), Vec::new());
    for number in 1..=3 * TURNS {
        if number % 3 == 2 {
            steps.push_str(&format!("status {number}\n"));
            answers.push(format!("{number} 503"));
        } else {
            let step = format!("send {number} hello {number}\nend {number}\nstatus {number}\n");
            steps.push_str(&format!("{step}finish {number}\n"));
            answers.push(format!("{number} 200"));
            answers.push(format!("{number} end hello {number}"));
        }
    }
    let open = || world.bed.agent(&world.node).open_descriptors().unwrap();
    let before = open();
    assert_eq!(world.talk(&steps), answers);
    app.results().unwrap();
    eventually("all sockets to be closed", LIMIT, || open() <= before).unwrap();
}

/// Which it says once: a peer that isn't told of it waits.
#[test]
fn an_agent_takes_data_before_its_answer_and_says_so_in_its_first_one() {
    let world = World::new("peer-optimistic");
    let app = world.app(2, echo);
    let said = world.talk(
        "connect 1 APP\nsend 1 hello\nend 1\nstatus 1\nheader 1 malla-optimistic-data\nfinish 1\n\
         connect 2 APP\nsend 2 again\nend 2\nstatus 2\nheader 2 malla-optimistic-data\nfinish 2\n",
    );
    let expected = [
        "1 200",
        "1 ?1",
        "1 end hello",
        "2 200",
        "2 no header",
        "2 end again",
    ];
    assert_eq!(said, expected);
    app.results().unwrap();
}

#[test]
fn a_server_that_does_not_accept_in_a_peers_time_hears_nothing_of_it() {
    let world = World::new("peer-within");
    // As long as the test, had the peer said nothing.
    world
        .bed
        .change_settings(&world.server, "mtls: strict\nmeshConnectTimeout: 60s")
        .unwrap();
    world.server.swallow_openings(PORT).unwrap();
    for limit in ["0", "300"] {
        let said = world.talk(&format!("within 1 APP {limit}\nsend 1 hello\nstatus 1\n"));
        assert_eq!(said, ["1 503"]);
    }
    // A limit that isn't a number is none.
    let said = world.talk("within 1 APP soon\nsend 1 hello\nsettle 1\n");
    assert_eq!(said, ["1 open "]);
}

#[test]
fn a_connect_over_ipv4_may_be_to_the_pods_ipv6_address() {
    let world = World::new("peer-families");
    let app = world.app(1, |stream| {
        let client = stream.peer_addr().unwrap().ip();
        echo(stream);
        client
    });
    let own = world.server.v6();
    let steps = format!("connect 1 [{own}]:{PORT}\nsend 1 hello\nend 1\nfinish 1\n");
    assert_eq!(world.talk(&steps), ["1 end hello"]);
    // The client has no address of that family: the pod's own stands for it.
    assert_eq!(app.results().unwrap(), [own]);
}

#[test]
fn a_client_that_sends_byte_by_byte_is_understood() {
    let world = World::new("peer-dribble");
    let app = world.app(2, echo);
    let authority = format!("{}:{PORT}", world.server.v4());
    for bytes in [1, 100] {
        let client = Client::new(&world.bed, &world.stranger).with(&world.certificate);
        let steps = format!("connect 1 {authority}\nsend 1 hello\nend 1\nfinish 1\n");
        let said = client.dribbling(bytes).talk(world.server.v4(), &steps);
        assert_eq!(said.unwrap(), ["tls TLSv1.3 h2", "1 end hello"]);
    }
    app.results().unwrap();
}

#[test]
fn the_client_may_end_first_and_get_a_long_answer() {
    let world = World::new("peer-half");
    let app = world.app(1, |mut stream| {
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        stream.write_all(&vec![b'x'; BULK]).unwrap();
        received
    });
    let said = world.talk("connect 1 APP\nsend 1 question\nend 1\nuntil 1 1048576\nfinish 1\n");
    assert!(said[0].starts_with("1 end 1048576 "), "{said:?}");
    assert_eq!(app.results().unwrap(), [b"question"]);
}

#[test]
fn the_app_may_end_first_and_take_what_still_comes() {
    let world = World::new("peer-half-app");
    let app = world.app(1, |mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received.len()
    });
    let said = world.talk("connect 1 APP\nfinish 1\nfill 1 1048576\nend 1\nsettle 1\n");
    assert_eq!(said, ["1 end bye", "1 end bye"]);
    assert_eq!(app.results().unwrap(), [BULK]);
}

#[test]
fn a_reset_by_the_app_is_a_connect_error_of_the_stream() {
    let world = World::new("peer-rst-app");
    let app = world.app(1, |mut stream| {
        stream.read_exact(&mut [0; 5]).unwrap();
        linger_zero(&stream);
    });
    let said = world.talk("connect 1 APP\nsend 1 hello\nfinish 1\nping\n");
    assert_eq!(said[0].trim_end(), "1 reset CONNECT_ERROR");
    assert_eq!(said[1], "pong", "the tunnel lives on");
    app.results().unwrap();
}

#[test]
fn a_reset_of_the_stream_is_a_reset_for_the_app() {
    let world = World::new("peer-rst");
    for code in ["CONNECT_ERROR", "CANCEL", "INTERNAL_ERROR"] {
        let app = world.app(1, |mut stream| {
            stream.write_all(b"hello").unwrap();
            stream.read(&mut [0; 1]).map_err(|error| error.kind())
        });
        let said = world.talk(&format!("connect 1 APP\nuntil 1 5\nreset 1 {code}\nping\n"));
        assert_eq!(said, ["pong"], "{code}");
        let seen = app.results().unwrap();
        assert_eq!(seen, [Err(ErrorKind::ConnectionReset)], "{code}");
    }
}

#[test]
fn what_is_no_connect_to_the_pod_is_refused_with_its_status() {
    let world = World::new("peer-refused");
    let own = world.server.v4();
    let other = world.stranger.v4();
    let app = world.app(1, echo);
    for (request, status, reason) in [
        (format!("request 1 GET {own}:{PORT}"), 400, "bad_request"),
        (format!("request 1 POST {own}:{PORT}"), 400, "bad_request"),
        (
            format!("connect 1 {other}:{PORT}"),
            400,
            "wrong_destination",
        ),
        (
            format!("connect 1 127.0.0.1:{PORT}"),
            400,
            "wrong_destination",
        ),
        (format!("connect 1 [::1]:{PORT}"), 400, "wrong_destination"),
        (
            "connect 1 web.default.svc.cluster.local:80".to_owned(),
            400,
            "bad_request",
        ),
        (format!("connect 1 {own}"), 400, "bad_request"),
        (format!("connect 1 {own}:99999"), 400, "bad_request"),
        (format!("connect 1 {own}:15008"), 503, "own_listener"),
        (format!("connect 1 {own}:81"), 503, "connect_refused"),
    ] {
        let agent = world.bed.agent(&world.node);
        let refused = || {
            let metrics = agent.metrics().unwrap();
            metrics.sum("malla_connections_refused_total", &[("reason", reason)])
        };
        let (before, refused_before) = (agent.log().len(), refused());
        let said = world.talk(&format!("{request}\nstatus 1\nping\n"));
        assert_eq!(
            said,
            [format!("1 {status}"), "pong".to_owned()],
            "{request}"
        );
        // The same refusal has one line in 10 s, and is counted each time.
        eventually(&format!("{reason} to be told"), LIMIT, || {
            agent.log()[before..].contains(reason) || refused() > refused_before
        })
        .unwrap();
    }
    let said = world.talk("connect 1 APP\nsend 1 served\nend 1\nfinish 1\n");
    assert_eq!(said, ["1 end served"]);
    app.results().unwrap();
}

#[test]
fn huge_headers_are_refused_and_the_tunnel_goes_on() {
    let world = World::new("peer-headers");
    let app = world.app(1, echo);
    let steps = "padded 1 APP 100000\nstatus 1\n\
                 connect 2 APP\nsend 2 served\nend 2\nfinish 2\n";
    assert_eq!(world.talk(steps), ["1 431", "2 end served"]);
    app.results().unwrap();
}

#[test]
fn headers_without_end_cost_the_peer_its_tunnel_alone() {
    let world = World::new("peer-headers-end");
    let said = world.talk("padded 1 APP 1000000\nstatus 1\nping\n");
    let last = said.last().unwrap();
    assert!(last.starts_with("closed"), "{said:?}");
    let app = world.app(1, echo);
    let said = world.talk("connect 1 APP\nsend 1 served\nend 1\nfinish 1\n");
    assert_eq!(said, ["1 end served"]);
    app.results().unwrap();
}

#[test]
fn one_tunnel_carries_150_connections_at_once() {
    const STREAMS: usize = 150;
    let world = World::new("peer-many");
    let app = world.app(STREAMS, echo);
    let mut steps = String::new();
    for step in [
        "connect N APP",
        "status N",
        "send N text-N",
        "end N",
        "finish N",
    ] {
        for number in 0..STREAMS {
            steps += &step.replace('N', &number.to_string());
            steps.push('\n');
        }
    }
    let said = world.talk(&steps);
    let answers = (0..STREAMS).map(|number| format!("{number} 200"));
    let ends = (0..STREAMS).map(|number| format!("{number} end text-{number}"));
    assert!(said.iter().eq(&answers.chain(ends).collect::<Vec<_>>()));
    app.results().unwrap();
    let metrics = world.bed.agent(&world.node).metrics().unwrap();
    let tunnels = metrics.sum("malla_tunnels_total", &[("direction", "inbound")]);
    assert!((tunnels - 1.0).abs() < f64::EPSILON, "{tunnels} tunnels");
}

#[test]
fn a_stream_without_window_blocks_its_app_and_nobody_else() {
    let world = World::new("peer-window");
    let app = world.app(2, |mut stream| {
        let mut asked = [0; 1];
        stream.read_exact(&mut asked).unwrap();
        if &asked == b"e" {
            return echo(stream);
        }
        // More than all that lies between an app and a peer that gives no window.
        let mut sent = 0;
        while sent < 32 * BULK {
            sent += stream.write(&vec![b'x'; BULK]).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let steps = "connect 1 APP\nhold 1\nsend 1 s\nstatus 1\nsettle 1\n\
                 ping\nconnect 2 APP\nsend 2 echo\nend 2\nfinish 2\ntell 1\n\
                 release 1\nend 1\nfinish 1\n";
    let said = world.talk(steps);
    // What HTTP/2 gives a stream to begin with, to the byte.
    assert!(said[1].starts_with("1 open 65535 "), "{said:?}");
    assert_eq!(said[2..4], ["pong", "2 end cho"]);
    assert!(said[4].starts_with("1 open 65535 "), "{said:?}");
    assert!(said[5].starts_with("1 end 33554432 "), "{said:?}");
    app.results().unwrap();
}

#[test]
fn an_app_that_does_not_read_blocks_its_own_stream_alone() {
    let world = World::new("peer-slow-app");
    let is_read = AtomicBool::new(false);
    let app = world.app(2, move |mut stream| {
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        if &first == b"e" {
            echo(stream);
            is_read.store(true, Ordering::Relaxed);
            return 0;
        }
        let other = || is_read.load(Ordering::Relaxed);
        eventually("the other connection to be served", LIMIT, other).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest.len()
    });
    let steps = "connect 1 APP\nqueue 1 8388609\nend 1\nstatus 1\n\
                 connect 2 APP\nsend 2 echo\nend 2\nfinish 2\nfinish 1\n";
    let said = world.talk(steps);
    assert_eq!(said[..2], ["1 200", "2 end cho"]);
    assert_eq!(said[2].trim_end(), "1 end");
    assert_eq!(app.results().unwrap(), [8 * BULK, 0]);
}

#[test]
fn a_reset_reaches_an_app_that_has_not_read_what_came_with_the_connect() {
    const TIMES: usize = 10;
    let world = World::new("peer-reset-first");
    // What comes with a CONNECT is what its TLS record has room for: more than these kernels take.
    let small = ["tcp_rmem", "tcp_wmem"].map(|of| format!("ipv4/{of}"));
    let small = small.each_ref().map(|of| (&**of, "4096 4096 4096"));
    world.server.netns().sysctls(&small).unwrap();
    let app = world.app(TIMES, |stream| {
        // Readable, writable or neither, it tells of an error.
        let is_reset = || stream.take_error().unwrap().is_some();
        eventually("the app to be reset", LIMIT, is_reset).unwrap();
    });
    let mut steps = String::new();
    for number in 0..TIMES {
        steps += &format!("opening {number} APP 16000\nstatus {number}\nsettle {number}\n");
        steps += &format!("reset {number} CANCEL\n");
    }
    steps += "ping\n";
    assert_eq!(world.talk(&steps).last().unwrap(), "pong");
    app.results().unwrap();
}

#[test]
fn what_a_peer_takes_little_by_little_keeps_a_connection_alive() {
    let world = World::new("peer-trickle");
    world
        .bed
        .change_settings(&world.server, "mtls: strict\nidleTimeout: 3s")
        .unwrap();
    let app = world.app(1, |mut stream| {
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        stream.write_all(&vec![b'x'; BULK]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
    });
    // A chunk of the agent's takes longer than the time-out.
    let steps = "connect 1 APP\nhold 1\nsend 1 s\nstatus 1\nsettle 1\n\
                 trickle 1 2000 12 500\nrelease 1\nend 1\nfinish 1\n";
    let said = world.talk(steps);
    assert!(said[1].starts_with("1 open 65535 "), "{said:?}");
    assert!(said[2].starts_with("1 end 1048576 "), "{said:?}");
    app.results().unwrap();
}
