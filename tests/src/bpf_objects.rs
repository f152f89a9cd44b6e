//! What a node's agents have in the kernel, counted.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{node::Node, pair::PATIENCE, wait::until};

/// EAGAIN.
const BEING_MADE: &str = "Resource temporarily unavailable";

/// How much there is of each kind, whoever holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfObjects {
    pub programs: usize,
    pub maps: usize,
    pub links: usize,
    /// Everything in the node's bpffs folder but folders.
    pub pins: usize,
}

impl Node {
    /// Counts them. An error where no agent has run yet.
    pub fn bpf_objects(&self) -> Result<BpfObjects> {
        let ask = |arguments: &[&str]| {
            let command = [&["bpftool"], arguments].concat();
            let shown = until("bpftool to show all", PATIENCE, || {
                match self.run(&command) {
                    // A link is being made at this moment (bpf(2), BPF_LINK_GET_FD_BY_ID).
                    Err(error) if format!("{error:#}").contains(BEING_MADE) => None,
                    shown => Some(shown),
                }
            });
            Ok::<_, anyhow::Error>(shown??.stdout)
        };
        // Most programs count: the map of counters tells this node's from others'. What accelerates
        // has maps in common with those that do.
        let counters = self.pinned_map("COUNTERS");
        let counters = ask(&[
            "map",
            "show",
            "pinned",
            counters.to_str().context("a path")?,
        ])?;
        let mut maps = HashSet::from([entries(&counters).next().context("no pinned map")?.0]);
        let loaded = ask(&["prog", "show"])?;
        let loaded: Vec<(&str, HashSet<&str>)> = entries(&loaded)
            .filter_map(|(id, text)| Some((id, word_after(text, "map_ids")?.split(',').collect())))
            .collect();
        let mut programs: HashSet<&str> = HashSet::new();
        loop {
            let before = programs.len();
            for (id, uses) in &loaded {
                if !uses.is_disjoint(&maps) {
                    programs.insert(id);
                    maps.extend(uses);
                }
            }
            if programs.len() == before {
                break;
            }
        }
        let links = ask(&["link", "show"])?;
        let links = entries(&links)
            .filter_map(|(_, text)| word_after(text, "prog"))
            .filter(|program| programs.contains(program));
        Ok(BpfObjects {
            links: links.count(),
            programs: programs.len(),
            maps: maps.len(),
            pins: files_below(self.bpffs()),
        })
    }
}

/// The entries of what bpftool prints: each has a line `ID: …` and indented ones.
fn entries(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let starts: Vec<usize> = text
        .match_indices('\n')
        .map(|(at, _)| at + 1)
        .filter(|at| text[*at..].starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    let begins = [0].into_iter().chain(starts.clone());
    let ends = starts.into_iter().chain([text.len()]);
    let parts: Vec<_> = begins.zip(ends).collect();
    parts
        .into_iter()
        .filter_map(|(begin, end)| text[begin..end].split_once(':'))
}

fn word_after<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let mut words = text.split_ascii_whitespace();
    words.find(|found| *found == word)?;
    words.next()
}

fn files_below(folder: &Path) -> usize {
    let mut next: Vec<PathBuf> = vec![folder.to_owned()];
    let mut files = 0;
    while let Some(folder) = next.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => next.push(entry.path()),
                _ => files += 1,
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_bpftool_prints_is_taken_apart() {
        let text = "12: sched_cls  name egress  tag 0a  gpl\n\tloaded_at x  uid 0\n\t\
                    xlated 10B  map_ids 4,5\n13: netns  prog 12  \n\tnetns_ino 7\n";
        let found: Vec<_> = entries(text).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].0, "12");
        assert_eq!(word_after(found[0].1, "map_ids"), Some("4,5"));
        assert_eq!(word_after(found[1].1, "prog"), Some("12"));
    }
}
