//! What is said and how it ends.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    thread,
    time::Duration,
};

use malla_testbed::{PATIENCE, eventually, nginx, payload};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::pods::{MESSAGE, OneNode, TURNS, converse, either, is_reset, reset};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

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
