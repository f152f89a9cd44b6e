//! Two apps that are joined, as those of two pods of one node.

use malla_common::acceleration::Event;

use super::{Bench, Tried, pattern, piece, receive, send};
use crate::steer::acceleration::joins;

/// What is sent without a reader: more than may be redirected to one end, and less than to two.
const PIECES: usize = 12;
const MESSAGE: usize = 1000;

impl Bench<'_> {
    /// What an app sends goes straight to another one, behind what went by way of the agent and before
    /// what does so afterwards.
    pub(super) fn joins(&mut self) -> Tried {
        let (client, from_client) = self.pair()?;
        let (server, to_server) = self.pair()?;
        let pattern = pattern();
        let relay = |length| {
            let mut bytes = vec![0; length];
            receive(&from_client, &mut bytes)?;
            send(&to_server, &bytes)
        };
        let hears = |turn: usize, length| {
            let mut bytes = vec![0; length];
            receive(&server, &mut bytes)?;
            if bytes == piece(&pattern, turn)[..length] {
                Ok(())
            } else {
                Err("other bytes than were sent".to_owned())
            }
        };
        let mut maps = self.programs.queues().map_err(|error| error.to_string())?;
        send(&client, &piece(&pattern, 1)[..MESSAGE])?;
        relay(MESSAGE)?;
        hears(1, MESSAGE)?;
        let (mut relayed, mut joined, mut sender) = (MESSAGE as u64, 0, 0);
        for _ in 0..3 {
            let before = self.joined();
            let between = [&from_client, &to_server];
            let entered = joins::enter(&mut maps, joined, between, relayed);
            sender = entered.ok_or("two ends can't be joined")?;
            send(&client, &piece(&pattern, 2)[..MESSAGE])?;
            hears(2, MESSAGE)?;
            for turn in 0..PIECES {
                send(&client, piece(&pattern, turn))?;
            }
            let entry = maps.joins.0.get(&sender, 0);
            let bytes = entry.map_err(|error| error.to_string())?.bytes;
            let all = MESSAGE + PIECES * piece(&pattern, 0).len();
            let rest = (joined + all as u64).saturating_sub(bytes);
            if self.joined() != before + 1 || rest == 0 {
                return Err(format!("{bytes} bytes are counted as joined"));
            }
            (relayed, joined) = (relayed + rest, bytes);
            relay(usize::try_from(rest).unwrap_or(usize::MAX).min(all))?;
            for turn in 0..PIECES {
                hears(turn, piece(&pattern, turn).len())?;
            }
        }
        let removed = maps.joins.0.remove(&sender);
        removed.map_err(|error| error.to_string())
    }

    fn joined(&self) -> u64 {
        let events = self.programs.events().into_iter();
        let counts = events.filter(|(event, _)| *event == Event::Joined);
        counts.map(|(_, count)| count).sum()
    }
}
