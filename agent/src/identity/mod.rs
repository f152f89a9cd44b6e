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
//! - what was good of an authority's files stays in use until something good replaces it;
//! - a renewal touches no live connection: only handshakes read the current key; what cuts one is
//!   the revocation of its peer's certificate, of which [`Certificates::revoked`] tells;
//! - no certificate outlives the issuer and the trust anchor that it hangs on.

mod ca;
mod certificates;
mod embedded;
mod expiry;
mod files;
mod folder;
mod judge;
mod key_slot;
mod part;
mod peer;
mod reason;
mod refresh;
mod revocation;
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
