//! What looks like the beginning of TLS on an app's port is the app's own business.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    io::{Read, Write},
    thread,
    time::Duration,
};

use malla_testbed::{Pair, on_each_way};

on_each_way!([Mesh, ToUnmeshed, FromUnmeshed] an_apps_own_hello_passes_in_whatever_pieces_it_comes);

/// As linkerd/linkerd2#5331 has it, where a proxy waited for a whole hello.
fn an_apps_own_hello_passes_in_whatever_pieces_it_comes(pair: &Pair) {
    // A record with a `ClientHello` of 1.8 KiB, as post-quantum ones are.
    let head = [22, 3, 1, 7, 8, 1, 0, 7, 4];
    let hello: Vec<u8> = head
        .into_iter()
        .chain((0..=255).cycle())
        .take(1_805)
        .collect();
    for (piece, gap, pieces) in [(1, 5, 200), (100, 5, 18), (900, 2_000, 2)] {
        let (mut client, mut server) = pair.connection().unwrap();
        // What is left of the hello goes as one more piece.
        let (slowly, rest) = hello.split_at(piece * pieces);
        thread::scope(|scope| {
            scope.spawn(|| {
                for piece in slowly.chunks(piece) {
                    client.write_all(piece).unwrap();
                    // The gap is the input that is tried, and waits for nothing.
                    thread::sleep(Duration::from_millis(gap));
                }
                client.write_all(rest).unwrap();
            });
            let mut received = vec![0; hello.len()];
            server.read_exact(&mut received).unwrap();
            assert!(received == hello, "pieces of {piece}");
        });
    }
}
