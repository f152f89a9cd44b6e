//! The node's pods, from enrolment to their end.

mod withdrawal;

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use tokio::time::Instant;

use self::withdrawal::Leaving;
use crate::{
    carried::{Carried, CarriedPod},
    discovery::Changes,
    model::{Mesh, Workload, WorkloadId},
    proxy::{PodConnections, Shared, Workers},
    steer::{
        Difference, EnrolError, Enrolment, Event, InForce, Kind, PodListeners, Steering, Verdict,
    },
};

/// How many pods are enrolled at a time. More would only wait for each other in the kernel.
const AT_A_TIME: usize = 16;

/// What is served on this node.
pub struct Pods {
    node: String,
    pub steering: Arc<Steering>,
    pub workers: Workers,
    shared: Shared,
    enrolled: HashMap<WorkloadId, Enrolled>,
    /// Pods that are being withdrawn.
    leaving: HashMap<WorkloadId, Leaving>,
    /// Workloads whose enrolment failed, with what was said of it, to be tried again. None: its
    /// netns is gone, and it is enrolled when another stands there.
    failed: HashMap<WorkloadId, Option<String>>,
    withdraw_limit: Duration,
    /// Whether there may be something of workloads that aren't enrolled.
    has_leftovers: bool,
    /// When that is looked at again.
    ask_at: Instant,
    /// What the kernel has told of since the last audit.
    touched: HashSet<Event>,
}

/// A pod that is enrolled, as others may know it.
pub struct EnrolledPod<'a> {
    pub workload: &'a Arc<Workload>,
    pub enrolment: &'a Enrolment,
    pub connections: &'a PodConnections,
    /// When its withdrawal ends at the latest, where it is leaving.
    pub leaves: Option<Instant>,
}

struct Enrolled {
    workload: Arc<Workload>,
    enrolment: Enrolment,
    connections: PodConnections,
}

impl Pods {
    pub fn new(
        node: String,
        steering: Steering,
        workers: Workers,
        shared: Shared,
        withdraw_limit: Duration,
    ) -> Self {
        Self {
            node,
            steering: Arc::new(steering),
            workers,
            shared,
            enrolled: HashMap::new(),
            leaving: HashMap::new(),
            failed: HashMap::new(),
            withdraw_limit,
            has_leftovers: true,
            ask_at: Instant::now(),
            touched: HashSet::new(),
        }
    }

    pub fn enrolments(&self) -> impl Iterator<Item = &Enrolment> {
        self.enrolled.values().map(|pod| &pod.enrolment)
    }

    /// The pods whose connections go on: in the mesh, or leaving it.
    pub fn all(&self) -> impl Iterator<Item = EnrolledPod<'_>> {
        let enrolled = self.enrolled.values().map(|pod| (pod, None));
        let leaving = self.leaving.values();
        let leaving = leaving.map(|leaving| (&leaving.pod, Some(leaving.end)));
        enrolled.chain(leaving).map(|(pod, leaves)| EnrolledPod {
            workload: &pod.workload,
            enrolment: &pod.enrolment,
            connections: &pod.connections,
            leaves,
        })
    }

    /// Workloads that can't be enrolled, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&WorkloadId, &str)> {
        let failed = self.failed.iter();
        failed.map(|(id, said)| (id, said.as_deref().unwrap_or("its netns is gone")))
    }

    pub async fn apply(&mut self, changes: Changes) {
        for workload in changes.removed {
            self.withdraw(&workload).await;
        }
        self.end_withdrawals().await;
        let mut to_enrol = changes.added;
        for changed in changes.reenrolled {
            self.cut(&changed.old).await;
            to_enrol.push(changed.new);
        }
        for changed in changes.updated {
            self.update(&changed.new).await;
        }
        self.enrol(to_enrol).await;
    }

    /// Looks after what changes by itself: enrolments that failed are tried again, withdrawals end,
    /// pods whose netns is gone go, and come back with it.
    pub async fn look_after(&mut self, mesh: &Mesh) {
        self.end_withdrawals().await;
        self.remove_leftovers(mesh).await;
        let enrolled = self.enrolled.values();
        let dead: Vec<_> = enrolled
            .filter(|pod| !pod.enrolment.netns_is_there())
            .map(|pod| Arc::clone(&pod.workload))
            .collect();
        for workload in dead {
            tracing::warn!(workload = %workload.id, "its netns is gone");
            let kind = Kind::Netns.as_str();
            self.shared.metrics.steering().audit_difference(kind, true);
            self.cut(&workload).await;
            self.failed.insert(workload.id.clone(), None);
        }
        self.failed.retain(|id, _| mesh.workloads.contains_key(id));
        let to_enrol = self.failed.iter().filter_map(|(id, said)| {
            let workload = mesh.workloads.get(id)?;
            let is_there = || workload.netns.as_ref().is_some_and(|path| path.exists());
            (said.is_some() || is_there()).then(|| Arc::clone(workload))
        });
        let to_enrol = to_enrol.collect();
        self.enrol(to_enrol).await;
    }

    /// Enrols pods, several at a time: the kernel lets each wait for what is on its way.
    async fn enrol(&mut self, workloads: Vec<Arc<Workload>>) {
        let mut new = Vec::new();
        for workload in workloads {
            self.ensure_certificate(&workload);
            if !self.resume(&workload).await {
                new.push(workload);
            }
        }
        let steering = Arc::clone(&self.steering);
        let enrolments = stream::iter(new).map(|workload| async {
            let began = Instant::now();
            let result = steering.enrol(&workload).await;
            (workload, began.elapsed(), result)
        });
        let mut enrolments = pin!(enrolments.buffer_unordered(AT_A_TIME));
        while let Some((workload, took, result)) = enrolments.next().await {
            match result {
                Ok((enrolment, listeners)) => {
                    self.serve(workload, enrolment, listeners, took).await;
                }
                Err(error) => self.failed(&workload, &error),
            }
        }
    }

    async fn serve(
        &mut self,
        workload: Arc<Workload>,
        enrolment: Enrolment,
        listeners: Vec<PodListeners>,
        took: Duration,
    ) {
        self.failed.remove(&workload.id);
        let added = self.workers.add(enrolment.pod(), &workload, listeners);
        let connections = added.await;
        let took_ms = format_args!("{:.1}", took.as_secs_f64() * 1000.0);
        tracing::info!(workload = %workload.id, identity = %workload.identity, took_ms, "enrolled");
        let id = workload.id.clone();
        let enrolled = Enrolled {
            workload,
            enrolment,
            connections,
        };
        self.enrolled.insert(id, enrolled);
        self.count();
    }

    fn failed(&mut self, workload: &Workload, error: &EnrolError) {
        let said = Some(error.to_string());
        // The same failure, again and again, is told once.
        if self.failed.get(&workload.id) != Some(&said) {
            tracing::error!(workload = %workload.id, %error, "can't enrol a workload");
            self.shared.metrics.enrolment_error(error.reason());
            self.failed.insert(workload.id.clone(), said);
        }
    }

    /// Notes that something has changed, for the next [`Self::audit_touched`].
    pub fn touch(&mut self, event: Event) {
        self.touched.insert(event);
    }

    /// Audits what was touched.
    pub async fn audit_touched(&mut self, mesh: &Mesh) -> Vec<Difference> {
        let touched = std::mem::take(&mut self.touched);
        if touched.contains(&Event::Netns) {
            self.look_after(mesh).await;
        }
        if self.steering.is_yielding() {
            return Vec::new();
        }
        let mut found = Vec::new();
        if touched.contains(&Event::Node) {
            found.extend(self.steering.audit_node());
        }
        let is_touched = |pod: &&Enrolled| touched.contains(&Event::Pod(pod.enrolment.pod().id));
        for pod in self.enrolled.values().filter(is_touched) {
            found.extend(self.audit_pod(pod).await);
        }
        found
    }

    /// Audits everything. An agent that takes over is changing the same things meanwhile, and one that has
    /// taken over would have its own programs put out of their place.
    pub async fn audit(&mut self) -> Vec<Difference> {
        if self.steering.is_yielding() {
            return Vec::new();
        }
        let mut found = self.steering.audit_node();
        let leaving = self.leaving.values().map(|leaving| &leaving.pod.enrolment);
        let all = self.enrolments().chain(leaving);
        found.extend(self.steering.audit_entries(all));
        for pod in self.enrolled.values() {
            found.extend(self.audit_pod(pod).await);
        }
        found
    }

    /// Another agent may have taken over since the last pod.
    async fn audit_pod(&self, pod: &Enrolled) -> Vec<Difference> {
        if self.steering.is_yielding() {
            return Vec::new();
        }
        let audited = pod.enrolment.audit(&pod.workload.addresses).await;
        if !pod.enrolment.netns_is_there() {
            // It went meanwhile, which isn't for an audit to mend.
            return Vec::new();
        }
        if let Some(listeners) = audited.listeners {
            self.workers.relisten(pod.enrolment.pod(), listeners).await;
        }
        pod.enrolment.set_unhealed(audited.differences.iter());
        audited.differences
    }

    /// Gives each pod what it may have of acceleration, by its settings and what this kernel is
    /// known to do by now.
    pub fn accelerate(&self) {
        let acceleration = self.steering.acceleration();
        let enrolled = self.enrolled.values();
        acceleration.prepare(enrolled.map(|pod| pod.workload.settings.accelerate));
        let mut pods = HashMap::<InForce, usize>::new();
        for pod in self.enrolled.values() {
            let in_force = acceleration.in_force(pod.workload.settings.accelerate);
            *pods.entry(in_force).or_default() += 1;
            if let Err(error) = pod.enrolment.accelerate(in_force.mode) {
                tracing::error!(workload = %pod.workload.id, %error, "can't accelerate a pod");
            }
        }
        let verdict = acceleration.verdict();
        let metrics = self.shared.metrics.acceleration();
        metrics.set_verdict(verdict.as_ref().map(Verdict::as_str));
        metrics.set_pods(
            pods.iter()
                .map(|(is, pods)| (is.mode.as_str(), is.reason, *pods)),
        );
        let events = acceleration.events().into_iter();
        metrics.set_directions(events.map(|(event, count)| (event.as_str(), count)));
    }

    async fn update(&mut self, workload: &Arc<Workload>) {
        let Some(pod) = self.enrolled.get_mut(&workload.id) else {
            return;
        };
        pod.workload = Arc::clone(workload);
        if let Err(error) = pod.enrolment.update(workload) {
            tracing::error!(workload = %workload.id, %error, "can't put settings in force");
        }
        self.workers.update(workload).await;
        tracing::info!(workload = %workload.id, "settings changed");
    }

    fn ensure_certificate(&self, workload: &Workload) {
        if let Err(error) = self.shared.certificates.ensure(&workload.identity) {
            tracing::error!(workload = %workload.id, %error, "no certificate for a workload");
        }
    }

    pub fn ensure_certificates(&self, mesh: &Mesh) {
        for workload in mesh.enrolled_on(&self.node) {
            self.ensure_certificate(workload);
        }
    }

    fn count(&self) {
        self.shared.metrics.set_pods_enrolled(self.enrolled.len());
    }

    /// An agent that takes over puts its own listeners in the place of this one's. When it dies
    /// before it is in charge, pods are closed until this one's are back.
    pub fn reopen(&self) {
        if !self.steering.lost_successor() {
            return;
        }
        let mut all_well = true;
        for enrolment in self.enrolments() {
            let workload = enrolment.workload();
            match enrolment.reopen() {
                Ok(false) => {}
                Ok(true) => tracing::warn!(%workload, "its listeners were missing, and are back"),
                Err(error) => {
                    tracing::error!(%workload, %error, "can't put its listeners back");
                    all_well = false;
                }
            }
        }
        if all_well {
            self.steering.forget_successor();
        }
    }

    /// Leaves all pods closed, to an agent to come.
    pub fn close(&self) {
        self.steering.give_up_charge(self.enrolments());
    }

    /// Stops following the pods, which are another agent's now or nobody's. Gives whose connections
    /// live on here.
    pub fn hand_over(&mut self) -> Carried {
        self.steering.release_links();
        let enrolled = self.enrolled.drain().map(|(_, pod)| (pod, None));
        let leaving = self.leaving.drain();
        let leaving = leaving.map(|(_, leaving)| (leaving.pod, Some(leaving.end)));
        let pods = enrolled.chain(leaving).map(|(pod, ends)| CarriedPod {
            workload: pod.workload,
            pod: Arc::clone(pod.enrolment.pod()),
            connections: pod.connections,
            record: pod.enrolment.record(),
            ends,
        });
        Carried::new(pods, self.withdraw_limit)
    }
}
