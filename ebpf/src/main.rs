//! malla's eBPF programs: which TCP packets of a pod go to the agent, and to which of its
//! listeners. One file per hook; `ARCHITECTURE.md` tells the way of a connection through them.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod accelerate;
mod decision;
mod egress;
mod ends;
mod ingress;
mod lookup;
mod loopback;
mod maps;
mod packet;
mod probes;
mod refuse;
mod requests;
mod sockets;
mod splice;

/// bpf-linker demands one; the programs have no panicking path.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that these programs call are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
