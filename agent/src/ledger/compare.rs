//! The ledger beside what the kernel has: a function of plain values.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    os::fd::RawFd,
};

use super::{Descriptor, Kind, Line, Target};

/// A TCP socket of a netns that some process holds. A node may have hundreds of thousands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSocket {
    pub inode: u32,
    pub listens: bool,
    /// The same number at both ends of a connection within one netns, and at no other.
    pub pair: u64,
}

/// A connection's local and remote address.
pub type Ends = (SocketAddr, SocketAddr);

/// The pods that are served, by number; None where the kernel wasn't asked this time.
pub type PodSockets = BTreeMap<u32, Option<Vec<KernelSocket>>>;

/// What a comparison found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub pods: BTreeMap<u32, PodAccount>,
    /// Descriptors that are open.
    pub open: usize,
    /// Entries by kind.
    pub entered: BTreeMap<Kind, usize>,
    /// Descriptors from the agent's start that are still open, by their kernel's kind.
    pub from_start: BTreeMap<String, usize>,
    pub differences: Vec<Difference>,
    /// Legs to apps, by descriptor, whose other end no process of the pod's netns holds.
    pub alone: Vec<RawFd>,
}

/// One pod's sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodAccount {
    /// Entries by kind.
    pub believed: BTreeMap<Kind, usize>,
    /// None where the kernel wasn't asked this time.
    pub kernel: Option<KernelAccount>,
}

/// The agent's sockets in one pod's netns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelAccount {
    pub listeners: usize,
    pub connections: usize,
    /// Connections that are entered and open, but over for the kernel, which lists them no more:
    /// both ends were closed, and one direction's bytes are still to be delivered.
    pub closed: usize,
}

impl PodAccount {
    pub fn connections(&self) -> usize {
        let connections = self.believed.iter().filter(|(k, _)| k.is_connection());
        connections.map(|(_, count)| count).sum()
    }

    pub fn listeners(&self) -> usize {
        self.believed.get(&Kind::Listener).copied().unwrap_or(0)
    }
}

/// How the ledger and the kernel differ in one descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DifferenceKind {
    /// A descriptor that nobody entered.
    Unaccounted,
    /// An entry without a descriptor.
    Missing,
    /// An entry of a pod that isn't served any more, with a descriptor.
    Orphaned,
}

impl DifferenceKind {
    /// The word for output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unaccounted => "unaccounted",
            Self::Missing => "missing",
            Self::Orphaned => "orphaned",
        }
    }
}

/// One descriptor in which the two differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub kind: DifferenceKind,
    /// One word for what it is: the entry's kind, or the kernel's.
    pub what: String,
    /// None where it belongs to no pod, or the pod wasn't asked.
    pub pod: Option<u32>,
    pub descriptor: RawFd,
    /// Tells it from another of the same number.
    pub identity: String,
    /// Its inode, where it is a socket of a pod.
    pub inode: Option<u32>,
    /// Its addresses, where it is a socket of a pod and they were asked for.
    pub ends: Option<Ends>,
}

/// Compares `lines` and `descriptors`, both in the order of their numbers. `from_start` are descriptors
/// that were open before anything was entered.
pub fn compare(
    lines: &[Line],
    descriptors: &[Descriptor],
    from_start: &HashSet<Descriptor>,
    pods: &PodSockets,
) -> Account {
    let mut account = Account {
        open: descriptors.len(),
        ..Account::default()
    };
    for line in lines {
        *account.entered.entry(line.kind).or_default() += 1;
        let is_of_pod = line.kind == Kind::Listener || line.kind.is_connection();
        let is_served = pods.contains_key(&line.pod);
        if is_of_pod && is_served {
            let pod = account.pods.entry(line.pod).or_default();
            *pod.believed.entry(line.kind).or_default() += 1;
        }
        let kind = match target(descriptors, line.descriptor) {
            None => DifferenceKind::Missing,
            Some(_) if is_of_pod && !is_served => DifferenceKind::Orphaned,
            Some(_) => continue,
        };
        account.differences.push(Difference {
            kind,
            what: line.kind.as_str().to_owned(),
            pod: is_of_pod.then_some(line.pod),
            descriptor: line.descriptor,
            identity: line.serial.to_string(),
            inode: None,
            ends: None,
        });
    }
    let mut unaccounted = Vec::new();
    for descriptor in descriptors {
        let number = |line: &Line| line.descriptor;
        if lines
            .binary_search_by_key(&descriptor.number, number)
            .is_ok()
        {
            continue;
        }
        if from_start.contains(descriptor) {
            let word = descriptor.target.word();
            *account.from_start.entry(word).or_default() += 1;
        } else {
            unaccounted.push(descriptor);
        }
    }
    let differences = differences_of(&unaccounted, pods);
    account.differences.extend(differences);
    let mut own: Vec<u32> = descriptors
        .iter()
        .filter_map(|d| inode(&d.target))
        .collect();
    own.sort_unstable();
    for (number, asked) in pods {
        let pod = account.pods.entry(*number).or_default();
        let Some(asked) = asked else { continue };
        let is_own = |socket: &&KernelSocket| own.binary_search(&socket.inode).is_ok();
        let sockets = asked.iter().filter(is_own).copied().collect();
        let others = asked.iter().filter(|socket| !is_own(socket));
        let others = others.map(|socket| socket.pair).collect();
        let (kernel, alone) = kernel_account(*number, sockets, others, lines, descriptors);
        pod.kernel = Some(kernel);
        account.alone.extend(alone);
    }
    account
}

/// What a descriptor is of, where it is open.
fn target(descriptors: &[Descriptor], number: RawFd) -> Option<&Target> {
    let place = descriptors.binary_search_by_key(&number, |descriptor| descriptor.number);
    Some(&descriptors[place.ok()?].target)
}

/// What the kernel knows of descriptors that nobody entered.
fn differences_of(unaccounted: &[&Descriptor], pods: &PodSockets) -> Vec<Difference> {
    let inodes: HashSet<u32> = unaccounted
        .iter()
        .filter_map(|d| inode(&d.target))
        .collect();
    let mut sockets: HashMap<u32, (u32, &KernelSocket)> = HashMap::new();
    if !inodes.is_empty() {
        for (number, asked) in pods {
            let asked = asked.iter().flatten();
            let meant = asked.filter(|socket| inodes.contains(&socket.inode));
            sockets.extend(meant.map(|socket| (socket.inode, (*number, socket))));
        }
    }
    let difference = |descriptor: &&Descriptor| {
        let found = inode(&descriptor.target).and_then(|inode| sockets.get(&inode));
        let what = match found {
            None => descriptor.target.word(),
            Some((_, socket)) if socket.listens => "listener".to_owned(),
            Some(_) => "connection".to_owned(),
        };
        Difference {
            kind: DifferenceKind::Unaccounted,
            what,
            pod: found.map(|(pod, _)| *pod),
            descriptor: descriptor.number,
            identity: descriptor.target.to_string(),
            inode: found.map(|(_, socket)| socket.inode),
            ends: None,
        }
    };
    unaccounted.iter().map(difference).collect()
}

/// What the kernel has for a pod: the process's `own` sockets in its netns, and those of its legs to apps
/// that no socket of `others`, by their pairs, is the other end of.
fn kernel_account(
    pod: u32,
    mut own: Vec<KernelSocket>,
    mut others: Vec<u64>,
    lines: &[Line],
    descriptors: &[Descriptor],
) -> (KernelAccount, Vec<RawFd>) {
    // The kernel may list one twice while others come and go.
    own.sort_unstable_by_key(|socket| socket.inode);
    own.dedup_by_key(|socket| socket.inode);
    others.sort_unstable();
    let listeners = own.iter().filter(|socket| socket.listens).count();
    let (mut closed, mut alone) = (0, Vec::new());
    for line in lines {
        if line.pod != pod || !line.kind.is_connection() {
            continue;
        }
        let Some(inode) = target(descriptors, line.descriptor).and_then(inode) else {
            continue;
        };
        let Ok(place) = own.binary_search_by_key(&inode, |socket| socket.inode) else {
            closed += 1;
            continue;
        };
        if line.kind.is_to_app() && others.binary_search(&own[place].pair).is_err() {
            alone.push(line.descriptor);
        }
    }
    let account = KernelAccount {
        listeners,
        connections: own.len() - listeners,
        closed,
    };
    (account, alone)
}

fn inode(target: &Target) -> Option<u32> {
    match target {
        Target::Socket(inode) => Some(*inode),
        Target::Other(_) => None,
    }
}

#[cfg(test)]
mod tests;
