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
    /// How many reasons there is room for. More than there are: a pinned map then keeps its size and
    /// the meaning of its places when a reason of the agent comes or goes.
    const REASONS: usize = 64;

    /// Size of the array.
    pub const SLOTS: usize = 2 * 2 * 4 * Self::REASONS;

    /// Where this count stands in the array.
    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are a few dozen reasons"
    )]
    pub const fn slot(self) -> u32 {
        let group = (self.direction as u32 * 2 + self.unit as u32) * 4 + self.outcome as u32;
        group * Self::REASONS as u32 + self.reason as u32
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

const _: () = assert!(
    Reason::COUNT <= Counter::REASONS,
    "REASONS must grow, and with it the layout of the pinned maps (`LAYOUT` in the agent)"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_a_place_of_its_own() {
        let places = || Counter::all().map(Counter::slot);
        assert!(places().is_sorted_by(|a, b| a < b));
        assert!(places().all(|place| (place as usize) < Counter::SLOTS));
        assert_eq!(places().count(), 2 * 2 * 4 * Reason::COUNT);
    }

    #[test]
    fn what_the_kernel_counts_keeps_its_place() {
        // The pinned map outlives an agent. What is new goes to the end of these.
        let kernels = [
            "meshed",
            "agent",
            "port_skipped",
            "subnet_skipped",
            "fail_open",
            "no_agent",
            "agent_gone",
            "unknown_address",
            "forwarded",
            "unparsable",
            "port_clash",
            "direct_before_enrolment",
            "kernel_reply",
            "own_listener",
            "probe",
            "probe_without_agent",
            "probe_payload",
            "no_endpoint",
            "no_service_port",
        ];
        let first = Reason::ALL.iter().map(|reason| reason.as_str());
        assert!(
            first.take(kernels.len()).eq(kernels),
            "another layout: see `LAYOUT`"
        );
    }
}
