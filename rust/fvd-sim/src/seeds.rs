// SPDX-License-Identifier: MIT OR Apache-2.0
//! Seeds that once failed, each with a line of why. They are run by `cargo test` and by every
//! `fvd-sim run`. A seed draws other plans when the workload changes; it stays as a sample then.

/// Seed, and what it found.
pub const REGRESSIONS: &[(u64, &str)] = &[];
