//! The enrolment of one pod: what is checked, and what is set up in its netns.
//!
//! An enrolment that fails leaves nothing of its own. But a pod that an earlier agent enrolled
//! stays as that one left it, closed, until it is enrolled or withdrawn.

use std::{
    collections::hash_map::Entry,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;

use super::{
    Steering,
    acceleration::DialTag,
    diag,
    dial_ports::DialPorts,
    enrolment::{Enrolment, Made},
    events::Event,
    inherited::Inherited,
    listener_map,
    listeners::{self, ListenerPorts, PodListeners, PortSet},
    lock,
    netns::Netns,
    network::{Changes, Network, NetworkError},
    pod::Pod,
    programs::ProgramsError,
    record::{self, Record},
    routes::Routes,
    routing,
};
use crate::model::{PortRange, Workload, WorkloadId};

/// Why a pod can't be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("can't open its netns {path}: {source}")]
    Netns { path: PathBuf, source: io::Error },
    #[error("its netns {0} is the agent's own: a pod on the host network can't be meshed")]
    HostNetns(PathBuf),
    #[error("its netns {path} is that of {owner} already")]
    SharedNetns { path: PathBuf, owner: WorkloadId },
    #[error("its address {address} isn't in its netns {path}, which has {found:?}")]
    AddressAbsent {
        address: IpAddr,
        path: PathBuf,
        found: Vec<IpAddr>,
    },
    #[error("no port is left for the agent's listeners beside the pod's own")]
    NoPort,
    #[error("can't listen in its netns: {0}")]
    Listen(io::Error),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    #[error("the agent already has as many pods as there are numbers")]
    TooMany,
}

impl EnrolError {
    /// The word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Netns { .. } => "netns",
            Self::HostNetns(_) => "host_netns",
            Self::SharedNetns { .. } => "shared_netns",
            Self::AddressAbsent { .. } => "address_absent",
            Self::NoPort => "no_port",
            Self::Listen(_) => "listen",
            Self::Network(_) => "network",
            Self::Programs(_) => "programs",
            Self::TooMany => "too_many",
        }
    }
}

impl Steering {
    /// Enrols a pod: its traffic goes to the listeners that are handed back, one set for each
    /// worker. Several pods may be enrolled at once, but a workload only once at a time.
    pub async fn enrol(
        &self,
        workload: &Workload,
    ) -> Result<(Enrolment, Vec<PodListeners>), EnrolError> {
        let netns = Arc::new(self.open(workload)?);
        let id = netns.id();
        let enrolled = self.enrol_in(workload, netns).await;
        if enrolled.is_err() {
            self.books().netns_owners.remove(&id);
        }
        enrolled
    }

    async fn enrol_in(
        &self,
        workload: &Workload,
        netns: Arc<Netns>,
    ) -> Result<(Enrolment, Vec<PodListeners>), EnrolError> {
        let changes = Changes::of(&netns, &self.home)?;
        let network = Network::of(&netns, &self.home);
        check_addresses(&network, workload).await?;
        let pins = record::folder(&self.links, &workload.id, netns.id());
        self.bury_others(&workload.id, &pins).await;

        let earlier = Record::read(&pins);
        let (listener_ports, listeners, dial_ports, accept_local) =
            self.open_sockets(&netns, workload)?;
        let kept = listeners.iter().map(PodListeners::try_clone);
        let kept = kept
            .collect::<io::Result<_>>()
            .map_err(EnrolError::Listen)?;
        let (id, inherited) = self.take_number(earlier.as_ref())?;
        let record = Record {
            pod: id,
            accept_local: earlier.as_ref().map_or(accept_local, |r| r.accept_local),
            netns: netns.id(),
            path: workload.netns.clone().unwrap_or_default(),
        };
        let pod = Arc::new(Pod {
            id,
            netns,
            home: Arc::clone(&self.home),
            listener_ports,
            dial_ports,
            routes: Routes::default(),
            addresses: ArcSwap::default(),
            dial_tag: DialTag::new(self.acceleration.tags()),
        });
        let enrolment = Enrolment::new(
            workload.id.clone(),
            &pod,
            Arc::clone(&self.programs),
            self.attacher.clone(),
            Made {
                network,
                pins,
                record,
                listeners: kept,
            },
            inherited,
            self.events.clone(),
        );
        let set_up = self.set_up(&enrolment, workload, &listeners);
        if let Err(error) = set_up.await {
            if earlier.is_none() {
                self.withdraw(enrolment).await;
            } else {
                let left = Inherited::all(lock(&self.programs).maps()).remove(&id);
                let left = left.unwrap_or_default();
                self.books().inherited.insert(id, left);
            }
            return Err(error);
        }
        if let Some(folder) = workload.netns.as_deref().and_then(Path::parent) {
            self.events.watch(folder, Event::Netns);
        }
        Ok((enrolment.watched(changes), listeners))
    }

    /// Opens the netns of a workload, which must be its own, and is from now on.
    fn open(&self, workload: &Workload) -> Result<Netns, EnrolError> {
        let path = workload.netns.as_deref().unwrap_or(Path::new(""));
        let netns = Netns::open(path).map_err(netns_error(path))?;
        if netns.id() == self.home.id() {
            return Err(EnrolError::HostNetns(path.to_owned()));
        }
        match self.books().netns_owners.entry(netns.id()) {
            Entry::Occupied(owner) if *owner.get() != workload.id => {
                return Err(EnrolError::SharedNetns {
                    path: path.to_owned(),
                    owner: owner.get().clone(),
                });
            }
            owner => owner.insert_entry(workload.id.clone()),
        };
        Ok(netns)
    }

    /// The number of the pod, which is its earlier one if it had one, and what stands in the maps
    /// under it.
    fn take_number(&self, earlier: Option<&Record>) -> Result<(u32, Inherited), EnrolError> {
        let mut books = self.books();
        let number = match earlier {
            Some(earlier) => earlier.pod,
            None => (1..u32::MAX)
                .find(|number| !books.numbers.contains(number))
                .ok_or(EnrolError::TooMany)?,
        };
        books.numbers.insert(number);
        Ok((number, books.inherited.remove(&number).unwrap_or_default()))
    }

    /// Makes the agent's sockets in the pod's netns, clear of the pod's own ports. Also says
    /// whether `accept_local` is set there.
    fn open_sockets(
        &self,
        netns: &Netns,
        workload: &Workload,
    ) -> Result<(ListenerPorts, Vec<PodListeners>, DialPorts, bool), EnrolError> {
        let range = workload.settings.dial_ports;
        let path = workload.netns.as_deref().unwrap_or(Path::new(""));
        let open = || {
            let mut taken = PortSet::default();
            taken.extend(diag::listening_ports().map_err(EnrolError::Listen)?);
            taken.extend(workload.ports.iter().map(|port| port.port));
            let (ports, sets) = self.bind(&taken, range)?;
            let dial = DialPorts::new(range, |port| ports.contains(port) || taken.contains(port))
                .map_err(netns_error(path))?;
            Ok((ports, sets, dial, routing::accepts_local()))
        };
        netns.enter(&self.home, open).map_err(netns_error(path))?
    }

    /// Listeners on free ports. One that isn't known to be in use may still be bound to: then
    /// others are tried.
    fn bind(
        &self,
        taken: &PortSet,
        dial: PortRange,
    ) -> Result<(ListenerPorts, Vec<PodListeners>), EnrolError> {
        let mut taken = taken.clone();
        let ephemeral = listeners::ephemeral_ports();
        loop {
            let free = listeners::choose_ports(&ephemeral, dial, |port| taken.contains(port))
                .ok_or(EnrolError::NoPort)?;
            match listeners::bind(self.workers, free) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken.extend(free),
                other => return other.map_err(EnrolError::Listen),
            }
        }
    }

    async fn set_up(
        &self,
        enrolment: &Enrolment,
        workload: &Workload,
        listeners: &[PodListeners],
    ) -> Result<(), EnrolError> {
        let pod = enrolment.pod();
        enrolment.make_folder()?;
        enrolment.network().route_steered().await?;
        // Before the pod's entry says where the listeners are.
        listener_map::tag(&mut lock(&self.programs), pod.id, listeners)?;
        enrolment.update(workload)?;
        listener_map::insert(&mut lock(&self.programs), pod.id, listeners)?;
        enrolment.attach().await?;
        enrolment.refresh().await
    }
}

/// Whether the netns has each address that the workload is said to have.
async fn check_addresses(network: &Network, workload: &Workload) -> Result<(), EnrolError> {
    let found = network.addresses().await?;
    match workload.addresses.iter().find(|a| !found.contains(a)) {
        None => Ok(()),
        Some(address) => Err(EnrolError::AddressAbsent {
            address: *address,
            path: workload.netns.clone().unwrap_or_default(),
            found,
        }),
    }
}

pub(super) fn netns_error(path: &Path) -> impl Fn(io::Error) -> EnrolError {
    move |source| EnrolError::Netns {
        path: path.to_owned(),
        source,
    }
}
