// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest reads that need more than one host read: runs in the image, runs in the base, alignment.

use crate::bits::Run;
use crate::bits_load::{bad_bits, bad_entries};
use crate::brackets::BracketToken;
use crate::error::{Error, Kind, Result};
use crate::executor::{Io, Queue, fail};
use crate::host::{FileId, GuestBuf, Host, HostOp, LogLevel, OpKind, OwnBuf, Segment};
use crate::image::{Image, faulty};
use crate::io::{BOUNCE_MAX, ENOMEDIUM, buffer_of, ceil, floor, own, result_of};
use crate::request::Place;
use crate::table::EntryRun;
use fvd_format::RegionKind;
use fvd_format::header::BASE_LENGTH_UNKNOWN;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A read under way: where its bytes go in the guest's buffer.
struct Part<H: Host> {
    io: Io<H>,
    at: usize,
    len: usize,
    /// Bounced: the bytes start here in the own buffer.
    bounce: Option<usize>,
    base: bool,
    /// Held while the image's own data is read.
    _bracket: Option<Bracket>,
}

/// A bracket of the engine's own: narrowing waits for it.
pub(crate) struct Bracket(Arc<Image>, BracketToken);

impl Bracket {
    fn begin<H: Host>(queue: &Queue<H>) -> Self {
        Self(queue.image().clone(), queue.image().begin(queue.bracket_slot()))
    }
}

impl Drop for Bracket {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

/// Answer of [`Image::locate`].
pub(crate) enum Located {
    /// All of so many bytes are there.
    Run(Place, u64),
    /// This segment of a region has to be loaded first.
    Missing(RegionKind, u64),
    /// Its metadata is damaged.
    Bad(Error),
}

impl Image {
    /// Where guest byte `at` is, and for how many of `len` bytes that holds, by what is in memory.
    pub(crate) fn locate(&self, at: u64, len: u64) -> Located {
        let map = &self.map;
        // Within the bracket of who asks: the disk may have shrunk since the request began.
        let size = map.virtual_size.load(Ordering::Acquire);
        if at >= size {
            return Located::Bad(Error::new(Kind::OutOfRange, format!("byte {at} lies beyond the disk's {size} bytes")));
        }
        let len = len.min(size - at);
        if map.pristine.load(Ordering::Acquire) {
            return Located::Run(Place::Base, len);
        }
        let covered = map.covered.load(Ordering::Acquire);
        let mut run = len;
        if at < covered {
            let shift = map.block_shift.load(Ordering::Relaxed);
            let end = (at + len).min(covered);
            match self.bits().run(at >> shift, ((end - 1) >> shift) + 1) {
                Run::Bits { value, len: blocks } => {
                    run = (((at >> shift) + blocks) << shift).min(end) - at;
                    if !value {
                        return Located::Run(Place::Base, run);
                    }
                }
                Run::Missing(segment) => return Located::Missing(RegionKind::Bitmap, segment),
                Run::Bad => return Located::Bad(bad_bits(at >> shift)),
            }
        }
        let data = map.data_offset.load(Ordering::Relaxed);
        let shift = map.chunk_shift.load(Ordering::Relaxed);
        if shift == 0 {
            return Located::Run(Place::Data { file: self.data_file(), offset: data + at }, run);
        }
        let (first, end) = (at >> shift, ((at + run - 1) >> shift) + 1);
        let up_to = |count: u64| run.min(((first + count) << shift) - at);
        match self.region(RegionKind::Table).entry_run(first, end) {
            EntryRun::Free { count } => Located::Run(Place::Zero, up_to(count)),
            EntryRun::Chunks { id, count } => {
                let offset = data + (id << shift) + (at & ((1 << shift) - 1));
                Located::Run(Place::Data { file: self.data_file(), offset }, up_to(count))
            }
            EntryRun::Missing(segment) => Located::Missing(RegionKind::Table, segment),
            EntryRun::Bad => Located::Bad(bad_entries(first)),
        }
    }
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
        let base_length = self.base_length();
        let mut parts: Vec<Part<H>> = Vec::new();
        let mut done = 0;
        let mut result = Ok(());
        while done < len && result.is_ok() {
            let at = offset + done;
            // Within a bracket, so that what is found stays until it is read (R4).
            let bracket = Bracket::begin(self);
            let (place, run) = match image.locate(at, len - done) {
                Located::Run(place, run) => (place, run),
                Located::Missing(kind, segment) => {
                    drop(bracket);
                    result = self.load_segment(kind, segment).await;
                    continue;
                }
                Located::Bad(error) => {
                    result = Err(error);
                    break;
                }
            };
            let bracket = Some(bracket).filter(|_| !faulty!(image, ReadWithoutBracket));
            let (part, run) = match place {
                Place::Data { file, offset } => self.start_part(&buf, file, offset, done as usize, run, bracket),
                Place::Base if at < base_length => self.start_part(&buf, FileId::Base, at, done as usize, run.min(base_length - at), None),
                Place::Base | Place::Zero => {
                    buf.zero(done as usize, run as usize);
                    done += run;
                    continue;
                }
            };
            parts.push(part);
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

    /// Where guest byte `at` is, and for how many of `len` bytes that holds.
    pub(crate) async fn place_of(self: &Rc<Self>, at: u64, len: u64) -> Result<(Place, u64)> {
        loop {
            match self.image().locate(at, len) {
                Located::Run(place, run) => return Ok((place, run)),
                Located::Missing(kind, segment) => self.load_segment(kind, segment).await?,
                Located::Bad(error) => return Err(error),
            }
        }
    }

    /// Starts one host read into `buf` at `at`; says how many bytes it covers.
    fn start_part(self: &Rc<Self>, buf: &H::Buf, file: FileId, offset: u64, at: usize, len: u64, bracket: Option<Bracket>) -> (Part<H>, u64) {
        let limits = self.image().limits(file);
        let align = u64::from(limits.request_alignment);
        let base = file == FileId::Base;
        if (offset | len).is_multiple_of(align) && buf.is_aligned(at, len as usize, limits.memory_alignment as usize) {
            let segment = Segment::Guest { buf: buf.clone(), at, len: len as usize };
            let op = HostOp { kind: OpKind::Read, file, offset, len, segments: vec![segment] };
            return (Part { io: self.io(op), at, len: len as usize, bounce: None, base, _bracket: bracket }, len);
        }
        let start = floor(offset, align);
        let len = len.min(BOUNCE_MAX - (offset - start));
        let total = ceil(offset + len, align) - start;
        let op = own(OpKind::Read, file, start, OwnBuf::zeroed(total as usize), total);
        (Part { io: self.io(op), at, len: len as usize, bounce: Some((offset - start) as usize), base, _bracket: bracket }, len)
    }

    /// Waits for every part, also after an error: the host owns the guest's memory till then.
    async fn finish_parts(self: &Rc<Self>, parts: &mut Vec<Part<H>>, buf: &H::Buf) -> Result<()> {
        let mut result = Ok(());
        for part in parts.drain(..) {
            let Part { io, at, len, bounce, base, _bracket } = part;
            let (ret, op) = io.await;
            if base && ret == -i64::from(ENOMEDIUM) {
                // No base attached (`backing: null`): its blocks read as zero, as qcow2's do.
                buf.zero(at, len);
                continue;
            }
            if let Err(error) = result_of(&op, ret) {
                self.host().log(LogLevel::Error, &error.text);
                result = result.and(Err(error));
                continue;
            }
            if base {
                self.image().meta().stats.base_bytes += len as u64;
            }
            if let Some(skip) = bounce {
                buffer_of(op).for_each(skip, len, |i, piece| buf.fill(at + i, piece));
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
