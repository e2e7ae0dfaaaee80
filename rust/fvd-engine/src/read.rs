// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest reads that need more than one host read: runs in the image, runs in the base, alignment.

use crate::error::{Kind, Result};
use crate::executor::{Io, Queue, fail};
use crate::host::{FileId, GuestBuf, Host, HostOp, LogLevel, OpKind, OwnBuf, Segment};
use crate::image::faulty;
use crate::io::{BOUNCE_MAX, ENOMEDIUM, buffer_of, ceil, floor, own, result_of};
use fvd_format::header::BASE_LENGTH_UNKNOWN;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// A read under way: where its bytes go in the guest's buffer.
struct Part<H: Host> {
    io: Io<H>,
    at: usize,
    len: usize,
    /// Bounced: the bytes start here in the own buffer.
    bounce: Option<usize>,
    base: bool,
}

/// Host reads under way for one request, at most.
const PARTS_MAX: usize = 16;

impl<H: Host> Queue<H> {
    /// Checks that a request lies within the disk.
    pub(crate) fn check_bounds(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.image().map.virtual_size.load(Ordering::Acquire);
        if offset > size || len > size - offset {
            return fail(Kind::OutOfRange, format!("{len} bytes at {offset} reach beyond the disk's {size} bytes"));
        }
        Ok(())
    }

    /// How many bytes of the base count: the recorded length, where there is one.
    pub(crate) fn base_length(&self) -> u64 {
        let meta = self.image().meta();
        let header = meta.header.as_ref().expect("open image");
        if header.pristine || header.base_length == BASE_LENGTH_UNKNOWN { u64::MAX } else { header.base_length }
    }

    /// Fills `buf` from guest byte `offset` on.
    pub(crate) async fn read(self: &Rc<Self>, offset: u64, buf: H::Buf) -> Result<()> {
        let len = buf.len() as u64;
        self.check_bounds(offset, len)?;
        let image = self.image().clone();
        let data_offset = image.map.data_offset.load(Ordering::Relaxed);
        let base_length = self.base_length();
        let mut parts: Vec<Part<H>> = Vec::new();
        let mut done = 0;
        let mut result = Ok(());
        while done < len && result.is_ok() {
            let at = offset + done;
            let (present, run) = match self.state_of(at, len - done).await {
                Ok(state) => state,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            let (file, file_offset, run) = if present {
                (FileId::Image, data_offset + at, run)
            } else if at >= base_length {
                buf.zero(done as usize, run as usize);
                done += run;
                continue;
            } else {
                (FileId::Base, at, run.min(base_length - at))
            };
            let run = self.start_part(&mut parts, &buf, file, file_offset, done as usize, run);
            done += run;
            if parts.len() >= PARTS_MAX {
                result = self.finish_parts(&mut parts, &buf).await;
            }
        }
        let rest = self.finish_parts(&mut parts, &buf).await;
        result.and(rest)
    }

    /// Whether guest byte `at` is in this image, and for how many of `len` bytes that holds.
    pub(crate) async fn state_of(self: &Rc<Self>, at: u64, len: u64) -> Result<(bool, u64)> {
        let map = &self.image().map;
        if map.pristine.load(Ordering::Acquire) {
            return Ok((false, len));
        }
        let covered = map.covered.load(Ordering::Acquire);
        if at >= covered {
            return Ok((true, len));
        }
        let shift = map.block_shift.load(Ordering::Relaxed);
        let end = (at + len).min(covered);
        let (present, blocks) = self.run_of(at >> shift, ((end - 1) >> shift) + 1).await?;
        let run_end = (((at >> shift) + blocks) << shift).min(end);
        Ok((present, run_end - at))
    }

    /// Starts one host read into `buf` at `at`; returns how many bytes it covers.
    fn start_part(self: &Rc<Self>, parts: &mut Vec<Part<H>>, buf: &H::Buf, file: FileId, offset: u64, at: usize, len: u64) -> u64 {
        let limits = self.image().limits(file);
        let align = u64::from(limits.request_alignment);
        let base = file == FileId::Base;
        if (offset | len).is_multiple_of(align) && buf.is_aligned(at, len as usize, limits.memory_alignment as usize) {
            let segment = Segment::Guest { buf: buf.clone(), at, len: len as usize };
            let op = HostOp { kind: OpKind::Read, file, offset, len, segments: vec![segment] };
            parts.push(Part { io: self.io(op), at, len: len as usize, bounce: None, base });
            return len;
        }
        let start = floor(offset, align);
        let len = len.min(BOUNCE_MAX - (offset - start));
        let total = ceil(offset + len, align) - start;
        let op = own(OpKind::Read, file, start, OwnBuf::zeroed(total as usize), total);
        parts.push(Part { io: self.io(op), at, len: len as usize, bounce: Some((offset - start) as usize), base });
        len
    }

    /// Waits for every part, also after an error: the host owns the guest's memory till then.
    async fn finish_parts(self: &Rc<Self>, parts: &mut Vec<Part<H>>, buf: &H::Buf) -> Result<()> {
        let mut result = Ok(());
        for part in parts.drain(..) {
            let (ret, op) = part.io.await;
            if part.base && ret == -i64::from(ENOMEDIUM) {
                // No base attached (`backing: null`): its blocks read as zero, as qcow2's do.
                buf.zero(part.at, part.len);
                continue;
            }
            if let Err(error) = result_of(&op, ret) {
                self.host().log(LogLevel::Error, &error.text);
                result = result.and(Err(error));
                continue;
            }
            if part.base {
                self.image().meta().stats.base_bytes += part.len as u64;
            }
            if let Some(skip) = part.bounce {
                buffer_of(op).for_each(skip, part.len, |i, piece| buf.fill(part.at + i, piece));
            }
        }
        result
    }

    /// Reads guest bytes of the base into an own buffer, zero where there is none.
    pub(crate) async fn read_base_own(self: &Rc<Self>, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut out = vec![0; len as usize];
        let usable = self.base_length().saturating_sub(offset).min(len);
        if usable == 0 {
            return Ok(out);
        }
        let align = u64::from(self.image().limits(FileId::Base).request_alignment);
        let start = floor(offset, align);
        let total = ceil(offset + usable, align) - start;
        let (ret, op) = self.io(own(OpKind::Read, FileId::Base, start, OwnBuf::zeroed(total as usize), total)).await;
        if ret == -i64::from(ENOMEDIUM) || (ret < 0 && faulty!(self.image(), BaseErrorIsZero)) {
            return Ok(out);
        }
        result_of(&op, ret)?;
        self.image().meta().stats.base_bytes += usable;
        buffer_of(op).for_each((offset - start) as usize, usable as usize, |i, piece| out[i..i + piece.len()].copy_from_slice(piece));
        Ok(out)
    }
}
