// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad images: open gives a clear error or correct data. Never a panic, never wrong data.
//!
//! Rot is tried everywhere in the metadata of three images (closed; after a cut with commits in the
//! journal; after a cut in a checkpoint), read-only and writable. Hostile images have correct
//! checksums.

mod common;

#[path = "bad_input/hostile.rs"]
mod hostile;
#[path = "bad_input/records.rs"]
mod records;
#[path = "bad_input/rot.rs"]
mod rot;
#[path = "bad_input/samples.rs"]
mod samples;
