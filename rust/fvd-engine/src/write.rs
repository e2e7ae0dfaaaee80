// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest writes that need copy-on-write or alignment.
//!
//! Order (CC-10…): lock the range → read what copy-on-write needs from the base → write data →
//! set the bits in memory. A flush later freezes the bits, syncs, journals.

use crate::bits::Run;
use crate::changes::{Runs, add_run};
use crate::error::{Kind, Result};
use crate::executor::{Job, Queue, fail};
use crate::host::{GuestBuf, Host, HostOp, OpKind, OwnBuf, Segment};
use crate::image::{Image, Meta, faulty};
use crate::io::{BOUNCE_MAX, bare, ceil, floor};
use crate::space::Taken;
use crate::sync::RangeGuard;
use crate::table::{EntryRun, page_of_entry};
use fvd_format::RegionKind;
use fvd_format::page::PAYLOAD_BITS;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// What is written.
#[derive(Clone)]
pub(crate) enum Payload<B> {
    /// Part of the guest's memory.
    Guest {
        buf: B,
        at: usize,
        len: usize,
    },
    /// The engine's own bytes.
    Own(Rc<Vec<u8>>, usize, usize),
    /// Zeroes.
    Zero(usize),
}

impl<B: Clone> Payload<B> {
    fn len(&self) -> usize {
        match self {
            Self::Guest { len, .. } | Self::Own(_, _, len) | Self::Zero(len) => *len,
        }
    }

    /// `len` bytes of it from byte `from` on.
    fn part(&self, from: usize, len: usize) -> Self {
        match self {
            Self::Guest { buf, at, .. } => Self::Guest { buf: buf.clone(), at: at + from, len },
            Self::Own(bytes, at, _) => Self::Own(bytes.clone(), at + from, len),
            Self::Zero(_) => Self::Zero(len),
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
            let image = self.image().clone();
            let _range = if faulty!(image, NoRangeLock) { None } else { Some(self.lock_for_write(offset, len as u64).await?) };
            // Before it had the lock, the disk may have shrunk.
            self.check_bounds(offset, len as u64)?;
            self.wait_for_dirty_room().await?;
            let _range = _range.filter(|_| !faulty!(image, LockReleasedEarly));
            self.write_locked(offset, Payload::Guest { buf, at: 0, len }, true).await?;
        }
        if fua && !faulty!(self.image(), FuaNotCommitted) { self.flush().await } else { Ok(()) }
    }

    /// The range whose lock a change of `len` bytes at `offset` needs.
    pub(crate) fn lock_range(&self, offset: u64, len: u64) -> (u64, u64) {
        let image = self.image();
        let unit = u64::from(image.data_limits().request_alignment).max(1 << image.map.block_shift.load(Ordering::Relaxed));
        (floor(offset, unit), ceil(offset + len, unit))
    }

    /// The range whose lock a change of table entries of `len` bytes at `offset` needs.
    pub(crate) fn chunk_range(&self, offset: u64, len: u64) -> (u64, u64) {
        let (start, end) = self.lock_range(offset, len);
        let chunk = 1u64 << self.image().map.chunk_shift.load(Ordering::Relaxed);
        (floor(start, chunk), ceil(end, chunk))
    }

    /// Locks what a write changes: its blocks, or whole chunks where one has no storage yet, so that
    /// one request gives it some.
    async fn lock_for_write(self: &Rc<Self>, offset: u64, len: u64) -> Result<RangeGuard<'_>> {
        loop {
            let wide = self.lacks_storage(offset, len).await?;
            let guard = self.lock_whole(offset, len, wide).await;
            // A discard may have been faster.
            if wide || faulty!(self.image(), NoSecondLook) || !self.lacks_storage(offset, len).await? {
                return Ok(guard);
            }
        }
    }

    /// Locks the blocks of a range, or its chunks if `wide`.
    pub(crate) async fn lock_whole(&self, offset: u64, len: u64, wide: bool) -> RangeGuard<'_> {
        let range = || if wide { self.chunk_range(offset, len) } else { self.lock_range(offset, len) };
        loop {
            let (start, end) = range();
            let guard = self.image().ranges.lock(start, end).await;
            // While it waited, the image may have got its first bitmap, and blocks with it.
            if range() == (start, end) || faulty!(self.image(), LockOfOldBlocks) {
                return guard;
            }
        }
    }

    /// Whether a chunk of the range has no storage.
    async fn lacks_storage(self: &Rc<Self>, offset: u64, len: u64) -> Result<bool> {
        let shift = self.image().map.chunk_shift.load(Ordering::Relaxed);
        if shift == 0 {
            return Ok(false);
        }
        let (mut first, end) = (offset >> shift, ((offset + len - 1) >> shift) + 1);
        while first < end {
            match self.entries_of(first, end).await? {
                EntryRun::Chunks { count, .. } => first += count,
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Writes `payload` at `offset`, filling partly covered blocks from the base, giving chunks
    /// storage, and sets bits and entries. The caller holds the range's lock, and nothing else if this
    /// may wait for storage.
    pub(crate) async fn write_locked(self: &Rc<Self>, offset: u64, payload: Payload<H::Buf>, may_wait: bool) -> Result<()> {
        let image = self.image().clone();
        let shift = image.map.chunk_shift.load(Ordering::Relaxed);
        let data = image.map.data_offset.load(Ordering::Relaxed);
        if shift == 0 {
            return self.write_piece(offset, payload, data, None).await;
        }
        let end = offset + payload.len() as u64;
        let mut at = offset;
        while at < end {
            // Neighbours that lie one behind the other are written in one go.
            let (first, last) = (at >> shift, (end - 1) >> shift);
            let (id, count, new) = match self.entries_of(first, last + 1).await? {
                EntryRun::Chunks { id, count } => (id, count, None),
                EntryRun::Free { count } => {
                    let taken = if may_wait { self.allocate_for_guest(count).await? } else { self.allocate(count).await? };
                    (taken.id, taken.count, Some(NewChunks { first, taken }))
                }
                other => unreachable!("loaded: {other:?}"),
            };
            let stop = ((first + count) << shift).min(end);
            let base = (data + (id << shift)).wrapping_sub(first << shift);
            let part = payload.part((at - offset) as usize, (stop - at) as usize);
            if let Err(error) = self.write_piece(at, part, base, new).await {
                if let Some(new) = new {
                    image.give_back_chunks(new.taken.id, new.taken.id + new.taken.count);
                }
                return Err(error);
            }
            at = stop;
        }
        Ok(())
    }

    /// Writes a piece that lies in one place of the file: guest byte *g* at `base` + *g*, modulo 2⁶⁴.
    async fn write_piece(self: &Rc<Self>, offset: u64, payload: Payload<H::Buf>, base: u64, new: Option<NewChunks>) -> Result<()> {
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
            let tail_end = if faulty!(image, TailBeyondCovered) { ceil(end, block) } else { ceil(end, block).min(covered) };
            if end < tail_end && !self.run_of(last, last + 1).await?.0 && !faulty!(image, NarrowHull) {
                tail = self.read_base_own(end, tail_end - end).await?;
            }
        }
        if let Some(new) = new {
            self.zero_new_chunks(offset, end, base, new).await?;
            if new.taken.fresh
                && let Some((from, to)) = self.bits_of_fresh(new)
            {
                // All of it reads as zero with and without bits, and later writes need not ask.
                self.load_blocks(from, to).await?;
                bits = Some((from, to));
            }
        }
        let entries = new.map(|new| (new.first, new.taken));
        if (bits.is_some() || new.is_some()) && faulty!(image, BitBeforeData) {
            self.expose(entries, bits);
        }
        self.write_hull(offset, head, payload, tail, base).await?;
        assert!(!faulty!(image, PanicInWrite), "planted panic");
        self.expose(entries, bits);
        Ok(())
    }

    /// Blocks of new chunks past the base; `None` if some are not, or have no bits.
    fn bits_of_fresh(&self, new: NewChunks) -> Option<(u64, u64)> {
        let map = &self.image().map;
        let (chunk, block) = (map.chunk_shift.load(Ordering::Relaxed), map.block_shift.load(Ordering::Relaxed));
        let covered = map.covered.load(Ordering::Acquire);
        let (from, to) = (new.first << chunk, ((new.first + new.taken.count) << chunk).min(covered));
        (from >= map.zero_from.load(Ordering::Acquire) && from < to).then(|| (from >> block, to.div_ceil(1 << block)))
    }

    /// Zeroes what `offset..end` leaves of chunks that were just handed out, unless they read as zero.
    async fn zero_new_chunks(self: &Rc<Self>, offset: u64, end: u64, base: u64, new: NewChunks) -> Result<()> {
        let image = self.image().clone();
        if new.taken.fresh || faulty!(image, ReuseNotZeroed) {
            return Ok(());
        }
        let shift = image.map.chunk_shift.load(Ordering::Relaxed);
        // Chunks that the write covers whole need nothing.
        let mut chunks = vec![(new.first, new.first + new.taken.count)];
        let (whole_start, whole_end) = (ceil(offset, 1 << shift) >> shift, end >> shift);
        if whole_start < whole_end {
            chunks = vec![(new.first, whole_start), (whole_end, new.first + new.taken.count)];
        }
        for (first, stop) in chunks.into_iter().filter(|(first, stop)| first < stop) {
            let (mut at, stop) = (first << shift, stop << shift);
            while at < stop {
                let (hidden, next) = self.hidden(at, stop).await?;
                if !hidden {
                    let op = bare(OpKind::WriteZeroes { may_unmap: false }, image.data_file(), base.wrapping_add(at), next - at);
                    self.op(op).await?;
                }
                at = next;
            }
        }
        Ok(())
    }

    /// Whether bits say that nobody sees the storage of guest bytes from `at` on, and up to where below
    /// `stop` that holds; both are borders of blocks.
    async fn hidden(self: &Rc<Self>, at: u64, stop: u64) -> Result<(bool, u64)> {
        let map = &self.image().map;
        let shift = map.block_shift.load(Ordering::Relaxed);
        // Of a block that the bitmap covers in part the rest is in this image, as soon as the disk has grown.
        let whole = floor(map.covered.load(Ordering::Acquire), 1 << shift);
        if at >= whole {
            return Ok((false, stop));
        }
        let (bit, blocks) = self.run_of(at >> shift, stop.min(whole) >> shift).await?;
        Ok((!bit, at + (blocks << shift)))
    }

    /// Writes `head`, `payload`, `tail`, contiguous, with `payload` at guest byte `offset`, which is file
    /// byte `base` + `offset`.
    pub(crate) async fn write_hull(self: &Rc<Self>, offset: u64, mut head: Vec<u8>, payload: Payload<H::Buf>, mut tail: Vec<u8>, base: u64) -> Result<()> {
        let image = self.image().clone();
        let limits = *image.data_limits();
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
            if wide_start < start {
                let (buf, at) = self.read_own(image.data_file(), base.wrapping_add(wide_start), align).await?;
                let mut wide = buf.to_vec(at, (start - wide_start) as usize);
                wide.append(&mut head);
                head = wide;
            }
            if wide_end > end {
                let (buf, at) = self.read_own(image.data_file(), base.wrapping_add(wide_end - align), align).await?;
                let skip = (end - (wide_end - align)) as usize;
                tail.extend(buf.to_vec(at + skip, (wide_end - end) as usize));
            }
            (start, end) = (wide_start, wide_end);
        }
        let result = self.write_parts(base.wrapping_add(start), end - start, head, payload, tail).await;
        drop(serial);
        result
    }

    /// Issues the host writes for an aligned hull.
    async fn write_parts(self: &Rc<Self>, file_start: u64, total: u64, head: Vec<u8>, payload: Payload<H::Buf>, tail: Vec<u8>) -> Result<()> {
        let image = self.image().clone();
        let limits = *image.data_limits();
        let memory = limits.memory_alignment as usize;
        let (buf, own_bytes, at, len) = match payload {
            Payload::Guest { buf, at, len } => (Some(buf), None, at, len),
            Payload::Own(bytes, at, len) => (None, Some(bytes), at, len),
            Payload::Zero(len) => (None, None, 0, len),
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
            let op = HostOp { kind: OpKind::Write { fua: false }, file: image.data_file(), offset: file_start, len: total, segments };
            return self.op(op).await.map(|_| ());
        }
        // Bounced, a piece at a time.
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
            if let Some(bytes) = &own_bytes {
                fill(head.len() as u64, len, &mut |skip, to| to.copy_from_slice(&bytes[at + skip..at + skip + to.len()]));
            }
            fill((head.len() + len) as u64, tail.len(), &mut |skip, to| to.copy_from_slice(&tail[skip..skip + to.len()]));
            own.write(0, &piece);
            self.write_own(image.data_file(), file_start + done, own, n).await?;
            done += n;
        }
        Ok(())
    }

    /// Excludes every other write until the guard is dropped: new ones ask the engine and find
    /// their range locked, older ones are waited for (R5).
    pub(crate) async fn serialise_writes(self: &Rc<Self>) -> SerialGuard<H> {
        self.image().map.no_direct_writes.fetch_add(1, Ordering::SeqCst);
        let guard = SerialGuard(self.clone());
        if !faulty!(self.image(), NoNarrowing) {
            self.image().narrow().await;
        }
        guard
    }

    /// Sets the bits of blocks `first..end` in memory and notes those that change for the next
    /// commit. Their data is written; their segments are loaded.
    pub(crate) fn set_bits(self: &Rc<Self>, first: u64, end: u64) {
        self.expose(None, Some((first, end)));
    }

    /// Makes written data visible: the entries of chunks that got storage, and the bits of blocks.
    /// Both go into one commit.
    fn expose(self: &Rc<Self>, chunks: Option<(u64, Taken)>, blocks: Option<(u64, u64)>) {
        let image = self.image();
        {
            let mut meta = image.meta();
            if let Some((first, taken)) = chunks {
                for k in 0..taken.count {
                    // Sectors that read as zero before, in space that reads as zero: the record may be
                    // stable before they are (R6).
                    meta.pending.data_first |= !taken.fresh || meta.stable_entry(image, first + k) != 0;
                    meta.set_entry(image, first + k, (taken.id + k + 1) as u32);
                }
            }
            if let Some((first, end)) = blocks {
                // Past the base a new bit shows what fresh storage holds, and that is what was seen before.
                let past_base = first << image.map.block_shift.load(Ordering::Relaxed) >= image.map.zero_from.load(Ordering::Acquire);
                let seen = past_base && chunks.is_some_and(|(_, taken)| taken.fresh);
                meta.pending.data_first |= meta.write_bits(image, first, end, true) && !seen && !faulty!(image, OneSyncOverBase);
            }
        }
        self.after_change();
    }

    /// Says in memory that blocks `first..end`, which have no storage, or are past the base, read as zero.
    pub(crate) fn say_zero(self: &Rc<Self>, first: u64, end: u64) {
        self.image().meta().write_zero_bits(self.image(), first, end);
        self.after_change();
    }

    /// Takes the storage of chunks away, in memory, and says that `blocks` read as zero from now on. Who
    /// began before may still use the storage; returns it for when they have ended.
    pub(crate) fn unmap(self: &Rc<Self>, first: u64, end: u64, blocks: Option<(u64, u64)>) -> Runs {
        let image = self.image();
        let mut freed = Runs::new();
        {
            let mut meta = image.meta();
            for chunk in first..end {
                let entry = u64::from(image.region(RegionKind::Table).entry(chunk));
                if entry != 0 {
                    add_run(&mut freed, entry - 1, entry);
                    meta.set_entry(image, chunk, 0);
                }
            }
            if let Some((first, end)) = blocks {
                meta.write_zero_bits(image, first, end);
            }
        }
        self.after_change();
        freed
    }

    /// Chunks that nobody uses any more: free once the commit after this is stable.
    pub(crate) fn free(self: &Rc<Self>, freed: Runs) {
        {
            let mut meta = self.image().meta();
            for (start, end) in freed {
                add_run(&mut meta.pending.freed, start, end);
            }
        }
        self.after_change();
    }

    /// What is pending is committed in time.
    fn after_change(self: &Rc<Self>) {
        let image = self.image();
        let mut arm = None;
        let mut commit = false;
        {
            let mut meta = image.meta();
            if meta.pending.is_due() {
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

/// Guest chunks that get storage.
#[derive(Clone, Copy)]
struct NewChunks {
    first: u64,
    taken: Taken,
}

impl Meta {
    /// Blocks without storage read as zero if they are in this image, and past the base if they are not: where it
    /// can be told so, a chunk that gets storage later needs no zeroing (CC-67).
    fn write_zero_bits(&mut self, image: &Image, first: u64, end: u64) {
        let zero_from = image.map.zero_from.load(Ordering::Acquire).div_ceil(1 << image.map.block_shift.load(Ordering::Relaxed));
        let border = if faulty!(image, ZeroBitsKept) { end } else { zero_from.clamp(first, end) };
        self.write_bits(image, first, border, true);
        self.write_bits(image, border, end, false);
    }

    /// Sets or clears bits in memory; whether any changed. Their segments are loaded.
    fn write_bits(&mut self, image: &Image, first: u64, end: u64, to: bool) -> bool {
        let bits = image.bits();
        let mut any = false;
        let mut at = first;
        while at < end {
            let (value, len) = match bits.run(at, end) {
                Run::Bits { value, len } => (value, len),
                _ => unreachable!("loaded before the data was written"),
            };
            if value != to {
                for page in at / PAYLOAD_BITS..=(at + len - 1) / PAYLOAD_BITS {
                    self.keep_stable(image, (RegionKind::Bitmap, page));
                }
                bits.write(at, at + len, to);
                self.pending.say_bits(at, at + len, to);
                any = true;
            }
            at += len;
        }
        any
    }

    /// Changes a table entry in memory.
    pub(crate) fn set_entry(&mut self, image: &Image, chunk: u64, value: u32) {
        self.keep_stable(image, (RegionKind::Table, page_of_entry(chunk)));
        image.region(RegionKind::Table).set_entry(chunk, value);
        self.pending.entries.insert(chunk, value);
    }
}
