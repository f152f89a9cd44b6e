//! What a new snapshot means for one node, so that a reload touches only what changed.

use std::sync::Arc;

use crate::model::{Mesh, Workload};

/// What became of one node's enrolled workloads between two snapshots. Each list is sorted by id,
/// and a workload stands in at most one of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// To be enrolled.
    pub added: Vec<Arc<Workload>>,
    /// To be withdrawn, as they were.
    pub removed: Vec<Arc<Workload>>,
    /// Another netns, addresses or identity under the same id: to be withdrawn as they were and
    /// enrolled as they are.
    pub reenrolled: Vec<Changed>,
    /// Only settings, ports or labels differ: the enrolment stays and takes what is new.
    pub updated: Vec<Changed>,
}

/// One workload before and after.
#[derive(Debug, PartialEq, Eq)]
pub struct Changed {
    pub old: Arc<Workload>,
    pub new: Arc<Workload>,
}

/// Compares the workloads that are enrolled on `node` in `old` and in `new`. A workload that moves
/// to another node, leaves the mesh or joins it counts as removed or added.
pub fn changes(old: &Mesh, new: &Mesh, node: &str) -> Changes {
    let mut changes = Changes::default();
    let enrolled_in = |mesh: &Mesh, workload: &Workload| {
        let found = mesh.workloads.get(&workload.id)?;
        (found.node == node && found.is_enrolled()).then(|| Arc::clone(found))
    };
    for before in old.enrolled_on(node) {
        if enrolled_in(new, before).is_none() {
            changes.removed.push(Arc::clone(before));
        }
    }
    for after in new.enrolled_on(node) {
        let Some(before) = enrolled_in(old, after) else {
            changes.added.push(Arc::clone(after));
            continue;
        };
        if Arc::ptr_eq(&before, after) || before == *after {
            continue;
        }
        let list = if before.has_same_enrolment(after) {
            &mut changes.updated
        } else {
            &mut changes.reenrolled
        };
        list.push(Changed {
            old: before,
            new: Arc::clone(after),
        });
    }
    changes.added.sort_by(|a, b| a.id.cmp(&b.id));
    changes.removed.sort_by(|a, b| a.id.cmp(&b.id));
    changes.reenrolled.sort_by(|a, b| a.new.id.cmp(&b.new.id));
    changes.updated.sort_by(|a, b| a.new.id.cmp(&b.new.id));
    changes
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::discovery::file;

    const WEB: &str = "{name: web, node: a, netns: /run/web, addresses: [10.1.0.1, 10.1.0.2]}";
    const DB: &str = "{name: db, node: a, netns: /run/db, addresses: [10.1.0.3]}";
    const FAR: &str = "{name: far, node: b, netns: /run/far, addresses: [10.1.0.4]}";

    fn mesh(workloads: &[&str]) -> Mesh {
        let text = format!(
            "nodes:\n\
             - {{name: a, addresses: [10.0.0.1], cgroup: /a, bpffs: /a}}\n\
             - {{name: b, addresses: [10.0.0.2], cgroup: /b, bpffs: /b}}\n\
             workloads: [{}]",
            workloads.join(", ")
        );
        file::check(Path::new("mesh.yaml"), &text).unwrap()
    }

    /// Added, removed, reenrolled and updated names of node `a`, each list joined by spaces.
    fn names(old: &[&str], new: &[&str]) -> [String; 4] {
        let Changes {
            added,
            removed,
            reenrolled,
            updated,
        } = changes(&mesh(old), &mesh(new), "a");
        let join = |list: Vec<Arc<Workload>>| {
            let names: Vec<_> = list.iter().map(|w| w.id.name.as_str()).collect();
            names.join(" ")
        };
        let new = |list: Vec<Changed>| join(list.into_iter().map(|c| c.new).collect());
        [join(added), join(removed), new(reenrolled), new(updated)]
    }

    #[test]
    fn equal_snapshots_change_nothing() {
        assert_eq!(
            changes(&mesh(&[WEB, DB]), &mesh(&[DB, WEB]), "a"),
            Changes::default()
        );
    }

    #[test]
    fn workloads_of_this_node_come_and_go() {
        assert_eq!(names(&[DB], &[WEB]), ["web", "db", "", ""]);
        assert_eq!(names(&[], &[WEB, DB, FAR]), ["db web", "", "", ""]);
    }

    #[test]
    fn another_nodes_workloads_change_nothing_here() {
        assert_eq!(names(&[WEB, FAR], &[WEB]), ["", "", "", ""]);
    }

    #[test]
    fn what_an_enrolment_is_made_of_needs_another_one() {
        for (what, change) in [
            ("netns", WEB.replace("/run/web", "/run/web2")),
            ("addresses", WEB.replace("10.1.0.2", "10.1.0.9")),
            (
                "identity",
                WEB.replace("name: web,", "name: web, serviceAccount: x,"),
            ),
        ] {
            assert_eq!(names(&[WEB], &[&change]), ["", "", "web", ""], "{what}");
        }
    }

    #[test]
    fn settings_ports_labels_and_the_order_of_addresses_keep_the_enrolment() {
        for (what, change) in [
            (
                "settings",
                WEB.replace("node: a", "node: a, settings: {mtls: strict}"),
            ),
            (
                "ports",
                WEB.replace("node: a", "node: a, ports: [{port: 80}]"),
            ),
            (
                "probes",
                WEB.replace("node: a", "node: a, probes: [{tcpSocket: {port: 80}}]"),
            ),
            (
                "labels",
                WEB.replace("node: a", "node: a, labels: {app: web}"),
            ),
            (
                "order",
                WEB.replace("10.1.0.1, 10.1.0.2", "10.1.0.2, 10.1.0.1"),
            ),
        ] {
            assert_eq!(names(&[WEB], &[&change]), ["", "", "", "web"], "{what}");
        }
    }

    #[test]
    fn leaving_the_mesh_or_the_node_is_a_removal_and_coming_back_an_addition() {
        let unmeshed = WEB.replace("node: a", "node: a, mesh: disabled");
        let moved = WEB.replace("node: a", "node: b");
        for other in [&unmeshed, &moved] {
            assert_eq!(names(&[WEB], &[other]), ["", "web", "", ""]);
            assert_eq!(names(&[other], &[WEB]), ["web", "", "", ""]);
        }
    }
}
