//! Urgent data (RFC 6093; `MSG_OOB` in send(2)), as telnet, ftp and databases' clients send to interrupt.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use malla_testbed::{Pair, on_each_way};
use nix::sys::signal::Signal;
use socket2::SockRef;

on_each_way!(
    [Direct, Mesh, ToUnmeshed, FromUnmeshed]
    what_comes_before_and_behind_an_urgent_byte_arrives_without_waiting_for_more,
);

fn what_comes_before_and_behind_an_urgent_byte_arrives_without_waiting_for_more(pair: &Pair) {
    say_urgently(pair, b"beforebehind");
}

/// One of `full`'s limits: the kernel takes the byte for any other where it redirects.
#[test]
fn an_accelerated_apps_urgent_byte_arrives_among_the_others() {
    let pair = Pair::accelerated().unwrap();
    say_urgently(&pair, b"before!behind");
}

/// The kernel's reads end before an urgent byte, though more is there behind it. The readers leave such a
/// byte aside, as without `SO_OOBINLINE`.
fn say_urgently(pair: &Pair, heard: &[u8]) {
    let (client, server) = pair.connection().unwrap();
    // The connection is at rest, both ways.
    for (from, to) in [(&client, &server), (&server, &client)] {
        tell(from, b"hello");
        assert_eq!(hear(to, 5), b"hello");
    }
    for (from, to) in [(&client, &server), (&server, &client)] {
        // All of it waits when it is read.
        signal(pair, Signal::SIGSTOP);
        tell(from, b"before");
        SockRef::from(from).send_out_of_band(b"!").unwrap();
        tell(from, b"behind");
        signal(pair, Signal::SIGCONT);
        assert_eq!(hear(to, heard.len()), heard);
    }
}

fn signal(pair: &Pair, signal: Signal) {
    for agent in pair.agents() {
        agent.process().signal(signal).unwrap();
    }
}

fn tell(mut to: &TcpStream, bytes: &[u8]) {
    to.write_all(bytes).unwrap();
}

fn hear(mut from: &TcpStream, length: usize) -> Vec<u8> {
    let mut heard = vec![0; length];
    from.read_exact(&mut heard).unwrap();
    heard
}
