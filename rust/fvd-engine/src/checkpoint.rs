// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checkpoints: the stable image of changed pages goes in place, through the double-write area,
//! and the header's first sequence moves on (R2, R3).

use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel, OwnBuf};
use crate::image::{Image, Meta, PageId, faulty};
use fvd_format::double_write::{BATCH_PAGES_MAX, Batch, BatchEntry};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_BITS, PageHeader};
use fvd_format::{Header, RegionKind};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A page of a batch, sealed.
struct Sealed {
    kind: RegionKind,
    index: u64,
    bytes: Vec<u8>,
    /// Its write count before this batch.
    count_before: u32,
    /// Its page-map bit, if this batch is the first to say that the page is stored.
    first: Option<u64>,
}

impl<H: Host> Queue<H> {
    /// Runs the checkpoint that `meta.checkpointing` announced.
    pub(crate) async fn background_checkpoint(self: &Rc<Self>) {
        let image = self.image().clone();
        let result = self.checkpoint(|_| ()).await;
        {
            let mut meta = image.meta();
            meta.checkpointing = false;
            meta.checkpoint_error = result.as_ref().err().cloned();
        }
        if let Err(error) = result {
            self.host().log(LogLevel::Error, &error.context("checkpoint").text);
        }
        image.checkpoint_wait.wake_all();
    }

    /// Writes every dirty page in place; then, with `change`, the header lets go of the journal
    /// before this moment, in one update.
    pub(crate) async fn checkpoint(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let image = self.image().clone();
        let (seq, commit, number, mut pages) = {
            let mut meta = image.meta();
            // A commit on its way is not stable yet: it starts at `next_seq` and stays.
            let pages = std::mem::take(&mut meta.dirty_pages);
            (meta.next_seq, meta.next_commit, meta.last_checkpoint + 1, pages)
        };
        if faulty!(image, HeaderBeforePages) {
            self.update_header(|header| (header.first_seq, header.first_commit) = (seq, commit)).await?;
        }
        while !pages.is_empty() || !image.meta().dirty_map_pages.is_empty() {
            let mut rest = match pages.iter().nth(image.batch_most()).copied() {
                Some(key) => pages.split_off(&key),
                None => BTreeSet::new(),
            };
            if let Err(error) = self.write_part(&pages, &mut rest, number).await {
                let mut meta = image.meta();
                meta.dirty_pages.extend(pages);
                meta.dirty_pages.extend(rest);
                return Err(error);
            }
            if faulty!(image, HeaderAmongBatches) && !rest.is_empty() {
                self.update_header(|header| (header.first_seq, header.first_commit) = (seq, commit)).await?;
            }
            pages = rest;
        }
        let (sums, now) = {
            let meta = image.meta();
            (meta.count_sums.clone(), (meta.next_seq, meta.next_commit))
        };
        let (seq, commit) = if faulty!(image, FirstSequenceTooFar) { now } else { (seq, commit) };
        if faulty!(image, JournalReusedEarly) {
            image.meta().header.as_mut().expect("open").first_seq = seq;
            image.checkpoint_wait.wake_all();
        }
        self.update_header(|header| {
            header.first_seq = seq;
            header.first_commit = commit;
            header.last_checkpoint = number;
            for (kind, sum) in sums {
                if let Some(region) = header.region_mut(kind) {
                    region.count_sum = sum;
                }
            }
            change(header);
        })
        .await?;
        let mut meta = image.meta();
        meta.last_checkpoint = number;
        meta.written.clear();
        meta.stats.checkpoints += 1;
        Ok(())
    }

    /// Writes `pages`. Recovery has only those in memory that it is about to write, and may find more.
    async fn write_part(self: &Rc<Self>, pages: &BTreeSet<PageId>, rest: &mut BTreeSet<PageId>, number: u64) -> Result<()> {
        let image = self.image().clone();
        if image.meta().replayed.is_empty() {
            return self.write_batch(pages, number).await;
        }
        self.fetch_pages(pages).await?;
        let group = (image.granule() / PAGE_SIZE) as u64;
        let found = std::mem::take(&mut image.meta().dirty_pages);
        rest.extend(found.into_iter().filter(|(kind, p)| pages.range((*kind, p / group * group)..(*kind, (p / group + 1) * group)).next().is_none()));
        let result = self.write_batch(pages, number).await;
        image.meta().fetched.clear();
        result
    }

    /// One batch: area → sync → in place → sync.
    async fn write_batch(self: &Rc<Self>, pages: &BTreeSet<PageId>, checkpoint: u64) -> Result<()> {
        let image = self.image().clone();
        let (header, number, sealed) = {
            let mut meta = image.meta();
            let header = meta.header.clone().expect("open");
            let sealed = meta.seal_batch(&image, &header, pages, checkpoint);
            (header, meta.last_batch + 1, sealed)
        };
        let area = header.region(RegionKind::DoubleWrite).expect("image with a journal");
        if !faulty!(image, NoDoubleWrite) {
            let entries = sealed.iter().map(|p| BatchEntry { kind: p.kind, index: p.index, crc: page::stored_crc(&p.bytes) }).collect();
            let mut buf = OwnBuf::zeroed((sealed.len() + 1) * PAGE_SIZE);
            buf.write(0, &Batch { number, entries }.encode(&header.uuid));
            for (i, page) in sealed.iter().enumerate() {
                buf.write((i + 1) * PAGE_SIZE, &page.bytes);
            }
            let len = buf.capacity() as u64;
            let written = match self.write_own(FileId::Image, area.offset, buf, len).await {
                Ok(()) => self.sync().await,
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                // Nothing in place was touched: the batch never happened.
                image.meta().unseal(&image, &sealed);
                return Err(error);
            }
        }
        // From here on a page in place may be torn; the area has it whole.
        let mut at = 0;
        while at < sealed.len() {
            let run = sealed[at..].iter().zip(0..).take_while(|(p, i)| p.kind == sealed[at].kind && p.index == sealed[at].index + i).count();
            let bytes = sealed[at..at + run].iter().map(|page| &page.bytes[..]).collect::<Vec<_>>().concat();
            let region = header.region(sealed[at].kind).expect("page of a region");
            let offset = region.offset + sealed[at].index * PAGE_SIZE as u64;
            // A page that stays torn is whole only in the area, which nothing may overwrite any more:
            // this poisons, and recovery at the next open finishes the batch.
            self.write_surely(offset, &bytes).await?;
            at += run;
        }
        if !faulty!(image, AreaReusedEarly) {
            self.sync().await?;
        }
        let mut meta = image.meta();
        meta.last_batch = number;
        meta.written.extend(sealed.iter().map(|p| (p.kind, p.index)));
        for page in sealed.iter().filter(|p| p.kind == RegionKind::PageMap) {
            meta.dirty_map_pages.remove(&page.index);
        }
        meta.stats.pages_written += sealed.len() as u64;
        Ok(())
    }
}

impl Image {
    /// Most pages that a batch is asked for: there must be room for pages of the page map, and for what
    /// the write granule adds.
    fn batch_most(&self) -> usize {
        let most = (BATCH_PAGES_MAX / 2) / (self.granule() / PAGE_SIZE);
        if self.config.batch_pages == 0 { most } else { most.min(self.config.batch_pages) }
    }
}

impl Meta {
    /// The words of a page as completed commits say, and its write count; `None` if it is damaged.
    fn stable_page(&self, image: &Image, id: PageId) -> Option<(Box<[u64]>, u32)> {
        if !self.replayed.is_empty() {
            return self.fetched.get(&id).map(|page| (page.words.clone(), page.write_count));
        }
        let (kind, index) = id;
        let pages = image.region(kind);
        let words = self.stable.get(&id).filter(|_| !faulty!(image, CheckpointFromMemory)).cloned().unwrap_or_else(|| pages.page_words(index));
        (!pages.is_bad(index)).then(|| (words, pages.count(index)))
    }

    /// Sets the write count of a page; returns what it was.
    fn replace_count(&mut self, image: &Image, id: PageId, count: u32) -> u32 {
        if let Some(page) = self.fetched.get_mut(&id) {
            return std::mem::replace(&mut page.write_count, count);
        }
        let before = image.region(id.0).count(id.1);
        image.region(id.0).set_count(id.1, count);
        before
    }

    /// Seals the stable images of `pages`, of what shares their write granule, and of the page-map
    /// pages that record them, in region and index order.
    fn seal_batch(&mut self, image: &Image, header: &Header, pages: &BTreeSet<PageId>, checkpoint: u64) -> Vec<Sealed> {
        let group = (image.granule() / PAGE_SIZE) as u64;
        let region = |kind| *header.region(kind).expect("page of a region");
        let mut all = BTreeSet::new();
        for (kind, page) in pages {
            let shared = page / group * group..(page / group + 1) * group;
            all.extend(shared.filter(|p| *p < region(*kind).pages()).map(|p| (*kind, p)));
        }
        let all: Vec<_> = all.into_iter().filter_map(|index| self.stable_page(image, index).map(|page| (index, page))).collect();
        let mut first = BTreeMap::new();
        if !faulty!(image, PageMapForgotten) {
            for ((kind, page), _) in &all {
                let bit = region(*kind).map_first + page;
                if !self.is_stored(bit) {
                    let within = bit % PAYLOAD_BITS;
                    self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] |= 1 << (within % 64);
                    self.dirty_map_pages.insert(bit / PAYLOAD_BITS);
                    first.insert((*kind, *page), bit);
                }
            }
        }
        // The others follow in a batch of their own: till the header moves, the journal has all that
        // a page whose bit is not stored yet can hold.
        let most = (BATCH_PAGES_MAX / 2) / group as usize;
        let map_pages: BTreeSet<u64> = self.dirty_map_pages.iter().take(most).flat_map(|p| p / group * group..(p / group + 1) * group).collect();
        let mut sealed = Vec::new();
        let map = *header.region(RegionKind::PageMap).expect("image with a journal");
        for index in map_pages.into_iter().filter(|p| *p < map.pages()) {
            let words = self.page_map[index as usize].clone();
            let before = self.page_map_counts[index as usize];
            let write_count = self.count_page(image, RegionKind::PageMap, index, before);
            self.page_map_counts[index as usize] = write_count;
            let place = PageHeader { kind: RegionKind::PageMap, generation: map.generation, index, write_count, checkpoint };
            sealed.push(self.seal(header, place, before, &words, None));
        }
        for ((kind, index), (words, before)) in all {
            let write_count = self.count_page(image, kind, index, before);
            self.replace_count(image, (kind, index), write_count);
            let place = PageHeader { kind, generation: region(kind).generation, index, write_count, checkpoint };
            sealed.push(self.seal(header, place, before, &words, first.get(&(kind, index)).copied()));
        }
        assert!(sealed.len() <= BATCH_PAGES_MAX);
        sealed
    }

    /// Takes back the write counts of a batch that was not written, and the page-map bits that it would
    /// have been the first to set: another batch may be written before its pages are (FMT-35).
    fn unseal(&mut self, image: &Image, sealed: &[Sealed]) {
        for page in sealed {
            if let Some(bit) = page.first.filter(|_| !faulty!(image, PageMapAhead)) {
                let within = bit % PAYLOAD_BITS;
                self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] &= !(1 << (within % 64));
            }
            let count = match page.kind {
                RegionKind::PageMap => std::mem::replace(&mut self.page_map_counts[page.index as usize], page.count_before),
                kind => self.replace_count(image, (kind, page.index), page.count_before),
            };
            let sum = self.count_sums.entry(page.kind).or_default();
            *sum = sum.wrapping_sub(u64::from(count)).wrapping_add(u64::from(page.count_before));
        }
    }

    /// The write count of a page that had `before`: one more, but once a checkpoint only, however
    /// often an unfinished one is repeated. Sums are kept modulo 2⁶⁴ (FMT-17).
    fn count_page(&mut self, image: &Image, kind: RegionKind, index: u64, before: u32) -> u32 {
        if self.written.contains(&(kind, index)) && !faulty!(image, PageCountedTwice) {
            return before;
        }
        let count = before.checked_add(1).unwrap_or(1);
        let sum = self.count_sums.entry(kind).or_default();
        *sum = sum.wrapping_sub(u64::from(before)).wrapping_add(u64::from(count));
        count
    }

    fn seal(&self, header: &Header, place: PageHeader, count_before: u32, words: &[u64], first: Option<u64>) -> Sealed {
        let bytes = page::of_words(&header.uuid, &place, words);
        Sealed { kind: place.kind, index: place.index, bytes, count_before, first }
    }
}
