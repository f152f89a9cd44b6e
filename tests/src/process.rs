//! Commands that run in a namespace and cgroup of a bed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    sys::signal::{Signal, kill, killpg},
    unistd::{Gid, Pid, Uid, User, setgid, setgroups, setpgid, setuid},
};

use crate::{leftovers::MARK, wait};

/// How long [`Command::run`] waits unless it is told otherwise.
const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// Where a command runs.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) bed: String,
    pub(crate) folder: PathBuf,
    pub(crate) netns: PathBuf,
    pub(crate) cgroup: PathBuf,
}

/// Gives a type with a `netns` and a `place` what nodes and pods have in common: working inside.
macro_rules! works_inside {
    ($type:ty) => {
        impl $type {
            pub fn netns(&self) -> &$crate::netns::Netns {
                &self.netns
            }

            /// Runs `work` on a thread in its network namespace: sockets that it makes stay there.
            /// The thread stays in the cgroup of this process, unlike a command.
            pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
                self.netns.enter(work)
            }

            pub fn command<S: AsRef<std::ffi::OsStr>>(
                &self,
                arguments: impl IntoIterator<Item = S>,
            ) -> $crate::process::Command {
                $crate::process::Command::new(self.place.clone(), arguments)
            }

            /// Runs a command to its end (at most 30 s), which must be a success.
            pub fn run<S: AsRef<std::ffi::OsStr>>(
                &self,
                arguments: impl IntoIterator<Item = S>,
            ) -> anyhow::Result<$crate::process::Output> {
                self.command(arguments).run()
            }

            /// Starts a command, which ends when the returned handle is dropped.
            pub fn spawn<S: AsRef<std::ffi::OsStr>>(
                &self,
                arguments: impl IntoIterator<Item = S>,
            ) -> anyhow::Result<$crate::process::Process> {
                self.command(arguments).spawn()
            }
        }
    };
}
pub(crate) use works_inside;

/// A command to be run on a node or in a pod.
#[derive(Debug)]
pub struct Command {
    place: Place,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    input: Option<Vec<u8>>,
    user: Option<String>,
    cpu: Option<usize>,
    limit: Duration,
}

/// What a finished command said.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Command {
    pub(crate) fn new<S: AsRef<OsStr>>(
        place: Place,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        let arguments = arguments.into_iter().map(|a| a.as_ref().to_owned());
        Self {
            place,
            arguments: arguments.collect(),
            environment: Vec::new(),
            input: None,
            user: None,
            cpu: None,
            limit: DEFAULT_LIMIT,
        }
    }

    /// One more argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let pair = (name.as_ref().to_owned(), value.as_ref().to_owned());
        self.environment.push(pair);
        self
    }

    /// What the command reads from its standard input; nothing by default.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// The user that the command runs as; root by default.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>) -> Self {
        self.user = Some(name.into());
        self
    }

    /// The only processor that the command runs on; any by default.
    #[must_use]
    pub fn on_cpu(mut self, cpu: impl Into<Option<usize>>) -> Self {
        self.cpu = cpu.into();
        self
    }

    /// How long [`Command::run`] and [`Command::output`] wait before they kill it (30 s).
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end. An exit status other than 0 is an error that shows what it said.
    pub fn run(self) -> Result<Output> {
        let line = self.line();
        let output = self.output()?;
        if !output.status.success() {
            let Output {
                status,
                stdout,
                stderr,
            } = output;
            bail!("`{line}`: {status}\n{stderr}{stdout}");
        }
        Ok(output)
    }

    /// Runs it to its end, whatever its exit status. An error if that takes too long.
    pub fn output(self) -> Result<Output> {
        let line = self.line();
        let limit = self.limit;
        let (stdout, stderr) = (self.new_file("out")?, self.new_file("err")?);
        let process = self.start(File::create(&stdout)?, File::create(&stderr)?, &stdout)?;
        let status = process.wait(limit);
        drop(process);
        let read = |path: &Path| -> Result<String> {
            let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
            fs::remove_file(path)?;
            Ok(text)
        };
        let (stdout, stderr) = (read(&stdout)?, read(&stderr)?);
        let status = status.with_context(|| format!("`{line}`\n{stderr}{stdout}"))?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Starts it in the background; what it says goes to a log.
    pub fn spawn(self) -> Result<Process> {
        let log = self.new_file("log")?;
        let file = File::options().create(true).append(true).open(&log)?;
        self.start(file.try_clone()?, file, &log)
    }

    fn start(self, stdout: File, stderr: File, log: &Path) -> Result<Process> {
        let line = self.line();
        let (program, arguments) = self.arguments.split_first().context("an empty command")?;
        let netns = File::open(&self.place.netns)
            .with_context(|| format!("namespace {}", self.place.netns.display()))?;
        let procs = self.place.cgroup.join("cgroup.procs");
        let procs = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| procs.display().to_string())?;
        let user = self.user.as_deref().map(find_user).transpose()?;
        let processors = self.cpu.map(only).transpose()?;
        let stdin = match &self.input {
            None => Stdio::null(),
            Some(input) => {
                let path = self.new_file("in")?;
                fs::write(&path, input)?;
                let file = File::open(&path)?;
                fs::remove_file(&path)?;
                Stdio::from(file)
            }
        };
        let mut command = std::process::Command::new(program);
        command
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env(MARK, &self.place.bed)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr);
        let (netns_fd, procs_fd) = (netns.as_raw_fd(), procs.as_raw_fd());
        // SAFETY: between fork and exec the closure makes system calls only and allocates nothing;
        // both descriptors are open until `spawn` has returned.
        unsafe {
            command.pre_exec(move || {
                setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
                nix::unistd::write(BorrowedFd::borrow_raw(procs_fd), b"0")?;
                setns(BorrowedFd::borrow_raw(netns_fd), CloneFlags::CLONE_NEWNET)?;
                if let Some(processors) = &processors {
                    sched_setaffinity(Pid::from_raw(0), processors)?;
                }
                if let Some((uid, gid)) = user {
                    setgroups(&[])?;
                    setgid(gid)?;
                    setuid(uid)?;
                }
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting `{line}`"))?;
        Ok(Process {
            pid: Pid::from_raw(i32::try_from(child.id())?),
            child: Mutex::new(child),
            log: log.to_owned(),
            line,
        })
    }

    fn line(&self) -> String {
        let words = self.arguments.iter().map(|word| word.to_string_lossy());
        words.collect::<Vec<_>>().join(" ")
    }

    /// In a folder of its own, apart from the mesh file: agents look after that one's, and each line
    /// in a log there would wake them.
    fn new_file(&self, ending: &str) -> Result<PathBuf> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(1);
        let program = self.arguments.first().map(Path::new);
        let program = program.and_then(Path::file_name).unwrap_or_default();
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{sequence}.{ending}", program.to_string_lossy());
        let folder = self.place.folder.join("processes");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(folder.join(name))
    }
}

/// A command in the background. Dropping it kills it and the processes of its group.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    child: Mutex<Child>,
    log: PathBuf,
    line: String,
}

impl Process {
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// What it has written so far to its standard output and error.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until its log contains `text`. The error shows the log.
    pub fn wait_for_log(&self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("`{text}` in the log of `{}`", self.line);
        wait::until(&what, limit, || {
            let log = self.log();
            (log.contains(text) || !self.is_running()).then_some(log)
        })
        .and_then(|_| {
            if self.log().contains(text) {
                return Ok(());
            }
            bail!("`{}` ended without saying `{text}`", self.line)
        })
        .with_context(|| self.log())
    }

    pub fn is_running(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = self.child();
        if child.try_wait()?.is_none() {
            kill(self.pid, signal).with_context(|| format!("{signal} to `{}`", self.line))?;
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("`{}` to end", self.line);
        wait::until(&what, limit, || self.child().try_wait().transpose())?
            .with_context(|| format!("waiting for `{}`", self.line))
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn stop(&self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(limit)
    }

    /// Kills it, and the processes of its group, without notice (SIGKILL).
    pub fn kill9(&self) {
        let mut child = self.child();
        // The number of a process that was waited for may belong to another by now.
        if matches!(child.try_wait(), Ok(None)) {
            let _ = killpg(self.pid, Signal::SIGKILL);
            let _ = child.wait();
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

fn find_user(name: &str) -> Result<(Uid, Gid)> {
    let user = User::from_name(name)?.with_context(|| format!("no user `{name}`"))?;
    Ok((user.uid, user.gid))
}

fn only(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("processor {cpu}"))?;
    Ok(set)
}

/// A program of this workspace, built beside the running one (`MALLA_BIN` names `malla` itself).
pub fn binary(name: &str) -> Result<PathBuf> {
    if name == "malla"
        && let Some(path) = env::var_os("MALLA_BIN")
    {
        return Ok(PathBuf::from(path));
    }
    let running = env::current_exe().context("the path of the running program")?;
    // Test programs stand one folder below the others, in `deps`.
    let candidates = running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name));
    for candidate in candidates {
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "the program `{name}` isn't built beside {}: run `cargo build --workspace`",
        running.display()
    )
}

/// Writes a file as a whole: a reader sees the old or the new one.
pub(crate) fn replace_file(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&beside, path).with_context(|| path.display().to_string())
}
