//! The unix socket in the node's runtime folder.
//!
//! Only its owner may connect. The one in charge has it: a successor puts its own in its place in
//! one step, and so does whoever comes after a crash. Nobody takes it away, since it may be another's
//! by then: when no agent lives, connecting to it is refused.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::renameat,
    sys::stat::{Mode, fchmod},
    unistd::geteuid,
};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::ledger::{Accounted, Kind};

/// Name of the socket in the folder.
pub const NAME: &str = "agent.sock";
/// The longest path that a client can connect to (`unix(7)`).
const LONGEST_PATH: usize = 107;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why there is no place for the socket.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("can't use the runtime folder {path}: {source}; is it a folder, and no link?")]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "the runtime folder {path} belongs to user {owner}: remove it, or give the node another \
         with `runtime`"
    )]
    Foreign { path: PathBuf, owner: u32 },
    #[error(
        "{0} is too long for a unix socket, at most 107 bytes: give the node a shorter path with \
         `runtime`"
    )]
    TooLong(PathBuf),
}

/// A node's runtime folder, open: what becomes of its path later doesn't matter.
#[derive(Debug)]
pub struct Folder {
    folder: Accounted<File>,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at `path`, made where it isn't there, for its owner alone. The last part of
    /// the path must be no link.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let socket = path.join(NAME);
        if socket.as_os_str().len() > LONGEST_PATH {
            return Err(FolderError::TooLong(socket));
        }
        let failed = |source| FolderError::Open {
            path: path.to_owned(),
            source,
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            _ => {}
        }
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed)?;
        let owner = folder.metadata().map_err(failed)?.uid();
        if owner != geteuid().as_raw() {
            return Err(FolderError::Foreign {
                path: path.to_owned(),
                owner,
            });
        }
        folder
            .set_permissions(Permissions::from_mode(0o700))
            .map_err(failed)?;
        Ok(Self {
            folder: Accounted::new(folder, 0, Kind::Admin),
            path: socket,
        })
    }

    /// Where clients find the socket.
    pub fn socket_path(&self) -> &Path {
        &self.path
    }

    /// Listens in place of whoever did before.
    pub fn listen(&self) -> io::Result<Accounted<UnixListener>> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        // What it has before it is bound is what its name in the folder gets.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let new = format!(".{NAME}.{:016x}", fastrand::u64(..));
        let folder = PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        socket.bind(&SockAddr::unix(folder.join(&new))?)?;
        socket.listen(BACKLOG)?;
        renameat(&*self.folder, new.as_str(), &*self.folder, NAME)?;
        Ok(Accounted::new(socket.into(), 0, Kind::Admin))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{FileTypeExt, symlink},
        net::UnixStream,
    };

    use super::*;
    use crate::scratch::ScratchFolder;

    #[test]
    fn only_its_owner_may_connect() {
        let scratch = ScratchFolder::new();
        let path = scratch.path().join("a/node");
        let folder = Folder::open(&path).unwrap();
        let _listener = folder.listen().unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((mode(&path), mode(folder.socket_path())), (0o700, 0o600));
        let names = fs::read_dir(&path).unwrap().count();
        assert_eq!(names, 1, "nothing is left beside it");
    }

    #[test]
    fn the_next_one_takes_the_place_of_a_living_and_of_a_dead_one() {
        let scratch = ScratchFolder::new();
        let first = Folder::open(scratch.path()).unwrap().listen().unwrap();
        let second = Folder::open(scratch.path()).unwrap();
        drop(second.listen().unwrap());
        let path = second.socket_path();
        let refused = UnixStream::connect(path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let third = Folder::open(scratch.path()).unwrap().listen().unwrap();
        let _client = UnixStream::connect(path).unwrap();
        assert!(third.accept().is_ok());
        assert!(first.accept().is_err(), "nothing comes to it any more");
    }

    #[test]
    fn a_link_is_followed_neither_in_place_of_the_folder_nor_of_the_socket() {
        let scratch = ScratchFolder::new();
        let (target, link) = (scratch.path().join("target"), scratch.path().join("link"));
        fs::create_dir(&target).unwrap();
        symlink(&target, &link).unwrap();
        assert!(matches!(Folder::open(&link), Err(FolderError::Open { .. })));

        let precious = scratch.path().join("precious");
        fs::write(&precious, "kept").unwrap();
        symlink(&precious, target.join(NAME)).unwrap();
        let folder = Folder::open(&target).unwrap();
        let _listener = folder.listen().unwrap();
        let kind = fs::symlink_metadata(folder.socket_path())
            .unwrap()
            .file_type();
        assert!(kind.is_socket());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "kept");
    }

    #[test]
    fn a_path_that_no_client_could_use_is_refused() {
        let path = Path::new("/run").join("a".repeat(100));
        assert!(matches!(Folder::open(&path), Err(FolderError::TooLong(_))));
    }
}
