// SPDX-License-Identifier: MIT OR Apache-2.0
//! On-disk structures of FVD version 2: pure bytes to values and back.
//!
//! Nothing here does I/O, allocates from a size it has not validated, or trusts a byte it has not
//! checked. `docs/format.md` is the normative text; rules are cited as `FMT-n`.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod checksum;
pub mod codec;
pub mod double_write;
pub mod error;
pub mod header;
pub mod journal;
pub mod limits;
pub mod page;

pub use error::{FormatError, Result};
pub use header::{Header, PageZero, Region, RegionKind};

/// A 128-bit image identity; seeds every checksum of the image, so that foreign pages are detected.
pub type Uuid = [u8; 16];
