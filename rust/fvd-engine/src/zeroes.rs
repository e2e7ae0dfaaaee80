// SPDX-License-Identifier: MIT OR Apache-2.0
//! Write-zeroes and discard on flat images.

use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, OpKind};
use crate::image::faulty;
use crate::io::{BOUNCE_MAX, bare, ceil, floor};
use crate::write::Payload;
use std::rc::Rc;
use std::sync::atomic::Ordering;

impl<H: Host> Queue<H> {
    /// Makes a range read as zero, now and after a crash that follows a flush.
    pub(crate) async fn write_zeroes(self: &Rc<Self>, offset: u64, len: u64, may_unmap: bool, fua: bool) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        self.check_bounds(offset, len)?;
        if len > 0 {
            self.leave_pristine().await?;
            let (start, end) = self.lock_range(offset, len);
            let _range = image.ranges.lock(start, end).await;
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
        let size = image.map.virtual_size.load(Ordering::Acquire);
        // Partly covered first and last blocks that are still in the base need copy-on-write.
        let mut from = offset;
        if from < covered && from % block != 0 && !faulty!(image, ZeroWithoutHull) && !self.state_of(from, 1).await?.0 {
            let stop = ceil(from, block).min(end);
            self.zero_by_writing(from, stop).await?;
            from = stop;
        }
        let mut to = end;
        if to > from && to < covered && to % block != 0 && !self.state_of(to - 1, 1).await?.0 {
            let stop = floor(to, block).max(from);
            self.zero_by_writing(stop, to).await?;
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
        let align = u64::from(image.limits(FileId::Image).request_alignment);
        let data = image.map.data_offset.load(Ordering::Relaxed);
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
            self.op(bare(OpKind::WriteZeroes { may_unmap }, FileId::Image, data + inner_start, inner_end - inner_start)).await?;
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
            self.write_locked(offset, Payload::Zero(n as usize)).await?;
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
        let (start, end) = self.lock_range(offset, len);
        let _range = image.ranges.lock(start, end).await;
        let align = u64::from(image.limits(FileId::Image).request_alignment).max(512);
        let data = image.map.data_offset.load(Ordering::Relaxed);
        let mut at = offset;
        while at < offset + len {
            let (present, run) = self.state_of(at, offset + len - at).await?;
            let (mut from, mut to) = (ceil(at, align), floor(at + run, align));
            if faulty!(image, DiscardRoundsOut) {
                (from, to) = (floor(at, align), ceil(at + run, align));
            }
            if present && from < to {
                self.op(bare(OpKind::Discard, FileId::Image, data + from, to - from)).await?;
            }
            at += run;
        }
        Ok(())
    }
}
