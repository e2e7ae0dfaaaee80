// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C interface: `include/fvd.h`, whose contract is `docs/c-api.md`.
//!
//! This crate holds no logic. It checks arguments and handles, translates structs, keeps the
//! memory that crosses the border alive, and stops panics: a panic makes the image unusable
//! (*poisoned*) and never unwinds into C. Every entry point is `unsafe extern "C"`; what its
//! caller promises is in the documentation of the function in C terms, so none has a Rust safety
//! section of its own: the header is made from these comments.
#![allow(clippy::missing_safety_doc)]
#![allow(non_camel_case_types)]

mod error;
mod file;
mod handle;
mod host;
mod image;
mod lookup;
mod panic;
mod queue;
mod request;
mod types;
mod version;

pub use error::fvd_error;
pub use file::*;
pub use image::*;
pub use lookup::*;
pub use queue::*;
pub use request::*;
pub use types::*;
pub use version::*;
