//! The agent keeps as little memory as it uses.
//!
//! Where the kernel gives huge pages to who doesn't ask (`always` in
//! `/sys/kernel/mm/transparent_hugepage/enabled`, as many distributions have it), each stack of a thread and
//! each arena of the allocator would have some of 2 MiB: 20 to 50 MiB of an agent at rest in place of 6.
//!
//! To load its programs the agent reads the kernel's own types, tens of megabytes of them. What is
//! freed jemalloc keeps for ten seconds, but by itself it looks at the time only while somebody
//! allocates: an agent at rest would keep it for ever. And each page of the agent's program that
//! has ever run counts as the agent's memory, though most run at its start alone.

use std::{
    ffi::{c_int, c_ulong, c_void},
    ptr, slice,
};

use libc::{MADV_DONTNEED, PF_W, PT_LOAD, dl_phdr_info, size_t};

/// A thread of jemalloc's own gives back what is free, so that no worker has to.
///
/// It must be one: that is made by the main thread before `main`, in the network namespace of the
/// agent. Any further would be made by a worker, which may be in a pod's at that moment, and would
/// hold that for ever.
#[unsafe(export_name = "_rjem_malloc_conf")]
static JEMALLOC_SETTINGS: &[u8; 48] = b"background_thread:true,max_background_threads:1\0";

/// Has the kernel give this process no huge pages.
extern "C" fn keep_to_small_pages() {
    let (disabled, unused): (c_ulong, c_ulong) = (1, 0);
    // SAFETY: a call without memory. It fails nowhere that the agent runs on (Linux 3.15), and where it
    // did, all would be as it was.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, disabled, unused, unused, unused) };
}

/// The allocator has taken memory, and made its thread, long before `main`: from what the linker puts
/// behind all that has a number.
// SAFETY: the function has the type that the section's are called with, and takes nothing of the
// runtime, which isn't there yet.
#[used]
#[unsafe(link_section = ".init_array.00101")]
static BEFORE_ALLOCATOR: extern "C" fn() = keep_to_small_pages;

/// Drops the pages of the program and its libraries. Those that run again are mapped again from
/// the kernel's cache of files.
pub fn drop_program_pages() {
    // SAFETY: the callback has the type that is asked for, and keeps nothing of its arguments.
    unsafe { libc::dl_iterate_phdr(Some(drop_pages_of), ptr::null_mut()) };
}

/// Drops the pages of those segments of an object that can't be written.
unsafe extern "C" fn drop_pages_of(object: *mut dl_phdr_info, _: size_t, _: *mut c_void) -> c_int {
    // SAFETY: the linker gives a valid object with that many headers, both for the call's time.
    let (base, headers) = unsafe {
        let object = &*object;
        let headers = slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers)
    };
    // SAFETY: a question without arguments in memory.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs();
    let fixed = |header: &&libc::Elf64_Phdr| header.p_type == PT_LOAD && header.p_flags & PF_W == 0;
    for segment in headers.iter().filter(fixed) {
        let start = base + segment.p_vaddr;
        let first = start.next_multiple_of(page);
        let end = (start + segment.p_memsz) / page * page;
        // An address of this process, which a pointer has room for.
        #[expect(clippy::cast_possible_truncation)]
        let (first, length) = (first as usize, end.saturating_sub(first) as usize);
        // SAFETY: whole pages of a private mapping of a file that were never writable, so that each
        // comes back as it was. Where the advice isn't taken, as for the vDSO, nothing changes.
        unsafe {
            libc::madvise(
                ptr::with_exposed_provenance_mut(first),
                length,
                MADV_DONTNEED,
            )
        };
    }
    0
}
