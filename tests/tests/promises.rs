//! The tests that ARCHITECTURE.md names for what is promised, and SECURITY.md for what is attacked,
//! are there.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The Rust files below a folder.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// How many tests `text` names. Panics where one of them doesn't exist.
fn named_tests(root: &Path, text: &str) -> usize {
    let mut files = Vec::new();
    for folder in ["tests/tests", "agent/src", "common/src"] {
        sources(&root.join(folder), &mut files);
    }
    let (mut file, mut named) = (String::new(), 0);
    // What stands between backticks: a file, then tests in it. Another word isn't so long.
    for word in text.split('`').skip(1).step_by(2) {
        if Path::new(word).extension().is_some_and(|end| end == "rs") {
            let found = files.iter().find(|path| path.ends_with(word));
            let found = found.unwrap_or_else(|| panic!("no file {word}"));
            file = fs::read_to_string(found).unwrap();
        } else if word.matches('_').count() > 2 {
            assert!(file.contains(&format!("fn {word}(")), "no test {word}");
            named += 1;
        }
    }
    named
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn each_promise_names_tests_that_exist() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, section) = text.split_once("## What is promised").unwrap();
    let named = named_tests(&root(), section.split("\n## ").next().unwrap());
    assert!(named > 50, "{named} tests are named");
}

#[test]
fn each_attack_names_tests_that_exist() {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let named = named_tests(&root(), &text);
    assert!(named > 40, "{named} tests are named");
}

/// Who has met a word in a log or a metric finds there what it means.
#[test]
fn readme_has_each_reason_of_a_refused_connection() {
    let read = |file| fs::read_to_string(root().join(file)).unwrap();
    let (readme, reasons) = (read("README.md"), read("common/src/reason.rs"));
    let (_, section) = readme.split_once("\n## Ask why\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let (_, list) = reasons.split_once("\nreasons! {").unwrap();
    let words = list.split("\n}").next().unwrap().split(" = \"").skip(1);
    let words: Vec<&str> = words.map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(words.len() > 40, "{words:?}");
    for word in words {
        assert!(section.contains(&format!("`{word}`")), "`{word}`");
    }
}
