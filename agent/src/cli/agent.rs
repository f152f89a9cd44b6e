//! `malla agent`: runs the agent, or cleans up after agents.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    agent::{self, Options},
    cleanup,
    model::Accelerate,
    steer::{EbpfLog, TcMethod},
    telemetry::{self, LogFormat, Metrics},
};

/// Threads of the control side beside the main one. The kernel makes who changes a network wait for
/// others that do: certificates are to be had meanwhile.
const CONTROL_THREADS: usize = 2;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The YAML file with nodes, workloads and settings; followed while the agent runs.
    #[arg(long, value_name = "FILE", required_unless_present = "cleanup")]
    config: Option<PathBuf>,
    /// Name of the node in the file that this agent is for.
    #[arg(
        long,
        env = "NODE_NAME",
        value_name = "NAME",
        required_unless_present = "cleanup"
    )]
    node: Option<String>,
    /// Form of the log.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged, as `tracing` filters are written; `access=off` silences the access log.
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// What the eBPF programs log of each decision (`debug` shows its addresses).
    #[arg(long, value_enum, default_value_t = EbpfLog::Off, value_name = "LEVEL")]
    log_ebpf: EbpfLog,
    /// Attach TC programs by filters of a clsact qdisc, as kernels before 6.6 need it, where this
    /// one has links: what such kernels get can be tried on any.
    #[arg(long, hide = true)]
    tc_filters: bool,
    /// Take the place of the agent that is in charge of this node, without a cut: new connections
    /// come here once all pods are enrolled, and the other one carries what it has to its end.
    #[arg(long)]
    takeover: bool,
    /// Run no agent, but remove all that agents of this node leave on purpose when they end, say
    /// what it was, and end. Refused while one lives.
    #[arg(long, conflicts_with = "takeover")]
    cleanup: bool,
    /// The node's bpffs folder, where a cleanup can't read it from the file.
    #[arg(long, value_name = "FOLDER", requires = "cleanup")]
    bpffs: Option<PathBuf>,
    /// How long live connections may go on after SIGTERM, or after another agent has taken over.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "15m", value_name = "DURATION")]
    drain_limit: Duration,
    /// How long a pod's connections may go on when it has left the mesh.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "60s", value_name = "DURATION")]
    withdraw_limit: Duration,
    /// Worker threads; by default one for each processor that the agent may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(malla_common::MAX_WORKERS)))]
    workers: Option<u16>,
    /// How far connections between an app and this agent are taken past the network stack where the
    /// workload's own `accelerate` is `auto`; `off` turns it off for all of them.
    #[arg(long, value_enum, default_value_t = Accelerate::Auto, value_name = "MODE")]
    accelerate: Accelerate,
}

/// Runs until it is told to end.
pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (config, node) = match (arguments.config, arguments.node) {
        (Some(config), Some(node)) if !arguments.cleanup => (config, node),
        // Without a cleanup both are required.
        (config, node) => {
            let bpffs = arguments.bpffs;
            let options = cleanup::Options {
                config,
                node,
                bpffs,
            };
            return control_runtime()?.block_on(cleanup::run(&options));
        }
    };
    let mut filter = arguments.log;
    if arguments.log_ebpf == EbpfLog::Debug {
        filter.push_str(",ebpf=debug");
    }
    let log = telemetry::init_logging(arguments.log_format, &filter)?;
    let metrics = Arc::new(Metrics::new());
    metrics.watch_log(log.dropped_lines());
    let options = Options {
        config,
        node,
        ebpf_log: arguments.log_ebpf,
        tc_method: if arguments.tc_filters {
            TcMethod::Filters
        } else {
            TcMethod::of_kernel()
        },
        takeover: arguments.takeover,
        drain_limit: arguments.drain_limit,
        withdraw_limit: arguments.withdraw_limit,
        workers: arguments.workers,
        accelerate: arguments.accelerate,
    };
    control_runtime()?.block_on(agent::run(options, metrics))
}

fn control_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
}
