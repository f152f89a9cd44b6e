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
}

/// Kept with a socket that is accelerated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndState {
    pub end: End,
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
}

impl Event {
    pub const ALL: [Self; 4] = [
        Self::Redirected,
        Self::NoPeer,
        Self::NoCredit,
        Self::PeerGone,
    ];

    /// The word for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::NoPeer => "no_peer",
            Self::NoCredit => "no_credit",
            Self::PeerGone => "peer_gone",
        }
    }
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)` of integers only, without padding (see the layout test).
unsafe impl aya::Pod for End {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for Queue {}

#[cfg(test)]
mod tests {
    use core::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<End>(), 48);
        assert_eq!(offset_of!(End, flow), 8);
        assert_eq!(size_of::<EndState>(), 56);
        assert_eq!(size_of::<Queue>(), 16);
    }
}
