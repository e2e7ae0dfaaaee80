// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commits: freeze, sync the data, append to the journal, sync the journal (R1, R2).
//!
//! One commit is on its way at a time; flushes that arrive meanwhile share the next. Everything a
//! flush must cover was set in memory before the flush began, so a commit that freezes afterwards
//! covers it.

use crate::bits::set_words;
use crate::changes::Changes;
use crate::error::Result;
use crate::executor::{Job, Queue};
use crate::host::{FileId, Host, LogLevel, OwnBuf};
use crate::image::{Image, Meta, PageId, faulty};
use crate::table::{ENTRY_BITS, page_of_entry};
use fvd_format::journal::{self, CommitId, UNIT_PAYLOAD};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::PAYLOAD_BITS;
use fvd_format::RegionKind;
use std::rc::Rc;

/// Largest write granule that is honoured: bytes.
pub(crate) const GRANULE_MAX: usize = 64 << 10;

impl Meta {
    /// Journal units that the pending changes need.
    pub(crate) fn pending_units(&self) -> u64 {
        if self.pending.is_empty() { 0 } else { journal::units_for(self.pending.bytes()) }
    }

    /// Whether `units` more journal units fit without touching one that still counts.
    fn has_room(&self, units: u64) -> bool {
        let header = self.header.as_ref().expect("open");
        self.next_seq + units <= header.first_seq + header.journal_units()
    }
}

impl Image {
    /// Unit of journal and metadata writes: bytes.
    pub(crate) fn granule(&self) -> usize {
        // Journals are made in multiples of the largest granule (FMT-56).
        (self.limits(FileId::Image).write_granule as usize).clamp(PAGE_SIZE, GRANULE_MAX)
    }
}

/// Who a flush turns out to be.
enum Turn {
    /// It runs the commit.
    Lead,
    /// A commit that began after it is done.
    Shared(Result<()>),
}

impl<H: Host> Queue<H> {
    /// Makes every change that completed before this call durable.
    pub(crate) async fn flush(self: &Rc<Self>) -> Result<()> {
        if self.image().config.read_only {
            return Ok(());
        }
        let image = self.image();
        image.check_poison()?;
        if faulty!(image, FlushFindsNothing) && image.meta().pending.is_empty() && image.meta().committing {
            return Ok(());
        }
        self.commit_metadata().await
    }

    /// Runs, or shares, a commit that freezes after this call.
    pub(crate) async fn commit_metadata(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let need = {
            let meta = image.meta();
            meta.commits_begun + u64::from(!(meta.committing && faulty!(image, FlushSharesRunningCommit)))
        };
        let turn = image
            .commit_wait
            .until(|| {
                let mut meta = image.meta();
                if meta.commits_ok >= need {
                    return Some(Turn::Shared(Ok(())));
                }
                if image.is_poisoned() {
                    drop(meta);
                    return Some(Turn::Shared(image.check_poison()));
                }
                if meta.commits_done >= need {
                    let error = meta.commit_error.clone().expect("a commit that is not ok left an error");
                    return Some(Turn::Shared(Err(error)));
                }
                if meta.committing {
                    return None;
                }
                meta.committing = true;
                Some(Turn::Lead)
            })
            .await;
        let result = match turn {
            Turn::Shared(result) => return result,
            Turn::Lead => self.run_commit().await,
        };
        {
            let mut meta = image.meta();
            meta.committing = false;
            meta.frees_on_way = false;
            meta.commits_done = meta.commits_begun;
            match &result {
                Ok(()) => meta.commits_ok = meta.commits_begun,
                Err(error) => meta.commit_error = Some(error.clone()),
            }
        }
        image.commit_wait.wake_all();
        result
    }

    async fn run_commit(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let mut frozen = {
            let mut meta = image.meta();
            meta.commits_begun += 1;
            meta.commit_queued = false;
            meta.frees_on_way = !meta.pending.freed.is_empty();
            std::mem::take(&mut meta.pending)
        };
        // The set is frozen; whatever it exposes was written before, so this sync covers it. What only
        // fills fresh space needs none of its own: without it the guest finds the zeroes of before (R6),
        // and the sync of the journal makes it durable – not in a data file.
        let two_files = image.data_file() == FileId::Data && !faulty!(image, OneSyncForTwoFiles);
        let data_first = (frozen.data_first || two_files) && !faulty!(image, NoDataSync);
        if frozen.is_empty() || data_first {
            if faulty!(image, DataFileNotSynced) { self.sync().await? } else { self.sync_data().await? }
        }
        if faulty!(image, FreezeAfterSync) {
            let more = std::mem::take(&mut image.meta().pending);
            frozen.take_back(more);
        }
        let most = self.commit_most();
        while !frozen.is_empty() {
            let rest = frozen.split(most);
            image.meta().frozen = frozen;
            if let Err(error) = self.append_frozen().await {
                // Memory keeps what was set; the next commit retries at the same place.
                let mut meta = image.meta();
                let failed = std::mem::take(&mut meta.frozen);
                if faulty!(image, RetryBehind) {
                    meta.next_seq += 1;
                }
                if faulty!(image, FailedCommitForgotten) {
                    return Err(error);
                }
                meta.pending.take_back(failed);
                rest.into_iter().for_each(|rest| meta.pending.take_back(rest));
                return Err(error);
            }
            let Some(rest) = rest else {
                frozen = Changes { freed: std::mem::take(&mut image.meta().frozen.freed), ..Changes::default() };
                break;
            };
            frozen = rest;
        }
        self.release_chunks(frozen.freed);
        Ok(())
    }

    /// Most bytes of records in a commit: a quarter of the journal.
    fn commit_most(&self) -> usize {
        let units = self.image().meta().header.as_ref().expect("open").journal_units() as usize / 4;
        units * UNIT_PAYLOAD
    }

    /// Appends the frozen set, syncs, and makes it the stable state.
    async fn append_frozen(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        self.ensure_session().await?;
        let granule = image.granule();
        let payload = image.meta().frozen.encode();
        let units = (journal::units_for(payload.len()) * PAGE_SIZE as u64).next_multiple_of(granule as u64) / PAGE_SIZE as u64;
        self.wait_for_journal(units).await?;
        let (uuid, id, region) = {
            let meta = image.meta();
            let header = meta.header.as_ref().expect("open");
            let id = CommitId { epoch: header.epoch, seq: meta.next_seq, commit: meta.next_commit };
            (header.uuid, id, *header.region(RegionKind::Journal).expect("image with a journal"))
        };
        let bytes = journal::encode_commit(&uuid, id, &payload, granule);
        assert_eq!(bytes.len() as u64, units * PAGE_SIZE as u64);
        // Unit n lies at place n mod units: the commit may wrap.
        let place = id.seq % region.pages();
        let before_wrap = ((region.pages() - place) * PAGE_SIZE as u64).min(bytes.len() as u64) as usize;
        for (offset, part) in [(place * PAGE_SIZE as u64, &bytes[..before_wrap]), (0, &bytes[before_wrap..])] {
            if !part.is_empty() {
                self.write_own(FileId::Image, region.offset + offset, OwnBuf::from_slice(part), part.len() as u64).await?;
            }
        }
        if !faulty!(image, NoJournalSync) {
            self.sync().await?;
        }
        let start_checkpoint = {
            let mut meta = image.meta();
            meta.next_seq += if faulty!(image, PaddingForgotten) { journal::units_for(payload.len()) } else { units };
            meta.next_commit += u64::from(!faulty!(image, CommitNumberKept));
            meta.stats.commits += 1;
            meta.stats.journal_bytes += bytes.len() as u64;
            meta.make_frozen_stable(&image);
            let used = meta.next_seq - meta.header.as_ref().expect("open").first_seq;
            // A half is full: it is written back while commits go to the other one.
            let most = match image.config.checkpoint_after {
                0 => region.pages() / 2,
                units => units.min(region.pages()),
            };
            used >= most && !std::mem::replace(&mut meta.checkpointing, true)
        };
        if start_checkpoint {
            self.spawn(Job::Checkpoint);
        }
        Ok(())
    }

    /// Waits until `units` more units fit without touching one that still counts.
    async fn wait_for_journal(self: &Rc<Self>, units: u64) -> Result<()> {
        let image = self.image().clone();
        let mut waited = false;
        loop {
            let start = {
                let mut meta = image.meta();
                if meta.has_room(units) {
                    return Ok(());
                }
                if waited && let Some(error) = meta.checkpoint_error.take() {
                    return Err(error);
                }
                meta.stats.flush_waits += 1;
                !std::mem::replace(&mut meta.checkpointing, true)
            };
            if start {
                self.spawn(Job::Checkpoint);
            }
            let too_early = || faulty!(image, JournalReusedEarly) && image.meta().has_room(units);
            image.checkpoint_wait.until(|| (!image.meta().checkpointing || image.is_poisoned() || too_early()).then_some(())).await;
            image.check_poison()?;
            waited = true;
        }
    }

    /// Clears the clean mark and raises the epoch, once a session, before its first append (R2).
    pub(crate) async fn ensure_session(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        // A commit and a repair may both be the first.
        let _one_at_a_time = image.session_lock.lock().await;
        if image.meta().session {
            return Ok(());
        }
        let units = (image.granule() / PAGE_SIZE) as u64;
        let (seq, commit) = {
            let mut meta = image.meta();
            // The image may come from storage with a smaller granule.
            meta.next_seq = meta.next_seq.next_multiple_of(units);
            (meta.next_seq, meta.next_commit)
        };
        self.update_header(|header| {
            header.clean &= faulty!(image, CleanMarkKept);
            header.epoch += u64::from(!faulty!(image, EpochNotRaised));
            header.first_seq = seq;
            header.first_commit = commit;
        })
        .await?;
        image.meta().session = true;
        Ok(())
    }

    /// Runs a commit in the background: nobody waits for its result, the next flush sees it.
    pub(crate) async fn background_commit(self: &Rc<Self>) {
        if let Err(error) = self.commit_metadata().await {
            self.host().log(LogLevel::Error, &error.context("background commit").text);
            // What stays uncommitted stays bounded in time: again after the interval.
            let image = self.image();
            let arm = {
                let mut meta = image.meta();
                let wanted = meta.pending.is_due() && !image.is_poisoned();
                wanted.then(|| meta.arm_timer(self.host().now_ns(), image.config.commit_interval_ns)).flatten()
            };
            if let Some(at) = arm {
                self.host().set_timer(at);
            }
        }
    }
}

impl Meta {
    /// The frozen set became stable: the stable images say so, and the pages await a checkpoint.
    /// Freed chunks stay, for who releases them.
    pub(crate) fn make_frozen_stable(&mut self, image: &Image) {
        let frozen = std::mem::take(&mut self.frozen);
        let mut pages: Vec<PageId> = Vec::new();
        let set = frozen.bits.into_iter().map(|run| (run, true));
        for ((start, end), value) in set.chain(frozen.cleared.into_iter().map(|run| (run, false))) {
            for page in start / PAYLOAD_BITS..=(end - 1) / PAYLOAD_BITS {
                let from = page * PAYLOAD_BITS;
                let id = (RegionKind::Bitmap, page);
                let words = self.stable_words(image, id);
                set_words(words, start.max(from) - from, end.min(from + PAYLOAD_BITS) - from, value);
                pages.push(id);
            }
        }
        for (chunk, value) in frozen.entries {
            let id = (RegionKind::Table, page_of_entry(chunk));
            let words = self.stable_words(image, id);
            let bit = chunk * ENTRY_BITS % PAYLOAD_BITS;
            let (word, shift) = ((bit / 64) as usize, bit % 64);
            words[word] = words[word] & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
            pages.push(id);
        }
        pages.dedup();
        for id in pages {
            self.dirty_pages.insert(id);
            if self.stable.get(&id).is_some_and(|words| *words == image.region(id.0).page_words(id.1)) {
                self.stable.remove(&id);
            }
        }
        self.reach = self.reach.max(frozen.reach.unwrap_or(0));
        self.frozen.freed = frozen.freed;
    }

    /// Keeps the stable image of a page, from before the first change that is not stable.
    pub(crate) fn keep_stable(&mut self, image: &Image, id: PageId) {
        self.stable_words(image, id);
    }

    /// The stable image of a page. Where none is kept, memory is what is stable: all changes since
    /// took each other back.
    fn stable_words(&mut self, image: &Image, id: PageId) -> &mut [u64] {
        self.stable.entry(id).or_insert_with(|| image.region(id.0).page_words(id.1))
    }

    /// What completed commits say of entry `chunk` of the table.
    pub(crate) fn stable_entry(&self, image: &Image, chunk: u64) -> u32 {
        match self.stable.get(&(RegionKind::Table, page_of_entry(chunk))) {
            Some(words) => {
                let bit = chunk * ENTRY_BITS % PAYLOAD_BITS;
                (words[(bit / 64) as usize] >> (bit % 64)) as u32
            }
            None => image.region(RegionKind::Table).entry(chunk),
        }
    }
}
