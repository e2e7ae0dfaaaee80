// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading pages of the bitmap and of the lookup table on demand, through the page map.

use crate::bits::{Bits, Run, SEGMENT_MEMORY, SEGMENT_PAGES, Segment};
use crate::commit::GRANULE_MAX;
use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel};
use crate::image::{BadPage, Fetched, Image, Meta, PageId, faulty};
use crate::space::chunks_of_regions;
use crate::table::EntryRun;
use fvd_format::RegionKind;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_BITS, PAYLOAD_WORDS};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

impl Meta {
    /// Whether page-map bit `bit` says "stored".
    pub(crate) fn is_stored(&self, bit: u64) -> bool {
        let within = bit % PAYLOAD_BITS;
        self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] >> (within % 64) & 1 == 1
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

    /// Storage chunks below the reach, and those among them that are metadata.
    pub(crate) fn storage_of_chunks(&self) -> (u64, Vec<(u64, u64)>) {
        let meta = self.meta();
        let header = meta.header.as_ref().expect("open image");
        if header.is_compact() { (header.chunks_below(meta.reach), chunks_of_regions(header)) } else { (0, Vec::new()) }
    }
}

/// Whether each of the entries `first…last`, rising by one, names storage that holds guest data (FMT-77).
pub(crate) fn check_entries(first: u64, last: u64, below_reach: u64, regions: &[(u64, u64)]) -> Result<()> {
    // Entry 0 names nothing.
    let taken = |(start, end): &(u64, u64)| first.max(1) <= *end && *start < last;
    match last.checked_sub(1) {
        Some(id) if id >= below_reach || regions.iter().any(taken) => {
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
        let (first, last) = {
            let mut meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(kind).expect("image with this region");
            if (meta.segments_loaded + 1) * SEGMENT_MEMORY > image.config.metadata_memory {
                return Err(Error::new(Kind::NoMemory, format!("metadata needs more than {} bytes of memory (metadata-memory)", image.config.metadata_memory)));
            }
            meta.segments_loaded += 1;
            let first = index * SEGMENT_PAGES;
            (first, region.pages().min(first + SEGMENT_PAGES))
        };
        let segment = Segment::initial();
        let read = self.read_pages(kind, first, last, |page, found, bad| {
            if let Some((write_count, payload)) = found {
                segment.load_page(page - first, payload, write_count);
            }
            if let Some(bad) = bad {
                segment.mark_bad(page - first);
                image.meta().bad_pages.insert((kind, page), bad);
            }
        });
        if let Err(error) = read.await {
            image.meta().segments_loaded -= 1;
            return Err(error);
        }
        // Before anybody sees it: what a read-only open may not put in place.
        let meta = image.meta();
        if !meta.replayed.is_empty() {
            for page in first..last {
                let mut words = segment.page_words(page - first);
                if meta.replayed.apply((kind, page), &mut words) {
                    segment.set_page_words(page - first, &words);
                }
            }
        }
        drop(meta);
        image.region(kind).insert(index, segment);
        Ok(())
    }

    /// Reads those of a region's pages `first..last` that are stored, and hands out what each holds –
    /// write count and payload –, and what is wrong with it.
    async fn read_pages(self: &Rc<Self>, kind: RegionKind, first: u64, last: u64, mut take: impl FnMut(u64, Option<(u32, &[u8])>, Option<BadPage>)) -> Result<()> {
        let image = self.image().clone();
        let (region, uuid, stored) = {
            let meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(kind).expect("image with this region");
            let stored: Vec<bool> = (first..last).map(|p| meta.is_stored(region.map_first + p)).collect();
            (region, header.uuid, stored)
        };
        let (below_reach, own) = image.storage_of_chunks();
        // One read from the first to the last stored page: what lies between is small.
        let (Some(from), Some(to)) = (stored.iter().position(|&s| s), stored.iter().rposition(|&s| s)) else { return Ok(()) };
        let offset = region.offset + (first + from as u64) * PAGE_SIZE as u64;
        let (buf, at) = self.read_own(FileId::Image, offset, ((to - from + 1) * PAGE_SIZE) as u64).await?;
        for i in (from..=to).filter(|&i| stored[i]) {
            let index = first + i as u64;
            let overlay = image.meta().overlay.get(&(kind, index)).cloned();
            let bytes = overlay.unwrap_or_else(|| buf.to_vec(at + (i - from) * PAGE_SIZE, PAGE_SIZE));
            let payload = &bytes[page::HEADER_SIZE..];
            let header = match page::open(&uuid, kind, region.generation, index, &bytes) {
                Ok(header) => header,
                Err(error) => {
                    self.host().log(LogLevel::Error, &error.to_string());
                    take(index, None, Some(BadPage::Unreadable));
                    continue;
                }
            };
            image.note_loaded(&header);
            let mut entries = payload.chunks_exact(4).map(|b| u64::from(u32::from_le_bytes(b.try_into().expect("four bytes"))));
            let checked = match kind {
                RegionKind::Table if !faulty!(image, WildEntryUsed) => entries.try_for_each(|entry| check_entries(entry, entry, below_reach, &own)),
                _ => Ok(()),
            };
            if let Err(error) = &checked {
                self.host().log(LogLevel::Error, &error.to_string());
            }
            take(index, Some((header.write_count, payload)), checked.err().map(|_| BadPage::Entries));
        }
        Ok(())
    }

    /// Brings the pages that share a write granule with one of `pages` into hand, with what the journal
    /// says of them: whichever granule the last session had, pages that its unfinished checkpoint wrote
    /// are seen here and counted.
    pub(crate) async fn fetch_pages(self: &Rc<Self>, pages: &BTreeSet<PageId>) -> Result<()> {
        const GROUP: u64 = (GRANULE_MAX / PAGE_SIZE) as u64;
        let image = self.image().clone();
        let header = image.header();
        let groups: BTreeSet<PageId> = pages.iter().map(|(kind, page)| (*kind, page / GROUP)).collect();
        for (kind, group) in groups {
            let end = header.region(kind).expect("image with this region").pages();
            let (first, last) = (group * GROUP, end.min((group + 1) * GROUP));
            let initial = || Fetched { words: vec![0; PAYLOAD_WORDS].into(), write_count: 0 };
            let mut found: BTreeMap<PageId, Fetched> = (first..last).map(|page| ((kind, page), initial())).collect();
            let mut bad = None;
            self.read_pages(kind, first, last, |page, read, wrong| match (read, wrong) {
                (Some((write_count, payload)), None) => {
                    let words = payload.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect();
                    found.insert((kind, page), Fetched { words, write_count });
                }
                _ => {
                    found.remove(&(kind, page));
                    bad = bad.or(pages.contains(&(kind, page)).then_some(page));
                }
            })
            .await?;
            if let Some(page) = bad {
                return Err(Error::new(Kind::Corrupt, format!("page {page} of {kind:?}, which the journal changes, is damaged; run a check")));
            }
            let mut meta = image.meta();
            for (id, fetched) in &mut found {
                meta.replayed.apply(*id, &mut fetched.words);
            }
            meta.fetched.append(&mut found);
        }
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
