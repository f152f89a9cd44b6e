//! TCP packets as bytes: made for raw senders, and read from captures.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

const TCP: u8 = 6;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const DESTINATION_OPTIONS: u8 = 60;
const FRAGMENT: u8 = 44;

/// A TCP packet without options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpPacket {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
}

impl TcpPacket {
    pub fn syn(from: SocketAddr, to: SocketAddr, seq: u32) -> Self {
        Self {
            from,
            to,
            seq,
            ack: 0,
            flags: SYN,
            payload: Vec::new(),
        }
    }

    /// The packet from its IP header on, sums included. Both addresses must be of one family.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(TCP_HEADER + self.payload.len());
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(self.to.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        // The header's length in words of 4 bytes, the flags, a window, no sum yet, no urgent data.
        tcp.extend([5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.payload);
        let sum = tcp_sum(self.from.ip(), self.to.ip(), &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from, to, &tcp),
            (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from, to, TCP, &tcp),
            _ => panic!("{} and {} aren't of one family", self.from, self.to),
        }
    }

    /// Reads a packet from its IP header on. `None` where it isn't whole TCP.
    pub fn parse(ip: &[u8]) -> Option<Self> {
        let (from, to, tcp) = split(ip)?;
        let word = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let long = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: SocketAddr::new(from, word(0)?),
            to: SocketAddr::new(to, word(2)?),
            seq: long(4)?,
            ack: long(8)?,
            flags: *tcp.get(13)?,
            payload: tcp.get(header..)?.to_vec(),
        })
    }
}

/// Whether a packet, given from its IP header on, is whole TCP with the right sum.
pub fn has_valid_sum(ip: &[u8]) -> bool {
    split(ip).is_some_and(|(from, to, tcp)| tcp_sum(from, to, tcp) == 0)
}

/// Cuts an IP packet in two fragments, the first with `first` bytes of payload (a multiple of 8).
/// Linux takes an IPv6 packet only where the first fragment has the whole TCP header (24 or more).
pub fn fragments(ip: &[u8], first: usize) -> [Vec<u8>; 2] {
    assert!(first.is_multiple_of(8), "fragments start at multiples of 8");
    let more = 0x2000_u16;
    let offset = u16::try_from(first / 8).expect("a packet's offset fits");
    if ip[0] >> 4 == 4 {
        let header = usize::from(ip[0] & 0xf) * 4;
        let (head, body) = ip.split_at(header);
        let piece = |part: &[u8], field: u16| {
            let mut bytes = [head, part].concat();
            let length = u16::try_from(bytes.len()).expect("a fragment's length fits");
            bytes[2..4].copy_from_slice(&length.to_be_bytes());
            bytes[6..8].copy_from_slice(&field.to_be_bytes());
            bytes[10..12].fill(0);
            let sum = checksum(&bytes[..header]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            bytes
        };
        return [piece(&body[..first], more), piece(&body[first..], offset)];
    }
    let (head, body) = ip.split_at(IPV6_HEADER);
    let (from, to) = ipv6_addresses(head).expect("an IPv6 header has addresses");
    let piece = |part: &[u8], field: u16| {
        let mut fragment = vec![head[6], 0];
        fragment.extend(field.to_be_bytes());
        fragment.extend([0x6d, 0x61, 0x6c, 0x6c]);
        fragment.extend(part);
        ipv6(from, to, FRAGMENT, &fragment)
    };
    // In IPv6 the flag is the lowest bit, and the offset stands above three bits.
    [piece(&body[..first], 1), piece(&body[first..], offset << 3)]
}

/// Puts an empty header of destination options between an IPv6 header and what follows it.
pub fn behind_destination_options(ip: &[u8]) -> Vec<u8> {
    let (head, body) = ip.split_at(IPV6_HEADER);
    let (from, to) = ipv6_addresses(head).expect("an IPv6 header has addresses");
    // Next header, length beyond 8 bytes, and six bytes of padding as one option.
    let options = [head[6], 0, 1, 4, 0, 0, 0, 0];
    ipv6(from, to, DESTINATION_OPTIONS, &[&options, body].concat())
}

/// Addresses and TCP part of an IP packet without extension headers.
fn split(ip: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    match ip.first()? >> 4 {
        4 => {
            let header = usize::from(ip[0] & 0xf) * 4;
            let length = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            let from: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
            let tcp = ip.get(header..length)?;
            (ip[9] == TCP).then_some((from.into(), to.into(), tcp))
        }
        6 => {
            let (from, to) = ipv6_addresses(ip)?;
            let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
            let tcp = ip.get(IPV6_HEADER..IPV6_HEADER + length)?;
            (ip[6] == TCP).then_some((from.into(), to.into(), tcp))
        }
        _ => None,
    }
}

fn ipv6_addresses(header: &[u8]) -> Option<(Ipv6Addr, Ipv6Addr)> {
    let from: [u8; 16] = header.get(8..24)?.try_into().ok()?;
    let to: [u8; 16] = header.get(24..40)?.try_into().ok()?;
    Some((from.into(), to.into()))
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, tcp: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + tcp.len()).expect("a packet's length fits");
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    // An identification other than 0, which a raw socket would replace; no flags, TTL 64, no sum.
    packet.extend([0x6d, 0x61, 0, 0, 64, TCP, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(tcp);
    packet
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next_header: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a packet's length fits");
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next_header, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(body);
    packet
}

/// The sum over pseudo header and TCP: what belongs in the packet, or 0 where it is there.
fn tcp_sum(from: IpAddr, to: IpAddr, tcp: &[u8]) -> u16 {
    let mut summed = Vec::with_capacity(40 + tcp.len());
    for address in [from, to] {
        match address {
            IpAddr::V4(v4) => summed.extend(v4.octets()),
            IpAddr::V6(v6) => summed.extend(v6.octets()),
        }
    }
    summed.extend([0, TCP]);
    let length = u32::try_from(tcp.len()).expect("a packet's length fits");
    summed.extend(length.to_be_bytes());
    summed.extend(tcp);
    checksum(&summed)
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or_default();
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("the carry was added")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_reads_back_as_it_was_made() {
        for (from, to) in [
            ("10.0.0.1:80", "10.0.0.2:9"),
            ("[fd00::1]:80", "[fd00::2]:9"),
        ] {
            let packet = TcpPacket {
                payload: b"odd".to_vec(),
                ..TcpPacket::syn(from.parse().unwrap(), to.parse().unwrap(), 7)
            };
            let bytes = packet.to_bytes();
            assert!(has_valid_sum(&bytes));
            assert_eq!(TcpPacket::parse(&bytes), Some(packet));
        }
    }

    #[test]
    fn a_changed_byte_is_seen_in_the_sum() {
        let packet = TcpPacket::syn(
            "10.0.0.1:80".parse().unwrap(),
            "10.0.0.2:9".parse().unwrap(),
            7,
        );
        let mut bytes = packet.to_bytes();
        bytes[25] ^= 1;
        assert!(!has_valid_sum(&bytes));
    }
}
