// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recovery after a session that did not close (R2): double-write area, replay, checkpoint,
//! header flip. A cut anywhere in it leaves the old header, and recovery starts over.
//!
//! A read-only open does the same in memory and writes nothing.

use crate::bits::{SEGMENT_PAGES, check_range};
use crate::bits_load::check_entry;
use crate::error::{Error, Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind, OwnBuf};
use crate::image::{Image, faulty};
use crate::io::bare;
use crate::space::chunks_of_regions;
use crate::table::page_of_entry;
use fvd_format::double_write::Batch;
use fvd_format::journal::{self, CommitId, Extent, Record, Scan, Scanner};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_BITS, PAYLOAD_ENTRIES};
use fvd_format::{Header, RegionKind};
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Metadata is read in windows of this many bytes where its length comes from the image.
pub(crate) const WINDOW: usize = 256 << 10;

impl Image {
    /// The reach that a commit says.
    fn replay_reach(&self, payload: &[u8]) -> Result<()> {
        let mut rest = payload;
        while !rest.is_empty() {
            if let Record::Reach(reach) = Record::decode(&mut rest)? {
                if reach > i64::MAX as u64 {
                    return fail(Kind::Corrupt, format!("journal record names reach {reach}"));
                }
                let mut meta = self.meta();
                meta.reach = meta.reach.max(reach);
            }
        }
        Ok(())
    }
}

impl<H: Host> Queue<H> {
    /// Recovers.
    pub(crate) async fn recover(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let header = image.header();
        self.restore_batch(&header).await?;
        self.load_page_map().await?;
        let bad_map_page = image.meta().bad_map_pages.keys().next().copied();
        if let Some(index) = bad_map_page {
            self.journal_damaged(format!("page {index} of the page map is damaged, and recovery would write there"))?;
        }
        let scan = self.scan_journal(&header).await?;
        if scan.damaged {
            self.journal_damaged(format!(
                "the journal is damaged: valid units follow a bad one, unit {} (commit {}), and cannot be applied",
                scan.next_seq, scan.next_commit
            ))?;
        }
        if header.is_compact() {
            // A page in place may name storage that only a later commit's reach covers: the checkpoint
            // that wrote it was cut short.
            for extent in &scan.commits {
                let payload = self.read_commit(&header, extent).await?;
                image.replay_reach(&payload)?;
            }
            let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
            let reach = image.meta().reach;
            if length < reach {
                return fail(Kind::Corrupt, format!("the image file is too short: {length} bytes, the journal says {reach} may be in use"));
            }
        }
        for extent in &scan.commits {
            let payload = self.read_commit(&header, extent).await?;
            self.replay(&payload).await?;
        }
        {
            let mut meta = image.meta();
            // A commit's filler units may be lost; nothing is appended to its granule (FMT-56).
            meta.next_seq = scan.next_seq.next_multiple_of((image.granule() / PAGE_SIZE) as u64);
            meta.next_commit = scan.next_commit;
            meta.commits_replayed = scan.commits.len() as u64;
        }
        if !scan.commits.is_empty() {
            self.host().log(LogLevel::Info, &format!("{} commits replayed after an unclean shutdown", scan.commits.len()));
        }
        if image.config.read_only {
            return Ok(());
        }
        if image.meta().journal_damage.is_some() {
            // Nothing is written before a repair is asked for.
            image.map.no_direct_writes.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        if faulty!(image, RecoveryDropsPages) {
            image.meta().dirty_pages.clear();
        }
        // Every touched page in place first; only then does the header let go of the journal.
        let kept = faulty!(image, EpochNotRaised);
        self.checkpoint(|header| header.epoch += u64::from(!kept)).await?;
        image.meta().session = true;
        Ok(())
    }

    /// Something of the journal cannot be applied: told by a read-only open and one for repair, refused
    /// by others.
    fn journal_damaged(&self, text: String) -> Result<()> {
        let image = self.image();
        if !image.config.read_only && !image.config.repair {
            return fail(Kind::Corrupt, format!("{text}; open read-only, or repair the image"));
        }
        self.host().log(LogLevel::Warning, &format!("{text}; changes after it are not shown"));
        image.meta().journal_damage.get_or_insert(text);
        Ok(())
    }

    /// Loads pages `first..=last` of a region that a record changes. In one that is damaged the record
    /// says what it says, but nothing else is known.
    async fn load_for_replay(self: &Rc<Self>, kind: RegionKind, first: u64, last: u64) -> Result<()> {
        let image = self.image().clone();
        for segment in first / SEGMENT_PAGES..=last / SEGMENT_PAGES {
            self.load_segment(kind, segment).await?;
        }
        for page in first..=last {
            if image.region(kind).is_bad(page) {
                self.journal_damaged(format!("the journal changes page {page} of {kind:?}, which is damaged"))?;
            } else {
                image.meta().dirty_pages.insert((kind, page));
            }
        }
        Ok(())
    }

    /// Writes back the batch in the double-write area, if it counts: every page of it, before any
    /// page is read.
    async fn restore_batch(self: &Rc<Self>, header: &Header) -> Result<()> {
        let image = self.image().clone();
        let area = *header.region(RegionKind::DoubleWrite).expect("image with a journal");
        let (buf, at) = self.read_own(FileId::Image, area.offset, PAGE_SIZE as u64).await?;
        if faulty!(image, BatchNotRestored) {
            return Ok(());
        }
        let Ok(batch) = Batch::decode(&header.uuid, &buf.to_vec(at, PAGE_SIZE)) else { return Ok(()) };
        // A number that no image can reach in its life was not written by us (FMT-12).
        if (batch.number <= header.last_batch && !faulty!(image, BatchNumberIgnored)) || batch.number > u64::MAX / 2 {
            return Ok(());
        }
        let len = (batch.entries.len() * PAGE_SIZE) as u64;
        let (buf, at) = self.read_own(FileId::Image, area.offset + PAGE_SIZE as u64, len).await?;
        let mut pages = Vec::new();
        for (i, entry) in batch.entries.iter().enumerate() {
            let bytes = buf.to_vec(at + i * PAGE_SIZE, PAGE_SIZE);
            let region = header.region(entry.kind).filter(|r| entry.index < r.pages());
            let valid = region.is_some_and(|r| page::open(&header.uuid, entry.kind, r.generation, entry.index, &bytes).is_ok());
            if !valid || page::stored_crc(&bytes) != entry.crc {
                // The area was not complete when the power went: nothing in place was touched.
                return Ok(());
            }
            pages.push((entry.kind, entry.index, bytes));
        }
        if image.config.read_only && faulty!(image, OverlayForgotten) {
            return Ok(());
        }
        if image.config.read_only {
            image.meta().overlay = pages.into_iter().map(|(kind, index, bytes)| ((kind, index), bytes)).collect();
            return Ok(());
        }
        for (kind, index, bytes) in pages {
            let region = header.region(kind).expect("checked above");
            let buf = OwnBuf::from_slice(&bytes);
            self.write_own(FileId::Image, region.offset + index * PAGE_SIZE as u64, buf, PAGE_SIZE as u64).await?;
        }
        if !faulty!(image, RestoreNotSynced) {
            self.sync().await?;
        }
        image.meta().last_batch = batch.number;
        Ok(())
    }

    /// Reads the whole journal, a window at a time, and finds its whole commits: an image must not
    /// make its reader hold 256 MiB.
    async fn scan_journal(self: &Rc<Self>, header: &Header) -> Result<Scan<Extent>> {
        let region = *header.region(RegionKind::Journal).expect("image with a journal");
        let from = CommitId { epoch: header.epoch, seq: header.first_seq, commit: header.first_commit };
        let mut scanner = Scanner::new(&header.uuid, region.pages(), from);
        while scanner.units_left() > 0 {
            let place = scanner.place(region.pages());
            let units = scanner.units_left().min(region.pages() - place).min((WINDOW / PAGE_SIZE) as u64);
            let (buf, at) = self.read_own(FileId::Image, region.offset + place * PAGE_SIZE as u64, units * PAGE_SIZE as u64).await?;
            buf.for_each_page(at, units as usize, |_, unit| scanner.feed(unit));
        }
        Ok(scanner.finish())
    }

    /// Reads the payload of a whole commit, a window at a time. It was whole when the journal was
    /// scanned; storage that now says otherwise cannot be trusted.
    async fn read_commit(self: &Rc<Self>, header: &Header, extent: &Extent) -> Result<Vec<u8>> {
        let region = *header.region(RegionKind::Journal).expect("image with a journal");
        let mut payload = Vec::with_capacity(extent.len);
        let (mut seq, end) = (extent.id.seq, extent.id.seq + extent.units);
        while seq < end {
            let place = seq % region.pages();
            let units = (end - seq).min(region.pages() - place).min((WINDOW / PAGE_SIZE) as u64);
            let (buf, at) = self.read_own(FileId::Image, region.offset + place * PAGE_SIZE as u64, units * PAGE_SIZE as u64).await?;
            buf.for_each_page(at, units as usize, |i, unit| {
                let unit = journal::decode_unit(&header.uuid, unit).filter(|u| u.seq == seq + i as u64 && u.commit == extent.id.commit);
                payload.extend_from_slice(unit.map_or(&[], |u| u.payload));
            });
            seq += units;
        }
        if payload.len() != extent.len {
            return fail(Kind::Corrupt, "the journal changed while it was read");
        }
        Ok(payload)
    }

    /// Applies a commit's records to memory and marks the pages for the checkpoint.
    async fn replay(self: &Rc<Self>, payload: &[u8]) -> Result<()> {
        let image = self.image().clone();
        let mut rest = payload;
        // Neighbours in a journal are neighbours in the bitmap: most records name the page of the last.
        let mut last = None;
        while !rest.is_empty() {
            match Record::decode(&mut rest)? {
                Record::Bits { region: RegionKind::Bitmap, value, first, count } => {
                    let bits = image.map.bits.get().ok_or_else(|| Error::new(Kind::Corrupt, "journal record names a bitmap that the image lacks"))?;
                    let end = check_range(first, u64::from(count), bits.len())?;
                    let pages = (first / PAYLOAD_BITS, (end - 1) / PAYLOAD_BITS);
                    if last != Some(pages) {
                        self.load_for_replay(RegionKind::Bitmap, pages.0, pages.1).await?;
                        last = Some(pages);
                    }
                    bits.write(first, end, value);
                }
                Record::Entries { region: RegionKind::Table, first, values } => {
                    let values = values.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
                    self.replay_entries(first, values.collect::<Vec<_>>()).await?;
                }
                Record::EntryRun { region: RegionKind::Table, first, count, value, step } => {
                    let chunks = image.header().chunks();
                    check_range(first, u64::from(count), chunks)?;
                    let values = (0..u64::from(count)).map(|k| value.wrapping_add(step.wrapping_mul(k as u32)));
                    self.replay_entries(first, values.collect::<Vec<_>>()).await?;
                }
                Record::Reach(_) if image.map.table.get().is_some() => {}
                record => return fail(Kind::Corrupt, format!("journal record of a kind this image cannot have: {record:?}")),
            }
        }
        Ok(())
    }

    /// Applies new values of table entries to memory and marks the pages for the checkpoint.
    async fn replay_entries(self: &Rc<Self>, first: u64, values: Vec<u32>) -> Result<()> {
        let image = self.image().clone();
        let (chunks, below_reach, own) = {
            let meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            (header.chunks(), header.chunks_below(meta.reach), chunks_of_regions(header))
        };
        let count = values.len() as u64;
        let end = first.checked_add(count).filter(|end| *end <= chunks && image.map.table.get().is_some());
        let Some(end) = end else {
            return fail(Kind::Corrupt, format!("journal record names chunks {first}+{count} of {chunks}"));
        };
        let mut loaded = first;
        for (entry, value) in (first..end).zip(values) {
            if entry == loaded {
                loaded = (page_of_entry(entry) + 1) * PAYLOAD_ENTRIES;
                self.load_for_replay(RegionKind::Table, page_of_entry(entry), page_of_entry(entry)).await?;
            }
            check_entry(value, below_reach, &own)?;
            image.region(RegionKind::Table).set_entry(entry, value);
        }
        Ok(())
    }
}
