//! The requests of probes, read in the kernel while no agent is there to do it.
//!
//! A packet passes that is one whole request and begins where the one before has ended. So whatever
//! the app reads is a sequence of declared requests, in whatever order and overlap packets come.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    btf_maps::PerCpuArray, helpers::generated::bpf_skb_load_bytes, macros::btf_map,
    programs::TcContext,
};
use malla_common::{ProbeFlow, ProbeTarget};

use crate::{
    maps::{PROBE_FLOWS, PROBE_TARGETS},
    packet::Packet,
};

/// Room for a request, and one bit more than its length may have. The kubelet's has some 200 bytes.
const ROOM: usize = 1024;

const METHOD: &[u8; 4] = b"GET ";
const VERSION: &[u8; 8] = b" HTTP/1.";

/// A request and its target, outside of the stack, which is too small for them.
#[repr(C)]
struct Request {
    target: ProbeTarget,
    /// The place of the last byte.
    last: u64,
    bytes: [u8; ROOM],
}

#[btf_map]
static REQUESTS: PerCpuArray<Request, 1> = PerCpuArray::new();

/// Expects requests from the end of this SYN on.
#[inline(always)]
pub fn await_requests(packet: &Packet) {
    let next = u32::from_be(packet.sequence).wrapping_add(1);
    // Where there is no room, nothing passes.
    let _ = PROBE_FLOWS.insert(packet.flow, ProbeFlow { last: next, next }, 0);
}

/// Whether the packet's payload, of so many bytes, is the next declared request of its connection, or
/// the last one again.
#[inline(always)]
pub fn is_declared(ctx: &TcContext, packet: &Packet, pod: u32, payload: u32) -> bool {
    let Some(flow) = PROBE_FLOWS.get_ptr_mut(packet.flow) else {
        return false;
    };
    // SAFETY: the entry is plain numbers; packets of one connection come one after the other.
    let flow = unsafe { &mut *flow };
    let begin = u32::from_be(packet.sequence);
    let end = begin.wrapping_add(payload);
    let is_next = begin == flow.next;
    if !is_next && !(begin == flow.last && end == flow.next) {
        return false;
    }
    let Some(request) = REQUESTS.get_ptr_mut(0) else {
        return false;
    };
    let port = packet.flow.destination_port;
    // SAFETY: the place is this CPU's own, and programs of one hook don't interrupt each other.
    if !unsafe { read(ctx, packet, payload, pod, port, request) } {
        return false;
    }
    if is_next {
        flow.last = begin;
        flow.next = end;
    }
    true
}

/// Reads the payload into `request`. Whether it is one whole declared request.
///
/// # Safety
///
/// `request` must be valid, and nobody else's for the call.
#[inline(always)]
unsafe fn read(
    ctx: &TcContext,
    packet: &Packet,
    payload: u32,
    pod: u32,
    port: u16,
    request: *mut Request,
) -> bool {
    if payload == 0 || payload >= ROOM as u32 {
        return false;
    }
    // SAFETY: as the caller promises; the length is at most that of the place. All is read and written
    // by value, so that the verifier forgets numbers whose every value it would else follow.
    unsafe {
        let bytes = (&raw mut (*request).bytes).cast::<u8>();
        let begin = packet.tcp + packet.tcp_length;
        // That a length isn't 0, kernels before 6.4 don't learn from a comparison.
        write_volatile(&raw mut (*request).last, u64::from(payload) - 1);
        let size = (read_volatile(&raw const (*request).last) & (ROOM as u64 - 1)) + 1;
        if bpf_skb_load_bytes(ctx.skb.skb.cast(), begin, bytes.cast(), size as u32) != 0 {
            return false;
        }
        for (place, expected) in METHOD.iter().enumerate() {
            if read_volatile(bytes.add(place)) != *expected {
                return false;
            }
        }
        take_target(request, pod, port);
        let length = u32::from(read_volatile(&raw const (*request).target.length));
        if length > ProbeTarget::LONGEST as u32 {
            return false;
        }
        let version = METHOD.len() as u32 + length;
        if version + VERSION.len() as u32 >= payload {
            return false;
        }
        for (place, expected) in VERSION.iter().enumerate() {
            if read_volatile(bytes.add(version as usize + place)) != *expected {
                return false;
            }
        }
        PROBE_TARGETS.get(&(*request).target).is_some() && ends_with_head(request)
    }
}

/// Copies the request's target to where it is looked up.
///
/// # Safety
///
/// As for [`read`].
#[inline(always)]
unsafe fn take_target(request: *mut Request, pod: u32, port: u16) {
    // SAFETY: as the caller promises; each place is within its array.
    unsafe {
        let from = (&raw const (*request).bytes).cast::<u8>().add(METHOD.len());
        let to = (&raw mut (*request).target.bytes).cast::<u8>();
        write_volatile(&raw mut (*request).target.pod, pod);
        write_volatile(&raw mut (*request).target.port, port);
        write_volatile(&raw mut (*request).target.length, u16::MAX);
        let mut ended = false;
        for place in 0..=ProbeTarget::LONGEST {
            let byte = read_volatile(from.add(place));
            if !ended && byte == b' ' {
                ended = true;
                write_volatile(&raw mut (*request).target.length, place as u16);
            }
            write_volatile(to.add(place), if ended { 0 } else { byte });
        }
    }
}

/// Whether the first empty line is the end of what there is.
///
/// # Safety
///
/// As for [`read`].
#[inline(always)]
unsafe fn ends_with_head(request: *const Request) -> bool {
    // SAFETY: as the caller promises. Read, so that the compiler knows no bound of it and leaves the
    // loop's own, which is the one that older verifiers see.
    let last = unsafe { read_volatile(&raw const (*request).last) };
    let mut is_empty = false;
    for place in 0..ROOM as u64 {
        if place > last {
            return false;
        }
        // SAFETY: as the caller promises; the place is within the array.
        let byte = unsafe {
            let bytes = (&raw const (*request).bytes).cast::<u8>();
            read_volatile(bytes.add(place as usize))
        };
        match byte {
            b'\n' if is_empty => return place == last,
            b'\n' => is_empty = true,
            b'\r' => {}
            _ => is_empty = false,
        }
    }
    false
}
