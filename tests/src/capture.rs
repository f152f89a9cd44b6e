//! What passes an interface, kept in memory.

use std::{
    fs::File,
    io::{ErrorKind, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::RcvBufForce},
    unistd::pipe2,
};
use socket2::{Domain, Socket, Type};

use crate::{
    netns::Netns,
    packet::TcpPacket,
    streams::{Stream, TlsSummary, reassemble, summarise_tls},
    wait::eventually,
};

/// What the kernel may hold for us: some seconds of a fast transfer.
const KERNEL_BUFFER: usize = 64 << 20;

/// What a capture keeps at most, in bytes; more is counted as missed.
const LIMIT: usize = 512 << 20;

/// A packet with the time when it was read.
#[derive(Debug, Clone)]
struct Captured {
    time: Duration,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Kept {
    packets: Vec<Captured>,
    size: usize,
    missed: usize,
    buffer: Vec<u8>,
}

/// A running capture of one interface, both directions, without link headers.
#[derive(Debug)]
pub struct Capture {
    kept: Arc<Mutex<Kept>>,
    socket: Socket,
    /// Closed, it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures what passes `interface` of a namespace from now on.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let socket = netns.enter(|| open(interface));
        let socket = socket.with_context(|| format!("capturing {interface}"))?;
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let kept = Arc::new(Mutex::new(Kept::default()));
        let (reader, keeping) = (socket.try_clone()?, Arc::clone(&kept));
        let thread = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || read_all(&reader, &stopped, &keeping))?;
        Ok(Self {
            kept,
            socket,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The packets so far, each from its network header on (IP, or ARP).
    pub fn packets(&self) -> Vec<Vec<u8>> {
        let kept = self.kept();
        kept.packets.iter().map(|p| p.bytes.clone()).collect()
    }

    /// The packets so far that are TCP.
    pub fn tcp(&self) -> Vec<TcpPacket> {
        let kept = self.kept();
        let parsed = kept.packets.iter().map(|p| TcpPacket::parse(&p.bytes));
        parsed.flatten().collect()
    }

    /// The TCP streams so far, put together from their packets.
    pub fn streams(&self) -> Vec<Stream> {
        reassemble(self.tcp())
    }

    /// What the TCP streams so far carry of TLS.
    pub fn tls(&self) -> TlsSummary {
        summarise_tls(&self.streams())
    }

    /// Whether `needle` was seen, in one packet or across the packets of a TCP stream.
    pub fn contains(&self, needle: impl AsRef<[u8]>) -> bool {
        let needle = needle.as_ref();
        let found = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        self.kept().packets.iter().any(|p| found(&p.bytes))
            || self.streams().iter().any(|stream| found(&stream.bytes))
    }

    /// Waits until `condition` holds for the TCP packets so far.
    pub fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&[TcpPacket]) -> bool,
    ) -> Result<()> {
        eventually(what, limit, || condition(&self.tcp()))
    }

    /// How many packets this capture doesn't have although they passed. A search that found
    /// nothing proves nothing unless this is 0.
    pub fn missed(&self) -> Result<usize> {
        // SAFETY: `tpacket_stats` is plain old data, for which zeroes are a valid value.
        let mut stats: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut length = libc::socklen_t::try_from(size_of_val(&stats))?;
        // SAFETY: the kernel writes at most `length` bytes of `stats`.
        let done = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        Errno::result(done).context("asking a capture's statistics")?;
        // The kernel starts at 0 again once it was asked.
        let mut kept = self.kept();
        kept.missed += usize::try_from(stats.tp_drops)?;
        Ok(kept.missed)
    }

    /// Writes the IP packets so far as a pcap file.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        const RAW_IP: u32 = 101;
        let mut file = Vec::new();
        // Magic number, version 2.4, no time zone, longest packet, kind of packets.
        file.extend(0xa1b2_c3d4_u32.to_ne_bytes());
        file.extend([2_u16, 4].map(u16::to_ne_bytes).concat());
        file.extend([0, 0, 1 << 18, RAW_IP].map(u32::to_ne_bytes).concat());
        let kept = self.kept();
        let is_ip = |packet: &&Captured| matches!(packet.bytes.first(), Some(0x45..=0x4f | 0x60));
        for packet in kept.packets.iter().filter(is_ip) {
            let length = u32::try_from(packet.bytes.len())?;
            let seconds = u32::try_from(packet.time.as_secs())?;
            let head = [seconds, packet.time.subsec_micros(), length, length];
            file.extend(head.map(u32::to_ne_bytes).concat());
            file.extend(&packet.bytes);
        }
        drop(kept);
        let mut output = File::create(path).with_context(|| path.display().to_string())?;
        Ok(output.write_all(&file)?)
    }

    /// What passed up to now: what the kernel holds for us still is read first.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.take(&self.socket);
        kept
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// An interface of the calling thread's namespace as an address of packet sockets.
pub(crate) fn link_address(interface: &str, protocol: i32) -> Result<libc::sockaddr_ll> {
    let index = if_nametoindex(interface).with_context(|| format!("interface {interface}"))?;
    // SAFETY: `sockaddr_ll` is plain old data, for which zeroes are a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = u16::try_from(protocol)?.to_be();
    address.sll_ifindex = i32::try_from(index)?;
    Ok(address)
}

fn open(interface: &str) -> Result<Socket> {
    // Without a protocol it hears nothing until it is bound to its interface.
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
    setsockopt(&socket, RcvBufForce, &KERNEL_BUFFER)?;
    socket.set_nonblocking(true)?;
    let address = link_address(interface, libc::ETH_P_ALL)?;
    // SAFETY: the address is valid for reads of the length given.
    let done = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            libc::socklen_t::try_from(size_of_val(&address))?,
        )
    };
    Errno::result(done)?;
    Ok(socket)
}

/// Reads only while it holds the lock, so that whoever gets the lock misses no packet.
fn read_all(socket: &Socket, stopped: &OwnedFd, kept: &Mutex<Kept>) {
    loop {
        let mut descriptors = [
            PollFd::new(stopped.as_fd(), PollFlags::empty()),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut descriptors, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let stop = descriptors[0].revents().is_some_and(|e| !e.is_empty());
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.take(socket) || stop {
            return;
        }
    }
}

impl Kept {
    /// Takes over what the kernel holds. Whether more can come.
    fn take(&mut self, socket: &Socket) -> bool {
        // As long as a packet can be before it is cut into segments.
        self.buffer.resize(1 << 18, 0);
        loop {
            match std::io::Read::read(&mut &*socket, &mut self.buffer) {
                Ok(length) => self.keep(length),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                // The interface is gone, and no more will come.
                Err(_) => return false,
            }
        }
    }

    /// Keeps the packet that fills the first `length` bytes of the buffer.
    fn keep(&mut self, length: usize) {
        if self.size + length > LIMIT {
            self.missed += 1;
            return;
        }
        self.size += length;
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        self.packets.push(Captured {
            time: time.unwrap_or_default(),
            bytes: self.buffer[..length].to_vec(),
        });
    }
}
