//! The TCP proxy: one single-threaded worker per core, a connection on one worker for life.
//!
//! `outbound` and `inbound` read as the life of one connection, in the order in which it happens.
//! Nothing here is shared between workers but the mesh's snapshot, certificates and counters.

mod accept;
mod activity;
mod balance;
mod buffers;
mod coalesce;
mod cut;
mod ended;
mod handshakes;
mod hbone;
mod inbound;
mod load;
mod meter;
mod neighbours;
mod optimistic;
mod outbound;
mod pod;
mod pool;
mod probe;
mod read_ahead;
mod readiness;
mod record;
mod refusals;
mod relay;
mod service;
mod tunnel;
mod tunnels;
mod turns;
mod witness;
mod worker;
mod workers;
mod writer;

use std::net::SocketAddr;

pub use balance::Balance;
pub use ended::Ended;
pub use neighbours::Neighbour;
pub use pod::PodConnections;
pub use tunnels::Tunnel;
pub use workers::{Shared, Workers};

/// The address in the form that discovery has: a socket for both families gives IPv4 ones mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => address,
        },
    }
}
