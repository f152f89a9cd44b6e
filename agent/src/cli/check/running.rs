//! What must hold in the running agent: judged from what it says of itself.

use std::time::{Duration, SystemTime};

use super::{Category, Check, Running};
use crate::cli::{
    metrics::Metrics,
    view::{AccelerationInForce, Audit, Certificates, Config, Ledger},
};

/// Trust anchors and issuers that end sooner are told of, as Linkerd does: to replace them takes
/// people. What renews itself has done so before.
const SOON: Duration = Duration::from_hours(60 * 24);
/// A workload's certificate is renewed at 70 % of its life: one that has less than this share left
/// has failed to be.
const LATE_RENEWAL: f64 = 0.2;
/// As long as the ledger and the kernel differ over a descriptor before it is a leak.
const LEAK_SECONDS: u64 = 10;
/// Audits run every five seconds.
const OLD_AUDIT: Duration = Duration::from_mins(1);
/// Share of the agent's descriptors in use from which on they may run out.
const MANY_DESCRIPTORS: f64 = 0.8;

/// `lifetime` is that of workloads' certificates, where the mesh file could be read.
pub(super) fn categories(
    running: &Running,
    lifetime: Option<Duration>,
    now: SystemTime,
) -> Vec<Category> {
    let mut categories = vec![Category {
        name: "agent",
        checks: agent(running),
    }];
    // Without an agent there is nothing more to look at, and the reason stands above.
    if let Ok(config) = &running.config {
        let more = [
            ("steering", steering(config)),
            (
                "identity",
                identity(&config.certificates, config, lifetime, now),
            ),
            ("agent-limits", vec![descriptors(&running.metrics)]),
            ("ledger", vec![ledger(&config.ledger)]),
            ("audit", audit(&config.audit, now)),
            ("acceleration", acceleration(config)),
        ];
        categories.extend(more.map(|(name, checks)| Category { name, checks }));
    }
    categories
}

fn agent(running: &Running) -> Vec<Check> {
    let what = running.client.as_ref().map_or_else(
        |_| "answers on its unix socket".to_owned(),
        |client| format!("answers on its unix socket ({})", client.socket().display()),
    );
    let config = match &running.config {
        Ok(config) => config,
        Err(error) => {
            let error = format!("{error:#}");
            let (reason, fix) = error.rsplit_once(": ").unwrap_or((&error, ""));
            return vec![Check::error(what, reason, fix)];
        }
    };
    let own = env!("CARGO_PKG_VERSION");
    let version = if config.version == own {
        Check::good(format!("is of this program's version ({own})"))
    } else {
        Check::warning(
            "is of this program's version",
            format!("it is {}, this program is {own}", config.version),
            "upgrade it with `malla agent --takeover`, or use its own program",
        )
    };
    let ready = match &running.unready {
        None => Check::good("is ready"),
        Some(pending) => Check::error(
            "is ready",
            format!("it waits for: {}", pending.trim_end().replace('\n', ", ")),
            "its log says why that isn't done; `cgroup` means that somebody moved it out of its \
             own, which a restart mends",
        ),
    };
    let in_force = if config.mesh.in_force {
        Check::good("has the mesh file in force as it is now")
    } else {
        let refusal = config.mesh.last_refusal.as_ref();
        Check::error(
            "has the mesh file in force as it is now",
            refusal.map_or("it was refused", |refusal| refusal.report.as_str()),
            "mend the file: until then the last good state is in force",
        )
    };
    vec![Check::good(what), version, ready, in_force]
}

/// What the kernel may do, and who asks for more than that.
fn acceleration(config: &Config) -> Vec<Check> {
    let kernel = &config.acceleration;
    let found = match (&kernel.verdict, &kernel.failure) {
        (None, _) => Check::good("is asked for by no workload, so this kernel hasn't been tried"),
        (Some(_), Some(failure)) => Check::warning(
            "is possible on this kernel",
            failure,
            "use another kernel, or set `accelerate: off`",
        ),
        (Some(verdict), None) if kernel.limits.is_empty() => {
            Check::good(format!("is possible on this kernel ({verdict})"))
        }
        (Some(verdict), None) => Check::good(format!(
            "is possible on this kernel ({verdict}: {})",
            kernel.limits.join(", ")
        )),
    };
    let is_refused = |asked: &str, pod: &AccelerationInForce| {
        matches!(asked, "safe" | "full") && pod.mode == "off" && pod.reason != "configured"
    };
    let pods = config.workloads.iter();
    let refused = pods.filter(|pod| is_refused(&pod.settings.accelerate, &pod.acceleration));
    let refused = refused.map(|pod| {
        Check::warning(
            format!("{} gets `{}`", pod.id, pod.settings.accelerate),
            &pod.acceleration.why,
            "its connections work all the same: set `accelerate: auto`, or use a kernel that can",
        )
    });
    std::iter::once(found).chain(refused).collect()
}

fn steering(config: &Config) -> Vec<Check> {
    let whole = config
        .workloads
        .iter()
        .filter(|pod| pod.degraded.is_empty());
    let mut checks = vec![Check::good(format!("{} pods are steered", whole.count()))];
    for pod in &config.workloads {
        for degraded in &pod.degraded {
            checks.push(Check::error(
                format!("{} is served whole", pod.id),
                format!("degraded, {}: {}", degraded.reason, degraded.what),
                fix_of_degraded(&degraded.reason),
            ));
        }
        if let Some(seconds) = pod.leaving_within_seconds {
            checks.push(Check::warning(
                format!("{} is in the mesh", pod.id),
                format!("it is leaving: what is open has {seconds} s more"),
                "nothing, where that is meant; else put it back into the mesh file",
            ));
        }
    }
    for refused in &config.refused {
        checks.push(Check::error(
            format!("{} is enrolled", refused.workload),
            &refused.why,
            "mend that; the agent tries again by itself",
        ));
    }
    checks
}

fn fix_of_degraded(reason: &str) -> &'static str {
    match reason {
        "interface_refused" => {
            "take the interface out of the pod, or leave it unmeshed with `interfaces: allow`"
        }
        "interface_unsteered" => {
            "take the interface out of the pod, or close it with `interfaces: refuse`"
        }
        "mesh_port" => "let the app listen on another port than 15008, which is the agent's",
        _ => "the agent's log says what it tried and why that failed",
    }
}

fn identity(
    certificates: &Certificates,
    config: &Config,
    lifetime: Option<Duration>,
    now: SystemTime,
) -> Vec<Check> {
    let mut checks = Vec::new();
    for part in &certificates.authority {
        let object = part.object.replace('_', " ");
        let what = format!("{object} {} is valid", part.subject);
        let path = part.path.display();
        // A list stays in force past its end.
        let is_list = part.object == "revocation_list";
        let replace = format!("replace it in {path}: see \"Certificates\" in README.md");
        checks.push(match (time(&part.begins), time(&part.expires)) {
            (Some(begins), _) if begins > now => Check::error(
                what,
                format!("it begins at {}, which is later than now", part.begins),
                "set this machine's clock",
            ),
            (_, Some(end)) if end <= now && is_list => Check::warning(
                what,
                format!(
                    "its next update was due at {}; it stays in force",
                    part.expires
                ),
                replace,
            ),
            (_, Some(end)) if end <= now => {
                Check::error(what, format!("it ended at {}", part.expires), replace)
            }
            (_, Some(end)) if end <= now + SOON && !is_list => {
                Check::warning(what, format!("it ends in {}", left(end, now)), replace)
            }
            (_, Some(end)) => Check::good(format!("{what} for {}", left(end, now))),
            (_, None) => continue,
        });
    }
    for pod in &config.workloads {
        let mut have = certificates.workloads.iter();
        if !have.any(|certificate| certificate.identity == pod.identity) {
            checks.push(Check::error(
                format!("{} has a certificate", pod.id),
                format!("none could be had for {}", pod.identity),
                "the agent's log says what the authority answered (`identity`)",
            ));
        }
    }
    for certificate in &certificates.workloads {
        let what = format!("certificate of {} is valid", certificate.identity);
        let fix = "the agent's log says why it isn't renewed; its clock and the issuer are the \
                   first to look at";
        let Some(end) = time(&certificate.expires) else {
            continue;
        };
        let late = lifetime.map(|lifetime| lifetime.mul_f64(LATE_RENEWAL));
        checks.push(if end <= now {
            Check::error(what, format!("it ended at {}", certificate.expires), fix)
        } else if late.is_some_and(|late| end <= now + late) {
            let reason = format!("it ends in {} and isn't renewed yet", left(end, now));
            Check::warning(what, reason, fix)
        } else {
            Check::good(format!("{what} for {}", left(end, now)))
        });
    }
    checks
}

fn time(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(text).ok()
}

/// How long until `end`, to the precision that matters.
fn left(end: SystemTime, now: SystemTime) -> String {
    let seconds = end.duration_since(now).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn descriptors(metrics: &Metrics) -> Check {
    let open = metrics.value("process_open_fds").unwrap_or_default();
    let most = metrics.value("process_max_fds").unwrap_or_default();
    let what = format!("the agent has descriptors left ({open} of {most} in use)");
    if open < most * MANY_DESCRIPTORS {
        Check::good(what)
    } else {
        Check::error(
            what,
            "without one, new connections wait or are reset",
            "raise the hard limit (`ulimit -Hn`, systemd's LimitNOFILE) and start it anew with \
             --takeover",
        )
    }
}

fn ledger(ledger: &Ledger) -> Check {
    let what = "the agent's sockets are those that the kernel lists";
    if let Some(failure) = &ledger.failure {
        let reason = format!("the kernel couldn't be asked: {failure}");
        return Check::warning(what, reason, "the agent's log says more");
    }
    let leaks = ledger.differences.iter();
    let leaks: Vec<String> = leaks
        .filter(|difference| difference.for_seconds >= LEAK_SECONDS)
        .map(|difference| {
            let of = difference.workload.as_deref().unwrap_or("the agent");
            format!("{} {} of {of}", difference.how, difference.kind)
        })
        .collect();
    if leaks.is_empty() {
        return Check::good(what);
    }
    let fix = "report it with `malla diagnostics ledger`; starting the agent anew with --takeover \
               frees them";
    Check::error(what, leaks.join("\n"), fix)
}

fn audit(audit: &Audit, now: SystemTime) -> Vec<Check> {
    let what = "the last whole audit is of now";
    let ended = audit
        .last_whole
        .as_ref()
        .and_then(|whole| time(&whole.ended));
    let recent = match ended {
        Some(ended) if now.duration_since(ended).is_ok_and(|age| age > OLD_AUDIT) => {
            Check::warning(
                what,
                format!("it ended {} ago", left(now, ended)),
                "the agent is busy, or hangs: see its log",
            )
        }
        Some(_) => Check::good(what),
        None => Check::warning(what, "there was none yet", "ask again in five seconds"),
    };
    let what = "what differed in the kernel was put right";
    let healed = if audit.unhealed == 0 {
        Check::good(what)
    } else {
        let failed = audit.recent.iter().filter(|found| found.failure.is_some());
        let mut lines: Vec<String> = failed
            .map(|found| {
                let of = found.workload.as_deref().unwrap_or("the node");
                let why = found.failure.as_deref().unwrap_or_default();
                format!("{} of {of}: {}: {why}", found.kind, found.what)
            })
            .collect();
        lines.dedup();
        Check::error(
            what,
            format!("{} differences stand\n{}", audit.unhealed, lines.join("\n")),
            "the agent tries again every five seconds: take away what keeps it from it",
        )
    };
    vec![recent, healed]
}

#[cfg(test)]
mod tests;
