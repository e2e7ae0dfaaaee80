// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the virtual size, and the base's name.

use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind};
use crate::image::faulty;
use crate::io::{ENOMEDIUM, bare, ceil, floor, result_of};
use crate::write::Payload;
use crate::relayout::Fill;
use crate::table::{ENTRY_BITS, EntryRun};
use fvd_format::header::BASE_LENGTH_UNKNOWN;
use fvd_format::limits::{CHUNKS_MAX, FORMAT_NAME_MAX, PAGE_SIZE, PATH_MAX, SECTOR, VIRTUAL_SIZE_MAX};
use fvd_format::page::PAYLOAD_ENTRIES;
use fvd_format::{Header, RegionKind};
use std::rc::Rc;
use std::sync::atomic::Ordering;

impl<H: Host> Queue<H> {
    /// Changes the size. What is added lies beyond the bitmap: it is in this image from the start, and
    /// reads as zero, also where a disk that shrank had data before.
    ///
    /// Order of growth (CC-40): the file first, stable; then the header; then readers see the new size.
    pub(crate) async fn resize(self: &Rc<Self>, size: u64, zeroed: bool) -> Result<()> {
        let image = self.image().clone();
        image.check_writable()?;
        self.check_sectors("size", size)?;
        if image.map.pristine.load(Ordering::Acquire) && self.has_base().await? {
            // Only a bitmap can say that the new part is not in the base.
            self.leave_pristine().await?;
        }
        let _one_at_a_time = image.layout_lock.lock().await;
        let header = image.header();
        if size > VIRTUAL_SIZE_MAX || (!header.is_compact() && header.data_offset + size > i64::MAX as u64) {
            return fail(Kind::OutOfRange, format!("size {size} is above the format's {VIRTUAL_SIZE_MAX} bytes"));
        }
        if size == header.virtual_size {
            return Ok(());
        }
        if size < header.virtual_size {
            return self.shrink(&header, size).await;
        }
        if header.is_compact() {
            return self.grow_compact(&header, size).await;
        }
        let (file, unit) = (image.data_file(), image.data_end_unit());
        let new_end = ceil(header.data_offset + size, unit);
        let old_end = ceil(header.flat_data_end(), unit);
        // Metadata that lay behind the disk moves away; what it leaves behind must not show up in the disk.
        let moved = self.clear_way(new_end).await?;
        // A write up to the old end fills up its host sector with zeroes: none may be under way when
        // others may write behind that end.
        let (sector, sector_end) = self.lock_range(header.virtual_size, (old_end - header.flat_data_end()).max(1));
        let _range = image.ranges.lock(sector, sector_end).await;
        let length = self.op(bare(OpKind::GetLength, file, 0, 0)).await? as u64;
        let limits = *image.data_limits();
        if length < new_end {
            if !limits.grows_zeroed {
                return fail(Kind::NoSpace, format!("the storage has {length} bytes, {new_end} are needed, and it cannot grow"));
            }
            self.op(bare(OpKind::Truncate, file, new_end, 0)).await?;
        }
        // Nor must trailing bytes that something else left behind the old end.
        if limits.grows_zeroed || limits.cheap_zeroing || zeroed || moved {
            let within = (old_end - header.flat_data_end()).min(size - header.virtual_size);
            if within > 0 && !faulty!(image, GrowthKeepsRest) {
                // The rest of the last page was never written.
                self.write_hull(header.virtual_size, Vec::new(), Payload::Zero(within as usize), Vec::new(), header.data_offset).await?;
            }
            // A write that a power cut tore may have left the file any length.
            let end = ceil(length, unit).min(new_end);
            if old_end < end && !faulty!(image, GrowthShowsOldBytes) {
                self.op(bare(OpKind::WriteZeroes { may_unmap: true }, file, old_end, end - old_end)).await?;
            }
        }
        if faulty!(image, GrowthSyncsImage) {
            self.sync().await?;
        } else if !faulty!(image, GrowthNotSynced) {
            self.sync_data().await?;
        }
        self.update_header(|header| header.virtual_size = size).await?;
        image.map.virtual_size.store(size, Ordering::Release);
        Ok(())
    }

    /// Shrinks the disk. The caller holds the layout lock.
    ///
    /// Order (CC-41): the regions of the smaller disk, stable; the header; readers see the new size;
    /// whoever began before ends; then, and only then, the storage of what was cut off is given away.
    /// Nothing there is zeroed: growth does that.
    async fn shrink(self: &Rc<Self>, old: &Header, size: u64) -> Result<()> {
        let image = self.image().clone();
        let smaller = |header: &mut Header| {
            header.virtual_size = size;
            header.covered = header.covered.min(size);
            if header.covered == 0 {
                header.block_size = 0;
                *header.region_mut(RegionKind::Bitmap) = None;
            }
        };
        if faulty!(image, ShrinkCutsFirst) && !old.is_compact() {
            let regions_end = if old.has_data_file() { 0 } else { old.regions_end() };
            self.op(bare(OpKind::Truncate, image.data_file(), ceil(old.data_offset + size, image.data_end_unit()).max(regions_end), 0)).await?;
        }
        if old.region(RegionKind::Journal).is_some() {
            self.rebuild(Fill::Keep, 0, smaller).await?;
        } else {
            // Whoever writes has looked at the size with the lock of the range.
            let _all = image.ranges.lock(0, u64::MAX).await;
            self.update_header(smaller).await?;
            self.publish_smaller(size).await;
        }
        // The disk has its new size, whatever becomes of the rest.
        let given = if old.is_compact() { Ok(()) } else { self.cut_flat(old).await };
        if let Err(error) = given {
            self.host().log(LogLevel::Warning, &error.context("the disk shrank, but its storage stays").text);
        }
        Ok(())
    }

    /// Lets readers see a smaller size, and waits for those that may not have seen it (R5).
    pub(crate) async fn publish_smaller(&self, size: u64) {
        let image = self.image();
        image.map.virtual_size.store(size, Ordering::Release);
        if !faulty!(image, ShrinkWithoutNarrowing) {
            image.narrow().await;
        }
    }

    /// Gives the storage behind a flat disk back that was cut off `old`'s.
    async fn cut_flat(self: &Rc<Self>, old: &Header) -> Result<()> {
        let image = self.image().clone();
        let (file, unit) = (image.data_file(), image.data_end_unit());
        let behind = |header: &Header| !header.has_data_file() && [RegionKind::PageMap, RegionKind::Bitmap].iter().any(|kind| header.region(*kind).is_some_and(|r| r.offset >= header.data_offset));
        if behind(&image.header()) {
            // They had to lie behind the old disk as long as that counted.
            self.rebuild(Fill::Keep, 0, |_| ()).await?;
        }
        let header = image.header();
        let end = ceil(header.flat_data_end(), unit);
        let kept = if header.has_data_file() { end } else { ceil(header.file_length_min(), unit).max(end) };
        let length = self.op(bare(OpKind::GetLength, file, 0, 0)).await? as u64;
        // Around the metadata that lies there.
        let mut at = end;
        let stop = floor(ceil(old.flat_data_end(), unit).min(length), unit);
        let stop = if image.data_limits().grows_zeroed { stop.min(kept) } else { stop };
        let mut regions: Vec<_> = header.regions.iter().flatten().filter(|r| !header.has_data_file() && r.end() > end).map(|r| (r.offset, r.end())).collect();
        regions.sort_unstable();
        for (from, to) in regions.into_iter().chain([(stop, stop)]) {
            if at < from.min(stop) {
                self.op(bare(OpKind::Discard, file, at, from.min(stop) - at)).await?;
            }
            at = at.max(to);
        }
        if image.data_limits().grows_zeroed && kept < length {
            self.op(bare(OpKind::Truncate, file, kept, 0)).await?;
            self.sync_data().await?;
        }
        Ok(())
    }

    /// Makes the rest of the last chunk of a compact disk read as zero: a disk that shrank may have left
    /// data there. It is seen only once the disk grows.
    async fn zero_rest_of_chunk(self: &Rc<Self>, header: &Header) -> Result<()> {
        let image = self.image().clone();
        let (size, chunk) = (header.virtual_size, u64::from(header.chunk_size));
        if size % chunk == 0 || faulty!(image, GrowthKeepsChunkRest) {
            return Ok(());
        }
        let (last, end) = (size / chunk, ceil(size, chunk));
        let _range = image.ranges.lock(last * chunk, end).await;
        let EntryRun::Chunks { id, .. } = self.entries_of(last, last + 1).await? else {
            // It may have been freed just now: the size must not be stable before that is.
            return if faulty!(image, GrowthBeforeCommit) { Ok(()) } else { self.commit_metadata().await };
        };
        let base = header.chunk_offset(id).wrapping_sub(last * chunk);
        let whole = ceil(size, PAGE_SIZE as u64);
        if size < whole {
            self.write_hull(size, Vec::new(), Payload::Zero((whole - size) as usize), Vec::new(), base).await?;
        }
        if whole < end {
            self.op(bare(OpKind::WriteZeroes { may_unmap: true }, image.data_file(), base.wrapping_add(whole), end - whole)).await?;
        }
        // What is stable may name another chunk for it still.
        if faulty!(image, GrowthBeforeCommit) { self.sync_data().await } else { self.commit_metadata().await }
    }

    /// Grows a compact disk: the table gets more entries, which have no storage.
    async fn grow_compact(self: &Rc<Self>, header: &Header, size: u64) -> Result<()> {
        let image = self.image().clone();
        let chunks = size.div_ceil(u64::from(header.chunk_size));
        if chunks > CHUNKS_MAX {
            return fail(Kind::OutOfRange, format!("size {size} needs {chunks} chunks of {} bytes, at most {CHUNKS_MAX} fit", header.chunk_size));
        }
        self.zero_rest_of_chunk(header).await?;
        if header.has_zero_bits() && header.covered == header.virtual_size {
            let grown = self.rebuild(Fill::Keep, 0, |header| (header.virtual_size, header.covered) = (size, size)).await;
            match grown {
                // Then chunks that are added are zeroed when they get storage.
                Err(error) if matches!(error.kind, Kind::NoSpace | Kind::NoMemory | Kind::Unsupported) => {
                    self.host().log(LogLevel::Warning, &format!("the bitmap does not reach as far as the disk: {}", error.text));
                }
                done => return done,
            }
        }
        let table = header.region(RegionKind::Table).expect("compact image");
        if chunks > table.pages() * PAYLOAD_ENTRIES {
            return self.rebuild(Fill::Keep, 0, |header| header.virtual_size = size).await;
        }
        self.update_header(|header| header.virtual_size = size).await?;
        // The entries before the size that leads to them.
        image.region(RegionKind::Table).grow(chunks * ENTRY_BITS);
        image.map.virtual_size.store(size, Ordering::Release);
        Ok(())
    }

    /// Whether the image has a base, in the header or attached by the host.
    pub(crate) async fn has_base(self: &Rc<Self>) -> Result<bool> {
        if !self.image().header().base_name.is_empty() {
            return Ok(true);
        }
        // A base that cannot be reached just now is a base.
        let (ret, op) = self.io(bare(OpKind::GetLength, FileId::Base, 0, 0)).await;
        if ret == -i64::from(ENOMEDIUM) || (ret < 0 && faulty!(self.image(), BaseErrorIsNone)) { Ok(false) } else { result_of(&op, ret).map(|_| true) }
    }

    /// Records another base. Which blocks are in the image does not change; a longer base gets a
    /// bitmap that reaches as far, so that blocks can be given back to it.
    pub(crate) async fn change_base(self: &Rc<Self>, name: String, format: String) -> Result<()> {
        self.image().check_writable()?;
        check_base(&name, &format)?;
        let image = self.image().clone();
        let _one_at_a_time = image.layout_lock.lock().await;
        if !name.is_empty() {
            let (length, _) = self.io(bare(OpKind::GetLength, FileId::Base, 0, 0)).await;
            let enlarged = self.cover_base(if length >= 0 { ceil(length as u64, SECTOR) } else { BASE_LENGTH_UNKNOWN }).await;
            match enlarged {
                // Nothing depends on it: what has no bit is in the image, as before.
                Err(error) if matches!(error.kind, Kind::NoSpace | Kind::NoMemory) => {
                    self.host().log(LogLevel::Warning, &format!("the bitmap does not reach as far as the new base: {}", error.text));
                }
                other => other?,
            }
        }
        self.update_header(|header| {
            header.base_name = name;
            header.base_format = format;
        })
        .await
    }
}

/// Checks the path of a base or data file, as the header is to have it.
pub(crate) fn check_path(whose: &str, path: &str) -> Result<()> {
    if path.len() > PATH_MAX || path.contains('\0') {
        return fail(Kind::Invalid, format!("the {whose}'s path has {} bytes, at most {PATH_MAX} fit", path.len()));
    }
    Ok(())
}

/// Checks the name and format of a base.
pub(crate) fn check_base(name: &str, format: &str) -> Result<()> {
    check_path("base", name)?;
    if format.len() > FORMAT_NAME_MAX || format.contains('\0') {
        return fail(Kind::Invalid, format!("the base's format name has {} bytes, at most {FORMAT_NAME_MAX} fit", format.len()));
    }
    if !name.is_empty() && format.is_empty() {
        return fail(Kind::Invalid, format!("the format of the base '{name}' is missing; it is never guessed"));
    }
    if name.is_empty() && !format.is_empty() {
        return fail(Kind::Invalid, format!("a base format '{format}' without a base"));
    }
    Ok(())
}
