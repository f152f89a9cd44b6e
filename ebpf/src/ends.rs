//! The map of accelerated sockets.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS, bpf_map_type::BPF_MAP_TYPE_SOCKHASH, bpf_sock_ops, sk_action, sk_msg_md,
    },
    cty::c_void,
    helpers::generated::{bpf_msg_redirect_hash, bpf_sock_hash_update},
};
use malla_common::acceleration::End;

const MAX_ENTRIES: usize = 262_144;

/// Sockets, each under its own end. A socket leaves the map when it is closed, be it by its app
/// alone, and what waits for its last bytes may look: the value of a length that holds a socket's
/// cookie is what makes the kernel answer user space, which that of the library's map isn't.
#[repr(C)]
pub struct Ends {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKHASH as usize],
    key: *const End,
    value: *const u64,
    max_entries: *const [i32; MAX_ENTRIES],
    map_flags: *const [i32; 0],
}

// SAFETY: the pointers stand for the types behind them, and nobody follows them.
unsafe impl Sync for Ends {}

impl Ends {
    pub const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// Puts in the socket that the event is about. Whether that was done.
    ///
    /// # Safety
    ///
    /// `ops` must be the context of the running program.
    #[inline(always)]
    pub unsafe fn add(&self, ops: *mut bpf_sock_ops, mut end: End) -> bool {
        // SAFETY: the map and the key are valid, the context is the caller's.
        unsafe { bpf_sock_hash_update(ops, self.map(), (&raw mut end).cast(), 0) == 0 }
    }

    /// Sends the message into the queue of the socket at `end`. Whether there is one.
    ///
    /// # Safety
    ///
    /// `msg` must be the context of the running program.
    #[inline(always)]
    pub unsafe fn redirect(&self, msg: *mut sk_msg_md, mut end: End) -> bool {
        let key = (&raw mut end).cast();
        // SAFETY: as in `add`.
        let action =
            unsafe { bpf_msg_redirect_hash(msg, self.map(), key, u64::from(BPF_F_INGRESS)) };
        action == i64::from(sk_action::SK_PASS)
    }

    #[inline(always)]
    const fn map(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}
