// SPDX-License-Identifier: MIT OR Apache-2.0
//! The stand-alone host of an FVD image: files and block devices of this machine.
//!
//! [`Files`] are opened once (with QEMU's locks, see [`lock`]) and shared by threads; each thread
//! has a [`FileIo`], which does the engine's operations by io_uring or threads; [`disk::Disk`] puts
//! an engine on top and blocks, [`convert`] copies from one to another. QEMU does not use any of this: there QEMU is the host.

pub mod convert;
pub mod disk;
mod file;
mod files;
mod iovec;
pub mod lock;
mod pool;
mod raw;
mod reactor;
#[cfg(feature = "uring")]
mod uring;

pub use disk::LocalHost;
pub use file::{Completion, FileIo};
pub use files::{Files, LogFn, Options, base_path};
pub use iovec::IoVecBuf;
pub use reactor::{WakeHandle, now_ns};
