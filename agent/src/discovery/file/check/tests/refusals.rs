//! Tables of bad files with what is said of each.

use super::{NODE, refusal};

#[test]
fn a_text_that_is_no_mesh_file_is_refused_where_it_stops_being_one() {
    for (text, said) in [
        ("", "mesh.yaml:1: unexpected end of file"),
        ("nodes: [", "mesh.yaml:1: nodes: unclosed bracket '['"),
        ("- a", "mesh.yaml:1: expected fields"),
        ("nodes: []", "mesh.yaml:1: `workloads` is missing"),
        (
            "nodes: 5\nworkloads: []",
            "mesh.yaml:1: nodes: expected a list",
        ),
        (
            "nodes: []\nworkloads: []\nnode: 1",
            "mesh.yaml:3: node: unknown field; known here: trustDomain, identity, nodes, settings, \
             namespaces, workloads, services",
        ),
        (
            "nodes:\n- name: a\n  value: b\nworkloads: []",
            "mesh.yaml:3: nodes[0].value: unknown field; known here: name, addresses, cgroup, bpffs, \
             runtime",
        ),
        (
            "nodes: []\nworkloads:\n- addresses: []",
            "mesh.yaml:3: workloads[0]: `name` is missing",
        ),
        (
            "nodes: []\nworkloads:\n- name: a\n  name: b",
            "mesh.yaml:4: workloads[0]: duplicate mapping key `name` is not allowed here",
        ),
        (
            "nodes: []\nworkloads:\n- name: a\n  mesh: on",
            "mesh.yaml:4: workloads[0].mesh: `on` is none of: enabled, disabled",
        ),
        (
            "nodes: []\nworkloads:\n- name: a\n  ports:\n  - port: 70000",
            "mesh.yaml:5: workloads[0].ports[0].port: expected a port, 1 to 65535",
        ),
        (
            "nodes: []\nworkloads:\n- labels:\n    value: [1]",
            "mesh.yaml:4: workloads[0].labels.value: expected text",
        ),
        (
            "nodes: []\nworkloads: []\nsettings:\n  skipInboundPorts: [1, 1.5]",
            "mesh.yaml:4: settings.skipInboundPorts[1]: found floating point `1.5`, expected a port \
             or a range of ports",
        ),
    ] {
        assert_eq!(refusal(text), said, "{text:?}");
    }
}

#[test]
fn what_stands_outside_of_workloads_is_checked() {
    for (text, said) in [
        (
            "trustDomain: Cluster.Local\nnodes: []",
            "1: trustDomain: `Cluster.Local` is no trust domain: 1 to 255 of a-z, 0-9, ., - and _, \
             such as cluster.local",
        ),
        (
            "nodes: []\nidentity: {directory: x, certificateLifetime: 24h}",
            "2: identity.directory: `x` is no absolute path",
        ),
        (
            "nodes: []\nidentity:\n  certificateLifetime: 24",
            "3: identity.certificateLifetime: `24` is no duration such as 500ms, 5s or 24h",
        ),
        (
            "nodes: [{name: a, addresses: [], cgroup: /a, bpffs: /a}]",
            "1: nodes[0].addresses: has no address; at least one is needed",
        ),
        (
            "nodes:\n- {name: a, addresses: [10.0.0.1], cgroup: /a, bpffs: /a}\n\
             - {name: a, addresses: [10.0.0.1], cgroup: a, bpffs: /a}",
            "3: nodes[1].name: there is a node a already (line 2)\n\
             3: nodes[1].addresses[0]: 10.0.0.1 belongs to node a already (line 2)\n\
             3: nodes[1].cgroup: `a` is no absolute path",
        ),
        (
            "nodes: []\nnamespaces:\n- name: a.b\n- name: c\n- name: c",
            "3: namespaces[0].name: `a.b` is no RFC 1123 label: at most 63 of a-z, 0-9 and -, with \
             a letter or digit at both ends\n\
             5: namespaces[2].name: there is a namespace c already (line 4)",
        ),
        (
            "nodes: []\nnamespaces: [{name: c, settings: {connectTimeout: 0s}}]",
            "2: namespaces[0].settings.connectTimeout: a duration of zero leaves no time at all; \
             write at least 1ms",
        ),
    ] {
        let text = format!("{text}\nworkloads: []");
        assert_eq!(refusal(&text).replace("mesh.yaml:", ""), said, "{text:?}");
    }
}

#[test]
fn workloads_are_checked() {
    for (fields, said) in [
        (
            "name: Web, addresses: [10.1.0.1]",
            "name: `Web` is no RFC 1123 subdomain: at most 253 of a-z, 0-9, - and ., with a letter \
             or digit at both ends of each part",
        ),
        (
            "name: w, namespace: -x, addresses: [10.1.0.1]",
            "namespace: `-x` is no RFC 1123 label: at most 63 of a-z, 0-9 and -, with a letter or \
             digit at both ends",
        ),
        (
            "name: w, serviceAccount: a..b, addresses: [10.1.0.1]",
            "serviceAccount: `a..b` is no RFC 1123 subdomain: at most 253 of a-z, 0-9, - and ., \
             with a letter or digit at both ends of each part",
        ),
        (
            "name: w, addresses: []",
            "addresses: has no address; at least one is needed",
        ),
        (
            "name: w, addresses: [web]",
            "addresses[0]: `web` is no IP address",
        ),
        (
            "name: w, addresses: [10.1.0.1/24]",
            "addresses[0]: `10.1.0.1/24` is a network; write the address alone",
        ),
        (
            "name: w, addresses: ['::ffff:10.1.0.1']",
            "addresses[0]: ::ffff:10.1.0.1 is IPv4-mapped; write 10.1.0.1",
        ),
        (
            "name: w, addresses: ['::']",
            "addresses[0]: :: is the unspecified address; write one that others can reach",
        ),
        (
            "name: w, addresses: [127.0.0.1]",
            "addresses[0]: 127.0.0.1 is a loopback address; write one that others can reach",
        ),
        (
            "name: w, addresses: ['ff02::1']",
            "addresses[0]: ff02::1 is a multicast or broadcast address; write one that others can \
             reach",
        ),
        (
            "name: w, addresses: [10.0.0.1]",
            "addresses[0]: 10.0.0.1 belongs to node a already (line 2)",
        ),
        (
            "name: w, addresses: ['fd01::1', 'fd01:0::1']",
            "addresses[1]: fd01::1 belongs to default/w already (line 4)",
        ),
        (
            "name: w, node: b, netns: /w, addresses: [10.1.0.1]",
            "node: there is no node b in this file",
        ),
        (
            "name: w, node: a, addresses: [10.1.0.1]",
            "netns: is missing: the agent enters a meshed pod's network namespace; write its path, \
             or `mesh: disabled`",
        ),
        (
            "name: w, node: a, netns: run/w, addresses: [10.1.0.1]",
            "netns: `run/w` is no absolute path",
        ),
        (
            "name: w, netns: /w, addresses: [10.1.0.1]",
            "netns: stands without `node`: a path means nothing without the node that it is on",
        ),
        (
            "name: w, addresses: [10.1.0.1], ports: [{port: 0}]",
            "ports[0].port: port 0 stands for no port; write 1 to 65535",
        ),
        (
            "name: w, addresses: [10.1.0.1], ports: [{port: 80}, {port: 80}]",
            "ports[1].port: port 80 is declared already (line 4)",
        ),
        (
            "name: w, addresses: [10.1.0.1], ports: [{name: x, port: 80}, {name: x, port: 81}]",
            "ports[1].name: there is a port x already (line 4)",
        ),
        (
            "name: w, addresses: [10.1.0.1], probes: [{tcpSocket: {port: 80}}]",
            "probes: stands without `node`: probes come from the node that the pod is on",
        ),
    ] {
        let text = format!("{NODE}workloads:\n- {{{fields}}}");
        assert_eq!(
            refusal(&text),
            format!("mesh.yaml:4: workloads[0].{said}"),
            "{fields}"
        );
    }
}

#[test]
fn probes_are_checked() {
    for (probe, said) in [
        (
            "{}",
            ": has none of httpGet, tcpSocket and grpc; a probe is exactly one of them",
        ),
        (
            "{tcpSocket: {port: 80}, grpc: {port: 80}}",
            ": has several of httpGet, tcpSocket and grpc; a probe is exactly one of them",
        ),
        (
            "{exec: {command: [true]}}",
            ".exec: unknown field; known here: httpGet, tcpSocket, grpc",
        ),
        ("{tcpSocket: {}}", ".tcpSocket: `port` is missing"),
        (
            "{tcpSocket: {port: 0}}",
            ".tcpSocket.port: port 0 stands for no port; write 1 to 65535",
        ),
        (
            "{grpc: {port: 70000}}",
            ".grpc.port: `70000` is no port; write 1 to 65535, or a name",
        ),
        (
            "{grpc: {port: 15008}}",
            ".grpc.port: 15008 is a port of the agent; write the app's own",
        ),
        (
            "{httpGet: {port: htpp}}",
            ".httpGet.port: there is no port htpp; named are: http, db",
        ),
        (
            "{httpGet: {path: healthz, port: http}}",
            ".httpGet.path: `healthz` is no path; write one that begins with /",
        ),
        (
            "{httpGet: {path: '/a b', port: http}}",
            ".httpGet.path: `/a b` has ' ', which no request has in its path; write it \
             percent-encoded",
        ),
        (
            "{httpGet: {path: '/h#x', port: http}}",
            ".httpGet.path: `/h#x` has '#', which no request has in its path; write it \
             percent-encoded",
        ),
    ] {
        let ports = "ports: [{name: http, port: 80}, {name: db, port: 5432}]";
        let text = format!(
            "{NODE}workloads:\n- {{name: w, node: a, netns: /w, addresses: [10.1.0.1], {ports}, \
             probes: [{probe}]}}"
        );
        assert_eq!(
            refusal(&text),
            format!("mesh.yaml:4: workloads[0].probes[0]{said}"),
            "{probe}"
        );
    }
    let nameless = format!(
        "{NODE}workloads:\n- {{name: w, node: a, netns: /w, addresses: [10.1.0.1], \
         probes: [{{tcpSocket: {{port: db}}}}]}}"
    );
    let said = refusal(&nameless);
    assert!(said.ends_with("there is no port db; `ports` of the workload names none"));
}

#[test]
fn settings_are_checked() {
    for (setting, said) in [
        (
            "mtls: maybe",
            "mtls: `maybe` is none of: permissive, strict",
        ),
        (
            "skipOutboundPorts: [1, x]",
            "skipOutboundPorts[1]: `x` is no port and no range of ports such as 3000-3010",
        ),
        (
            "skipInboundPorts: [0]",
            "skipInboundPorts[0]: port 0 stands for no port; write 1 to 65535",
        ),
        (
            "skipInboundPorts: [-4]",
            "skipInboundPorts[0]: `-4` is no port and no range of ports such as 3000-3010",
        ),
        (
            "skipInboundPorts: [9-8]",
            "skipInboundPorts[0]: the first port is after the last; write 8-9",
        ),
        (
            "skipOutboundSubnets: [10.9.0.1]",
            "skipOutboundSubnets[0]: 10.9.0.1 has no prefix length; write 10.9.0.1/32",
        ),
        (
            "skipOutboundSubnets: [10.9.0.1/16]",
            "skipOutboundSubnets[0]: 10.9.0.1/16 has bits set beyond its prefix; write 10.9.0.0/16",
        ),
        (
            "skipInboundSubnets: [all]",
            "skipInboundSubnets[0]: `all` is no network such as 10.9.0.0/16 or fd00::/8",
        ),
        (
            "skipInboundSubnets: ['::ffff:10.0.0.0/104']",
            "skipInboundSubnets[0]: ::ffff:10.0.0.0/104 is IPv4-mapped; write the IPv4 network",
        ),
        (
            "egressAllowSubnets: [10.9.0.1]",
            "egressAllowSubnets[0]: 10.9.0.1 has no prefix length; write 10.9.0.1/32",
        ),
        (
            "mtlsByPort: [{ports: 0, mode: strict}]",
            "mtlsByPort[0].ports: port 0 stands for no port; write 1 to 65535",
        ),
        (
            "mtlsByPort: [{ports: 80-82, mode: strict}, {ports: 82, mode: permissive}]",
            "mtlsByPort[1].ports: port 82 has another mode in an earlier entry; write it once",
        ),
        (
            "dialPorts: 10000-15006",
            "dialPorts: 10000-15006 contains 15001, a port of the agent; write a range before \
             15001 or after 15008",
        ),
        (
            "dialPorts: 15007-17000",
            "dialPorts: 15007-17000 contains 15008, a port of the agent; write a range before \
             15001 or after 15008",
        ),
        (
            "dialPorts: 20000-20998",
            "dialPorts: 20000-20998 has 999 ports; at least 1000 are needed",
        ),
        (
            "dialPorts: 30000-20000",
            "dialPorts: the first port is after the last; write 20000-30000",
        ),
        (
            "meshConnectTimeout: 0ms",
            "meshConnectTimeout: a duration of zero leaves no time at all; write at least 1ms",
        ),
        (
            "connectTimeout: soon",
            "connectTimeout: `soon` is no duration such as 500ms, 5s or 24h",
        ),
        (
            "idleTimeout: 11years",
            "idleTimeout: 11years is longer than ten years",
        ),
        (
            "maxConnections: 0",
            "maxConnections: a pod without connections is no part of a mesh; write at least 1",
        ),
    ] {
        let text = format!("nodes: []\nworkloads: []\nsettings:\n  {setting}");
        assert_eq!(
            refusal(&text),
            format!("mesh.yaml:4: settings.{said}"),
            "{setting}"
        );
    }
}

#[test]
fn all_mistakes_of_a_file_are_told_at_once() {
    let text = format!(
        "{NODE}workloads:
- name: web-1
  namespace: emojivoto
  node: a
  netns: /run/web
  addresses: [10.1.0.2]
- name: web-2
  node: a
  netns: /run//./web
  addresses:
  - 10.1.0.2
- name: web-1
  namespace: emojivoto
  addresses: [10.1.0.300]
"
    );
    assert_eq!(
        refusal(&text),
        "mesh.yaml:11: workloads[1].netns: /run//./web belongs to emojivoto/web-1 on the same node \
         already (line 7)\n\
         mesh.yaml:13: workloads[1].addresses[0]: 10.1.0.2 belongs to emojivoto/web-1 already (line \
         8)\n\
         mesh.yaml:14: workloads[2].name: there is a workload emojivoto/web-1 already (line 4)\n\
         mesh.yaml:16: workloads[2].addresses[0]: `10.1.0.300` is no IP address"
    );
}

#[test]
fn services_are_checked() {
    let workloads = "workloads:
- {name: web, addresses: [10.1.0.1], ports: [{name: http, port: 8080}]}
- {name: db, addresses: [10.1.0.2]}
services:
";
    for (service, said) in [
        (
            "{name: Web, addresses: [10.96.0.1], ports: [{port: 80}]}",
            "services[0].name: `Web` is no RFC 1123 label: at most 63 of a-z, 0-9 and -, with a \
             letter or digit at both ends",
        ),
        (
            "{name: s, ports: [{port: 80}]}",
            "services[0].addresses: is missing: write the Service's cluster addresses, or \
             `headless: true`",
        ),
        (
            "{name: s, headless: true, addresses: [10.96.0.1]}",
            "services[0].addresses: a headless Service has no address; take out this or `headless`",
        ),
        (
            "{name: s, addresses: [10.1.0.1], ports: [{port: 80}]}",
            "services[0].addresses[0]: 10.1.0.1 belongs to default/web already (line 4)",
        ),
        (
            "{name: s, addresses: [10.96.0.1]}",
            "services[0].ports: is missing: write at least one port",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}, {port: 81, name: b}]}",
            "services[0].ports[0].name: is missing: each port of a Service with several has a name",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80, targetPort: 0}]}",
            "services[0].ports[0].targetPort: `0` is no port; write 1 to 65535",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}], selector: {a: b}, \
             endpoints: [{addresses: [10.1.0.1]}]}",
            "services[0].endpoints: stands beside `selector`, which chooses the endpoints; take \
             out one of them",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80, targetPort: http}], \
             endpoints: [{addresses: [10.1.0.2]}]}",
            "services[0].endpoints[0]: has no port named http, which is the Service's target: \
             default/db is at this address; declare the port there, or write a number as \
             `targetPort`",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}], \
             endpoints: [{addresses: [10.96.0.1]}]}",
            "services[0].endpoints[0].addresses[0]: 10.96.0.1 belongs to Service default/s; an \
             endpoint is no Service",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}], \
             endpoints: [{addresses: [10.1.0.1, 10.1.0.2]}]}",
            "services[0].endpoints[0].addresses[1]: is a second one of this family; write an \
             endpoint for each",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}], sessionAffinityTimeout: 1h}",
            "services[0].sessionAffinityTimeout: means nothing without `sessionAffinity: ClientIP`",
        ),
        (
            "{name: s, addresses: [10.96.0.1], ports: [{port: 80}], \
             trafficDistribution: PreferSameZone}",
            "services[0].trafficDistribution: `PreferSameZone` is none of: PreferClose, \
             PreferSameNode",
        ),
    ] {
        let text = format!("{NODE}{workloads}- {service}\n");
        assert_eq!(refusal(&text), format!("mesh.yaml:7: {said}"), "{service}");
    }
}
