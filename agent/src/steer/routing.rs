//! What brings steered packets to a pod's local stack: a rule, a routing table, a sysctl.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::programs::TcAttachType;
use futures_util::TryStreamExt;
use malla_common::{STEER_MARK, STEER_TABLE};
use rtnetlink::{
    Error, IpVersion, LinkUnspec, RouteMessageBuilder,
    packet_core::{DefaultNla, Emitable, NLA_F_NESTED},
    packet_route::{
        AddressFamily,
        link::{AfSpecInet, AfSpecUnspec, LinkAttribute, LinkFlags},
        route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
        tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcOption},
    },
};

use super::network::{Asking, Interface, LOOPBACK, Network, NetworkError};
use super::{
    attach::{self, Hook},
    audit::Kind,
};

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
        let asking = self.ask()?;
        set_loopback(&asking, true).await?;
        rule_and_route(&asking, AddressFamily::Inet).await?;
        ignore_without_ipv6(rule_and_route(&asking, AddressFamily::Inet6).await)
    }

    /// Delivers steered packets to link-local addresses, which the kernel takes only on their own
    /// interface. Each interface's route has a metric of its own: one that replaces whatever is there
    /// with the same prefix and metric would else take the place of another interface's.
    pub async fn route_link_local(&self, interface: &Interface) -> Result<(), NetworkError> {
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)
            .output_interface(interface.index)
            .priority(interface.index)
            .table_id(STEER_TABLE)
            .protocol(RouteProtocol::Static)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build();
        let added = self.ask()?.route().add(route).replace().execute().await;
        ignore_without_ipv6(added.map_err(|source| NetworkError::Netlink {
            what: "add the link-local route",
            source,
        }))
    }

    /// What is missing of what brings steered packets to the local stack, IPv6's where `has_v6`.
    /// `link_locals` are the interfaces that link-local addresses are routed for.
    pub async fn routing_faults(
        &self,
        has_v6: bool,
        link_locals: &[u32],
    ) -> Result<Vec<(Kind, String)>, NetworkError> {
        let asking = self.ask()?;
        let mut faults = Vec::new();
        let families: &[_] = if has_v6 {
            &[IpVersion::V4, IpVersion::V6]
        } else {
            &[IpVersion::V4]
        };
        for family in families {
            let name = match family {
                IpVersion::V4 => "IPv4",
                IpVersion::V6 => "IPv6",
            };
            let first = RuleAttribute::Priority(RULE_PRIORITY);
            let rules = steering_rules(&asking, family.clone()).await?;
            if !rules.iter().any(|rule| rule.attributes.contains(&first)) {
                faults.push((Kind::Rule, format!("the rule of {name} was gone")));
            }
            let routes = steering_routes(&asking, family.clone()).await;
            let to_loopback = |route: &RouteMessage| {
                route.header.destination_prefix_length == 0
                    && route.header.kind == RouteType::Local
                    && output_interface(route) == Some(LOOPBACK)
            };
            if !routes.iter().any(to_loopback) {
                faults.push((Kind::Route, format!("the route of {name} was gone")));
            }
            if matches!(family, IpVersion::V4) {
                continue;
            }
            for index in link_locals {
                let of_link = |route: &RouteMessage| {
                    route.header.destination_prefix_length == 10
                        && output_interface(route) == Some(*index)
                };
                if !routes.iter().any(of_link) {
                    let what = format!("the link-local route of interface {index} was gone");
                    faults.push((Kind::Route, what));
                }
            }
        }
        // A loopback that goes down takes its routes along. Looked at last, it can't go between the
        // two looks, so that its routes alone would be told of.
        if !loopback_is_up(&asking).await? {
            faults.push((Kind::Loopback, "the loopback was down".to_owned()));
        }
        Ok(faults)
    }

    /// The program of the agent's filter at a hook of an interface.
    pub async fn filter(&self, index: u32, hook: Hook) -> Option<u32> {
        let asking = self.ask().ok()?;
        let filters = asking.traffic_filter(i32::try_from(index).ok()?).get();
        let filters = match hook.attach_type() {
            TcAttachType::Egress => filters.egress(),
            _ => filters.ingress(),
        };
        let mut filters = filters.execute();
        let mut program = None;
        while let Ok(Some(filter)) = filters.try_next().await {
            if u32::from(filter.header.handle) == attach::HANDLE {
                let options = filter.attributes.iter();
                let options = options.filter_map(|attribute| match attribute {
                    TcAttribute::Options(options) => Some(options),
                    _ => None,
                });
                program = options.flatten().find_map(|option| match option {
                    TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                    _ => None,
                });
            }
        }
        program
    }
}

impl Asking {
    /// Takes away what [`Network::route_steered`] and [`Network::route_link_local`] made, and gives
    /// `accept_local` the value that it had before. As much as can be: a pod that ends meanwhile
    /// takes it along.
    pub(super) async fn unroute_steered(&self, accept_local: bool) {
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules = steering_rules(self, version.clone()).await;
            for rule in rules.unwrap_or_default() {
                let _ = self.rule().del(rule).execute().await;
            }
            for route in steering_routes(self, version).await {
                let _ = self.route().del(route).execute().await;
            }
        }
        if let Err(error) = set_loopback(self, accept_local).await {
            tracing::debug!(%error, "the loopback of a withdrawn pod stays as it is");
        }
    }

    /// Removes the clsact qdisc of an interface, unless somebody's filters are on it. Whether it
    /// is gone.
    pub(super) async fn remove_qdisc(&self, index: u32) -> bool {
        let Ok(index) = i32::try_from(index) else {
            return false;
        };
        for question in [
            self.traffic_filter(index).get().ingress(),
            self.traffic_filter(index).get().egress(),
        ] {
            let filters: Result<Vec<_>, _> = question.execute().try_collect().await;
            if !filters.is_ok_and(|filters| filters.is_empty()) {
                return false;
            }
        }
        let mut request = self.qdisc().del(index);
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.execute().await.is_ok()
    }
}

/// Sets the loopback up, and its `accept_local`.
async fn set_loopback(asking: &Asking, accept_local: bool) -> Result<(), NetworkError> {
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
    let set = asking.link().set(message).execute().await;
    set.map_err(|source| NetworkError::Netlink {
        what: "set up the loopback",
        source,
    })
}

async fn rule_and_route(asking: &Asking, family: AddressFamily) -> Result<(), NetworkError> {
    let rule = asking
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
    asking
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

/// The routes of the steering table.
async fn steering_routes(asking: &Asking, version: IpVersion) -> Vec<RouteMessage> {
    let question = match version {
        IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let mut found = Vec::new();
    let mut routes = asking.route().get(question).execute();
    while let Ok(Some(route)) = routes.try_next().await {
        if table(&route) == STEER_TABLE {
            found.push(route);
        }
    }
    found
}

async fn steering_rules(
    asking: &Asking,
    family: IpVersion,
) -> Result<Vec<RuleMessage>, NetworkError> {
    let rules = asking.rule().get(family).execute();
    let steering = rules.try_filter(|rule| std::future::ready(is_steering_rule(rule)));
    let error = |source| NetworkError::Netlink {
        what: "list the rules",
        source,
    };
    steering.try_collect().await.map_err(error)
}

async fn loopback_is_up(asking: &Asking) -> Result<bool, NetworkError> {
    let mut links = asking.link().get().match_index(LOOPBACK).execute();
    let link = links.try_next().await;
    let link = link.map_err(|source| NetworkError::Netlink {
        what: "look at the loopback",
        source,
    })?;
    Ok(link.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)))
}

fn is_steering_rule(rule: &RuleMessage) -> bool {
    let of_table = u32::from(rule.header.table) == STEER_TABLE;
    of_table && rule.attributes.contains(&RuleAttribute::FwMark(STEER_MARK))
}

fn output_interface(route: &RouteMessage) -> Option<u32> {
    let attributes = route.attributes.iter();
    let mut interfaces = attributes.filter_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    interfaces.next()
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
