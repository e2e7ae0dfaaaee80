// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest writes that need copy-on-write or alignment.
//!
//! Order (CC-10…): lock the range → read what copy-on-write needs from the base → write data →
//! set the bits in memory. A flush later freezes the bits, syncs, journals.

use crate::error::{Kind, Result};
use crate::executor::{Job, Queue, fail};
use crate::host::{FileId, GuestBuf, Host, HostOp, OpKind, OwnBuf, Segment};
use crate::image::{add_run, faulty};
use crate::io::{BOUNCE_MAX, ceil, floor};
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// What is written.
pub(crate) enum Payload<B> {
    /// Part of the guest's memory.
    Guest {
        buf: B,
        at: usize,
        len: usize,
    },
    /// Zeroes.
    Zero(usize),
}

impl<B> Payload<B> {
    fn len(&self) -> usize {
        match self {
            Self::Guest { len, .. } | Self::Zero(len) => *len,
        }
    }
}

impl<H: Host> Queue<H> {
    /// Serves a guest write.
    pub(crate) async fn write(self: &Rc<Self>, offset: u64, buf: H::Buf, fua: bool) -> Result<()> {
        self.image().check_writable()?;
        let len = buf.len();
        self.check_bounds(offset, len as u64)?;
        if len > 0 {
            self.leave_pristine().await?;
            let (start, end) = self.lock_range(offset, len as u64);
            let image = self.image().clone();
            let _range = if faulty!(image, NoRangeLock) { None } else { Some(image.ranges.lock(start, end).await) };
            self.wait_for_dirty_room().await?;
            self.write_locked(offset, Payload::Guest { buf, at: 0, len }).await?;
        }
        if fua { self.flush().await } else { Ok(()) }
    }

    /// The range whose lock a change of `len` bytes at `offset` needs.
    pub(crate) fn lock_range(&self, offset: u64, len: u64) -> (u64, u64) {
        let image = self.image();
        let unit = u64::from(image.limits(FileId::Image).request_alignment).max(1 << image.map.block_shift.load(Ordering::Relaxed));
        (floor(offset, unit), ceil(offset + len, unit))
    }

    /// Writes `payload` at `offset`, filling partly covered blocks from the base, and sets the
    /// bits. The caller holds the range's lock.
    pub(crate) async fn write_locked(self: &Rc<Self>, offset: u64, payload: Payload<H::Buf>) -> Result<()> {
        let image = self.image().clone();
        let end = offset + payload.len() as u64;
        let covered = image.map.covered.load(Ordering::Acquire);
        let shift = image.map.block_shift.load(Ordering::Relaxed);
        let block = 1u64 << shift;
        // What copy-on-write adds before and behind: the rest of a first and of a last block whose
        // state is still in the base.
        let (mut head, mut tail) = (Vec::new(), Vec::new());
        let mut bits = None;
        if offset < covered {
            let (first, last) = (offset >> shift, (end.min(covered) - 1) >> shift);
            self.load_blocks(first, last + 1).await?;
            bits = Some((first, last + 1));
            let head_start = floor(offset, block);
            if head_start < offset && !self.run_of(first, first + 1).await?.0 {
                head = self.read_base_own(head_start, offset - head_start).await?;
            }
            // What lies behind the covered length is in this image, bit or no bit.
            let tail_end = ceil(end, block).min(covered);
            if end < tail_end && !self.run_of(last, last + 1).await?.0 && !faulty!(image, NarrowHull) {
                tail = self.read_base_own(end, tail_end - end).await?;
            }
        }
        if let (Some((first, last)), true) = (bits, faulty!(image, BitBeforeData)) {
            self.set_bits(first, last);
        }
        self.write_hull(offset, head, payload, tail).await?;
        assert!(!faulty!(image, PanicInWrite), "planted panic");
        if let Some((first, last)) = bits {
            self.set_bits(first, last);
        }
        Ok(())
    }

    /// Writes `head`, `payload`, `tail`, contiguous, with `payload` at guest byte `offset`.
    pub(crate) async fn write_hull(self: &Rc<Self>, offset: u64, mut head: Vec<u8>, payload: Payload<H::Buf>, mut tail: Vec<u8>) -> Result<()> {
        let image = self.image().clone();
        let limits = *image.limits(FileId::Image);
        let align = u64::from(limits.request_alignment);
        let size = image.map.virtual_size.load(Ordering::Acquire);
        let mut start = offset - head.len() as u64;
        let mut end = offset + (payload.len() + tail.len()) as u64;
        if end == size {
            // The file goes on to a multiple of 4 KiB, and nothing lies between.
            tail.resize(tail.len() + (ceil(end, align) - end) as usize, 0);
            end = ceil(end, align);
        }
        let mut serial = None;
        if start % align != 0 || end % align != 0 {
            // Read-modify-write of host sectors: no other write may touch them meanwhile.
            serial = Some(self.serialise_writes().await);
            let (wide_start, wide_end) = (floor(start, align), ceil(end, align));
            let data = image.map.data_offset.load(Ordering::Relaxed);
            if wide_start < start {
                let (buf, at) = self.read_own(FileId::Image, data + wide_start, align).await?;
                let mut wide = buf.to_vec(at, (start - wide_start) as usize);
                wide.append(&mut head);
                head = wide;
            }
            if wide_end > end {
                let (buf, at) = self.read_own(FileId::Image, data + wide_end - align, align).await?;
                let skip = (end - (wide_end - align)) as usize;
                tail.extend(buf.to_vec(at + skip, (wide_end - end) as usize));
            }
            (start, end) = (wide_start, wide_end);
        }
        let result = self.write_parts(start, end, head, payload, tail).await;
        drop(serial);
        result
    }

    /// Issues the host writes for an aligned hull.
    async fn write_parts(self: &Rc<Self>, start: u64, end: u64, head: Vec<u8>, payload: Payload<H::Buf>, tail: Vec<u8>) -> Result<()> {
        let image = self.image().clone();
        let limits = *image.limits(FileId::Image);
        let file_start = image.map.data_offset.load(Ordering::Relaxed) + start;
        let memory = limits.memory_alignment as usize;
        let (buf, at, len) = match payload {
            Payload::Guest { buf, at, len } => (Some(buf), at, len),
            Payload::Zero(len) => (None, 0, len),
        };
        if let Some(buf) = buf.as_ref().filter(|b| head.len().is_multiple_of(memory) && b.is_aligned(at, len, memory)) {
            let mut segments = Vec::with_capacity(3);
            if !head.is_empty() {
                segments.push(Segment::Own { at: 0, len: head.len(), buf: OwnBuf::from_slice(&head) });
            }
            segments.push(Segment::Guest { buf: buf.clone(), at, len });
            if !tail.is_empty() {
                segments.push(Segment::Own { at: 0, len: tail.len(), buf: OwnBuf::from_slice(&tail) });
            }
            let op = HostOp { kind: OpKind::Write { fua: false }, file: FileId::Image, offset: file_start, len: end - start, segments };
            return self.op(op).await.map(|_| ());
        }
        // Bounced, a piece at a time.
        let total = end - start;
        let mut done = 0;
        while done < total {
            let n = (total - done).min(BOUNCE_MAX);
            let mut own = OwnBuf::zeroed(n as usize);
            let mut piece = vec![0; n as usize];
            let mut fill = |from: u64, len: usize, read: &mut dyn FnMut(usize, &mut [u8])| {
                let (lo, hi) = (from.max(done), (from + len as u64).min(done + n));
                if lo < hi {
                    read((lo - from) as usize, &mut piece[(lo - done) as usize..(hi - done) as usize]);
                }
            };
            fill(0, head.len(), &mut |skip, to| to.copy_from_slice(&head[skip..skip + to.len()]));
            if let Some(buf) = &buf {
                fill(head.len() as u64, len, &mut |skip, to| buf.read(at + skip, to));
            }
            fill((head.len() + len) as u64, tail.len(), &mut |skip, to| to.copy_from_slice(&tail[skip..skip + to.len()]));
            own.write(0, &piece);
            self.write_own(FileId::Image, file_start + done, own, n).await?;
            done += n;
        }
        Ok(())
    }

    /// Excludes every other write until the guard is dropped: new ones ask the engine and find
    /// their range locked, older ones are waited for (R5).
    pub(crate) async fn serialise_writes(self: &Rc<Self>) -> SerialGuard<H> {
        self.image().map.no_direct_writes.fetch_add(1, Ordering::SeqCst);
        let guard = SerialGuard(self.clone());
        self.image().narrow().await;
        guard
    }

    /// Sets the bits of blocks `first..end` in memory and notes those that change for the next
    /// commit. Their data is written; their segments are loaded.
    pub(crate) fn set_bits(self: &Rc<Self>, first: u64, end: u64) {
        let image = self.image();
        let bits = image.bits();
        let mut arm = None;
        let mut commit = false;
        {
            let mut meta = image.meta();
            let mut at = first;
            while at < end {
                let (value, len) = match bits.run(at, end) {
                    crate::bits::Run::Bits { value, len } => (value, len),
                    _ => unreachable!("loaded before the data was written"),
                };
                if !value {
                    for page in at / fvd_format::page::PAYLOAD_BITS..=(at + len - 1) / fvd_format::page::PAYLOAD_BITS {
                        // The page's stable image, from before the first change that is not stable.
                        meta.stable.entry(page).or_insert_with(|| bits.page_words(page));
                    }
                    bits.write(at, at + len, true);
                    add_run(&mut meta.pending, at, at + len);
                }
                at += len;
            }
            if !meta.pending.is_empty() {
                arm = meta.arm_timer(self.host().now_ns(), image.config.commit_interval_ns);
                let half = meta.header.as_ref().expect("open").journal_units() / 2;
                commit = meta.pending_units() > half / 4 && !meta.committing && !std::mem::replace(&mut meta.commit_queued, true);
            }
        }
        if let Some(at) = arm {
            self.host().set_timer(at);
        }
        if commit {
            self.spawn(Job::Commit);
        }
    }

    /// Waits while uncommitted metadata is beyond half a journal half (R1); commits if need be.
    pub(crate) async fn wait_for_dirty_room(self: &Rc<Self>) -> Result<()> {
        let full = |meta: &crate::image::Meta| meta.pending_units() > meta.header.as_ref().expect("open").journal_units() / 4;
        while full(&self.image().meta()) {
            self.image().meta().stats.write_waits += 1;
            self.commit_metadata().await?;
        }
        Ok(())
    }

    /// Refuses a size that is no multiple of 512.
    pub(crate) fn check_sectors(&self, what: &str, value: u64) -> Result<()> {
        if value % 512 != 0 {
            return fail(Kind::Invalid, format!("{what} {value} is no multiple of 512"));
        }
        Ok(())
    }
}

/// Ends a read-modify-write cycle.
pub(crate) struct SerialGuard<H: Host>(Rc<Queue<H>>);

impl<H: Host> Drop for SerialGuard<H> {
    fn drop(&mut self) {
        self.0.image().map.no_direct_writes.fetch_sub(1, Ordering::SeqCst);
    }
}
