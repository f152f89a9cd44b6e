//! Many pods of one node: how long an agent takes to have them all.

use std::{
    collections::VecDeque,
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::Agent,
    bed::Testbed,
    caller::{EchoApp, Fate},
    node::Node,
    pod::Pod,
    scene::PORT,
    spec::PodSpec,
    wait::eventually,
};

/// How long is waited for what must come.
const LIMIT: Duration = Duration::from_secs(30);
/// Threads that call from one pod after the other.
const CALLERS: usize = 4;
/// How often pods come and go, all of a step at once.
const STEP: Duration = Duration::from_millis(500);
/// How many steps a pod lives that comes and goes.
const LIFE: usize = 2;

/// How an agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// SIGKILL.
    Kill,
    /// SIGTERM, and its end is waited for.
    Stop,
}

/// How long a pod's enrolment took.
#[derive(Debug, Clone, Copy)]
pub struct Enrolled {
    /// From the change of the file until the pod is steered.
    pub from_outside: Duration,
    /// The agent's own work.
    pub work: Duration,
}

/// A node with many meshed pods, each of an account of its own, and a stranger with an echoing app.
#[derive(Debug)]
pub struct Crowd {
    pub bed: Testbed,
    pub node: Arc<Node>,
    pub pods: Vec<Arc<Pod>>,
    stranger: Arc<Pod>,
    _app: EchoApp,
    /// The number of the next pod.
    next: usize,
}

impl Crowd {
    /// Makes them. No agent runs yet.
    pub fn new(mut bed: Testbed, pods: usize) -> Result<Self> {
        let node = bed.node("a")?;
        let stranger = bed.pod(&node, PodSpec::new("stranger").unmeshed())?;
        let app = stranger.echo(PORT)?;
        let mut crowd = Self {
            bed,
            node,
            pods: Vec::new(),
            stranger,
            _app: app,
            next: 0,
        };
        crowd.pods = crowd.come(pods)?;
        Ok(crowd)
    }

    pub fn agent(&self) -> &Agent {
        self.bed.agent(&self.node)
    }

    /// What becomes of a connection from a pod to the stranger.
    pub fn call(&self, from: &Pod) -> Fate {
        from.caller().call((self.stranger.v4(), PORT))
    }

    /// Starts an agent. The time from its exec until it is ready.
    pub fn start(&mut self) -> Result<Duration> {
        let began = Instant::now();
        self.bed.start_agent(&self.node.clone())?;
        Ok(began.elapsed())
    }

    /// Ends the agent, which leaves the pods closed, and starts another. The time from its exec
    /// until the first connection of each pod was served.
    pub fn restart(&mut self, end: End) -> Result<Duration> {
        match end {
            End::Kill => self.agent().kill9(),
            End::Stop => {
                self.agent().stop()?;
            }
        }
        let fate = self.call(&self.pods[0]);
        ensure!(fate != Fate::Echoed, "a pod isn't closed without an agent");
        let (pods, to) = (self.pods.clone(), (self.stranger.v4(), PORT));
        let began = Instant::now();
        thread::scope(|scope| {
            let call_all = |pods: &[Arc<Pod>]| -> Result<Duration> {
                for pod in pods {
                    let what = format!("pod {} to be served", pod.name());
                    let serves = || pod.caller().call(to) == Fate::Echoed;
                    eventually(&what, LIMIT, serves)?;
                }
                Ok(began.elapsed())
            };
            let shares = pods.chunks(pods.len().div_ceil(CALLERS).max(1));
            let callers: Vec<_> = shares
                .map(|share| scope.spawn(move || call_all(share)))
                .collect();
            self.bed.start_agent(&self.node.clone())?;
            let mut last = Duration::ZERO;
            for caller in callers {
                let joined = caller.join();
                let served = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                last = last.max(served?);
            }
            Ok(last)
        })
    }

    /// Lets so many pods join the mesh, one after the other.
    pub fn enrol_one_by_one(&mut self, pods: usize) -> Result<Vec<Enrolled>> {
        let mut all = Vec::new();
        for _ in 0..pods {
            // It stands before agents are told of it: to make it is none of their work.
            let pod = self
                .bed
                .untold(|bed| come(bed, &self.node, &mut self.next, 1))?;
            let pod = pod.into_iter().next().context("no pod")?;
            let began = Instant::now();
            self.bed.write_mesh()?;
            while !self.is_steered(&pod) {
                ensure!(began.elapsed() < LIMIT, "pod {} isn't steered", pod.name());
                thread::sleep(Duration::from_micros(200));
            }
            let from_outside = began.elapsed();
            self.wait_enrolled(&pod)?;
            all.push(Enrolled {
                from_outside,
                work: self
                    .work(&pod)
                    .context("the agent doesn't say what it took")?,
            });
            self.pods.push(pod);
        }
        Ok(all)
    }

    /// How long the agent says that it took to enrol a pod.
    fn work(&self, pod: &Pod) -> Option<Duration> {
        let log = self.agent().log();
        let said = format!("workload=default/{} ", pod.name());
        let line = log
            .lines()
            .find(|line| line.contains("\tenrolled\t") && line.contains(&said))?;
        let (_, took) = line.split_once("took_ms=")?;
        let took: f64 = took.split(' ').next()?.parse().ok()?;
        Some(Duration::from_secs_f64(took / 1000.0))
    }

    fn wait_enrolled(&self, pod: &Pod) -> Result<()> {
        let what = format!("the agent to say that pod {} is enrolled", pod.name());
        eventually(&what, LIMIT, || self.work(pod).is_some())
    }

    /// Lets pods come and go, `rate` a second. Each lives for a second, or until it is steered if
    /// that is later. The time that it took, and how many there were.
    pub fn come_and_go(&mut self, rate: usize, time: Duration) -> Result<(Duration, usize)> {
        let steps = time.as_millis() / STEP.as_millis();
        let each = rate * usize::try_from(STEP.as_millis())? / 1000;
        let mut alive = VecDeque::new();
        let (began, first) = (Instant::now(), self.next);
        for step in 0..u32::try_from(steps)? {
            alive.push_back(self.come(each)?);
            if alive.len() > LIFE {
                self.go(&alive.pop_front().unwrap_or_default())?;
            }
            // The pace, not a wait for anything.
            thread::sleep((STEP * (step + 1)).saturating_sub(began.elapsed()));
        }
        let took = began.elapsed();
        for pods in alive {
            self.go(&pods)?;
        }
        Ok((took, self.next - first))
    }

    fn go(&mut self, pods: &[Arc<Pod>]) -> Result<()> {
        for pod in pods {
            self.wait_steered(pod)?;
        }
        self.bed.remove_pods(pods.iter().map(AsRef::as_ref))
    }

    /// Makes pods that `pods` doesn't have.
    pub fn come(&mut self, pods: usize) -> Result<Vec<Arc<Pod>>> {
        come(&mut self.bed, &self.node, &mut self.next, pods)
    }

    /// Waits until the agent has attached the last of its programs to a pod.
    pub fn wait_steered(&self, pod: &Pod) -> Result<()> {
        let what = format!("pod {} to be steered", pod.name());
        eventually(&what, LIMIT, || self.is_steered(pod)).with_context(|| self.agent().log_tail())
    }

    fn is_steered(&self, pod: &Pod) -> bool {
        let folder = self.node.bpffs().join("links/default").join(pod.name());
        let netnses = fs::read_dir(folder).into_iter().flatten().flatten();
        let pins = netnses.flat_map(|netns| fs::read_dir(netns.path()));
        let mut names = pins.flatten().flatten().map(|pin| pin.file_name());
        names.any(|name| name.to_string_lossy().ends_with("_egress"))
    }
}

fn come(
    bed: &mut Testbed,
    node: &Arc<Node>,
    next: &mut usize,
    pods: usize,
) -> Result<Vec<Arc<Pod>>> {
    let numbers = *next..*next + pods;
    *next += pods;
    let spec = |n| PodSpec::new(format!("pod-{n}")).account(format!("account-{n}"));
    bed.pods(node, numbers.map(spec))
}
