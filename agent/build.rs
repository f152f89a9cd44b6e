//! Puts the eBPF object, which `cargo xtask build-ebpf` makes, where the agent embeds it.

use std::{env, fs, path::PathBuf};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_owned();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let object = target.join("ebpf/malla");
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    if let Err(error) = fs::copy(&object, out.join("malla-ebpf")) {
        println!(
            "cargo::error={}: {error}. Run `cargo xtask build-ebpf` first.",
            object.display()
        );
    }
}
