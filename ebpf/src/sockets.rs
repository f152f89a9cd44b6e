//! What is remembered about an app's socket, in the socket itself.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    cty::c_void,
    helpers::{bpf_sk_fullsock, generated::bpf_sk_storage_get},
    macros::btf_map,
    programs::TcContext,
};
use malla_common::SocketState;

const TCP_LISTEN: u32 = 10;
const IPPROTO_TCP: u32 = 6;

/// Decisions about connections. Pinned for good: a socket that was steered by an agent long gone
/// must still be known as such.
#[btf_map]
pub static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// A connection's full socket, in the netns of the packet.
#[derive(Clone, Copy)]
pub struct Socket(*mut bpf_sock);

/// The TCP socket that sent this packet. None for what is forwarded, sent raw, or sent by the
/// kernel for a request or TIME_WAIT socket; none for a listener (its SYN-ACKs carry it), since
/// what is remembered is about one connection.
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
        if (*socket).protocol != IPPROTO_TCP || (*socket).state == TCP_LISTEN {
            return None;
        }
        Some(Socket(socket))
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
