//! Urgent data (RFC 6093; `MSG_OOB` in send(2)).
//!
//! The kernel's reads end before an urgent byte and skip it, so one that doesn't fill its buffer has not
//! emptied the socket, and no event tells of what stands behind. The programs see urgent data before the
//! agent's socket does and note it. From then on, until this agent ends, sockets are read until they have no more:
//! a call more for each read, which nodes without urgent data (nearly all) don't pay.
//!
//! The urgent byte itself goes no further: HBONE has no word for it, as no other proxy's tunnel has.

use super::{Steering, legs::tell_again, lock};
use crate::ledger;

impl Steering {
    /// To be called often: what was read before this agent knew waits until then.
    pub fn notice_urgent(&self) {
        let queues = self.acceleration.queues();
        if queues.has_urgent() || !self.was_urgent() {
            return;
        }
        queues.set_urgent();
        tracing::info!("urgent data is sent, so sockets are read until they have no more");
        for line in ledger::lines() {
            if line.kind.is_connection() {
                tell_again(line.descriptor);
            }
        }
    }

    fn was_urgent(&self) -> bool {
        lock(&self.programs)
            .maps()
            .urgent
            .get(&0, 0)
            .is_ok_and(|seen| seen != 0)
    }
}
