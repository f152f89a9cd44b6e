//! Sockets that apps make in less usual ways: they are meshed, or refused, as any other.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    time::Duration,
};

use malla_testbed::{Caller, Fate, PORT, Pod, PodSpec, SECRET, Testbed, say, set_option};
use socket2::{Protocol, Socket};

const PATIENCE: Duration = Duration::from_secs(3);
const AT_ONCE: Duration = Duration::from_millis(500);

/// Calls each address of a meshed and strict server that `wanted` takes, by the callers that
/// `prepare` makes: with agents, when it must be meshed, and without, when it must be refused.
fn assert_meshed_then_refused(
    wanted: fn(IpAddr) -> bool,
    prepare: impl for<'a> Fn(&'a Pod) -> Caller<'a>,
) {
    let mut bed = Testbed::new("apps").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = bed.pod(&a, PodSpec::new("client")).unwrap();
    let server = PodSpec::new("server").port(PORT).settings("mtls: strict");
    let server = bed.pod(&b, server).unwrap();
    let app = server.echo(PORT).unwrap();
    bed.start_agents().unwrap();
    let wire = bed.capture_wire(&a, &b).unwrap();
    let caller = prepare(&client).saying(SECRET).patience(PATIENCE);
    let addresses = server
        .addresses()
        .iter()
        .filter(|address| wanted(**address));
    let addresses: Vec<SocketAddr> = addresses.map(|address| (*address, PORT).into()).collect();
    for to in &addresses {
        assert_eq!(caller.call(*to), Fate::Echoed, "{to}");
    }
    bed.agent(&a).kill9();
    for to in &addresses {
        let (fate, time) = caller.timed_call(*to);
        assert_eq!(fate, Fate::Refused, "{to}");
        assert!(time < AT_ONCE, "{to}: {time:?}");
    }
    assert_eq!(app.accepted(), addresses.len());
    assert!(!wire.contains(SECRET));
    assert_eq!(wire.missed().unwrap(), 0);
}

#[test]
fn a_multipath_socket_is_meshed_or_refused() {
    assert_meshed_then_refused(|_| true, |pod| pod.caller().speaking(Protocol::MPTCP));
}

#[test]
fn a_socket_that_is_bound_to_its_interface_is_meshed_or_refused() {
    let bind = |socket: &Socket| socket.bind_device(Some(b"eth0"));
    assert_meshed_then_refused(|_| true, |pod| pod.caller().preparing(bind));
}

#[test]
fn a_socket_with_options_in_its_ipv4_header_is_meshed_or_refused() {
    // Forty times "no operation": the longest header that there is.
    let options =
        |socket: &Socket| set_option(socket, (libc::IPPROTO_IP, libc::IP_OPTIONS), &[1; 40]);
    assert_meshed_then_refused(|to| to.is_ipv4(), |pod| pod.caller().preparing(options));
}

#[test]
fn a_socket_with_extension_headers_in_its_ipv6_packets_is_meshed_or_refused() {
    // Destination options that are padding only.
    let options = |socket: &Socket| {
        let header = [0, 0, 1, 4, 0, 0, 0, 0];
        set_option(socket, (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS), &header)
    };
    assert_meshed_then_refused(|to| to.is_ipv6(), |pod| pod.caller().preparing(options));
}

#[test]
fn a_socket_that_sends_its_first_bytes_with_the_syn_is_meshed_or_refused() {
    // What Linux calls TCP_FASTOPEN_NO_COOKIE; then `connect` waits for the first write.
    const NO_COOKIE: i32 = 34;
    let eager = |socket: &Socket| {
        let on = 1_i32.to_ne_bytes();
        set_option(socket, (libc::IPPROTO_TCP, NO_COOKIE), &on)?;
        set_option(socket, (libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT), &on)
    };
    assert_meshed_then_refused(|_| true, |pod| pod.caller().preparing(eager));
}

#[test]
fn a_socket_that_is_used_again_is_decided_about_anew() {
    const SKIPPED: u16 = 9090;
    let mut bed = Testbed::new("again").unwrap();
    let (a, b) = (bed.node("a").unwrap(), bed.node("b").unwrap());
    let client = PodSpec::new("client").settings("skipOutboundPorts: [9090]");
    let client = bed.pod(&a, client).unwrap();
    let server = bed.pod(&b, PodSpec::new("server").port(PORT)).unwrap();
    let _apps = [PORT, SKIPPED].map(|port| server.echo(port).unwrap());
    bed.start_agents().unwrap();
    for address in server.addresses() {
        let first = client.caller().connect((*address, SKIPPED).into()).unwrap();
        let socket = Socket::from(first);
        for port in [PORT, SKIPPED, PORT] {
            let wire = bed.capture_wire(&a, &b).unwrap();
            disconnect(&socket);
            socket
                .connect(&SocketAddr::new(*address, port).into())
                .unwrap();
            let mut stream = socket.try_clone().unwrap().into();
            assert_eq!(say(&mut stream, SECRET), Fate::Echoed);
            assert_eq!(wire.contains(SECRET), port == SKIPPED, "{address}:{port}");
        }
    }
}

/// Takes a socket's connection from it, by a reset.
fn disconnect(socket: &Socket) {
    // SAFETY: `sockaddr` is plain old data, for which zeroes are a valid value.
    let mut nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    nobody.sa_family = u16::try_from(libc::AF_UNSPEC).unwrap();
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).unwrap();
    // SAFETY: the address is valid for reads of the length given.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) };
    assert_eq!(done, 0);
}
