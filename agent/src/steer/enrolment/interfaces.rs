//! The interfaces of a pod: programs are attached to each, filters first and links when the pod has
//! lived for a while.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::Inner;
use crate::{
    model::InterfaceMode,
    steer::{
        attach::{Attached, Hook},
        network::{Interface, LOOPBACK},
        programs::ProgramsError,
    },
};

/// How long a pod lives with filters before links take their place: many don't live for long.
const UNTIL_LINKS: Duration = Duration::from_secs(3);
/// How long the node's networks are left in peace after one pod's filters were replaced, for which
/// nobody could change a network for some 24 ms.
const REST_OF_NETWORK: Duration = Duration::from_millis(100);

/// What hangs on a pod's interfaces.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    pub mode: InterfaceMode,
    /// By index.
    pub steered: HashMap<u32, Steered>,
    /// What hangs on a filter, and is to hang on a link.
    filters: Vec<Filter>,
}

/// A program that is a filter for now.
#[derive(Debug)]
struct Filter {
    hook: Hook,
    interface: String,
    index: u32,
}

/// What became of an interface.
#[derive(Debug)]
pub(super) struct Steered {
    pub name: String,
    /// The kind that it had then; that of a TUN interface can change.
    pub ethernet: Option<bool>,
    /// Why its programs couldn't be attached.
    pub failure: Option<String>,
    /// Whether steered packets to link-local addresses find their way. The kernel forgets that
    /// when the interface is set down.
    pub routed: bool,
}

impl Inner {
    /// Attaches to interfaces, and notes what became of them.
    pub(super) fn attach_to(&self, interfaces: &[Interface]) {
        for interface in interfaces {
            let attached = self.attach_both(interface);
            let failure = attached.err().map(|error| error.to_string());
            if let Some(error) = &failure {
                tracing::warn!(workload = %self.workload, interface = interface.name, error, "an interface can't be steered");
            }
            let steered = Steered {
                name: interface.name.clone(),
                ethernet: interface.ethernet,
                failure,
                routed: false,
            };
            self.state()
                .interfaces
                .steered
                .insert(interface.index, steered);
        }
    }

    fn attach_both(&self, interface: &Interface) -> Result<(), AttachError> {
        let ethernet = interface.ethernet.ok_or(AttachError::Kind)?;
        let attach = |hook| self.attach(hook, &interface.name, interface.index);
        let entered = self.pod.netns.enter(&self.pod.home, || {
            attach(Hook::Ingress { ethernet })?;
            attach(Hook::Egress { ethernet })
        });
        Ok(entered.map_err(AttachError::Enter)??)
    }

    /// To be called in the pod's netns.
    pub(super) fn attach(
        &self,
        hook: Hook,
        interface: &str,
        index: u32,
    ) -> Result<(), ProgramsError> {
        let attached = self.attacher.attach(hook, interface, index, &self.pins)?;
        if attached == Attached::ForNow {
            self.state().interfaces.filters.push(Filter {
                hook,
                interface: interface.to_owned(),
                index,
            });
            self.has_filters.notify_one();
        }
        Ok(())
    }

    /// Puts links into the place of filters whenever there are some, after a while and when it is
    /// this pod's turn.
    pub(super) async fn replace_filters(self: Arc<Self>) {
        loop {
            self.has_filters.notified().await;
            tokio::time::sleep(UNTIL_LINKS).await;
            self.replace_present_filters().await;
        }
    }

    async fn replace_present_filters(self: &Arc<Self>) {
        let _turn = self.attacher.replacing.lock().await;
        let inner = Arc::clone(self);
        // The qdisc stays until the withdrawal: to remove one, the kernel stops the interface for a
        // moment and loses what is sent meanwhile, and a SYN is sent again only after a second.
        self.while_attaching(move || inner.replace_filters_now())
            .await;
        tokio::time::sleep(REST_OF_NETWORK).await;
    }

    fn replace_filters_now(&self) {
        let filters = std::mem::take(&mut self.state().interfaces.filters);
        // A netns that can't be entered is about to go.
        let _ = self.pod.netns.enter(&self.pod.home, || {
            for Filter {
                hook,
                interface,
                index,
            } in filters
            {
                let replaced = self
                    .attacher
                    .replace_filter(hook, &interface, index, &self.pins);
                if let Err(error) = replaced {
                    // The filter does as well. It may also be gone with its interface.
                    tracing::info!(workload = %self.workload, %error, "a filter stays");
                }
            }
        });
    }
}

impl Interfaces {
    /// Forgets interfaces that are gone, or of another kind now.
    pub fn forget_others(&mut self, interfaces: &[Interface]) {
        self.steered.retain(|index, steered| {
            let mut same = interfaces.iter().filter(|i| i.index == *index);
            same.any(|i| i.ethernet == steered.ethernet)
        });
        let has = |index| index == LOOPBACK || self.steered.contains_key(&index);
        self.filters.retain(|filter| has(filter.index));
    }

    /// What is to be set down, and what has no link-local route.
    pub fn sort_out<'a>(
        &mut self,
        interfaces: &'a [Interface],
    ) -> (Vec<&'a Interface>, Vec<&'a Interface>) {
        let (mut refused, mut unrouted) = (Vec::new(), Vec::new());
        for interface in interfaces {
            let Some(steered) = self.steered.get_mut(&interface.index) else {
                continue;
            };
            if steered.failure.is_some() {
                // The first time, and whenever it is set up again.
                if interface.up && self.mode == InterfaceMode::Refuse {
                    refused.push(interface);
                }
                continue;
            }
            steered.routed &= interface.up;
            if interface.up && !steered.routed {
                unrouted.push(interface);
            }
        }
        (refused, unrouted)
    }
}

/// Why an interface can't be steered.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("the kind of the interface isn't known")]
    Kind,
    #[error("can't enter the netns: {0}")]
    Enter(std::io::Error),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
}
