//! What a TLS hello says in the open.

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

const ALPN: u16 = 16;
const SERVER_NAME: u16 = 0;
const SUPPORTED_VERSIONS: u16 = 43;
const KEY_SHARE: u16 = 51;

/// A `ClientHello` or `ServerHello` (RFC 8446, 4.1).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hello {
    pub is_client: bool,
    /// The versions offered, or the one chosen; 0x0304 is TLS 1.3.
    pub versions: Vec<u16>,
    /// The key exchange groups with a share, or the one chosen.
    pub groups: Vec<u16>,
    /// The protocols offered. A server of TLS 1.3 answers encrypted.
    pub alpn: Vec<String>,
    pub has_server_name: bool,
}

impl Hello {
    /// The hello at the beginning of a stream, which may be cut over several records.
    pub(crate) fn parse(stream: &[u8]) -> Option<Self> {
        let message = first_message(stream)?;
        let mut reader = Reader(&message);
        let kind = reader.number(1)?;
        let mut body = Reader(reader.prefixed(3)?);
        let is_client = match u8::try_from(kind).ok()? {
            CLIENT_HELLO => true,
            SERVER_HELLO => false,
            _ => return None,
        };
        // Version and random.
        body.take(2 + 32)?;
        body.prefixed(1)?;
        if is_client {
            body.prefixed(2)?;
            body.prefixed(1)?;
        } else {
            body.take(2 + 1)?;
        }
        let mut hello = Self {
            is_client,
            ..Self::default()
        };
        let mut extensions = Reader(body.prefixed(2)?);
        while !extensions.0.is_empty() {
            let kind = extensions.number(2)?;
            let content = Reader(extensions.prefixed(2)?);
            hello.extend(u16::try_from(kind).ok()?, content)?;
        }
        Some(hello)
    }

    fn extend(&mut self, kind: u16, mut content: Reader<'_>) -> Option<()> {
        match (kind, self.is_client) {
            (SUPPORTED_VERSIONS, true) => {
                let mut versions = Reader(content.prefixed(1)?);
                while !versions.0.is_empty() {
                    self.versions.push(versions.short()?);
                }
            }
            (SUPPORTED_VERSIONS, false) => self.versions.push(content.short()?),
            (KEY_SHARE, true) => {
                let mut shares = Reader(content.prefixed(2)?);
                while !shares.0.is_empty() {
                    self.groups.push(shares.short()?);
                    shares.prefixed(2)?;
                }
            }
            (KEY_SHARE, false) => self.groups.push(content.short()?),
            (ALPN, _) => {
                let mut protocols = Reader(content.prefixed(2)?);
                while !protocols.0.is_empty() {
                    let protocol = String::from_utf8_lossy(protocols.prefixed(1)?);
                    self.alpn.push(protocol.into_owned());
                }
            }
            (SERVER_NAME, _) => self.has_server_name = true,
            _ => {}
        }
        Some(())
    }
}

/// The first handshake message of a stream, put together from its records.
fn first_message(stream: &[u8]) -> Option<Vec<u8>> {
    let mut records = Reader(stream);
    let mut message = Vec::new();
    loop {
        let head = records.take(3)?;
        if head.first() != Some(&HANDSHAKE) {
            return None;
        }
        message.extend_from_slice(records.prefixed(2)?);
        if let Some(end) = Reader(&message)
            .take(1)
            .and_then(|_| Reader(&message[1..]).number(3))
            && message.len() >= end + 4
        {
            return Some(message);
        }
    }
}

/// Bytes that are read from the front. `None` where there are too few.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// A big-endian number of at most 4 bytes.
    fn number(&mut self, bytes: usize) -> Option<usize> {
        let digits = self.take(bytes)?;
        Some(
            digits
                .iter()
                .fold(0, |number, byte| number << 8 | usize::from(*byte)),
        )
    }

    fn short(&mut self) -> Option<u16> {
        u16::try_from(self.number(2)?).ok()
    }

    /// A vector behind its length of `bytes` bytes.
    fn prefixed(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let length = self.number(bytes)?;
        self.take(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap();
        [&kind.to_be_bytes(), &length.to_be_bytes(), content].concat()
    }

    fn client_hello() -> Vec<u8> {
        let extensions = [
            extension(SUPPORTED_VERSIONS, &[2, 3, 4]),
            extension(KEY_SHARE, &[0, 5, 0x11, 0xec, 0, 1, 9]),
            extension(ALPN, &[0, 3, 2, b'h', b'2']),
        ]
        .concat();
        let length = u16::try_from(extensions.len()).unwrap();
        let body = [
            &[3, 3][..],
            &[7; 32],
            &[0],
            &[0, 2, 0x13, 1],
            &[1, 0],
            &length.to_be_bytes(),
            &extensions,
        ]
        .concat();
        let length = u8::try_from(body.len()).unwrap();
        [&[CLIENT_HELLO, 0, 0, length], &body[..]].concat()
    }

    #[test]
    fn a_hello_is_read_whole_or_cut_over_two_records() {
        let message = client_hello();
        let record = |content: &[u8]| {
            let length = u16::try_from(content.len()).unwrap();
            [&[HANDSHAKE, 3, 3], &length.to_be_bytes()[..], content].concat()
        };
        let whole = record(&message);
        let cut = [record(&message[..2]), record(&message[2..])].concat();
        for stream in [whole, cut] {
            let hello = Hello::parse(&stream).unwrap();
            assert!(hello.is_client && !hello.has_server_name);
            assert_eq!(hello.versions, [0x0304]);
            assert_eq!(hello.groups, [0x11ec]);
            assert_eq!(hello.alpn, ["h2"]);
        }
    }

    #[test]
    fn what_is_cut_short_or_no_hello_is_none() {
        assert_eq!(Hello::parse(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(Hello::parse(&[HANDSHAKE, 3, 3, 0, 4, 9, 0, 0, 0]), None);
        assert_eq!(Hello::parse(&[HANDSHAKE, 3, 3, 0, 9, 1]), None);
    }
}
