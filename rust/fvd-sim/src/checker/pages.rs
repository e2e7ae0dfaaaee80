// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages in place: only what the durable double-write area holds, and the area is used again only
//! after they are durable (CC-20); it never holds what is ahead of the commits (CC-8).

use super::{Model, Verdict, guest_disk};
use crate::disk::Disk;
use crate::store::PAGE;
use fvd_format::double_write::Batch;
use fvd_format::page::{PAYLOAD_BITS, PAYLOAD_ENTRIES};
use fvd_format::{Header, RegionKind, page};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The table as durable commits say, and what the last of them changed, as it was before.
type Table<'a> = Option<(&'a BTreeMap<u64, u32>, &'a BTreeMap<u64, u32>)>;

/// A batch that a power cut leaves is written back: what its bitmap page says beyond the page in place must
/// be so already.
fn ahead(disks: &[Disk; 2], header: &Header, index: u64, page: &[u8], model: &Model, table: Table<'_>) -> Option<String> {
    if header.is_compact() && table.is_none() {
        return None;
    }
    let entry = |chunk| table.and_then(|(table, _)| table.get(&chunk).copied());
    let region = header.region(RegionKind::Bitmap)?;
    let old = disks[0].stable.page(region.offset / PAGE as u64 + index);
    let old = old.filter(|old| page::open(&header.uuid, RegionKind::Bitmap, region.generation, index, &old[..]).is_ok());
    let bit = |page: &[u8], i: u64| page[page::HEADER_SIZE + (i / 8) as usize] >> (i % 8) & 1 == 1;
    let block = u64::from(header.block_size);
    let (from, block_cells) = (index * PAYLOAD_BITS, block / model.geometry.cell);
    for window in &model.geometry.windows {
        let first = (window.first / block_cells).max(from);
        let end = (window.first + window.count).div_ceil(block_cells).min(header.blocks()).min(from + PAYLOAD_BITS);
        let fresh = (first..end).filter(|block| bit(page, block - from) && !old.is_some_and(|old| bit(&old[..], block - from)));
        for number in fresh {
            let place = |at| super::journal::place_of(header, entry, at);
            let text = super::journal::not_durable(guest_disk(disks, header), model, place, number * block, ((number + 1) * block).min(header.covered));
            if text.is_some() {
                return text;
            }
        }
    }
    None
}

/// The same for a page of the table: it says what durable commits say, the last one included or not.
fn table_ahead(index: u64, page: &[u8], table: Table<'_>) -> Option<String> {
    let (table, before) = table?;
    let entries = page[page::HEADER_SIZE..].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    let mut entries = (index * PAYLOAD_ENTRIES..).zip(entries);
    let (chunk, entry) = entries.find(|(chunk, entry)| table.get(chunk).copied().unwrap_or(0) != *entry && before.get(chunk) != Some(entry))?;
    Some(format!("entry {chunk} is {entry}, commits say {:?}", table.get(&chunk)))
}

/// What is known of pages in place.
#[derive(Default)]
pub struct Pages {
    /// Offsets of writes in place that were asked for and are not durable; the disk's mark at
    /// their end.
    open: Vec<(u64, Option<u64>)>,
}

impl Pages {
    /// The double-write area is about to be written.
    pub fn submit_area(&mut self, disks: &[Disk; 2], header: &Header, bytes: &[u8], model: Option<&RefCell<Model>>, table: Table<'_>) -> Verdict {
        let batch = Batch::decode(&header.uuid, &bytes[..PAGE]).map_err(|error| format!("an invalid batch is written: {error}"))?;
        if batch.number <= header.last_batch {
            return Err(format!("batch {} is not above the last one, {} (CC-20)", batch.number, header.last_batch));
        }
        if let Some((offset, _)) = self.open.first() {
            return Err(format!("the double-write area is written while the page at {offset} is not durable (CC-20)"));
        }
        let Some(model) = model else { return Ok(()) };
        for (entry, page) in batch.entries.iter().zip(bytes.chunks(PAGE).skip(1)) {
            if entry.kind == RegionKind::Bitmap
                && let Some(text) = ahead(disks, header, entry.index, page, &model.borrow(), table)
            {
                return Err(format!("a batch exposes a cell before its data is durable (CC-8): {text}"));
            }
            if entry.kind == RegionKind::Table
                && let Some(text) = table_ahead(entry.index, page, table)
            {
                return Err(format!("a batch is ahead of the commits (CC-8): {text}"));
            }
        }
        Ok(())
    }

    /// Pages of region `kind` are about to be written in place.
    pub fn submit_in_place(&mut self, disk: &Disk, header: &Header, kind: RegionKind, offset: u64, bytes: &[u8]) -> Verdict {
        let region = header.region(kind).expect("a write to a region");
        let area = header.region(RegionKind::DoubleWrite).expect("an image with pages");
        let head = disk.stable.page(area.offset / PAGE as u64).and_then(|bytes| Batch::decode(&header.uuid, bytes).ok());
        let Some(batch) = head.filter(|batch| batch.number > header.last_batch) else {
            return Err(format!("page at {offset} is written in place and no batch counts (CC-20)"));
        };
        for (i, bytes) in bytes.chunks(PAGE).enumerate() {
            let index = (offset - region.offset) / PAGE as u64 + i as u64;
            page::open(&header.uuid, kind, region.generation, index, bytes).map_err(|error| format!("an invalid page is written: {error}"))?;
            let at = batch.entries.iter().position(|e| e.kind == kind && e.index == index);
            let in_area = at.and_then(|at| disk.stable.page(area.offset / PAGE as u64 + 1 + at as u64));
            if in_area.is_none_or(|copy| copy.as_slice() != bytes) {
                return Err(format!("page {index} of {kind:?} is written in place, but is not durable in the double-write area (CC-20)"));
            }
        }
        self.open.push((offset, None));
        Ok(())
    }

    /// The write in place at `offset` ended; the disk's mark is `mark`.
    pub fn in_place_written(&mut self, offset: u64, mark: u64) {
        for open in self.open.iter_mut().filter(|open| open.0 == offset) {
            open.1 = Some(mark);
        }
    }

    /// A flush that covers everything before `mark` succeeded.
    pub fn flushed(&mut self, mark: u64) {
        self.open.retain(|open| open.1.is_none_or(|at| at > mark));
    }
}
