//! The programs of acceleration, as one agent loads and attaches them.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::{
    Btf, Ebpf,
    maps::{Map, MapData, MapError, PerCpuArray, PerCpuValues, SkStorage},
    programs::{BtfTracePoint, CgroupSockopt, Lsm, Program, ProgramError, SkMsg, SockOps},
};
use malla_common::acceleration::Event;

use super::queues::Maps;
use crate::{
    ledger::{Accounted, Entry, Kind},
    steer::{
        links::{self, Target},
        programs::{Extent, ProgramsError, load_object},
    },
};

const ADDS: &str = "accelerate";
const REDIRECTS: &str = "redirect";
const COUNTS: &str = "consumed";
const GUARDS: &str = "keep_plain";
const SPLICE_GUARD: &str = "refuse_splice";
/// What that hangs on.
const PERMISSION_HOOK: &str = "file_permission";
/// What [`COUNTS`] hangs on (Linux 6.3).
const RECEIVE_HOOK: &str = "sock_recv_length";

/// Why acceleration can't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    #[error("can't read the kernel's types: {0}")]
    Btf(#[from] aya::BtfError),
    #[error("the kernel doesn't tell what is read (`{RECEIVE_HOOK}`, Linux 6.3): {0}")]
    ReceiveHook(ProgramError),
    #[error("can't use a map: {0}")]
    Map(#[from] MapError),
    #[error("can't attach the programs: {0}")]
    Attach(#[from] io::Error),
}

/// Loaded programs. They leave what they are attached to with this value, but for the sockets.
pub(super) struct AccelerationPrograms {
    adds: Accounted<OwnedFd>,
    guards: Accounted<OwnedFd>,
    _counts: Accounted<OwnedFd>,
    /// None where the kernel has no programs for security modules: the self-test finds out what comes of it.
    splice_guard: Option<Accounted<OwnedFd>>,
    /// While no descriptor of it is open, the kernel forgets which program it has.
    ends: Accounted<OwnedFd>,
    tags: Accounted<OwnedFd>,
    waiting: Accounted<OwnedFd>,
    joins: Accounted<OwnedFd>,
    events: (PerCpuArray<MapData, u64>, Entry),
    /// The links of what adds connections and of what guards them.
    adding: Option<Accounted<OwnedFd>>,
    guarding: Option<Accounted<OwnedFd>>,
}

impl AccelerationPrograms {
    /// Loads the programs, and attaches what isn't about one cgroup.
    pub(super) fn load(maps_folder: &Path) -> Result<Self, LoadError> {
        let btf = Btf::from_sys_fs()?;
        let mut ebpf =
            load_object(maps_folder, 0, Extent::Acceleration).map_err(ProgramsError::from)?;
        let counts: &mut BtfTracePoint = program(&mut ebpf, COUNTS)?;
        let loaded = counts.load(RECEIVE_HOOK, &btf);
        loaded.map_err(LoadError::ReceiveHook)?;
        let counts = links::create(&owned(COUNTS, counts.fd())?, Target::Tracepoint)?;
        let adds: &mut SockOps = program(&mut ebpf, ADDS)?;
        adds.load().map_err(refused(ADDS))?;
        let adds = owned(ADDS, adds.fd())?;
        let guards: &mut CgroupSockopt = program(&mut ebpf, GUARDS)?;
        guards.load().map_err(refused(GUARDS))?;
        let guards = owned(GUARDS, guards.fd())?;
        let redirects: &mut SkMsg = program(&mut ebpf, REDIRECTS)?;
        redirects.load().map_err(refused(REDIRECTS))?;
        let redirects = owned(REDIRECTS, redirects.fd())?;
        let splice_guard = guard_splices(&mut ebpf, &btf)
            .inspect_err(|error| tracing::debug!(%error, "splices aren't refused"))
            .ok();
        let ends = map(&mut ebpf, "ENDS")?;
        links::attach_to_messages(&redirects, &ends)?;
        let events = ebpf.take_map("ACCELERATION_EVENTS");
        let Some(Map::PerCpuArray(events)) = events else {
            return Err(ProgramsError::Absent("ACCELERATION_EVENTS").into());
        };
        let entry = Entry::new(events.fd(), 0, Kind::Acceleration);
        let events = (Map::PerCpuArray(events).try_into()?, entry);
        Ok(Self {
            adds: accounted(adds),
            guards: accounted(guards),
            _counts: accounted(counts),
            splice_guard: splice_guard.map(accounted),
            ends: accounted(ends),
            tags: accounted(map(&mut ebpf, "TAGS")?),
            waiting: accounted(map(&mut ebpf, "WAITING")?),
            joins: accounted(map(&mut ebpf, "JOINS")?),
            events,
            adding: None,
            guarding: None,
        })
    }

    /// Adds the connections of all processes below this cgroup.
    pub(super) fn attach(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        let cgroup = File::open(cgroup)?;
        let guarding = links::create(&*self.guards, Target::SocketOptions(&cgroup))?;
        self.guarding = Some(accounted(guarding));
        let adding = links::create(&*self.adds, Target::SocketEvents(&cgroup))?;
        self.adding = Some(accounted(adding));
        Ok(())
    }

    /// Whether the kernel has taken the program that refuses splices, be it asked or not.
    pub(super) fn refuse_splices(&self) -> bool {
        self.splice_guard.is_some()
    }

    /// Leaves the cgroup.
    pub(super) fn detach(&mut self) {
        self.stop_adding();
        self.guarding = None;
    }

    /// Leaves the connections that live as they are.
    pub(super) fn stop_adding(&mut self) {
        self.adding = None;
    }

    /// A handle on the map of tags.
    pub(super) fn tags(&self) -> Result<(SkStorage<MapData, u32>, Entry), LoadError> {
        let (map, entry) = handle(&self.tags)?;
        Ok((Map::SkStorage(map).try_into()?, entry))
    }

    /// Handles on the maps of what is redirected.
    pub(super) fn queues(&self) -> Result<Maps, LoadError> {
        let (waiting, waiting_entry) = handle(&self.waiting)?;
        let (ends, ends_entry) = handle(&self.ends)?;
        let (joins, joins_entry) = handle(&self.joins)?;
        Ok(Maps {
            waiting: (Map::HashMap(waiting).try_into()?, waiting_entry),
            // The library's type for a map of sockets takes a cookie for a descriptor.
            ends: (Map::HashMap(ends).try_into()?, ends_entry),
            joins: (Map::HashMap(joins).try_into()?, joins_entry),
        })
    }

    /// Counts from nothing again.
    pub(super) fn reset_events(&mut self) -> Result<(), LoadError> {
        for event in Event::ALL {
            let counts = self.events.0.get(&(event as u32), 0)?;
            let none = PerCpuValues::try_from(vec![0; counts.len()])?;
            self.events.0.set(event as u32, none, 0)?;
        }
        Ok(())
    }

    pub(super) fn events(&self) -> Vec<(Event, u64)> {
        let count = |event: Event| {
            let values = self.events.0.get(&(event as u32), 0).ok()?;
            Some((event, values.iter().sum()))
        };
        Event::ALL.into_iter().filter_map(count).collect()
    }
}

/// Lets splice(2) fail that wouldn't see what was redirected. Where the modules of the machine's start
/// don't have `bpf` among them, the kernel takes the program and never asks it.
fn guard_splices(ebpf: &mut Ebpf, btf: &Btf) -> Result<OwnedFd, LoadError> {
    if !cfg!(target_arch = "x86_64") {
        // It knows the registers of that alone.
        return Err(ProgramsError::Absent(SPLICE_GUARD).into());
    }
    let guard: &mut Lsm = program(ebpf, SPLICE_GUARD)?;
    let loaded = guard.load(PERMISSION_HOOK, btf);
    loaded.map_err(refused(SPLICE_GUARD))?;
    let guard = owned(SPLICE_GUARD, guard.fd())?;
    Ok(links::create(&guard, Target::SecurityHook)?)
}

fn accounted(fd: OwnedFd) -> Accounted<OwnedFd> {
    Accounted::new(fd, 0, Kind::Acceleration)
}

/// A second descriptor of a map.
fn handle(map: &OwnedFd) -> Result<(MapData, Entry), LoadError> {
    let map = MapData::from_fd(map.try_clone()?)?;
    let entry = Entry::new(map.fd(), 0, Kind::Acceleration);
    Ok((map, entry))
}

fn map(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, LoadError> {
    match ebpf.map(name) {
        Some(Map::SockHash(map) | Map::SkStorage(map) | Map::HashMap(map)) => {
            Ok(map.fd().as_fd().try_clone_to_owned()?)
        }
        _ => Err(ProgramsError::Absent(name).into()),
    }
}

fn owned(
    name: &'static str,
    fd: Result<&aya::programs::ProgramFd, ProgramError>,
) -> Result<OwnedFd, LoadError> {
    let fd = fd.map_err(refused(name))?;
    Ok(fd.as_fd().try_clone_to_owned()?)
}

fn refused(name: &'static str) -> impl Fn(ProgramError) -> ProgramsError {
    move |source| ProgramsError::Verify { name, source }
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, ProgramsError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(ProgramsError::Absent(name))?
        .try_into()
        .map_err(refused(name))
}
