//! The machine: QEMU by KVM or emulation, what the guest says, and its end, which always comes.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{interrupt, test, workspace};

use super::kernel::Kernel;

/// What the guest says to us and not to the person begins so.
const WORD: &str = "malla-vm: ";

/// How long a guest has until its first process speaks. A kernel takes a second by KVM.
const BOOT_BY_KVM: Duration = Duration::from_secs(6);
const BOOT_BY_EMULATION: Duration = Duration::from_secs(90);

/// How much of the kernel's own console an error shows.
const CONSOLE_LINES: usize = 30;

/// After a panic the machine resets, which ends QEMU. The rest spares emulation what costs time and
/// isn't what is tested: defences, security modules but that of eBPF programs, tests of the kernel's
/// own, accounting, and doubts about the clock.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr init_on_alloc=0 \
                            lsm=bpf psi=0 cryptomgr.notests nowatchdog tsc=reliable";

/// What is to be booted, and for how long it may run.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    pub(super) limit: Duration,
}

/// How the guest's script ended.
#[derive(Debug, Default)]
pub(super) struct Ended {
    pub(super) code: u8,
    /// Numbers of tests.
    pub(super) passed: usize,
    pub(super) failed: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    Kvm,
    Emulation,
}

impl Machine<'_> {
    /// Runs the script by KVM where that can run a guest, or else by emulation.
    pub(super) fn run(&self, emulate: bool) -> Result<Ended> {
        if !emulate && Path::new("/dev/kvm").exists() {
            // That the device is there and makes machines isn't enough: some run no kernel in them.
            match Guest::boot(self, Accelerator::Kvm) {
                Ok(guest) => return guest.attend(self.limit),
                Err(error) => {
                    interrupt::check()?;
                    println!("KVM can't run a guest here, so it is emulated: {error}.");
                }
            }
        }
        Guest::boot(self, Accelerator::Emulation)?.attend(self.limit)
    }

    fn console(&self) -> PathBuf {
        let name = format!("console-{}.log", self.kernel.release);
        workspace::target().join("vm").join(name)
    }

    fn qemu(&self, accelerator: Accelerator) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        match accelerator {
            Accelerator::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            // Both processors on one thread: with one for each, a processor may run code that the
            // other has replaced since, and meet a breakpoint of the kernel's own that is gone
            // ("Oops: int3"). Page tables of five levels are walked for nothing.
            Accelerator::Emulation => {
                qemu.args(["-accel", "tcg,thread=single", "-cpu", "max,la57=off"])
            }
        };
        qemu.args(["-M", "q35", "-smp", "2", "-m", "4096"])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", COMMAND_LINE])
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()))
            .args(["-serial", "stdio"])
            .args([
                "-fsdev",
                "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            ])
            .args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"])
            .args(["-device", "virtio-rng-pci"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu
    }
}

/// A running guest. Dropping it ends it.
struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    console: PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// What came from the guest within some time.
enum Heard {
    Line(String),
    Nothing,
    End,
}

impl Guest {
    /// Starts a guest and waits until its first process speaks.
    fn boot(machine: &Machine<'_>, accelerator: Accelerator) -> Result<Self> {
        let limit = match accelerator {
            Accelerator::Kvm => BOOT_BY_KVM,
            Accelerator::Emulation => BOOT_BY_EMULATION,
        };
        let mut command = machine.qemu(accelerator);
        if accelerator == Accelerator::Kvm {
            // Its complaints are about what we try in vain.
            command.stderr(Stdio::null());
        }
        let mut qemu = command.spawn().context("starting qemu-system-x86_64")?;
        let output = qemu.stdout.take().context("QEMU's output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            // What programs say needn't be text.
            while matches!(output.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break;
                }
                line.clear();
            }
        });
        let mut guest = Self {
            qemu,
            lines,
            console: machine.console(),
        };
        let deadline = Instant::now() + limit;
        loop {
            match guest.hear(deadline)? {
                Heard::Line(line) if line == format!("{WORD}started") => return Ok(guest),
                Heard::Line(_) => {}
                Heard::Nothing => bail!("no process ran within {limit:?}{}", guest.last_words()),
                Heard::End => bail!("QEMU ended at once{}", guest.last_words()),
            }
        }
    }

    /// Shows what the guest says, until its script has ended.
    fn attend(mut self, limit: Duration) -> Result<Ended> {
        let deadline = Instant::now() + limit;
        let mut ended = Ended::default();
        loop {
            let line = match self.hear(deadline)? {
                Heard::Line(line) => line,
                Heard::Nothing => bail!("ended after {limit:?}, its limit{}", self.last_words()),
                Heard::End => bail!("the guest's kernel went down{}", self.last_words()),
            };
            if let Some(result) = line.strip_prefix("test result: ") {
                ended.passed += test::count(result, "passed");
                ended.failed += test::count(result, "failed");
            }
            let Some(word) = line.strip_prefix(WORD) else {
                println!("{line}");
                continue;
            };
            let Some(code) = word.strip_prefix("ended ") else {
                bail!("the guest can't be set up, {word}{}", self.last_words());
            };
            ended.code = code
                .parse()
                .with_context(|| format!("the guest's code `{code}`"))?;
            return Ok(ended);
        }
    }

    /// The next line, if one comes in time.
    fn hear(&mut self, deadline: Instant) -> Result<Heard> {
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => return Ok(Heard::Line(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(Heard::End),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Ok(Heard::Nothing);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The end of what the guest's kernel said on its console, for an error.
    fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console.lines().collect();
        if lines.is_empty() {
            return "; its kernel said nothing".to_owned();
        }
        let last = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        format!("; its kernel said at last:\n{last}")
    }
}
