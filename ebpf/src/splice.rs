//! Refuses splice(2) from an accelerated socket, which would not see what was redirected there.
//!
//! Who splices reads on where a file can't be spliced from (Go's `io.Copy`, haproxy). The kernel asks
//! its security modules before it takes anything from a file, and doesn't tell them for which call: the
//! calling thread's registers do.

use core::ptr;

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_get_current_task_btf, bpf_sock_from_file, bpf_task_pt_regs},
    macros::lsm,
    programs::LsmContext,
};

use crate::accelerate::is_accelerated;

const GO_ON: i32 = 0;
/// -EINVAL, as from a file that can't be spliced from (splice(2)).
const REFUSED: i32 = -22;
const MAY_READ: i32 = 4;

/// Where `struct pt_regs` of x86-64 has the number of the system call, and those of splice there, in
/// 64-bit programs and in 32-bit ones. Neither number is that of a call which reads, in the other's.
const ORIG_AX: usize = 120;
const SPLICE: [u64; 2] = [275, 313];
/// Where `struct socket` has its `sk`. The verifier holds offsets against the kernel's types, and
/// refuses the program where another thing is there.
const SOCKET_SK: usize = 24;

#[lsm(hook = "file_permission")]
pub fn refuse_splice(ctx: LsmContext) -> i32 {
    let (file, mask): (*mut c_void, i32) = (ctx.arg(0), ctx.arg(1));
    if mask & MAY_READ == 0 || !splices() {
        return GO_ON;
    }
    // SAFETY: the hook's first argument is the file.
    let socket = unsafe { bpf_sock_from_file(file.cast()) };
    if socket.is_null() {
        return GO_ON;
    }
    // SAFETY: a living socket of the kernel's, whose field this is.
    let sk =
        unsafe { ptr::read_volatile(socket.cast::<u8>().add(SOCKET_SK).cast::<*mut c_void>()) };
    if sk.is_null() {
        return GO_ON;
    }
    // SAFETY: the socket of an open file lives.
    if unsafe { is_accelerated(sk) } {
        REFUSED
    } else {
        GO_ON
    }
}

/// Whether the calling thread is in splice(2).
#[inline(always)]
fn splices() -> bool {
    // SAFETY: both helpers work everywhere; what they point to lives while the thread does, and the
    // field is one of the kernel's type.
    let number = unsafe {
        let registers = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const u8;
        ptr::read_volatile(registers.add(ORIG_AX).cast::<u64>())
    };
    SPLICE.contains(&number)
}
