//! What is remembered about a socket, an app's or the agent's, in the socket itself.

use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE,
        bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, bpf_sock,
    },
    btf_maps::SkStorage,
    cty::c_void,
    helpers::{
        bpf_sk_fullsock, bpf_sk_release,
        generated::{bpf_sk_lookup_tcp, bpf_sk_storage_get},
    },
    macros::btf_map,
    programs::TcContext,
};
use malla_common::{Address, Flow, PodEntry, SocketState};

use crate::packet::{TCP_LISTEN, THIS_NETNS, tuple};

const IPPROTO_TCP: u32 = 6;
const SOCK_STREAM: u32 = 1;

/// Decisions about connections. Pinned for good: a socket that was steered by an agent long gone
/// must still be known as such.
#[btf_map]
pub static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// The pod that an agent's outbound listener belongs to, written by the agent.
#[btf_map]
pub static LISTENER_PODS: SkStorage<u32> = SkStorage::new();

/// The agent's inbound listeners, written by the agent, and what they have accepted.
#[btf_map]
pub static INBOUND_SOCKETS: InheritedStorage = InheritedStorage::new();

/// A [`SkStorage`] that a socket has from its listener, which is a flag that the other doesn't take.
#[repr(C)]
pub struct InheritedStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the pointers stand for the types behind them, and nobody follows them.
unsafe impl Sync for InheritedStorage {}

impl InheritedStorage {
    pub const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }
}

const LOCALHOST: Address = Address::from_v4(0x7f00_0001_u32.to_be());

/// Not a pod's number.
pub const NO_POD: u32 = 0;

/// The pod whose netns this is, as the agent's listener in it says: no app can forge that, and
/// before Linux 6.15 nothing else tells one netns from another here. It is looked for on the port
/// that `claimed` has it on. [`NO_POD`] where no agent listens there: the compiler would pack an
/// `Option` in a way that the verifier forbids.
#[inline(always)]
pub fn pod_here(ctx: &TcContext, claimed: &PodEntry) -> u32 {
    // Over the loopback, where `lookup` doesn't interfere.
    let to_listener = Flow {
        source: LOCALHOST,
        destination: LOCALHOST,
        source_port: 0,
        destination_port: claimed.outbound_port,
    };
    let (mut tuple, size) = tuple(&to_listener);
    // SAFETY: the tuple is fully initialised for the size that is passed; a socket found is
    // referenced, asked for its storage, which is read before the one release.
    unsafe {
        let socket = bpf_sk_lookup_tcp(ctx.skb.skb.cast(), &raw mut tuple, size, THIS_NETNS, 0);
        if socket.is_null() {
            return NO_POD;
        }
        let map = core::ptr::from_ref(&LISTENER_PODS)
            .cast_mut()
            .cast::<c_void>();
        let pod = bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0).cast::<u32>();
        let pod = pod.as_ref().copied().unwrap_or(NO_POD);
        bpf_sk_release(socket.cast());
        pod
    }
}

/// Whether a plaintext connection that an agent carries receives `flow`.
#[inline(always)]
pub fn agent_receives(ctx: &TcContext, flow: &Flow) -> bool {
    let (mut tuple, size) = tuple(flow);
    // SAFETY: the tuple is fully initialised for the size that is passed; a socket found (of one
    // that opens, its listener) is referenced, asked for its storage, and released once.
    unsafe {
        let socket = bpf_sk_lookup_tcp(ctx.skb.skb.cast(), &raw mut tuple, size, THIS_NETNS, 0);
        if socket.is_null() {
            return false;
        }
        let map = core::ptr::from_ref(&INBOUND_SOCKETS)
            .cast_mut()
            .cast::<c_void>();
        let noted = bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0);
        bpf_sk_release(socket.cast());
        !noted.is_null()
    }
}

/// A connection's full socket, in the netns of the packet.
#[derive(Clone, Copy)]
pub struct Socket(*mut bpf_sock);

/// The TCP socket that sent this packet. None for what is forwarded, sent raw, or sent by the
/// kernel for a request or TIME_WAIT socket (before Linux 6.13 by a raw one of its own, one per CPU
/// for every netns); none for a listener (its SYN-ACKs carry it), since what is remembered is about
/// one connection.
#[inline(always)]
pub fn sender(ctx: &TcContext) -> Option<Socket> {
    // SAFETY: the context is valid; the socket is held by the packet while the program runs, and
    // `bpf_sk_fullsock` answers null for what must not be read as a full socket.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        let socket = bpf_sk_fullsock(socket);
        if socket.is_null() {
            return None;
        }
        if (*socket).type_ != SOCK_STREAM || (*socket).protocol != IPPROTO_TCP {
            return None;
        }
        if (*socket).state == TCP_LISTEN {
            return None;
        }
        Some(Socket(socket))
    }
}

/// Whether a listener sent this packet: the kernel answered in its name.
#[inline(always)]
pub fn sent_by_listener(ctx: &TcContext) -> bool {
    // SAFETY: as in `sender`.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let socket = bpf_sk_fullsock(socket);
        !socket.is_null() && (*socket).state == TCP_LISTEN
    }
}

impl Socket {
    /// What was decided about this socket, if anything was.
    #[inline(always)]
    pub fn state(self) -> Option<&'static mut SocketState> {
        self.storage(0)
    }

    /// The place for a decision, new where there was none. None when memory is short.
    #[inline(always)]
    pub fn state_or_new(self) -> Option<&'static mut SocketState> {
        self.storage(u64::from(BPF_SK_STORAGE_GET_F_CREATE))
    }

    #[inline(always)]
    fn storage(self, flags: u64) -> Option<&'static mut SocketState> {
        // SAFETY: map and socket are valid; the storage lives as long as the socket, which the
        // packet holds; packets of one socket are sent under its lock, so nobody else writes.
        unsafe {
            let map = core::ptr::from_ref(&SOCKETS).cast_mut().cast::<c_void>();
            bpf_sk_storage_get(map, self.0.cast(), core::ptr::null_mut(), flags)
                .cast::<SocketState>()
                .as_mut()
        }
    }
}
