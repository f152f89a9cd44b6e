//! IPv4 and IPv6 addresses in one form.

/// An IP address, 16 bytes in network order; IPv4 in its IPv4-mapped form (`::ffff:a.b.c.d`).
///
/// One form for both families, so that no map and no decision exists twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Address(pub [u32; 4]);

/// The third word of an IPv4-mapped address, in network order.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// From the address in network order, as it stands in the packet.
    #[inline(always)]
    pub const fn from_v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    #[inline(always)]
    pub const fn from_v6(words: [u32; 4]) -> Self {
        Self(words)
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (
            a.to_ne_bytes(),
            b.to_ne_bytes(),
            c.to_ne_bytes(),
            d.to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// 127.0.0.0/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
        }
    }

    /// `fe80::/10`, where an address means nothing without its interface.
    #[inline(always)]
    pub const fn is_v6_link_local(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }
}

#[cfg(feature = "user")]
mod user {
    use core::net::{IpAddr, Ipv6Addr};

    use super::Address;

    impl From<IpAddr> for Address {
        fn from(address: IpAddr) -> Self {
            let octets = match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let word = |i: usize| {
                u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]])
            };
            Self([word(0), word(4), word(8), word(12)])
        }
    }

    impl From<Address> for IpAddr {
        fn from(address: Address) -> Self {
            let mut octets = [0; 16];
            for (place, word) in octets.chunks_exact_mut(4).zip(address.0) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(octets).to_canonical()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn both_families_read_back_as_they_were() {
            for text in ["10.1.2.3", "0.0.0.0", "fd00::1", "::1", "fe80::1"] {
                let address: IpAddr = text.parse().unwrap();
                assert_eq!(IpAddr::from(Address::from(address)), address);
            }
        }

        #[test]
        fn loopback_and_link_local_are_told_apart() {
            let is = |text: &str| {
                let address = Address::from(text.parse::<IpAddr>().unwrap());
                (
                    address.is_v4(),
                    address.is_loopback(),
                    address.is_v6_link_local(),
                )
            };
            assert_eq!(is("127.9.0.1"), (true, true, false));
            assert_eq!(is("128.0.0.1"), (true, false, false));
            assert_eq!(is("::1"), (false, true, false));
            assert_eq!(is("fe80::5"), (false, false, true));
            assert_eq!(is("febf::5"), (false, false, true));
            assert_eq!(is("fec0::5"), (false, false, false));
        }
    }
}
