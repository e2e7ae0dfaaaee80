// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies a disk from one image into a new one: what `fvd convert` does.
//!
//! A target that is not finished must not pass for one. An FVD image has no page 0 until all of it is
//! durable, as during creation (FMT-130): a power cut leaves a file that is no image. A raw file cannot
//! say so; only the return value does.

mod copier;
mod end;

use crate::disk::{Disk, Progress};
use crate::files::{Files, Options};
use crate::iovec::Cursor;
use crate::raw::{How, RawFile};
use copier::{Copier, Plan};
use end::End;
use fvd_engine::host::Page;
use fvd_engine::{CreateParams, Error, Kind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The image to copy from. It is opened read-only, with its bases.
#[derive(Clone)]
pub struct Source {
    /// Where it is.
    pub path: PathBuf,
    /// The file holds the bytes of the disk and nothing else; otherwise it is an FVD image.
    pub raw: bool,
    /// How to open it.
    pub options: Options,
}

/// The image to make.
#[derive(Clone)]
pub struct Target {
    /// Where it will be; what is there is overwritten unless it is in use.
    pub path: PathBuf,
    /// Parameters of an FVD image, without a size: that is the source's. `None`: a raw file or device.
    pub params: Option<CreateParams>,
    /// How to open it.
    pub options: Options,
    /// Zeroes within data are left out where aligned units of so many bytes hold nothing else: a power
    /// of two, 512 to [`Target::SPARSE_MAX`]; 0: all is written, what the source does not store too.
    pub sparse: u64,
}

impl Target {
    /// Largest unit of zeroes: bytes.
    pub const SPARSE_MAX: u64 = copier::PIECE;
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// The target is being made.
    Creating(Progress),
    /// The disk is being copied.
    Copying {
        /// Since copying began.
        elapsed: Duration,
        /// Bytes of the disk that are done with.
        done: u64,
        /// Bytes of the disk.
        size: u64,
    },
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of them that were written as data.
    pub written: u64,
}

/// Copies the disk in `source` to `target`, which is durable and closed when this returns.
///
/// With a base, the target gets what differs from it: what the source leaves to the very same file is
/// not looked at, all else is read from both and compared.
///
/// `tick` is told some five times a second how far this is. If it answers false while the disk is
/// copied, the conversion fails with `Kind::Host(EINTR)`.
///
/// A failure leaves nothing of a target that was not there before; what was there is left incomplete,
/// and the error says so. The source is never written.
pub fn convert(source: &Source, target: &Target, tick: &mut dyn FnMut(Step) -> bool) -> Result<Converted> {
    let unit = target.sparse;
    if unit != 0 && !(unit.is_power_of_two() && (512..=Target::SPARSE_MAX).contains(&unit)) {
        return Err(Error::new(Kind::Invalid, format!("sparse size {unit} is neither 0 nor a power of two from 512 to {}", Target::SPARSE_MAX)));
    }
    let from = End::source(source).map_err(|error| naming(&source.path, error))?;
    refuse_own_source(&from, &target.path)?;
    let existed = target.path.symlink_metadata().is_ok();
    let mut begun = false;
    let made = match &target.params {
        None => to_raw(from, target, tick, &mut begun),
        Some(params) => to_fvd(from, target, params, tick, &mut begun),
    };
    let name_missing = |error: Error| if error.text.contains(&quoted(&source.path)) { error } else { naming(&target.path, error) };
    made.map_err(name_missing).map_err(|error| match (begun, existed) {
        (false, _) => error,
        (true, false) => {
            // If it cannot be removed, the first error still counts.
            let _ = std::fs::remove_file(&target.path);
            error
        }
        (true, true) => {
            let text = format!("{}; '{}', which was there before, is left incomplete", error.text, target.path.display());
            Error::new(error.kind, text)
        }
    })
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

/// The error, with a text that names `path`.
fn naming(path: &Path, error: Error) -> Error {
    let name = quoted(path);
    if error.text.contains(&name) { error } else { error.context(&name) }
}

/// Locks do not keep a source that is opened without them from being overwritten by its own copy.
fn refuse_own_source(from: &End, target: &Path) -> Result<()> {
    let how = How { write: false, create: false, direct: false, lock: false };
    match RawFile::open(target, how) {
        Ok(raw) if from.files().identities().contains(&raw.identity) => {
            let text = format!("'{}' cannot be the target: it is the source, or a base of it", target.display());
            Err(Error::new(Kind::Invalid, text))
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind == Kind::Host(libc::ENOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The result of a blocking call on `raw`.
fn check(raw: &RawFile, what: &str, ret: i64) -> Result<()> {
    if ret >= 0 {
        return Ok(());
    }
    let error = std::io::Error::from_raw_os_error(-ret as i32);
    Err(crate::raw::os_error(&format!("cannot {what} '{}'", raw.path.display()), &error))
}

fn to_raw(from: End, target: &Target, tick: &mut dyn FnMut(Step) -> bool, begun: &mut bool) -> Result<Converted> {
    let size = from.size()?;
    let options = Options { read_only: false, allow_base: false, ..target.options.clone() };
    let files = Files::create(&target.path, None, None, &options)?;
    *begun = true;
    let raw = &files.image;
    let is_file = raw.limits.grows_zeroed;
    if is_file {
        // What was there before must not show through where nothing is written.
        check(raw, "truncate", raw.truncate(0))?;
        check(raw, "truncate", raw.truncate(size))?;
    } else {
        let length = raw.get_length();
        check(raw, "measure", length)?;
        if (length as u64) < size {
            *begun = false;
            return Err(Error::new(Kind::NoSpace, format!("'{}' has {length} bytes, the disk has {size}", raw.path.display())));
        }
    }
    let plan = Plan { size, sparse: target.sparse, zeroed: is_file, block: 0, chunk: 0, same_base: false };
    let mut copier = Copier::new(from, End::raw(Arc::clone(&files))?, plan);
    let copied = copier.run(tick)?;
    drop(copier);
    if is_file {
        // Direct I/O may have written more than the last sector of the disk.
        check(raw, "truncate", raw.truncate(size))?;
    }
    check(raw, "sync", raw.flush())?;
    Ok(copied)
}

fn to_fvd(from: End, target: &Target, params: &CreateParams, tick: &mut dyn FnMut(Step) -> bool, begun: &mut bool) -> Result<Converted> {
    let size = from.size()?;
    let has_base = !params.base_name.is_empty();
    let params = CreateParams { virtual_size: Some(size), ..params.clone() };
    let creating = &mut |progress| {
        tick(Step::Creating(progress));
    };
    Disk::create(&target.path, &params, true, &target.options, creating)?;
    *begun = true;
    let disk = Disk::open(&target.path, &Options { read_only: false, allow_base: has_base, ..target.options.clone() })?;
    let files = Arc::clone(disk.files());
    let hidden = PageZero::hide(&files.image)?;
    // 0 where nothing of the base is within the disk.
    let header = disk.info()?.header;
    let block = u64::from(header.block_size);
    let plan = Plan {
        size,
        sparse: target.sparse,
        zeroed: block == 0 && (params.compact || files.image.limits.grows_zeroed),
        block,
        chunk: u64::from(header.chunk_size),
        same_base: files.same_base(from.files()),
    };
    let mut copier = Copier::new(from, End::Fvd(disk), plan);
    let copied = copier.run(tick)?;
    copier.close_target()?;
    hidden.show(&files.image)?;
    Ok(copied)
}

/// Page 0 of an image, kept away from its file: what makes it an image.
struct PageZero(Box<Page>);

impl PageZero {
    fn hide(raw: &RawFile) -> Result<Self> {
        let mut page = Box::new(Page([0; 4096]));
        transfer(raw, false, &mut page)?;
        transfer(raw, true, &mut Page([0; 4096]))?;
        // Before anything of the disk is durable.
        check(raw, "sync", raw.flush())?;
        Ok(Self(page))
    }

    /// To be called when all else is durable.
    fn show(mut self, raw: &RawFile) -> Result<()> {
        transfer(raw, true, &mut self.0)?;
        check(raw, "sync", raw.flush())
    }
}

/// Reads or writes the first page of `raw`.
fn transfer(raw: &RawFile, write: bool, page: &mut Page) -> Result<()> {
    let mut cursor = Cursor::new(vec![libc::iovec { iov_base: page.0.as_mut_ptr().cast(), iov_len: page.0.len() }]);
    // SAFETY: `page` outlives the call, which alone uses it.
    let ret = unsafe { raw.transfer(write, false, 0, &mut cursor) };
    check(raw, if write { "write" } else { "read" }, ret)
}
