//! A cell for each descriptor number: whose it is, and what for.
//!
//! A number is used again as soon as its descriptor is closed, maybe by another thread before the
//! first one has left. So each entry has a serial number, and leaves only what is still its own:
//! the order of closing and leaving doesn't matter.

use std::{
    ops::{Deref, DerefMut},
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// Descriptors of a chunk, which is made when the first of them is entered and stays.
const CHUNK: usize = 8192;
/// Numbers beyond all chunks, 4 millions, are entered nowhere, and so differ.
const CHUNKS: usize = 512;

/// A cell is, from its low end: kind, pod, serial number.
const KIND_BITS: u32 = 8;
const POD_BITS: u32 = 32;
const SERIAL_SHIFT: u32 = KIND_BITS + POD_BITS;

/// What a descriptor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A listening socket in a pod's netns.
    Listener = 1,
    /// A second descriptor of such a socket.
    ListenerCopy,
    /// Accepted from an app that calls out.
    AppOutbound,
    /// Dialled to an app.
    AppInbound,
    /// Accepted from a client without the mesh.
    PlaintextInbound,
    /// Dialled to a destination without the mesh.
    PlaintextOutbound,
    /// A tunnel to another agent.
    TunnelOutbound,
    /// A tunnel from another agent.
    TunnelInbound,
    /// A tunnel to be, of either direction, before it is open.
    Handshake,
    /// What shows that the network lets one pod of this node reach another: either end.
    Witness,
    /// Being dialled.
    Connecting,
    /// A pod's network namespace, or the agent's own.
    Netns,
    /// What asks the kernel of a netns, or hears from it.
    Netlink,
    /// A link by which a program hangs on a pod.
    Link,
    /// Metrics, probes and configuration: listeners and connections.
    Admin,
    /// What watches the mesh file.
    Watch,
    /// What tells how busy a worker is.
    Meter,
    /// Programs, links and maps of socket acceleration.
    Acceleration,
}

impl Kind {
    pub const ALL: [Self; 18] = [
        Self::Listener,
        Self::ListenerCopy,
        Self::AppOutbound,
        Self::AppInbound,
        Self::PlaintextInbound,
        Self::PlaintextOutbound,
        Self::TunnelOutbound,
        Self::TunnelInbound,
        Self::Handshake,
        Self::Witness,
        Self::Connecting,
        Self::Netns,
        Self::Netlink,
        Self::Link,
        Self::Admin,
        Self::Watch,
        Self::Meter,
        Self::Acceleration,
    ];

    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::ListenerCopy => "listener_copy",
            Self::AppOutbound => "app_outbound",
            Self::AppInbound => "app_inbound",
            Self::PlaintextInbound => "plaintext_inbound",
            Self::PlaintextOutbound => "plaintext_outbound",
            Self::TunnelOutbound => "tunnel_outbound",
            Self::TunnelInbound => "tunnel_inbound",
            Self::Handshake => "handshake",
            Self::Witness => "witness",
            Self::Connecting => "connecting",
            Self::Netns => "netns",
            Self::Netlink => "netlink",
            Self::Link => "link",
            Self::Admin => "admin",
            Self::Watch => "watch",
            Self::Meter => "meter",
            Self::Acceleration => "acceleration",
        }
    }

    /// Whether it is a connection whose other end is an app's.
    pub const fn is_to_app(self) -> bool {
        matches!(self, Self::AppOutbound | Self::AppInbound)
    }

    /// Whether it is a connection in a pod's netns.
    pub const fn is_connection(self) -> bool {
        match self {
            Self::AppOutbound
            | Self::AppInbound
            | Self::PlaintextInbound
            | Self::PlaintextOutbound
            | Self::TunnelOutbound
            | Self::TunnelInbound
            | Self::Handshake
            | Self::Witness
            | Self::Connecting => true,
            Self::Listener
            | Self::ListenerCopy
            | Self::Netns
            | Self::Netlink
            | Self::Link
            | Self::Admin
            | Self::Watch
            | Self::Meter
            | Self::Acceleration => false,
        }
    }
}

/// What one descriptor is entered as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub descriptor: RawFd,
    pub kind: Kind,
    /// The pod's number; 0 where it isn't one pod's.
    pub pod: u32,
    /// Tells this entry from earlier ones of the same descriptor number.
    pub serial: u32,
}

#[derive(Debug)]
pub(super) struct Table {
    chunks: [OnceLock<Box<[AtomicU64]>>; CHUNKS],
}

impl Table {
    pub(super) const fn new() -> Self {
        Self {
            chunks: [const { OnceLock::new() }; CHUNKS],
        }
    }

    fn cell(&self, descriptor: RawFd) -> Option<&AtomicU64> {
        let number = usize::try_from(descriptor).ok()?;
        let chunk = self.chunks.get(number / CHUNK)?;
        let cells = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        cells.get(number % CHUNK)
    }

    fn enter(&'static self, descriptor: RawFd, pod: u32, kind: Kind) -> Entry {
        let Some(cell) = self.cell(descriptor) else {
            let (cell, value) = (None, 0);
            return Entry { cell, value };
        };
        let before = cell.load(Ordering::Relaxed) >> SERIAL_SHIFT;
        let value = pack(before + 1, pod, kind);
        // Whoever has the descriptor open is alone with its cell, but for an earlier one's leaving,
        // which changes nothing any more.
        cell.store(value, Ordering::Relaxed);
        Entry {
            cell: Some(cell),
            value,
        }
    }

    pub(super) fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for (chunk, first) in self.chunks.iter().zip((0..).step_by(CHUNK)) {
            for (cell, descriptor) in chunk.get().into_iter().flatten().zip(first..) {
                lines.extend(unpack(descriptor, cell.load(Ordering::Relaxed)));
            }
        }
        lines
    }
}

fn pack(serial: u64, pod: u32, kind: Kind) -> u64 {
    (serial << SERIAL_SHIFT) | (u64::from(pod) << KIND_BITS) | kind as u64
}

/// None for a cell that was left, or never used.
fn unpack(descriptor: RawFd, value: u64) -> Option<Line> {
    let kind = value & ((1 << KIND_BITS) - 1);
    let kind = Kind::ALL.into_iter().find(|known| *known as u64 == kind)?;
    let pod = (value >> KIND_BITS) & u64::from(u32::MAX);
    Some(Line {
        descriptor,
        kind,
        // Both have the bits that they are cut to.
        pod: u32::try_from(pod).unwrap_or(0),
        serial: u32::try_from(value >> SERIAL_SHIFT).unwrap_or(0),
    })
}

/// A descriptor's entry, which leaves when it is dropped.
#[derive(Debug)]
pub struct Entry {
    cell: Option<&'static AtomicU64>,
    value: u64,
}

impl Entry {
    /// Enters a descriptor that is open. To be kept for as long as that is.
    pub fn new(object: &impl AsFd, pod: u32, kind: Kind) -> Self {
        super::TABLE.enter(object.as_fd().as_raw_fd(), pod, kind)
    }

    /// What it is for from now on.
    pub fn turn_into(&mut self, kind: Kind) {
        let kept = self.value & !((1 << KIND_BITS) - 1);
        self.change(kept | kind as u64);
    }

    /// Whose it is from now on.
    pub fn belongs_to(&mut self, pod: u32) {
        let kept = self.value & !(u64::from(u32::MAX) << KIND_BITS);
        self.change(kept | (u64::from(pod) << KIND_BITS));
    }

    fn change(&mut self, value: u64) {
        if self.replace(value) {
            self.value = value;
        }
    }

    /// Whether the cell was still this entry's.
    fn replace(&self, value: u64) -> bool {
        self.cell.is_some_and(|cell| {
            cell.compare_exchange(self.value, value, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.replace(self.value >> SERIAL_SHIFT << SERIAL_SHIFT);
    }
}

/// Something with a descriptor, and its entry.
#[derive(Debug)]
pub struct Accounted<T> {
    entry: Entry,
    object: T,
}

impl<T: AsFd> Accounted<T> {
    pub fn new(object: T, pod: u32, kind: Kind) -> Self {
        let entry = Entry::new(&object, pod, kind);
        Self { entry, object }
    }
}

impl<T> Accounted<T> {
    /// `entry` is that of `object`'s descriptor.
    pub fn from_parts(entry: Entry, object: T) -> Self {
        Self { entry, object }
    }

    /// To make something else of the same descriptor.
    pub fn into_parts(self) -> (Entry, T) {
        (self.entry, self.object)
    }

    /// What it is for from now on.
    #[must_use]
    pub fn turned_into(mut self, kind: Kind) -> Self {
        self.entry.turn_into(kind);
        self
    }
}

impl<T> Deref for Accounted<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}

impl<T> DerefMut for Accounted<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> &'static Table {
        Box::leak(Box::new(Table::new()))
    }

    #[test]
    fn an_entry_stands_until_it_is_dropped() {
        let table = table();
        let mut entry = table.enter(7, 3, Kind::Handshake);
        let _other = table.enter(9_000, u32::MAX, Kind::Listener);
        entry.turn_into(Kind::TunnelInbound);
        entry.belongs_to(4);
        let told = |line: &Line| (line.descriptor, line.pod, line.kind);
        let lines = table.lines();
        assert_eq!(
            lines.iter().map(told).collect::<Vec<_>>(),
            [
                (7, 4, Kind::TunnelInbound),
                (9_000, u32::MAX, Kind::Listener)
            ]
        );
        drop(entry);
        assert_eq!(table.lines().len(), 1);
    }

    #[test]
    fn who_leaves_late_takes_nothing_of_who_has_the_descriptor_now() {
        let table = table();
        let mut late = table.enter(7, 1, Kind::AppOutbound);
        let _now = table.enter(7, 2, Kind::AppInbound);
        let before = table.lines();
        late.turn_into(Kind::Admin);
        drop(late);
        assert_eq!(table.lines(), before);
        assert_eq!(before[0].serial, 2);
    }

    #[test]
    fn a_descriptor_beyond_the_table_is_not_entered() {
        let table = table();
        let beyond = RawFd::try_from(CHUNK * CHUNKS).unwrap();
        let entry = table.enter(beyond, 1, Kind::AppOutbound);
        assert!(table.lines().is_empty());
        drop(entry);
    }

    #[test]
    fn every_kind_has_a_word_of_its_own_and_comes_back_from_its_cell() {
        let words: std::collections::HashSet<_> = Kind::ALL.iter().map(|k| k.as_str()).collect();
        assert_eq!(words.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            let line = unpack(1, pack(9, 8, kind)).unwrap();
            assert_eq!((line.kind, line.pod, line.serial), (kind, 8, 9));
        }
    }
}
