//! Debian's kernels, of other suites than the machine's own too.
//!
//! They are looked for, fetched and unpacked below the target folder, by an apt whose lists, sources
//! and caches are there as well: the machine's are only asked where its mirror is.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{shell, workspace};

/// Where a kernel is looked for, in this order.
const SUITES: &[&str] = &[
    "bookworm",
    "bookworm-backports",
    "trixie",
    "trixie-backports",
    "forky",
    "sid",
];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Which kernel is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    /// The newest of one line, such as `6.12`.
    Of(String),
    Newest,
}

impl FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "newest" {
            return Ok(Self::Newest);
        }
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        match text.split_once('.') {
            Some((major, minor)) if is_number(major) && is_number(minor) => {
                Ok(Self::Of(text.to_owned()))
            }
            _ => Err("give a line such as 6.1 or 6.12, or `newest`".to_owned()),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Of(line) => line,
            Self::Newest => "newest",
        })
    }
}

impl Line {
    /// Whether a version such as `6.1.0-50` or `7.3.4+deb13` is of this line.
    fn has(&self, version: &str) -> bool {
        match self {
            Self::Newest => true,
            Self::Of(line) => version
                .strip_prefix(line.as_str())
                .is_some_and(|rest| rest.starts_with('.')),
        }
    }
}

/// A kernel that is unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The first two numbers of its release.
    pub(super) fn numbers(&self) -> Result<(u32, u32)> {
        malla_testbed::kernel::numbers(&self.release)
            .with_context(|| format!("{} doesn't begin with two numbers", self.release))
    }

    pub(super) fn image(&self) -> PathBuf {
        let boot = self.folder.join(format!("boot/vmlinuz-{}", self.release));
        if boot.exists() {
            boot
        } else {
            self.modules().join("vmlinuz")
        }
    }

    /// The folder that belongs to `/lib/modules`.
    pub(super) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.release)
    }

    /// The files of some modules and of all that they need, in the order in which they load.
    pub(super) fn closure(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for module in modules {
            let mut modprobe = Command::new("modprobe");
            modprobe.arg("-d").arg(&self.folder);
            modprobe.args(["-S", &self.release, "--show-depends", module]);
            let said = String::from_utf8(shell::output(&mut modprobe)?)?;
            // What is built in needs no file.
            let found = said.lines().filter_map(|line| line.strip_prefix("insmod "));
            for file in found.map(|path| PathBuf::from(path.trim())) {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    /// One that was unpacked whole.
    fn at(folder: PathBuf) -> Result<Self> {
        let entries = fs::read_dir(folder.join("lib/modules"));
        let entries = entries.with_context(|| folder.display().to_string())?;
        let mut entries = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release = entries
            .next()
            .with_context(|| format!("{} has no modules", folder.display()))?;
        Ok(Self { release, folder })
    }
}

/// The kernel of a line: the one that is here, or else Debian's newest.
pub(super) fn get(line: &Line) -> Result<Kernel> {
    let folder = workspace::target().join("vm/kernels");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let package = match line {
        Line::Of(_) => newest(line, &names(&folder)?),
        Line::Newest => None,
    };
    let package = match package {
        Some(package) => package,
        None => Apt::new()?.find(line)?,
    };
    let place = folder.join(&package);
    if !place.is_dir() {
        unpack(&package, &place)?;
    }
    Kernel::at(place)
}

fn names(folder: &Path) -> Result<String> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.collect::<Vec<_>>().join("\n"))
}

/// The newest package of a line among those that a list names first on a line each.
fn newest(line: &Line, list: &str) -> Option<String> {
    let packages = list.lines().filter_map(|text| text.split(' ').next());
    let fitting = packages.filter(|package| version(package).is_some_and(|v| line.has(v)));
    fitting
        .max_by_key(|package| numbers(package))
        .map(str::to_owned)
}

/// The version in the name of a package with a kernel for any machine.
fn version(package: &str) -> Option<&str> {
    let version = package
        .strip_prefix("linux-image-")?
        .strip_suffix("-amd64")?;
    let is_special = version.ends_with("-cloud") || version.ends_with("-rt");
    (version.starts_with(|c: char| c.is_ascii_digit()) && !is_special).then_some(version)
}

fn numbers(text: &str) -> Vec<u32> {
    let numbers = text.split(|c: char| !c.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

/// Fetches a package and unpacks it, whole or not at all.
fn unpack(package: &str, place: &Path) -> Result<()> {
    println!("Fetching {package}: the guest runs it.");
    // Under a name that is no package's.
    let fresh = place.with_file_name(format!("new-{package}"));
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| fresh.display().to_string())?;
    }
    fs::create_dir_all(&fresh).with_context(|| fresh.display().to_string())?;
    let apt = Apt::new()?;
    let mut download = apt.command("apt-get");
    download.args(["-qq", "download"]).args(apt.parts(package)?);
    shell::run(download.current_dir(&fresh))?;
    let entries = fs::read_dir(&fresh).with_context(|| fresh.display().to_string())?;
    let archives: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    for archive in archives {
        shell::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&fresh))?;
        fs::remove_file(&archive).with_context(|| archive.display().to_string())?;
    }
    let merged = fresh.join("usr/lib/modules");
    if merged.is_dir() && !fresh.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", fresh.join("lib"))?;
    }
    let kernel = Kernel::at(fresh.clone())?;
    shell::run(
        Command::new("depmod")
            .arg("-b")
            .arg(&fresh)
            .arg(&kernel.release),
    )?;
    fs::rename(&fresh, place).with_context(|| place.display().to_string())
}

/// An apt beside the machine's own.
#[derive(Debug)]
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new() -> Result<Self> {
        let folder = workspace::target().join("vm/apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part)).with_context(|| folder.display().to_string())?;
        }
        let status = folder.join("status");
        fs::write(&status, "").with_context(|| status.display().to_string())?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let options = [
            format!("Dir::State={}", self.folder.display()),
            format!("Dir::State::status={}", path("status")),
            format!("Dir::State::lists={}", path("lists")),
            format!("Dir::Cache={}", path("cache")),
            format!("Dir::Etc::sourcelist={}", path("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            // Its user can't write below a folder of root's.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        let mut command = Command::new(program);
        for option in options {
            command.args(["-o", &option]);
        }
        command
    }

    /// The packages that a kernel is made of: newer ones have image, modules and lists in
    /// packages of their own.
    fn parts(&self, package: &str) -> Result<Vec<String>> {
        let mut depends = self.command("apt-cache");
        let said = String::from_utf8(shell::output(depends.args(["depends", package]))?)?;
        let needed = said
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let prefixes = ["linux-base-", "linux-binary-", "linux-modules-"];
        let is_part = |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let parts = std::iter::once(package).chain(needed.filter(is_part));
        Ok(parts.map(str::to_owned).collect())
    }

    /// The newest package of a line, in the first suite that has any, or in all of them.
    fn find(&self, line: &Line) -> Result<String> {
        let mirror = mirror()?;
        let first = match line {
            Line::Of(_) => 1,
            Line::Newest => SUITES.len(),
        };
        for count in first..=SUITES.len() {
            let suites = &SUITES[..count];
            println!("Looking for a kernel in Debian's {}.", suites.join(", "));
            let signed = if Path::new(KEYRING).exists() {
                format!("[signed-by={KEYRING}] ")
            } else {
                String::new()
            };
            let source = |suite: &&str| format!("deb {signed}{mirror} {suite} main\n");
            let sources: String = suites.iter().map(source).collect();
            let path = self.folder.join("sources.list");
            fs::write(&path, sources).with_context(|| path.display().to_string())?;
            shell::run(self.command("apt-get").args(["-qq", "update"]))?;
            let mut search = self.command("apt-cache");
            search.args(["search", "--names-only", "^linux-image-[0-9].*-amd64$"]);
            let list = String::from_utf8(shell::output(&mut search)?)?;
            if let Some(package) = newest(line, &list) {
                return Ok(package);
            }
        }
        bail!("none of Debian's {} has one", SUITES.join(", "))
    }
}

/// Where the machine's apt has Debian from.
fn mirror() -> Result<String> {
    let mut apt = Command::new("apt-get");
    let said = String::from_utf8(shell::output(apt.args(["update", "--print-uris"]))?)?;
    let found = said.lines().find_map(mirror_of);
    let mirror = found.context("no source of the machine's apt is a mirror of Debian")?;
    ensure!(!mirror.contains(' '), "a mirror with a space: {mirror}");
    Ok(mirror.to_owned())
}

/// The mirror in a line such as `'http://HOST/debian/dists/bookworm/InRelease' … 0`.
fn mirror_of(line: &str) -> Option<&str> {
    let (base, _) = line.strip_prefix('\'')?.split_once("/dists/")?;
    base.ends_with("/debian").then_some(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_line_is_found_by_its_numbers() {
        let list = "linux-image-6.1.0-9-amd64 - Linux 6.1\nlinux-image-6.1.0-50-amd64 - x\n\
                    linux-image-6.1.0-51-cloud-amd64 - x\nlinux-image-6.1.0-52-rt-amd64 - x\n\
                    linux-image-6.12.95+deb12-amd64 - x\nlinux-image-amd64 - x\n\
                    linux-image-7.3.4+deb13-amd64 - x";
        let of = |line: &str| newest(&line.parse().unwrap(), list);
        assert_eq!(of("6.1").unwrap(), "linux-image-6.1.0-50-amd64");
        assert_eq!(of("6.12").unwrap(), "linux-image-6.12.95+deb12-amd64");
        assert_eq!(of("newest").unwrap(), "linux-image-7.3.4+deb13-amd64");
        assert_eq!(of("6.2"), None);
    }

    #[test]
    fn a_line_is_two_numbers_or_newest() {
        for text in ["", "6", "6.", "6.1.2", "six.one", "latest"] {
            assert!(text.parse::<Line>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_mirror_is_the_one_of_debian_itself() {
        let line = |path: &str| format!("'http://mirror.example/{path}/dists/x/InRelease' y 0");
        assert_eq!(
            mirror_of(&line("debian")),
            Some("http://mirror.example/debian")
        );
        assert_eq!(mirror_of(&line("debian-security")), None);
        assert_eq!(mirror_of("W: something"), None);
    }
}
