//! Sending packets of one's own making from a namespace.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{capture::link_address, netns::Netns};

/// A sender of IP packets as they are, headers included. Their source may be anybody's.
#[derive(Debug)]
pub struct RawSender<'a> {
    netns: &'a Netns,
    v4: Socket,
    v6: Socket,
    link: Socket,
    frames: Socket,
}

impl<'a> RawSender<'a> {
    pub fn new(netns: &'a Netns) -> Result<Self> {
        netns.enter(|| {
            let raw = Some(Protocol::from(libc::IPPROTO_RAW));
            Ok(Self {
                netns,
                v4: Socket::new(Domain::IPV4, Type::RAW, raw)?,
                v6: Socket::new(Domain::IPV6, Type::RAW, raw)?,
                link: Socket::new(Domain::PACKET, Type::DGRAM, None)?,
                frames: Socket::new(Domain::PACKET, Type::RAW, None)?,
            })
        })
    }

    /// Sends a packet, given from its IP header on, the way that the routes say.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let (to, socket) = match packet.first().map(|byte| byte >> 4) {
            Some(4) => {
                let to: [u8; 4] = packet.get(16..20).context("a short packet")?.try_into()?;
                (IpAddr::from(to), &self.v4)
            }
            Some(6) => {
                let to: [u8; 16] = packet.get(24..40).context("a short packet")?.try_into()?;
                (IpAddr::from(to), &self.v6)
            }
            _ => anyhow::bail!("not an IP packet"),
        };
        let sent = socket.send_to(packet, &SocketAddr::new(to, 0).into());
        sent.with_context(|| format!("sending a packet to {to}"))?;
        Ok(())
    }

    /// Sends a packet on an interface to a neighbour's hardware address, past all routes.
    pub fn send_on(&self, interface: &str, neighbour: [u8; 6], packet: &[u8]) -> Result<()> {
        let version = packet.first().map(|byte| byte >> 4);
        let protocol = if version == Some(6) {
            libc::ETH_P_IPV6
        } else {
            libc::ETH_P_IP
        };
        let mut to = self.netns.enter(|| link_address(interface, protocol))?;
        to.sll_halen = 6;
        to.sll_addr[..6].copy_from_slice(&neighbour);
        send_past_routes(&self.link, &to, packet)
    }

    /// Sends a frame with the link's own header, if it has one, and says of it that it is of
    /// `protocol`, whatever its header says.
    pub fn send_frame(&self, interface: &str, protocol: u16, frame: &[u8]) -> Result<()> {
        let address = || link_address(interface, protocol.into());
        let to = self.netns.enter(address)?;
        send_past_routes(&self.frames, &to, frame)
    }
}

fn send_past_routes(socket: &Socket, to: &libc::sockaddr_ll, bytes: &[u8]) -> Result<()> {
    // SAFETY: the bytes and the address are valid for reads of the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            core::ptr::from_ref(to).cast(),
            libc::socklen_t::try_from(size_of_val(to))?,
        )
    };
    let sent = Errno::result(sent).context("sending past the routes")?;
    ensure!(usize::try_from(sent)? == bytes.len(), "a packet was cut");
    Ok(())
}
