// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checking an open image: header copies, page map, every stored page, sums of write counts.

use crate::bits::SEGMENT_PAGES;
use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, OpKind};
use crate::io::bare;
use crate::request::CheckReport;
use crate::table::{ENTRY_BITS, EntryRun, page_of_entry};
use bitvec::prelude::*;
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_ENTRIES};
use fvd_format::{Header, Region, RegionKind};
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// Checks the image. Damage is reported, not an error.
    pub(crate) async fn check(self: &Rc<Self>) -> Result<CheckReport> {
        let image = self.image().clone();
        let mut report = CheckReport::default();
        // Regions do not move while they are compared with the header.
        let _layout = image.layout_lock.lock().await;
        if !image.config.read_only {
            // What is compared with the file must be in the file.
            self.commit_metadata().await?;
        }
        let _steady = image.header_lock.lock().await;
        if !image.config.read_only {
            // An update that failed may have reached the file.
            image.check_poison()?;
        }
        let header = image.header();
        for copy in [1, 2] {
            let bytes = self.read_own(FileId::Image, HEADER_OFFSETS[copy - 1], PAGE_SIZE as u64).await?.0.to_vec(0, PAGE_SIZE);
            match Header::decode(&header.uuid, copy, &bytes) {
                Ok(found) if found.generation == header.generation => {}
                // The last update was cut short after its first copy, which counts; only a writable open
                // makes both agree again.
                Ok(found) if image.config.read_only && found.generation + 1 == header.generation => {}
                Ok(found) => report.corrupt(format!("header copy {copy}: generation {} instead of {}", found.generation, header.generation)),
                // Torn by the cut that ended the session, perhaps; the next writable open mends it.
                Err(error) if image.config.read_only && !header.clean => report.findings.push(format!("{error}; the other copy counts")),
                Err(error) => report.corrupt(error.to_string()),
            }
        }
        let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        if length < header.file_length_min() {
            report.corrupt(format!("the file has {length} bytes, {} are needed", header.file_length_min()));
        }
        report.image_end = header.file_length_min();
        drop(_steady);
        if header.region(RegionKind::Bitmap).is_some() {
            self.check_bitmap(&header, &mut report).await?;
        }
        if header.is_compact() {
            self.check_table(&header, &mut report).await?;
        }
        Ok(report)
    }

    async fn check_bitmap(self: &Rc<Self>, header: &Header, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        let region = *header.region(RegionKind::Bitmap).expect("checked by the caller");
        report.blocks_total = header.blocks();
        self.check_pages(RegionKind::Bitmap, &region, report).await?;
        let last = region.pages() - 1;
        let tail = header.blocks() - last * page::PAYLOAD_BITS;
        if let Some(extra) = image.bits().page_words(last).view_bits::<Lsb0>()[tail as usize..].first_one() {
            report.corrupt(format!("the bitmap has a bit past its last block: {}", header.blocks() + extra as u64));
        }
        report.blocks_present = image.bits().count_ones();
        Ok(())
    }

    /// Every storage chunk belongs to one guest chunk at most, and to no region (FMT-76, FMT-77).
    async fn check_table(self: &Rc<Self>, header: &Header, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        let region = *header.region(RegionKind::Table).expect("compact image");
        report.chunks_total = header.chunks();
        self.check_pages(RegionKind::Table, &region, report).await?;
        let table = image.region(RegionKind::Table);
        let last = page_of_entry(header.chunks().max(1) - 1);
        let words = table.page_words(last);
        let used = (header.chunks() - last * PAYLOAD_ENTRIES) as usize;
        let entries = words.iter().flat_map(|w| [*w as u32, (*w >> ENTRY_BITS) as u32]);
        if let Some(extra) = entries.skip(used).position(|entry| entry != 0) {
            report.corrupt(format!("the lookup table has an entry past its last chunk: {}", header.chunks() + extra as u64));
        }
        // Runs of storage chunks, with the guest chunk of each one's start.
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        let mut at = 0;
        while at < header.chunks() {
            at += match table.entry_run(at, header.chunks()) {
                EntryRun::Chunks { id, count } => {
                    report.chunks_allocated += count;
                    report.chunks_fragmented += u64::from(runs.last().is_some_and(|(start, end, guest)| guest + (end - start) == at && *end != id));
                    runs.push((id, id + count, at));
                    count
                }
                EntryRun::Free { count } => count,
                _ => 1,
            };
        }
        runs.sort_unstable();
        let mut end = (0, 0);
        for (start, stop, guest) in runs {
            if start < end.0 {
                report.corrupt(format!("storage chunk {start} of guest chunk {guest} belongs to guest chunk {} too", end.1));
            }
            end = end.max((stop, guest));
        }
        let reach = image.meta().reach;
        report.image_end = report.image_end.max(reach);
        Ok(())
    }

    /// Reads every stored page of a region and compares the sum of write counts.
    async fn check_pages(self: &Rc<Self>, kind: RegionKind, region: &Region, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        for segment in 0..region.pages().div_ceil(SEGMENT_PAGES) {
            self.load_segment(kind, segment).await?;
        }
        let pages = image.region(kind);
        let bad: Vec<u64> = (0..region.pages()).filter(|&p| pages.is_bad(p)).collect();
        for index in &bad {
            report.corrupt(format!("page {index} of {kind:?} is damaged"));
        }
        // Pages that were synced and yet are gone show in the sum of the write counts, but only
        // while no checkpoint is half done.
        let quiet = {
            let meta = image.meta();
            meta.dirty_pages.is_empty() && meta.written.is_empty() && meta.overlay.is_empty() && meta.replayed.is_empty() && !meta.checkpointing
        };
        if quiet && bad.is_empty() {
            let sum: u64 = (0..region.pages()).map(|p| u64::from(pages.count(p))).sum();
            if sum != region.count_sum {
                report.corrupt(format!("the pages of {kind:?} were written {sum} times, the header says {}: a write was lost", region.count_sum));
            }
        }
        Ok(())
    }
}
