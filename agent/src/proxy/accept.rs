//! Accepting connections on a pod's listeners.

use std::{io, net::TcpListener as StdListener, rc::Rc, time::Duration};

use futures_util::FutureExt;
use tokio::net::{TcpListener, TcpStream};

use super::{inbound, outbound, pod::PodContext, worker::Worker};
use crate::{
    ledger::{Accounted, Kind},
    steer::PodListeners,
    telemetry::Role,
};
use malla_common::Role as Listener;

/// Pause after an error that only time or closed connections can mend; the next ones are twice as
/// long, up to a limit, until a connection is accepted.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Serves each role until the pod's token ends it.
pub(super) fn serve(worker: &Rc<Worker>, pod: &Rc<PodContext>, listeners: PodListeners) {
    for (role, listener) in [
        (Listener::Outbound, listeners.outbound),
        (Listener::Inbound, listeners.inbound),
        (Listener::Mesh, listeners.mesh),
    ] {
        pod.spawn(listen(Rc::clone(worker), Rc::clone(pod), role, listener));
    }
}

async fn listen(
    worker: Rc<Worker>,
    pod: Rc<PodContext>,
    role: Listener,
    listener: Accounted<StdListener>,
) {
    let (mut entry, listener) = listener.into_parts();
    entry.belongs_to(pod.pod.id);
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            worker.metrics().accept_error(label(role), &error);
            tracing::error!(workload = %pod.workload().id, %error, "can't poll a listener");
            return;
        }
    };
    let accepting = pod.accepting();
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            biased;
            () = accepting.cancelled() => return last(&worker, &pod, role, &listener),
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                start(&worker, &pod, role, stream);
            }
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                worker.accept_failed(label(role), &error);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Takes those who have come before the listener closes.
fn last(worker: &Rc<Worker>, pod: &Rc<PodContext>, role: Listener, listener: &TcpListener) {
    while let Some(Ok((stream, _))) = listener.accept().now_or_never() {
        start(worker, pod, role, stream);
    }
}

fn start(worker: &Rc<Worker>, pod: &Rc<PodContext>, role: Listener, stream: TcpStream) {
    let (worker, context) = (Rc::clone(worker), Rc::clone(pod));
    let kind = match role {
        Listener::Outbound => Kind::AppOutbound,
        Listener::Inbound => Kind::PlaintextInbound,
        Listener::Mesh => Kind::Handshake,
    };
    let stream = Accounted::new(stream, pod.pod.id, kind);
    match role {
        Listener::Outbound => pod.spawn(outbound::serve(worker, context, stream)),
        Listener::Inbound => pod.spawn(inbound::serve_plaintext(worker, context, stream)),
        Listener::Mesh => pod.spawn(inbound::serve_mesh(worker, context, stream)),
    };
}

fn label(role: Listener) -> Role {
    match role {
        Listener::Outbound => Role::Outbound,
        Listener::Inbound => Role::Inbound,
        Listener::Mesh => Role::Mesh,
    }
}
