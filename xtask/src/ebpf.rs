//! Builds the eBPF programs, and installs the toolchain for that where it is missing.
//!
//! They need `core` built from source for `bpfel-unknown-none`, so a compiler that allows unstable
//! options and has its library's source: a rustup nightly with rust-src, or else Debian's. They are
//! linked by bpf-linker, which must know at least the compiler's version of LLVM.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{packages, shell, workspace};

const TARGET: &str = "bpfel-unknown-none";
const LINKER_VERSION: &str = "0.13.0";
/// The version of LLVM that bpf-linker is built with.
const LLVM: u32 = 22;
/// Besides BTF with its line information, which debuginfo gives, the programs can't unwind.
const RUSTFLAGS: &[&str] = &["-Clink-arg=--btf", "-Cdebuginfo=2", "-Cpanic=abort"];
/// What else the programs' bytes depend on besides their sources.
const RECIPE: &[&str] = &[TARGET, LINKER_VERSION];
/// What the cargo that runs us tells its children about the other workspace's toolchain.
const FOREIGN_ENVIRONMENT: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Where the agent's build script takes the programs from.
fn object() -> PathBuf {
    workspace::target().join("ebpf/malla")
}

/// Fails unless the programs are built from the sources as they are.
pub(crate) fn check() -> Result<()> {
    if !is_current(&fingerprint()?) {
        bail!(
            "{} is missing or older than its sources: run `cargo xtask build-ebpf`",
            object().display()
        );
    }
    Ok(())
}

/// Builds the programs, unless they are built from the sources as they are.
pub(crate) fn build() -> Result<()> {
    let fingerprint = fingerprint()?;
    if is_current(&fingerprint) {
        return Ok(());
    }
    let toolchain = Toolchain::find_or_install()?;
    let linker = find_or_install_linker()?;
    let object = object();
    println!(
        "Building the eBPF programs with {toolchain} to {}: their sources are new or changed.",
        object.display()
    );
    let folder = workspace::target().join("ebpf");
    let mut flags = vec![format!("-Clinker={}", linker.display())];
    flags.extend(RUSTFLAGS.iter().map(|flag| (*flag).to_owned()));
    let mut cargo = toolchain.cargo();
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "-Zbuild-std=core",
        ])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(folder.join("build"))
        .current_dir(workspace::root().join("ebpf"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    shell::run(&mut cargo)?;
    let built = folder.join("build").join(TARGET).join("release/malla");
    fs::copy(&built, &object).with_context(|| format!("copying {}", built.display()))?;
    fs::write(fingerprint_file(), fingerprint)?;
    Ok(())
}

fn fingerprint_file() -> PathBuf {
    workspace::target().join("ebpf/malla.fingerprint")
}

fn is_current(fingerprint: &str) -> bool {
    let of_built = fs::read_to_string(fingerprint_file());
    object().is_file() && of_built.is_ok_and(|of_built| of_built == fingerprint)
}

/// A number that changes with the content of the programs' sources, and not with their times.
fn fingerprint() -> Result<String> {
    let mut hasher = DefaultHasher::new();
    (RECIPE, RUSTFLAGS).hash(&mut hasher);
    for folder in ["ebpf", "common"] {
        hash_folder(&workspace::root().join(folder), &mut hasher)?;
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

fn hash_folder(folder: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let context = || format!("reading {}", folder.display());
    let entries = fs::read_dir(folder).with_context(context)?;
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(context)?;
    paths.sort();
    for path in paths {
        if path.file_name().is_some_and(|name| name == "target") {
            continue;
        }
        if path.is_dir() {
            hash_folder(&path, hasher)?;
            continue;
        }
        let bytes = match fs::read(&path) {
            // An editor's temporary file has come and gone.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            bytes => bytes.with_context(|| format!("reading {}", path.display()))?,
        };
        let below = path.strip_prefix(workspace::root()).unwrap_or(&path);
        (below, bytes).hash(hasher);
    }
    Ok(())
}

/// A compiler that can build `core` for the kernel.
#[derive(Debug)]
enum Toolchain {
    /// One of rustup's nightlies, by its name.
    Rustup(String),
    Debian,
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rustup(name) => write!(f, "rustup's {name}"),
            Self::Debian => f.write_str("Debian's rustc"),
        }
    }
}

impl Toolchain {
    fn find_or_install() -> Result<Self> {
        let listed = shell::ask("rustup", &["toolchain", "list"]).unwrap_or_default();
        let names = listed.lines().filter_map(|line| line.split(' ').next());
        let mut nightlies = names.filter(|name| name.starts_with("nightly"));
        if let Some(name) = nightlies.find(|name| is_fit(name)) {
            return Ok(Self::Rustup(name.to_owned()));
        }
        packages::ensure(
            &["rustc-web", "cargo-web", "rust-web-src"],
            "building eBPF programs, without a rustup nightly that has rust-src,",
        )?;
        Ok(Self::Debian)
    }

    fn cargo(&self) -> Command {
        let mut command = match self {
            Self::Rustup(_) => Command::new("rustup"),
            Self::Debian => Command::new("/usr/bin/cargo"),
        };
        for name in FOREIGN_ENVIRONMENT {
            command.env_remove(name);
        }
        match self {
            Self::Rustup(name) => command.args(["run", name, "cargo"]),
            Self::Debian => command
                .env("RUSTC", "/usr/bin/rustc")
                // Debian's compiler is a stable one, which takes unstable options only so.
                .env("RUSTC_BOOTSTRAP", "1"),
        };
        command
    }
}

/// Whether a toolchain of rustup has its library's source, and no newer LLVM than the linker.
fn is_fit(name: &str) -> bool {
    let ask =
        |question: &[&str]| shell::ask("rustup", &[&["run", name, "rustc"], question].concat());
    let Some(sysroot) = ask(&["--print", "sysroot"]) else {
        return false;
    };
    let version = ask(&["--version", "--verbose"]).unwrap_or_default();
    let llvm = version.lines().find_map(|line| {
        let version = line.strip_prefix("LLVM version: ")?;
        version.split('.').next()?.parse::<u32>().ok()
    });
    let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
    source.is_dir() && llvm.is_some_and(|llvm| llvm <= LLVM)
}

fn find_or_install_linker() -> Result<PathBuf> {
    let version = format!("bpf-linker {LINKER_VERSION}");
    let is_ours = |path: &PathBuf| shell::ask(path, &["--version"]).as_ref() == Some(&version);
    let found = shell::find("bpf-linker");
    if let Some(path) = found.filter(is_ours) {
        return Ok(path);
    }
    packages::ensure(&[&format!("llvm-{LLVM}-dev")], "building bpf-linker")?;
    println!("Building bpf-linker {LINKER_VERSION} (about a minute): it links eBPF programs.");
    let prefix = format!("/usr/lib/llvm-{LLVM}");
    let mut cargo = shell::cargo();
    cargo
        .args(["install", "--quiet", "--force", "bpf-linker"])
        .args(["--version", LINKER_VERSION])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{LLVM}"),
        ])
        // Outside of the workspace its settings for cargo don't apply.
        .current_dir(env::temp_dir())
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", format!("-L native={prefix}/lib"))
        .env("LLVM_PREFIX", prefix);
    shell::run(&mut cargo)?;
    shell::find("bpf-linker").context("bpf-linker was built, but isn't in cargo's folder")
}
