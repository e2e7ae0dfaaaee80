// SPDX-License-Identifier: MIT OR Apache-2.0
//! Write-zeroes and discard.

use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel, OpKind};
use crate::image::faulty;
use crate::io::{BOUNCE_MAX, bare, ceil, floor};
use crate::request::Place;
use crate::table::EntryRun;
use crate::write::Payload;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Most chunks whose storage is taken away in one step.
const FREE_AT_ONCE: u64 = 1 << 14;

impl<H: Host> Queue<H> {
    /// Makes a range read as zero, now and after a crash that follows a flush.
    pub(crate) async fn write_zeroes(self: &Rc<Self>, offset: u64, len: u64, may_unmap: bool, fua: bool) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        self.check_bounds(offset, len)?;
        if len > 0 {
            self.leave_pristine().await?;
            let _range = self.lock_whole(offset, len, true).await;
            self.check_bounds(offset, len)?;
            self.wait_for_dirty_room().await?;
            self.zero_locked(offset, offset + len, may_unmap).await?;
        }
        if fua { self.flush().await } else { Ok(()) }
    }

    async fn zero_locked(self: &Rc<Self>, offset: u64, end: u64, may_unmap: bool) -> Result<()> {
        let image = self.image().clone();
        let covered = image.map.covered.load(Ordering::Acquire);
        let shift = image.map.block_shift.load(Ordering::Relaxed);
        let block = 1u64 << shift;
        // Partly covered first and last blocks that are still in the base need copy-on-write; past the base
        // such a block reads as zero already.
        let zero_from = image.map.zero_from.load(Ordering::Acquire);
        let mut from = offset;
        if from < covered && from % block != 0 && !faulty!(image, ZeroWithoutHull) && !self.state_of(from, 1).await?.0 {
            let stop = ceil(from, block).min(end);
            if from < zero_from {
                self.zero_by_writing(from, stop).await?;
            }
            from = stop;
        }
        let mut to = end;
        if to > from && to < covered && to % block != 0 && !self.state_of(to - 1, 1).await?.0 {
            let stop = floor(to, block).max(from);
            if stop < zero_from {
                self.zero_by_writing(stop, to).await?;
            }
            to = stop;
        }
        if from == to {
            return Ok(());
        }
        if from < covered {
            // Before the zeroing: what cannot be loaded must fail before anything changes.
            self.load_blocks(from >> shift, ((to.min(covered) - 1) >> shift) + 1).await?;
        }
        if from < covered && faulty!(image, BitBeforeZeroing) {
            self.set_bits(from >> shift, ((to.min(covered) - 1) >> shift) + 1);
        }
        let chunk_shift = image.map.chunk_shift.load(Ordering::Relaxed);
        let data = image.map.data_offset.load(Ordering::Relaxed);
        if chunk_shift == 0 {
            return self.zero_in_place(from, to, may_unmap, data).await;
        }
        let mut at = from;
        while at < to {
            let (first, whole) = self.whole_chunks(at, to);
            if may_unmap && whole > 0 {
                self.free_chunks(first, first + whole).await?;
                at = ((first + whole) << chunk_shift).min(to);
                self.wait_for_dirty_room().await?;
                continue;
            }
            let first = at >> chunk_shift;
            let end = if may_unmap && !image.config.discard_no_unref { first + 1 } else { ((to - 1) >> chunk_shift) + 1 };
            let stop = |count: u64| ((first + count) << chunk_shift).min(to);
            match self.entries_of(first, end).await? {
                EntryRun::Chunks { id, count } => {
                    let base = (data + (id << chunk_shift)).wrapping_sub(first << chunk_shift);
                    self.zero_in_chunks(at, stop(count), may_unmap, base).await?;
                    at = stop(count);
                }
                EntryRun::Free { count } => {
                    if at < covered {
                        self.say_zero(at >> shift, ((stop(count).min(covered) - 1) >> shift) + 1);
                    }
                    at = stop(count);
                }
                other => unreachable!("loaded: {other:?}"),
            }
        }
        Ok(())
    }

    /// The first chunk at or after `from`, if it starts there, and how many chunks may lose their storage
    /// from there on: those that are whole before `to`. So many at a time that their records are a small commit.
    fn whole_chunks(&self, from: u64, to: u64) -> (u64, u64) {
        let map = &self.image().map;
        let shift = map.chunk_shift.load(Ordering::Relaxed);
        let size = map.virtual_size.load(Ordering::Acquire);
        let first = from >> shift;
        // With `discard_no_unref` every chunk keeps its place, and is treated as one of a flat disk.
        if shift == 0 || first << shift != from || self.image().config.discard_no_unref {
            return (first, 0);
        }
        let end = if to == size { to.div_ceil(1 << shift) } else { to >> shift };
        (first, (end - first).min(FREE_AT_ONCE))
    }

    /// Lets whole chunks read as zero by taking their storage away (R4, R5): out of the table first,
    /// then everybody who began before ends, then the storage waits for the commit.
    async fn free_chunks(self: &Rc<Self>, first: u64, end: u64) -> Result<()> {
        let image = self.image().clone();
        let chunk = 1u64 << image.map.chunk_shift.load(Ordering::Relaxed);
        let covered = image.map.covered.load(Ordering::Acquire);
        let block = 1u64 << image.map.block_shift.load(Ordering::Relaxed);
        self.ensure_space().await?;
        self.load_entries(first, end).await?;
        let blocks = (first * chunk < covered).then(|| (first * chunk / block, (end * chunk).min(covered).div_ceil(block)));
        if let Some((from, to)) = blocks {
            self.load_blocks(from, to).await?;
        }
        let freed = self.unmap(first, end, blocks);
        if freed.is_empty() {
            return Ok(());
        }
        if !faulty!(image, FreeWithoutNarrowing) {
            image.narrow().await;
        }
        if faulty!(image, FreedAtOnce) {
            self.release_chunks(freed);
        } else {
            self.free(freed);
        }
        Ok(())
    }

    /// The same for a range of chunks that have storage: whole blocks past the base get the bit that says zero.
    async fn zero_in_chunks(self: &Rc<Self>, from: u64, to: u64, may_unmap: bool, base: u64) -> Result<()> {
        let (first, last) = self.zero_blocks(from, to);
        if first >= last {
            return self.zero_in_place(from, to, may_unmap, base).await;
        }
        if from < first {
            self.zero_in_place(from, first, may_unmap, base).await?;
        }
        if last < to {
            self.zero_in_place(last, to, may_unmap, base).await?;
        }
        self.hide(first, last).await;
        if may_unmap {
            self.give_back(self.image().data_file(), base.wrapping_add(first), base.wrapping_add(last)).await;
        }
        Ok(())
    }

    /// The part of a range that a bitmap can say to be zero: whole blocks, past the base. Empty if start ≥ end.
    fn zero_blocks(&self, from: u64, to: u64) -> (u64, u64) {
        let map = &self.image().map;
        let (covered, block) = (map.covered.load(Ordering::Acquire), 1u64 << map.block_shift.load(Ordering::Relaxed));
        let start = ceil(from, block).max(map.zero_from.load(Ordering::Acquire));
        let end = if to == covered { to } else { floor(to.min(covered), block) };
        (start, if faulty!(self.image(), ZeroBitsRoundOut) && start < to { ceil(to, block).min(covered) } else { end })
    }

    /// Says of whole blocks past the base that they read as zero, and waits for whoever found them to be
    /// data (R5). The caller has loaded their bits.
    async fn hide(self: &Rc<Self>, first: u64, last: u64) {
        let shift = self.image().map.block_shift.load(Ordering::Relaxed);
        self.say_zero(first >> shift, last.div_ceil(1 << shift));
        self.image().narrow().await;
    }

    /// Lets the storage have bytes `start..end` of a file back, as far as it cares to; nobody reads them.
    async fn give_back(self: &Rc<Self>, file: FileId, start: u64, end: u64) {
        let align = u64::from(self.image().data_limits().request_alignment);
        let (start, end) = (ceil(start, align), floor(end, align));
        if start < end
            && let Err(error) = self.op(bare(OpKind::Discard, file, start, end - start)).await
        {
            self.host().log(LogLevel::Warning, &error.context("giving storage back").text);
        }
    }

    /// Zeroes a range that lies in one place of the file: guest byte *g* at `base` + *g*, modulo 2⁶⁴. Its
    /// first and last blocks are in this image, or it covers them whole.
    async fn zero_in_place(self: &Rc<Self>, from: u64, to: u64, may_unmap: bool, base: u64) -> Result<()> {
        let image = self.image().clone();
        let covered = image.map.covered.load(Ordering::Acquire);
        let shift = image.map.block_shift.load(Ordering::Relaxed);
        let block = 1u64 << shift;
        let size = image.map.virtual_size.load(Ordering::Acquire);
        let align = u64::from(image.data_limits().request_alignment);
        let mut inner_end = if to == size { ceil(to, align) } else { floor(to, align) };
        if inner_end < to && inner_end < covered && !self.state_of(inner_end, 1).await?.0 {
            // The rest is written, and that would fill the front of its block from the base.
            inner_end = floor(inner_end, block);
        }
        let inner_start = ceil(from, align);
        if inner_start < inner_end {
            if from < inner_start {
                self.zero_by_writing(from, inner_start).await?;
            }
            let op = bare(OpKind::WriteZeroes { may_unmap }, image.data_file(), base.wrapping_add(inner_start), inner_end - inner_start);
            self.op(op).await?;
            if to > inner_end {
                self.zero_by_writing(inner_end, to).await?;
            }
        } else {
            self.zero_by_writing(from, to).await?;
        }
        if from < covered {
            self.set_bits(from >> shift, ((to.min(covered) - 1) >> shift) + 1);
        }
        Ok(())
    }

    /// Zeroes a short range as a guest write of zeroes would.
    async fn zero_by_writing(self: &Rc<Self>, mut offset: u64, end: u64) -> Result<()> {
        while offset < end {
            let n = (end - offset).min(BOUNCE_MAX);
            self.write_locked(offset, Payload::Zero(n as usize), true).await?;
            offset += n;
        }
        Ok(())
    }

    /// Gives storage back. What is still in the base stays as it is: without a bit to say so, it
    /// could not be told from data.
    pub(crate) async fn discard(self: &Rc<Self>, offset: u64, len: u64) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        self.check_bounds(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let _range = self.lock_whole(offset, len, true).await;
        self.check_bounds(offset, len)?;
        let align = u64::from(image.data_limits().request_alignment).max(512);
        let mut at = offset;
        while at < offset + len {
            let (first, whole) = self.whole_chunks(at, offset + len);
            if whole > 0 {
                self.wait_for_dirty_room().await?;
                self.free_chunks(first, first + whole).await?;
                at = ((first + whole) << image.map.chunk_shift.load(Ordering::Relaxed)).min(offset + len);
                continue;
            }
            let (place, run) = self.place_of(at, self.part_of_chunk(at, offset + len)).await?;
            let (mut from, mut to) = (ceil(at, align), floor(at + run, align));
            if faulty!(image, DiscardRoundsOut) {
                (from, to) = (floor(at, align), ceil(at + run, align));
            }
            let (first, last) = self.zero_blocks(at, at + run);
            if let Place::Data { .. } = place
                && first < last
            {
                // Its bits say so, durably in time; what they do not reach stays as it is.
                self.wait_for_dirty_room().await?;
                self.hide(first, last).await;
                (from, to) = (from.max(first), to.min(last));
            }
            if let Place::Data { file, offset } = place
                && from < to
            {
                self.op(bare(OpKind::Discard, file, offset.wrapping_add(from).wrapping_sub(at), to - from)).await?;
            }
            at += run;
        }
        Ok(())
    }

    /// Bytes from `at` to the end of its chunk, or to `end`.
    fn part_of_chunk(&self, at: u64, end: u64) -> u64 {
        match self.image().map.chunk_shift.load(Ordering::Relaxed) {
            0 => end - at,
            shift => (((at >> shift) + 1) << shift).min(end) - at,
        }
    }
}
