//! The service that counts votes.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use anyhow::{Result, bail};

use crate::protocol;

/// The emoji that nobody can vote for.
const BROKEN: &str = ":doughnut:";

/// Names of emojis that are counted at most, since anybody can make names up.
const MOST_NAMES: usize = 1000;

/// Votes by the names of emojis.
#[derive(Debug, Default)]
struct Votes(Mutex<BTreeMap<String, u64>>);

pub(crate) fn serve(port: u16) -> Result<()> {
    let votes = Votes::default();
    protocol::serve(port, move |request| votes.answer(request))
}

impl Votes {
    fn answer(&self, request: &str) -> Result<String> {
        let mut votes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match request.split_once(' ') {
            None if request == "RESULTS" => {
                let mut results: Vec<(&String, &u64)> = votes.iter().collect();
                results.sort_by(|a, b| b.1.cmp(a.1));
                let results = results
                    .iter()
                    .map(|(name, count)| format!("{name} {count}"));
                Ok(results.collect::<Vec<_>>().join(" "))
            }
            Some(("VOTE", name)) => {
                if name == BROKEN {
                    bail!("the ballot box for {BROKEN} is stuck");
                }
                if votes.len() >= MOST_NAMES && !votes.contains_key(name) {
                    bail!("too many candidates");
                }
                let count = votes.entry(name.to_owned()).or_default();
                *count += 1;
                Ok(format!("the ballot box for {name} has {count} votes"))
            }
            _ => bail!("the voting service knows VOTE :name: and RESULTS"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_are_counted_for_all_emojis_but_one() {
        let votes = Votes::default();
        votes.answer("VOTE :joy:").unwrap();
        votes.answer("VOTE :owl:").unwrap();
        votes.answer("VOTE :owl:").unwrap();
        assert!(votes.answer("VOTE :doughnut:").is_err());
        assert_eq!(votes.answer("RESULTS").unwrap(), ":owl: 2 :joy: 1");
    }
}
