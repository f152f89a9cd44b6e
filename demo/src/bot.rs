//! Votes at random through the front end, and says how that went.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context, Result};

use crate::protocol;

/// Votes until the process ends. A vote that fails is told and the next one tried.
pub(crate) fn vote_for_ever(web: SocketAddr, pause: Duration) -> Result<()> {
    loop {
        match vote(web) {
            Ok(said) => println!("voted: {said}"),
            Err(error) => println!("failed: {error:#}"),
        }
        thread::sleep(pause);
    }
}

fn vote(web: SocketAddr) -> Result<String> {
    let list = protocol::ask(web, "LIST")?;
    let names: Vec<&str> = list
        .split(' ')
        .filter(|word| word.starts_with(':'))
        .collect();
    let name = fastrand::choice(names).context("the front end has no emojis")?;
    protocol::ask(web, &format!("VOTE {name}"))
}
