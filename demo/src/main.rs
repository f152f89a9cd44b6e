//! A small voting application, in the spirit of Linkerd's emojivoto, for `cargo xtask demo`.
//!
//! A bot votes for emojis through a web front end, which asks one service for the emojis and
//! another to count the vote. They speak lines of text over TCP and know nothing of the mesh. One
//! emoji can't be voted for, so that there is something to find.

mod bot;
mod emoji;
mod protocol;
mod voting;
mod web;

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Serve the list of emojis
    Emoji { port: u16 },
    /// Count votes
    Voting { port: u16 },
    /// Serve the front end, which asks the two others
    Web {
        port: u16,
        emoji: SocketAddr,
        voting: SocketAddr,
    },
    /// Vote for ever
    Bot {
        web: SocketAddr,
        /// The time from one vote to the next, in milliseconds
        #[arg(long, default_value_t = 200)]
        pause: u64,
    },
    /// Send one line to a service and print its answer
    Ask { service: SocketAddr, line: String },
}

fn main() -> Result<()> {
    match Arguments::parse().part {
        Part::Emoji { port } => emoji::serve(port),
        Part::Voting { port } => voting::serve(port),
        Part::Web {
            port,
            emoji,
            voting,
        } => web::serve(port, emoji, voting),
        Part::Bot { web, pause } => bot::vote_for_ever(web, Duration::from_millis(pause)),
        Part::Ask { service, line } => {
            println!("{}", protocol::ask(service, &line)?);
            Ok(())
        }
    }
}
