// SPDX-License-Identifier: MIT OR Apache-2.0
//! The FVD engine: one open image, sans I/O (contract C1).
//!
//! An [`Image`] is shared by all threads. Each host thread that works on it has a [`Queue`]; a
//! queue belongs to its thread. Requests enter by [`Queue::submit`], the engine asks the queue's
//! [`host::Host`] for data, time and wake-ups, and each request ends with one
//! [`host::Host::done`]. [`Image::lookup`] lets a host do I/O that needs no metadata change itself.
//!
//! The engine opens no file, reads no clock, draws no random number, starts no thread: same
//! answers of the host, same behaviour, to the byte. Rules cited as `CC-n` are in
//! `docs/crash-consistency.md`, `FMT-n` in `docs/format.md`.
#![forbid(unsafe_code)]

#[cfg(loom)]
use loom::sync::atomic::fence;

mod amend;
mod bits;
mod bits_load;
mod brackets;
mod changes;
mod check;
mod checkpoint;
mod commit;
mod create;
mod error;
mod executor;
#[cfg(feature = "planted-faults")]
pub mod faults;
mod handle;
mod header_update;
pub mod host;
mod image;
mod io;
mod layout;
#[cfg(all(test, loom))]
mod loom_tests;
mod lookup;
mod open;
mod read;
mod recovery;
mod relayout;
mod repair;
mod replayed;
mod request;
mod resize;
mod space;
mod status;
mod sync;
mod table;
mod write;
mod zeroes;

pub use brackets::BracketToken;
pub use error::{Error, Kind, Result};
pub use executor::Queue;
pub use image::Image;
pub use lookup::Lookup;
pub use request::*;
