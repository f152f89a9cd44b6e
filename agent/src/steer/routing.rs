//! What brings steered packets to a pod's local stack: a rule, a routing table, a sysctl.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt;
use malla_common::{STEER_MARK, STEER_TABLE};
use rtnetlink::{
    Error, IpVersion, LinkUnspec, RouteMessageBuilder,
    packet_core::{DefaultNla, Emitable, NLA_F_NESTED},
    packet_route::{
        AddressFamily,
        link::{AfSpecInet, AfSpecUnspec, LinkAttribute},
        route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
        tc::TcHandle,
    },
};

use super::network::{Interface, LOOPBACK, Network, NetworkError};

/// After the local table (0), before whatever the CNI adds.
const RULE_PRIORITY: u32 = 133;

/// Of `linux/if_link.h` and `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_ACCEPT_LOCAL: u16 = 23;

/// Whether `accept_local` of the loopback is set in the calling thread's netns.
pub fn accepts_local() -> bool {
    fs::read_to_string("/proc/sys/net/ipv4/conf/lo/accept_local")
        .is_ok_and(|value| value.trim() == "1")
}

impl Network {
    /// Brings steered packets to the local stack: a rule and a route of each family, and
    /// `accept_local` on the loopback, since their source is an address of this netns.
    pub async fn route_steered(&self) -> Result<(), NetworkError> {
        self.set_loopback(true).await?;
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

    /// Sets the loopback up, and its `accept_local`.
    async fn set_loopback(&self, accept_local: bool) -> Result<(), NetworkError> {
        // One value of the interface's IPv4 configuration, nested twice.
        let value = DefaultNla::new(
            IPV4_DEVCONF_ACCEPT_LOCAL,
            u32::from(accept_local).to_ne_bytes().into(),
        );
        let mut nested = vec![0; value.buffer_len()];
        value.emit(&mut nested);
        let conf = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, nested));
        let message = LinkUnspec::new_with_index(LOOPBACK)
            .up()
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![
                conf,
            ])]))
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|source| NetworkError::Netlink {
            what: "set up the loopback",
            source,
        })
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

    /// Takes away what [`Self::route_steered`] and [`Self::route_link_local`] made, and gives
    /// `accept_local` the value that it had before. As much as can be: a pod that ends meanwhile
    /// takes it along.
    pub async fn unroute_steered(&self, accept_local: bool) {
        for version in [IpVersion::V4, IpVersion::V6] {
            let mut rules = self.handle.rule().get(version.clone()).execute();
            while let Ok(Some(rule)) = rules.try_next().await {
                if is_steering_rule(&rule) {
                    let _ = self.handle.rule().del(rule).execute().await;
                }
            }
            for route in self.steering_routes(version).await {
                let _ = self.handle.route().del(route).execute().await;
            }
        }
        if let Err(error) = self.set_loopback(accept_local).await {
            tracing::debug!(%error, "the loopback of a withdrawn pod stays as it is");
        }
    }

    /// The routes of the steering table.
    async fn steering_routes(&self, version: IpVersion) -> Vec<RouteMessage> {
        let question = match version {
            IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let mut routes = self.handle.route().get(question).execute();
        let mut found = Vec::new();
        while let Ok(Some(route)) = routes.try_next().await {
            if table(&route) == STEER_TABLE {
                found.push(route);
            }
        }
        found
    }

    /// Removes the clsact qdisc of an interface, unless somebody's filters are on it. Whether it
    /// is gone.
    pub async fn remove_qdisc(&self, index: u32) -> bool {
        let Ok(index) = i32::try_from(index) else {
            return false;
        };
        for question in [
            self.handle.traffic_filter(index).get().ingress(),
            self.handle.traffic_filter(index).get().egress(),
        ] {
            if !matches!(question.execute().try_next().await, Ok(None)) {
                return false;
            }
        }
        let mut request = self.handle.qdisc().del(index);
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.execute().await.is_ok()
    }
}

fn is_steering_rule(rule: &RuleMessage) -> bool {
    let of_table = u32::from(rule.header.table) == STEER_TABLE;
    of_table && rule.attributes.contains(&RuleAttribute::FwMark(STEER_MARK))
}

fn table(route: &RouteMessage) -> u32 {
    let long = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    long.unwrap_or(u32::from(route.header.table))
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
