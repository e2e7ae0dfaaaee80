// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pass-through: which guest ranges a host may serve by itself (C3).
//!
//! The fast path takes no lock, allocates nothing and reads a handful of atomics. The order
//! matters: the bracket is opened first (R5), then everything that decides is read.

use crate::bits::Run;
use crate::brackets::BracketToken;
use crate::executor::Queue;
use crate::host::{FileId, GuestBuf, Host, HostOp, OpKind, Segment};
use crate::image::{Image, faulty};
use crate::table::EntryRun;
use std::sync::atomic::Ordering;

/// Answer to a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The first `len` bytes (≥ 1, at most what was asked) are at `offset` of `file`. The caller
    /// does the I/O, then calls [`Image::end`] with the token.
    Data {
        /// The file.
        file: FileId,
        /// First byte in it.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The bracket.
        token: BracketToken,
    },
    /// Only the engine can serve this: submit it. No bracket is held.
    Ask,
}

impl Image {
    /// Where guest bytes `offset…offset+len` are, if the host may read (or, with `write`, write)
    /// them there itself. `slot` spreads contention: any small integer, best one per thread. Never
    /// used for FUA writes: their durability passes the engine (R10).
    #[inline]
    pub fn lookup(&self, slot: usize, offset: u64, len: u64, write: bool) -> Lookup {
        if len == 0 {
            return Lookup::Ask;
        }
        let token = self.begin(slot);
        // Within the bracket, as all that decides: a look before it could miss a close that waits for
        // brackets, and answer after the files are closed.
        match self.is_open().then(|| self.place(offset, len, write)).flatten() {
            Some((offset, len)) => Lookup::Data { file: self.data_file(), offset, len, token },
            None => {
                self.end(token);
                Lookup::Ask
            }
        }
    }

    /// File offset and length of the run at `offset`, if it is data. Called within a bracket.
    #[inline]
    fn place(&self, offset: u64, len: u64, write: bool) -> Option<(u64, u64)> {
        let map = &self.map;
        if (write && map.no_direct_writes.load(Ordering::Acquire) != 0) || map.pristine.load(Ordering::Acquire) || self.config.no_io || self.config.metadata_only {
            return None;
        }
        let size = map.virtual_size.load(Ordering::Acquire);
        if offset >= size || len > size - offset {
            return None;
        }
        let covered = map.covered.load(Ordering::Acquire);
        let mut run = len;
        if offset < covered {
            let shift = map.block_shift.load(Ordering::Relaxed);
            let end = (offset + len).min(covered);
            let (first, last) = (offset >> shift, (end - 1) >> shift);
            match map.bits.get()?.run(first, last + 1) {
                Run::Bits { value: true, len: blocks } if first + blocks > last || faulty!(self, LookupBeyondRun) => {}
                Run::Bits { value: true, len: blocks } => run = ((first + blocks) << shift) - offset,
                _ => return None,
            }
        }
        // The bits were loaded before the entry: who finds a bit finds the chunk that it is in.
        match map.chunk_shift.load(Ordering::Relaxed) {
            0 => Some((map.data_offset.load(Ordering::Relaxed) + offset, run)),
            shift => self.place_in_chunks(shift, offset, run),
        }
    }

    /// File offset and length of the run at `offset` of a compact image, if it has storage.
    #[inline]
    fn place_in_chunks(&self, shift: u32, offset: u64, len: u64) -> Option<(u64, u64)> {
        let (first, end) = (offset >> shift, ((offset + len - 1) >> shift) + 1);
        match self.map.table.get()?.entry_run(first, end) {
            EntryRun::Chunks { id, count } => {
                let at = self.map.data_offset.load(Ordering::Relaxed) + (id << shift) + (offset & ((1 << shift) - 1));
                Some((at, len.min(((first + count) << shift) - offset)))
            }
            _ => None,
        }
    }
}

impl<H: Host> Queue<H> {
    /// A request as one host operation, if it needs nothing else; otherwise its buffer back.
    #[allow(clippy::type_complexity)]
    pub(crate) fn direct(&self, offset: u64, buf: H::Buf, write: bool) -> Result<(HostOp<H::Buf>, BracketToken), H::Buf> {
        let len = buf.len() as u64;
        let limits = self.image().data_limits();
        let align = u64::from(limits.request_alignment);
        if !(offset | len).is_multiple_of(align) || !buf.is_aligned(0, buf.len(), limits.memory_alignment as usize) {
            return Err(buf);
        }
        match self.image().lookup(self.bracket_slot(), offset, len, write) {
            Lookup::Data { file, offset, len: run, token } if run == len => {
                let kind = if write { OpKind::Write { fua: false } } else { OpKind::Read };
                let segment = Segment::Guest { at: 0, len: buf.len(), buf };
                Ok((HostOp { kind, file, offset, len, segments: vec![segment] }, token))
            }
            Lookup::Data { token, .. } => {
                self.image().end(token);
                Err(buf)
            }
            Lookup::Ask => Err(buf),
        }
    }
}
