// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading bitmap pages on demand, through the page map.

use crate::bits::{Bits, Run, SEGMENT_MEMORY, SEGMENT_PAGES, Segment, set_words};
use crate::commit::GRANULE_MAX;
use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel};
use crate::image::{Fetched, Image, Meta};
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
}

impl<H: Host> Queue<H> {
    /// The run of blocks that starts at block `first` and ends before `end`, loading what it needs.
    pub(crate) async fn run_of(self: &Rc<Self>, first: u64, end: u64) -> Result<(bool, u64)> {
        loop {
            match self.image().bits().run(first, end) {
                Run::Bits { value, len } => return Ok((value, len)),
                Run::Bad => {
                    return Err(Error::new(Kind::Corrupt, format!("the bitmap page of block {first} is damaged; run a check")));
                }
                Run::Missing(segment) => self.load_segment(segment).await?,
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

    /// Loads a segment, unless another task just did.
    pub(crate) async fn load_segment(self: &Rc<Self>, index: u64) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.load_lock.lock().await;
        if image.bits().segment(index).is_some() {
            return Ok(());
        }
        let (first, last) = {
            let mut meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(RegionKind::Bitmap).expect("image with a bitmap");
            if (meta.segments_loaded + 1) * SEGMENT_MEMORY > image.config.metadata_memory {
                return Err(Error::new(Kind::NoMemory, format!("metadata needs more than {} bytes of memory (metadata-memory)", image.config.metadata_memory)));
            }
            meta.segments_loaded += 1;
            let first = index * SEGMENT_PAGES;
            (first, region.pages().min(first + SEGMENT_PAGES))
        };
        let segment = Segment::initial();
        let read = self.read_pages(first, last, |page, read| match read {
            Ok((write_count, payload)) => segment.load_page(page - first, payload, write_count),
            Err(_) => segment.mark_bad(page - first),
        });
        if let Err(error) = read.await {
            image.meta().segments_loaded -= 1;
            return Err(error);
        }
        // Before anybody sees it: what a read-only open may not put in place.
        let meta = image.meta();
        if !meta.replayed.is_empty() {
            for page in first..last {
                let at = (page - first) * PAYLOAD_BITS;
                meta.replayed.tell(page, |from, to, value| segment.write(at + from, at + to, value));
            }
        }
        drop(meta);
        image.bits().insert(index, segment);
        Ok(())
    }

    /// Reads those of the bitmap's pages `first..last` that are stored, and hands out what each holds:
    /// write count and payload, or what is wrong with it.
    async fn read_pages(self: &Rc<Self>, first: u64, last: u64, mut take: impl FnMut(u64, Result<(u32, &[u8])>)) -> Result<()> {
        let image = self.image().clone();
        let (region, uuid, stored) = {
            let meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(RegionKind::Bitmap).expect("image with a bitmap");
            let stored: Vec<bool> = (first..last).map(|p| meta.is_stored(region.map_first + p)).collect();
            (region, header.uuid, stored)
        };
        // One read from the first to the last stored page: what lies between is small.
        let (Some(from), Some(to)) = (stored.iter().position(|&s| s), stored.iter().rposition(|&s| s)) else { return Ok(()) };
        let offset = region.offset + (first + from as u64) * PAGE_SIZE as u64;
        let (buf, at) = self.read_own(FileId::Image, offset, ((to - from + 1) * PAGE_SIZE) as u64).await?;
        for i in (from..=to).filter(|&i| stored[i]) {
            let index = first + i as u64;
            let overlay = image.meta().overlay.get(&(RegionKind::Bitmap, index)).cloned();
            let bytes = overlay.unwrap_or_else(|| buf.to_vec(at + (i - from) * PAGE_SIZE, PAGE_SIZE));
            match page::open(&uuid, RegionKind::Bitmap, region.generation, index, &bytes) {
                Ok(header) => {
                    image.note_loaded(&header);
                    take(index, Ok((header.write_count, &bytes[page::HEADER_SIZE..])));
                }
                Err(error) => {
                    self.host().log(LogLevel::Error, &error.to_string());
                    take(index, Err(error.into()));
                }
            }
        }
        Ok(())
    }

    /// Brings the pages that share a write granule with one of `pages` into hand, with what the journal
    /// says of them: whichever granule the last session had, pages that its unfinished checkpoint wrote
    /// are seen here and counted.
    pub(crate) async fn fetch_pages(self: &Rc<Self>, pages: &BTreeSet<u64>) -> Result<()> {
        const GROUP: u64 = (GRANULE_MAX / PAGE_SIZE) as u64;
        let image = self.image().clone();
        let end = image.header().region(RegionKind::Bitmap).expect("image with a bitmap").pages();
        let groups: BTreeSet<u64> = pages.iter().map(|page| page / GROUP).collect();
        for group in groups {
            let (first, last) = (group * GROUP, end.min((group + 1) * GROUP));
            let initial = || Fetched { words: vec![0; PAYLOAD_WORDS].into(), write_count: 0 };
            let mut found: BTreeMap<u64, Fetched> = (first..last).map(|page| (page, initial())).collect();
            let mut bad = None;
            self.read_pages(first, last, |page, read| match read {
                Ok((write_count, payload)) => {
                    let words = payload.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect();
                    found.insert(page, Fetched { words, write_count });
                }
                Err(_) => {
                    found.remove(&page);
                    bad = bad.or(pages.contains(&page).then_some(page));
                }
            })
            .await?;
            if let Some(page) = bad {
                return Err(Error::new(Kind::Corrupt, format!("bitmap page {page}, which the journal changes, is damaged; run a check")));
            }
            let mut meta = image.meta();
            for (page, fetched) in &mut found {
                meta.replayed.tell(*page, |first, end, value| set_words(&mut fetched.words, first, end, value));
            }
            meta.fetched.append(&mut found);
        }
        Ok(())
    }
}
