//! What a kernel may do, and what a workload gets by that.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::model::Accelerate;

/// What the self-test has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Why no connection may be accelerated. None: bytes, order, ends and memory are as with TCP.
    pub failure: Option<String>,
    /// What an app can notice all the same, by the words of [`limits`].
    pub limits: Vec<String>,
    /// Whether the memory of what was redirected counts as the socket's (Linux 6.14).
    pub tells_memory: bool,
}

/// What an app that is accelerated may notice.
pub(super) mod limits {
    /// A blocking read that is woken without data (by a reset, a signal, room for another thread's
    /// write) answers EAGAIN.
    pub const BLOCKING_READ: &str = "blocking_read";
    /// splice(2) from the socket doesn't see what was redirected.
    pub const SPLICE: &str = "splice";
    /// FIONREAD doesn't.
    pub const FIONREAD: &str = "fionread";
}

impl Verdict {
    pub(super) fn failed(why: String) -> Self {
        Self {
            failure: Some(why),
            limits: Vec::new(),
            tells_memory: false,
        }
    }

    /// The word for output.
    pub fn as_str(&self) -> &'static str {
        match (&self.failure, self.limits.is_empty()) {
            (Some(_), _) => "refused",
            (None, false) => "limited",
            (None, true) => "transparent",
        }
    }
}

/// What a workload gets, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InForce {
    /// Never [`Accelerate::Auto`].
    pub mode: Accelerate,
    /// A word for metrics.
    pub reason: &'static str,
}

impl InForce {
    /// What a human wants to know of it.
    pub fn why(&self) -> &'static str {
        match self.reason {
            "configured" => "as the settings say",
            "default" => "it is known to help apps, and to be noticed by none, on no kernel yet",
            "not_tried" => "this kernel is being tried",
            "blocking_read" => {
                "on this kernel a blocking read of an accelerated socket that is woken without \
                 data answers EAGAIN"
            }
            _ => "the self-test has failed on this kernel",
        }
    }
}

/// What who asks for `mode` gets on a kernel of this verdict.
pub(super) fn decide(mode: Accelerate, verdict: Option<&Verdict>) -> InForce {
    let off = |reason| InForce {
        mode: Accelerate::Off,
        reason,
    };
    let configured = InForce {
        mode,
        reason: "configured",
    };
    match (mode, verdict) {
        (Accelerate::Off, _) => configured,
        (Accelerate::Auto, _) => off("default"),
        (_, None) => off("not_tried"),
        (_, Some(verdict)) if verdict.failure.is_some() => off("self_test"),
        // The kernel takes over how the app reads as soon as what it sends is to be redirected.
        (Accelerate::Safe, Some(verdict))
            if verdict
                .limits
                .iter()
                .any(|word| word == limits::BLOCKING_READ) =>
        {
            off(limits::BLOCKING_READ)
        }
        _ => configured,
    }
}

/// The verdict of an agent of this version since the machine was started.
#[derive(Debug)]
pub(super) struct Cache {
    path: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Cached {
    boot: String,
    version: String,
    refuses_splices: bool,
    verdict: Verdict,
}

impl Cache {
    pub(super) fn new(runtime: &Path) -> Self {
        Self {
            path: runtime.join("acceleration.json"),
        }
    }

    /// What was found of programs that refuse splices, or of ones that don't.
    pub(super) fn read(&self, refuses_splices: bool) -> Option<Verdict> {
        let cached: Cached = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        let is_ours = cached.boot == boot()
            && cached.version == version()
            && cached.refuses_splices == refuses_splices;
        is_ours.then_some(cached.verdict)
    }

    /// Without it the next agent tries again.
    pub(super) fn write(&self, verdict: &Verdict, refuses_splices: bool) {
        let cached = Cached {
            boot: boot(),
            version: version().to_owned(),
            refuses_splices,
            verdict: verdict.clone(),
        };
        let written = serde_json::to_vec(&cached)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&self.path, text));
        if let Err(error) = written {
            tracing::debug!(path = %self.path.display(), %error, "can't keep the verdict");
        }
    }
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Another word after each start of the machine.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::ScratchFolder;

    fn sound(limits: &[&str]) -> Verdict {
        Verdict {
            failure: None,
            limits: limits.iter().map(|word| (*word).to_owned()).collect(),
            tells_memory: true,
        }
    }

    #[test]
    fn a_workload_gets_what_it_asks_for_where_the_kernel_can() {
        use Accelerate::{Auto, Full, Off, Safe};
        let (broken, transparent) = (Verdict::failed("order".into()), sound(&[]));
        let (limited, spliced) = (sound(&["blocking_read"]), sound(&["splice", "fionread"]));
        for (asked, verdict, mode, reason) in [
            (Off, Some(&transparent), Off, "configured"),
            (Auto, Some(&transparent), Off, "default"),
            (Auto, None, Off, "default"),
            (Full, None, Off, "not_tried"),
            (Full, Some(&broken), Off, "self_test"),
            (Safe, Some(&broken), Off, "self_test"),
            (Full, Some(&limited), Full, "configured"),
            (Safe, Some(&limited), Off, "blocking_read"),
            (Safe, Some(&spliced), Safe, "configured"),
        ] {
            let expected = InForce { mode, reason };
            assert_eq!(decide(asked, verdict), expected, "{asked:?} by {verdict:?}");
        }
    }

    #[test]
    fn a_verdict_holds_until_the_machine_or_the_agent_is_another() {
        let folder = ScratchFolder::new();
        let cache = Cache::new(folder.path());
        assert_eq!(cache.read(false), None);
        cache.write(&sound(&["splice"]), false);
        assert_eq!(cache.read(false), Some(sound(&["splice"])));
        assert_eq!(cache.read(true), None);
        let text = fs::read_to_string(&cache.path).unwrap();
        let other_boot = text.replacen(boot().trim(), "another", 1);
        let other_version = text.replacen(version(), "0.0.0-other", 1);
        for other in [other_boot, other_version, "{".to_owned()] {
            assert_ne!(other, text);
            fs::write(&cache.path, other).unwrap();
            assert_eq!(cache.read(false), None);
        }
    }
}
