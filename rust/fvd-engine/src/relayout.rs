// SPDX-License-Identifier: MIT OR Apache-2.0
//! Regions built anew: a bitmap made, enlarged or emptied after creation, metadata moved out of the
//! way of a growing disk (FMT-125…127).
//!
//! Order (CC-34): the new regions, complete, in space that nothing names → sync → one header update
//! that names them and lets go of every commit → readers. A cut before that update leaves the old
//! regions untouched; the space of either side is free once both header copies agree.

use crate::bits::{Bits, SEGMENT_BITS, SEGMENT_MEMORY, SEGMENT_PAGES, Segment, set_words};
use crate::changes::{Runs, add_run};
use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind, OwnBuf};
use crate::image::{Image, faulty};
use crate::io::{BOUNCE_MAX, bare, ceil};
use crate::layout::{FreeSpace, REGION_ALIGNMENT, default_block_size_of, fit_places, regions_anew};
use crate::space::chunks_of_regions;
use crate::table::{ENTRY_BITS, EntryRun};
use crate::write::Payload;
use fvd_format::header::BASE_LENGTH_UNKNOWN;
use fvd_format::limits::*;
use fvd_format::page::{self, PAYLOAD_BITS, PAYLOAD_WORDS, PageHeader};
use fvd_format::{Header, Region, RegionKind};
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// The regions that the page map covers.
const MAPPED: [RegionKind; 2] = [RegionKind::Bitmap, RegionKind::Table];

/// What the bits of a rebuilt bitmap say, and the entries of a rebuilt table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Bits and entries stay as they are; blocks that had no bit are in this image.
    Keep,
    /// Every block is in the base, and no chunk has storage.
    Base,
}

/// Keeps commits and checkpoints away until it is dropped.
struct Hold<H: Host>(Rc<Queue<H>>);

impl<H: Host> Drop for Hold<H> {
    fn drop(&mut self) {
        let image = self.0.image();
        {
            let mut meta = image.meta();
            meta.committing = false;
            meta.checkpointing = false;
        }
        image.commit_wait.wake_all();
        image.checkpoint_wait.wake_all();
    }
}

impl<H: Host> Queue<H> {
    /// Ends the pristine state before the first write. If the image has a base by now, in the
    /// header or attached by the host, it gets a bitmap, in which every block is still in the base; so
    /// does a compact one where zeroing is dear, to say what of its chunks was written.
    pub(crate) async fn leave_pristine(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        if !image.map.pristine.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one_at_a_time = image.layout_lock.lock().await;
        if !image.map.pristine.load(Ordering::Acquire) {
            return Ok(());
        }
        let header = image.header();
        if header.virtual_size > 0 && self.has_base().await? {
            return self.rebuild(Fill::Base, 0, cover_disk).await;
        }
        if header.virtual_size > 0 && header.is_compact() {
            self.probe_zeroing().await?;
        }
        if header.virtual_size > 0 && header.is_compact() && image.zeroing_is_dear() {
            match self.rebuild(Fill::Base, 0, cover_with_zero).await {
                Err(error) if matches!(error.kind, Kind::NoSpace | Kind::NoMemory) => {
                    self.host().log(LogLevel::Warning, &format!("chunks are zeroed when they are handed out: {}", error.text));
                }
                done => return done,
            }
        }
        self.update_header(|header| header.pristine = false).await?;
        image.map.pristine.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes the bitmap reach as far as a base of `base_length` bytes (or of unknown length). What
    /// had no bit is in this image and stays so. The caller holds the layout lock.
    pub(crate) async fn cover_base(self: &Rc<Self>, base_length: u64) -> Result<()> {
        let image = self.image().clone();
        let header = image.header();
        let counted = base_length.min(header.virtual_size);
        // What the bitmap says to be zero would be taken for the longer base's.
        if header.pristine || counted <= header.covered || header.has_zero_bits() {
            return Ok(());
        }
        self.rebuild(Fill::Keep, 0, |header| {
            if header.block_size == 0 {
                let block = default_block_size(counted);
                header.block_size = if header.is_compact() { block.min(header.chunk_size) } else { block };
            }
            header.covered = ceil(counted, u64::from(header.block_size)).min(header.virtual_size);
            header.base_length = base_length;
        })
        .await
    }

    /// Gives every block back to the base, in one step. What the image has beyond the base's end
    /// would be lost if the bitmap did not cover it: a larger one is built where it does not.
    pub(crate) async fn make_empty(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        let _one_at_a_time = image.layout_lock.lock().await;
        let header = image.header();
        if header.pristine || header.virtual_size == 0 {
            return Ok(());
        }
        if !self.has_base().await? {
            return fail(Kind::Unsupported, "an image without a base cannot be emptied");
        }
        self.rebuild(Fill::Base, 0, |header| if !faulty!(image, EmptyWithinCovered) { cover_disk(header) }).await
    }

    /// Moves regions that lie between the disk and file byte `end` behind it, so that the disk can
    /// grow. True if any had to. The caller holds the layout lock.
    pub(crate) async fn clear_way(self: &Rc<Self>, end: u64) -> Result<bool> {
        let header = self.image().header();
        if header.has_data_file() {
            return Ok(false);
        }
        let in_way = |r: &Region| r.offset >= header.data_offset && r.offset < end;
        if !header.regions.iter().flatten().any(in_way) {
            return Ok(false);
        }
        self.rebuild(Fill::Keep, end, |_| ()).await?;
        Ok(true)
    }

    /// Builds the regions of `change`d header anew and makes them the ones that count.
    pub(crate) async fn rebuild(self: &Rc<Self>, fill: Fill, data_end: u64, change: impl Fn(&mut Header)) -> Result<()> {
        let image = self.image().clone();
        // Nobody changes a bit or an entry meanwhile; writes that need none go on.
        let _all = image.ranges.lock(0, u64::MAX).await;
        let changed = |mut header| {
            change(&mut header);
            header
        };
        let wanted = changed(image.header());
        match fill {
            Fill::Keep => self.load_for_rebuild(&wanted).await?,
            Fill::Base => image.check_capacity(&wanted)?,
        }
        // Before commits are kept away: new storage needs one.
        let chunks = self.chunks_for_regions(&changed(image.header())).await?;
        let result = self.rebuild_held(fill, data_end, chunks, changed).await;
        // What the regions did not take: everything, if it failed.
        if let Some((start, end)) = chunks {
            let taken = chunks_of_regions(&image.header());
            for chunk in (start..end).filter(|chunk| !taken.iter().any(|(a, b)| (*a..*b).contains(chunk))) {
                image.give_back_chunks(chunk, chunk + 1);
            }
        }
        let (old, mapped) = result?;
        if image.header().is_compact() {
            // Nobody who began before reads what the table named.
            if !faulty!(image, EmptyFreesAtOnce) && !faulty!(image, ShrinkWithoutNarrowing) {
                image.narrow().await;
            }
            self.release_chunks(image.left_behind(&old, mapped));
        }
        Ok(())
    }

    /// The part of [`Queue::rebuild`] that keeps commits away. Returns the old header, and the storage
    /// chunks that held data and do not any more.
    async fn rebuild_held(self: &Rc<Self>, fill: Fill, data_end: u64, chunks: Option<(u64, u64)>, changed: impl Fn(Header) -> Header) -> Result<(Header, Runs)> {
        let image = self.image().clone();
        let _hold = self.hold_metadata().await?;
        let _loads = image.load_lock.lock().await;
        // A write that found a block in the image must end before the block is not (R5).
        let _serial = if fill == Fill::Base && !faulty!(image, EmptyWithoutNarrowing) { Some(self.serialise_writes().await) } else { None };
        let old = image.header();
        let mut new = changed(old.clone());
        let fresh = place_anew(&old, &mut new, data_end, chunks)?;
        // Else the image could not be opened again as this one is.
        image.check_metadata_memory(&new)?;
        self.claim(&fresh).await?;
        let lengths = new.clone();
        let map_words = self.write_new_regions(&mut new, |kind, page| image.page_of_rebuilt(&old, &lengths, fill, kind, page)).await?;
        if !faulty!(image, RegionsAfterHeader) {
            self.sync().await?;
        }
        let (seq, commit) = {
            let meta = image.meta();
            (meta.next_seq, meta.next_commit)
        };
        let flip = new.clone();
        self.update_header(|header| {
            let generation = header.generation;
            *header = flip;
            header.generation = generation;
            if old.region(RegionKind::Journal).is_some() && !faulty!(image, OldCommitsCount) {
                // The new pages hold what every commit said.
                (header.first_seq, header.first_commit) = (seq, commit);
            }
        })
        .await?;
        let mapped = match fill {
            Fill::Base => image.mapped_chunks(0, old.chunks()),
            Fill::Keep => image.mapped_chunks(new.chunks(), old.chunks()),
        };
        if new.virtual_size < old.virtual_size {
            self.publish_smaller(new.virtual_size).await;
        }
        image.publish_rebuilt(&old, fill, map_words);
        Ok((old, mapped))
    }

    /// Storage chunks for the regions of `new`, where there is no room in front of the data.
    async fn chunks_for_regions(self: &Rc<Self>, new: &Header) -> Result<Option<(u64, u64)>> {
        let old = self.image().header();
        if !old.is_compact() || old.has_data_file() {
            return Ok(None);
        }
        let mut space = FreeSpace::of(&old, 0);
        let regions = regions_anew(new);
        if regions.iter().all(|(_, length, _)| space.take(*length) < old.data_offset) {
            return Ok(None);
        }
        let bytes: u64 = regions.iter().map(|(_, length, _)| ceil(*length, REGION_ALIGNMENT)).sum();
        // Chunks may be smaller than what regions are aligned to.
        let slack = REGION_ALIGNMENT.saturating_sub(u64::from(old.chunk_size));
        let count = (bytes + slack).div_ceil(u64::from(old.chunk_size));
        let start = self.allocate_whole(count).await?;
        Ok(Some((start, start + count)))
    }

    /// Loads what is to be kept, and makes the block whole in which the base ended so far: what lies
    /// behind that end reads as zero, and a longer base must not show there.
    async fn load_for_rebuild(self: &Rc<Self>, new: &Header) -> Result<()> {
        let image = self.image().clone();
        let old = image.header();
        let pages: u64 = regions_anew(new).iter().map(|(_, length, _)| length / PAGE_SIZE as u64).sum();
        let segments = pages.div_ceil(SEGMENT_PAGES);
        if segments.saturating_mul(SEGMENT_MEMORY) > image.config.metadata_memory {
            return fail(Kind::NoMemory, format!("a bitmap of {} blocks needs more than {} bytes of memory (metadata-memory)", new.blocks(), image.config.metadata_memory));
        }
        if old.is_compact() {
            self.load_entries(0, old.chunks()).await?;
        }
        if old.covered == 0 {
            return Ok(());
        }
        image.check_capacity(new)?;
        self.load_blocks(0, old.blocks()).await?;
        let block = u64::from(old.block_size);
        if old.has_zero_bits() {
            // There the base ends as before, and bits say of the rest that it is zero.
            return Ok(());
        }
        let edge = old.base_length.min(old.covered);
        let (last, start) = (edge / block, edge / block * block);
        if new.covered >= old.covered && start < edge && !self.run_of(last, last + 1).await?.0 && !faulty!(image, LastBlockLeftHalf) {
            let end = (start + block).min(old.covered);
            let bytes = self.read_base_own(start, end - start).await?;
            let len = bytes.len();
            // Everything is locked: nobody could free a chunk while this waited.
            self.write_locked(start, Payload::Own(Rc::new(bytes), 0, len), false).await?;
        }
        Ok(())
    }

    /// Waits until everything is committed and keeps commits and checkpoints away (FMT-126). The
    /// caller holds the lock of every range, so that no bit changes.
    async fn hold_metadata(self: &Rc<Self>) -> Result<Hold<H>> {
        let image = self.image().clone();
        loop {
            self.commit_metadata().await?;
            image.commit_wait.until(|| (!std::mem::replace(&mut image.meta().committing, true)).then_some(())).await;
            image.checkpoint_wait.until(|| (!std::mem::replace(&mut image.meta().checkpointing, true)).then_some(())).await;
            let hold = Hold(self.clone());
            image.check_poison()?;
            // A commit of somebody else's may have failed since.
            if image.meta().pending.is_empty() {
                return Ok(hold);
            }
        }
    }

    /// Makes space that nothing names part of the file, really allocated and zero.
    async fn claim(self: &Rc<Self>, fresh: &[Region]) -> Result<()> {
        let end = fresh.iter().map(|r| r.offset + r.length).max().unwrap_or(0);
        let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        if length < end {
            if !self.image().limits(FileId::Image).grows_zeroed {
                return fail(Kind::NoSpace, format!("the storage has {length} bytes; {end} are needed to hold the metadata, and it cannot grow"));
            }
            self.op(bare(OpKind::Truncate, FileId::Image, end, 0)).await?;
        }
        for region in fresh {
            self.op(bare(OpKind::WriteZeroes { may_unmap: false }, FileId::Image, region.offset, region.length)).await?;
        }
        Ok(())
    }

    /// Writes regions that nothing names yet: the whole page map, and of the regions that it covers
    /// the pages that `words` says are not initial. Returns the words of the page map.
    pub(crate) async fn write_new_regions(self: &Rc<Self>, header: &mut Header, words: impl Fn(RegionKind, u64) -> Option<Vec<u64>>) -> Result<Vec<u64>> {
        let Some(map) = header.region(RegionKind::PageMap).copied() else { return Ok(Vec::new()) };
        let mut map_words = vec![0u64; map.pages() as usize * PAYLOAD_WORDS];
        for kind in MAPPED {
            let Some(region) = header.region(kind).copied() else { continue };
            let page_words = |index| {
                let words = words(kind, index)?;
                let bit = (region.map_first + index) as usize;
                map_words[bit / 64] |= 1 << (bit % 64);
                Some(words)
            };
            let stored = self.write_new_pages(header, kind, page_words).await?;
            header.region_mut(kind).as_mut().expect("has one").count_sum = stored;
        }
        let all = self.write_new_pages(header, RegionKind::PageMap, |index| Some(map_words[index as usize * PAYLOAD_WORDS..][..PAYLOAD_WORDS].to_vec())).await?;
        header.region_mut(RegionKind::PageMap).as_mut().expect("has one").count_sum = all;
        Ok(map_words)
    }

    /// Writes the pages of a new region that have words, neighbours in one write; returns how many.
    async fn write_new_pages(self: &Rc<Self>, header: &Header, kind: RegionKind, mut words: impl FnMut(u64) -> Option<Vec<u64>>) -> Result<u64> {
        let region = *header.region(kind).expect("new region");
        let mut stored = 0;
        let mut run = Vec::new();
        for index in 0..region.pages() {
            let page = words(index);
            if let Some(words) = &page {
                let place = PageHeader { kind, generation: region.generation, index, write_count: 1, checkpoint: 0 };
                run.extend_from_slice(&page::of_words(&header.uuid, &place, words));
                stored += 1;
            }
            let next = index + u64::from(page.is_some());
            if !run.is_empty() && (page.is_none() || run.len() as u64 >= BOUNCE_MAX || next == region.pages()) {
                let offset = region.offset + next * PAGE_SIZE as u64 - run.len() as u64;
                self.write_own(FileId::Image, offset, OwnBuf::from_slice(&run), run.len() as u64).await?;
                run.clear();
            }
        }
        Ok(stored)
    }
}

/// Lets the bitmap speak of the whole disk: another base may follow, of another length.
fn cover_disk(header: &mut Header) {
    header.pristine = false;
    header.base_length = BASE_LENGTH_UNKNOWN;
    if header.block_size == 0 {
        header.block_size = default_block_size_of(header);
    }
    header.covered = header.virtual_size;
}

/// Lets the bitmap say of the whole disk what is in the image; the rest reads as zero.
fn cover_with_zero(header: &mut Header) {
    header.pristine = false;
    header.base_length = 0;
    header.block_size = default_own_grain(header.virtual_size).min(header.chunk_size);
    header.covered = header.virtual_size;
}

/// Gives the regions that `new` needs a place which `old` does not name, in `chunks` if there are
/// some; returns those that are new. Page map and what it covers always are; double-write area and
/// journal if they have none or lie before `data_end`, which the disk will reach.
fn place_anew(old: &Header, new: &mut Header, data_end: u64, chunks: Option<(u64, u64)>) -> Result<Vec<Region>> {
    // An image that had none of them left room in front of its data.
    let fits = old.region(RegionKind::Journal).is_none() && fit_places(new);
    if !fits {
        let mut space = FreeSpace::of(old, data_end);
        let mut in_chunks = chunks.map(|(start, _)| ceil(old.chunk_offset(start), REGION_ALIGNMENT));
        for (kind, length, map_first) in regions_anew(new) {
            let offset = match &mut in_chunks {
                Some(at) => std::mem::replace(at, ceil(*at + length, REGION_ALIGNMENT)),
                None => space.take(length),
            };
            *new.region_mut(kind) = Some(Region { map_first, ..successor(old, kind, offset, length)? });
        }
        for (kind, length) in [(RegionKind::DoubleWrite, DOUBLE_WRITE_SIZE), (RegionKind::Journal, JOURNAL_SIZE_DEFAULT)] {
            match old.region(kind) {
                Some(there) if old.has_data_file() || there.offset < old.data_offset || there.offset >= data_end => {}
                there => {
                    let length = there.map_or(length, |r| r.length);
                    *new.region_mut(kind) = Some(successor(old, kind, space.take(length), length)?);
                }
            }
        }
    }
    let is_new = |r: &&Region| !old.regions.iter().flatten().any(|o| o.offset == r.offset);
    Ok(new.regions.iter().flatten().filter(is_new).copied().collect())
}

/// The region that follows the one of `kind`.
fn successor(old: &Header, kind: RegionKind, offset: u64, length: u64) -> Result<Region> {
    let generation = match old.region(kind) {
        None => 1,
        Some(r) if r.generation < u32::MAX => r.generation + 1,
        Some(_) => return fail(Kind::Unsupported, "a region was rebuilt 2³² times; convert the image"),
    };
    Ok(Region { offset, length, generation, map_first: 0, count_sum: 0 })
}

impl Image {
    /// Refuses a bitmap that the spine could never name: readers hold the one of this session (see [`Bits`]).
    fn check_capacity(&self, new: &Header) -> Result<()> {
        match self.map.bits.get() {
            Some(bits) if new.blocks() > bits.capacity() => {
                fail(Kind::Unsupported, format!("the bitmap cannot be enlarged to {} blocks; convert the image, with larger blocks", new.blocks()))
            }
            _ => Ok(()),
        }
    }

    /// Words of page `index` of the region of `new` that replaces `old`'s; `None`: all 0.
    fn page_of_rebuilt(&self, old: &Header, new: &Header, fill: Fill, kind: RegionKind, index: u64) -> Option<Vec<u64>> {
        if fill == Fill::Base {
            return None;
        }
        let from = index * PAYLOAD_BITS;
        let mut words = if from < bits_of(old, kind) { self.region(kind).page_words(index).into_vec() } else { vec![0; PAYLOAD_WORDS] };
        if kind == RegionKind::Bitmap {
            let (first, end) = (old.blocks().max(from), new.blocks().min(from + PAYLOAD_BITS));
            if first < end {
                set_words(&mut words, first - from, end - from, added_bits(old));
            }
        }
        // Of a disk that shrinks.
        let end = bits_of(new, kind);
        if end < from + PAYLOAD_BITS && !faulty!(self, ShrinkKeepsBits) {
            set_words(&mut words, end - from, PAYLOAD_BITS, false);
        }
        words.iter().any(|&w| w != 0).then_some(words)
    }

    /// Lets readers see the regions that the header names since just now. Ranges are locked, and
    /// commits, checkpoints and loads are kept away.
    fn publish_rebuilt(&self, old: &Header, fill: Fill, map_words: Vec<u64>) {
        let header = self.header();
        let map = &self.map;
        // Without a bitmap it means nothing; whoever just read the old covered length still needs the old one.
        if header.block_size > 0 {
            map.block_shift.store(header.block_size.trailing_zeros(), Ordering::Release);
        }
        let mut added = 0;
        for kind in MAPPED {
            let Some(region) = header.region(kind) else {
                if old.region(kind).is_some() {
                    // A disk of nothing has no bitmap; one that it gets later, of blocks of another size
                    // perhaps, begins with nothing.
                    self.region(kind).clear();
                }
                continue;
            };
            let (count, cell) = (bits_of(&header, kind), if kind == RegionKind::Table { &map.table } else { &map.bits });
            let bits = cell.get_or_init(|| Bits::new(count));
            bits.grow(count);
            if fill == Fill::Base {
                bits.clear();
                continue;
            }
            // A table has a page even if the disk has no chunk.
            for segment in 0..count.max(1).div_ceil(SEGMENT_BITS) {
                added += u64::from(bits.segment(segment).is_none());
                bits.insert(segment, Segment::initial());
            }
            if kind == RegionKind::Bitmap && old.blocks() < count {
                bits.write(old.blocks(), count, added_bits(old));
            }
            if count < bits_of(old, kind) && !faulty!(self, ShrinkKeepsBits) {
                bits.clear_from(count);
            }
            for page in 0..region.pages().min(count.max(1).div_ceil(PAYLOAD_BITS)) {
                let bit = region.map_first + page;
                bits.set_count(page, u32::from(map_words[(bit / 64) as usize] >> (bit % 64) & 1 == 1));
            }
        }
        {
            let mut meta = self.meta();
            // A growth step that is being opened waits for its commit, which names no region.
            assert!(meta.pending.bits.is_empty() && meta.pending.cleared.is_empty() && meta.pending.entries.is_empty() && meta.frozen.is_empty() && meta.stable.is_empty(), "everything was committed");
            for kind in MAPPED.into_iter().chain([RegionKind::PageMap]) {
                meta.count_sums.insert(kind, header.region(kind).map_or(0, |r| r.count_sum));
            }
            meta.page_map_counts = vec![1; map_words.len() / PAYLOAD_WORDS];
            meta.page_map = map_words.chunks(PAYLOAD_WORDS).map(Box::from).collect();
            meta.dirty_map_pages.clear();
            meta.dirty_pages.clear();
            meta.written.clear();
            meta.segments_loaded += added;
        }
        map.zero_from.store(header.zero_from(), Ordering::Release);
        // After the bitmap, so that who sees the length finds the bits.
        map.covered.store(header.covered, Ordering::Release);
        map.virtual_size.store(header.virtual_size, Ordering::Release);
        map.pristine.store(header.pristine, Ordering::Release);
    }

    /// Storage chunks that the table names for guest chunks `at..chunks`. Who holds no lock sees some of
    /// the changes under way.
    fn mapped_chunks(&self, mut at: u64, chunks: u64) -> Runs {
        let mut runs = Runs::new();
        let Some(table) = self.map.table.get() else { return runs };
        while at < chunks {
            at += match table.entry_run(at, chunks) {
                EntryRun::Chunks { id, count } => {
                    add_run(&mut runs, id, id + count);
                    count
                }
                EntryRun::Free { count } => count,
                // Whoever looks for free chunks later finds these.
                EntryRun::Missing(_) | EntryRun::Bad => 1,
            };
        }
        runs
    }

    /// Storage chunks that only `old` needed: where its regions lay, and `mapped` ones.
    fn left_behind(&self, old: &Header, mut mapped: Runs) -> Runs {
        if self.meta().space.is_none() {
            return Runs::new();
        }
        let mut kept = chunks_of_regions(&self.header());
        kept.sort_unstable();
        for (start, end) in chunks_of_regions(old) {
            for chunk in (start..end).filter(|chunk| !kept.iter().any(|(a, b)| (*a..*b).contains(chunk))) {
                add_run(&mut mapped, chunk, chunk + 1);
            }
        }
        mapped
    }
}

/// What the bits say of blocks that the bitmap did not cover before: those that it may be told of are zero
/// where others are told so, too.
fn added_bits(old: &Header) -> bool {
    !old.has_zero_bits()
}

/// Length of a region's content in bits.
fn bits_of(header: &Header, kind: RegionKind) -> u64 {
    if kind == RegionKind::Table { header.chunks() * ENTRY_BITS } else { header.blocks() }
}
