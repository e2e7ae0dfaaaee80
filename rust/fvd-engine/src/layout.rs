// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where regions and guest data lie in the file.

use crate::io::ceil;
use fvd_format::header::{REGIONS_START, compatible};
use fvd_format::limits::*;
use fvd_format::page::{PAYLOAD_BITS, PAYLOAD_ENTRIES};
use fvd_format::{Header, Region, RegionKind, bitmap};

/// Regions begin at multiples of this, so that no write granule is shared: bytes.
pub(crate) const REGION_ALIGNMENT: u64 = 64 << 10;
/// Guest data begins at a multiple of this: bytes.
const DATA_ALIGNMENT: u64 = 1 << 20;

/// Gives every region of a new image its place, and the data its offset: in a file of its own, 0.
/// `zero_bits`: the first write makes a bitmap, if there is none yet.
pub(crate) fn place_regions(header: &mut Header, journal_size: u64, zero_bits: bool) {
    let alignment = DATA_ALIGNMENT.max(u64::from(header.chunk_size));
    // Room for the regions of a bitmap made later: a hole, which costs addresses, not storage. Not
    // on a device, where it would cost storage.
    let room = header.covered == 0 && !header.has_data_file() && (zero_bits || header.compatible & compatible::NON_ZEROING == 0) && header.virtual_size > 0;
    let mut later = header.clone();
    if room {
        let block_size = if zero_bits { default_own_grain(header.virtual_size).min(header.chunk_size) } else { default_block_size_of(header) };
        (later.covered, later.block_size) = (header.virtual_size, block_size);
    }
    // An image file that holds nothing else has its regions from the start.
    let regions = header.covered > 0 || header.is_compact() || header.has_data_file();
    let end = if room || regions { give_places(&mut later, journal_size) } else { REGIONS_START };
    header.data_offset = if header.has_data_file() { 0 } else { ceil(end, alignment) };
    if regions {
        header.regions = later.regions;
    }
    if header.covered == 0 {
        *header.region_mut(RegionKind::Bitmap) = None;
    }
}

/// The default block size of an image whose bitmap covers the disk.
pub(crate) fn default_block_size_of(header: &Header) -> u32 {
    let block = default_block_size(header.virtual_size);
    if header.is_compact() { block.min(header.chunk_size) } else { block }
}

/// The regions that the page map covers, with their pages, in the order of their page-map bits.
fn mapped_pages(header: &Header) -> impl Iterator<Item = (RegionKind, u64)> {
    let table = if header.is_compact() { header.chunks().div_ceil(PAYLOAD_ENTRIES).max(1) } else { 0 };
    [(RegionKind::Bitmap, bitmap::pages(header.blocks())), (RegionKind::Table, table)].into_iter().filter(|(_, pages)| *pages > 0)
}

/// Puts the regions of an image with a journal one behind the other; returns where they end.
fn give_places(header: &mut Header, journal_size: u64) -> u64 {
    let mut at = REGIONS_START;
    let mut take = |length: u64, map_first: u64| {
        let region = Region { offset: at, length, generation: 1, map_first, count_sum: 0 };
        at = ceil(at + length, REGION_ALIGNMENT);
        Some(region)
    };
    let page = PAGE_SIZE as u64;
    let mapped: Vec<_> = mapped_pages(header).collect();
    let pages: u64 = mapped.iter().map(|(_, pages)| pages).sum();
    *header.region_mut(RegionKind::PageMap) = take(pages.div_ceil(PAYLOAD_BITS).max(1) * page, 0);
    *header.region_mut(RegionKind::DoubleWrite) = take(DOUBLE_WRITE_SIZE, 0);
    *header.region_mut(RegionKind::Journal) = take(journal_size, 0);
    let mut first = 0;
    for (kind, pages) in mapped {
        *header.region_mut(kind) = take(pages * page, first);
        first += pages;
    }
    at
}

/// Puts the regions in front of the data, with the smallest blocks (the disk may have grown since
/// room was left) and then the largest journal that fit. False if there is no room.
pub(crate) fn fit_places(header: &mut Header) -> bool {
    loop {
        let end = give_places(header, JOURNAL_SIZE_MIN);
        if end <= header.data_offset {
            let spare = header.data_offset - end;
            give_places(header, (JOURNAL_SIZE_MIN + spare / REGION_ALIGNMENT * REGION_ALIGNMENT).min(JOURNAL_SIZE_MAX));
            return true;
        }
        // Without a bitmap nothing gets shorter.
        if header.block_size == 0 || header.block_size >= BLOCK_SIZE_MAX {
            return false;
        }
        header.block_size *= 2;
    }
}

/// Regions of `new` that are built anew, in place of `old`'s: kind, length, first page-map bit.
pub(crate) fn regions_anew(new: &Header) -> Vec<(RegionKind, u64, u64)> {
    let page = PAGE_SIZE as u64;
    let mut first = 0;
    let mut out: Vec<_> = mapped_pages(new)
        .map(|(kind, pages)| {
            first += pages;
            (kind, pages * page, first - pages)
        })
        .collect();
    out.insert(0, (RegionKind::PageMap, first.div_ceil(PAYLOAD_BITS).max(1) * page, 0));
    out
}

/// Space of the image file that `header` does not name, first fit. A flat disk counts as reaching to file byte
/// `data_end` at least; a compact image has all space from the data offset on in chunks.
pub(crate) struct FreeSpace {
    /// Start and end of what is taken, in order of start.
    taken: Vec<(u64, u64)>,
}

impl FreeSpace {
    pub(crate) fn of(header: &Header, data_end: u64) -> Self {
        let end = if header.is_compact() { i64::MAX as u64 } else { header.flat_data_end().max(data_end) };
        let regions = header.regions.iter().flatten().map(|r| (r.offset, r.offset + r.length));
        let data = (!header.has_data_file()).then_some((header.data_offset, end));
        let mut taken: Vec<_> = regions.chain(data).collect();
        taken.sort_unstable();
        Self { taken }
    }

    /// Takes `length` bytes; the last hole is as large as the storage lets it be.
    pub(crate) fn take(&mut self, length: u64) -> u64 {
        let mut at = REGIONS_START;
        for &(start, end) in &self.taken {
            if at + length <= start {
                break;
            }
            at = at.max(ceil(end, REGION_ALIGNMENT));
        }
        let place = self.taken.partition_point(|&(start, _)| start < at);
        self.taken.insert(place, (at, at + length));
        at
    }
}
