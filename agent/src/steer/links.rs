//! What the kernel says of a pinned link: aya tells neither its interface nor its netns.

use std::{
    ffi::CString,
    io,
    mem::{offset_of, size_of, size_of_val},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// A link as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program.
    pub program: u32,
    /// Index of the interface, or inode of the netns. 0: it is gone, or the link was detached.
    pub target: u32,
}

/// Of linux/bpf.h.
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
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

/// Reads the link that is pinned at `pin`.
pub fn read(pin: &Path) -> io::Result<LinkInfo> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut get = ObjectGet {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut get)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = Info::default();
    let mut get = InfoGet {
        // A descriptor is never negative.
        fd: link.as_raw_fd().unsigned_abs(),
        length: 24,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut get)?;
    Ok(LinkInfo {
        program: info.program,
        target: info.target,
    })
}

/// The system call. `attributes` must be those of `command`, and what they point to must live.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes at most as many bytes of `attributes` as it is told, and
    // both callers' pointers are to living memory of the length that is told with them.
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
