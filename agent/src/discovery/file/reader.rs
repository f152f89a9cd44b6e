//! Reads one text of the mesh file after the other, and of each what is new in it.
//!
//! To read YAML is most of the time that a change of a big mesh takes. Where a text differs from
//! the last good one only within entries of `workloads` or `services`, these entries are read alone
//! and put in place of those before. It must come to the same as reading the whole, so whatever
//! isn't plainly an entry in a block list of its own lines is left to the whole: another way to
//! write lists, anchors and aliases, tags, markers of documents.
//!
//! Why that is the same: up to the first line of an entry both texts are equal, so a parser is in
//! the state in which this line began an entry, and does so again where the line still begins with
//! the list's indentation and dash. What was read alone has come to its end, so that no quote and no
//! bracket is open, and anything else ends where the next entry's dash stands.

use std::{ops::Range, path::Path, sync::Arc};

use super::{
    check,
    error::Error,
    parse,
    schema::{At, MeshFile},
};
use crate::model::Mesh;

/// What was read last, if it was good.
#[derive(Debug, Default)]
pub(super) struct Reader {
    last: Option<Read>,
}

/// A text, and what it says.
#[derive(Debug)]
struct Read {
    text: Arc<str>,
    /// The lines of its values aren't those of `text` any more.
    file: MeshFile,
    workloads: Places,
    services: Places,
}

/// Where the entries of a list stand.
#[derive(Debug, Default)]
struct Places {
    /// What each entry's first line begins with, such as `  - `.
    dash: String,
    /// Of each entry's first line, in bytes. Empty where it isn't known of all.
    starts: Vec<usize>,
}

/// What differs between two texts: what takes which place.
struct Change {
    old: Range<usize>,
    new: Range<usize>,
}

impl Reader {
    /// The mesh that `text` describes, as [`check()`] has it.
    pub(super) fn check(&mut self, path: &Path, text: &Arc<str>) -> Result<Mesh, Error> {
        let spliced = self.last.take().and_then(|last| last.spliced(text));
        // Of one with a fault the lines must be right.
        if let Some(read) = spliced
            && let Ok(mesh) = check::mesh(path, &read.file)
        {
            self.last = Some(read);
            return Ok(mesh);
        }
        let file = check::parse(path, text)?;
        let mesh = check::mesh(path, &file)?;
        self.last = Some(Read::new(Arc::clone(text), file));
        Ok(mesh)
    }
}

impl Read {
    fn new(text: Arc<str>, file: MeshFile) -> Self {
        let lines = Lines::new(&text);
        let workloads = Places::new(&text, &lines, 1, &file.workloads);
        let services = Places::new(&text, &lines, 1, &file.services);
        Self {
            workloads: workloads.unwrap_or_default(),
            services: services.unwrap_or_default(),
            text,
            file,
        }
    }

    /// This with what is other in `text`. None where that can't be read alone.
    fn spliced(mut self, text: &Arc<str>) -> Option<Self> {
        let change = Change::between(&self.text, text)?;
        let begins = |places: &Places| {
            let first = places.starts.first().copied();
            first.filter(|first| *first <= change.old.start)
        };
        let texts = [&*self.text, &**text];
        if begins(&self.services) > begins(&self.workloads) {
            let (entries, places) = (&mut self.file.services, &mut self.services);
            places.splice(texts, &change, entries, parse::services)?;
            self.workloads.shift(&change);
        } else {
            let (entries, places) = (&mut self.file.workloads, &mut self.workloads);
            places.splice(texts, &change, entries, parse::workloads)?;
            self.services.shift(&change);
        }
        self.text = Arc::clone(text);
        Some(self)
    }
}

impl Places {
    /// Of entries that were read from `text`, whose first line has the number `first`.
    fn new<T>(text: &str, lines: &Lines, first: u64, entries: &[At<T>]) -> Option<Self> {
        let start = |entry: &At<T>| lines.start(entry.line.checked_sub(first)?);
        let starts: Vec<usize> = entries.iter().map(start).collect::<Option<_>>()?;
        let line = text.get(*starts.first()?..)?;
        let dash = line.find(|character| character != ' ')? + "- ".len();
        let dash = line.get(..dash)?.to_owned();
        let begins = |start: &usize| text[*start..].starts_with(&dash);
        // Two entries in one line, or in an order of their own, would be no list of this kind.
        let is_plain = dash.ends_with("- ")
            && starts.iter().all(begins)
            && starts.is_sorted_by(|one, next| one < next);
        is_plain.then_some(Self { dash, starts })
    }

    /// Reads the entries that have changed, of which `entries` are those before.
    fn splice<T>(
        &mut self,
        [old, new]: [&str; 2],
        change: &Change,
        entries: &mut Vec<At<T>>,
        read: fn(&str) -> Option<Vec<At<T>>>,
    ) -> Option<()> {
        let first = self
            .starts
            .partition_point(|start| *start <= change.old.start);
        let first = first.checked_sub(1)?;
        let end = self.starts.partition_point(|start| *start < change.old.end);
        let end = end.max(first + 1);
        let begin = self.starts[first];
        // The last entry goes to the end of the text, or what follows isn't understood.
        let old_end = self.starts.get(end).copied().unwrap_or(old.len());
        let new_end = change.moved(old_end);
        let [before, now] = [old.get(begin..old_end)?, new.get(begin..new_end)?];
        if !is_plain(before) || !is_plain(now) || !now.starts_with(&self.dash) {
            return None;
        }
        if end < self.starts.len() {
            now.strip_suffix('\n')?;
        } else {
            // Nothing but entries may have stood there: it would stay in force.
            read(before)?;
        }
        let changed = read(now)?;
        // Its first line is that of the list's own key.
        let places = Self::new(now, &Lines::new(now), 2, &changed)?;
        if places.dash != self.dash || places.starts.first() != Some(&0) {
            return None;
        }
        entries.splice(first..end, changed);
        self.shift(change);
        let starts = places.starts.into_iter().map(|start| begin + start);
        self.starts.splice(first..end, starts);
        Some(())
    }

    /// Moves what stands behind the change.
    fn shift(&mut self, change: &Change) {
        let behind = self.starts.iter_mut();
        for start in behind.filter(|start| **start >= change.old.end) {
            *start = change.moved(*start);
        }
    }
}

impl Change {
    /// The smallest one; none between equal texts.
    fn between(old: &str, new: &str) -> Option<Self> {
        let [old, new] = [old.as_bytes(), new.as_bytes()];
        let same = |(one, other): &(&u8, &u8)| one == other;
        let start = old.iter().zip(new).take_while(same).count();
        let [old_rest, new_rest] = [&old[start..], &new[start..]];
        if old_rest.is_empty() && new_rest.is_empty() {
            return None;
        }
        let behind = old_rest.iter().rev().zip(new_rest.iter().rev());
        let behind = behind.take_while(same).count();
        Some(Self {
            old: start..old.len() - behind,
            new: start..new.len() - behind,
        })
    }

    /// Where in the new text that stands which is at `place` in the old one, behind the change.
    fn moved(&self, place: usize) -> usize {
        self.new.end + (place - self.old.end)
    }
}

/// Whether a part of a text means the same by itself, as far as its characters tell.
fn is_plain(part: &str) -> bool {
    let is_marker = |line: &str| {
        let mut markers = ["---", "...", "%"].iter();
        markers.any(|marker| line.starts_with(marker))
    };
    !part.contains(['&', '*', '!']) && has_plain_lines(part) && !part.lines().any(is_marker)
}

/// Whether lines end with `\n` alone, whichever line breaks a parser knows.
fn has_plain_lines(text: &str) -> bool {
    !text.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}'])
}

/// Where the lines of a text begin. Of none where they can't be told.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        if !has_plain_lines(text) {
            return Self(Vec::new());
        }
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let starts = ends.map(|(place, _)| place + 1);
        Self([0].into_iter().chain(starts).collect())
    }

    /// Of the line with this number, from 0.
    fn start(&self, line: u64) -> Option<usize> {
        self.0.get(usize::try_from(line).ok()?).copied()
    }
}

#[cfg(test)]
mod tests;
