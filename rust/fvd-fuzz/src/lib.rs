// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzz targets do with an input. The targets themselves (`rust/fuzz`) need cargo-fuzz;
//! these are plain functions, so that `tests/replay.rs` runs the corpus on a stable compiler.
//!
//! Each body panics if something that must hold does not. A panic inside the engine counts: the
//! engine catches its own and poisons the image, and no host of these bodies ever fails an
//! operation, so a poisoned image is a finding.

pub mod capi;
mod header;
pub mod heap;
mod image;
mod input;
mod journal;
pub mod memory;
mod pages;
mod patch;

pub use capi::capi_calls;
pub use header::header;
pub use image::image_open;
pub use journal::journal_scan;
pub use pages::pages;

/// A target: its name, which is also that of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 5] =
    [("header", header), ("journal_scan", journal_scan), ("pages", pages), ("image_open", image_open), ("capi_calls", capi_calls)];
