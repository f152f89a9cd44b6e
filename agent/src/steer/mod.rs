//! Steering: the eBPF programs, the pods' network namespaces, the agent's sockets in them.
//!
//! Knows workloads and their settings, nothing of TLS or of any protocol above TCP. What outlives
//! the agent on purpose (links, maps, rules, routes) goes only by [`Steering::withdraw`] and its kin.

mod acceleration;
mod attach;
mod audit;
mod census;
mod cgroup;
mod charge;
mod cleanup;
mod diag;
mod dial;
mod dial_ports;
mod dial_stock;
mod ebpf_log;
mod enrol;
mod enrolment;
mod events;
mod inherited;
mod legs;
mod links;
mod listener_map;
mod listeners;
mod netns;
mod network;
mod pod;
pub mod preflight;
mod programs;
mod record;
mod refusals;
mod routes;
mod routing;
mod rules;
mod urgent;
mod withdraw;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use malla_common::{Counter, Flow, WorkerLoad};

pub use acceleration::{Acceleration, Credit, InForce, Join, Queues, Verdict};
pub use attach::TcMethod;
pub use audit::{AUDIT_INTERVAL, Difference, Kind};
pub use census::{ends_of, sockets_of};
pub use cgroup::check as check_cgroup;
pub use cleanup::{cleanup, folders as folders_of_agents};
pub use dial::{DialError, Opening, OwnDial, ToApp, end_orderly, to_app, to_network};
pub use dial_stock::{DialStock, ExpectedDial};
pub use enrol::EnrolError;
pub use enrolment::{Degradation, Enrolment};
pub use events::{Event, EventReceiver};
pub use legs::{notice_gone, was_found_gone};
pub use listeners::PodListeners;
pub use netns::Netns;
pub use pod::Pod;
pub use programs::ProgramsError;
pub use record::Record;

use self::{
    attach::Attacher, cgroup::CgroupId, charge::Charge, events::Events, inherited::Inherited,
    netns::NetnsId, programs::Programs, refusals::Refusals,
};
use crate::model::{Accelerate, Node, WorkloadId};

/// Why a node can't be steered.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    #[error(transparent)]
    Missing(#[from] preflight::Missing),
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    #[error("can't open the agent's own network namespace: {0}")]
    Home(std::io::Error),
    #[error(
        "another agent (cgroup {0}) is in charge of this node's pods: end it first, or let this \
         one take its place with --takeover"
    )]
    Occupied(u64),
    #[error("can't note in {path} who is in charge: {source}")]
    Charge {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// The data path of one node.
pub struct Steering {
    programs: Arc<Mutex<Programs>>,
    home: Arc<Netns>,
    cgroup: cgroup::OwnCgroup,
    charge: Charge,
    /// Folder of the pods' pinned links.
    links: PathBuf,
    workers: u16,
    attacher: Attacher,
    /// Pods are enrolled side by side. Never held across an await.
    books: Mutex<Books>,
    refusals: Refusals,
    acceleration: Arc<Acceleration>,
    events: Events,
    _log: Option<ebpf_log::Reader>,
}

/// Who has what.
#[derive(Debug, Default)]
struct Books {
    /// Also of workloads whose enrolment has only begun.
    netns_owners: HashMap<NetnsId, WorkloadId>,
    /// What earlier agents left in the maps, of pods that aren't enrolled again yet.
    inherited: HashMap<u32, Inherited>,
    /// Numbers of pods that are in use, by this agent or what is left of an earlier one.
    numbers: HashSet<u32>,
}

/// What a worker needs of the data path.
pub struct WorkerHandles {
    pub own_dial: OwnDial,
    pub scopes: BpfHashMap<MapData, Flow, u32>,
    pub loads: Array<MapData, WorkerLoad>,
    pub queues: Arc<Queues>,
}

/// How much the programs tell of each decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, clap::ValueEnum)]
pub enum EbpfLog {
    #[default]
    Off,
    Info,
    Debug,
}

impl Steering {
    /// Checks the machine, moves this process into its own cgroup and loads the programs. To be
    /// called before any socket is made, from a tokio runtime.
    pub fn start(
        node: &Node,
        workers: u16,
        log: EbpfLog,
        method: TcMethod,
        takeover: bool,
        accelerate: Accelerate,
    ) -> Result<(Self, EventReceiver), SteeringError> {
        preflight::check(&node.bpffs)?;
        let holder = Charge::holder(&node.bpffs, &node.cgroup);
        if let Some(holder) = holder.filter(|_| !takeover) {
            return Err(SteeringError::Occupied(holder));
        }
        let cgroup = cgroup::enter_child_of(&node.cgroup)?;
        let home = Arc::new(Netns::current().map_err(SteeringError::Home)?);
        let mut programs = Programs::load(&node.bpffs, ebpf_log::level(log), method)?;
        let map = |name| move |source| ProgramsError::Map { name, source };
        let maps = programs.maps();
        let charge = Charge::new(&node.bpffs, &node.cgroup, cgroup.id);
        let noted = |source| SteeringError::Charge {
            path: node.bpffs.clone(),
            source,
        };
        if holder.is_some() {
            charge.announce().map_err(noted)?;
        } else {
            charge.take().map_err(noted)?;
        }
        let living = cgroup::living_agents(&node.cgroup);
        let known: Vec<u64> = maps.agents.keys().flatten().collect();
        for gone in known.iter().filter(|id| !living.contains(id)) {
            maps.agents.remove(gone).map_err(map("AGENTS"))?;
        }
        maps.agents
            .insert(cgroup.id.0, 1, 0)
            .map_err(map("AGENTS"))?;
        maps.workers
            .set(0, u32::from(workers), 0)
            .map_err(map("WORKERS"))?;
        programs
            .own_dial(cgroup.id)?
            .forget_all_but(|owner| living.iter().any(|id| dial::owner(CgroupId(*id)) == owner));
        let reader = ebpf_log::Reader::start(&mut programs, log);
        let links = node.bpffs.join("links");
        programs::make_folder(&links)?;
        let inherited = Inherited::all(programs.maps());
        let refusals = Refusals::inherited(programs.maps());
        let records = record::all(&links);
        let recorded = records
            .iter()
            .filter_map(|(_, folder)| Record::read(folder));
        let numbers = recorded.map(|record| record.pod);
        let (events, receiver) = Events::start();
        events.watch(programs.maps_folder(), Event::Node);
        events.watch(&node.bpffs, Event::Node);
        let books = Books {
            numbers: numbers.chain(inherited.keys().copied()).collect(),
            inherited,
            ..Books::default()
        };
        let maps_folder = programs.maps_folder();
        let acceleration = Acceleration::new(
            node,
            accelerate,
            maps_folder,
            &cgroup.path,
            Arc::clone(&home),
        );
        let programs = Arc::new(Mutex::new(programs));
        let steering = Self {
            attacher: Attacher::new(&programs),
            programs,
            home,
            cgroup,
            charge,
            links,
            workers,
            books: Mutex::new(books),
            refusals,
            acceleration: Arc::new(acceleration),
            events,
            _log: reader,
        };
        Ok((steering, receiver))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes charge of the node's pods, which are all enrolled now.
    pub fn take_charge(&self) -> Result<(), SteeringError> {
        self.charge.take().map_err(|source| SteeringError::Charge {
            path: self.links.clone(),
            source,
        })
    }

    /// Whether this agent is the one in charge.
    pub fn is_in_charge(&self) -> bool {
        self.charge.is_own()
    }

    /// Whether another agent has taken over.
    pub fn is_superseded(&self) -> bool {
        self.charge.is_lost()
    }

    /// Whether another agent is about to take over.
    pub fn has_successor(&self) -> bool {
        self.charge.has_successor()
    }

    /// Whether the pods are another agent's to look after: one is about to take over, or has. Asked in this
    /// order, since the one note is taken away when the other is there.
    pub fn is_yielding(&self) -> bool {
        self.has_successor() || self.is_superseded()
    }

    /// Whether one that was about to take over has died: pods may be without listeners.
    pub fn lost_successor(&self) -> bool {
        self.charge.lost_successor()
    }

    /// Forgets the dead successor: what it took is put back.
    pub fn forget_successor(&self) {
        self.charge.forget_successor();
    }

    pub fn acceleration(&self) -> &Arc<Acceleration> {
        &self.acceleration
    }

    /// Lets go of what another agent is to withdraw from now on, and leaves new connections to it.
    pub fn release_links(&self) {
        self.acceleration.stop();
        self.attacher.release_all();
    }

    /// Leaves the node's pods closed, with nobody in charge.
    pub fn give_up_charge<'a>(&self, enrolled: impl Iterator<Item = &'a Enrolment>) {
        self.charge.give_up();
        let mut programs = lock(&self.programs);
        for enrolment in enrolled {
            listener_map::remove(&mut programs, enrolment.pod().id, self.workers);
        }
    }

    /// The cgroup that this process is in, if that isn't its own any more.
    pub fn foreign_cgroup(&self) -> Option<String> {
        self.cgroup.left_for()
    }

    pub fn worker_handles(&self) -> Result<WorkerHandles, ProgramsError> {
        let programs = lock(&self.programs);
        Ok(WorkerHandles {
            own_dial: programs.own_dial(self.cgroup.id)?,
            scopes: programs.scopes()?,
            loads: programs.worker_loads()?,
            queues: self.acceleration.queues(),
        })
    }

    /// Reads the programs' counters, summed over CPUs; zeros are left out.
    pub fn counters(
        &self,
    ) -> Result<impl Fn() -> Vec<(Counter, u64)> + Send + Sync + use<>, ProgramsError> {
        let counters = lock(&self.programs).counters()?;
        Ok(move || {
            Counter::all()
                .filter_map(|counter| {
                    let values = counters.get(&counter.slot(), 0).ok()?;
                    let sum: u64 = values.iter().sum();
                    (sum > 0).then_some((counter, sum))
                })
                .collect()
        })
    }
}

/// Runs what takes the kernel milliseconds on a thread where it keeps nobody waiting.
async fn on_blocking_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(job).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Cancelled: the runtime shuts down, and drops this task at its next await.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The programs' state is consistent between any two calls, so a panic elsewhere doesn't spoil it.
fn lock(programs: &Mutex<Programs>) -> MutexGuard<'_, Programs> {
    programs.lock().unwrap_or_else(PoisonError::into_inner)
}
