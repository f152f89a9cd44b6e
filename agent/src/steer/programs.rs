//! The eBPF programs and maps of one node: loading, pinning, reading.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap as BpfHashMap, Map, MapData, MapError, MapInfo, PerCpuArray, SkStorage,
        SockHash, lpm_trie::Key, lpm_trie::LpmTrie,
    },
    pin::PinError,
    programs::{ProgramError, ProgramFd, ProgramInfo, SchedClassifier, SkLookup},
};
use malla_common::{
    Address, Destination, Flow, ListenerKey, NetRule, PodEntry, PortRule, ProbeTarget, WorkerLoad,
};

use super::{attach::TcMethod, cgroup::CgroupId, dial::OwnDial};

/// The object that `cargo xtask build-ebpf` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/malla-ebpf"));

/// Layout of the pinned maps. An agent with another layout starts with maps of its own.
const LAYOUT: &str = "v8";

const PROGRAMS: [&str; 5] = ["egress", "egress_l3", "ingress", "ingress_l3", "loopback"];

/// The program of a netns; the others are those of interfaces.
pub const LOOKUP: &str = "lookup";

const MAPS: [&str; 19] = [
    "AGENTS",
    "PODS",
    "LISTENERS",
    "OWN_DIAL",
    "PORT_RULES",
    "NET_RULES",
    "PROBE_TARGETS",
    "PROBE_FLOWS",
    "REFUSALS",
    "STEERED",
    "SCOPES",
    "WORKERS",
    "URGENT",
    "WORKER_LOADS",
    "PAIRS",
    "COUNTERS",
    "SOCKETS",
    "LISTENER_PODS",
    "INBOUND_SOCKETS",
];

/// What went wrong with programs or maps.
#[derive(Debug, thiserror::Error)]
pub enum ProgramsError {
    #[error("can't load the eBPF programs: {0}")]
    Load(#[from] aya::EbpfError),
    #[error("the eBPF object lacks {0}: build it again with `cargo xtask build-ebpf`")]
    Absent(&'static str),
    #[error("the kernel refuses the eBPF program {name}: {}", refusal(source))]
    Verify {
        name: &'static str,
        source: ProgramError,
    },
    #[error("can't use the map {name}: {source}")]
    Map {
        name: &'static str,
        source: MapError,
    },
    #[error("can't attach {hook} to {interface}: {source}")]
    Attach {
        hook: &'static str,
        interface: String,
        source: io::Error,
    },
    #[error("can't pin {path}: {source}")]
    Pin { path: PathBuf, source: io::Error },
}

impl ProgramsError {
    /// Whether it says that the interface isn't there.
    pub fn is_gone(&self) -> bool {
        let Self::Attach { source, .. } = self else {
            return false;
        };
        matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
    }
}

/// The kernel's error, with the end of what the verifier says: the rest is its whole way there.
fn refusal(error: &ProgramError) -> String {
    const LINES: usize = 12;
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.to_string();
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().collect();
    format!(
        "{io_error}\n{}",
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    )
}

/// The loaded programs and the maps that the control side writes.
pub struct Programs {
    ebpf: Ebpf,
    maps: Maps,
    method: TcMethod,
    loaded: Arc<Loaded>,
    log_level: u8,
    /// The folder of the maps' pins, and the maps that belong there.
    maps_folder: PathBuf,
    pinned_maps: Vec<(&'static str, MapData)>,
}

/// The programs as links are made of them. Apart from the rest, which is behind a lock: to attach
/// one takes the kernel milliseconds, in which other pods' entries are to be written.
#[derive(Debug, Default)]
pub struct Loaded(HashMap<&'static str, LoadedProgram>);

#[derive(Debug)]
pub struct LoadedProgram {
    pub fd: OwnedFd,
    /// The kernel's number of it.
    pub id: u32,
}

impl Loaded {
    pub fn get(&self, name: &'static str) -> Result<&LoadedProgram, ProgramsError> {
        self.0.get(name).ok_or(ProgramsError::Absent(name))
    }

    fn add(
        &mut self,
        name: &'static str,
        fd: Result<&ProgramFd, ProgramError>,
        info: Result<ProgramInfo, ProgramError>,
    ) -> Result<(), ProgramsError> {
        let error = |source| ProgramsError::Verify { name, source };
        let fd = fd.map_err(error)?.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|source| error(source.into()))?;
        let id = info.map_err(error)?.id();
        self.0.insert(name, LoadedProgram { fd, id });
        Ok(())
    }
}

pub struct Maps {
    pub agents: BpfHashMap<MapData, u64, u32>,
    pub pods: BpfHashMap<MapData, Address, PodEntry>,
    pub listeners: SockHash<MapData, ListenerKey>,
    pub listener_pods: SkStorage<MapData, u32>,
    pub inbound_sockets: SkStorage<MapData, u32>,
    pub port_rules: LpmTrie<MapData, PortRule, u32>,
    pub net_rules: LpmTrie<MapData, NetRule, u32>,
    pub probe_targets: BpfHashMap<MapData, ProbeTarget, u32>,
    pub refusals: BpfHashMap<MapData, Destination, u32>,
    pub workers: Array<MapData, u32>,
    pub urgent: Array<MapData, u32>,
}

impl Programs {
    /// Loads what the agent was built with. Maps pinned in `bpffs` by an earlier agent are taken
    /// over with their content.
    ///
    /// A verifier that has no room on the stack for what the programs log at this level (before 6.7
    /// each function's part counts up to 31 bytes more than it is) gets quiet ones.
    pub fn load(bpffs: &Path, log_level: u8, method: TcMethod) -> Result<Self, ProgramsError> {
        match Self::load_at(bpffs, log_level, method) {
            Err(ProgramsError::Verify { name, source }) if log_level > 0 => {
                tracing::warn!(
                    program = name,
                    error = %refusal(&source),
                    "the kernel refuses the eBPF programs with their log, so they are loaded without"
                );
                Self::load_at(bpffs, 0, method)
            }
            loaded => loaded,
        }
    }

    fn load_at(bpffs: &Path, log_level: u8, method: TcMethod) -> Result<Self, ProgramsError> {
        let maps_folder = bpffs.join("maps").join(LAYOUT);
        make_folder(&maps_folder)?;
        let mut ebpf = load_object(&maps_folder, log_level, Extent::Steering)?;
        let mut loaded = Loaded::default();
        for name in PROGRAMS {
            let program = classifier(&mut ebpf, name)?;
            let verified = program.load();
            verified.map_err(|source| ProgramsError::Verify { name, source })?;
            loaded.add(name, program.fd(), program.info())?;
        }
        let program = sk_lookup(&mut ebpf)?;
        program.load().map_err(|source| ProgramsError::Verify {
            name: LOOKUP,
            source,
        })?;
        loaded.add(LOOKUP, program.fd(), program.info())?;
        let pinned = |name| {
            let map = MapData::from_pin(maps_folder.join(name));
            let map = map.map_err(|source| ProgramsError::Map { name, source });
            map.map(|map| (name, map))
        };
        let pinned_maps = MAPS.into_iter().map(pinned).collect::<Result<_, _>>()?;
        let maps = Maps {
            agents: map(&mut ebpf, "AGENTS")?,
            pods: map(&mut ebpf, "PODS")?,
            listeners: map(&mut ebpf, "LISTENERS")?,
            listener_pods: map(&mut ebpf, "LISTENER_PODS")?,
            inbound_sockets: map(&mut ebpf, "INBOUND_SOCKETS")?,
            port_rules: map(&mut ebpf, "PORT_RULES")?,
            net_rules: map(&mut ebpf, "NET_RULES")?,
            probe_targets: map(&mut ebpf, "PROBE_TARGETS")?,
            refusals: map(&mut ebpf, "REFUSALS")?,
            workers: map(&mut ebpf, "WORKERS")?,
            urgent: map(&mut ebpf, "URGENT")?,
        };
        Ok(Self {
            ebpf,
            maps,
            method,
            loaded: Arc::new(loaded),
            log_level,
            maps_folder,
            pinned_maps,
        })
    }

    /// The folder that holds the maps' pins.
    pub fn maps_folder(&self) -> &Path {
        &self.maps_folder
    }

    /// Pins again the maps that aren't pinned any more, or that another map stands in the place of.
    pub fn mend_map_pins(&self) -> Vec<(&'static str, Result<(), MendError>)> {
        let mend = |(name, map): &(&'static str, MapData)| {
            let path = self.maps_folder.join(name);
            let own = map.info().ok()?.id();
            if MapInfo::from_pin(&path).is_ok_and(|pinned| pinned.id() == own) {
                return None;
            }
            Some((*name, mend_pin(map, &path)))
        };
        self.pinned_maps.iter().filter_map(mend).collect()
    }

    /// Loads a TC program once more: the kernel attaches none twice to one hook.
    pub fn load_again(&self, name: &'static str) -> Result<OwnedFd, ProgramsError> {
        let mut ebpf = load_object(&self.maps_folder, self.log_level, Extent::Steering)?;
        let error = |source| ProgramsError::Verify { name, source };
        let program = classifier(&mut ebpf, name)?;
        program.load().map_err(error)?;
        let fd = program.fd().map_err(error)?.as_fd().try_clone_to_owned();
        fd.map_err(|source| error(source.into()))
    }

    pub fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// The programs themselves.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    pub fn loaded(&self) -> Arc<Loaded> {
        Arc::clone(&self.loaded)
    }

    pub fn method(&self) -> TcMethod {
        self.method
    }

    /// A handle for one worker.
    pub fn own_dial(&self, agent: CgroupId) -> Result<OwnDial, ProgramsError> {
        Ok(OwnDial::new(
            self.shared("OWN_DIAL")?,
            self.shared("STEERED")?,
            agent,
        ))
    }

    pub fn scopes(&self) -> Result<BpfHashMap<MapData, Flow, u32>, ProgramsError> {
        self.shared("SCOPES")
    }

    pub fn worker_loads(&self) -> Result<Array<MapData, WorkerLoad>, ProgramsError> {
        self.shared("WORKER_LOADS")
    }

    pub fn counters(&self) -> Result<PerCpuArray<MapData, u64>, ProgramsError> {
        self.shared("COUNTERS")
    }

    /// A second handle on a map that stays with the programs.
    fn shared<T>(&self, name: &'static str) -> Result<T, ProgramsError>
    where
        T: TryFrom<Map, Error = MapError>,
    {
        let error = |source| ProgramsError::Map { name, source };
        let map = self.ebpf.map(name).ok_or(ProgramsError::Absent(name))?;
        let (Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::Array(data)
        | Map::PerCpuArray(data)) = map
        else {
            return Err(ProgramsError::Absent(name));
        };
        let fd = data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| ProgramsError::Pin {
                path: PathBuf::from(name),
                source,
            })?;
        let data = MapData::from_fd(fd).map_err(error)?;
        let map = match map {
            Map::HashMap(_) => Map::HashMap(data),
            Map::LruHashMap(_) => Map::LruHashMap(data),
            Map::Array(_) => Map::Array(data),
            _ => Map::PerCpuArray(data),
        };
        map.try_into().map_err(error)
    }
}

/// Which programs of the object are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Steering,
    Acceleration,
}

/// The maps that acceleration alone fills, and that are large.
const ACCELERATION_MAPS: [&str; 3] = ["ENDS", "WAITING", "JOINS"];
/// It is there where the kernel knows MPTCP.
const MPTCP: &str = "/proc/sys/net/mptcp/enabled";

/// Loads the object, with the maps that are pinned in `maps_folder` or pins them there.
pub(super) fn load_object(
    maps_folder: &Path,
    log_level: u8,
    extent: Extent,
) -> Result<Ebpf, aya::EbpfError> {
    let knows_mptcp = u8::from(Path::new(MPTCP).exists());
    let mut loader = EbpfLoader::new();
    match extent {
        Extent::Steering => {
            for name in ACCELERATION_MAPS {
                loader.map_max_entries(name, 1);
            }
        }
        Extent::Acceleration => {
            loader.override_global("KNOWS_MPTCP", &knows_mptcp, true);
        }
    }
    loader.override_global(aya_log::LEVEL, &log_level, true);
    for name in MAPS {
        loader.map_pin_path(name, maps_folder.join(name));
    }
    loader.load(OBJECT)
}

/// Why a map couldn't be pinned again.
#[derive(Debug, thiserror::Error)]
pub enum MendError {
    #[error(transparent)]
    Files(#[from] io::Error),
    #[error(transparent)]
    Pin(#[from] PinError),
}

fn mend_pin(map: &MapData, path: &Path) -> Result<(), MendError> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    Ok(map.pin(path)?)
}

pub fn make_folder(path: &Path) -> Result<(), ProgramsError> {
    fs::create_dir_all(path).map_err(|source| ProgramsError::Pin {
        path: path.to_owned(),
        source,
    })
}

pub fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, ProgramsError> {
    ebpf.program_mut(name)
        .ok_or(ProgramsError::Absent(name))?
        .try_into()
        .map_err(|source| ProgramsError::Verify { name, source })
}

pub fn sk_lookup(ebpf: &mut Ebpf) -> Result<&mut SkLookup, ProgramsError> {
    ebpf.program_mut(LOOKUP)
        .ok_or(ProgramsError::Absent(LOOKUP))?
        .try_into()
        .map_err(|source| ProgramsError::Verify {
            name: LOOKUP,
            source,
        })
}

fn map<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, ProgramsError>
where
    T: TryFrom<Map, Error = MapError>,
{
    ebpf.take_map(name)
        .ok_or(ProgramsError::Absent(name))?
        .try_into()
        .map_err(|source| ProgramsError::Map { name, source })
}

/// A longest-prefix key over the first `bits` bits of `data`.
pub fn prefix<K: aya::Pod>(bits: u32, data: K) -> Key<K> {
    Key::new(bits, data)
}
