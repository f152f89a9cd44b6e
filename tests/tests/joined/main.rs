//! Two apps of one node whose bytes the kernel moves past the agent: bytes, order, ends, counts and
//! what cuts them are as when the agent moves them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like the tests")]
#![expect(clippy::float_cmp, reason = "metrics of whole numbers are exact")]

mod bytes;
mod cuts;
mod pods;
