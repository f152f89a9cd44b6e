//! How programs hang on interfaces and netnses, and how they come off.
//!
//! Kernels from 6.6 on have links (TCX), which are pinned. Before, TC programs are filters of a
//! clsact qdisc, which stay by themselves: in place of a pin stands a symbolic link that says so,
//! for the agent that comes after to replace or to detach. `sk_lookup` has links everywhere.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::symlink,
    path::Path,
    sync::{Arc, Mutex},
};

use aya::{
    programs::{
        Link, ProgramError, TcAttachType,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
    util::KernelVersion,
};

use super::{
    links::{self, Target},
    lock,
    netns::Netns,
    programs::{LOOKUP, Loaded, Programs, ProgramsError, classifier},
};

/// Filters come first, in their own place of the first priority: a restarted agent finds its
/// predecessor's there.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x133);

/// Name of the note that the clsact qdisc of an interface is of our making.
const QDISC: &str = "qdisc";

/// What TC programs hang on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcMethod {
    Links,
    Filters,
}

impl TcMethod {
    /// The best that this kernel has.
    pub fn of_kernel() -> Self {
        match KernelVersion::current() {
            Ok(version) if version >= KernelVersion::new(6, 6, 0) => Self::Links,
            _ => Self::Filters,
        }
    }
}

/// Where a program is attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Egress { ethernet: bool },
    Ingress { ethernet: bool },
    Loopback,
}

impl Hook {
    const ALL: [Self; 5] = [
        Self::Egress { ethernet: true },
        Self::Egress { ethernet: false },
        Self::Ingress { ethernet: true },
        Self::Ingress { ethernet: false },
        Self::Loopback,
    ];

    pub fn program(self) -> &'static str {
        match self {
            Self::Egress { ethernet: true } => "egress",
            Self::Egress { ethernet: false } => "egress_l3",
            Self::Ingress { ethernet: true } => "ingress",
            Self::Ingress { ethernet: false } => "ingress_l3",
            Self::Loopback => "loopback",
        }
    }

    fn attach_type(self) -> TcAttachType {
        match self {
            Self::Egress { .. } => TcAttachType::Egress,
            Self::Ingress { .. } | Self::Loopback => TcAttachType::Ingress,
        }
    }
}

/// Attaches programs to pods, from whatever thread and each pod by itself: of a link the kernel
/// makes sure, before it answers, that no packet is on its way around it, which takes milliseconds.
#[derive(Clone)]
pub struct Attacher {
    method: TcMethod,
    loaded: Arc<Loaded>,
    programs: Arc<Mutex<Programs>>,
}

impl Attacher {
    pub fn new(programs: &Arc<Mutex<Programs>>) -> Self {
        let (method, loaded) = {
            let programs = lock(programs);
            (programs.method(), programs.loaded())
        };
        Self {
            method,
            loaded,
            programs: Arc::clone(programs),
        }
    }

    /// Attaches `hook` to an interface of the calling thread's netns, so that it outlives the
    /// agent. What an earlier agent has attached is replaced without a gap, and what this one has
    /// attached stays.
    pub fn attach(
        &self,
        hook: Hook,
        interface: &str,
        index: u32,
        pins: &Path,
    ) -> Result<(), ProgramsError> {
        let name = hook.program();
        let pin_path = pins.join(format!("{index}_{name}"));
        let error = |source| ProgramsError::Attach {
            hook: name,
            interface: interface.to_owned(),
            source,
        };
        match self.method {
            TcMethod::Links => {
                let target = match hook.attach_type() {
                    TcAttachType::Egress => Target::Egress(index),
                    _ => Target::Ingress(index),
                };
                let takes_place_of_filter = is_note(&pin_path);
                self.attach_link(name, target, index.into(), &pin_path, error)?;
                if takes_place_of_filter {
                    let _ = detach_filter(interface, hook);
                }
                Ok(())
            }
            TcMethod::Filters => {
                let mut programs = lock(&self.programs);
                let attached = programs.attach_filter(hook, interface, index, pins);
                attached.map_err(|source| error(io::Error::other(source)))?;
                note(&pin_path)
            }
        }
    }

    /// Attaches the choice of listeners to a netns and pins the link in `pins`.
    pub fn attach_lookup(&self, netns: &Netns, pins: &Path) -> Result<(), ProgramsError> {
        let error = |source| ProgramsError::Attach {
            hook: LOOKUP,
            interface: "the netns".to_owned(),
            source,
        };
        let target = Target::Lookup(netns);
        self.attach_link(LOOKUP, target, netns.id().inode, &pins.join(LOOKUP), error)
    }

    /// Makes a link, or gives the one that is pinned there this agent's program: that costs nothing
    /// and has no gap. `target_id` is what the kernel tells of a link's target.
    fn attach_link(
        &self,
        name: &'static str,
        target: Target,
        target_id: u64,
        pin: &Path,
        error: impl Fn(io::Error) -> ProgramsError,
    ) -> Result<(), ProgramsError> {
        let program = self.loaded.get(name)?;
        let stands = links::read(pin).ok();
        let stands = stands.filter(|link| u64::from(link.target) == target_id);
        match stands {
            Some(link) if link.program == program.id => return Ok(()),
            // Where it can't be, a new link takes its place.
            Some(_) if links::update(pin, &program.fd).is_ok() => return Ok(()),
            _ => {}
        }
        let link = links::create(&program.fd, target).map_err(error)?;
        // An old link lives until the new one is attached and its pin is gone: there is no gap.
        remove_pin(pin)?;
        links::pin(&link, pin).map_err(|source| pin_error(pin, source))
    }
}

impl Programs {
    fn attach_filter(
        &mut self,
        hook: Hook,
        interface: &str,
        index: u32,
        pins: &Path,
    ) -> Result<(), ProgramError> {
        match tc::qdisc_add_clsact(interface) {
            Ok(()) => match symlink("made", pins.join(format!("{index}_{QDISC}"))) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error.into());
                }
                _ => {}
            },
            Err(error) if is_there(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let program = classifier(self.ebpf(), hook.program()).map_err(io::Error::other)?;
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: PRIORITY,
            handle: HANDLE,
            classid: None,
        });
        let id = match program.attach_with_options(interface, hook.attach_type(), options) {
            Err(ProgramError::TcError(error)) if is_there(&error) => {
                program.attach_to_link(filter(interface, hook)?)?
            }
            other => other?,
        };
        // A filter stays by itself; dropping its link would detach it.
        std::mem::forget(program.take_link(id)?);
        Ok(())
    }
}

/// Detaches the filters that the notes in `pins` tell of, from interfaces of the calling thread's
/// netns (`names` by index). Links need none of it: they go with their pins. Returns the
/// interfaces whose qdisc is of our making.
pub fn detach_filters(pins: &Path, names: &HashMap<u32, String>) -> Vec<u32> {
    let mut qdiscs = Vec::new();
    for entry in fs::read_dir(pins).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let Some((index, program)) = file_name.to_str().and_then(|name| name.split_once('_'))
        else {
            continue;
        };
        let Ok(index) = index.parse() else {
            continue;
        };
        let Some(interface) = names.get(&index).filter(|_| is_note(&entry.path())) else {
            continue;
        };
        if program == QDISC {
            qdiscs.push(index);
        } else if let Some(hook) = Hook::ALL.into_iter().find(|hook| hook.program() == program)
            && let Err(error) = detach_filter(interface, hook)
        {
            tracing::warn!(interface, program, %error, "can't detach a program");
        }
    }
    qdiscs
}

fn detach_filter(interface: &str, hook: Hook) -> Result<(), ProgramError> {
    filter(interface, hook)?.detach()
}

/// Our filter on an interface, which need not be there.
fn filter(interface: &str, hook: Hook) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, hook.attach_type(), PRIORITY, HANDLE, None)
}

fn is_there(error: &TcError) -> bool {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        TcError::AlreadyAttached => true,
        _ => false,
    }
}

/// Notes that a filter is attached, in place of a link that is pinned there.
fn note(path: &Path) -> Result<(), ProgramsError> {
    if is_note(path) {
        return Ok(());
    }
    remove_pin(path)?;
    symlink("filter", path).map_err(|source| pin_error(path, source))
}

fn is_note(path: &Path) -> bool {
    path.is_symlink()
}

fn remove_pin(path: &Path) -> Result<(), ProgramsError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(path, error)),
        _ => Ok(()),
    }
}

fn pin_error(path: &Path, source: io::Error) -> ProgramsError {
    ProgramsError::Pin {
        path: path.to_owned(),
        source,
    }
}
