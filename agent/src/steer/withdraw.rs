//! Taking away what was set up for a pod: that of a living enrolment, and what an earlier agent
//! left.
//!
//! Links, pins, rules and map entries belong to the pod, not to an agent: they go when the pod
//! leaves the mesh or is gone, whoever made them.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    Books, Steering, attach,
    census::has_of_agents,
    enrolment::Enrolment,
    inherited::Inherited,
    links, lock,
    netns::Netns,
    network::Network,
    on_blocking_thread,
    record::{self, Record},
};
use crate::model::WorkloadId;

/// How long connections of other agents are waited for that end at this moment as well. They react
/// to the same word, and not at the same time.
const OTHERS_PATIENCE: Duration = Duration::from_secs(1);
const LOOK_AFTER_OTHERS: Duration = Duration::from_millis(20);

impl Steering {
    /// Whether another agent of this node has connections in a pod's netns, which need what was set
    /// up for it.
    pub async fn others_carry(&self, netns: &Arc<Netns>) -> bool {
        let others = self.charge.others();
        if others.is_empty() {
            return false;
        }
        let (netns, home) = (Arc::clone(netns), Arc::clone(&self.home));
        let found = on_blocking_thread(move || has_of_agents(&netns, &home, &others)).await;
        // Where the kernel doesn't say, nothing is taken away from under them.
        found.unwrap_or(true)
    }

    async fn wait_for_others(&self, netns: &Arc<Netns>) {
        let end = Instant::now() + OTHERS_PATIENCE;
        while Instant::now() < end && self.others_carry(netns).await {
            sleep(LOOK_AFTER_OTHERS).await;
        }
    }

    /// Restores the plain networking of a pod and forgets it.
    pub async fn withdraw(&self, enrolment: Enrolment) {
        let number = enrolment.pod().id;
        self.forget_owner(enrolment.workload());
        self.wait_for_others(&enrolment.pod().netns).await;
        enrolment.withdraw().await;
        self.books().numbers.remove(&number);
    }

    /// Forgets an enrolment and leaves all that was set up as it is, for the pod's next one.
    pub fn let_go(&self, enrolment: Enrolment) {
        let pod = enrolment.pod().id;
        drop(enrolment);
        let left = Inherited::all(lock(&self.programs).maps()).remove(&pod);
        self.books().inherited.insert(pod, left.unwrap_or_default());
    }

    /// Takes away whatever is left of a workload that isn't enrolled; what another agent's connections
    /// need stays, and new ones pass. Whether nothing stays.
    pub async fn remove(&self, workload: &WorkloadId) -> bool {
        self.forget_owner(workload);
        let mut all = true;
        for folder in record::folders(&self.links, workload) {
            let carried = self.carried(&folder).await;
            match carried {
                Some(pod) => self.let_pass(pod),
                None => self.take_away(&folder).await,
            }
            all &= carried.is_none();
        }
        all
    }

    /// Takes away what earlier agents left of workloads that `keep` doesn't hold, but for what other
    /// agents' connections need: that stays where `may_stay` allows it. Whether nothing stays.
    pub async fn remove_leftovers(
        &self,
        keep: impl Fn(&WorkloadId) -> bool,
        may_stay: impl Fn(&Record) -> bool,
    ) -> bool {
        let (mut kept, mut all) = (HashSet::new(), true);
        for (workload, folder) in record::all(&self.links) {
            let record = Record::read(&folder);
            if keep(&workload) {
                kept.extend(record.map(|record| record.pod));
                continue;
            }
            if record.as_ref().is_some_and(&may_stay)
                && let Some(pod) = self.carried(&folder).await
            {
                self.let_pass(pod);
                kept.insert(pod);
                all = false;
                continue;
            }
            tracing::info!(%workload, "removing what is left of a workload that is gone");
            self.take_away(&folder).await;
        }
        let mut books = self.books();
        let Books {
            inherited, numbers, ..
        } = &mut *books;
        let mut programs = lock(&self.programs);
        for (pod, entries) in inherited.extract_if(|pod, _| !kept.contains(pod)) {
            numbers.remove(&pod);
            entries.remove(programs.maps());
        }
        all
    }

    /// The number of the pod whose pins are in `folder`, where another agent has connections of it.
    async fn carried(&self, folder: &Path) -> Option<u32> {
        let record = Record::read(folder)?;
        let netns = Arc::new(reopen(&record)?);
        self.others_carry(&netns).await.then_some(record.pod)
    }

    fn let_pass(&self, pod: u32) {
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        if let Some(entries) = Inherited::all(maps).remove(&pod) {
            entries.let_pass(maps);
        }
    }

    /// Closes the books of pods that had this workload's name in another netns than that of
    /// `present`. Where such a netns still runs out of our reach its programs stay, so that it
    /// stays closed; those that are attached to nothing go.
    pub(super) async fn bury_others(&self, workload: &WorkloadId, present: &Path) {
        for folder in record::folders(&self.links, workload) {
            if folder == present {
                continue;
            }
            let record = Record::read(&folder);
            let runs = links_of(&folder).any(|target| target != 0);
            if runs && let Some(record) = record.filter(|record| reopen(record).is_none()) {
                self.forget_entries(record.pod);
            } else {
                self.take_away(&folder).await;
            }
        }
    }

    async fn take_away(&self, folder: &Path) {
        let Some(record) = Record::read(folder) else {
            record::remove(folder);
            return;
        };
        if let Some(netns) = reopen(&record) {
            let netns = Arc::new(netns);
            self.wait_for_others(&netns).await;
            let network = Network::of(&netns, &self.home);
            if !restore(folder, &record, &network).await {
                return;
            }
        }
        self.attacher.release(folder);
        record::remove(folder);
        self.forget_entries(record.pod);
        self.books().numbers.remove(&record.pod);
    }

    fn forget_entries(&self, pod: u32) {
        let entries = self.books().inherited.remove(&pod);
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        let entries = entries.or_else(|| Inherited::all(maps).remove(&pod));
        entries.unwrap_or_default().remove(maps);
    }

    fn forget_owner(&self, workload: &WorkloadId) {
        let mut books = self.books();
        books.netns_owners.retain(|_, owner| owner != workload);
    }
}

/// Detaches all programs of a netns, then takes away what brought steered packets to its stack. Where
/// the netns can't be asked at all, everything stays, the record too: from it, that is done later. Whether
/// it is done.
pub(super) async fn restore(pins: &Path, record: &Record, network: &Network) -> bool {
    let asking = match network.ask() {
        Ok(asking) => asking,
        Err(error) => {
            tracing::warn!(netns = %record.path.display(), %error, "a pod's network stays steered");
            return false;
        }
    };
    let names = asking.names().await.unwrap_or_default();
    let qdiscs = network.enter(|| attach::detach_filters(pins, &names));
    for index in qdiscs.unwrap_or_default() {
        asking.remove_qdisc(index).await;
    }
    attach::detach_links(pins);
    record::remove(pins);
    asking.unroute_steered(record.accept_local).await;
    true
}

/// The netns of a record, if it is still the one at its path.
pub(super) fn reopen(record: &Record) -> Option<Netns> {
    let netns = Netns::open(&record.path).ok()?;
    (netns.id() == record.netns).then_some(netns)
}

/// What the links that are pinned in `folder` are attached to.
fn links_of(folder: &Path) -> impl Iterator<Item = u32> {
    let pins = std::fs::read_dir(folder).into_iter().flatten().flatten();
    pins.filter(|pin| !pin.path().is_symlink())
        .filter_map(|pin| links::read(&pin.path()).ok())
        .map(|link| link.target)
}
