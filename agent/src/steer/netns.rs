//! Network namespaces: entering one, and which one it is.

use std::{
    fmt,
    fs::{self, File, Metadata, OpenOptions},
    io,
    num::ParseIntError,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    str::FromStr,
};

use nix::sched::{CloneFlags, setns};

use crate::ledger::{Accounted, Kind};

/// Device and inode of a namespace: what tells it from every other one that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsId {
    device: u64,
    pub inode: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.inode)
    }
}

impl NetnsId {
    /// That of the namespace that stands at `path` now.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&fs::metadata(path)?))
    }

    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl FromStr for NetnsId {
    type Err = ParseIntError;

    /// What `Display` writes.
    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let (device, inode) = text.split_once(':').unwrap_or((text, ""));
        Ok(Self {
            device: device.parse()?,
            inode: inode.parse()?,
        })
    }
}

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: Accounted<File>,
    id: NetnsId,
}

impl Netns {
    /// The calling thread's own.
    pub fn current() -> io::Result<Self> {
        Self::from_file(File::open("/proc/thread-self/ns/net")?)
    }

    /// The one at `path`, which must be a network namespace (a bind mount or `/proc/PID/ns/net`).
    pub fn open(path: &Path) -> io::Result<Self> {
        // A file that isn't one could be a FIFO, which would block the open.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        if namespace_type(&file)? != CloneFlags::CLONE_NEWNET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a network namespace",
            ));
        }
        Self::from_file(file)
    }

    /// The one of this id, where a process is in it.
    pub fn of_a_process(id: NetnsId) -> Option<Self> {
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let paths = processes.map(|process| process.path().join("ns/net"));
        let mut found = paths.filter(|path| NetnsId::at(path).is_ok_and(|there| there == id));
        Self::open(&found.next()?)
            .ok()
            .filter(|netns| netns.id == id)
    }

    /// The one that a socket is in (`ioctl_ns(2)`, with `CAP_NET_ADMIN` in it).
    pub fn of_socket(socket: impl AsFd) -> io::Result<Self> {
        const SIOCGSKNS: libc::Ioctl = 0x894c;
        // SAFETY: a call without arguments in memory, on an open descriptor.
        let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Self::from_file(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn from_file(file: File) -> io::Result<Self> {
        let id = NetnsId::of(&file.metadata()?);
        let file = Accounted::new(file, 0, Kind::Netns);
        Ok(Self { file, id })
    }

    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `job` with the calling thread in this namespace, and takes the thread back home.
    ///
    /// `job` must not wait for anything: a thread of the runtime is in the wrong namespace
    /// meanwhile. Sockets that it makes belong to this namespace for good.
    ///
    /// # Panics
    /// Aborts the process when the thread can't go back: whatever it opened next would carry
    /// another pod's identity.
    pub fn enter<T>(&self, home: &Netns, job: impl FnOnce() -> T) -> io::Result<T> {
        struct Return<'a>(&'a Netns);
        impl Drop for Return<'_> {
            fn drop(&mut self) {
                if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
                    // The log's thread wouldn't come to it any more.
                    eprintln!("malla: a thread can't leave a pod's network namespace: {error}");
                    std::process::abort();
                }
            }
        }
        setns(self, CloneFlags::CLONE_NEWNET)?;
        let _return = Return(home);
        Ok(job())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The kind of namespace that `file` is; an error where it is none (`ioctl_ns(2)`, Linux 4.11).
fn namespace_type(file: &File) -> io::Result<CloneFlags> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: the request takes no argument and only answers a number.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if answer < 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a network namespace",
        ));
    }
    Ok(CloneFlags::from_bits_truncate(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_open() {
        assert!(Netns::open(Path::new("/proc/self/ns/net")).is_ok());
        for path in ["/proc/self/ns/mnt", "/etc/hostname", "/", "/no/such/file"] {
            assert!(Netns::open(Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn a_namespace_is_known_by_its_inode() {
        let current = Netns::current().unwrap();
        let same = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(current.id(), same.id());
    }
}
