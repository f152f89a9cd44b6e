//! How programs hang on interfaces and netnses, and how they come off.
//!
//! Kernels from 6.6 on have links (TCX), which are pinned. Before, TC programs are filters of a
//! clsact qdisc, which stay by themselves: in place of a pin stands a symbolic link that says so,
//! for the agent that comes after to replace or to detach. `sk_lookup` has links everywhere.
//!
//! A filter is there at once. For a link the kernel waits until no packet is on its way around it
//! (a grace period, some 8 ms), and nobody else may change a network meanwhile. So where there are
//! links, a new pod has filters first, and links take their place when it has lived for a while.

mod fault;

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
use crate::ledger::{Accounted, Kind};

/// Filters come first, in their own place of the first priority: a restarted agent finds its
/// predecessor's there.
const PRIORITY: u16 = 1;
pub const HANDLE: u32 = 0x133;

/// Name of the note that the clsact qdisc of an interface is of our making.
const QDISC: &str = "qdisc";
/// What the name of a link's pin ends with while its filter is still there.
const NEXT: &str = "next";

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

    pub(super) fn attach_type(self) -> TcAttachType {
        match self {
            Self::Egress { .. } => TcAttachType::Egress,
            Self::Ingress { .. } | Self::Loopback => TcAttachType::Ingress,
        }
    }

    fn target(self, index: u32) -> Target<'static> {
        match self.attach_type() {
            TcAttachType::Egress => Target::Egress(index),
            _ => Target::Ingress(index),
        }
    }
}

/// How a program came to hang on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    ForGood,
    /// By a filter, whose place a link is to take.
    ForNow,
}

/// Attaches programs to pods, from whatever thread and each pod by itself.
#[derive(Clone)]
pub struct Attacher {
    method: TcMethod,
    loaded: Arc<Loaded>,
    programs: Arc<Mutex<Programs>>,
    /// Held by the pod whose filters are being replaced by links.
    pub replacing: Arc<tokio::sync::Mutex<()>>,
    /// Links that are pinned, by their pins. They are held as well, so that whoever removes a pin
    /// doesn't open the pod.
    held: Arc<Mutex<HashMap<PathBuf, Accounted<OwnedFd>>>>,
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
            replacing: Arc::default(),
            held: Arc::default(),
        }
    }

    fn hold(&self, pin: &Path, link: OwnedFd) {
        let link = Accounted::new(link, 0, Kind::Link);
        self.held().insert(pin.to_owned(), link);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PathBuf, Accounted<OwnedFd>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of the links that are pinned in `folder`: with their pins they go.
    pub fn release(&self, folder: &Path) {
        self.held().retain(|pin, _| pin.parent() != Some(folder));
    }

    /// Lets go of all links: from now on they are another agent's to withdraw.
    pub fn release_all(&self) {
        self.held().clear();
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
    ) -> Result<Attached, ProgramsError> {
        let name = hook.program();
        let pin = pins.join(format!("{index}_{name}"));
        if self.method == TcMethod::Links {
            if self.order_fault(hook, interface).is_some() {
                self.attach_first(hook, interface, index, &pin)?;
                return Ok(Attached::ForGood);
            }
            if self.renew(name, index.into(), &pin)? {
                return Ok(Attached::ForGood);
            }
        }
        let mut programs = lock(&self.programs);
        let attached = programs.attach_filter(hook, interface, index, pins);
        attached.map_err(|source| attach_error(name, interface, io::Error::other(source)))?;
        note(&pin)?;
        Ok(match self.method {
            TcMethod::Links => Attached::ForNow,
            TcMethod::Filters => Attached::ForGood,
        })
    }

    /// Puts a link into the place of a filter, without a gap: for a moment a packet meets both.
    pub fn replace_filter(
        &self,
        hook: Hook,
        interface: &str,
        index: u32,
        pins: &Path,
    ) -> Result<(), ProgramsError> {
        let name = hook.program();
        let error = |source| attach_error(name, interface, source);
        let link = links::create(&self.loaded.get(name)?.fd, hook.target(index)).map_err(error)?;
        // Pinned before the filter goes, and under its own name after: whenever the agent dies, one
        // of both is there, and a filter has its note.
        let next = pins.join(format!("{index}_{name}_{NEXT}"));
        remove_pin(&next)?;
        links::pin(&link, &next).map_err(|source| pin_error(&next, source))?;
        if let Err(source) = detach_filter(interface, hook) {
            remove_pin(&next)?;
            return Err(error(io::Error::other(source)));
        }
        let pin = pins.join(format!("{index}_{name}"));
        fs::rename(next, &pin).map_err(|source| pin_error(&pin, source))?;
        self.hold(&pin, link);
        Ok(())
    }

    /// Puts this agent's program before all others of a hook, where another has come before it. The
    /// one that is attached stays until then.
    fn attach_first(
        &self,
        hook: Hook,
        interface: &str,
        index: u32,
        pin: &Path,
    ) -> Result<(), ProgramsError> {
        let name = hook.program();
        let error = |source| attach_error(name, interface, source);
        // The kernel attaches no program twice to one hook.
        let again = lock(&self.programs).load_again(name)?;
        let link = links::create(&again, hook.target(index)).map_err(error)?;
        self.pin(link, pin)?;
        links::update(pin, &self.loaded.get(name)?.fd).map_err(error)
    }

    /// Attaches the choice of listeners to a netns and pins the link in `pins`.
    pub fn attach_lookup(&self, netns: &Netns, pins: &Path) -> Result<(), ProgramsError> {
        let pin = pins.join(LOOKUP);
        if self.renew(LOOKUP, netns.id().inode, &pin)? {
            return Ok(());
        }
        let link = links::create(&self.loaded.get(LOOKUP)?.fd, Target::Lookup(netns))
            .map_err(|source| attach_error(LOOKUP, "the netns", source))?;
        self.pin(link, &pin)
    }

    /// Pins a link in the place of what is pinned there, which is detached only then: there is no
    /// gap.
    fn pin(&self, link: OwnedFd, pin: &Path) -> Result<(), ProgramsError> {
        let old = links::open(pin);
        remove_pin(pin)?;
        links::pin(&link, pin).map_err(|source| pin_error(pin, source))?;
        self.hold(pin, link);
        if let Ok(old) = old
            && let Err(error) = links::detach(&old)
        {
            tracing::debug!(pin = %pin.display(), %error, "a link that was replaced isn't detached");
        }
        Ok(())
    }

    /// Gives the link that is pinned at `pin` this agent's program, which costs nothing and has no
    /// gap. Whether there was one of this target: an interface's index or a netns's inode.
    fn renew(&self, name: &'static str, target: u64, pin: &Path) -> Result<bool, ProgramsError> {
        let program = self.loaded.get(name)?;
        self.mend_pin(name, target, pin);
        let Some(link) = links::open(pin).ok() else {
            return Ok(false);
        };
        let stands = links::info(&link).ok();
        let stands = stands.filter(|link| u64::from(link.target) == target);
        let renewed = stands.is_some_and(|link| {
            link.program == program.id || links::update(pin, &program.fd).is_ok()
        });
        if renewed {
            self.hold(pin, link);
        }
        Ok(renewed)
    }

    /// Pins a link again that is held, and attached as it should be, where its pin is gone.
    fn mend_pin(&self, name: &'static str, target: u64, pin: &Path) {
        if let Some(link) = self.held().get(pin)
            && self.link_fault(name, target, pin).is_some()
            && links::info(link).is_ok_and(|info| self.is_right(info, name, target))
            && remove_pin(pin).is_ok()
            && let Err(error) = links::pin(link, pin)
        {
            tracing::debug!(pin = %pin.display(), %error, "a link can't be pinned again");
        }
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
            handle: TcHandle::new(0, 0x133),
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

/// Detaches the links that are pinned in `pins`, whoever else holds them.
pub fn detach_links(pins: &Path) {
    for entry in fs::read_dir(pins).into_iter().flatten().flatten() {
        if !is_note(&entry.path())
            && let Ok(link) = links::open(&entry.path())
            && let Err(error) = links::detach(&link)
        {
            tracing::warn!(pin = %entry.path().display(), %error, "can't detach a program");
        }
    }
}

/// Whether a filter stands for this hook's link, for good or for now.
pub fn is_filter(hook: Hook, index: u32, pins: &Path) -> bool {
    is_note(&pins.join(format!("{index}_{}", hook.program())))
}

/// Detaches the filters that the notes in `pins` tell of, from interfaces of the calling thread's
/// netns (`names` by index). Returns the
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

/// Detaches our filter from an interface. One that isn't there is no error.
fn detach_filter(interface: &str, hook: Hook) -> Result<(), ProgramError> {
    match filter(interface, hook)?.detach() {
        // No such filter, no such qdisc.
        Err(ProgramError::TcError(TcError::NetlinkError(error)))
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Our filter on an interface, which need not be there.
fn filter(interface: &str, hook: Hook) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        interface,
        hook.attach_type(),
        PRIORITY,
        TcHandle::new(0, 0x133),
        None,
    )
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

fn attach_error(hook: &'static str, interface: &str, source: io::Error) -> ProgramsError {
    ProgramsError::Attach {
        hook,
        interface: interface.to_owned(),
        source,
    }
}

fn pin_error(path: &Path, source: io::Error) -> ProgramsError {
    ProgramsError::Pin {
        path: path.to_owned(),
        source,
    }
}
