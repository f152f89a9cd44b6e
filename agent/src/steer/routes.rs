//! Whether an app's answers to a client find a way out of the pod.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::netns::Netns;

/// How long an answer is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// Answers that are remembered; beyond it all are forgotten.
const REMEMBERED: usize = 4096;

/// What is known of a pod's ways to its clients.
#[derive(Debug, Default)]
pub struct Routes(Mutex<Answers>);

type Answers = HashMap<IpAddr, (Instant, bool)>;

impl Routes {
    /// Whether the pod has a route to `client`.
    pub(super) fn reaches(&self, netns: &Netns, home: &Netns, client: IpAddr) -> bool {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((asked, reaches)) = answers.get(&client)
            && asked.elapsed() < BELIEVED
        {
            return *reaches;
        }
        // A netns that can't be entered fails where the connection is made, with a better error.
        let reaches = netns.enter(home, || ask(client)).unwrap_or(true);
        remember(&mut answers, client, reaches);
        reaches
    }

    /// Remembers that answers to `client` don't leave the pod, though it has a route there.
    pub(super) fn has_no_neighbour(&self, client: IpAddr) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        remember(&mut answers, client, false);
    }
}

fn remember(answers: &mut Answers, client: IpAddr, reaches: bool) {
    if answers.len() >= REMEMBERED {
        answers.clear();
    }
    answers.insert(client, (Instant::now(), reaches));
}

/// Connecting a datagram socket looks the route up and sends nothing.
fn ask(client: IpAddr) -> bool {
    let any: IpAddr = match client {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    UdpSocket::bind((any, 0))
        .and_then(|socket| socket.connect(SocketAddr::new(client, 9)))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_reached_and_a_broadcast_is_not() {
        assert!(ask(Ipv4Addr::LOCALHOST.into()));
        assert!(!ask(Ipv4Addr::BROADCAST.into()));
    }
}
