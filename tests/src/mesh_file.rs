//! The mesh's configuration as the agents read it: a YAML file made from what the bed has.

use std::fmt::Write;

use crate::{
    leftovers::Claim,
    node::Node,
    pod::Pod,
    spec::{Listing, PodSpec},
};

/// What belongs to the mesh as a whole.
#[derive(Debug, Clone)]
pub(crate) struct MeshWide {
    pub(crate) trust_domain: String,
    pub(crate) certificate_lifetime: String,
    pub(crate) settings: String,
    /// Namespaces with settings of their own, as lines of YAML.
    pub(crate) namespaces: Vec<(String, String)>,
    /// Services, each as lines of YAML, by name.
    pub(crate) services: Vec<(String, String)>,
}

impl Default for MeshWide {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".to_owned(),
            certificate_lifetime: "24h".to_owned(),
            settings: String::new(),
            namespaces: Vec::new(),
            services: Vec::new(),
        }
    }
}

pub(crate) fn write<'a>(
    claim: &Claim,
    mesh: &MeshWide,
    nodes: impl Iterator<Item = &'a Node>,
    pods: impl Iterator<Item = &'a Pod>,
) -> String {
    let mut text = format!(
        "trustDomain: {}\n\
         identity:\n  directory: {}\n  certificateLifetime: {}\n",
        mesh.trust_domain,
        claim.folder.join("identity").display(),
        mesh.certificate_lifetime,
    );
    block(&mut text, 0, "settings", &mesh.settings);
    text.push_str("nodes:\n");
    for node in nodes {
        let [v4, v6] = node.addresses();
        line(&mut text, &format!("- name: {}", node.name()));
        line(&mut text, &format!("  addresses: [\"{v4}\", \"{v6}\"]"));
        line(&mut text, &format!("  cgroup: {}", node.cgroup().display()));
        line(&mut text, &format!("  bpffs: {}", node.bpffs().display()));
        let runtime = node.runtime_folder();
        line(&mut text, &format!("  runtime: {}", runtime.display()));
    }
    if !mesh.namespaces.is_empty() {
        text.push_str("namespaces:\n");
    }
    for (name, settings) in &mesh.namespaces {
        line(&mut text, &format!("- name: {name}"));
        block(&mut text, 2, "settings", settings);
    }
    let mut listed = pods
        .filter(|pod| pod.spec().listing != Listing::Unlisted)
        .peekable();
    let head = if listed.peek().is_some() {
        "workloads:\n"
    } else {
        "workloads: []\n"
    };
    text.push_str(head);
    for pod in listed {
        workload(&mut text, pod);
    }
    if !mesh.services.is_empty() {
        text.push_str("services:\n");
    }
    for (name, fields) in &mesh.services {
        line(&mut text, &format!("- name: {name}"));
        for field in fields.lines() {
            line(&mut text, &format!("  {field}"));
        }
    }
    text
}

fn workload(text: &mut String, pod: &Pod) {
    let PodSpec {
        name,
        namespace,
        account,
        listing,
        ports,
        labels,
        probes,
        ..
    } = pod.spec();
    line(text, &format!("- name: {name}"));
    line(text, &format!("  namespace: {namespace}"));
    line(text, &format!("  serviceAccount: {account}"));
    line(text, &format!("  node: {}", pod.node().name()));
    let netns = pod.netns().path().display();
    line(text, &format!("  netns: {netns}"));
    let addresses = pod.addresses().iter().map(|a| format!("\"{a}\""));
    let addresses = addresses.collect::<Vec<_>>().join(", ");
    line(text, &format!("  addresses: [{addresses}]"));
    if !ports.is_empty() {
        let ports = ports.iter().map(|(name, port)| match name {
            Some(name) => format!("{{name: {name}, port: {port}}}"),
            None => format!("{{port: {port}}}"),
        });
        let ports = ports.collect::<Vec<_>>().join(", ");
        line(text, &format!("  ports: [{ports}]"));
    }
    if !labels.is_empty() {
        let labels = labels
            .iter()
            .map(|(name, value)| format!("{name}: {value}"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        line(text, &format!("  labels: {{{labels}}}"));
    }
    if !probes.is_empty() {
        line(text, "  probes:");
    }
    for probe in probes {
        line(text, &format!("  - {{{probe}}}"));
    }
    let mesh = match listing {
        Listing::Meshed => "enabled",
        Listing::Unmeshed | Listing::Unlisted => "disabled",
    };
    line(text, &format!("  mesh: {mesh}"));
    block(text, 2, "settings", &pod.settings());
}

fn line(text: &mut String, content: &str) {
    text.push_str(content);
    text.push('\n');
}

/// A field whose value is lines of YAML; nothing when there are none.
fn block(text: &mut String, indent: usize, field: &str, lines: &str) {
    if lines.trim().is_empty() {
        return;
    }
    // Writing to a String can't fail.
    let _ = writeln!(text, "{:indent$}{field}:", "");
    for content in lines.lines() {
        let _ = writeln!(text, "{:indent$}  {content}", "");
    }
}
