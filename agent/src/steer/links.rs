//! Links of programs by the system call itself: made, pinned, read, given another program, detached.
//!
//! aya makes links only by its one handle on all programs, but to attach one takes the kernel
//! milliseconds; it tells neither a link's interface nor its netns; and it can't give a link of a
//! netns another program.

use std::{
    ffi::CString,
    fs::File,
    io,
    mem::{offset_of, size_of, size_of_val},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use super::netns::Netns;

/// A link as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program.
    pub program: u32,
    /// Index of the interface, or inode of the netns. 0: it is gone, or the link was detached.
    pub target: u32,
}

/// What a program hangs on.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// An interface of the calling thread's netns, by its index.
    Ingress(u32),
    Egress(u32),
    /// A netns's choice of listeners.
    Lookup(&'a Netns),
    /// What becomes of the sockets of a cgroup and those below it.
    SocketEvents(&'a File),
    /// The options that they are given.
    SocketOptions(&'a File),
    /// The tracepoint that the program was loaded for.
    Tracepoint,
    /// The question to security modules that it was loaded for.
    SecurityHook,
}

/// Of linux/bpf.h.
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_CGROUP_SOCK_OPS: u32 = 3;
const BPF_SK_MSG_VERDICT: u32 = 7;
const BPF_CGROUP_SETSOCKOPT: u32 = 22;
const BPF_TRACE_RAW_TP: u32 = 23;
const BPF_LSM_MAC: u32 = 27;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// Before another one: with none named, before all others.
const BPF_F_BEFORE: u32 = 1 << 3;

/// Of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// Another link and the revision that is expected: none, any.
    order: [u64; 2],
}

#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

#[repr(C)]
struct InfoGet {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`, for links of interfaces and netnses.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: u32,
    attach_type: u32,
}

const _: () = assert!(offset_of!(Info, target) == 16 && size_of::<Info>() == 24);

/// Attaches a program, to an interface before all others. It stays for as long as the link is open
/// or pinned.
pub fn create(program: impl AsFd, target: Target) -> io::Result<OwnedFd> {
    let (target, attach_type, flags) = match target {
        Target::Ingress(index) => (index, BPF_TCX_INGRESS, BPF_F_BEFORE),
        Target::Egress(index) => (index, BPF_TCX_EGRESS, BPF_F_BEFORE),
        Target::Lookup(netns) => (number(netns), BPF_SK_LOOKUP, 0),
        Target::SocketEvents(cgroup) => (number(cgroup), BPF_CGROUP_SOCK_OPS, 0),
        Target::SocketOptions(cgroup) => (number(cgroup), BPF_CGROUP_SETSOCKOPT, 0),
        Target::Tracepoint => (0, BPF_TRACE_RAW_TP, 0),
        Target::SecurityHook => (0, BPF_LSM_MAC, 0),
    };
    let fd = bpf(
        BPF_LINK_CREATE,
        &mut LinkCreate {
            program: number(program),
            target,
            attach_type,
            flags,
            order: [0; 2],
        },
    )?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a program what the sockets send that are put into `map` from now on. Without a link, which
/// such maps have no use for before Linux 6.10: it stays for as long as the map is open.
pub fn attach_to_messages(program: impl AsFd, map: impl AsFd) -> io::Result<()> {
    let mut attach = ProgramAttach {
        target: number(map),
        program: number(program),
        attach_type: BPF_SK_MSG_VERDICT,
        flags: 0,
    };
    bpf(BPF_PROG_ATTACH, &mut attach).map(|_| ())
}

/// Pins a link at `pin`, where nothing may be.
pub fn pin(link: &OwnedFd, pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut object = Object {
        path: path.as_ptr() as u64,
        fd: number(link),
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut object).map(|_| ())
}

/// Puts another program into the link that is pinned at `pin`, in one step.
pub fn update(pin: &Path, program: impl AsFd) -> io::Result<()> {
    let link = open(pin)?;
    let mut update = LinkUpdate {
        link: number(&link),
        program: number(program),
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut update).map(|_| ())
}

/// Detaches a link, whoever else holds it (Linux 5.9).
pub fn detach(link: &OwnedFd) -> io::Result<()> {
    let mut detach = LinkDetach { link: number(link) };
    bpf(BPF_LINK_DETACH, &mut detach).map(|_| ())
}

/// Reads the link that is pinned at `pin`.
pub fn read(pin: &Path) -> io::Result<LinkInfo> {
    info(&open(pin)?)
}

/// Reads a link.
pub fn info(link: &OwnedFd) -> io::Result<LinkInfo> {
    let mut info = Info::default();
    let mut get = InfoGet {
        fd: number(link),
        length: 24,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut get)?;
    Ok(LinkInfo {
        program: info.program,
        target: info.target,
    })
}

/// Opens the link that is pinned at `pin`.
pub fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut object = Object {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut object)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor as the kernel's structures have it: it is never negative.
fn number(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().unsigned_abs()
}

/// The system call. `attributes` must be those of `command`, and what they point to must live.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes at most as many bytes of `attributes` as it is told, and
    // the callers' pointers are to living memory of the length that is told with them, or to a
    // string with its end.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of_val(attributes),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // Descriptors and 0 are small.
    Ok(libc::c_int::try_from(answer).unwrap_or(0))
}
