// SPDX-License-Identifier: MIT OR Apache-2.0
//! Host operations as the request handlers use them.

use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{FileId, Host, HostOp, OpKind, OwnBuf, Segment};
use crate::image::faulty;
use fvd_format::header::UNUSED_PAGE;
use fvd_format::limits::PAGE_SIZE;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Largest own buffer that data is moved through: bytes.
pub(crate) const BOUNCE_MAX: u64 = 2 << 20;
/// How often a write that must not stay half written is tried.
const ATTEMPTS: usize = 3;
/// The base is not attached.
pub(crate) const ENOMEDIUM: i32 = 123;
/// What a host answers that can zero by writing only.
const ENOTSUP: i32 = 95;

/// The engine's view of an operation's result.
pub(crate) fn result_of<B>(op: &HostOp<B>, ret: i64) -> Result<i64> {
    if ret >= 0 {
        return Ok(ret);
    }
    let errno = i32::try_from(-ret).unwrap_or(5);
    let what = match op.kind {
        OpKind::Read => "reading",
        OpKind::Write { .. } => "writing",
        OpKind::Flush => "syncing",
        OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply => "zeroing",
        OpKind::Discard => "discarding",
        OpKind::Truncate => "setting the length of",
        OpKind::GetLength => "measuring",
        OpKind::BaseStatus => "asking the state of",
    };
    let file = match op.file {
        FileId::Image => "the image file",
        FileId::Data => "the data file",
        FileId::Base => "the base",
    };
    // ENOSPC has a class of its own: a manager can add storage and retry.
    let kind = if errno == 28 { Kind::NoSpace } else { Kind::Host(errno) };
    let why = std::io::Error::from_raw_os_error(errno);
    Err(Error::new(kind, format!("{what} {file} at {} ({} bytes) failed: {why}", op.offset, op.len)))
}

/// An operation without memory.
pub(crate) fn bare<B>(kind: OpKind, file: FileId, offset: u64, len: u64) -> HostOp<B> {
    HostOp { kind, file, offset, len, segments: Vec::new() }
}

/// An operation on one own buffer, from its first byte on.
pub(crate) fn own<B>(kind: OpKind, file: FileId, offset: u64, buf: OwnBuf, len: u64) -> HostOp<B> {
    assert!(len <= buf.capacity() as u64);
    HostOp { kind, file, offset, len, segments: vec![Segment::Own { buf, at: 0, len: len as usize }] }
}

/// The one own buffer of a completed operation.
pub(crate) fn buffer_of<B>(op: HostOp<B>) -> OwnBuf {
    match op.segments.into_iter().next() {
        Some(Segment::Own { buf, .. }) => buf,
        _ => unreachable!("operation had one own buffer"),
    }
}

/// Rounds down to a multiple of `to`, a power of two.
pub(crate) fn floor(value: u64, to: u64) -> u64 {
    value & !(to - 1)
}

/// Rounds up to a multiple of `to`, a power of two. Values are below 2⁶³.
pub(crate) fn ceil(value: u64, to: u64) -> u64 {
    floor(value + (to - 1), to)
}

impl<H: Host> Queue<H> {
    /// Does an operation and returns its result. Once the image is poisoned nothing is written any
    /// more, whoever asks: a batch that was cut short must stay whole in its area (R11).
    pub(crate) async fn op(self: &Rc<Self>, op: HostOp<H::Buf>) -> Result<i64> {
        if !matches!(op.kind, OpKind::Read | OpKind::GetLength | OpKind::BaseStatus) && !faulty!(self.image(), WritesAfterPoison) {
            self.image().check_poison()?;
        }
        let (ret, op) = self.io(op).await;
        result_of(&op, ret)
    }

    /// Zeroes a range if that is cheap; false, and known from now on, if it is not.
    pub(crate) async fn zero_cheaply(self: &Rc<Self>, file: FileId, offset: u64, len: u64) -> Result<bool> {
        let image = self.image().clone();
        match self.op(bare(OpKind::ZeroCheaply, file, offset, len)).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind == Kind::Host(ENOTSUP) => {
                image.zeroing_is_dear.store(true, Ordering::Release);
                Ok(faulty!(image, RefusalIsZero))
            }
            Err(error) => Err(error),
        }
    }

    /// Finds out whether zeroing is dear, if the host promised otherwise: in the reserved space between
    /// the header's copies and the regions.
    pub(crate) async fn probe_zeroing(self: &Rc<Self>) -> Result<()> {
        if !self.image().zeroing_is_dear() && self.image().data_file() == FileId::Image {
            self.zero_cheaply(FileId::Image, UNUSED_PAGE, PAGE_SIZE as u64).await?;
        }
        Ok(())
    }

    /// Reads `len` bytes at `offset`, rounded out to the file's alignment; returns the buffer and
    /// where in it `offset` is.
    pub(crate) async fn read_own(self: &Rc<Self>, file: FileId, offset: u64, len: u64) -> Result<(OwnBuf, usize)> {
        self.read_next(file, offset, len, &mut None).await
    }

    /// The same for one of many reads in a row, into the buffer of the last one if that is large
    /// enough: windows of a journal are too large to be zeroed anew each time.
    pub(crate) async fn read_next(self: &Rc<Self>, file: FileId, offset: u64, len: u64, spare: &mut Option<OwnBuf>) -> Result<(OwnBuf, usize)> {
        let align = u64::from(self.image().limits(file).request_alignment);
        let start = floor(offset, align);
        let total = ceil(offset + len, align) - start;
        let buf = match spare.take().filter(|buf| buf.capacity() as u64 >= total) {
            Some(buf) => buf,
            None => OwnBuf::zeroed(total as usize),
        };
        let (ret, op) = self.io(own(OpKind::Read, file, start, buf, total)).await;
        result_of(&op, ret)?;
        Ok((buffer_of(op), (offset - start) as usize))
    }

    /// Writes own, aligned bytes.
    pub(crate) async fn write_own(self: &Rc<Self>, file: FileId, offset: u64, buf: OwnBuf, len: u64) -> Result<()> {
        self.op(own(OpKind::Write { fua: false }, file, offset, buf, len)).await.map(|_| ())
    }

    /// Writes own, aligned bytes that must not stay half written: an error that passes is repeated,
    /// one that stays poisons.
    pub(crate) async fn write_surely(self: &Rc<Self>, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut result = Ok(());
        for _ in 0..ATTEMPTS {
            result = self.write_own(FileId::Image, offset, OwnBuf::from_slice(bytes), bytes.len() as u64).await;
            if result.is_ok() || self.image().is_poisoned() {
                return result;
            }
        }
        if let Err(error) = &result {
            self.image().poison(&error.text);
        }
        result
    }

    /// Makes completed writes to the image file durable; a failure poisons (R11).
    pub(crate) async fn sync(self: &Rc<Self>) -> Result<()> {
        self.sync_file(FileId::Image).await
    }

    /// The same of the file that holds guest data: the image file, or a data file, of which a sync of
    /// the image file says nothing.
    pub(crate) async fn sync_data(self: &Rc<Self>) -> Result<()> {
        self.sync_file(self.image().data_file()).await
    }

    /// The same of one file.
    pub(crate) async fn sync_file(self: &Rc<Self>, file: FileId) -> Result<()> {
        match self.op(bare(OpKind::Flush, file, 0, 0)).await {
            // Another sync failed meanwhile, and may have dropped what this one was to cover.
            Ok(_) if faulty!(self.image(), SyncBesideFailed) => Ok(()),
            Ok(_) => self.image().check_poison(),
            Err(error) => {
                if faulty!(self.image(), FailedSyncForgotten) {
                    return Err(error);
                }
                self.image().poison(&error.text);
                Err(error)
            }
        }
    }
}
