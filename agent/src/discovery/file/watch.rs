//! Follows a mesh file and makes a snapshot of every good state of it.
//!
//! A change is seen by inotify on folders, not on the file: a rename over it, and the swap of a
//! link on its path (how Kubernetes updates a mounted `ConfigMap`), make it another file. A writer is
//! given time to finish: a file cut short can be a good one with fewer workloads.
//!
//! Nobody is told twice: a text that was judged already is not judged again.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    fs, io,
    io::Read as _,
    mem,
    os::unix::fs::MetadataExt as _,
    path::{self, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::{sync::watch, task, time::Instant};

use super::{error::Error, links, reader::Reader};
use crate::{
    discovery::{Discovery, Refusal, Status},
    ledger::{Entry, Kind},
    model::Mesh,
};

/// The largest file that is read.
const MOST_BYTES: u64 = 64 * 1024 * 1024;

/// Quiet that ends a burst of changes, such as the renames of an editor.
const QUIET: Duration = Duration::from_millis(10);

/// Longest wait for a writer that has the file open, and for a burst to end.
const WRITER_LIMIT: Duration = Duration::from_millis(500);

/// How often a file that can't be read is tried again: the folder that is to come back may be one
/// that isn't watched.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes for one read of events; each takes 16 and its name.
const EVENT_BUFFER: usize = 4096;

/// Loads the mesh file at `path`, which must be good, and follows it from then on.
///
/// Needs a tokio runtime, on whose blocking threads files are read and checked.
pub async fn watch(path: impl Into<PathBuf>) -> Result<Discovery, Error> {
    let path = path.into();
    // Watched before it is read: a change in between is seen twice rather than not at all.
    let mut watcher = Watcher::new(&path)?;
    let text = read(path.clone()).await?;
    let (reader, first) = judge(Reader::default(), path.clone(), &text).await;
    let (mesh_out, mesh) = watch::channel(Arc::new(first?));
    let (status_out, status) = watch::channel(Status::default());
    let follower = Follower {
        path,
        judged: Some(text),
        reader,
        mesh: mesh_out,
        status: status_out,
    };
    let task = tokio::spawn(async move { follower.run(&mut watcher).await });
    Ok(Discovery { mesh, status, task })
}

/// What was seen and said of the file so far.
struct Follower {
    path: PathBuf,
    /// The last text that was judged. `None`: the file could not be read.
    judged: Option<Arc<str>>,
    reader: Reader,
    mesh: watch::Sender<Arc<Mesh>>,
    status: watch::Sender<Status>,
}

impl Follower {
    async fn run(mut self, watcher: &mut Watcher) {
        let mut is_watched = true;
        loop {
            let retry = (self.judged.is_none() || !is_watched).then_some(RETRY);
            let result = watcher.changed(retry).await;
            // Links may lead elsewhere now. Placed before the reading, as at the start.
            let result = result.and(watcher.place());
            if let Err(error) = &result {
                self.status.send_modify(|status| status.watch_failures += 1);
                if is_watched {
                    let path = self.path.display();
                    tracing::error!(%path, %error, "mesh file can't be watched, read each second");
                }
                // `changed` may have failed at once.
                tokio::time::sleep(RETRY).await;
            }
            is_watched = result.is_ok();
            self.reload().await;
        }
    }

    async fn reload(&mut self) {
        let text = match read(self.path.clone()).await {
            Ok(text) => text,
            Err(error) => {
                let is_repeat = self.judged.take().is_none();
                self.refuse(&error, is_repeat);
                return;
            }
        };
        if self.judged.as_ref() == Some(&text) {
            return;
        }
        let reader = mem::take(&mut self.reader);
        let result;
        (self.reader, result) = judge(reader, self.path.clone(), &text).await;
        self.judged = Some(text);
        match result {
            Ok(mesh) => self.accept(mesh),
            Err(error) => self.refuse(&error, false),
        }
    }

    fn accept(&self, mesh: Mesh) {
        let is_new = self.mesh.send_if_modified(|current| {
            let is_new = **current != mesh;
            if is_new {
                *current = Arc::new(mesh.sharing_with(current));
            }
            is_new
        });
        self.status.send_modify(|status| {
            status.accepted += 1;
            status.refusal = None;
        });
        tracing::info!(path = %self.path.display(), changed = is_new, "mesh file accepted");
    }

    /// Says why the file isn't in force. A repeated try that fails as before is no news.
    fn refuse(&self, error: &Error, is_repeat: bool) {
        let refusal = Refusal {
            label: error.label(),
            report: error.to_string().into(),
        };
        let is_news = self.status.send_if_modified(|status| {
            let is_news = !is_repeat || status.refusal.as_ref() != Some(&refusal);
            if is_news {
                status.refused += 1;
                status.refusal = Some(refusal.clone());
            }
            is_news
        });
        if is_news {
            tracing::error!(
                reason = refusal.label,
                "mesh file refused, the last good state stays in force:\n{}",
                refusal.report
            );
        }
    }
}

/// The file's text. On a blocking thread: 64 MiB from a slow disk take their time.
async fn read(path: PathBuf) -> Result<Arc<str>, Error> {
    on_blocking_thread(move || read_blocking(&path).map(Arc::from)).await
}

/// What the text means. The reader is given back.
async fn judge(
    mut reader: Reader,
    path: PathBuf,
    text: &Arc<str>,
) -> (Reader, Result<Mesh, Error>) {
    let text = Arc::clone(text);
    on_blocking_thread(move || {
        let result = reader.check(&path, &text);
        (reader, result)
    })
    .await
}

async fn on_blocking_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    match task::spawn_blocking(job).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Cancelled: the runtime shuts down, and drops this task at its next await.
            Err(_) => std::future::pending().await,
        },
    }
}

fn read_blocking(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before opening: to open a FIFO would wait for its writer.
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile {
            path: path.to_owned(),
        });
    }
    let too_large = || Error::TooLarge {
        path: path.to_owned(),
        limit: MOST_BYTES,
    };
    if metadata.len() > MOST_BYTES {
        return Err(too_large());
    }
    // The file may grow while it is read.
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(too_large());
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Error::not_utf8(path, good)
    })
}

/// inotify on the [`links::Places`] of one path.
struct Watcher {
    path: PathBuf,
    _entry: Entry,
    events: EventStream<Vec<u8>>,
    folders: HashMap<WatchDescriptor, Folder>,
}

/// A watched folder.
struct Folder {
    path: PathBuf,
    /// What matters in it.
    names: BTreeSet<OsString>,
}

/// What an event asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// The file or a link is another one now.
    Done,
    /// Somebody is writing.
    Writing,
}

impl Watcher {
    fn new(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Watch {
            path: path.to_owned(),
            source,
        };
        let inotify = Inotify::init().map_err(failed)?;
        let entry = Entry::new(&inotify, 0, Kind::Watch);
        let events = inotify.into_event_stream(vec![0; EVENT_BUFFER]);
        let events = events.map_err(failed)?;
        let mut watcher = Self {
            path: path::absolute(path).map_err(failed)?,
            _entry: entry,
            events,
            folders: HashMap::new(),
        };
        watcher.place().map_err(failed)?;
        // A link that was swapped before its folder was watched is seen now.
        watcher.place().map_err(failed)?;
        Ok(watcher)
    }

    /// Watches where the path leads now, and no longer where it led before.
    ///
    /// A folder that doesn't exist is left out: reading the file tells of it, and is tried again.
    fn place(&mut self) -> io::Result<()> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MODIFY
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let mut folders: HashMap<_, Folder> = HashMap::new();
        for (path, names) in links::places(&self.path) {
            match self.events.watches().add(&path, mask) {
                // Two paths of one folder have one descriptor.
                Ok(descriptor) => folders
                    .entry(descriptor)
                    .or_insert_with(|| Folder {
                        path,
                        names: BTreeSet::new(),
                    })
                    .names
                    .extend(names),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for old in self.folders.keys().filter(|old| !folders.contains_key(old)) {
            // Fails where the folder is gone, and the watch with it.
            let _ = self.events.watches().remove(old.clone());
        }
        self.folders = folders;
        Ok(())
    }

    /// Returns once something changed and the change is complete, or `retry` has passed.
    async fn changed(&mut self, retry: Option<Duration>) -> io::Result<()> {
        let mut settled_at = retry.map(|retry| Instant::now() + retry);
        let mut limit: Option<Instant> = None;
        loop {
            let event = match settled_at {
                None => self.events.next().await,
                Some(at) => match tokio::time::timeout_at(at, self.events.next()).await {
                    Ok(event) => event,
                    Err(_) => return Ok(()),
                },
            };
            // The stream of a descriptor that stays open has no end.
            let event = event.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))?;
            let Some(change) = self.change(&event) else {
                continue;
            };
            let now = Instant::now();
            let limit = *limit.get_or_insert(now + WRITER_LIMIT);
            settled_at = Some(match change {
                Change::Done => limit.min(now + QUIET),
                Change::Writing => limit,
            });
        }
    }

    /// What the event means for the file, if anything.
    fn change(&self, event: &EventOwned) -> Option<Change> {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return Some(Change::Done);
        }
        let folder = self.folders.get(&event.wd)?;
        let Some(name) = &event.name else {
            // Of the folder itself: gone, or moved away.
            return Some(Change::Done);
        };
        if !folder.names.contains(name) {
            return None;
        }
        // A file that is made is empty, and counts when its writer has closed it.
        let is_unfinished = event.mask.contains(EventMask::MODIFY)
            || event.mask.contains(EventMask::CREATE) && !is_link(&folder.path.join(name));
        Some(if is_unfinished {
            Change::Writing
        } else {
            Change::Done
        })
    }
}

/// Whether the path is a link, symbolic or hard: complete from the moment when it is made.
fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink() || found.nlink() > 1)
}

#[cfg(test)]
mod tests;
