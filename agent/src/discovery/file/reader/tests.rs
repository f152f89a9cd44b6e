//! What is read in part comes to what is read as a whole, whatever has changed.

use std::fmt::Write as _;

use super::*;

/// In the many ways in which entries are written.
const MIXED: &str = r#"# A mesh.
nodes: []
workloads:
  # The first.
  - name: one
    addresses: [10.1.0.1]
    labels: {app: web, "odd key": "a - b"}

  - {name: two, addresses: [10.1.0.2], ports: [{name: http, port: 80}]}
  - name: three
    addresses:
    - 10.1.0.3
    ports:
    - port: 81
  - name: "four"
    addresses:
      [10.1.0.4,
       "fd00::4"]
    mesh: disabled
services:
- name: web
  addresses: [10.96.0.1]
  ports:
  - {port: 80, targetPort: http, name: http}
  - port: 81
    name: text
    appProtocol: |
      - name: in a block
        addresses: []

- name: db  # Elsewhere.
  addresses: [10.96.0.2]
  ports: [{port: 5432, appProtocol: "two
    lines"}]
  endpoints:
  - addresses: [10.200.0.1]
  - addresses: [10.200.0.2]
- name: last
  headless: true
"#;

const ROUNDS: u32 = 600;

/// Lines that mean something else in some places, or nothing in most.
const LINES: [&str; 30] = [
    "",
    "# A comment.",
    "  # A comment.",
    "- name: more",
    "  - name: more",
    "  - {name: five, addresses: [10.1.0.5]}",
    "- {name: other, headless: true}",
    "  headless: true",
    "  addresses: [10.96.0.9]",
    "    addresses: [10.1.0.9]",
    "  endpoints:",
    "  - addresses: [10.200.0.9]",
    "    - addresses: [10.200.0.9]",
    "  ready: false",
    "    ready: false",
    "services:",
    "workloads:",
    "settings: {mtls: strict}",
    "---",
    "...",
    "  appProtocol: |",
    "  appProtocol: >-",
    "      text",
    "  appProtocol: 'open",
    "  appProtocol: \"open",
    "  appProtocol: [",
    "  name: &anchor db",
    "  name: *anchor",
    "- *anchor",
    "  selector: {app: web}",
];

fn path() -> &'static Path {
    Path::new("mesh.yaml")
}

/// What the reader says of the text, which must be what is said of it by itself.
fn read(reader: &mut Reader, text: &str) -> bool {
    let result = reader.check(path(), &text.into());
    match (result, check::check(path(), text)) {
        (Ok(mesh), Ok(whole)) => {
            assert!(mesh == whole, "of:\n{text}");
            true
        }
        (Err(error), Err(whole)) => {
            assert_eq!(error.to_string(), whole.to_string(), "of:\n{text}");
            false
        }
        (result, whole) => panic!("{result:?} where the whole is {whole:?}:\n{text}"),
    }
}

/// Whether what the reader has isn't from one reading: its entries have lines of several texts.
fn was_spliced(reader: &Reader) -> bool {
    let read = reader.last.as_ref().unwrap();
    let whole = parse::parse(&read.text).unwrap();
    let lines = |file: &MeshFile| {
        let workloads = file.workloads.iter().map(|entry| entry.line);
        let services = file.services.iter().map(|entry| entry.line);
        workloads.chain(services).collect::<Vec<_>>()
    };
    lines(&whole) != lines(&read.file)
}

/// Replaces, removes, doubles, moves or puts in a line, one time or more.
fn edited(text: &str, random: &mut fastrand::Rng) -> String {
    let mut lines: Vec<&str> = text.split_inclusive('\n').map(str::trim_end).collect();
    for _ in 0..=random.usize(..2) {
        let place = random.usize(..lines.len());
        let line = LINES[random.usize(..LINES.len())];
        match random.u8(..6) {
            0 => lines[place] = line,
            1 => drop(lines.remove(place)),
            2 => lines.insert(place, lines[place]),
            3 => {
                let other = random.usize(..lines.len());
                lines.swap(place, other);
            }
            _ => lines.insert(place, line),
        }
    }
    let mut edited = lines.join("\n");
    if random.bool() {
        edited.push('\n');
    }
    edited
}

#[test]
fn a_text_that_was_changed_anywhere_is_read_as_its_whole() {
    let mut random = fastrand::Rng::with_seed(7);
    let (mut good, mut spliced, mut text) = (0, 0, MIXED.to_owned());
    let mut reader = Reader::default();
    assert!(read(&mut reader, &text));
    for _ in 0..ROUNDS {
        let next = edited(&text, &mut random);
        if read(&mut reader, &next) {
            good += 1;
            spliced += u32::from(was_spliced(&reader));
            // Far from where it began, few edits are good ones.
            let is_far = next.lines().count().abs_diff(MIXED.lines().count()) > 12;
            text = if is_far { MIXED.to_owned() } else { next };
        }
        read(&mut reader, &text);
    }
    println!("{good} of {ROUNDS} texts were good, {spliced} read in part");
    assert!(good > ROUNDS / 10 && spliced > ROUNDS / 20);
}

#[test]
fn what_stands_behind_the_last_entry_comes_and_goes() {
    let mut reader = Reader::default();
    for behind in [
        "",
        "settings: {mtls: strict}\n",
        "",
        "# A comment.\n",
        "  ports: []\n",
    ] {
        assert!(read(&mut reader, &format!("{MIXED}{behind}")), "{behind}");
    }
}

#[test]
fn line_breaks_of_other_kinds_change_nothing() {
    let mut reader = Reader::default();
    for end in ["\n", "\r\n", "\n", "\u{85}", "\u{2028}", "\n"] {
        let text = format!("{MIXED}- name: more{end}  headless: true\n");
        read(&mut reader, &text);
        read(&mut reader, &text.replace("10.96.0.2", "10.96.0.3"));
        read(&mut reader, &MIXED.replace('\n', end));
    }
}

/// A mesh of so many Services, the first one with this endpoint.
fn many(services: usize, first: &str) -> String {
    let mut text = "nodes: []\nworkloads: []\nservices:\n".to_owned();
    for service in 0..services {
        let last = if service == 0 { first } else { "10.200.0.9" };
        let [high, low] = [service / 250, 1 + service % 250];
        writeln!(
            text,
            "- name: s{service}\n  addresses: [10.96.{high}.{low}]\n  ports: [{{port: 80}}]\n  \
             endpoints:\n  - addresses: [10.200.0.8]\n  - addresses: [{last}]"
        )
        .unwrap();
    }
    text
}

#[test]
fn only_the_entries_that_have_changed_are_read() {
    let texts = ["10.200.0.1", "10.200.0.22"].map(|first| Arc::from(many(100, first)));
    let [old, new]: [Arc<str>; 2] = texts;
    let file = parse::parse(&old).unwrap();
    let read = Read::new(Arc::clone(&old), file);
    assert_eq!(read.services.starts.len(), 100);
    let line_of_second = read.file.services[1].line;
    let read = read.spliced(&new).unwrap();
    assert_eq!(read.file.services.len(), 100);
    // Read alone, and so from line 2 on.
    assert_eq!(read.file.services[0].line, 2);
    assert_eq!(read.file.services[1].line, line_of_second);
    for (number, start) in read.services.starts.iter().enumerate() {
        let head = format!("- name: s{number}\n");
        assert!(new[*start..].starts_with(&head), "{number}");
    }
}

#[test]
fn a_fault_is_told_with_its_line_in_the_whole_text() {
    let mut reader = Reader::default();
    read(&mut reader, &many(10, "10.200.0.1"));
    let text = many(10, "10.200.0.1").replace("- name: s7", "# More.\n# Lines.\n- name: s7");
    read(&mut reader, &text);
    let text = text.replace("10.96.0.9", "10.96.0.10");
    let error = reader.check(path(), &text.as_str().into()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("services[9].addresses[0]"), "{error}");
    assert_eq!(error, check::check(path(), &text).unwrap_err().to_string());
}
