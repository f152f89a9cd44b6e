//! Where a change of a file can happen when its path leads through symbolic links.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::{OsStr, OsString},
    fs,
    path::{Component, Path, PathBuf},
};

/// As many links as Linux follows before it says ELOOP.
const MOST_LINKS: usize = 40;

/// The folders to watch, each with the names in it that matter.
pub(super) type Places = BTreeMap<PathBuf, BTreeSet<OsString>>;

/// Every name on the way of the absolute `path` whose replacement makes it another file: the file
/// itself, and each link, wherever in the path it stands.
///
/// With Kubernetes' volumes, `mesh.yaml -> ..data/mesh.yaml` and `..data -> ..2024_01`, that is
/// `mesh.yaml` and `..data` of the volume, and `mesh.yaml` of `..2024_01`.
pub(super) fn places(path: &Path) -> Places {
    let mut places = Places::new();
    let mut reached = PathBuf::from("/");
    let mut links = 0;
    let mut rest: VecDeque<OsString> = names(path);
    while let Some(name) = rest.pop_front() {
        if name == OsStr::new("..") {
            reached.pop();
            continue;
        }
        let here = reached.join(&name);
        let target = fs::read_link(&here).ok();
        if target.is_some() || rest.is_empty() {
            places.entry(reached.clone()).or_default().insert(name);
        }
        let Some(target) = target else {
            reached = here;
            continue;
        };
        links += 1;
        if links > MOST_LINKS {
            break;
        }
        if target.is_absolute() {
            reached = PathBuf::from("/");
        }
        for name in names(&target).into_iter().rev() {
            rest.push_front(name);
        }
    }
    places
}

/// The names in a path, `..` included.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}
