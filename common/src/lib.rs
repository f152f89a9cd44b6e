//! The types that cross the boundary between malla's eBPF programs and its agent.
//!
//! Each stands here once; the kernel side and user space both compile this crate.
#![no_std]

mod reason;

pub use reason::Reason;
