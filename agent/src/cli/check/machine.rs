//! What must hold on this machine, whether an agent runs or not.

use std::path::Path;

use super::{Category, Check};
use crate::{
    model::{Mesh, Node},
    steer::{check_cgroup, preflight},
};

/// Below this, a few thousand connections take all of the agent's descriptors.
const FEW_DESCRIPTORS: u64 = 65_536;

/// `path` is the mesh file's and `node` the name of the node, where they are known.
pub(super) fn categories(
    path: Option<&Path>,
    mesh: Option<&anyhow::Result<Mesh>>,
    node: Option<&str>,
) -> Vec<Category> {
    let found = mesh
        .and_then(|mesh| mesh.as_ref().ok())
        .and_then(|mesh| find_node(mesh, node));
    let category = |name, checks| Category { name, checks };
    vec![
        category("kernel", kernel()),
        category("privileges", vec![privileges()]),
        category("mesh-file", mesh_file(path, mesh, node)),
        category("node-folders", folders(found)),
        category("clock", vec![clock()]),
        category("limits", vec![descriptors()]),
    ]
}

fn kernel() -> Vec<Check> {
    let release = preflight::kernel_release();
    vec![
        Check::of(
            format!("is 6.1 or later ({release})"),
            preflight::kernel(&release),
        ),
        Check::of("has BTF", preflight::btf()),
    ]
}

fn privileges() -> Check {
    let what = "may load programs and change networks (CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, \
                CAP_SYS_ADMIN)";
    Check::of(what, preflight::privileges())
}

fn mesh_file(
    path: Option<&Path>,
    mesh: Option<&anyhow::Result<Mesh>>,
    node: Option<&str>,
) -> Vec<Check> {
    let (Some(path), Some(mesh)) = (path, mesh) else {
        return vec![Check::warning(
            "is valid",
            "no agent says which file it is",
            "name it with --config, and the node with --node",
        )];
    };
    let valid = format!("is valid ({})", path.display());
    let mesh = match mesh {
        Ok(mesh) => mesh,
        Err(error) => {
            let fix = "mend the lines above; agents keep the last good state meanwhile";
            return vec![Check::error(valid, format!("{error:#}"), fix)];
        }
    };
    let mut names: Vec<&str> = mesh.nodes.keys().map(String::as_str).collect();
    names.sort_unstable();
    let names = names.join(", ");
    let has_node = match (find_node(mesh, node), node) {
        (Some(node), _) => Check::good(format!("has the node ({})", node.name)),
        (None, Some(node)) => Check::error(
            "has the node",
            format!("no node is named `{node}`"),
            format!("set --node to one of: {names}"),
        ),
        (None, None) => Check::warning(
            "has the node",
            "it has several, and no agent says which is this machine",
            format!("set --node to one of: {names}"),
        ),
    };
    vec![Check::good(valid), has_node]
}

/// The named node; without a name the only one.
fn find_node<'a>(mesh: &'a Mesh, name: Option<&str>) -> Option<&'a Node> {
    match name {
        Some(name) => mesh.nodes.get(name).map(|node| &**node),
        None if mesh.nodes.len() == 1 => mesh.nodes.values().next().map(|node| &**node),
        None => None,
    }
}

fn folders(node: Option<&Node>) -> Vec<Check> {
    let Some(node) = node else {
        return vec![Check::of(
            "has a bpffs (/sys/fs/bpf)",
            preflight::on_bpffs(Path::new("/sys/fs/bpf")),
        )];
    };
    let (cgroup, bpffs) = (node.cgroup.display(), node.bpffs.display());
    vec![
        Check::of(
            format!("cgroup is one of cgroup v2 ({cgroup})"),
            check_cgroup(&node.cgroup),
        ),
        Check::of(
            format!("bpffs is on a bpffs ({bpffs})"),
            preflight::on_bpffs(&node.bpffs),
        ),
    ]
}

fn clock() -> Check {
    let what = "is synchronised";
    if is_synchronised() {
        Check::good(what)
    } else {
        Check::warning(
            what,
            "nothing keeps this machine's clock: when it is off by minutes, other nodes find its \
             certificates not valid yet, or no longer",
            "run chrony or systemd-timesyncd",
        )
    }
}

fn is_synchronised() -> bool {
    // SAFETY: all-zero is a valid `timex` (integers only), and with no mode set the call changes
    // nothing: it fills the struct.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex.status)
    };
    state != -1 && state != libc::TIME_ERROR && status & libc::STA_UNSYNC == 0
}

fn descriptors() -> Check {
    use nix::sys::resource::{Resource, getrlimit};

    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let what = format!("open files of a process may be {FEW_DESCRIPTORS} or more ({hard})");
    if hard >= FEW_DESCRIPTORS {
        Check::good(what)
    } else {
        Check::warning(
            what,
            "each connection takes two descriptors or more of the agent's",
            "raise the hard limit: `ulimit -Hn`, or systemd's LimitNOFILE",
        )
    }
}
