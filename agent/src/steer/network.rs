//! What the agent reads and watches of a pod's netns over rtnetlink.

use std::{collections::HashMap, io, net::IpAddr, pin::Pin, task::Poll};

use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::{
    Error, Handle, LinkUnspec, MulticastGroup,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{LinkAttribute, LinkFlags, LinkLayerType},
    },
    sys::AsyncSocket,
};
use tokio::{sync::Mutex, task::JoinHandle};

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

/// A netlink socket in a pod's netns. Dropping it ends its task.
#[derive(Debug)]
pub struct Network {
    pub(super) handle: Handle,
    /// Whose turn it is to list something: the kernel gives a socket one list at a time.
    pub(super) lists: Mutex<()>,
    task: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Yields once for each batch of changes of links, addresses, rules, routes and filters.
pub struct Changes(Pin<Box<dyn Stream<Item = ()> + Send>>);

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Changes")
    }
}

impl Changes {
    /// Waits for the next change. None when the socket broke.
    pub async fn next(&mut self) -> Option<()> {
        self.0.next().await?;
        // What is queued already is one change.
        std::future::poll_fn(|cx| {
            while let Poll::Ready(Some(())) = self.0.as_mut().poll_next(cx) {}
            Poll::Ready(())
        })
        .await;
        Some(())
    }
}

impl Network {
    pub fn open(netns: &Netns, home: &Netns) -> Result<(Self, Changes), NetworkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Tc,
        ];
        let (mut connection, handle, messages) = netns
            .enter(home, || rtnetlink::new_multicast_connection(&groups))
            .and_then(|result| result)
            .map_err(NetworkError::Enter)?;
        let entry = Entry::new(connection.socket_mut().socket_ref(), 0, Kind::Netlink);
        let task = tokio::spawn(async move {
            let _entry = entry;
            connection.await;
        });
        let changes = Changes(Box::pin(messages.map(|_| ())));
        let network = Self {
            handle,
            lists: Mutex::default(),
            task,
        };
        Ok((network, changes))
    }

    /// All interfaces but the loopback.
    pub async fn interfaces(&self) -> Result<Vec<Interface>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the interfaces",
            source,
        };
        let _turn = self.lists.lock().await;
        let mut links = self.handle.link().get().execute();
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
    pub async fn names(&self) -> Result<HashMap<u32, String>, NetworkError> {
        let interfaces = self.interfaces().await?.into_iter();
        let mut names: HashMap<_, _> = interfaces.map(|i| (i.index, i.name)).collect();
        names.insert(LOOPBACK, "lo".to_owned());
        Ok(names)
    }

    /// Every address of the netns but loopback ones, link-local too, those that are still
    /// tentative left out.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the addresses",
            source,
        };
        let _turn = self.lists.lock().await;
        let mut messages = self.handle.address().get().execute();
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
        match self.handle.link().set(message).execute().await {
            Err(Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(()),
            other => other.map_err(|source| NetworkError::Netlink {
                what: "set an interface down",
                source,
            }),
        }
    }
}
