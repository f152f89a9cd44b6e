//! What the eBPF programs count, and where in one flat per-CPU array each count stands.

use crate::Reason;

/// Which way a connection goes, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// The app opens it.
    Outbound = 0,
    /// The app is reached by it.
    Inbound = 1,
}

/// Whether a decision about a whole connection is counted, or single packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Unit {
    Syns = 0,
    Packets = 1,
}

/// What became of the SYN or packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// It went to the agent.
    Steered = 0,
    /// It went past the agent.
    Passed = 1,
    /// It was answered with a RST.
    Refused = 2,
    /// It was dropped without an answer.
    Dropped = 3,
}

/// One count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Counter {
    pub direction: Direction,
    pub unit: Unit,
    pub outcome: Outcome,
    pub reason: Reason,
}

impl Counter {
    /// Size of the array.
    pub const SLOTS: usize = 2 * 2 * 4 * Reason::COUNT;

    /// Where this count stands in the array.
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are a few dozen reasons"
    )]
    pub const fn slot(self) -> u32 {
        let group = (self.direction as u32 * 2 + self.unit as u32) * 4 + self.outcome as u32;
        group * Reason::COUNT as u32 + self.reason as u32
    }

    /// Every count, in the order of the array.
    pub fn all() -> impl Iterator<Item = Self> {
        let directions = [Direction::Outbound, Direction::Inbound];
        let units = [Unit::Syns, Unit::Packets];
        let outcomes = [
            Outcome::Steered,
            Outcome::Passed,
            Outcome::Refused,
            Outcome::Dropped,
        ];
        directions.into_iter().flat_map(move |direction| {
            units.into_iter().flat_map(move |unit| {
                outcomes.into_iter().flat_map(move |outcome| {
                    Reason::ALL.iter().map(move |&reason| Self {
                        direction,
                        unit,
                        outcome,
                        reason,
                    })
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_stands_where_the_list_says() {
        for (place, counter) in Counter::all().enumerate() {
            assert_eq!(counter.slot() as usize, place);
        }
        assert_eq!(Counter::all().count(), Counter::SLOTS);
    }
}
