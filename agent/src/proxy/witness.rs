//! What shows that the network lets one pod of this node reach another, while what the two say to
//! each other goes through memory: a TCP connection from the one's netns to the other's mesh port,
//! on which nothing is ever said.
//!
//! The network's policy (the CNI's) has its say by refusing it, by resetting it, or by letting
//! nothing through when the next one is opened. That an agent ends its own end in good order says
//! nothing of the network.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use malla_common::Reason;
use tokio::{io::AsyncReadExt, net::TcpStream};

use super::canonical;
use crate::{
    ledger::{Accounted, Kind},
    model::ports,
    steer::{DialError, Opening, Pod, end_orderly},
};

/// How long one may take to open. On one machine it takes less than a millisecond.
pub(super) const LIMIT: Duration = Duration::from_secs(5);

/// The client's and the server's end.
type Ends = (SocketAddr, SocketAddr);

/// The witnesses of all workers, by which who accepts one tells it from a peer that shakes hands.
#[derive(Debug, Default)]
pub struct Witnesses(Mutex<HashSet<Ends>>);

impl Witnesses {
    pub(super) fn know(&self, client: SocketAddr, server: SocketAddr) -> bool {
        self.ends().contains(&(client, server))
    }

    fn ends(&self) -> MutexGuard<'_, HashSet<Ends>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the SYN of one. Nobody asks for its ends before they are noted.
    fn begin(
        self: &Arc<Self>,
        pod: &Pod,
        server: SocketAddr,
    ) -> Result<(Opening, Noted), DialError> {
        let mut ends = self.ends();
        let opening = Opening::begin(pod, server)?;
        let noted = (canonical(opening.local), server);
        ends.insert(noted);
        drop(ends);
        let noted = Noted {
            witnesses: Arc::clone(self),
            ends: noted,
        };
        Ok((opening, noted))
    }
}

/// Keeps the ends of one noted.
#[derive(Debug)]
struct Noted {
    witnesses: Arc<Witnesses>,
    ends: Ends,
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.witnesses.ends().remove(&self.ends);
    }
}

/// The end that was dialled. Dropping it closes it in good order.
#[derive(Debug)]
pub(super) struct Witness {
    stream: Accounted<TcpStream>,
    _noted: Noted,
}

/// How a witness ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The network has cut it.
    Cut,
    /// The agent at its other end has let it go.
    LetGo,
}

impl Witness {
    /// Opens one from `pod` to another pod of this node at `destination`.
    pub(super) async fn open(
        witnesses: &Arc<Witnesses>,
        pod: &Pod,
        destination: IpAddr,
    ) -> Result<Self, Reason> {
        let server = SocketAddr::new(destination, ports::MESH);
        let opened = async {
            let (opening, noted) = witnesses.begin(pod, server)?;
            let stream = opening.open(LIMIT).await?;
            Ok((stream, noted))
        };
        let (stream, noted) = opened.await.map_err(|error| reason_of(&error))?;
        end_orderly(&*stream);
        Ok(Self {
            stream: stream.turned_into(Kind::Witness),
            _noted: noted,
        })
    }

    pub(super) async fn end(&mut self) -> End {
        match self.stream.read(&mut [0]).await {
            Ok(_) => End::LetGo,
            Err(_) => End::Cut,
        }
    }
}

/// Holds the end that was accepted, until the other one is closed.
pub(super) async fn hold(socket: Accounted<TcpStream>) {
    let mut socket = socket.turned_into(Kind::Witness);
    end_orderly(&*socket);
    // However it ends.
    let _ = socket.read(&mut [0]).await;
}

/// The network's refusals are many: a reset, silence, an ICMP message, an error of the pod's own
/// firewall. Other errors are the agent's.
fn reason_of(error: &DialError) -> Reason {
    let refused = match error {
        DialError::Refused | DialError::Timeout(_) => true,
        DialError::PortsExhausted => false,
        DialError::Io(error) => matches!(
            error.raw_os_error(),
            Some(libc::EPERM | libc::EACCES | libc::ENETUNREACH | libc::EHOSTUNREACH)
        ),
    };
    if refused {
        Reason::NetworkPolicy
    } else {
        error.reason()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_a_network_answers_is_its_policy_and_what_the_agent_lacks_is_not() {
        let os = |number| DialError::from(io::Error::from_raw_os_error(number));
        for refusal in [
            os(libc::ECONNREFUSED),
            os(libc::ETIMEDOUT),
            os(libc::EHOSTUNREACH),
            os(libc::ENETUNREACH),
            os(libc::EACCES),
            os(libc::EPERM),
            DialError::Timeout(LIMIT),
        ] {
            assert_eq!(reason_of(&refusal), Reason::NetworkPolicy, "{refusal}");
        }
        assert_eq!(reason_of(&os(libc::EMFILE)), Reason::ConnectFailed);
    }
}
