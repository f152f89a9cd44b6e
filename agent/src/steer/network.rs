//! What the agent sets up and watches in a pod's netns over rtnetlink.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    task::Poll,
};

use futures_util::{Stream, StreamExt, TryStreamExt};
use malla_common::{STEER_MARK, STEER_TABLE};
use rtnetlink::{
    Error, Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags},
        link::{AfSpecInet, AfSpecUnspec, InetDevConf, LinkAttribute, LinkFlags, LinkLayerType},
        route::{RouteProtocol, RouteScope, RouteType},
        rule::RuleAction,
    },
};
use tokio::task::JoinHandle;

use super::netns::Netns;

/// Index of the loopback in every netns.
const LOOPBACK: u32 = 1;
/// After the local table (0), before whatever the CNI adds.
const RULE_PRIORITY: u32 = 133;

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
    handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Yields once for each batch of changes of links and addresses.
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
        ];
        let (connection, handle, messages) = netns
            .enter(home, || rtnetlink::new_multicast_connection(&groups))
            .and_then(|result| result)
            .map_err(NetworkError::Enter)?;
        let task = tokio::spawn(connection);
        let changes = Changes(Box::pin(messages.map(|_| ())));
        Ok((Self { handle, task }, changes))
    }

    /// All interfaces but the loopback.
    pub async fn interfaces(&self) -> Result<Vec<Interface>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the interfaces",
            source,
        };
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

    /// Every address of the netns but loopback ones, link-local too, those that are still
    /// tentative left out.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "list the addresses",
            source,
        };
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

    /// Brings steered packets to the local stack: a rule and a route of each family, and
    /// `accept_local` on the loopback, since their source is an address of this netns.
    pub async fn route_steered(&self) -> Result<(), NetworkError> {
        self.loopback_up_and_accepting().await?;
        self.rule_and_route(AddressFamily::Inet).await?;
        ignore_without_ipv6(self.rule_and_route(AddressFamily::Inet6).await)
    }

    /// Delivers steered packets to link-local addresses, which the kernel takes only on their own
    /// interface.
    pub async fn route_link_local(&self, interface: &Interface) -> Result<(), NetworkError> {
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)
            .output_interface(interface.index)
            .table_id(STEER_TABLE)
            .protocol(RouteProtocol::Static)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build();
        let added = self.handle.route().add(route).replace().execute().await;
        ignore_without_ipv6(added.map_err(|source| NetworkError::Netlink {
            what: "add the link-local route",
            source,
        }))
    }

    async fn loopback_up_and_accepting(&self) -> Result<(), NetworkError> {
        let error = |source| NetworkError::Netlink {
            what: "set up the loopback",
            source,
        };
        let mut conf = InetDevConf::default();
        conf.accept_local = 1;
        let message = LinkUnspec::new_with_index(LOOPBACK)
            .up()
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![
                AfSpecInet::DevConfRequest(conf),
            ])]))
            .build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(error)
    }

    async fn rule_and_route(&self, family: AddressFamily) -> Result<(), NetworkError> {
        let rule = self
            .handle
            .rule()
            .add()
            .fw_mark(STEER_MARK)
            .priority(RULE_PRIORITY)
            .table_id(STEER_TABLE)
            .action(RuleAction::ToTable);
        let added = match family {
            AddressFamily::Inet => rule.v4().execute().await,
            _ => rule.v6().execute().await,
        };
        match added {
            Err(Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => {}
            other => other.map_err(|source| NetworkError::Netlink {
                what: "add the rule",
                source,
            })?,
        }
        let unspecified = match family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            _ => IpAddr::from([0; 16]),
        };
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(unspecified, 0)
            .map_err(|_| NetworkError::Netlink {
                what: "add the route",
                source: Error::RequestFailed,
            })?
            .output_interface(LOOPBACK)
            .table_id(STEER_TABLE)
            .protocol(RouteProtocol::Static)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build();
        self.handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(|source| NetworkError::Netlink {
                what: "add the route",
                source,
            })
    }

    /// Takes away what [`Self::route_steered`] made. `accept_local` stays: whether it was set
    /// before isn't known, and without the route it lets nothing in.
    pub async fn unroute_steered(&self) {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let version = match family {
                AddressFamily::Inet => rtnetlink::IpVersion::V4,
                _ => rtnetlink::IpVersion::V6,
            };
            let mut rules = self.handle.rule().get(version).execute();
            while let Ok(Some(rule)) = rules.try_next().await {
                if u32::from(rule.header.table) == STEER_TABLE {
                    let _ = self.handle.rule().del(rule).execute().await;
                }
            }
        }
    }

    pub async fn set_down(&self, interface: &Interface) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(interface.index).down().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|source| NetworkError::Netlink {
                what: "set an interface down",
                source,
            })
    }
}

/// A netns without IPv6 has none to steer.
fn ignore_without_ipv6(result: Result<(), NetworkError>) -> Result<(), NetworkError> {
    match result {
        Err(NetworkError::Netlink {
            source: Error::NetlinkError(message),
            ..
        }) if matches!(
            -message.raw_code(),
            libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES | libc::EINVAL
        ) =>
        {
            Ok(())
        }
        other => other,
    }
}
