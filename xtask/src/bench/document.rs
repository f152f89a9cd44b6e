//! The document on standard output, and nothing else there.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
};

use anyhow::{Context, Result};
use nix::unistd::dup2_stdout;

/// Standard output as it was given. Until it is dropped, what this process and its children print
/// goes to standard error.
#[derive(Debug)]
pub(super) struct Document(File);

impl Document {
    pub(super) fn open() -> Result<Self> {
        let own = io::stdout().as_fd().try_clone_to_owned()?;
        dup2_stdout(io::stderr()).context("redirecting standard output")?;
        Ok(Self(own.into()))
    }

    pub(super) fn write(mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes()).context("standard output")
    }
}
