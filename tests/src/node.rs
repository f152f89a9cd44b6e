//! A node: a network namespace with bridges for its pods, a cgroup and a bpffs folder.

use std::{
    fs,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    caller::Caller,
    cgroup,
    http::{self, Response},
    leftovers::Claim,
    netns::Netns,
    process::{Place, works_inside},
};

/// The port of an agent's metrics and probes.
pub(crate) const ADMIN_PORT: u16 = 4191;

/// How long an agent may take to answer there.
const ADMIN_LIMIT: Duration = Duration::from_secs(10);

/// How long an agent may take to answer with its configuration.
const CONFIG_LIMIT: Duration = Duration::from_secs(10);

/// A node of a bed.
#[derive(Debug)]
pub struct Node {
    name: String,
    /// 1 for the first node of a bed; part of every address.
    pub(crate) index: u8,
    netns: Netns,
    place: Place,
    cgroup: PathBuf,
    bpffs: PathBuf,
}

/// The networks of a node: its own addresses, and those of its pods behind each of its bridges.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    pub(crate) node: u8,
    /// 0 for `br0`, where every pod is, 1 for `br1`, where second interfaces are.
    pub(crate) bridge: u8,
}

impl Network {
    fn second_byte(self) -> u8 {
        100 + 100 * self.bridge + self.node
    }

    /// The `host`-th address; 1 is the bridge's own.
    pub(crate) fn v4(self, host: u16) -> Ipv4Addr {
        let [high, low] = host.to_be_bytes();
        Ipv4Addr::new(10, self.second_byte(), high, low)
    }

    pub(crate) fn v6(self, host: u16) -> Ipv6Addr {
        let network = 0xfd00 + u16::from(self.second_byte());
        Ipv6Addr::new(network, 0, 0, 0, 0, 0, 0, host)
    }
}

/// The addresses of the `index`-th node.
pub(crate) fn addresses(index: u8) -> (Ipv4Addr, Ipv6Addr) {
    let v6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, index.into());
    (Ipv4Addr::new(10, 77, 0, index), v6)
}

works_inside!(Node);

impl Node {
    pub(crate) fn create(claim: &Claim, name: &str, index: u8) -> Result<Self> {
        let netns = Netns::create(&format!("{}-node-{name}", claim.bed))?;
        // On machines with br_netfilter bridged packets would go through the host's firewall.
        let bridge_netfilter = netns.enter(|| Path::new("/proc/sys/net/bridge").exists());
        if bridge_netfilter {
            netns.sysctls(&[
                ("bridge/bridge-nf-call-iptables", "0"),
                ("bridge/bridge-nf-call-ip6tables", "0"),
                ("bridge/bridge-nf-call-arptables", "0"),
            ])?;
        }
        netns.sysctls(&[
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
        ])?;
        let (v4, v6) = addresses(index);
        let mut lines = format!("addr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad\n");
        for bridge in 0..2 {
            let network = Network {
                node: index,
                bridge,
            };
            let (v4, v6) = (network.v4(1), network.v6(1));
            // With an address of its own a bridge doesn't change it with each pod that comes.
            lines += &format!(
                "link add br{bridge} address 02:00:00:00:{bridge:02x}:{index:02x} type bridge\n\
                 link set br{bridge} up\n\
                 addr add {v4}/16 dev br{bridge}\n\
                 addr add {v6}/64 dev br{bridge} nodad\n"
            );
        }
        netns.ip(&lines)?;
        netns.wait_addresses_settled()?;
        let cgroup = claim.cgroup.join(name);
        cgroup::create(&cgroup)?;
        let bpffs = claim.bpffs.join(name);
        fs::create_dir_all(&bpffs).with_context(|| bpffs.display().to_string())?;
        let place = Place {
            bed: claim.bed.clone(),
            folder: claim.folder.clone(),
            netns: netns.path().to_owned(),
            cgroup: cgroup.clone(),
        };
        Ok(Self {
            name: name.to_owned(),
            index,
            netns,
            place,
            cgroup,
            bpffs,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The folder of the agent's unix socket.
    pub fn runtime_folder(&self) -> PathBuf {
        self.place.folder.join(format!("run-{}", self.name))
    }

    /// Where the node's agent pins a map. Panics where none has run yet.
    pub fn pinned_map(&self, name: &str) -> PathBuf {
        let maps = self.bpffs().join("maps");
        let mut layouts = fs::read_dir(&maps).expect("an agent makes its folder of maps");
        let layout = layouts.next().and_then(Result::ok);
        let layout = layout.unwrap_or_else(|| panic!("{} is empty", maps.display()));
        layout.path().join(name)
    }

    /// The node's own addresses, which its agent's metrics and probes are on.
    pub fn addresses(&self) -> [IpAddr; 2] {
        let (v4, v6) = addresses(self.index);
        [v4.into(), v6.into()]
    }

    /// A client on the node, as the kubelet is one, that comes from the node's own address of the
    /// family of `to`.
    pub fn caller(&self, to: IpAddr) -> Caller<'_> {
        let [v4, v6] = self.addresses();
        let own = if to.is_ipv4() { v4 } else { v6 };
        Caller::new(&self.netns).from((own, 0).into())
    }

    /// The name of this node's interface to `peer`: the wire between the two.
    pub fn wire_to(&self, peer: &Self) -> String {
        format!("to-{}", peer.name)
    }

    /// Asks the agent's admin server for `path`. Once more where the connection is reset: while one agent
    /// takes another's place both have the port, and what the old one hasn't accepted when it leaves it is
    /// reset.
    pub fn get(&self, path: &str) -> Result<Response> {
        let address = SocketAddr::new(self.addresses()[0], ADMIN_PORT);
        let ask = || self.enter(|| http::get(address, path, ADMIN_LIMIT));
        ask().or_else(|error| if is_reset(&error) { ask() } else { Err(error) })
    }

    /// Where the node's agent has its unix socket.
    pub fn config_socket(&self) -> PathBuf {
        self.runtime_folder().join("agent.sock")
    }

    /// What the agent says in `/config`.
    pub fn config(&self) -> Result<Value> {
        let response = http::get_unix(&self.config_socket(), "/config", CONFIG_LIMIT)?;
        ensure!(
            response.status == 200,
            "/config answered {}: {}",
            response.status,
            response.body
        );
        Ok(serde_json::from_str(&response.body)?)
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }
}

/// Whether a connection was reset, which is a broken pipe for who writes then.
fn is_reset(error: &anyhow::Error) -> bool {
    let kind = error.root_cause().downcast_ref().map(io::Error::kind);
    matches!(
        kind,
        Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    )
}
