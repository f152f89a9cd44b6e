//! Sockets for several dials, made in one visit to the pod's netns.

use std::{
    cell::{Cell, RefCell},
    io, mem,
    net::SocketAddr,
    rc::Rc,
};

use socket2::Socket;

use super::{Pod, dial::transparent_socket};
use crate::ledger::{Accounted, Kind};

/// Sockets that are made at once: more would hardly save anything.
const AT_ONCE: usize = 8;

/// Dials to a pod's app that a worker is about to begin, as for the requests that a tunnel brings in one
/// piece, and sockets for them. It has none for longer than there are such dials.
#[derive(Debug, Default)]
pub struct DialStock {
    expected: Cell<usize>,
    /// For IPv4 and for IPv6.
    sockets: RefCell<[Vec<Accounted<Socket>>; 2]>,
}

/// One dial that is about to begin. Dropping it says that it won't.
#[derive(Debug)]
pub struct ExpectedDial(Rc<DialStock>);

impl DialStock {
    /// Says that a dial is about to begin.
    pub fn expect(self: &Rc<Self>) -> ExpectedDial {
        self.expected.set(self.expected.get() + 1);
        ExpectedDial(Rc::clone(self))
    }
}

impl ExpectedDial {
    /// A socket of the pod's netns that may be bound to an address which isn't the pod's.
    pub(super) fn socket(
        self,
        pod: &Pod,
        destination: SocketAddr,
    ) -> io::Result<Accounted<Socket>> {
        let stock = &self.0;
        let family = usize::from(destination.is_ipv6());
        if let Some(socket) = stock.sockets.borrow_mut()[family].pop() {
            return Ok(socket);
        }
        let make = || {
            let socket = transparent_socket(destination)?;
            Ok::<_, io::Error>(Accounted::new(socket, pod.id, Kind::Connecting))
        };
        let others = 1..stock.expected.get().min(AT_ONCE);
        let (socket, others) = pod.netns.enter(&pod.home, || {
            // One that can't be made fails where it is needed.
            make().map(|socket| (socket, others.map_while(|_| make().ok()).collect()))
        })??;
        stock.sockets.borrow_mut()[family] = others;
        Ok(socket)
    }
}

impl Drop for ExpectedDial {
    fn drop(&mut self) {
        let expected = self.0.expected.get() - 1;
        self.0.expected.set(expected);
        if expected == 0 {
            // Of dials that came to nothing, or were of the other family.
            drop(mem::take(&mut *self.0.sockets.borrow_mut()));
        }
    }
}
