//! What stands before nodes and pods are made: what they need is built, and what an earlier run has
//! left is gone.

use anyhow::Result;
use malla_testbed::leftovers;

use crate::{ebpf, interrupt, packages, shell};

/// Installs `packages`, builds the programs of the workspace, and removes what is left.
pub(crate) fn everything(packages: &[&str], why: &str) -> Result<()> {
    interrupt::catch()?;
    packages::ensure(packages, why)?;
    ebpf::build()?;
    // All of the workspace: one or two of its programs alone have other features of their
    // dependencies, which would all be built once more for it.
    shell::run(shell::cargo().args(["build", "--quiet", "--workspace"]))?;
    remove_leftovers()
}

/// Removes what a run that was killed has left.
pub(crate) fn remove_leftovers() -> Result<()> {
    for leftover in leftovers::remove()? {
        println!("Removed what an earlier run has left: {leftover}.");
    }
    Ok(())
}
