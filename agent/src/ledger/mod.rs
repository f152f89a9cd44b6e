//! The ledger: what the agent believes to have open, and whether the kernel agrees.
//!
//! Whoever makes a descriptor that outlives a call enters it ([`Accounted`]), with what it is for.
//! What is read from the kernel (`/proc/self/fd` here, the sockets of the pods' netns in `steer`) is
//! compared with that: a descriptor that nobody entered, and an entry without a descriptor, are
//! differences. Under traffic there are always some; one that stays is a leak.
//!
//! Knows nothing of what it counts, decides nothing, and closes nothing. Entering and leaving are an
//! atomic store each, without a lock.

mod compare;
mod descriptors;
mod persistence;
mod table;

pub use compare::{
    Account, Difference, DifferenceKind, Ends, KernelAccount, KernelSocket, PodAccount, PodSockets,
    compare,
};
pub use descriptors::{Descriptor, Descriptors, Target};
pub use persistence::{Alarms, Event, Group, Persistence};
pub use table::{Accounted, Entry, Kind, Line};

/// A process has one table of descriptors, and so one of what they are for.
static TABLE: table::Table = table::Table::new();

/// All that is entered now, in the order of the descriptors' numbers.
pub fn lines() -> Vec<Line> {
    TABLE.lines()
}
