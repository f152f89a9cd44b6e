//! Also lends other modules' tests a log that they can read.

use std::{
    io,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use super::*;

/// Lines that a subscriber of [`capture`] has written.
#[derive(Clone, Default)]
pub(in crate::telemetry) struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(in crate::telemetry) fn capture(
    format: LogFormat,
    filter: &str,
) -> (Lines, impl Subscriber + Send + Sync) {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = subscriber(format, filter, move || writer.clone()).unwrap();
    (lines, subscriber)
}

/// What `logs` writes to a log of this form and filter.
pub(in crate::telemetry) fn captured(
    format: LogFormat,
    filter: &str,
    logs: impl FnOnce(),
) -> String {
    let (lines, subscriber) = capture(format, filter);
    tracing::subscriber::with_default(subscriber, logs);
    lines.text()
}

#[test]
fn no_value_can_begin_a_line_or_column_of_its_own() {
    let line = captured(LogFormat::Text, "info", || {
        tracing::info!(name = %"a\nb\tc", quoted = "d\n", "said \"e\nf\"");
    });
    let (_time, rest) = line.split_once('\t').unwrap();
    let target = module_path!();
    assert_eq!(
        rest,
        format!("info\t{target}\tsaid \"e\\nf\"\tname=a\\nb\\tc quoted=\"d\\n\"\n")
    );
}

#[test]
fn json_keeps_types_and_escapes() {
    let line = captured(LogFormat::Json, "debug", || {
        tracing::debug!(n = -1, half = 0.5, yes = true, text = "\"\n", "m");
    });
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["level"], "debug");
    assert_eq!(line["message"], "m");
    assert_eq!(line["n"], -1);
    assert_eq!(line["half"], 0.5);
    assert_eq!(line["yes"], true);
    assert_eq!(line["text"], "\"\n");
}

#[test]
fn a_filter_that_makes_no_sense_is_refused_by_name() {
    let error = subscriber(LogFormat::Text, "info,access=loud", io::sink).err();
    let error = error.unwrap().to_string();
    assert!(error.contains("info,access=loud"), "{error}");
}

/// A pipe that nobody reads, until the sender is dropped.
struct Stuck(mpsc::Receiver<()>);

impl io::Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _closed = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_reader_costs_lines_and_no_time() {
    let (release, stuck) = mpsc::channel();
    let (writer, guard) = queue(Stuck(stuck), 8);
    let dropped = guard.dropped_lines();
    let subscriber = subscriber(LogFormat::Text, "info", writer).unwrap();
    let begun = Instant::now();
    tracing::subscriber::with_default(subscriber, || {
        for number in 0..10_000 {
            tracing::info!(number);
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(5));
    // `GATHERED` of 70 bytes or more a line are in the writer's hands, and eight lines wait.
    assert!(dropped.count() >= 9_000, "{}", dropped.count());
    drop(release);
}

/// Refuses what is written first, and keeps each further write.
#[derive(Clone, Default)]
struct Broken {
    writes: Arc<Mutex<Vec<String>>>,
    has_refused: bool,
}

impl io::Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.has_refused {
            self.has_refused = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        self.writes.lock().unwrap().push(text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_are_written_together_and_none_is_kept_that_could_not_be() {
    let pipe = Broken::default();
    let mut batches = Batches {
        writer: pipe.clone(),
        lines: Vec::new(),
    };
    let mut write = |lines: &[&str]| {
        for line in lines {
            io::Write::write_all(&mut batches, line.as_bytes()).unwrap();
        }
        io::Write::flush(&mut batches)
    };
    assert!(write(&["lost\n"]).is_err());
    write(&["one\n", "two\n", "three\n"]).unwrap();
    let long = "x".repeat(GATHERED - 2) + "\n";
    write(&["a\n", &long, "b\n"]).unwrap();
    let writes = pipe.writes.lock().unwrap();
    assert_eq!(*writes, ["one\ntwo\nthree\n", "a\n", &long, "b\n"]);
}
