//! What shows that the network lets one pod of this node reach another, while what the two say to
//! each other goes through memory: a TCP connection from the one's netns to the other's mesh port,
//! on which nothing is ever said.
//!
//! The network's policy (the CNI's) has its say by refusing it, by resetting it, or by letting
//! nothing through when the next one is opened. That an agent ends its own end in good order says
//! nothing of the network.
//!
//! A pod may be able to lead it astray, by rewriting what leaves its netns. So it counts only when
//! this agent has accepted it in the other pod's netns, with the same 4-tuple.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use malla_common::Reason;
use tokio::{io::AsyncReadExt, net::TcpStream, sync::Notify, time::timeout};

use super::canonical;
use crate::{
    ledger::{Accounted, Kind},
    model::ports,
    steer::{DialError, Opening, Pod, end_orderly},
};

/// How long one may take to open. On one machine it takes less than a millisecond.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

/// How long an open one may wait to be accepted. Then another has accepted it: the next agent during
/// an upgrade, or somebody whom it was not meant for.
const ACCEPTED_LIMIT: Duration = Duration::from_secs(1);

/// How long both take at most.
pub(super) const LIMIT: Duration = OPEN_LIMIT.saturating_add(ACCEPTED_LIMIT);

/// The client's and the server's end.
type Ends = (SocketAddr, SocketAddr);

/// The witnesses of all workers, by which who accepts one tells it from a peer that shakes hands.
#[derive(Debug, Default)]
pub struct Witnesses(Mutex<HashMap<Ends, Expected>>);

/// Where one is to be accepted, and who waits for that.
#[derive(Debug)]
struct Expected {
    pod: u32,
    accepted: Arc<Notify>,
}

impl Witnesses {
    /// Whether what was accepted in the netns of `pod` is one. If so, the other end is told.
    pub(super) fn accept(&self, pod: u32, client: SocketAddr, server: SocketAddr) -> bool {
        let ends = self.ends();
        let expected = ends.get(&(client, server));
        let expected = expected.filter(|expected| expected.pod == pod);
        expected.inspect(|one| one.accepted.notify_one()).is_some()
    }

    fn ends(&self) -> MutexGuard<'_, HashMap<Ends, Expected>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the SYN of one. Nobody asks for its ends before they are noted.
    fn begin(
        self: &Arc<Self>,
        from: &Pod,
        to: u32,
        server: SocketAddr,
    ) -> Result<(Opening, Noted), DialError> {
        let accepted = Arc::default();
        let expected = Expected {
            pod: to,
            accepted: Arc::clone(&accepted),
        };
        let mut noted = self.ends();
        let opening = Opening::begin(from, server)?;
        let ends = (canonical(opening.local()?), server);
        noted.insert(ends, expected);
        drop(noted);
        let noted = Noted {
            witnesses: Arc::clone(self),
            ends,
            accepted,
        };
        Ok((opening, noted))
    }
}

/// Keeps the ends of one noted.
#[derive(Debug)]
struct Noted {
    witnesses: Arc<Witnesses>,
    ends: Ends,
    accepted: Arc<Notify>,
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

/// Why there is no witness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoWitness {
    /// It can't be opened.
    Failed(Reason),
    /// It is open, and not to where it should be.
    Strayed,
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
    /// Opens one from a pod to another one of this node at `address`.
    pub(super) async fn open(
        witnesses: &Arc<Witnesses>,
        from: &Pod,
        to: &Pod,
        address: IpAddr,
    ) -> Result<Self, NoWitness> {
        let server = SocketAddr::new(address, ports::MESH);
        let opened = async {
            let (opening, noted) = witnesses.begin(from, to.id, server)?;
            let stream = opening.open(OPEN_LIMIT).await?;
            Ok((stream, noted))
        };
        let opened = opened.await;
        let (stream, noted) = opened.map_err(|error| NoWitness::Failed(reason_of(&error)))?;
        end_orderly(&*stream);
        timeout(ACCEPTED_LIMIT, noted.accepted.notified())
            .await
            .map_err(|_| NoWitness::Strayed)?;
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
            DialError::Timeout(OPEN_LIMIT),
        ] {
            assert_eq!(reason_of(&refusal), Reason::NetworkPolicy, "{refusal}");
        }
        assert_eq!(reason_of(&os(libc::EMFILE)), Reason::ConnectFailed);
    }
}
