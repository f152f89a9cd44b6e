//! Making another process do a system call, as a fault in its code would.

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// The instruction `syscall`, which a thread that waits in the kernel has just passed.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How often a thread is stopped until it is found waiting in the kernel.
const TRIES: usize = 1000;

/// Makes the first thread of a process do a system call (`libc::SYS_*`) with up to three arguments,
/// and gives what it returned. The process goes on as if a signal had come.
pub fn system_call(pid: i32, number: i64, arguments: [u64; 3]) -> Result<i64> {
    let pid = Pid::from_raw(pid);
    for _ in 0..TRIES {
        ptrace::attach(pid).context("attaching to a process")?;
        let result = wait_stopped(pid).and_then(|()| call(pid, number, arguments));
        ptrace::detach(pid, None)?;
        if let Some(returned) = result? {
            return Ok(returned);
        }
    }
    anyhow::bail!("the process never waits in the kernel")
}

/// None where the thread doesn't wait in the kernel.
fn call(pid: Pid, number: i64, [first, second, third]: [u64; 3]) -> Result<Option<i64>> {
    let before = ptrace::getregs(pid)?;
    let place = before.rip - SYSCALL.len() as u64;
    let code = ptrace::read(pid, place as ptrace::AddressType)?.to_ne_bytes();
    if !code.starts_with(&SYSCALL) {
        return Ok(None);
    }
    let mut registers = before;
    registers.rip = place;
    registers.rax = number.cast_unsigned();
    // Not one that the kernel would begin again.
    registers.orig_rax = u64::MAX;
    (registers.rdi, registers.rsi, registers.rdx) = (first, second, third);
    ptrace::setregs(pid, registers)?;
    ptrace::step(pid, None)?;
    wait_stopped(pid)?;
    let returned = ptrace::getregs(pid)?.rax.cast_signed();
    ptrace::setregs(pid, before)?;
    Ok(Some(returned))
}

fn wait_stopped(pid: Pid) -> Result<()> {
    let status = waitpid(pid, Some(WaitPidFlag::__WALL))?;
    ensure!(
        matches!(status, WaitStatus::Stopped(..)),
        "not stopped, but {status:?}"
    );
    Ok(())
}
