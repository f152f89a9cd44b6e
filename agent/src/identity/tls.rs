//! The mesh's TLS as rustls configurations: TLS 1.3, mutual, post-quantum key exchange first.
//!
//! Nothing is resumed and nothing is sent early, so each connection proves both identities anew.

use std::sync::{Arc, LazyLock};

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, kx_group},
    },
    server::NoServerSessionStorage,
    version::TLS13,
};

use super::{
    key_slot::KeySlot,
    trust::SharedTrust,
    verify::{ClientsOfTrustDomain, ServerWithIdentity},
};
use crate::model::SpiffeId;

/// What the mesh port carries: HBONE, which is HTTP/2.
const ALPN: &[u8] = b"h2";

/// The suites of a library. The first is what processors do fastest; ztunnel takes the first two
/// only.
macro_rules! suites_of {
    ($library:ident) => {{
        use rustls::crypto::$library::cipher_suite::*;
        vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ]
    }};
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: if has_vector_aes_without_avx512() {
            suites_of!(ring)
        } else {
            suites_of!(aws_lc_rs)
        },
        // The client sends key shares for the first and for its X25519 half, so a peer without
        // ML-KEM costs no further round trip.
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// Whether the processor does AES on two blocks at once (`VAES`) and has no AVX-512: AMD's before Zen 4
/// and Intel's small cores. aws-lc uses `VAES` with AVX-512 alone, and ring does AES-GCM on these 2.5
/// times as fast. All else of the handshake, and of certificates, is aws-lc's everywhere.
fn has_vector_aes_without_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("vaes") && has!("vpclmulqdq") && has!("avx2") && !has!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The cryptography that the mesh uses.
pub(super) fn provider() -> &'static CryptoProvider {
    &PROVIDER
}

/// The same, for what wants to share it.
pub(super) fn shared_provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// The server side of the identity whose key is in `own`, for clients of `trust_domain`.
pub(super) fn server_config(
    own: Arc<KeySlot>,
    trust: SharedTrust,
    trust_domain: String,
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(shared_provider())
        .with_protocol_versions(&[&TLS13])
        // Fails only where the provider has no suite or no group for TLS 1.3; ours has both.
        .expect("the provider serves TLS 1.3")
        .with_client_cert_verifier(Arc::new(ClientsOfTrustDomain {
            trust,
            trust_domain,
        }))
        .with_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // The suite that processors do fastest, whatever the peer would like best.
    config.ignore_client_order = true;
    config.max_early_data_size = 0;
    config
}

/// The client side of the identity whose key is in `own`, for a server that is `expected`.
pub(super) fn client_config(
    own: Arc<KeySlot>,
    trust: SharedTrust,
    expected: SpiffeId,
) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(shared_provider())
        .with_protocol_versions(&[&TLS13])
        // Fails only where the provider has no suite or no group for TLS 1.3; ours has both.
        .expect("the provider serves TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerWithIdentity { trust, expected }))
        .with_client_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    config
}

#[cfg(test)]
mod tests;
