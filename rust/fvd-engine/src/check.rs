// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checking an open image: header copies, every stored page, sums of write counts, what the
//! lookup table names, the end of the file. What is wrong is told and put into a plan, which
//! `repair.rs` carries out.

use crate::bits::SEGMENT_PAGES;
use crate::bits_load::check_entries;
use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel, OpKind};
use crate::image::{BadPage, PageId, faulty};
use crate::io::{bare, ceil};
use crate::request::{CheckReport, Repair};
use crate::space::chunks_of_regions;
use crate::table::{ENTRY_BITS, EntryRun, page_of_entry};
use bitvec::prelude::*;
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_ENTRIES};
use fvd_format::{Header, Region, RegionKind};
use std::rc::Rc;

/// What there is to repair.
#[derive(Default)]
pub(crate) struct Plan {
    /// Damaged structures that writing pages again repairs.
    pub(crate) in_pages: u64,
    /// Pages that cannot be used. What memory has of them is all that is known.
    pub(crate) pages: Vec<PageId>,
    /// Guest chunks whose entry names no storage for data.
    pub(crate) entries: Vec<u64>,
    /// Regions with something behind their last bit or entry.
    pub(crate) tails: Vec<RegionKind>,
    /// Damaged structures that giving guest chunks storage of their own repairs.
    pub(crate) in_doubles: u64,
    /// Guest chunks, and the storage chunk each of them shares with another.
    pub(crate) doubles: Vec<(u64, u64)>,
}

/// What people call a region.
fn name(kind: RegionKind) -> &'static str {
    match kind {
        RegionKind::Table => "lookup table",
        _ => "bitmap",
    }
}

impl<H: Host> Queue<H> {
    /// Checks the image. Damage is reported, not an error.
    pub(crate) async fn check(self: &Rc<Self>, repair: Repair) -> Result<CheckReport> {
        let image = self.image().clone();
        let read_only = image.config.read_only;
        if repair != Repair::None {
            self.check_may_repair()?;
        }
        let mut report = CheckReport::default();
        // Regions do not move while they are compared with the header.
        let _layout = image.layout_lock.lock().await;
        // A repair copies chunks and changes entries: no request does meanwhile.
        let _all = if repair == Repair::All { Some(image.ranges.lock(0, u64::MAX).await) } else { None };
        let _serial = if repair == Repair::All { Some(self.serialise_writes().await) } else { None };
        let mended = if repair == Repair::None { None } else { image.meta().mended_copy.take() };
        if let Some(copy) = mended {
            report.corrupt(format!("header copy {copy} was damaged; the open wrote it again from the other"));
            report.fixed(1);
        }
        // First: the next header update begins with one copy, and the other must be good by then.
        if !faulty!(image, WrongCopyLater) {
            self.check_headers(repair, &mut report).await?;
        }
        if !read_only {
            // What is compared with the file must be in the file.
            self.commit_metadata().await?;
            if repair == Repair::All && image.meta().session {
                // Sums of write counts are right only at rest.
                self.settle_pages().await?;
            }
        }
        let header = image.header();
        let mut plan = Plan::default();
        if header.region(RegionKind::Bitmap).is_some() {
            self.check_bitmap(&header, &mut report, &mut plan).await?;
        }
        if header.is_compact() {
            self.check_table(&header, &mut report, &mut plan).await?;
        }
        if repair == Repair::All {
            let repaired = self.repair(plan, &mut report).await;
            // Nobody goes on with what a shared chunk's entry said before.
            image.narrow().await;
            if repaired.is_err() {
                // What was lost can be told only now.
                report.findings.iter().for_each(|text| self.host().log(LogLevel::Error, text));
            }
            repaired?;
        }
        if faulty!(image, WrongCopyLater) {
            self.check_headers(repair, &mut report).await?;
        }
        self.check_end(repair, &mut report).await?;
        Ok(report)
    }

    async fn check_headers(self: &Rc<Self>, repair: Repair, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        let _steady = image.header_lock.lock().await;
        if !image.config.read_only {
            // An update that failed may have reached the file.
            image.check_poison()?;
        }
        let header = image.header();
        for copy in [1, 2] {
            let before = report.corruptions;
            let bytes = self.read_own(FileId::Image, HEADER_OFFSETS[copy - 1], PAGE_SIZE as u64).await?.0.to_vec(0, PAGE_SIZE);
            match Header::decode(&header.uuid, copy, &bytes) {
                Ok(found) if found == header => {}
                // The last update was cut short after its first copy, which counts; only a writable open
                // makes both agree again.
                Ok(found) if image.config.read_only && found.generation + 1 == header.generation => {}
                Ok(found) if found.generation == header.generation => report.corrupt(format!("header copy {copy} differs from the one that counts")),
                Ok(found) => report.corrupt(format!("header copy {copy}: generation {} instead of {}", found.generation, header.generation)),
                // Torn by the cut that ended the session, perhaps; the next writable open mends it.
                Err(error) if image.config.read_only && !header.clean => report.note(format!("{error}; the other copy counts")),
                Err(error) => report.corrupt(error.to_string()),
            }
            if repair == Repair::All && report.corruptions > before {
                self.write_surely(HEADER_OFFSETS[copy - 1], &header.encode(copy)).await?;
                self.sync().await?;
                report.fixed(1);
            }
        }
        let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        if length < header.file_length_min() {
            report.corrupt(format!("the file has {length} bytes, {} are needed: what lay behind is lost", header.file_length_min()));
        }
        let trouble = image.meta().data_file_trouble.clone();
        if let Some(text) = trouble {
            report.corrupt(format!("{text}; what it held is lost, or cannot be reached"));
        } else if header.has_data_file() {
            let length = self.op(bare(OpKind::GetLength, FileId::Data, 0, 0)).await? as u64;
            if length < header.data_length_min() {
                report.corrupt(format!("the data file '{}' has {length} bytes, {} are needed: what lay behind is lost", header.data_name, header.data_length_min()));
            }
        }
        Ok(())
    }

    async fn check_bitmap(self: &Rc<Self>, header: &Header, report: &mut CheckReport, plan: &mut Plan) -> Result<()> {
        let image = self.image().clone();
        let region = *header.region(RegionKind::Bitmap).expect("checked by the caller");
        report.blocks_total = header.blocks();
        self.check_pages(RegionKind::Bitmap, &region, report, plan).await?;
        let last = region.pages() - 1;
        let tail = header.blocks() - last * page::PAYLOAD_BITS;
        if let Some(extra) = image.bits().page_words(last).view_bits::<Lsb0>()[tail as usize..].first_one() {
            report.corrupt(format!("the bitmap has a bit past its last block: {}", header.blocks() + extra as u64));
            plan.in_pages += 1;
            plan.tails.push(RegionKind::Bitmap);
        }
        report.blocks_present = image.bits().count_ones();
        Ok(())
    }

    /// Every storage chunk belongs to one guest chunk at most, and to no region (FMT-76, FMT-77).
    async fn check_table(self: &Rc<Self>, header: &Header, report: &mut CheckReport, plan: &mut Plan) -> Result<()> {
        let image = self.image().clone();
        let region = *header.region(RegionKind::Table).expect("compact image");
        report.chunks_total = header.chunks();
        self.check_pages(RegionKind::Table, &region, report, plan).await?;
        let table = image.region(RegionKind::Table);
        let last = page_of_entry(header.chunks().max(1) - 1);
        let words = table.page_words(last);
        let used = (header.chunks() - last * PAYLOAD_ENTRIES) as usize;
        let entries = words.iter().flat_map(|w| [*w as u32, (*w >> ENTRY_BITS) as u32]);
        if let Some(extra) = entries.skip(used).position(|entry| entry != 0) {
            report.corrupt(format!("the lookup table has an entry past its last chunk: {}", header.chunks() + extra as u64));
            plan.in_pages += 1;
            plan.tails.push(RegionKind::Table);
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
                EntryRun::Bad => {
                    let end = ((page_of_entry(at) + 1) * PAYLOAD_ENTRIES).min(header.chunks());
                    self.check_bad_entries(header, at..end, &mut runs, report, plan);
                    end - at
                }
                EntryRun::Missing(_) => unreachable!("loaded above"),
            };
        }
        runs.sort_unstable();
        let mut end = (0, 0);
        for (start, stop, guest) in runs {
            if start < end.0 {
                report.corrupt(format!("storage chunk {start} of guest chunk {guest} belongs to guest chunk {} too", end.1));
                plan.in_doubles += 1;
                plan.doubles.extend((start..stop.min(end.0)).map(|id| (guest + (id - start), id)));
            }
            end = end.max((stop, guest));
        }
        Ok(())
    }

    /// Entries of a page that cannot be used: of one whose bytes are right, all but those that name no
    /// storage for data are good.
    fn check_bad_entries(self: &Rc<Self>, header: &Header, chunks: std::ops::Range<u64>, runs: &mut Vec<(u64, u64, u64)>, report: &mut CheckReport, plan: &mut Plan) {
        let image = self.image();
        let id = (RegionKind::Table, page_of_entry(chunks.start));
        let below_reach = {
            let meta = image.meta();
            if meta.bad_pages.get(&id) != Some(&BadPage::Entries) {
                return;
            }
            header.chunks_below(meta.reach)
        };
        let own = chunks_of_regions(header);
        let table = image.region(RegionKind::Table);
        let size = u64::from(header.chunk_size);
        for chunk in chunks {
            let entry = table.entry(chunk);
            if entry == 0 {
                continue;
            }
            let storage = u64::from(entry) - 1;
            if check_entries(u64::from(entry), u64::from(entry), below_reach, &own).is_ok() && !faulty!(image, RepairDropsGoodEntries) {
                report.chunks_allocated += 1;
                runs.push((storage, storage + 1, chunk));
                continue;
            }
            let why = if storage < below_reach { "where metadata lies" } else { "beyond what the file was ever written up to" };
            let (start, end) = (chunk * size, ((chunk + 1) * size).min(header.virtual_size));
            report.corrupt(format!("guest chunk {chunk} (bytes {start}–{end}) names storage chunk {storage}, {why}"));
            report.lose(start, end);
            plan.in_pages += 1;
            plan.entries.push(chunk);
        }
    }

    /// Reads every stored page of a region and compares the sum of write counts.
    async fn check_pages(self: &Rc<Self>, kind: RegionKind, region: &Region, report: &mut CheckReport, plan: &mut Plan) -> Result<()> {
        let image = self.image().clone();
        for segment in 0..region.pages().div_ceil(SEGMENT_PAGES) {
            self.load_segment(kind, segment).await?;
        }
        let pages = image.region(kind);
        let header = image.header();
        let bad: Vec<u64> = (0..region.pages()).filter(|&p| pages.is_bad(p)).collect();
        for &index in &bad {
            plan.pages.push((kind, index));
            if image.meta().bad_pages.get(&(kind, index)) == Some(&BadPage::Entries) {
                // Told entry by entry.
                continue;
            }
            let (start, end) = guest_bytes(&header, kind, index);
            let then = if kind == RegionKind::Bitmap { "are in the base or in this image, and are to read as the base" } else { "have storage, and are to read as having none" };
            report.corrupt(format!("{} page {index} is damaged: nobody can tell which of guest bytes {start}–{end} {then}", name(kind)));
            report.lose(start, end);
            plan.in_pages += 1;
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
                let text = format!("the pages of the {} were written {sum} times, the header says {}: a write was lost, and what it said", name(kind), region.count_sum);
                report.corrupt(text);
                plan.in_pages += 1;
            }
        }
        Ok(())
    }

    /// What lies behind the last byte in use of a file is a leak, where it is as long as we made it.
    async fn check_end(self: &Rc<Self>, repair: Repair, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        // Nobody opens a growth step meanwhile.
        let _space = image.space_lock.lock().await;
        if repair != Repair::None {
            // The reach of a step whose commit failed may be in one that is on its way now.
            self.commit_metadata().await?;
        }
        let (header, reach) = {
            let meta = image.meta();
            let reach = [Some(meta.reach), meta.pending.reach, meta.frozen.reach].into_iter().flatten().max();
            (meta.header.clone().expect("open image"), if faulty!(image, EndCutTooEarly) { 0 } else { reach.unwrap_or(0) })
        };
        if header.has_data_file() {
            report.image_end = header.file_length_min();
            self.check_end_of(FileId::Image, ceil(report.image_end, PAGE_SIZE as u64), repair, report).await?;
            if image.meta().data_file_trouble.is_some() {
                return Ok(());
            }
            let end = ceil(header.data_length_min().max(reach), image.data_end_unit());
            return self.check_end_of(FileId::Data, end, repair, report).await;
        }
        report.image_end = header.file_length_min().max(reach);
        self.check_end_of(FileId::Image, ceil(report.image_end, PAGE_SIZE as u64), repair, report).await
    }

    /// The same for one file, which ends at `end`.
    async fn check_end_of(self: &Rc<Self>, file: FileId, end: u64, repair: Repair, report: &mut CheckReport) -> Result<()> {
        let image = self.image().clone();
        let length = self.op(bare(OpKind::GetLength, file, 0, 0)).await? as u64;
        if length <= end || !image.limits(file).grows_zeroed {
            return Ok(());
        }
        if repair == Repair::None {
            report.leaked += length - end;
            return Ok(());
        }
        if let Err(error) = self.op(bare(OpKind::Truncate, file, end, 0)).await {
            report.leaked += length - end;
            report.note(format!("the file cannot be cut: {}", error.text));
            return Ok(());
        }
        self.sync_file(file).await?;
        report.leaked_fixed += length - end;
        Ok(())
    }
}

/// The guest bytes that page `index` of a region speaks of.
fn guest_bytes(header: &Header, kind: RegionKind, index: u64) -> (u64, u64) {
    let (unit, per_page, most) = match kind {
        RegionKind::Table => (u64::from(header.chunk_size), PAYLOAD_ENTRIES, header.virtual_size),
        _ => (u64::from(header.block_size), page::PAYLOAD_BITS, header.covered),
    };
    let at = |page: u64| page.saturating_mul(per_page).saturating_mul(unit).min(most);
    (at(index), at(index + 1))
}
