//! Workload identity: certificates for the pods of this node, and the mutual TLS that they make.
//!
//! [`Certificates`] keeps one P-256 key and certificate for each SPIFFE identity that the node
//! runs, renews them in the background, and hands out rustls configurations. What signs them is
//! behind [`ca::CertificateAuthority`]. This module opens no connection and decides no policy: it says
//! who a peer is, and refuses peers that can't prove an identity of the mesh.
//!
//! Invariants:
//! - a workload's private key exists in memory only;
//! - a valid certificate stays in use until a better one is there, whatever the authority does;
//! - a renewal touches no live connection: only handshakes read the current key;
//! - no certificate outlives the issuer and the trust anchor that it hangs on.

mod ca;
mod certificates;
mod embedded;
mod files;
mod folder;
mod key_slot;
mod peer;
mod reason;
mod refresh;
mod schedule;
#[cfg(test)]
mod testing;
mod tls;
mod trust;
mod verify;

pub(crate) use certificates::Certificates;
pub(crate) use embedded::EmbeddedAuthority;
pub(crate) use peer::peer_identity;
pub(crate) use reason::reason_of;
