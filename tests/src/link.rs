//! The wire between two nodes.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};

use crate::{
    forwarder::{Forwarder, Impairment},
    node::{Network, Node, addresses},
};

/// How two nodes are linked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Link {
    /// A veth pair: fast, and hides what an unfinished checksum or a large segment would do.
    Veth,
    /// A forwarder in user space between two TUN interfaces, which behaves as a wire: checksums
    /// are completed, segments are cut to the MTU, and packets suffer what [`Impairment`] says.
    Wire(Impairment),
}

impl Link {
    /// A wire that keeps every packet.
    pub const CLEAN_WIRE: Self = Self::Wire(Impairment::NONE);

    /// A wire that loses 1 %, delays by 5 ms and reorders 1 %.
    pub const LOSSY_WIRE: Self = Self::Wire(Impairment {
        loss: 0.01,
        delay: Duration::from_millis(5),
        reorder: 0.01,
    });
}

/// A link that stands. A veth ends with its namespaces, a wire when this is dropped.
#[derive(Debug)]
pub(crate) struct Linked {
    nodes: [Arc<Node>; 2],
    pub(crate) forwarder: Option<Forwarder>,
}

impl Linked {
    pub(crate) fn create(a: &Arc<Node>, b: &Arc<Node>, link: Link, mtu: u32) -> Result<Self> {
        let (to_b, to_a) = (a.wire_to(b), b.wire_to(a));
        let context = || format!("linking nodes {} and {}", a.name(), b.name());
        let forwarder = match link {
            Link::Veth => {
                let peer = b.netns().name();
                a.netns()
                    .ip(&format!(
                        "link add {to_b} mtu {mtu} type veth peer name {to_a} mtu {mtu} netns {peer}\n"
                    ))
                    .with_context(context)?;
                None
            }
            Link::Wire(impairment) => {
                let ends = [(a.netns(), &*to_b), (b.netns(), &*to_a)];
                Some(Forwarder::start(ends, mtu, impairment).with_context(context)?)
            }
        };
        route(a, b).with_context(context)?;
        route(b, a).with_context(context)?;
        Ok(Self {
            nodes: [Arc::clone(a), Arc::clone(b)],
            forwarder,
        })
    }

    pub(crate) fn joins(&self, a: &Node, b: &Node) -> bool {
        let names = self.nodes.each_ref().map(|node| node.name());
        names == [a.name(), b.name()] || names == [b.name(), a.name()]
    }
}

/// Teaches `from` the way to `to` and to the pods there.
fn route(from: &Node, to: &Node) -> Result<()> {
    let wire = from.wire_to(to);
    let ((own4, own6), (peer4, peer6)) = (addresses(from.index), addresses(to.index));
    let mut lines = format!(
        "link set {wire} up\n\
         addr add {own4} peer {peer4} dev {wire}\n\
         addr add {own6}/128 dev {wire} nodad\n\
         route add {peer6}/128 dev {wire}\n"
    );
    for bridge in 0..2 {
        let network = Network {
            node: to.index,
            bridge,
        };
        let (v4, v6) = (network.v4(0), network.v6(0));
        lines += &format!(
            "route add {v4}/16 via {peer4} dev {wire}\n\
             route add {v6}/64 via {peer6} dev {wire} onlink\n"
        );
    }
    from.netns().ip(&lines)?;
    from.netns().wait_addresses_settled()
}

/// Teaches all nodes the way to a pod of `node` at an address that may be of another's network.
pub(crate) fn route_address(nodes: &[Arc<Node>], node: &Node, address: IpAddr) -> Result<()> {
    let (v4, v6) = addresses(node.index);
    for from in nodes {
        let wire = from.wire_to(node);
        let way = match address {
            _ if from.name() == node.name() => "dev br0".to_owned(),
            IpAddr::V4(_) => format!("via {v4} dev {wire}"),
            IpAddr::V6(_) => format!("via {v6} dev {wire} onlink"),
        };
        from.netns()
            .ip(&format!("route replace {address} {way}\n"))?;
    }
    Ok(())
}
