// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where regions and guest data lie in the file.

use crate::io::ceil;
use fvd_format::header::{REGIONS_START, compatible};
use fvd_format::limits::*;
use fvd_format::page::PAYLOAD_BITS;
use fvd_format::{Header, Region, RegionKind, bitmap};

/// Regions begin at multiples of this, so that no write granule is shared: bytes.
pub(crate) const REGION_ALIGNMENT: u64 = 64 << 10;
/// Guest data begins at a multiple of this: bytes.
const DATA_ALIGNMENT: u64 = 1 << 20;

/// Gives every region of a new flat image its place, and the data its offset.
pub(crate) fn place_regions(header: &mut Header, journal_size: u64) {
    if header.covered > 0 {
        header.data_offset = ceil(give_places(header, journal_size), DATA_ALIGNMENT);
        return;
    }
    // Room for the regions of a bitmap made later: a hole, which costs addresses, not storage. Not
    // on a device, where it would cost storage.
    let mut later = header.clone();
    (later.covered, later.block_size) = (header.virtual_size, default_block_size(header.virtual_size));
    let room = header.compatible & compatible::NON_ZEROING == 0 && header.virtual_size > 0;
    let end = if room { give_places(&mut later, journal_size) } else { REGIONS_START };
    header.data_offset = ceil(end, DATA_ALIGNMENT);
}

/// Puts the regions of an image with a bitmap one behind the other; returns where they end.
fn give_places(header: &mut Header, journal_size: u64) -> u64 {
    let mut at = REGIONS_START;
    let mut take = |length: u64| {
        let region = Region { offset: at, length, generation: 1, map_first: 0, count_sum: 0 };
        at = ceil(at + length, REGION_ALIGNMENT);
        Some(region)
    };
    let page = PAGE_SIZE as u64;
    let bitmap_pages = bitmap::pages(header.blocks());
    *header.region_mut(RegionKind::PageMap) = take(bitmap_pages.div_ceil(PAYLOAD_BITS) * page);
    *header.region_mut(RegionKind::DoubleWrite) = take(DOUBLE_WRITE_SIZE);
    *header.region_mut(RegionKind::Journal) = take(journal_size);
    *header.region_mut(RegionKind::Bitmap) = take(bitmap_pages * page);
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
        if header.block_size >= BLOCK_SIZE_MAX {
            return false;
        }
        header.block_size *= 2;
    }
}

/// Space that `header` does not name, first fit. The disk counts as reaching to file byte
/// `data_end` at least.
pub(crate) struct FreeSpace {
    /// Start and end of what is taken, in order of start.
    taken: Vec<(u64, u64)>,
}

impl FreeSpace {
    pub(crate) fn of(header: &Header, data_end: u64) -> Self {
        let data = (header.data_offset, header.flat_data_end().max(data_end));
        let mut taken: Vec<_> = header.regions.iter().flatten().map(|r| (r.offset, r.offset + r.length)).chain([data]).collect();
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
