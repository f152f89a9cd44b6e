//! The programs' own log, with the numbers of outcomes and reasons put into words.

use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use malla_common::Reason;
use tokio::{io::unix::AsyncFd, task::JoinHandle};

use super::{EbpfLog, programs::Programs};

/// The level that is compiled into the programs at load time: quiet ones cost nothing.
pub fn level(log: EbpfLog) -> u8 {
    match log {
        EbpfLog::Off => 0,
        EbpfLog::Info => aya_log::Level::Info as u8,
        EbpfLog::Debug => aya_log::Level::Debug as u8,
    }
}

/// Reads the log until dropped.
#[derive(Debug)]
pub struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Reader {
    /// None when the programs are quiet or their log can't be read, which is said.
    pub fn start(programs: &mut Programs, log: EbpfLog) -> Option<Self> {
        if log == EbpfLog::Off {
            return None;
        }
        let logger = EbpfLogger::init_with_logger(programs.ebpf(), Words)
            .map_err(|error| error.to_string())
            .and_then(|logger| {
                // SAFETY: the logger owns its ring buffer's descriptor and keeps it until it is
                // dropped with the `AsyncFd`.
                unsafe { AsyncFd::register(logger) }.map_err(|error| error.to_string())
            });
        match logger {
            Ok(mut logger) => Some(Self(tokio::spawn(async move {
                while let Ok(mut guard) = logger.readable_mut().await {
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
            }))),
            Err(error) => {
                tracing::warn!(error, "the eBPF programs' log can't be read");
                None
            }
        }
    }
}

struct Words;

impl Log for Words {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = in_words(&record.args().to_string());
        if record.level() <= log::Level::Info {
            tracing::info!(target: "ebpf", "{line}");
        } else {
            tracing::debug!(target: "ebpf", "{line}");
        }
    }

    fn flush(&self) {}
}

/// `… outcome=2 reason=5` with words in place of the numbers.
fn in_words(line: &str) -> String {
    const OUTCOMES: [&str; 4] = ["steered", "passed", "refused", "dropped"];
    let words: Vec<String> = line
        .split(' ')
        .map(|word| {
            let number = |text: &str| text.parse::<usize>().ok();
            if let Some(outcome) = word.strip_prefix("outcome=").and_then(number) {
                return format!("outcome={}", OUTCOMES.get(outcome).unwrap_or(&"unknown"));
            }
            if let Some(reason) = word.strip_prefix("reason=").and_then(number) {
                let reason = Reason::ALL
                    .get(reason)
                    .map_or("unknown", |reason| reason.as_str());
                return format!("reason={reason}");
            }
            word.replace("::ffff:", "")
        })
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_reads_in_words() {
        let line = format!(
            "egress ::ffff:10.0.0.2:40000 -> ::ffff:10.0.1.2:80 outcome=0 reason={}",
            Reason::Meshed as u8
        );
        assert_eq!(
            in_words(&line),
            "egress 10.0.0.2:40000 -> 10.0.1.2:80 outcome=steered reason=meshed"
        );
    }
}
