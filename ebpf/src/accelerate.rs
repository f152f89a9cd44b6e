//! Socket acceleration: what an app and its agent send each other goes from the one's `sendmsg`
//! into the other's queue, past the network stack.
//!
//! `accelerate` puts both ends of a connection into a map when they are established, `redirect`
//! decides about each message, `consumed` counts what was read, `keep_plain` refuses options that an
//! accelerated socket can't have. A direction is redirected from its first byte or never, and may go
//! over to TCP but not come back: that way round the kernel keeps the order, since a reader gets
//! what was redirected before what came by TCP.
//!
//! Where two apps of this node speak through the agent, it may join a direction: then what the one
//! sends goes into the other's queue, past the agent as well, for as long as the agent has had nothing
//! since (`Join`). What finds no room there goes by way of the agent again, which comes behind it.
//!
//! All of it belongs to one agent and is pinned nowhere. A socket holds the program that its
//! messages pass, and that one the maps, so connections keep what they have until they end.

use core::{arch::asm, ptr};

use aya_ebpf::{
    bindings::{
        BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_ESTABLISHED, bpf_sock, sk_action, sk_msg_md,
    },
    btf_maps::{HashMap, PerCpuArray, SkStorage},
    cty::c_void,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_delete, bpf_sk_storage_get,
        bpf_skc_to_mptcp_sock,
    },
    macros::{btf_map, btf_tracepoint, cgroup_sockopt, sk_msg, sock_ops},
    programs::{BtfTracePointContext, SkMsgContext, SockOpsContext, SockoptContext},
};
use malla_common::{
    Address, Flow, Verdict,
    acceleration::{AGENTS_CREDIT, CREDIT, End, EndState, Event, Join, Queue, Sends, Tag},
    pod_flags,
};

use crate::{
    ends::Ends,
    maps::pod_at,
    sockets::{InheritedStorage, SOCKETS},
};

const AF_INET: u32 = 2;
const SOL_SOCKET: i32 = 1;
const SO_ZEROCOPY: i32 = 60;
const SOL_TCP: i32 = 6;
const TCP_ULP: i32 = 31;
const MSG_PEEK: i32 = 2;

const PASS: u32 = sk_action::SK_PASS;
/// What a program of a cgroup answers to let things go on.
const GO_ON: u32 = 1;

/// The accelerated sockets, each under its own end.
#[btf_map]
static ENDS: Ends = Ends::new();

/// What waits at an end to be read.
#[btf_map]
static WAITING: HashMap<End, Queue, 262144, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The apps' sockets, by their cookie, that send to another app without the agent. Written by the agent,
/// but for the count.
#[btf_map]
static JOINS: HashMap<u64, Join, 262144, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// What is known of an accelerated socket.
#[btf_map]
static END_STATES: SkStorage<EndState> = SkStorage::new();

/// The [`Tag`] of the agent's sockets, written by the agent.
#[btf_map]
static TAGS: InheritedStorage = InheritedStorage::new();

#[btf_map]
static ACCELERATION_EVENTS: PerCpuArray<u64, { Event::ALL.len() }> = PerCpuArray::new();

/// Whether this kernel knows MPTCP: set by the loader, and what hangs on it is else not verified.
#[unsafe(no_mangle)]
static KNOWS_MPTCP: u8 = 0;

#[sock_ops]
pub fn accelerate(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => opened(&ctx, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => opened(&ctx, false),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => closed(&ctx),
        _ => {}
    }
    GO_ON
}

/// Takes in the agent's ends of connections with apps, and the apps' ends of them.
#[inline(always)]
fn opened(ctx: &SockOpsContext, active: bool) {
    // SAFETY: the context is valid for the whole run of the program.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return;
    }
    let end = end_of(ctx);
    // SAFETY: map and socket are valid; the storage lives as long as the socket.
    let tag = unsafe {
        storage(&raw const TAGS, socket.cast(), 0)
            .cast::<u32>()
            .as_ref()
    };
    match tag.copied() {
        Some(tag) if tag == Tag::Receives as u32 => add(ctx, socket, end, Sends::Tcp, 0),
        Some(tag) if tag == Tag::Both as u32 => {
            add(ctx, socket, end, Sends::Undecided, AGENTS_CREDIT);
        }
        Some(tag) if tag == Tag::App as u32 => add(ctx, socket, end, Sends::Undecided, CREDIT),
        // Of the agent, which wants it plain.
        Some(_) => {}
        None => {
            let is_apps = if active {
                steered(socket, &end.flow)
            } else {
                // The agent's end of a connection is there before the app's is.
                WAITING.get_ptr(&end.peer()).is_some()
            };
            if is_apps {
                add(ctx, socket, end, Sends::Undecided, CREDIT);
            }
        }
    }
}

/// Whether the app's connection was steered to the agent, which accelerates it.
#[inline(always)]
fn steered(socket: *mut bpf_sock, flow: &Flow) -> bool {
    // SAFETY: as in `opened`.
    let state = unsafe { storage(&raw const SOCKETS, socket.cast(), 0) };
    // SAFETY: null or a living value of this type, which only this socket's packets write.
    let Some(state) = (unsafe { state.cast::<malla_common::SocketState>().as_ref() }) else {
        return false;
    };
    state.verdict == Verdict::Steer as u8
        && state.destination == flow.destination
        && state.destination_port == flow.destination_port
        && state.source_port == flow.source_port
        && pod_at(&flow.source).is_some_and(|pod| pod.flags & pod_flags::ACCELERATED != 0)
}

#[inline(always)]
fn add(ctx: &SockOpsContext, socket: *mut bpf_sock, end: End, sends: Sends, credit: u32) {
    if is_mptcp(socket) {
        return;
    }
    let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    // SAFETY: as in `opened`.
    let state = unsafe { storage(&raw const END_STATES, socket.cast(), flags) };
    // SAFETY: null or a living value of this type; nothing else knows the socket yet.
    let Some(state) = (unsafe { state.cast::<EndState>().as_mut() }) else {
        return;
    };
    // SAFETY: the context is valid for the whole run of the program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    *state = EndState {
        end,
        cookie,
        sent: 0,
        joined: 0,
        sends: sends as u32,
        credit,
    };
    let queue = Queue {
        unread: 0,
        read: 0,
        cookie,
    };
    if WAITING.insert(end, queue, 0).is_ok() {
        let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
        let told_of_end = ctx.set_cb_flags(flags as i32).is_ok();
        // SAFETY: the context is valid for the whole run of the program.
        if told_of_end && unsafe { ENDS.add(ctx.ops, end) } {
            return;
        }
        let _ = WAITING.remove(end);
    }
    // It is a plain one, of which nothing is refused.
    // SAFETY: map and socket are valid, and the value isn't used any more.
    unsafe { bpf_sk_storage_delete((&raw const END_STATES).cast_mut().cast(), socket.cast()) };
}

/// A subflow must not be taken from the MPTCP connection that it belongs to.
#[inline(always)]
fn is_mptcp(socket: *mut bpf_sock) -> bool {
    // SAFETY: a constant that the loader has set; the helper takes any socket.
    unsafe {
        ptr::read_volatile(&raw const KNOWS_MPTCP) != 0
            && !bpf_skc_to_mptcp_sock(socket.cast()).is_null()
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    // SAFETY: the context is valid for the whole run of the program.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return;
    }
    // SAFETY: as in `opened`.
    let state = unsafe { storage(&raw const END_STATES, socket.cast(), 0) };
    // SAFETY: null or a living value of this type.
    if let Some(state) = unsafe { state.cast::<EndState>().as_ref() } {
        let _ = WAITING.remove(state.end);
    }
}

#[inline(always)]
fn end_of(ctx: &SockOpsContext) -> End {
    // SAFETY: the context is valid for the whole run of the program. Each word is read for itself
    // and whatever the family, so at a constant offset, which is all that the verifier allows.
    macro_rules! field {
        ($($field:tt)+) => {
            unsafe { ptr::read_volatile(&raw const (*ctx.ops).$($field)+) }
        };
    }
    let (local_v4, remote_v4) = (field!(local_ip4), field!(remote_ip4));
    let local_v6 = [
        field!(local_ip6[0]),
        field!(local_ip6[1]),
        field!(local_ip6[2]),
        field!(local_ip6[3]),
    ];
    let remote_v6 = [
        field!(remote_ip6[0]),
        field!(remote_ip6[1]),
        field!(remote_ip6[2]),
        field!(remote_ip6[3]),
    ];
    let (source, destination) = if field!(family) == AF_INET {
        (Address::from_v4(local_v4), Address::from_v4(remote_v4))
    } else {
        (Address::from_v6(local_v6), Address::from_v6(remote_v6))
    };
    End {
        // SAFETY: as above.
        netns: unsafe { bpf_get_netns_cookie(ctx.ops.cast()) },
        flow: Flow {
            source,
            destination,
            source_port: field!(local_port) as u16,
            destination_port: u32::from_be(field!(remote_port)) as u16,
        },
        reserved: 0,
    }
}

#[sk_msg]
pub fn redirect(ctx: SkMsgContext) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    let socket = unsafe { socket_of(ctx.msg) };
    if socket.is_null() {
        return PASS;
    }
    // The kernel asks before it looks whether the socket may send at all. TCP says no to who has shut that
    // down, or was reset.
    // SAFETY: not null, and read as a word at a constant offset, as the verifier demands.
    if !matches!(
        unsafe { ptr::read_volatile(&raw const (*socket).state) },
        BPF_TCP_ESTABLISHED | BPF_TCP_CLOSE_WAIT
    ) {
        return PASS;
    }
    // SAFETY: as in `opened`.
    let state = unsafe { storage(&raw const END_STATES, socket.cast(), 0) };
    // SAFETY: null or a living value of this type, which is written under the socket's lock alone.
    let Some(state) = (unsafe { state.cast::<EndState>().as_mut() }) else {
        return PASS;
    };
    if state.sends == Sends::Tcp as u32 {
        return PASS;
    }
    if state.sends == Sends::Redirected as u32 && joined(&ctx, state) {
        return PASS;
    }
    let peer = state.end.peer();
    let Some(queue) = WAITING.get_ptr_mut(&peer) else {
        return by_tcp(state, lost(state));
    };
    // SAFETY: the value of an entry, which stays readable while the program runs.
    let unread = unsafe { &raw mut (*queue).unread };
    // SAFETY: as above.
    if unsafe { ptr::read_volatile(unread) } >= i64::from(state.credit) {
        return by_tcp(state, Event::NoCredit);
    }
    let size = i64::from(ctx.size());
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { !ENDS.redirect(ctx.msg, peer) } {
        return by_tcp(state, lost(state));
    }
    // SAFETY: as above.
    unsafe { atomic_add(unread, size) };
    state.sent = state.sent.wrapping_add(size as u64);
    if state.sends == Sends::Undecided as u32 {
        state.sends = Sends::Redirected as u32;
        count(Event::Redirected);
    }
    PASS
}

/// Whether the message goes straight to the app that it is for: behind all that the agent has written
/// there, which is all that this app has sent so far, while that app reads, and while the agent's own
/// socket is there, so that nothing outlives an agent that was killed.
#[inline(always)]
fn joined(ctx: &SkMsgContext, state: &mut EndState) -> bool {
    let Some(entry) = JOINS.get_ptr_mut(&state.cookie) else {
        return false;
    };
    // SAFETY: the value of an entry, which stays readable while the program runs.
    if unsafe { ptr::read_volatile(&raw const (*entry).after) } != state.sent {
        return false;
    }
    // SAFETY: as above. What is read may be another's by now, and is judged by its seal.
    let join = unsafe { ptr::read_volatile(entry) };
    if join.after != state.sent || !join.is_of(state.cookie) {
        return false;
    }
    let Some(queue) = WAITING.get_ptr_mut(&join.target) else {
        return false;
    };
    // SAFETY: as above.
    let (unread, cookie) = unsafe {
        let unread = &raw mut (*queue).unread;
        (unread, ptr::read_volatile(&raw const (*queue).cookie))
    };
    // SAFETY: as above.
    let has_room = unsafe { ptr::read_volatile(unread) } < i64::from(state.credit);
    if cookie != join.target_cookie || !has_room {
        return false;
    }
    // The last of both counts.
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { !ENDS.redirect(ctx.msg, state.end.peer()) || !ENDS.redirect(ctx.msg, join.target) }
    {
        return false;
    }
    let size = i64::from(ctx.size());
    // SAFETY: both are in values of entries. Both numbers have the same bits, signed or not.
    unsafe {
        atomic_add(unread, size);
        atomic_add((&raw mut (*entry).bytes).cast(), size);
    }
    if state.joined != join.after {
        state.joined = join.after;
        count(Event::Joined);
    }
    true
}

/// Why there is no peer to redirect to.
#[inline(always)]
fn lost(state: &EndState) -> Event {
    if state.sends == Sends::Undecided as u32 {
        Event::NoPeer
    } else {
        Event::PeerGone
    }
}

/// From here on by TCP.
#[inline(always)]
fn by_tcp(state: &mut EndState, why: Event) -> u32 {
    state.sends = Sends::Tcp as u32;
    count(why);
    PASS
}

/// # Safety
///
/// `msg` must be the context of the running program.
#[inline(always)]
unsafe fn socket_of(msg: *mut sk_msg_md) -> *mut bpf_sock {
    // SAFETY: the caller's.
    unsafe { (*msg).__bindgen_anon_3.sk }
}

/// What was read of any socket on the node; most have no state here.
#[btf_tracepoint(function = "sock_recv_length")]
pub fn consumed(ctx: BtfTracePointContext) -> i32 {
    let socket: *mut c_void = ctx.arg(0);
    let length: i32 = ctx.arg(1);
    let flags: i32 = ctx.arg(2);
    if length <= 0 || flags & MSG_PEEK != 0 {
        return 0;
    }
    // SAFETY: the kernel's own pointer to a living socket.
    let state = unsafe { storage(&raw const END_STATES, socket, 0) };
    // SAFETY: null or a living value of this type, whose `end` never changes.
    if let Some(state) = unsafe { state.cast::<EndState>().as_ref() }
        && let Some(queue) = WAITING.get_ptr_mut(&state.end)
    {
        let length = i64::from(length);
        // SAFETY: as in `redirect`. Both numbers have the same bits, signed or not.
        unsafe {
            atomic_add(&raw mut (*queue).unread, -length);
            atomic_add((&raw mut (*queue).read).cast(), length);
        }
    }
    0
}

/// An accelerated socket gets no kernel TLS, whose plaintext would be redirected in place of what
/// is encrypted, and no zero-copy, whose notices never come. Who asks for them goes on without.
#[cgroup_sockopt(setsockopt)]
pub fn keep_plain(ctx: SockoptContext) -> i32 {
    // SAFETY: the context is valid for the whole run of the program.
    let (level, name, socket) = unsafe {
        let ctx = &*ctx.sockopt;
        (ctx.level, ctx.optname, ctx.__bindgen_anon_1.sk)
    };
    let unwanted =
        (level, name) == (SOL_TCP, TCP_ULP) || (level, name) == (SOL_SOCKET, SO_ZEROCOPY);
    if !unwanted || socket.is_null() {
        return GO_ON as i32;
    }
    // SAFETY: as in `opened`.
    i32::from(unsafe { !is_accelerated(socket.cast()) })
}

/// Whether a socket was ever accelerated.
///
/// # Safety
///
/// `socket` must be a living socket as the verifier knows them.
#[inline(always)]
pub unsafe fn is_accelerated(socket: *mut c_void) -> bool {
    // SAFETY: the caller's.
    unsafe { !storage(&raw const END_STATES, socket, 0).is_null() }
}

/// Adds to a number that others add to at the same time. Rust has no such operation for a target
/// that lacks compare-and-swap, as the kernels' first instruction set for this did.
///
/// # Safety
///
/// `number` must be in the value of an entry of a map.
#[inline(always)]
unsafe fn atomic_add(number: *mut i64, amount: i64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("lock *(u64 *)({number} + 0) += {amount}", number = in(reg) number, amount = in(reg) amount);
    }
}

/// A socket's value in a storage map, null where it has none.
///
/// # Safety
///
/// `map` must be a storage map, and `socket` a living socket as the verifier knows them.
#[inline(always)]
unsafe fn storage<M>(map: *const M, socket: *mut c_void, flags: u64) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { bpf_sk_storage_get(map.cast_mut().cast(), socket, ptr::null_mut(), flags) }
}

#[inline(always)]
fn count(event: Event) {
    if let Some(count) = ACCELERATION_EVENTS.get_ptr_mut(event as u32) {
        // SAFETY: the pointer is to this CPU's own slot; a count may be lost where a program
        // interrupts another one on it.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}
