//! `cargo xtask release`: the agent in the release profile, compiled twice. The first one is put under the
//! bench's loads and tells what it ran how often; the compiler lays out the second one by that (PGO).

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, Result, bail};

use crate::{bench, ebpf, packages, shell, workspace};

/// Builds it, unless it is built already, and says where it is.
pub(crate) fn build() -> Result<PathBuf> {
    ebpf::build()?;
    let compiler = Compiler::of_this()?;
    let folder = workspace::target().join("release-by-profile");
    let (raw, profile) = (folder.join("runs"), folder.join("agent.profdata"));
    println!("Building an agent that counts what it runs, unless it is built already.");
    let flag = format!("-Cprofile-generate={}", raw.display());
    let counting = compiler.agent(&folder.join("counting"), &flag)?;
    if changed(&profile) < changed(&counting) {
        println!("Putting it under load (two minutes).");
        remove(&raw)?;
        bench::train(&counting)?;
        compiler.merge(&raw, &profile)?;
        remove(&raw)?;
    }
    println!("Building the agent by what that one has run, unless it is built already.");
    let flag = format!("-Cprofile-use={}", profile.display());
    compiler.agent(&folder.join("agent"), &flag)
}

/// None where it isn't there, which is before anything else.
fn changed(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|file| file.modified()).ok()
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    Ok(())
}

/// The Rust compiler.
struct Compiler {
    /// What it compiles for: this machine.
    target: String,
    /// The version of its LLVM, whose profiles no other version reads for certain.
    llvm: String,
    sysroot: PathBuf,
}

impl Compiler {
    fn of_this() -> Result<Self> {
        let said =
            shell::ask("rustc", &["--version", "--verbose"]).context("rustc can't be run")?;
        let value = |key: &str| {
            let mut lines = said.lines();
            let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
            value.with_context(|| format!("rustc doesn't say its {key}"))
        };
        let llvm = value("LLVM version")?;
        let (llvm, _) = llvm.split_once('.').context("an LLVM without a version")?;
        let sysroot = shell::ask("rustc", &["--print", "sysroot"]);
        Ok(Self {
            target: value("host")?.to_owned(),
            llvm: llvm.to_owned(),
            sysroot: sysroot.context("rustc has no sysroot")?.into(),
        })
    }

    /// The agent, compiled with one flag more.
    fn agent(&self, folder: &Path, flag: &str) -> Result<PathBuf> {
        let flags = env::var("RUSTFLAGS").unwrap_or_default();
        let mut cargo = shell::cargo();
        cargo
            .args(["build", "--quiet", "--release", "--package", "malla"])
            // With a target named, flags aren't for what runs while it is compiled.
            .args(["--target", &self.target, "--target-dir"])
            .arg(folder)
            .env("RUSTFLAGS", format!("{flags} {flag}"));
        shell::run(&mut cargo)?;
        Ok(folder.join(&self.target).join("release/malla"))
    }

    /// Puts what processes have counted into one profile.
    fn merge(&self, raw: &Path, profile: &Path) -> Result<()> {
        let program = self.profiler()?;
        let mut command = std::process::Command::new(program);
        command.args(["merge", "--output"]).arg(profile).arg(raw);
        shell::run(&mut command)
    }

    /// LLVM's program for profiles: rustup's (`llvm-tools`), or Debian's of the same version.
    fn profiler(&self) -> Result<PathBuf> {
        let rustups = self.sysroot.join("lib/rustlib").join(&self.target);
        let rustups = rustups.join("bin/llvm-profdata");
        if rustups.is_file() {
            return Ok(rustups);
        }
        let package = format!("llvm-{}", self.llvm);
        packages::ensure(&[&package], "reading profiles")?;
        let debians = PathBuf::from(format!("/usr/lib/{package}/bin/llvm-profdata"));
        if !debians.is_file() {
            bail!("there is no llvm-profdata: `rustup component add llvm-tools` brings it");
        }
        Ok(debians)
    }
}
