// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading pages of the bitmap and of the lookup table on demand, through the page map.

use crate::bits::{Bits, Run, SEGMENT_MEMORY, SEGMENT_PAGES, Segment};
use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel};
use crate::image::{BadPage, Image, Meta};
use crate::space::{chunks_of_regions, may_hold_data};
use crate::table::EntryRun;
use fvd_format::RegionKind;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_BITS};
use std::rc::Rc;

impl Meta {
    /// Whether page-map bit `bit` says "stored".
    pub(crate) fn is_stored(&self, bit: u64) -> bool {
        let within = bit % PAYLOAD_BITS;
        self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] >> (within % 64) & 1 == 1
    }
}

impl Meta {
    /// Says "stored" of page-map bit `bit`.
    pub(crate) fn set_stored(&mut self, bit: u64) {
        let within = bit % PAYLOAD_BITS;
        self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] |= 1 << (within % 64);
    }
}

impl Image {
    /// The bitmap; only called where the header has one.
    pub(crate) fn bits(&self) -> &Bits {
        self.map.bits.get().expect("image with a bitmap")
    }

    /// A region whose pages records change; only called where the header has it.
    pub(crate) fn region(&self, kind: RegionKind) -> &Bits {
        match kind {
            RegionKind::Table => self.map.table.get().expect("compact image"),
            _ => self.bits(),
        }
    }

    /// Whether a table page names only storage that holds guest data (FMT-77).
    fn check_entries(&self, payload: &[u8], below_reach: u64, regions: &[(u64, u64)]) -> Result<()> {
        for entry in payload.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))) {
            check_entry(entry, below_reach, regions)?;
        }
        Ok(())
    }
}

/// FMT-77, of one entry.
pub(crate) fn check_entry(entry: u32, below_reach: u64, regions: &[(u64, u64)]) -> Result<()> {
    match u64::from(entry).checked_sub(1) {
        Some(id) if !may_hold_data(id, below_reach, regions) => {
            Err(Error::new(Kind::Corrupt, format!("the lookup table names storage chunk {id}, which is none: {below_reach} lie below the reach")))
        }
        _ => Ok(()),
    }
}

impl<H: Host> Queue<H> {
    /// The run of blocks that starts at block `first` and ends before `end`, loading what it needs.
    pub(crate) async fn run_of(self: &Rc<Self>, first: u64, end: u64) -> Result<(bool, u64)> {
        loop {
            match self.image().bits().run(first, end) {
                Run::Bits { value, len } => return Ok((value, len)),
                Run::Bad => {
                    return Err(bad_bits(first));
                }
                Run::Missing(segment) => self.load_segment(RegionKind::Bitmap, segment).await?,
            }
        }
    }

    /// Loads every segment that holds one of the blocks `first..end`.
    pub(crate) async fn load_blocks(self: &Rc<Self>, first: u64, end: u64) -> Result<()> {
        let mut at = first;
        while at < end {
            at += self.run_of(at, end).await?.1;
        }
        Ok(())
    }

    /// The run of table entries that starts at chunk `first` and ends before `end`, loading what it
    /// needs.
    pub(crate) async fn entries_of(self: &Rc<Self>, first: u64, end: u64) -> Result<EntryRun> {
        loop {
            match self.image().region(RegionKind::Table).entry_run(first, end) {
                EntryRun::Missing(segment) => self.load_segment(RegionKind::Table, segment).await?,
                EntryRun::Bad => return Err(bad_entries(first)),
                run => return Ok(run),
            }
        }
    }

    /// Loads every segment that holds an entry of chunks `first..end`.
    pub(crate) async fn load_entries(self: &Rc<Self>, first: u64, end: u64) -> Result<()> {
        let mut at = first;
        while at < end {
            at += match self.entries_of(at, end).await? {
                EntryRun::Free { count } | EntryRun::Chunks { count, .. } => count,
                other => unreachable!("loaded: {other:?}"),
            };
        }
        Ok(())
    }

    /// Loads a segment of a region, unless another task just did.
    pub(crate) async fn load_segment(self: &Rc<Self>, kind: RegionKind, index: u64) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.load_lock.lock().await;
        if image.region(kind).segment(index).is_some() {
            return Ok(());
        }
        let (region, uuid, stored, first, own, below_reach) = {
            let mut meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(kind).expect("image with this region");
            let uuid = header.uuid;
            let own = if kind == RegionKind::Table { chunks_of_regions(header) } else { Vec::new() };
            let below_reach = header.chunks_below(meta.reach);
            if (meta.segments_loaded + 1) * SEGMENT_MEMORY > image.config.metadata_memory {
                return Err(Error::new(Kind::NoMemory, format!("metadata needs more than {} bytes of memory (metadata-memory)", image.config.metadata_memory)));
            }
            meta.segments_loaded += 1;
            let first = index * SEGMENT_PAGES;
            let last = region.pages().min(first + SEGMENT_PAGES);
            let stored: Vec<bool> = (first..last).map(|p| meta.is_stored(region.map_first + p)).collect();
            (region, uuid, stored, first, own, below_reach)
        };
        let segment = Segment::initial();
        // One read from the first to the last stored page: what lies between is small.
        let from = stored.iter().position(|&s| s);
        let to = stored.iter().rposition(|&s| s);
        if let (Some(from), Some(to)) = (from, to) {
            let offset = region.offset + (first + from as u64) * PAGE_SIZE as u64;
            let (buf, at) = match self.read_own(FileId::Image, offset, ((to - from + 1) * PAGE_SIZE) as u64).await {
                Ok(read) => read,
                Err(error) => {
                    image.meta().segments_loaded -= 1;
                    return Err(error);
                }
            };
            for i in (from..=to).filter(|&i| stored[i]) {
                let index = first + i as u64;
                let overlay = image.meta().overlay.get(&(kind, index)).cloned();
                let bytes = overlay.unwrap_or_else(|| buf.to_vec(at + (i - from) * PAGE_SIZE, PAGE_SIZE));
                let bad = match page::open(&uuid, kind, region.generation, index, &bytes) {
                    Ok(header) => {
                        segment.load_page(i as u64, &bytes[page::HEADER_SIZE..], header.write_count);
                        image.note_loaded(&header);
                        let checked = if kind == RegionKind::Table { image.check_entries(&bytes[page::HEADER_SIZE..], below_reach, &own) } else { Ok(()) };
                        checked.err().map(|error| BadPage::Entries(error.text))
                    }
                    Err(error) => Some(BadPage::Unreadable(error.to_string())),
                };
                if let Some(bad) = bad {
                    let (BadPage::Unreadable(text) | BadPage::Entries(text)) = &bad;
                    self.host().log(LogLevel::Error, text);
                    segment.mark_bad(i as u64);
                    image.meta().bad_pages.insert((kind, index), bad);
                }
            }
        }
        image.region(kind).insert(index, segment);
        Ok(())
    }
}

/// Nothing can be told of the chunks of a damaged page.
pub(crate) fn bad_entries(chunk: u64) -> Error {
    Error::new(Kind::Corrupt, format!("the lookup table's page of chunk {chunk} is damaged; run a check"))
}

/// Nothing can be told of the blocks of a damaged page.
pub(crate) fn bad_bits(block: u64) -> Error {
    Error::new(Kind::Corrupt, format!("the bitmap page of block {block} is damaged; run a check"))
}
