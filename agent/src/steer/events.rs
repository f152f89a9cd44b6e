//! What tells that an audit is due at once: changes in a pod's network, files that go.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::StreamExt;
use inotify::{Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::{sync::mpsc, task::JoinHandle};

/// What is to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A pod, by its number.
    Pod(u32),
    /// Whether the pods' netnses are still there.
    Netns,
    /// What is one for the whole node.
    Node,
}

/// Where events come from, and where more of them can be asked for.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::UnboundedSender<Event>,
    files: Option<Files>,
}

#[derive(Debug, Clone)]
struct Files {
    watches: Watches,
    meanings: Arc<Mutex<HashMap<WatchDescriptor, Event>>>,
}

/// The receiving end. Dropping it ends the watch of files.
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::UnboundedReceiver<Event>,
    task: Option<JoinHandle<()>>,
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl EventReceiver {
    /// Waits for the next event; for ever where none can come any more.
    pub async fn next(&mut self) -> Event {
        match self.receiver.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

impl Events {
    /// Needs a tokio runtime. Without inotify only the kernel's netlink messages tell of changes.
    pub fn start() -> (Self, EventReceiver) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let (files, task) = match Files::start(sender.clone()) {
            Ok((files, task)) => (Some(files), Some(task)),
            Err(error) => {
                tracing::warn!(%error, "pins aren't watched, only audited now and then");
                (None, None)
            }
        };
        (Self { sender, files }, EventReceiver { receiver, task })
    }

    pub fn send(&self, event: Event) {
        // Nobody looks after the pods any more where it fails.
        let _ = self.sender.send(event);
    }

    /// Sends `event` whenever something goes from `folder`, or comes where that is a netns's.
    pub fn watch(&self, folder: &Path, event: Event) {
        let Some(files) = &self.files else {
            return;
        };
        let mut mask = WatchMask::DELETE | WatchMask::MOVED_FROM | WatchMask::ONLYDIR;
        if event == Event::Netns {
            mask |= WatchMask::CREATE | WatchMask::MOVED_TO;
        }
        match files.watches.clone().add(folder, mask) {
            Ok(watch) => {
                let mut meanings = files.meanings.lock();
                meanings
                    .as_mut()
                    .unwrap_or_else(|poisoned| poisoned.get_mut())
                    .insert(watch, event);
            }
            Err(error) => {
                tracing::debug!(folder = %folder.display(), %error, "a folder isn't watched");
            }
        }
    }
}

impl Files {
    fn start(sender: mpsc::UnboundedSender<Event>) -> io::Result<(Self, JoinHandle<()>)> {
        const BUFFER: usize = 4096;
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        let mut stream = inotify.into_event_stream(vec![0; BUFFER])?;
        let meanings = Arc::<Mutex<HashMap<WatchDescriptor, Event>>>::default();
        let known = Arc::clone(&meanings);
        let task = tokio::spawn(async move {
            while let Some(Ok(event)) = stream.next().await {
                let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(meaning) = known.get(&event.wd) {
                    let _ = sender.send(*meaning);
                }
                if event.mask.contains(inotify::EventMask::IGNORED) {
                    known.remove(&event.wd);
                }
            }
        });
        Ok((Self { watches, meanings }, task))
    }
}
