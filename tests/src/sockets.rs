//! The TCP sockets of a network namespace, as the kernel lists them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// One TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSocket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub state: TcpState,
}

/// The states that tests tell apart (`include/net/tcp_states.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpState {
    Established,
    TimeWait,
    Listen,
    Other(u8),
}

/// The sockets of the calling thread's network namespace. IPv4 on an IPv6 socket reads as IPv4.
pub(crate) fn list() -> Vec<TcpSocket> {
    // Not /proc/net, which shows the namespace of the process, not of the thread.
    let tables =
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")));
    let lines = tables.iter().flatten().flat_map(|table| table.lines());
    lines.filter_map(parse).collect()
}

/// A line such as `0: 0100007F:1F90 00000000:0000 0A …`; `None` for a table's head.
fn parse(line: &str) -> Option<TcpSocket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    Some(TcpSocket {
        local: endpoint(words.next()?)?,
        remote: endpoint(words.next()?)?,
        state: match u8::from_str_radix(words.next()?, 16).ok()? {
            1 => TcpState::Established,
            6 => TcpState::TimeWait,
            10 => TcpState::Listen,
            other => TcpState::Other(other),
        },
    })
}

/// Words of the address stand as the machine keeps them, the port as a number.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let address = match address.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?.to_ne_bytes())),
        32 => {
            let mut octets = [0; 16];
            for (place, bytes) in octets.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&word(place * 8)?.to_ne_bytes());
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(
        address,
        u16::from_str_radix(port, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        assert_eq!(parse("  sl  local_address rem_address   st tx_queue"), None);
        let socket = parse("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00").unwrap();
        assert_eq!(socket.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(socket.state, TcpState::Listen);
        let socket = parse(
            "1: 000000FD000000000000000001000000:0050 0000000000000000FFFF00000100000A:C000 01",
        );
        let socket = socket.unwrap();
        assert_eq!(socket.local, "[fd00::1]:80".parse().unwrap());
        assert_eq!(socket.remote, "10.0.0.1:49152".parse().unwrap());
        assert_eq!(socket.state, TcpState::Established);
    }
}
