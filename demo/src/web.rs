//! The front end: asks the emoji service for emojis and the voting service for votes.

use std::net::SocketAddr;

use anyhow::{Result, bail};

use crate::protocol;

pub(crate) fn serve(port: u16, emoji: SocketAddr, voting: SocketAddr) -> Result<()> {
    protocol::serve(port, move |request| match request.split_once(' ') {
        None if request == "LIST" => protocol::ask(emoji, "LIST"),
        None if request == "RESULTS" => protocol::ask(voting, "RESULTS"),
        Some(("VOTE", name)) => {
            let sign = protocol::ask(emoji, &format!("FIND {name}"))?;
            let counted = protocol::ask(voting, &format!("VOTE {name}"))?;
            Ok(format!("{sign} {counted}"))
        }
        _ => bail!("the front end knows LIST, VOTE :name: and RESULTS"),
    })
}
