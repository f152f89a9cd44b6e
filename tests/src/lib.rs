//! Nodes and pods as network namespaces on one machine, for malla's tests, demo and bench.
//!
//! A [`Testbed`] makes nodes (a network namespace with a bridge, a cgroup and a bpffs folder each)
//! and pods (a network namespace on a node's bridge), runs commands in them, starts an agent on
//! each node, and removes all of it when it is dropped:
//!
//! ```no_run
//! use malla_testbed::{PodSpec, Testbed};
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut bed = Testbed::new("hello")?;
//! let (a, b) = (bed.node("a")?, bed.node("b")?);
//! let client = bed.pod(&a, PodSpec::new("client"))?;
//! let server = bed.pod(&b, PodSpec::new("server").port(80).settings("mtls: strict"))?;
//! bed.start_agents()?;
//! let _nginx = server.spawn(["nginx", "-g", "daemon off;"])?;
//! let page = client.run(["curl", "-sS", &format!("http://{}/", server.v4())])?;
//! assert!(page.stdout.contains("nginx"));
//! # Ok(())
//! # }
//! ```
//!
//! Several beds can live at once, in one process or in several. What a bed makes bears the bed's
//! name (`malla-bed-…`) or stands in something that does, and the bed's owner holds a lock for as
//! long as it lives: the next bed of whatever process removes what a dead owner left behind.
//!
//! It needs root, cgroup v2 and the command `ip`; a bpffs is mounted where there is none.

mod accelerated;
mod agent;
mod app;
mod authority;
mod bed;
mod bpf_objects;
mod caller;
mod capture;
mod cgroup;
mod churn;
mod command_line;
mod crowd;
mod descriptors;
mod forwarder;
pub mod hbone;
mod hello;
mod http;
mod inject;
pub mod kernel;
pub mod leftovers;
mod link;
mod mesh_file;
mod metrics;
mod netns;
mod nginx;
mod node;
pub mod packet;
mod pair;
pub mod payload;
mod pod;
mod process;
mod raw;
mod scene;
mod services;
mod silence;
mod socket_option;
mod sockets;
mod spec;
mod streams;
mod wait;

pub use accelerated::Polled;
pub use agent::Agent;
pub use app::App;
pub use authority::{Authority, IdentityVolume};
pub use bed::Testbed;
pub use bpf_objects::BpfObjects;
pub use caller::{Caller, EchoApp, Fate, same_family, say};
pub use capture::Capture;
pub use churn::{Churn, Churners, Held};
pub use crowd::{Crowd, End, Enrolled};
pub use descriptors::{allow_descriptors, allow_many_descriptors};
pub use forwarder::{Impairment, WireStats};
pub use hello::Hello;
pub use http::{Response, get, get_unix};
pub use inject::system_call;
pub use link::Link;
pub use metrics::{Metrics, Sample};
pub use netns::Netns;
pub use nginx::nginx;
pub use node::Node;
pub use pair::{PATIENCE, Pair, SERVICE_PORT, Way, accept, dial_from, listen};
pub use pod::Pod;
pub use process::{Command, Output, Process, binary};
pub use raw::RawSender;
pub use scene::{PORT, SECRET, Scene};
pub use services::{Services, WEB, WEB_PORT, service_address};
pub use socket_option::set_option;
pub use sockets::{TcpSocket, TcpState};
pub use spec::PodSpec;
pub use streams::{Endpoint, Stream, TlsSummary};
pub use wait::{eventually, until};
