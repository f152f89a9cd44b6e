//! The process's open descriptors, as `/proc/self/fd` has them.

use std::{
    ffi::OsStr,
    fmt, fs, io,
    os::{fd::RawFd, unix::ffi::OsStrExt},
};

use super::Line;

const FOLDER: &str = "/proc/self/fd";
/// After so many reads everything is asked anew.
const FORGET_EVERY: u32 = 32;

/// An open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Descriptor {
    pub number: RawFd,
    pub target: Target,
}

/// What a descriptor is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A socket of any kind, by its inode: the kernel numbers them by a counter of 32 bits.
    Socket(u32),
    /// Anything else, as the kernel names it.
    Other(String),
}

impl Target {
    fn parse(name: &OsStr) -> Self {
        let name = String::from_utf8_lossy(name.as_bytes());
        let inode = name
            .strip_prefix("socket:[")
            .and_then(|rest| rest.strip_suffix(']')?.parse().ok());
        inode.map_or_else(|| Self::Other(name.into_owned()), Self::Socket)
    }

    /// One word for metrics.
    pub fn word(&self) -> String {
        let Self::Other(name) = self else {
            return "socket".to_owned();
        };
        if name.starts_with('/') {
            return "file".to_owned();
        }
        // `anon_inode:[eventfd]`, `anon_inode:bpf-map`, `net:[4026531840]`, `pipe:[1234]`.
        match name.strip_prefix("anon_inode:") {
            Some(kind) => kind.trim_matches(['[', ']']).to_owned(),
            None => name.split(':').next().unwrap_or_default().to_owned(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(inode) => write!(f, "socket:[{inode}]"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// Reads what is open, again and again.
///
/// Asking what a descriptor is of costs the kernel more than all the rest, so which socket an entry's is
/// is remembered, for a while: an entry whose descriptor was closed and given out again, which must
/// not happen, is found in the end.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// In the order of their descriptors.
    known: Vec<Known>,
    reads: u32,
}

/// An entry's socket.
#[derive(Debug)]
struct Known {
    descriptor: RawFd,
    serial: u32,
    inode: u32,
}

impl Descriptors {
    /// All that are open, but for the one that lists them, in the order of their numbers; `lines` are
    /// what was entered a moment ago, in that order. Those that come or go meanwhile may be in it or not.
    pub fn list(&mut self, lines: &[Line]) -> io::Result<Vec<Descriptor>> {
        self.reads += 1;
        if self.reads.is_multiple_of(FORGET_EVERY) {
            self.known.clear();
        }
        let own = format!("/proc/{}/fd", std::process::id());
        let (mut found, mut known) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(FOLDER)? {
            let entry = entry?;
            let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let serial = lines
                .binary_search_by_key(&number, |line| line.descriptor)
                .map(|place| lines[place].serial);
            let target = match serial.ok().and_then(|serial| self.known(number, serial)) {
                Some(inode) => Target::Socket(inode),
                None => match fs::read_link(entry.path()) {
                    Ok(target) if target.as_os_str() == own.as_str() => continue,
                    Ok(target) => Target::parse(target.as_os_str()),
                    // Closed meanwhile.
                    Err(_) => continue,
                },
            };
            if let (Ok(serial), Target::Socket(inode)) = (serial, &target) {
                known.push(Known {
                    descriptor: number,
                    serial,
                    inode: *inode,
                });
            }
            found.push(Descriptor { number, target });
        }
        // As procfs has them, which isn't promised.
        found.sort_unstable_by_key(|descriptor| descriptor.number);
        known.sort_unstable_by_key(|known| known.descriptor);
        self.known = known;
        Ok(found)
    }

    fn known(&self, descriptor: RawFd, serial: u32) -> Option<u32> {
        let order = |known: &Known| (known.descriptor, known.serial);
        let place = self
            .known
            .binary_search_by_key(&(descriptor, serial), order);
        Some(self.known[place.ok()?].inode)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsString,
        fs::File,
        net::UdpSocket,
        os::fd::{AsRawFd, OwnedFd},
    };

    use nix::unistd::dup2;

    use super::*;
    use crate::ledger::Kind;

    #[test]
    fn what_is_open_is_listed_by_its_kind() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = File::open("/dev/null").unwrap();
        let netns = File::open("/proc/self/ns/net").unwrap();
        let listed = Descriptors::default().list(&[]).unwrap();
        let word = |number: RawFd| {
            let found = listed.iter().find(|d| d.number == number).unwrap();
            found.target.word()
        };
        assert_eq!(word(socket.as_raw_fd()), "socket");
        assert_eq!(word(file.as_raw_fd()), "file");
        assert_eq!(word(netns.as_raw_fd()), "net");
    }

    #[test]
    fn what_an_entry_is_of_is_asked_anew_with_each_entry_and_now_and_then() {
        let [one, other] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let name = |socket: &UdpSocket| {
            let path = format!("{FOLDER}/{}", socket.as_raw_fd());
            fs::read_link(path).unwrap().into_os_string()
        };
        let (first, second) = (name(&one), name(&other));
        let mut descriptor = OwnedFd::from(one.try_clone().unwrap());
        let number = descriptor.as_raw_fd();
        let mut descriptors = Descriptors::default();
        let mut target = |serial| {
            let line = Line {
                descriptor: number,
                kind: Kind::Watch,
                pod: 0,
                serial,
            };
            let mut listed = descriptors.list(&[line]).unwrap().into_iter();
            let found = listed.find(|found| found.number == number).unwrap();
            OsString::from(found.target.to_string())
        };
        assert_eq!(target(1), first);
        dup2(&other, &mut descriptor).unwrap();
        assert_eq!(target(1), first, "remembered");
        assert!((0..FORGET_EVERY).any(|_| target(1) == second));
        dup2(&one, &mut descriptor).unwrap();
        assert_eq!(target(2), first);
    }

    #[test]
    fn kinds_of_the_kernel_are_named_in_one_word() {
        for (name, word) in [
            ("anon_inode:[eventpoll]", "eventpoll"),
            ("anon_inode:bpf-map", "bpf-map"),
            ("pipe:[12]", "pipe"),
            ("socket:[12]", "socket"),
            ("/dev/null", "file"),
        ] {
            assert_eq!(Target::parse(OsStr::new(name)).word(), word, "{name}");
        }
    }
}
