//! Reading a packet up to its TCP flags.

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock_tuple},
    helpers::{bpf_sk_release, bpf_skc_lookup_tcp},
    programs::TcContext,
};
use malla_common::{Address, Flow};

/// Offset of the IP header on a device with Ethernet headers.
pub const ETHERNET: u32 = 14;
/// Offset of the IP header on a device without (tun, IPsec, ...).
pub const NO_LINK_HEADER: u32 = 0;

/// Offset of the protocol in an Ethernet header.
const ETHERTYPE: usize = 12;

pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

const IPPROTO_HOP_BY_HOP: u8 = 0;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_AH: u8 = 51;
const IPPROTO_DESTINATION: u8 = 60;

/// Extension headers that are read at most; more make a packet unparsable.
const MAX_EXTENSION_HEADERS: u32 = 6;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;
pub const URG: u8 = 0x20;

/// States of a socket, from `net/tcp_states.h`.
pub const TCP_TIME_WAIT: u32 = 6;
pub const TCP_LISTEN: u32 = 10;

/// What a packet is to the programs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP, read up to its flags.
    Tcp,
    /// Not TCP.
    Other,
    /// TCP, or it may be, but its flags can't be read: a fragment, or headers in the way.
    Unparsable,
}

#[derive(Clone, Copy)]
pub struct Packet {
    pub flow: Flow,
    /// In network order.
    pub sequence: u32,
    /// In network order.
    pub acknowledgement: u32,
    /// Offset of the IP header.
    pub ip: u32,
    /// Offset of the TCP header.
    pub tcp: u32,
    /// Length of the TCP header in bytes.
    pub tcp_length: u32,
    pub flags: u8,
}

#[repr(C)]
struct Ipv4Header {
    version_length: u8,
    tos: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
}

#[repr(C)]
struct Ipv6Header {
    version_class_label: u32,
    payload_length: u16,
    next_header: u8,
    hop_limit: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

#[repr(C)]
struct TcpHeader {
    source: u16,
    destination: u16,
    sequence: u32,
    acknowledgement: u32,
    offset_flags: [u8; 2],
    window: u16,
}

impl Packet {
    const EMPTY: Self = Self {
        flow: Flow {
            source: Address([0; 4]),
            destination: Address([0; 4]),
            source_port: 0,
            destination_port: 0,
        },
        sequence: 0,
        acknowledgement: 0,
        ip: 0,
        tcp: 0,
        tcp_length: 0,
        flags: 0,
    };

    /// Reads the packet whose IP header stands at `ip`. The addresses are filled in whenever it
    /// is IP and isn't [`Kind::Other`].
    #[inline(always)]
    pub fn read(ctx: &TcContext, ip: u32) -> (Kind, Self) {
        let mut packet = Self { ip, ..Self::EMPTY };
        // What the receiver will read, and not what the packet's sender says of it: a packet
        // socket's may say anything.
        let protocol = if ip == ETHERNET {
            ctx.load::<u16>(ETHERTYPE).map(u16::from_be)
        } else {
            ctx.load::<u8>(0).map(|first| match first >> 4 {
                4 => ETH_P_IP,
                6 => ETH_P_IPV6,
                _ => 0,
            })
        };
        let Ok(protocol) = protocol else {
            return (Kind::Unparsable, packet);
        };
        let kind = match protocol {
            ETH_P_IP => packet.read_v4(ctx),
            ETH_P_IPV6 => packet.read_v6(ctx),
            // A tag inside the packet: what is behind it isn't where it is looked for.
            ETH_P_8021Q | ETH_P_8021AD => Kind::Unparsable,
            _ => Kind::Other,
        };
        (kind, packet)
    }

    #[inline(always)]
    fn read_v4(&mut self, ctx: &TcContext) -> Kind {
        let Ok(header) = ctx.load::<Ipv4Header>(self.ip as usize) else {
            return Kind::Unparsable;
        };
        if header.protocol != IPPROTO_TCP {
            return Kind::Other;
        }
        self.flow.source = Address::from_v4(header.source);
        self.flow.destination = Address::from_v4(header.destination);
        let length = u32::from(header.version_length & 0x0f) * 4;
        // More fragments, or an offset.
        if length < 20 || u16::from_be(header.fragment) & 0x3fff != 0 {
            return Kind::Unparsable;
        }
        self.read_tcp(ctx, self.ip + length)
    }

    #[inline(always)]
    fn read_v6(&mut self, ctx: &TcContext) -> Kind {
        let Ok(header) = ctx.load::<Ipv6Header>(self.ip as usize) else {
            return Kind::Unparsable;
        };
        self.flow.source = Address::from_v6(header.source);
        self.flow.destination = Address::from_v6(header.destination);
        let mut next = header.next_header;
        let mut offset = self.ip + 40;
        let mut fragment = false;
        for _ in 0..MAX_EXTENSION_HEADERS {
            match next {
                IPPROTO_TCP if fragment => return Kind::Unparsable,
                IPPROTO_TCP => return self.read_tcp(ctx, offset),
                IPPROTO_HOP_BY_HOP | IPPROTO_ROUTING | IPPROTO_DESTINATION | IPPROTO_AH
                | IPPROTO_FRAGMENT => {}
                _ => return Kind::Other,
            }
            let Ok(extension) = ctx.load::<[u8; 4]>(offset as usize) else {
                return Kind::Unparsable;
            };
            let length = match next {
                IPPROTO_FRAGMENT => {
                    // A later fragment: what its header calls next stands in the first one.
                    if u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 {
                        return match extension[0] {
                            IPPROTO_TCP | IPPROTO_ROUTING | IPPROTO_DESTINATION | IPPROTO_AH => {
                                Kind::Unparsable
                            }
                            _ => Kind::Other,
                        };
                    }
                    fragment = true;
                    8
                }
                IPPROTO_AH => (u32::from(extension[1]) + 2) * 4,
                _ => (u32::from(extension[1]) + 1) * 8,
            };
            next = extension[0];
            offset += length;
        }
        Kind::Unparsable
    }

    #[inline(always)]
    fn read_tcp(&mut self, ctx: &TcContext, offset: u32) -> Kind {
        let Ok(header) = ctx.load::<TcpHeader>(offset as usize) else {
            return Kind::Unparsable;
        };
        self.flow.source_port = u16::from_be(header.source);
        self.flow.destination_port = u16::from_be(header.destination);
        self.sequence = header.sequence;
        self.acknowledgement = header.acknowledgement;
        self.tcp = offset;
        self.tcp_length = u32::from(header.offset_flags[0] >> 4) * 4;
        self.flags = header.offset_flags[1];
        if self.tcp_length < 20 {
            Kind::Unparsable
        } else {
            Kind::Tcp
        }
    }

    #[inline(always)]
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// How many bytes of its connection it carries; very many where it can't be asked. The IP header
    /// tells, since a device may have padded the frame; of a packet too large for it (BIG TCP) it
    /// says 0.
    #[inline(always)]
    pub fn payload(&self, ctx: &TcContext) -> u32 {
        let (field, headers) = if self.flow.source.is_v4() {
            (2, 0)
        } else {
            (4, 40)
        };
        let Ok(length) = ctx.load::<u16>((self.ip + field) as usize) else {
            return u32::MAX;
        };
        let end = match u32::from(u16::from_be(length)) {
            0 => ctx.len(),
            length => self.ip + headers + length,
        };
        end.saturating_sub(self.tcp + self.tcp_length)
    }

    /// A SYN that opens a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }
}

/// The netns of the packet, for look-ups of sockets.
pub const THIS_NETNS: u64 = BPF_F_CURRENT_NETNS as i64 as u64;

/// What a look-up of the socket that would receive `flow` asks, and its size.
#[inline(always)]
pub fn tuple(flow: &Flow) -> (bpf_sock_tuple, u32) {
    // SAFETY: all zeros is a value of every field, and the family's own are all written.
    unsafe {
        let mut tuple: bpf_sock_tuple = core::mem::zeroed();
        let size = if flow.source.is_v4() {
            let v4 = &mut tuple.__bindgen_anon_1.ipv4;
            v4.saddr = flow.source.0[3];
            v4.daddr = flow.destination.0[3];
            v4.sport = flow.source_port.to_be();
            v4.dport = flow.destination_port.to_be();
            12
        } else {
            let v6 = &mut tuple.__bindgen_anon_1.ipv6;
            v6.saddr = flow.source.0;
            v6.daddr = flow.destination.0;
            v6.sport = flow.source_port.to_be();
            v6.dport = flow.destination_port.to_be();
            36
        };
        (tuple, size)
    }
}

/// Whether a socket of this netns, other than a listener, would receive `flow`. Finds request
/// and TIME_WAIT sockets too.
#[inline(always)]
pub fn socket_receives(ctx: &TcContext, flow: &Flow) -> bool {
    receiver(ctx, flow).is_some_and(|state| state != TCP_LISTEN)
}

/// Whether it is a listener that would receive `flow`.
#[inline(always)]
pub fn listener_receives(ctx: &TcContext, flow: &Flow) -> bool {
    receiver(ctx, flow) == Some(TCP_LISTEN)
}

/// The state of the socket of this netns that would receive `flow`.
#[inline(always)]
pub fn receiver(ctx: &TcContext, flow: &Flow) -> Option<u32> {
    let (mut tuple, size) = tuple(flow);
    // SAFETY: the tuple is fully initialised for the size that is passed; a socket found is
    // referenced, read, and released once.
    unsafe {
        let socket = bpf_skc_lookup_tcp(ctx.skb.skb.cast(), &raw mut tuple, size, THIS_NETNS, 0);
        if socket.is_null() {
            return None;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        Some(state)
    }
}

/// Whether a socket of this netns holds the other end of `flow`'s tuple: the one that would
/// receive the answers to it.
#[inline(always)]
pub fn socket_answers(ctx: &TcContext, flow: &Flow) -> bool {
    socket_receives(ctx, &flow.turned())
}
