// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recovery after a session that did not close (R2): double-write area, replay, checkpoint,
//! header flip. A cut anywhere in it leaves the old header, and recovery starts over.
//!
//! A read-only open does the same in memory and writes nothing.

use crate::bits::{SEGMENT_PAGES, check_range};
use crate::bits_load::check_entries;
use crate::error::{Error, Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind, OwnBuf};
use crate::image::{Image, faulty};
use crate::io::bare;
use crate::replayed::Replayed;
use fvd_format::double_write::Batch;
use fvd_format::journal::{self, CommitId, Extent, RECORD_HEAD, Record, Scan, Scanner};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page;
use fvd_format::{Header, RegionKind};
use std::rc::Rc;

/// Metadata is read in windows of this many bytes where its length comes from the image.
pub(crate) const WINDOW: usize = 256 << 10;

/// A part of the journal that was read: commits follow each other, and one read serves many.
struct Window {
    /// Place of its first unit.
    place: u64,
    units: u64,
    buf: OwnBuf,
    at: usize,
}

impl<H: Host> Queue<H> {
    /// Recovers.
    pub(crate) async fn recover(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let header = image.header();
        self.restore_batch(&header).await?;
        self.load_page_map().await?;
        let scan = self.scan_journal(&header).await?;
        if scan.damaged && !faulty!(image, DamageIsCut) {
            let text = "the journal is damaged: valid units follow a bad one";
            if !image.config.read_only {
                return fail(Kind::Corrupt, format!("{text}; open read-only, or run a check"));
            }
            self.host().log(LogLevel::Warning, &format!("{text}; changes after it are not shown"));
        }
        if header.is_compact() {
            // A page in place may name storage that only a later commit's reach covers: the checkpoint
            // that wrote it was cut short.
            let mut window = None;
            for extent in &scan.commits {
                self.replay(&header, extent, &mut window, |record| image.take_reach(&record)).await?;
            }
            let reach = image.meta().reach;
            if header.has_data_file() {
                self.check_data_file(&header, reach, "the journal may use").await?;
            } else if let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64
                && length < reach
            {
                return fail(Kind::Corrupt, format!("the image file is too short: {length} bytes, the journal says {reach} may be in use"));
            }
        }
        let mut replayed = Replayed::default();
        let mut window = None;
        for extent in &scan.commits {
            self.replay(&header, extent, &mut window, |record| image.take_down(record, &mut replayed)).await?;
        }
        {
            let mut meta = image.meta();
            // A commit's filler units may be lost; nothing is appended to its granule (FMT-56).
            meta.next_seq = scan.next_seq.next_multiple_of((image.granule() / PAGE_SIZE) as u64);
            meta.next_commit = scan.next_commit;
            meta.commits_replayed = scan.commits.len() as u64;
            if !image.config.read_only {
                meta.dirty_pages = replayed.indices();
            }
            meta.replayed = replayed;
        }
        if !scan.commits.is_empty() {
            self.host().log(LogLevel::Info, &format!("{} commits replayed after an unclean shutdown", scan.commits.len()));
        }
        if image.config.read_only {
            return self.look_at_replayed().await;
        }
        if faulty!(image, RecoveryDropsPages) {
            image.meta().dirty_pages.clear();
        }
        // Every touched page in place first; only then does the header let go of the journal.
        let kept = faulty!(image, EpochNotRaised);
        self.checkpoint(|header| header.epoch += u64::from(!kept)).await?;
        let mut meta = image.meta();
        meta.replayed = Replayed::default();
        meta.session = true;
        Ok(())
    }

    /// A page that the journal changes and that is damaged is told of at once, as a writable open does.
    async fn look_at_replayed(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let mut pages = {
            let meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let mut pages = meta.replayed.indices();
            pages.retain(|(kind, page)| header.region(*kind).is_some_and(|region| meta.is_stored(region.map_first + page)));
            pages
        };
        while let Some(first) = pages.pop_first() {
            let rest = pages.split_off(&(first.0, first.1 + SEGMENT_PAGES));
            pages.insert(first);
            self.fetch_pages(&pages).await?;
            image.meta().fetched.clear();
            pages = rest;
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
        let mut spare = None;
        while scanner.units_left() > 0 {
            let place = scanner.place(region.pages());
            let units = scanner.units_left().min(region.pages() - place).min((WINDOW / PAGE_SIZE) as u64);
            let (buf, at) = self.read_next(FileId::Image, region.offset + place * PAGE_SIZE as u64, units * PAGE_SIZE as u64, &mut spare).await?;
            buf.for_each_page(at, units as usize, |_, unit| scanner.feed(unit));
            spare = Some(buf);
        }
        Ok(scanner.finish())
    }

    /// Reads a whole commit, a window at a time, and hands out its records. It was whole when
    /// the journal was scanned; storage that now says otherwise cannot be trusted.
    async fn replay(self: &Rc<Self>, header: &Header, extent: &Extent, window: &mut Option<Window>, mut take: impl FnMut(Record<'_>) -> Result<()>) -> Result<()> {
        let region = *header.region(RegionKind::Journal).expect("image with a journal");
        // A record may lie across the border of two units, or of two windows.
        let (mut payload, mut len) = (Vec::new(), 0);
        let (mut seq, end) = (extent.id.seq, extent.id.seq + extent.units);
        while seq < end {
            let place = seq % region.pages();
            let here = match window.take() {
                Some(window) if (window.place..window.place + window.units).contains(&place) => window,
                other => {
                    let units = (region.pages() - place).min((WINDOW / PAGE_SIZE) as u64);
                    let (offset, mut spare) = (region.offset + place * PAGE_SIZE as u64, other.map(|window| window.buf));
                    let (buf, at) = self.read_next(FileId::Image, offset, units * PAGE_SIZE as u64, &mut spare).await?;
                    Window { place, units, buf, at }
                }
            };
            let skip = place - here.place;
            let units = (end - seq).min(here.units - skip);
            let before = payload.len();
            here.buf.for_each_page(here.at + skip as usize * PAGE_SIZE, units as usize, |i, unit| {
                let unit = journal::decode_unit(&header.uuid, unit).filter(|u| u.seq == seq + i as u64 && u.commit == extent.id.commit);
                payload.extend_from_slice(unit.map_or(&[], |u| u.payload));
            });
            *window = Some(here);
            len += payload.len() - before;
            seq += units;
            let mut rest = &payload[..];
            while rest.len() >= RECORD_HEAD || (seq == end && !rest.is_empty()) {
                let before = rest;
                match Record::decode(&mut rest) {
                    // The rest of a record with values of its own is in the next window.
                    Err(_) if seq < end => {
                        rest = before;
                        break;
                    }
                    record => take(record?)?,
                }
            }
            payload = rest.to_vec();
        }
        if len != extent.len {
            return fail(Kind::Corrupt, "the journal changed while it was read");
        }
        Ok(())
    }
}

impl Image {
    /// The reach that a record says.
    fn take_reach(&self, record: &Record<'_>) -> Result<()> {
        if let Record::Reach(reach) = *record {
            if reach > i64::MAX as u64 {
                return fail(Kind::Corrupt, format!("journal record names reach {reach}"));
            }
            let mut meta = self.meta();
            meta.reach = meta.reach.max(reach);
        }
        Ok(())
    }

    /// Takes down what a record says.
    fn take_down(&self, record: Record<'_>, replayed: &mut Replayed) -> Result<()> {
        let lacks = |what: &str| Error::new(Kind::Corrupt, format!("journal record names a {what} that the image lacks"));
        match record {
            Record::Bits { region: RegionKind::Bitmap, value, first, count } => {
                let bits = self.map.bits.get().ok_or_else(|| lacks("bitmap"))?;
                let end = check_range(first, u64::from(count), bits.len())?;
                replayed.bits.say(first, end, value);
            }
            Record::EntryRun { region: RegionKind::Table, first, count, value, step } => {
                self.map.table.get().ok_or_else(|| lacks("lookup table"))?;
                let end = check_range(first, u64::from(count), self.header().chunks())?;
                self.check_run(value, u64::from(step) * u64::from(count - 1))?;
                replayed.entries.say(first, end, value, step);
            }
            Record::Entries { region: RegionKind::Table, first, values } => {
                self.map.table.get().ok_or_else(|| lacks("lookup table"))?;
                check_range(first, values.len() as u64 / 4, self.header().chunks())?;
                for (entry, value) in (first..).zip(values.chunks_exact(4)) {
                    let value = u32::from_le_bytes(value.try_into().expect("four bytes"));
                    self.check_run(value, 0)?;
                    replayed.entries.say(entry, entry + 1, value, 0);
                }
            }
            Record::Reach(_) if self.map.table.get().is_some() => {}
            record => return fail(Kind::Corrupt, format!("journal record of a kind this image cannot have: {record:?}")),
        }
        let memory = self.config.metadata_memory;
        if replayed.pages() > memory / PAGE_SIZE as u64 || replayed.entries.memory() > memory {
            return fail(Kind::NoMemory, format!("the journal changes metadata of more than {memory} bytes (metadata-memory)"));
        }
        Ok(())
    }

    /// Whether entries `value…value + more` may name storage.
    fn check_run(&self, value: u32, more: u64) -> Result<()> {
        let (below_reach, own) = self.storage_of_chunks();
        check_entries(u64::from(value), u64::from(value) + more, below_reach, &own)
    }
}
