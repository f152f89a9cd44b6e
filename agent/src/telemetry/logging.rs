//! Sets the process's log up: where it goes, which lines, in which form.
//!
//! Lines go to standard output, one each, as with other programs that run in containers; standard
//! error stays free for what the command line says before there is a log, and for panics, neither
//! of which may get lost in a queue. A thread of its own writes them. Between it and the workers
//! is a queue of [`QUEUE_LINES`]: when a terminal or pipe is stuck, lines are dropped and counted,
//! and no worker waits.
//!
//! An event carries all that it has to say. Spans aren't printed.

mod line;

use std::{fmt, io, mem, thread, time::Duration};

use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

use line::Line;

/// Lines that wait for the writer at most. At half a kilobyte a line these are 8 MiB.
const QUEUE_LINES: usize = 16 * 1024;

/// How long lines gather after some were written, so that where there are many a line costs neither
/// a system call nor a wake-up.
const GATHER: Duration = Duration::from_millis(5);
/// What is written at once at most.
const GATHERED: usize = 64 * 1024;

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// Time, level, target, message and `key=value` pairs, tabs between the first five.
    #[default]
    Text,
    /// An object: level, time, scope, message, then the event's own keys.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("`{filter}` is not a log filter such as `info,access=off`")]
    Filter {
        filter: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("the process has a log already")]
    AlreadySet(#[from] tracing_subscriber::util::TryInitError),
}

/// Writes out what waits in the queue when dropped, for at most a second. Lives as long as `main`.
#[must_use = "dropping it ends the log"]
pub struct LogGuard {
    _writer: WorkerGuard,
    dropped: ErrorCounter,
}

impl LogGuard {
    /// The number of lost lines, for the metrics.
    pub fn dropped_lines(&self) -> DroppedLines {
        DroppedLines(self.dropped.clone())
    }
}

impl fmt::Debug for LogGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogGuard").finish_non_exhaustive()
    }
}

/// How many lines were dropped because the queue was full.
#[derive(Debug, Clone)]
pub struct DroppedLines(ErrorCounter);

impl DroppedLines {
    /// Since the log was set up.
    pub fn count(&self) -> u64 {
        self.0.dropped_lines() as u64
    }
}

/// Sets the process's log up. `filter` has the syntax of `tracing`'s directives (and of
/// `RUST_LOG`): levels for all, and by target.
pub fn init(format: LogFormat, filter: &str) -> Result<LogGuard, LogError> {
    let (writer, guard) = queue(io::stdout(), QUEUE_LINES);
    subscriber(format, filter, writer)?.try_init()?;
    Ok(guard)
}

/// A writer that never blocks, before one that may.
fn queue(writer: impl io::Write + Send + 'static, lines: usize) -> (NonBlocking, LogGuard) {
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(lines)
        .thread_name("malla-log")
        .finish(Batches {
            writer,
            lines: Vec::new(),
        });
    let dropped = writer.error_counter();
    let guard = LogGuard {
        _writer: guard,
        dropped,
    };
    (writer, guard)
}

/// Before the writer, in the thread of the queue, which flushes it when the queue is empty. While it
/// rests, lines gather in the queue.
struct Batches<W> {
    writer: W,
    lines: Vec<u8>,
}

impl<W: io::Write> Batches<W> {
    /// What can't be written is lost: the next lines may go another way.
    fn write_out(&mut self) -> io::Result<()> {
        let lines = mem::take(&mut self.lines);
        self.writer.write_all(&lines)?;
        self.writer.flush()
    }
}

impl<W: io::Write> io::Write for Batches<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.len() + line.len() > GATHERED {
            self.write_out()?;
        }
        if self.lines.is_empty() {
            self.lines.reserve(GATHERED);
        }
        self.lines.extend_from_slice(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()?;
        thread::sleep(GATHER);
        Ok(())
    }
}

fn subscriber<W>(
    format: LogFormat,
    filter: &str,
    writer: W,
) -> Result<impl Subscriber + Send + Sync, LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LogError::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Line(format))
        .with_ansi(false)
        .with_writer(writer);
    Ok(tracing_subscriber::registry().with(filter).with(lines))
}

#[cfg(test)]
pub(super) mod tests;
