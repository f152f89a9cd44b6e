//! A wire in user space: two TUN interfaces, and a thread that carries packets between them.
//!
//! A TUN interface without offloads makes the kernel complete checksums and cut segments before
//! a packet leaves, as a wire does and a veth doesn't. Loss, delay and reordering are those of
//! netem, which isn't in every kernel. The order of what befalls packets repeats from run to run.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{ErrorKind, Read, Write},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};

use crate::netns::Netns;

/// Packets that may be under way in one direction; what comes on top is lost, as in a router.
const QUEUE: usize = 10_000;

/// The longest packet that IP knows.
const LONGEST: usize = 65_536;

/// What befalls packets on a wire, each direction by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Impairment {
    /// The share of packets that are lost, 0 to 1.
    pub loss: f64,
    /// How long each packet is under way.
    pub delay: Duration,
    /// The share of packets that go without the delay, ahead of those before them, 0 to 1.
    pub reorder: f64,
}

impl Impairment {
    pub const NONE: Self = Self {
        loss: 0.0,
        delay: Duration::ZERO,
        reorder: 0.0,
    };
}

/// What a wire has done so far, both directions together, in packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WireStats {
    pub carried: u64,
    pub lost: u64,
    pub reordered: u64,
}

#[derive(Debug, Default)]
struct Counters {
    carried: AtomicU64,
    lost: AtomicU64,
    reordered: AtomicU64,
}

/// A running wire. Dropping it ends it, and its interfaces with it.
#[derive(Debug)]
pub(crate) struct Forwarder {
    counters: Arc<Counters>,
    /// Closed, it ends the thread.
    stop: Option<std::os::fd::OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Makes one interface in each of two namespaces, and carries packets between them.
    pub(crate) fn start(
        ends: [(&Netns, &str); 2],
        mtu: u32,
        impairment: Impairment,
    ) -> Result<Self> {
        let [left, right] = ends.map(|(netns, name)| -> Result<File> {
            let tun = netns.enter(|| open_tun(name))?;
            netns.ip(&format!("link set {name} mtu {mtu} txqueuelen 10000\n"))?;
            Ok(tun)
        });
        let (left, right) = (left?, right?);
        let counters = Arc::new(Counters::default());
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let lanes = [
            Lane::new(left.try_clone()?, right.try_clone()?, impairment, 1),
            Lane::new(right, left, impairment, 2),
        ];
        let counting = Arc::clone(&counters);
        let thread = thread::Builder::new()
            .name("wire".to_owned())
            .spawn(move || carry(lanes, &stopped, &counting))?;
        Ok(Self {
            counters,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    pub(crate) fn stats(&self) -> WireStats {
        WireStats {
            carried: self.counters.carried.load(Ordering::Relaxed),
            lost: self.counters.lost.load(Ordering::Relaxed),
            reordered: self.counters.reordered.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// One direction.
struct Lane {
    from: File,
    to: File,
    impairment: Impairment,
    random: Random,
    under_way: BinaryHeap<Reverse<Packet>>,
    sequence: u64,
}

/// Ordered by when it is due, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    sequence: u64,
    bytes: Vec<u8>,
}

impl Lane {
    fn new(from: File, to: File, impairment: Impairment, seed: u64) -> Self {
        Self {
            from,
            to,
            impairment,
            random: Random(seed),
            under_way: BinaryHeap::new(),
            sequence: 0,
        }
    }

    /// Takes what the kernel has sent.
    fn take(&mut self, buffer: &mut [u8], counters: &Counters) {
        loop {
            let length = match self.from.read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Nothing more for now, or the interface is gone: poll tells which.
                Err(_) => return,
            };
            let lost = self.random.happens(self.impairment.loss);
            if lost || self.under_way.len() >= QUEUE {
                counters.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let mut due = Instant::now();
            if self.random.happens(self.impairment.reorder) {
                counters.reordered.fetch_add(1, Ordering::Relaxed);
            } else {
                due += self.impairment.delay;
            }
            self.sequence += 1;
            self.under_way.push(Reverse(Packet {
                due,
                sequence: self.sequence,
                bytes: buffer[..length].to_vec(),
            }));
        }
    }

    /// Gives the kernel of the other end what is due.
    fn deliver(&mut self, counters: &Counters) {
        let now = Instant::now();
        while let Some(Reverse(packet)) = self.under_way.peek()
            && packet.due <= now
        {
            // The interface may be down or gone by now; then the packet is lost like any other.
            let counter = match self.to.write_all(&packet.bytes) {
                Ok(()) => &counters.carried,
                Err(_) => &counters.lost,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            self.under_way.pop();
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(packet)| packet.due)
    }
}

fn carry(mut lanes: [Lane; 2], stopped: &std::os::fd::OwnedFd, counters: &Counters) {
    let mut buffer = vec![0; LONGEST];
    loop {
        let next = lanes.iter().filter_map(Lane::next_due).min();
        let pause = next.map(|due| due.saturating_duration_since(Instant::now()));
        // poll counts whole milliseconds: rounded up, or a packet due soon would keep it busy.
        let timeout = pause.map_or(PollTimeout::NONE, |pause| {
            let millis = pause.as_micros().div_ceil(1000);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        });
        let mut descriptors = [
            PollFd::new(stopped.as_fd(), PollFlags::empty()),
            PollFd::new(lanes[0].from.as_fd(), PollFlags::POLLIN),
            PollFd::new(lanes[1].from.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let broken = PollFlags::POLLHUP | PollFlags::POLLERR;
        let ended = descriptors
            .iter()
            .any(|fd| fd.revents().is_some_and(|events| events.intersects(broken)));
        for lane in &mut lanes {
            lane.take(&mut buffer, counters);
            lane.deliver(counters);
        }
        if ended {
            return;
        }
    }
}

/// Opens a new TUN interface in the calling thread's network namespace.
fn open_tun(name: &str) -> Result<File> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain old data, for which zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags)?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq` only.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(done).with_context(|| format!("making TUN interface {name}"))?;
    fcntl(&tun, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(tun)
}

/// Repeatable chance: splitmix64, whose state may be any number.
struct Random(u64);

impl Random {
    fn happens(&mut self, share: f64) -> bool {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The upper 32 bits as a number from 0 to 1.
        let upper = u32::try_from(mixed >> 32).unwrap_or(u32::MAX);
        f64::from(upper) / (f64::from(u32::MAX) + 1.0) < share
    }
}
