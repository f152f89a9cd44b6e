//! How long a thread was busy.

use std::{fs::File, os::unix::fs::FileExt, time::Duration};

use nix::time::{ClockId, clock_gettime};

use crate::ledger::{Accounted, Kind};

/// Time of a thread since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Used {
    /// On a processor.
    pub ran: Duration,
    /// Ready to run, without a processor. Zero, where the kernel doesn't tell.
    pub waited: Duration,
}

/// Measures the thread that made it.
#[derive(Debug)]
pub(super) struct Meter {
    /// `schedstat(5)` of the thread; absent in a kernel that keeps none.
    schedule: Option<Accounted<File>>,
}

impl Meter {
    pub(super) fn of_this_thread() -> Self {
        let schedule = File::open("/proc/thread-self/schedstat").ok();
        Self {
            schedule: schedule.map(|file| Accounted::new(file, 0, Kind::Meter)),
        }
    }

    pub(super) fn used(&self) -> Used {
        self.scheduled().unwrap_or_else(|| Used {
            ran: processor_time(),
            waited: Duration::ZERO,
        })
    }

    fn scheduled(&self) -> Option<Used> {
        let mut text = [0; 64];
        let length = self.schedule.as_ref()?.read_at(&mut text, 0).ok()?;
        parse(std::str::from_utf8(&text[..length]).ok()?)
    }
}

/// The first two numbers, in nanoseconds.
fn parse(schedstat: &str) -> Option<Used> {
    let mut numbers = schedstat.split_ascii_whitespace().map(str::parse);
    Some(Used {
        ran: Duration::from_nanos(numbers.next()?.ok()?),
        waited: Duration::from_nanos(numbers.next()?.ok()?),
    })
}

/// Processor time that the calling thread has used.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_busy_thread_is_measured_and_a_sleeping_one_is_not() {
        for meter in [Meter::of_this_thread(), Meter { schedule: None }] {
            let (began, target) = (Instant::now(), meter.used().ran + Duration::from_millis(20));
            while meter.used().ran < target {
                assert!(began.elapsed() < Duration::from_secs(10));
            }
            let before = meter.used().ran;
            std::thread::sleep(Duration::from_millis(100));
            assert!(meter.used().ran < before + Duration::from_millis(50));
        }
    }

    #[test]
    fn what_is_no_schedstat_is_passed_over() {
        let (ran, waited) = (Duration::from_nanos(5), Duration::from_nanos(7));
        assert_eq!(parse("5 7 1\n"), Some(Used { ran, waited }));
        for text in ["", "5", "a b c"] {
            assert_eq!(parse(text), None);
        }
    }
}
