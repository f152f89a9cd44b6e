//! The command line: what is wrong with one, and the schema that it prints.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::fs;

use malla_testbed::{Node, Output, PodSpec, Testbed, binary};

/// What an agent on the node says that is started by `arguments`.
fn malla(bed: &Testbed, node: &Node, arguments: &str) -> Output {
    let program = binary("malla").unwrap().display().to_string();
    let mesh = bed.mesh_path().display().to_string();
    let line = format!("{program} {arguments}").replace("MESH", &mesh);
    node.command(line.split(' ')).output().unwrap()
}

#[test]
fn a_wrong_command_line_ends_with_one_clear_message() {
    let mut bed = Testbed::new("bad-line").unwrap();
    let node = bed.node("a").unwrap();
    bed.write_mesh().unwrap();
    let folder = bed.folder().display().to_string();
    for (arguments, says) in [
        ("agent --config MESH --node b", "no node is named `b`"),
        ("agent --config MESH --node b", "[\"a\"]"),
        ("agent --config /no/such.yaml --node a", "/no/such.yaml"),
        (
            &format!("agent --config {folder} --node a"),
            "not a regular file",
        ),
        ("agent --config MESH", "--node <NAME>"),
        ("agent --node a", "--config <FILE>"),
        ("agent --config MESH --node a --workers 0", "--workers <N>"),
        (
            "agent --config MESH --node a --drain-limit 5",
            "--drain-limit <DURATION>",
        ),
        ("agent --config MESH --node a --log-ebpf loud", "debug"),
        (
            "agent --config MESH --node a --log no=such=filter",
            "no=such=filter",
        ),
        ("agent --cleanup --config MESH --node b", "[\"a\"]"),
        ("agent --cleanup --config MESH --takeover", "cannot be used"),
        ("agent --config MESH --node a --bpffs /x", "--cleanup"),
        ("agnet", "agent"),
        ("", "Usage"),
    ] {
        let output = malla(&bed, &node, arguments.trim());
        let Output { status, stderr, .. } = output;
        assert!(
            matches!(status.code(), Some(1 | 2)),
            "{arguments}: {status}\n{stderr}"
        );
        assert!(stderr.contains(says), "`{says}` isn't in: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// Says what is wrong with a YAML file by a schema, both given as arguments.
const VALIDATE: &str = "
import json, sys, jsonschema, yaml
schema, file = json.load(open(sys.argv[1])), yaml.safe_load(open(sys.argv[2]))
validator = jsonschema.validators.validator_for(schema)
validator.check_schema(schema)
for error in validator(schema).iter_errors(file):
    print(list(error.path), error.message)
";

#[test]
fn the_schema_takes_the_mesh_file_of_a_bed_and_refuses_an_unknown_field() {
    let mut bed = Testbed::new("schema")
        .unwrap()
        .with_settings("mtls: strict\nskipOutboundPorts: [\"25\", \"100-200\"]")
        .with_namespace("shop", "failMode: open");
    let node = bed.node("a").unwrap();
    let spec = PodSpec::new("web").namespace("shop").label("app", "web");
    bed.pod(&node, spec.named_port("http", 80)).unwrap();
    bed.pod(&node, PodSpec::new("plain").unmeshed()).unwrap();
    let schema = bed.folder().join("schema.json");
    fs::write(&schema, malla(&bed, &node, "schema").stdout).unwrap();
    let validate = || {
        let (schema, mesh) = (&schema.display().to_string(), &bed.mesh_path());
        let mesh = mesh.display().to_string();
        let line = ["/usr/bin/python3", "-c", VALIDATE, schema, &mesh];
        node.run(line).unwrap().stdout
    };
    bed.write_mesh().unwrap();
    assert_eq!(validate(), "");
    let wrong = bed
        .mesh_yaml()
        .replace("  mesh: enabled", "  mash: enabled");
    bed.write_mesh_text(&wrong).unwrap();
    assert!(
        validate().contains("'mash' was unexpected"),
        "{}",
        validate()
    );
}
