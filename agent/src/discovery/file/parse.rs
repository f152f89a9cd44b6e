//! YAML text to the types of [`super::schema`], with line and field path of what doesn't fit.

use std::fmt::Write as _;

use serde_path_to_error::{Path, Segment};
use serde_saphyr::{Error, MessageFormatter as _, UserMessageFormatter};

use super::{
    error::Problem,
    schema::{
        At, MeshFile, NodeFolders, NodesOnly, ServiceEntry, ServicesOnly, WorkloadEntry,
        WorkloadsOnly,
    },
};

/// Reads the text, or tells the first place where it isn't a mesh file.
pub(super) fn parse(text: &str) -> Result<MeshFile, Problem> {
    // To follow where in the file a value stands costs as much again, and only a bad one is told.
    serde_saphyr::from_str_with_options(text, options()).or_else(|_| parse_and_follow(text))
}

/// The entries of `services` alone, as they stand below that key, which has line 1. None where they
/// aren't such entries, or not they alone.
pub(super) fn services(entries: &str) -> Option<Vec<At<ServiceEntry>>> {
    let text = format!("services:\n{entries}");
    let read = serde_saphyr::from_str_with_options::<ServicesOnly>(&text, options());
    read.ok().map(|file| file.services)
}

/// The same of `workloads`.
pub(super) fn workloads(entries: &str) -> Option<Vec<At<WorkloadEntry>>> {
    let text = format!("workloads:\n{entries}");
    let read = serde_saphyr::from_str_with_options::<WorkloadsOnly>(&text, options());
    read.ok().map(|file| file.workloads)
}

/// The size of the file is the limit of a big mesh: a workload has some thirty nodes.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_events: 32_000_000, max_nodes: 16_000_000 },
        with_snippet: false,
    }
}

fn parse_and_follow(text: &str) -> Result<MeshFile, Problem> {
    let mut field = String::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = field_path(error.path(), error.inner());
            error.into_inner()
        })
    })
    .map_err(|error| Problem {
        line: error
            .location()
            .map(|at| at.line())
            .filter(|line| *line > 0),
        reason: reason(&error),
        field,
    })
}

/// The folders of the file's nodes, whatever the rest of it is like. None where it isn't YAML.
pub fn node_folders(text: &str) -> Vec<NodeFolders> {
    let read = serde_saphyr::from_str::<NodesOnly>(text);
    read.map(|file| file.nodes).unwrap_or_default()
}

/// The path as users write it.
///
/// A value with its line is read through a map of serde-saphyr's own, whose key `value` isn't part
/// of the file. No struct of the schema has a field of that name; labels and selectors may.
fn field_path(path: &Path, error: &Error) -> String {
    let mut text = String::new();
    let mut in_labels = false;
    for segment in path {
        match segment {
            Segment::Seq { index } => {
                // Writing to a String can't fail.
                let _ = write!(text, "[{index}]");
            }
            Segment::Map { key } if key != "value" || in_labels => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
                in_labels = key == "labels" || key == "selector";
            }
            Segment::Map { .. } | Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    if matches!(error.without_snippet(), Error::SerdeUnknownField { field, .. } if field == "value")
    {
        text.push_str(if text.is_empty() { "value" } else { ".value" });
    }
    text
}

fn reason(error: &Error) -> String {
    match error.without_snippet() {
        Error::SerdeUnknownField { expected, .. } => {
            format!("unknown field; known here: {}", expected.join(", "))
        }
        Error::Unexpected { expected, .. } => match *expected {
            "sequence start" => "expected a list".to_owned(),
            "mapping start" => "expected fields".to_owned(),
            "string scalar" => "expected text".to_owned(),
            other => format!("expected {other}"),
        },
        // The only numbers of the schema are ports.
        Error::InvalidScalar { ty: "u16", .. } => "expected a port, 1 to 65535".to_owned(),
        Error::SerdeMissingField { field, .. } => format!("`{field}` is missing"),
        Error::SerdeUnknownVariant {
            variant, expected, ..
        } => format!("`{variant}` is none of: {}", expected.join(", ")),
        Error::SerdeInvalidType {
            unexpected,
            expected,
            ..
        }
        | Error::SerdeInvalidValue {
            unexpected,
            expected,
            ..
        } => format!("found {unexpected}, expected {expected}"),
        other => UserMessageFormatter.format_message(other).into_owned(),
    }
}
