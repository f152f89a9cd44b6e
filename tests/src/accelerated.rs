//! Socket acceleration: pods that have it, what it counts, and apps that are as it asks of them.

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    agent::Agent,
    node::Node,
    pair::{PATIENCE, Pair, Way},
    spec::PodSpec,
    wait::eventually,
};

impl Pair {
    /// Between pods that ask for all of it, once they have it.
    pub fn accelerated() -> Result<Self> {
        let full = |name| PodSpec::new(name).settings("accelerate: full");
        let mut pair = Self::of(Way::Mesh, full("client"), full("server"))?;
        for agent in pair.agents() {
            agent.wait_for_acceleration("full")?;
        }
        pair.count_descriptors()?;
        Ok(pair)
    }

    /// The client's and the server's end of a new connection.
    pub fn polled_connection(&self) -> Result<(Polled, Polled)> {
        let (client, server) = self.connection()?;
        Ok((Polled::new(client)?, Polled::new(server)?))
    }

    /// How many directions of both nodes' connections this has happened to.
    pub fn directions(&self, event: &str) -> Result<usize> {
        let [a, b] = self.agents().map(|agent| agent.directions(event));
        Ok(a? + b?)
    }

    /// Waits until so many directions are counted as redirected.
    pub fn wait_for_redirected(&self, many: usize) -> Result<()> {
        let what = format!("{many} directions to be redirected");
        eventually(&what, PATIENCE, || {
            self.directions("redirected")
                .is_ok_and(|directions| directions >= many)
        })
    }
}

impl Node {
    /// Whether its agent says that who splices from an accelerated socket is refused, and not left
    /// without what is there.
    pub fn refuses_splices(&self) -> Result<bool> {
        let acceleration = &self.config()?["acceleration"];
        let limits = acceleration["limits"].as_array().context("no limits")?;
        Ok(limits.iter().all(|limit| limit != "splice"))
    }
}

impl Agent {
    /// Waits until one of its pods is in this mode.
    pub fn wait_for_acceleration(&self, mode: &str) -> Result<()> {
        let waited = eventually(&format!("a pod in mode {mode}"), PATIENCE, || {
            // One that takes over may not answer yet.
            self.metrics().is_ok_and(|metrics| {
                metrics.sum("malla_acceleration_pods", &[("mode", mode)]) > 0.0
            })
        });
        waited.with_context(|| self.log())
    }

    /// How many directions of its connections this has happened to.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count is a whole number far below the limits of a cast"
    )]
    pub fn directions(&self, event: &str) -> Result<usize> {
        let metrics = self.metrics()?;
        let count = metrics.sum("malla_acceleration_directions_total", &[("event", event)]);
        Ok(count as usize)
    }
}

impl Agent {
    /// How many directions it lets the kernel move past it, those included that are to be forgotten.
    pub fn joins(&self, node: &Node) -> Result<usize> {
        let folder = format!("/proc/{}/fdinfo", self.process().pid());
        // A cookie and a `malla_common::acceleration::Join`, as in no other map.
        let sizes = [
            "key_size:\t8\n",
            "value_size:\t80\n",
            "max_entries:\t262144\n",
        ];
        let files = fs::read_dir(&folder).context(folder)?.flatten();
        let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        let id = texts
            .filter(|text| sizes.iter().all(|size| text.contains(*size)))
            .find_map(|text| {
                Some(
                    text.split_once("map_id:")?
                        .1
                        .split_whitespace()
                        .next()?
                        .to_owned(),
                )
            })
            .context("no map of joins")?;
        let dump = node
            .run(["bpftool", "-j", "map", "dump", "id", &id])?
            .stdout;
        let entries: serde_json::Value = serde_json::from_str(&dump)?;
        Ok(entries.as_array().context("no list")?.len())
    }
}

/// A socket of an app that waits for readiness and reads without blocking, as `full` asks of it.
#[derive(Debug)]
pub struct Polled(pub TcpStream);

impl Polled {
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    pub fn wait(&self, what: PollFlags) -> io::Result<()> {
        let mut polled = [PollFd::new(self.0.as_fd(), what)];
        let limit = PollTimeout::try_from(PATIENCE).map_err(io::Error::other)?;
        match poll(&mut polled, limit)? {
            0 => Err(ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

impl Read for &Polled {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.0).read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLIN)?;
                }
                done => return done,
            }
        }
    }
}

impl Write for &Polled {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.0).write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT)?;
                }
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
