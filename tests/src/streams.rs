//! TCP streams put together from captured packets, and what of TLS is in them.

use std::{collections::HashMap, net::SocketAddr};

use crate::{
    hello::Hello,
    packet::{SYN, TcpPacket},
};

/// One end of a TCP connection.
pub type Endpoint = SocketAddr;

/// One direction of a TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    pub from: Endpoint,
    pub to: Endpoint,
    /// What was sent, from the beginning up to the first gap.
    pub bytes: Vec<u8>,
}

/// How much of TLS a capture shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsSummary {
    /// Connections with `ClientHello`, `ServerHello` and encrypted records both ways.
    pub handshakes: usize,
    /// Bytes in encrypted records.
    pub encrypted: usize,
    /// What the hellos say that both ends send before they encrypt, in the order of their streams.
    pub hellos: Vec<Hello>,
    /// Streams with bytes that aren't TLS records.
    pub other: Vec<(Endpoint, Endpoint)>,
}

/// A stream while its packets come in, in whatever order.
#[derive(Debug)]
struct Pieces {
    /// The number of the first byte.
    first: u32,
    parts: Vec<(u32, Vec<u8>)>,
}

/// Puts streams together. A stream whose SYN wasn't seen begins at the lowest number that was.
pub(crate) fn reassemble(packets: impl IntoIterator<Item = TcpPacket>) -> Vec<Stream> {
    let mut order = Vec::new();
    let mut current: HashMap<(Endpoint, Endpoint), usize> = HashMap::new();
    for packet in packets {
        let key = (packet.from, packet.to);
        let has_syn = packet.flags & SYN != 0;
        let first = packet.seq.wrapping_add(u32::from(has_syn));
        let known = current.get(&key).copied();
        // A SYN with another number is a new connection between the same two ends.
        let fresh = known.is_none_or(|at: usize| {
            let (_, pieces): &((Endpoint, Endpoint), Pieces) = &order[at];
            has_syn && pieces.first != first
        });
        if fresh {
            current.insert(key, order.len());
            let parts = Vec::new();
            order.push((key, Pieces { first, parts }));
        }
        let (_, pieces) = &mut order[current[&key]];
        if !packet.payload.is_empty() {
            pieces.parts.push((first, packet.payload));
        }
    }
    order
        .into_iter()
        .map(|((from, to), pieces)| Stream {
            from,
            to,
            bytes: join(pieces),
        })
        .collect()
}

fn join(pieces: Pieces) -> Vec<u8> {
    let Pieces { first, mut parts } = pieces;
    // Keep-alive probes carry a byte from before the first one: their offset is huge, and sorts
    // them behind all others.
    parts.sort_by_key(|(number, _)| number.wrapping_sub(first));
    let mut bytes: Vec<u8> = Vec::new();
    for (number, part) in parts {
        let offset = usize::try_from(number.wrapping_sub(first)).unwrap_or(usize::MAX);
        if offset > bytes.len() {
            break;
        }
        let known = bytes.len() - offset;
        bytes.extend(part.get(known..).unwrap_or_default());
    }
    bytes
}

/// A TLS record's kind, and the first byte of its content.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    kind: u8,
    first: u8,
    length: usize,
}

const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

/// The whole records of a stream. `None` where something isn't a TLS record.
fn records(mut bytes: &[u8]) -> Option<Vec<Record>> {
    let mut found = Vec::new();
    while let [kind, major, _, high, low, rest @ ..] = bytes {
        if !(20..=23).contains(kind) || *major != 3 {
            return None;
        }
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some(content) = rest.get(..length) else {
            // The end of the capture cuts the last record.
            break;
        };
        found.push(Record {
            kind: *kind,
            first: content.first().copied().unwrap_or_default(),
            length,
        });
        bytes = &rest[length..];
    }
    Some(found)
}

pub(crate) fn summarise_tls(streams: &[Stream]) -> TlsSummary {
    let mut summary = TlsSummary::default();
    // What each direction of TLS has shown: a hello of which kind, and encrypted records.
    let mut hellos: Vec<(Endpoint, Endpoint, u8)> = Vec::new();
    for stream in streams.iter().filter(|stream| !stream.bytes.is_empty()) {
        let Some(records) = records(&stream.bytes) else {
            summary.other.push((stream.from, stream.to));
            continue;
        };
        let encrypted = records.iter().filter(|r| r.kind == APPLICATION_DATA);
        let encrypted: usize = encrypted.map(|record| record.length).sum();
        summary.encrypted += encrypted;
        summary.hellos.extend(Hello::parse(&stream.bytes));
        if let Some(hello) = records.first()
            && hello.kind == HANDSHAKE
            && encrypted > 0
        {
            hellos.push((stream.from, stream.to, hello.first));
        }
    }
    let clients = hellos.iter().filter(|(.., kind)| *kind == CLIENT_HELLO);
    summary.handshakes = clients
        .filter(|(from, to, _)| hellos.contains(&(*to, *from, SERVER_HELLO)))
        .count();
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(from: &str, to: &str, seq: u32, flags: u8, payload: &[u8]) -> TcpPacket {
        TcpPacket {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            seq,
            ack: 0,
            flags,
            payload: payload.to_vec(),
        }
    }

    const A: &str = "10.0.0.1:1000";
    const B: &str = "10.0.0.2:15008";

    #[test]
    fn packets_in_the_wrong_order_and_sent_twice_make_one_stream() {
        let start = u32::MAX - 1;
        let streams = reassemble([
            packet(A, B, start, SYN, b""),
            packet(A, B, start.wrapping_add(4), 0, b"def"),
            packet(A, B, start.wrapping_add(1), 0, b"abc"),
            packet(A, B, start.wrapping_add(3), 0, b"cde"),
            packet(A, B, start.wrapping_add(9), 0, b"after the gap"),
        ]);
        assert_eq!(streams.len(), 1);
        assert_eq!(streams[0].bytes, b"abcdef");
    }

    #[test]
    fn a_handshake_needs_both_hellos_and_encrypted_records() {
        let record = |kind: u8, content: &[u8]| {
            let length = u8::try_from(content.len()).unwrap();
            [&[kind, 3, 3, 0, length], content].concat()
        };
        let client = [record(22, &[1, 0]), record(23, &[0; 40])].concat();
        let server = [record(22, &[2, 0]), record(23, &[0; 60])].concat();
        let both = [
            packet(A, B, 1, 0, &client),
            packet(B, A, 1, 0, &server),
            packet(B, "10.0.0.3:80", 1, 0, b"GET / HTTP/1.1"),
        ];
        let summary = summarise_tls(&reassemble(both.clone()));
        assert_eq!((summary.handshakes, summary.encrypted), (1, 100));
        assert_eq!(summary.other.len(), 1);
        let one = summarise_tls(&reassemble(both.into_iter().take(1)));
        assert_eq!((one.handshakes, one.encrypted), (0, 40));
    }
}
