// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storage of compact images: which chunks are free, and where the next ones come from (R4, R6).
//!
//! Nothing on disk lists free chunks: a chunk below the reach is free unless the table or a region
//! uses it (FMT-78). The table is looked through once a session, before the first change.
//!
//! Chunks are handed out from one run at a time, so that neighbours stay neighbours. A run comes from
//! chunks that were freed, else from a new growth step. It is *fresh* if it reads as zero, stable,
//! and nothing was written there: then what a write puts in it needs no sync of its own before the
//! record that exposes it. A chunk that is not fresh is zeroed when it is handed out.

use crate::bits::SEGMENT_BITS;
use crate::changes::{Runs, add_run};
use crate::error::{Error, Kind, Result};
use crate::executor::{Job, Queue, fail};
use crate::host::{Host, LogLevel, OpKind};
use crate::image::{Image, Meta, faulty};
use crate::io::{bare, ceil};
use crate::table::{ENTRY_BITS, EntryRun};
use fvd_format::limits::{CHUNKS_MAX, PAGE_SIZE};
use fvd_format::Header;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// Freed runs of at least so many chunks are zeroed and synced at once, so that they are fresh;
/// shorter ones are not worth a sync.
const FRESH_RUN_MIN: u64 = 16;

/// The next step is opened when less than one part in so many of a step is left.
const LOW_WATER: u64 = 4;

/// Chunks handed out: nobody else has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The first storage chunk.
    pub(crate) id: u64,
    /// How many.
    pub(crate) count: u64,
    /// They read as zero, stable.
    pub(crate) fresh: bool,
}

/// Free storage.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Chunks that nothing uses: start → end.
    free: Runs,
    /// The same, with storage that is still to be given back to the host.
    unpunched: Runs,
    /// The run that is being given back.
    punching: bool,
    /// Where the next chunks come from.
    current: (u64, u64),
    current_fresh: bool,
    /// A growth step opened ahead of need, and whether it is fresh.
    next: Option<(u64, u64, bool)>,
    /// One is being opened.
    ahead: bool,
    /// A step could not be opened ahead of need: no further attempt until one succeeds or the host has news.
    stuck: bool,
    /// What the host was told last of storage that runs low: its length, and the news counted by then.
    told: Option<(u64, u64)>,
    /// Storage chunks below the reach.
    end: u64,
}

impl Space {
    /// Chunks below `end` that are not in `used`, which is sorted.
    pub(crate) fn new(end: u64, used: &[(u64, u64)]) -> Self {
        let mut free = Runs::new();
        let mut at = 0;
        for &(start, stop) in used.iter().chain([&(end, end)]) {
            if at < start {
                free.insert(at, start.min(end));
            }
            at = at.max(stop);
        }
        Self { free, end, ..Self::default() }
    }

    /// Hands out at most `most` chunks of the current run.
    fn take(&mut self, most: u64) -> Option<Taken> {
        let (start, end) = self.current;
        let count = most.min(end - start);
        self.current.0 += count;
        (count > 0).then_some(Taken { id: start, count, fresh: self.current_fresh })
    }

    /// Chunks left of the current run.
    fn left(&self) -> u64 {
        self.current.1 - self.current.0
    }

    /// Whether what can be handed out at once is less than a quarter of a step of `unit` chunks, and less
    /// than a disk of `chunks` chunks can still need.
    fn runs_low(&self, unit: u64, chunks: u64) -> bool {
        let used = self.end - self.free_chunks();
        let quiet = self.next.is_none() && self.free.is_empty() && self.unpunched.is_empty() && !self.punching;
        quiet && self.left() * LOW_WATER < unit && used + self.left() < chunks
    }

    /// Hands out exactly `count` chunks one behind the other, of freed ones.
    fn take_whole(&mut self, count: u64) -> Option<u64> {
        let runs = [&mut self.free, &mut self.unpunched];
        for runs in runs {
            if let Some((&start, &end)) = runs.iter().find(|(start, end)| *end - *start >= count) {
                runs.remove(&start);
                if start + count < end {
                    runs.insert(start + count, end);
                }
                return Some(start);
            }
        }
        None
    }

    /// The freed run with the lowest number.
    fn take_run(&mut self) -> Option<(u64, u64)> {
        let runs = if self.free.is_empty() { &mut self.unpunched } else { &mut self.free };
        runs.pop_first()
    }

    /// Chunks that nothing uses any more.
    pub(crate) fn release(&mut self, runs: Runs) {
        for (start, end) in runs {
            add_run(&mut self.unpunched, start, end);
        }
    }

    /// Chunks that were handed out and not used: something may have been written there.
    pub(crate) fn give_back(&mut self, taken: Taken) {
        add_run(&mut self.free, taken.id, taken.id + taken.count);
    }

    /// Number of chunks that are neither used nor wait for a commit.
    pub(crate) fn free_chunks(&self) -> u64 {
        let runs = self.free.iter().chain(&self.unpunched).map(|(start, end)| end - start).sum::<u64>();
        runs + self.left() + self.next.map_or(0, |(start, end, _)| end - start)
    }
}

/// Storage chunks that regions of `header` overlap: runs.
pub(crate) fn chunks_of_regions(header: &Header) -> Vec<(u64, u64)> {
    if header.has_data_file() {
        return Vec::new();
    }
    let size = u64::from(header.chunk_size);
    let inside = header.regions.iter().flatten().filter(|r| r.offset >= header.data_offset);
    inside.map(|r| ((r.offset - header.data_offset) / size, (r.end() - header.data_offset).div_ceil(size))).collect()
}

impl Meta {
    /// Whether the next growth step should be opened ahead of need: freed chunks come before new storage.
    fn runs_low(&self) -> bool {
        let header = self.header.as_ref().expect("open image");
        let unit = header.storage_grow_unit / u64::from(header.chunk_size);
        !self.frees_wait() && self.space.as_ref().is_some_and(|space| space.runs_low(unit, header.chunks()))
    }

    /// Whether chunks wait for a commit to be free.
    fn frees_wait(&self) -> bool {
        !self.pending.freed.is_empty() || self.frees_on_way
    }
}

impl Image {
    /// The host made its storage longer: whoever waits for storage looks again, and the host is told
    /// again if that was not enough. Or, with `grew` false, it could not: whoever waits fails with
    /// `NoSpace`. From any thread.
    pub fn space_changed(&self, grew: bool) {
        if !grew {
            self.space_refusals.fetch_add(1, Ordering::AcqRel);
        }
        self.space_news.fetch_add(1, Ordering::AcqRel);
        if let Some(space) = &mut self.meta().space {
            space.stuck = false;
        }
        if !faulty!(self, NewsWakeNobody) {
            self.space_wait.wake_all();
        }
    }

    /// Whether writes that find no storage wait for [`Image::space_changed`]; if not, those that wait
    /// now fail with `NoSpace`, too. From any thread.
    pub fn set_wait_for_space(&self, wait: bool) {
        self.wait_for_space.store(wait, Ordering::Release);
        self.space_news.fetch_add(1, Ordering::AcqRel);
        self.space_wait.wake_all();
    }

    /// How often the host had news of its storage.
    pub(crate) fn space_news(&self) -> u64 {
        self.space_news.load(Ordering::Acquire)
    }

    /// How often the host refused storage.
    pub(crate) fn space_refusals(&self) -> u64 {
        self.space_refusals.load(Ordering::Acquire)
    }

    /// Whether a write that finds no storage is to wait for some.
    pub(crate) fn waits_for_space(&self) -> bool {
        self.wait_for_space.load(Ordering::Acquire) && self.is_open() && !self.is_poisoned()
    }

    /// Chunks that were handed out for metadata and are not used.
    pub(crate) fn give_back_chunks(&self, start: u64, end: u64) {
        if let Some(space) = &mut self.meta().space {
            space.give_back(Taken { id: start, count: end - start, fresh: false });
        }
        self.space_wait.wake_all();
    }

    /// Storage chunks below the reach.
    pub(crate) fn chunks_below_reach(&self) -> u64 {
        let meta = self.meta();
        let header = meta.header.as_ref().expect("open image");
        header.chunks_below(meta.reach).min(CHUNKS_MAX - 1)
    }
}

impl<H: Host> Queue<H> {
    /// Looks for free chunks, once a session. Called before the first entry of it changes.
    pub(crate) async fn ensure_space(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        if image.meta().space.is_some() {
            return Ok(());
        }
        let _one_at_a_time = image.space_lock.lock().await;
        if image.meta().space.is_some() {
            return Ok(());
        }
        let header = image.header();
        let mut used = if faulty!(image, ScanForgetsRegions) { Vec::new() } else { chunks_of_regions(&header) };
        let mut at = 0;
        while at < header.chunks() {
            let end = (at / (SEGMENT_BITS / ENTRY_BITS) + 1).saturating_mul(SEGMENT_BITS / ENTRY_BITS).min(header.chunks());
            match self.entries_of(at, end).await? {
                EntryRun::Chunks { id, count } => {
                    used.push((id, id + count));
                    at += count;
                }
                EntryRun::Free { count } => at += count,
                other => unreachable!("loaded: {other:?}"),
            }
        }
        used.sort_unstable();
        let space = Space::new(image.chunks_below_reach(), &used);
        image.meta().space = Some(space);
        Ok(())
    }

    /// As [`Queue::allocate`], and waits for the host to add storage, if it is to. The caller has locked
    /// the range of a guest's request, and nothing else (CC-66).
    pub(crate) async fn allocate_for_guest(self: &Rc<Self>, most: u64) -> Result<Taken> {
        loop {
            // Before the look: news that come while it looks must not be missed.
            let (news, refusals) = (self.image().space_news(), self.image().space_refusals());
            match self.allocate(most).await {
                Err(error) if error.kind == Kind::NoSpace => self.wait_for_space(news, refusals, error).await?,
                result => return result,
            }
        }
    }

    /// Hands out 1…`most` storage chunks that lie one behind the other.
    pub(crate) async fn allocate(self: &Rc<Self>, most: u64) -> Result<Taken> {
        loop {
            self.ensure_space().await?;
            let taken = self.image().meta().space.as_mut().expect("looked for").take(most);
            match taken {
                Some(taken) => {
                    self.look_ahead();
                    return Ok(taken);
                }
                None => self.supply(most).await?,
            }
        }
    }

    /// Waits until the host has news of its storage since `news`, or chunks become free. `error` if
    /// nobody is to wait, the host refused since `refusals`, or was not told what is missing.
    async fn wait_for_space(self: &Rc<Self>, news: u64, refusals: u64, error: Error) -> Result<()> {
        let image = self.image();
        let news = if faulty!(image, NewsMissed) { image.space_news() } else { news };
        let look = || {
            let told = {
                let meta = image.meta();
                // Nobody looked for space yet if that is what failed.
                let Some(space) = &meta.space else { return Some(Err(error.clone())) };
                if !space.free.is_empty() || !space.unpunched.is_empty() {
                    return Some(Ok(()));
                }
                space.told.is_some_and(|(_, then)| then >= news)
            };
            if !image.waits_for_space() || image.space_refusals() != refusals {
                return Some(Err(error.clone()));
            }
            if image.space_news() != news {
                return Some(Ok(()));
            }
            (!told).then(|| Err(error.clone()))
        };
        image.space_wait.until(look).await
    }

    /// Hands out exactly `count` chunks one behind the other, for metadata; they are zeroed by who
    /// takes them.
    pub(crate) async fn allocate_whole(self: &Rc<Self>, count: u64) -> Result<u64> {
        self.ensure_space().await?;
        let image = self.image().clone();
        let _one_at_a_time = image.space_lock.lock().await;
        let found = {
            let mut meta = image.meta();
            let space = meta.space.as_mut().expect("looked for");
            space.take_whole(count).or_else(|| {
                let (start, end, _) = space.next.take()?;
                space.give_back(Taken { id: start, count: end - start, fresh: false });
                space.take_whole(count)
            })
        };
        match found {
            Some(id) => Ok(id),
            None => {
                let (start, end, _) = self.open_step(count, false).await?;
                if end - start < count {
                    image.meta().space.as_mut().expect("looked for").give_back(Taken { id: start, count: end - start, fresh: false });
                    return fail(Kind::NoSpace, format!("no {count} chunks in a row are free for metadata"));
                }
                if start + count < end {
                    image.meta().space.as_mut().expect("looked for").give_back(Taken { id: start + count, count: end - start - count, fresh: false });
                }
                Ok(start)
            }
        }
    }

    /// Finds the next run to hand out chunks from.
    async fn supply(self: &Rc<Self>, want: u64) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.space_lock.lock().await;
        loop {
            image.check_poison()?;
            let run = {
                let mut meta = image.meta();
                let space = meta.space.as_mut().expect("looked for");
                if space.current.0 < space.current.1 {
                    return Ok(());
                }
                match space.take_run() {
                    Some((start, end)) => Some((start, end, None)),
                    // Opened ahead: nobody waits.
                    None => space.next.take().map(|(start, end, fresh)| (start, end, Some(fresh))),
                }
            };
            if let Some((start, end, fresh)) = run {
                let fresh = match fresh {
                    Some(fresh) => fresh,
                    None => self.freshen(start, end).await,
                };
                let mut meta = image.meta();
                let space = meta.space.as_mut().expect("looked for");
                (space.current, space.current_fresh) = ((start, end), fresh);
                return Ok(());
            }
            // Chunks that were freed come before new storage (R4).
            let (waiting, punching) = {
                let meta = image.meta();
                (meta.frees_wait(), meta.space.as_ref().expect("looked for").punching)
            };
            if punching {
                image.space_wait.until(|| (!image.meta().space.as_ref().expect("looked for").punching).then_some(())).await;
            } else if waiting {
                self.commit_metadata().await?;
            } else {
                break;
            }
        }
        let (start, end, fresh) = self.open_step(want, false).await?;
        let mut meta = image.meta();
        let space = meta.space.as_mut().expect("looked for");
        (space.current, space.current_fresh) = ((start, end), fresh);
        Ok(())
    }

    /// Zeroes a long run of chunks that were used before, stable, where that is cheap.
    async fn freshen(self: &Rc<Self>, start: u64, end: u64) -> bool {
        let image = self.image().clone();
        if faulty!(image, FreeIsFresh) {
            return true;
        }
        if end - start < FRESH_RUN_MIN || image.zeroing_is_dear() {
            return false;
        }
        let (offset, len) = {
            let header = image.header();
            (header.chunk_offset(start), (end - start) * u64::from(header.chunk_size))
        };
        match self.zero_unused(offset, len, image.has_zero_bits()).await {
            Ok(true) => faulty!(image, FreshNotSynced) || self.sync_data().await.is_ok(),
            // They are zeroed one by one when they are handed out, and fail there; or bits say what is zero.
            Ok(false) | Err(_) => false,
        }
    }

    /// Zeroes storage that nobody uses; with `if_cheap`, false where that is dear.
    async fn zero_unused(self: &Rc<Self>, offset: u64, len: u64, if_cheap: bool) -> Result<bool> {
        let file = self.image().data_file();
        if if_cheap {
            return self.zero_cheaply(file, offset, len).await;
        }
        self.op(bare(OpKind::WriteZeroes { may_unmap: true }, file, offset, len)).await.map(|_| true)
    }

    /// Opens the next growth step in the background when the current run is nearly used up, so that no
    /// guest write waits for the syncs of a step.
    fn look_ahead(self: &Rc<Self>) {
        let image = self.image();
        let start = {
            let mut meta = image.meta();
            let low = meta.runs_low() && !image.is_poisoned();
            let space = meta.space.as_mut().expect("looked for");
            low && !space.stuck && !std::mem::replace(&mut space.ahead, true)
        };
        if start {
            self.spawn(Job::Step);
        }
    }

    /// Opens a growth step ahead of need, if it is still wanted.
    pub(crate) async fn step_ahead(self: &Rc<Self>) {
        let image = self.image().clone();
        let _one_at_a_time = image.space_lock.lock().await;
        // By now another may have supplied chunks, or a header without a reach is to be changed first.
        let wanted = image.meta().runs_low() && !image.header().pristine && image.check_poison().is_ok();
        let opened = if wanted { self.open_step(1, true).await.map(Some) } else { Ok(None) };
        let mut meta = image.meta();
        let space = meta.space.as_mut().expect("looked for");
        space.ahead = false;
        match opened {
            Ok(None) => {}
            Ok(next) => {
                space.next = next;
                meta.stats.steps_ahead += 1;
            }
            Err(error) => {
                space.stuck = true;
                drop(meta);
                if error.kind != Kind::NoSpace {
                    self.host().log(LogLevel::Warning, &error.context("opening a growth step ahead of need").text);
                }
            }
        }
    }

    /// Opens a growth step of at least `want` chunks if the storage has them: first and end, and
    /// whether they are fresh (R6). The caller holds the lock of space.
    async fn open_step(self: &Rc<Self>, want: u64, ahead: bool) -> Result<(u64, u64, bool)> {
        let image = self.image().clone();
        let header = image.header();
        let limits = *image.data_limits();
        let start = image.meta().space.as_ref().expect("looked for").end;
        let unit = header.storage_grow_unit / u64::from(header.chunk_size);
        let mut end = (start + want.max(1).next_multiple_of(unit)).min(CHUNKS_MAX - 1);
        let length = self.op(bare(OpKind::GetLength, image.data_file(), 0, 0)).await? as u64;
        if !limits.grows_zeroed {
            end = end.min(header.chunks_below(length));
        }
        if end <= start {
            self.tell_low_space(length, 0, !ahead);
            let text = format!("no chunk of {} bytes is free: the storage has {length} bytes, {start} chunks are in use", header.chunk_size);
            return fail(Kind::NoSpace, text);
        }
        let (from, to) = (header.chunk_offset(start), header.chunk_offset(end));
        let mut fresh = limits.grows_zeroed;
        if from < length && (!image.zeroing_is_dear() || limits.grows_zeroed) {
            // Whatever lies behind the reach is not ours, or was never recorded.
            let len = ceil(length, PAGE_SIZE as u64).min(to) - from;
            fresh = faulty!(image, StepNotZeroed) || self.zero_unused(from, len, image.has_zero_bits() && !limits.grows_zeroed).await?;
        }
        if faulty!(image, StepBehindFile) && limits.grows_zeroed {
            self.op(bare(OpKind::Truncate, image.data_file(), length.max(from) + (to - from), 0)).await?;
        } else if length < to {
            self.op(bare(OpKind::Truncate, image.data_file(), to, 0)).await?;
        }
        if header.pristine {
            // No session begins yet; the header says it.
            self.sync_data().await?;
            self.update_header(|header| header.reach = to).await?;
        } else if !faulty!(image, ReachForgotten) {
            // The commit syncs the step before it says so.
            {
                let mut meta = image.meta();
                meta.pending.reach = meta.pending.reach.max(Some(to));
                meta.pending.data_first = true;
            }
            if !(ahead && faulty!(image, StepAheadUsedEarly)) {
                self.commit_metadata().await?;
            }
        }
        {
            let mut meta = image.meta();
            meta.stats.growth_steps += 1;
            let space = meta.space.as_mut().expect("looked for");
            (space.end, space.stuck) = (end, false);
        }
        if !limits.grows_zeroed && header.chunks_below(length) - end < unit {
            self.tell_low_space(length, end - start, false);
        }
        Ok((start, end, fresh))
    }

    /// Tells the host, unless it knows, that its storage of `length` bytes is nearly used up: if somebody
    /// needs more, or the disk may. `opened`: chunks of a step that nobody has yet.
    fn tell_low_space(&self, length: u64, opened: u64, needed: bool) {
        let image = self.image();
        let (free, wanted) = {
            let news = image.space_news();
            let mut meta = image.meta();
            let header = meta.header.clone().expect("open image");
            let space = meta.space.as_mut().expect("looked for");
            let free = space.free_chunks() + opened;
            let used = space.end - free;
            let free = free + header.chunks_below(length).saturating_sub(space.end);
            let missing = header.chunks().saturating_sub(used + free);
            let known = space.told == Some((length, news)) || (space.told.is_some() && faulty!(image, ToldOnce));
            if known || (missing == 0 && !needed) {
                return;
            }
            space.told = Some((length, news));
            let chunk = u64::from(header.chunk_size);
            (free * chunk, (missing.max(1) * chunk).min(header.storage_grow_unit))
        };
        self.host().low_space(free, wanted);
    }

    /// Gives the storage of freed chunks back to the host, a run at a time.
    pub(crate) async fn punch(self: &Rc<Self>) {
        let image = self.image().clone();
        loop {
            let run = {
                let mut meta = image.meta();
                let header = meta.header.clone().expect("open image");
                let closing = image.is_poisoned();
                let space = meta.space.as_mut().expect("chunks were freed");
                let run = if closing { None } else { space.unpunched.pop_first() };
                space.punching = run.is_some();
                run.map(|(start, end)| (start, end, header.chunk_offset(start), (end - start) * u64::from(header.chunk_size)))
            };
            image.space_wait.wake_all();
            let Some((start, end, offset, len)) = run else { return };
            if let Err(error) = self.op(bare(OpKind::Discard, image.data_file(), offset, len)).await {
                self.host().log(LogLevel::Warning, &error.context("giving storage back").text);
            }
            let mut meta = image.meta();
            let space = meta.space.as_mut().expect("chunks were freed");
            add_run(&mut space.free, start, end);
        }
    }

    /// Chunks that nothing names any more, stable: free, and their storage goes back.
    pub(crate) fn release_chunks(self: &Rc<Self>, freed: Runs) {
        if freed.is_empty() {
            return;
        }
        let start = {
            let mut meta = self.image().meta();
            let space = meta.space.as_mut().expect("chunks were freed");
            space.release(freed);
            !std::mem::replace(&mut space.punching, true)
        };
        if start {
            self.spawn(Job::Punch);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn chunks_that_nothing_uses_are_free() {
        let mut space = Space::new(20, &[(0, 2), (1, 3), (5, 6), (18, 25)]);
        assert_eq!(space.free, [(3, 5), (6, 18)].into());
        assert_eq!(space.take(4), None);
        assert_eq!(space.take_whole(3), Some(6));
        assert_eq!(space.take_run(), Some((3, 5)));
        space.current = (3, 5);
        assert_eq!(space.take(1), Some(Taken { id: 3, count: 1, fresh: false }));
        space.release([(0, 1)].into());
        assert_eq!(space.free_chunks(), 9 + 1 + 1);
        space.give_back(Taken { id: 3, count: 1, fresh: true });
        assert_eq!(space.free, [(3, 4), (9, 18)].into());
    }
}
