//! What the wire between two agents shows.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use malla_testbed::{App, Hello, Link, Pod, PodSpec, Testbed, eventually, until};

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
const MESH: u16 = 15008;
const NEEDLE: &[u8] = b"nobody but the two apps shall read this; ";

const TLS_1_3: u16 = 0x0304;
const X25519_MLKEM768: u16 = 0x11ec;

fn echo(mut stream: TcpStream) {
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    stream.write_all(&received).unwrap();
}

/// Sends text through an echo on the other pod, which must come back.
fn exchange(from: &Pod, to: &Pod) {
    let app = App::start(to, PORT, 1, echo).unwrap();
    let text = NEEDLE.repeat(500);
    let mut stream = from.connect((to.v4(), PORT)).unwrap();
    stream.write_all(&text).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer == text);
    app.results().unwrap();
}

#[test]
fn between_two_agents_the_wire_carries_tls_only() {
    let mut bed = Testbed::new("wire").unwrap().with_link(Link::CLEAN_WIRE);
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    let plain_client = bed.pod(&a, PodSpec::new("plain-client").unmeshed());
    let plain_server = bed.pod(&b, PodSpec::new("plain-server").unmeshed());
    bed.start_agents().unwrap();

    let meshed = bed.capture_wire(&a, &b).unwrap();
    exchange(&client, &server);
    let tls = until("10 KiB in TLS each way", LIMIT, || {
        let tls = meshed.tls();
        (tls.encrypted > 20 * 1024).then_some(tls)
    });
    let tls = tls.unwrap();
    assert_eq!(meshed.missed().unwrap(), 0);
    assert!(!meshed.contains(NEEDLE));
    assert!(tls.handshakes >= 1 && tls.other.is_empty(), "{tls:?}");
    for packet in meshed.tcp() {
        let ports = [packet.from.port(), packet.to.port()];
        assert!(ports.contains(&MESH), "{ports:?}");
    }

    let control = bed.capture_wire(&a, &b).unwrap();
    exchange(&plain_client.unwrap(), &plain_server.unwrap());
    let seen = || control.contains(NEEDLE);
    eventually("the text on an unmeshed wire", LIMIT, seen).unwrap();
}

#[test]
fn two_agents_agree_on_tls_1_3_h2_and_a_post_quantum_key_exchange() {
    let mut bed = Testbed::new("hellos").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = bed.pod(&b, PodSpec::new("server")).unwrap();
    bed.start_agents().unwrap();
    let capture = bed.capture_wire(&a, &b).unwrap();
    exchange(&client, &server);
    let hellos = until("both hellos", LIMIT, || {
        let hellos = capture.tls().hellos;
        (hellos.len() == 2).then_some(hellos)
    });
    let hellos = hellos.unwrap();
    let (offers, chosen): (Vec<Hello>, Vec<Hello>) =
        hellos.into_iter().partition(|hello| hello.is_client);
    assert_eq!(offers[0].versions, [TLS_1_3]);
    assert_eq!(offers[0].alpn, ["h2"]);
    assert!(!offers[0].has_server_name);
    assert_eq!(chosen[0].versions, [TLS_1_3]);
    assert_eq!(chosen[0].groups, [X25519_MLKEM768]);
}
