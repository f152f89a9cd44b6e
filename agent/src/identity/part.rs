//! Something that is read from files again and again, of which the last good state stays in use.

use std::{fmt, path::Path, sync::Arc};

use time::OffsetDateTime;

use super::{ca::Reloads, files::FolderError};

/// One of the things that an authority is made of.
#[derive(Debug)]
pub(super) struct Part<T> {
    object: &'static str,
    good: Option<T>,
    since: OffsetDateTime,
    refusal: Option<Refusal>,
    accepted: u64,
    refused: u64,
}

#[derive(Debug)]
struct Refusal {
    error: Arc<FolderError>,
    said: String,
}

impl<T: PartialEq + fmt::Debug> Part<T> {
    /// What is `good` before anything was read. `object` is the word for metrics and logs.
    pub(super) fn new(object: &'static str, good: Option<T>) -> Self {
        Self {
            object,
            good,
            since: OffsetDateTime::UNIX_EPOCH,
            refusal: None,
            accepted: 0,
            refused: 0,
        }
    }

    /// The last good state.
    pub(super) fn good(&self) -> Option<&T> {
        self.good.as_ref()
    }

    /// Since when that has been the good one.
    pub(super) fn since(&self) -> OffsetDateTime {
        self.since
    }

    /// Why the present state of the files isn't in use. `None`: it is.
    pub(super) fn refusal(&self) -> Option<&Arc<FolderError>> {
        self.refusal.as_ref().map(|refusal| &refusal.error)
    }

    pub(super) fn reloads(&self) -> Reloads {
        Reloads {
            object: self.object,
            accepted: self.accepted,
            refused: self.refused,
        }
    }

    /// Takes over what was judged good, else says once why not.
    pub(super) fn judged(
        &mut self,
        judged: Result<T, Arc<FolderError>>,
        path: &Path,
        now: OffsetDateTime,
    ) {
        let object = self.object;
        match judged {
            Ok(new) => {
                let is_known = self.good.as_ref() == Some(&new);
                if !is_known || self.refusal.is_some() {
                    self.accepted += 1;
                    tracing::info!(object, path = %path.display(), changed = !is_known, "taken over");
                }
                self.refusal = None;
                if !is_known {
                    self.good = Some(new);
                    self.since = now;
                }
            }
            Err(error) => {
                let said = error.to_string();
                if self
                    .refusal
                    .as_ref()
                    .is_some_and(|before| before.said == said)
                {
                    return;
                }
                self.refused += 1;
                let in_use = self.good.is_some();
                tracing::error!(object, in_use, %error, "refused, the last good state stays in use");
                self.refusal = Some(Refusal { error, said });
            }
        }
    }
}
