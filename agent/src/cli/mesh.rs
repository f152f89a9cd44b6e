//! The mesh file, read as an agent reads it.

use std::{fs, path::Path};

use anyhow::Context;

use crate::{discovery::file, model::Mesh};

/// Reads the file. The error has every mistake in it, one a line.
pub(super) fn read(path: &Path) -> anyhow::Result<Mesh> {
    let text =
        fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    Ok(file::check(path, &text)?)
}
