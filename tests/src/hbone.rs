//! HBONE peers that share nothing with malla: Python's `h2` over OpenSSL (`tests/peers`), with
//! certificates that a test makes as it likes from the bed's own authority.
//!
//! They need the agents to have been started, since the first of them makes the authority.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process as std_process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{bed::Testbed, pod::Pod, process::Process};

const PYTHON: &str = "/usr/bin/python3";

/// How long a peer may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// The description of a certificate: by default signed by the bed's authority, valid now, and for
/// clients and servers.
#[derive(Debug, Clone, Default)]
pub struct Certificate {
    arguments: Vec<String>,
    is_strange: bool,
}

/// A certificate and its key in the bed's folder.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Without the endings `.crt` and `.key`.
    path: PathBuf,
}

impl Certificate {
    /// A certificate with this URI, such as `spiffe://cluster.local/ns/default/sa/web`.
    pub fn of(uri: impl Into<String>) -> Self {
        Self::default().argument("--uri", uri)
    }

    /// A certificate without a name.
    pub fn of_nobody() -> Self {
        Self::default()
    }

    /// It ended a minute ago.
    #[must_use]
    pub fn expired(self) -> Self {
        self.argument("--since", "3600").argument("--until", "60")
    }

    /// It begins in an hour.
    #[must_use]
    pub fn not_yet_valid(self) -> Self {
        self.argument("--since", "-3600")
            .argument("--until", "-7200")
    }

    /// Signed by an authority of which the mesh knows nothing.
    #[must_use]
    pub fn of_a_strange_authority(mut self) -> Self {
        self.is_strange = true;
        self
    }

    #[must_use]
    pub fn for_clients_only(self) -> Self {
        self.argument("--purposes", "client")
    }

    #[must_use]
    pub fn for_servers_only(self) -> Self {
        self.argument("--purposes", "server")
    }

    /// Makes it.
    pub fn issue(self, bed: &Testbed) -> Result<Issued> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(1);
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let path = bed.folder().join(format!("peer-{sequence}"));
        let mut arguments = vec![path.display().to_string()];
        if !self.is_strange {
            let authority = identity_folder(bed).display().to_string();
            arguments.extend(["--authority".to_owned(), authority]);
        }
        arguments.extend(self.arguments);
        certify(&arguments)?;
        Ok(Issued { path })
    }

    fn argument(mut self, name: &str, value: impl Into<String>) -> Self {
        // Joined by `=`: a value may begin with a minus.
        self.arguments.push(format!("{name}={}", value.into()));
        self
    }
}

/// Puts a trust anchor of a bed's agents into its folder, valid from and until so many seconds ago.
pub fn write_anchor(bed: &Testbed, since: i64, until: i64) -> Result<()> {
    let folder = identity_folder(bed);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    certify(&[
        folder.join("ca").display().to_string(),
        "--anchor".to_owned(),
        format!("--since={since}"),
        format!("--until={until}"),
    ])
}

/// A client in a pod.
#[derive(Debug)]
pub struct Client<'a> {
    bed: &'a Testbed,
    pod: &'a Pod,
    certificate: Option<Issued>,
    alpn: &'static str,
    raw: Option<String>,
    dribble: Option<usize>,
}

impl<'a> Client<'a> {
    /// A client without a certificate.
    pub fn new(bed: &'a Testbed, pod: &'a Pod) -> Self {
        Self {
            bed,
            pod,
            certificate: None,
            alpn: "h2",
            raw: None,
            dribble: None,
        }
    }

    #[must_use]
    pub fn with(mut self, certificate: &Issued) -> Self {
        self.certificate = Some(certificate.clone());
        self
    }

    /// The protocol that it offers instead of `h2`; `none` for no ALPN at all.
    #[must_use]
    pub fn offering(mut self, protocol: &'static str) -> Self {
        self.alpn = protocol;
        self
    }

    /// What it sends inside TLS instead of HTTP/2.
    #[must_use]
    pub fn saying(mut self, text: impl Into<String>) -> Self {
        self.raw = Some(text.into());
        self
    }

    /// How many bytes it sends a packet at most.
    #[must_use]
    pub fn dribbling(mut self, bytes: usize) -> Self {
        self.dribble = Some(bytes);
        self
    }

    /// Opens a tunnel to the mesh port of `to` and does `steps` there, one a line, as
    /// `tests/peers/client.py` lists them. Returns the lines that it says.
    pub fn talk(&self, to: impl Into<IpAddr>, steps: &str) -> Result<Vec<String>> {
        let mut command = script("client.py");
        command.extend(anchors(self.bed));
        command.extend(["--to".to_owned(), to.into().to_string()]);
        command.extend(["--alpn".to_owned(), self.alpn.to_owned()]);
        if let Some(bytes) = self.dribble {
            command.extend(["--dribble".to_owned(), bytes.to_string()]);
        }
        if let Some(raw) = &self.raw {
            command.extend(["--raw".to_owned(), raw.clone()]);
        }
        if let Some(certificate) = &self.certificate {
            command.extend(certificate.argument());
        }
        let said = self.pod.command(command).input(steps).run()?.stdout;
        Ok(said.lines().map(str::to_owned).collect())
    }
}

/// Starts a server on the mesh port of a pod. The port that is asked for says what it does; see
/// `tests/peers/server.py`, also for more `arguments`.
pub fn serve(
    bed: &Testbed,
    pod: &Pod,
    certificate: &Issued,
    arguments: &[&str],
) -> Result<Process> {
    let mut command = script("server.py");
    command.extend(anchors(bed));
    command.extend(certificate.argument());
    command.extend(arguments.iter().map(ToString::to_string));
    let server = pod.spawn(command)?;
    server.wait_for_log("ready", START_LIMIT)?;
    Ok(server)
}

impl Issued {
    /// Its number, in hexadecimal digits.
    pub fn serial(&self) -> Result<String> {
        let certificate = self.path.with_extension("crt");
        let done = std_process::Command::new("openssl")
            .args(["x509", "-noout", "-serial", "-in"])
            .arg(certificate)
            .output()
            .context("openssl can't be run")?;
        let said = String::from_utf8(done.stdout)?;
        let serial = said.trim().strip_prefix("serial=");
        Ok(serial.context("openssl says no serial")?.to_owned())
    }

    fn argument(&self) -> [String; 2] {
        ["--certificate".to_owned(), self.path.display().to_string()]
    }
}

/// The folder of a bed's trust anchor and issuer.
pub fn identity_folder(bed: &Testbed) -> PathBuf {
    bed.folder().join("identity")
}

fn anchors(bed: &Testbed) -> [String; 2] {
    let anchors = identity_folder(bed).join("ca.crt");
    ["--anchors".to_owned(), anchors.display().to_string()]
}

fn script(name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("peers")
        .join(name);
    // Without a cache of compiled modules beside the sources.
    vec![
        PYTHON.to_owned(),
        "-B".to_owned(),
        path.display().to_string(),
    ]
}

fn certify(arguments: &[String]) -> Result<()> {
    run_tool("certify.py", arguments)
}

/// Runs a script that needs no namespace.
pub(crate) fn run_tool(name: &str, arguments: &[String]) -> Result<()> {
    let command = script(name);
    let done = std_process::Command::new(&command[0])
        .args(&command[1..])
        .args(arguments)
        .output()
        .context("python3 can't be run")?;
    ensure!(
        done.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
