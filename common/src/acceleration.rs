//! What the programs of socket acceleration and the agent tell each other.

use crate::Flow;

/// Bytes that may have been redirected to one end and not been read by it. One message more may
/// come on top, which the kernel cuts at half a MiB.
pub const CREDIT: u32 = 256 * 1024;

/// The same of what the agent sends, which keeps to [`CREDIT`] by itself. Bytes that the kernel had
/// no memory for at first count twice, which must not send the rest by TCP before its time.
pub const AGENTS_CREDIT: u32 = 2 * CREDIT;

/// What the agent says of a socket of its own before it opens; a listener's is that of what it
/// accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Tag {
    /// It stays as it is.
    #[default]
    Plain = 0,
    /// What the app sends is redirected.
    Receives = 1,
    /// What the app sends and what it is sent.
    Both = 2,
    /// It plays an app's part, in the self-test.
    App = 3,
}

/// One end of a TCP connection: its netns, its own address as source, its peer's as destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct End {
    /// The kernel's cookie of the netns, which no two have and none that comes later.
    pub netns: u64,
    pub flow: Flow,
    pub reserved: u32,
}

impl End {
    /// The other end, in the same netns.
    #[inline(always)]
    #[must_use]
    pub const fn peer(&self) -> Self {
        Self {
            netns: self.netns,
            flow: self.flow.turned(),
            reserved: 0,
        }
    }
}

/// How what an end sends goes to its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Sends {
    /// It has sent nothing yet.
    Undecided = 0,
    /// Into the peer's queue.
    Redirected = 1,
    /// By TCP, for good.
    Tcp = 2,
}

/// What is known of an end's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct Queue {
    /// Bytes that were to be redirected there, less those that were read. Never less than what waits,
    /// but more where the kernel had no memory for some.
    pub unread: i64,
    /// All bytes that were read there.
    pub read: u64,
    /// The kernel's cookie of the socket.
    pub cookie: u64,
}

impl Queue {
    /// All bytes that were ever to be redirected there: a read takes from the one number what it adds
    /// to the other.
    #[must_use]
    pub const fn redirected(&self) -> u64 {
        self.read.wrapping_add_signed(self.unread)
    }
}

/// Lets what an app sends go on to an app that it speaks to through the agent, without the agent.
/// Entered under the cookie of the sender's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Join {
    /// The end of the app that reads, and the cookie of its socket.
    pub target: End,
    pub target_cookie: u64,
    /// How many bytes the agent has read of the sender and written to the other. Only while that is all
    /// that the sender has sent it, which grows alone, may the sender's next message overtake none.
    pub after: u64,
    /// How many bytes have gone this way.
    pub bytes: u64,
    /// Binds all but the bytes to the sender. The kernel may give an entry's memory to another one while a
    /// program reads it, which would send a message to another app.
    seal: u64,
}

impl Join {
    /// Of a sender by its cookie.
    #[must_use]
    pub const fn new(sender: u64, (target, target_cookie): (End, u64), after: u64) -> Self {
        let seal = seal(sender, &target, target_cookie, after);
        Self {
            target,
            target_cookie,
            after,
            bytes: 0,
            seal,
        }
    }

    /// Whether it is whole and this sender's.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, sender: u64) -> bool {
        self.seal == seal(sender, &self.target, self.target_cookie, self.after)
    }
}

#[inline(always)]
const fn seal(sender: u64, target: &End, target_cookie: u64, after: u64) -> u64 {
    let flow = &target.flow;
    let seal = mix(mix(mix(mix(0, sender), target_cookie), after), target.netns);
    let ports = pair(flow.source_port as u32, flow.destination_port as u32);
    mix(
        mix_address(mix_address(seal, flow.source.0), flow.destination.0),
        ports,
    )
}

#[inline(always)]
const fn mix_address(seal: u64, [a, b, c, d]: [u32; 4]) -> u64 {
    mix(mix(seal, pair(a, b)), pair(c, d))
}

#[inline(always)]
const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

#[inline(always)]
const fn mix(seal: u64, word: u64) -> u64 {
    (seal.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Kept with a socket that is accelerated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndState {
    pub end: End,
    /// The kernel's cookie of the socket.
    pub cookie: u64,
    /// Bytes that were to be redirected to its peer. Never less than were, but more where the kernel had
    /// no memory for some.
    pub sent: u64,
    /// [`Join::after`] of the last join that it made use of, else 0.
    pub joined: u64,
    /// A [`Sends`].
    pub sends: u32,
    /// How many bytes may wait at its peer.
    pub credit: u32,
}

/// What the programs count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Event {
    /// A direction began by being redirected.
    Redirected = 0,
    /// A direction began by TCP, since its peer isn't accelerated.
    NoPeer = 1,
    /// A direction went over to TCP, since what was redirected isn't read.
    NoCredit = 2,
    /// A direction went over to TCP, since its peer was gone.
    PeerGone = 3,
    /// A direction between two apps of this node went on without the agent.
    Joined = 4,
}

impl Event {
    pub const ALL: [Self; 5] = [
        Self::Redirected,
        Self::NoPeer,
        Self::NoCredit,
        Self::PeerGone,
        Self::Joined,
    ];

    /// The word for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::NoPeer => "no_peer",
            Self::NoCredit => "no_credit",
            Self::PeerGone => "peer_gone",
            Self::Joined => "joined",
        }
    }
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)` of integers only, without padding (see the layout test).
unsafe impl aya::Pod for End {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for Queue {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for Join {}

#[cfg(test)]
mod tests {
    use core::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<End>(), 48);
        assert_eq!(offset_of!(End, flow), 8);
        assert_eq!(size_of::<EndState>(), 80);
        assert_eq!(size_of::<Queue>(), 24);
        assert_eq!(size_of::<Join>(), 80);
        assert_eq!(offset_of!(Join, seal), 72);
    }

    #[test]
    fn a_join_is_of_its_sender_and_of_no_other() {
        let address = |last| crate::Address([0, 0, 0xffff_0000, last]);
        let end = |netns, last, port| End {
            netns,
            flow: Flow {
                source: address(last),
                destination: address(7),
                source_port: port,
                destination_port: 80,
            },
            reserved: 0,
        };
        let join = Join::new(5, (end(1, 2, 3), 4), 1000);
        assert!(join.is_of(5));
        assert!(!join.is_of(6));
        // Half overwritten by another one's.
        for mut torn in [join; 5].into_iter().enumerate() {
            match &mut torn {
                (0, join) => join.target = end(2, 2, 3),
                (1, join) => join.target = end(1, 3, 3),
                (2, join) => join.target = end(1, 2, 4),
                (3, join) => join.target_cookie = 5,
                (_, join) => join.after = 1001,
            }
            assert!(!torn.1.is_of(5), "{torn:?}");
        }
        let counted = Join { bytes: 9, ..join };
        assert!(counted.is_of(5));
    }
}
