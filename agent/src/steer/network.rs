//! What the agent reads and watches of a pod's netns over rtnetlink.

use std::{
    collections::HashMap,
    future::poll_fn,
    io,
    net::IpAddr,
    ops::Deref,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Error, Handle, LinkUnspec, MulticastGroup,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{LinkAttribute, LinkFlags, LinkLayerType},
    },
    sys::{AsyncSocket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use tokio::task::JoinHandle;

use super::netns::Netns;
use crate::ledger::{Entry, Kind};

/// Index of the loopback in every netns.
pub(super) const LOOPBACK: u32 = 1;

/// What is wrong with a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("can't enter the netns: {0}")]
    Enter(io::Error),
    #[error("can't {what}: {source}")]
    Netlink { what: &'static str, source: Error },
}

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// Whether packets carry an Ethernet header. None where the kind isn't known.
    pub ethernet: Option<bool>,
}

/// What is asked of a netns, each time over a socket of its own: one keeps 64 KiB to read into and 8 to
/// write from, and a netns is asked now and then.
#[derive(Debug)]
pub struct Network {
    netns: Arc<Netns>,
    home: Arc<Netns>,
}

/// A netlink socket in a netns. Dropping it ends its task.
pub(super) struct Asking {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Deref for Asking {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Asking {
    /// All interfaces but the loopback.
    async fn interfaces(&self) -> Result<Vec<Interface>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the interfaces",
            source,
        };
        let mut links = self.link().get().execute();
        let mut interfaces = Vec::new();
        while let Some(link) = links.try_next().await.map_err(error)? {
            if link.header.index == LOOPBACK {
                continue;
            }
            let name = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
            interfaces.push(Interface {
                index: link.header.index,
                name: name.unwrap_or_default(),
                up: link.header.flags.contains(LinkFlags::Up),
                ethernet: match link.header.link_layer_type {
                    LinkLayerType::Ether => Some(true),
                    LinkLayerType::None | LinkLayerType::Rawip | LinkLayerType::Ppp => Some(false),
                    _ => None,
                },
            });
        }
        Ok(interfaces)
    }

    /// The names of all interfaces by index, the loopback's too.
    pub(super) async fn names(&self) -> Result<HashMap<u32, String>, NetworkError> {
        let interfaces = self.interfaces().await?.into_iter();
        let mut names: HashMap<_, _> = interfaces.map(|i| (i.index, i.name)).collect();
        names.insert(LOOPBACK, "lo".to_owned());
        Ok(names)
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What changes in a netns: its links, addresses, rules, routes and filters.
pub struct Changes {
    _entry: Entry,
    socket: TokioSocket,
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Changes")
    }
}

impl Changes {
    const GROUPS: [MulticastGroup; 8] = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Tc,
    ];

    /// From now on. Needs a tokio runtime.
    pub fn of(netns: &Netns, home: &Netns) -> Result<Self, NetworkError> {
        let listening = netns.enter(home, Self::listen);
        listening
            .and_then(|result| result)
            .map_err(NetworkError::Enter)
    }

    /// In the calling thread's netns.
    fn listen() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        // A group is a bit of the address, beginning with the lowest (`netlink(7)`).
        let groups = Self::GROUPS.map(|group| 1 << (group as u32 - 1));
        let groups = groups.into_iter().fold(0, |all, group| all | group);
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self {
            _entry: Entry::new(socket.socket_ref(), 0, Kind::Netlink),
            socket,
        })
    }

    /// Waits for the next change. None when the socket broke.
    pub async fn next(&mut self) -> Option<()> {
        if let Err(error) = poll_fn(|cx| self.poll_change(cx)).await {
            tracing::warn!(%error, "a pod's network isn't watched any more, only audited");
            return None;
        }
        // What is queued already is one change.
        poll_fn(|cx| {
            while let Poll::Ready(Ok(())) = self.poll_change(cx) {}
            Poll::Ready(())
        })
        .await;
        Some(())
    }

    fn poll_change(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What it says is cut off: everything is looked at anew.
        let mut start = [0; 16];
        match ready!(self.socket.poll_recv(cx, &mut start.as_mut_slice())) {
            // Some were lost, which is a change too.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Poll::Ready(Ok(())),
            read => Poll::Ready(read),
        }
    }
}

impl Network {
    pub fn of(netns: &Arc<Netns>, home: &Arc<Netns>) -> Self {
        Self {
            netns: Arc::clone(netns),
            home: Arc::clone(home),
        }
    }

    /// Does a job in the netns ([`Netns::enter`]).
    pub(super) fn enter<T>(&self, job: impl FnOnce() -> T) -> io::Result<T> {
        self.netns.enter(&self.home, job)
    }

    /// A socket to ask by, or to have something done. Needs a tokio runtime.
    pub(super) fn ask(&self) -> Result<Asking, NetworkError> {
        let (mut connection, handle, _) = self
            .enter(rtnetlink::new_connection)
            .and_then(|result| result)
            .map_err(NetworkError::Enter)?;
        let entry = Entry::new(connection.socket_mut().socket_ref(), 0, Kind::Netlink);
        let task = tokio::spawn(async move {
            let _entry = entry;
            connection.await;
        });
        Ok(Asking { handle, task })
    }

    /// All interfaces but the loopback.
    pub async fn interfaces(&self) -> Result<Vec<Interface>, NetworkError> {
        self.ask()?.interfaces().await
    }

    /// Every address of the netns but loopback ones, link-local too, those that are still
    /// tentative left out.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the addresses",
            source,
        };
        let asking = self.ask()?;
        let mut messages = asking.address().get().execute();
        let mut addresses = Vec::new();
        while let Some(message) = messages.try_next().await.map_err(error)? {
            if message.header.flags.contains(AddressHeaderFlags::Tentative) {
                continue;
            }
            // On a point-to-point link, "address" is the peer and "local" is this end.
            let local = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
            let address = local.or_else(|| {
                message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    })
            });
            addresses.extend(address.filter(|address| !address.is_loopback()));
        }
        Ok(addresses)
    }

    /// Sets an interface down. One that is gone meanwhile is no error.
    pub async fn set_down(&self, interface: &Interface) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(interface.index).down().build();
        match self.ask()?.link().set(message).execute().await {
            Err(Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(()),
            other => other.map_err(|source| NetworkError::Netlink {
                what: "set an interface down",
                source,
            }),
        }
    }
}
