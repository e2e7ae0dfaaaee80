// SPDX-License-Identifier: MIT OR Apache-2.0
//! One image: what all its queues share.
//!
//! Readers on the pass-through path touch only atomics ([`Map`], [`Brackets`]). Everything that
//! changes metadata is in [`Meta`], behind one mutex that is never held across a host call or an
//! `await` (C1).

use crate::bits::Bits;
use crate::brackets::{BracketToken, Brackets};
use crate::changes::Changes;
use crate::error::{Error, Kind, Result};
use crate::host::{FileId, Limits};
use crate::replayed::Replayed;
use crate::request::{Config, Info, Stats};
use crate::space::Space;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{AsyncMutex, Mutex, MutexGuard, RangeLock, WaitQueue, lock};
use fvd_format::limits::{PAGE_SIZE, SECTOR};
use fvd_format::page::PageHeader;
use fvd_format::{Header, RegionKind};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

/// Life of a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    New = 0,
    Opening = 1,
    Open = 2,
    Closing = 3,
    Closed = 4,
}

/// What pass-through decisions read.
#[derive(Default)]
pub(crate) struct Map {
    pub(crate) virtual_size: AtomicU64,
    pub(crate) covered: AtomicU64,
    /// See [`Header::zero_from`].
    pub(crate) zero_from: AtomicU64,
    pub(crate) block_shift: AtomicU32,
    pub(crate) data_offset: AtomicU64,
    /// Guest data lies in a file of its own.
    pub(crate) two_files: AtomicBool,
    /// Reasons why every write must ask the engine: read-modify-write cycles under way, a
    /// read-only open, poison. One word, because the hot path reads it.
    pub(crate) no_direct_writes: AtomicU32,
    /// Nothing was ever written and there is no bitmap yet: everything is in the base, or zero.
    pub(crate) pristine: AtomicBool,
    pub(crate) bits: OnceLock<Bits>,
    /// Log₂ of the chunk size of a compact image; 0: flat.
    pub(crate) chunk_shift: AtomicU32,
    pub(crate) table: OnceLock<Bits>,
}

/// A page of a region.
pub(crate) type PageId = (RegionKind, u64);

/// A page on its way through recovery, which does not need the bitmap in memory.
pub(crate) struct Fetched {
    pub(crate) words: Box<[u64]>,
    pub(crate) write_count: u32,
}

/// Why a page cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadPage {
    /// Its bytes are not those of the page: nothing of it is known.
    Unreadable,
    /// It names storage that holds no guest data; memory has it, and the other entries count.
    Entries,
}

/// Metadata that changes, and its three values: memory (in [`Map`]), frozen in the commit on its way,
/// and stable.
#[derive(Default)]
pub(crate) struct Meta {
    /// As both copies in the file say.
    pub(crate) header: Option<Header>,
    /// Changes that no commit has frozen yet.
    pub(crate) pending: Changes,
    /// Changes in the commit on its way.
    pub(crate) frozen: Changes,
    /// Stable images of the pages where memory is ahead.
    pub(crate) stable: BTreeMap<PageId, Box<[u64]>>,
    /// Pages whose stable image is not in place.
    pub(crate) dirty_pages: BTreeSet<PageId>,
    /// The file may be written up to here, stable (R6); every header update stores it.
    pub(crate) reach: u64,
    /// Free storage of a compact image, once it was looked for.
    pub(crate) space: Option<Space>,
    /// Page map: payload words of each of its pages. A page comes into memory only after it was found
    /// valid, so that a length in the header alone costs nothing.
    pub(crate) page_map: Vec<Box<[u64]>>,
    pub(crate) page_map_counts: Vec<u32>,
    /// Page-map pages that a failed checkpoint may not have written.
    pub(crate) dirty_map_pages: BTreeSet<u64>,
    /// Sums of write counts by region, as the next header will say.
    pub(crate) count_sums: BTreeMap<RegionKind, u64>,
    /// Pages that the unfinished checkpoint has written: each is counted once.
    pub(crate) written: BTreeSet<PageId>,
    /// Pages that recovery found in the double-write area and a read-only open may not write back.
    pub(crate) overlay: BTreeMap<PageId, Vec<u8>>,
    /// Loaded pages that cannot be used.
    pub(crate) bad_pages: BTreeMap<PageId, BadPage>,
    /// What the journal says of pages: till recovery has it in place, or for as long as the image
    /// is open read-only.
    pub(crate) replayed: Replayed,
    /// Pages that recovery has in its hands for the batch that comes next.
    pub(crate) fetched: BTreeMap<PageId, Fetched>,
    /// Where the next commit goes.
    pub(crate) next_seq: u64,
    pub(crate) next_commit: u64,
    pub(crate) last_batch: u64,
    pub(crate) last_checkpoint: u64,
    /// This session has raised the epoch and cleared the clean mark.
    pub(crate) session: bool,
    pub(crate) commits_begun: u64,
    pub(crate) commits_done: u64,
    /// Number of the last commit that succeeded: it covers all before it.
    pub(crate) commits_ok: u64,
    pub(crate) commit_error: Option<Error>,
    pub(crate) committing: bool,
    /// The commit on its way frees chunks.
    pub(crate) frees_on_way: bool,
    pub(crate) commit_queued: bool,
    pub(crate) checkpointing: bool,
    pub(crate) checkpoint_error: Option<Error>,
    /// When the commit timer fires, on whichever queue armed it.
    pub(crate) timer_at: Option<u64>,
    pub(crate) segments_loaded: u64,
    pub(crate) was_clean: bool,
    /// What is wrong with the data file, in an open for metadata only.
    pub(crate) data_file_trouble: Option<String>,
    /// The header copy that this open wrote again, of an image that had been closed.
    pub(crate) mended_copy: Option<usize>,
    pub(crate) commits_replayed: u64,
    pub(crate) stats: Stats,
}

impl Meta {
    /// The time to set the commit timer to, unless it is set. One that is long overdue was on a
    /// queue that is gone.
    pub(crate) fn arm_timer(&mut self, now: u64, interval: u64) -> Option<u64> {
        let at = now.saturating_add(interval);
        let armed = self.timer_at.is_some_and(|at| at.saturating_add(interval) > now);
        (!armed).then(|| *self.timer_at.insert(at))
    }
}

/// One image, shared by its queues. State moves New → Open → Closed.
pub struct Image {
    pub(crate) config: Config,
    state: AtomicU8,
    poisoned: AtomicBool,
    why_poisoned: Mutex<Option<String>>,
    brackets: Brackets,
    narrowing: AtomicUsize,
    narrow_lock: AsyncMutex,
    narrow_wait: WaitQueue,
    pub(crate) map: Map,
    meta: Mutex<Meta>,
    pub(crate) ranges: RangeLock,
    pub(crate) load_lock: AsyncMutex,
    pub(crate) header_lock: AsyncMutex,
    pub(crate) session_lock: AsyncMutex,
    /// Held by who looks for storage.
    pub(crate) space_lock: AsyncMutex,
    pub(crate) space_wait: WaitQueue,
    /// How often the host had news of its storage.
    pub(crate) space_news: AtomicU64,
    /// How often that was that none comes.
    pub(crate) space_refusals: AtomicU64,
    /// Writes that find no storage wait for news.
    pub(crate) wait_for_space: AtomicBool,
    /// The host said that zeroing is cheap, and then that it is not.
    pub(crate) zeroing_is_dear: AtomicBool,
    /// Held by whatever changes size, base or regions.
    pub(crate) layout_lock: AsyncMutex,
    pub(crate) commit_wait: WaitQueue,
    pub(crate) checkpoint_wait: WaitQueue,
    next_slot: AtomicUsize,
    tasks: AtomicUsize,
    pub(crate) tasks_wait: WaitQueue,
}

impl Image {
    /// A handle that is not open yet.
    pub fn new(mut config: Config) -> Arc<Self> {
        config.read_only |= config.metadata_only;
        let map = Map { no_direct_writes: AtomicU32::new(u32::from(config.read_only)), ..Map::default() };
        Arc::new(Self {
            space_news: AtomicU64::new(0),
            space_refusals: AtomicU64::new(0),
            wait_for_space: AtomicBool::new(config.wait_for_space),
            zeroing_is_dear: AtomicBool::new(false),
            config,
            state: AtomicU8::new(State::New as u8),
            poisoned: AtomicBool::new(false),
            why_poisoned: Mutex::default(),
            brackets: Brackets::new(),
            narrowing: AtomicUsize::new(0),
            narrow_lock: AsyncMutex::default(),
            narrow_wait: WaitQueue::default(),
            map,
            space_wait: WaitQueue::default(),
            meta: Mutex::default(),
            ranges: RangeLock::default(),
            load_lock: AsyncMutex::default(),
            header_lock: AsyncMutex::default(),
            session_lock: AsyncMutex::default(),
            space_lock: AsyncMutex::default(),
            layout_lock: AsyncMutex::default(),
            commit_wait: WaitQueue::default(),
            checkpoint_wait: WaitQueue::default(),
            next_slot: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            tasks_wait: WaitQueue::default(),
        })
    }

    pub(crate) fn meta(&self) -> MutexGuard<'_, Meta> {
        lock(&self.meta)
    }

    /// A copy of the header.
    pub(crate) fn header(&self) -> Header {
        self.meta().header.clone().expect("open image has a header")
    }

    #[inline]
    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::New,
            1 => State::Opening,
            2 => State::Open,
            3 => State::Closing,
            _ => State::Closed,
        }
    }

    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) == State::Open as u8
    }

    /// Moves from state `from` to `to`; an error if the handle is elsewhere.
    pub(crate) fn advance(&self, from: State, to: State) -> Result<()> {
        self.state
            .compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(|_| Error::new(Kind::State, format!("the image handle is {:?}, this needs {from:?}", self.state())))
    }

    pub(crate) fn set_state(&self, to: State) {
        self.state.store(to as u8, Ordering::Release);
    }

    /// What the host said of `file`.
    pub(crate) fn limits(&self, file: FileId) -> &Limits {
        &self.config.limits[file as usize]
    }

    /// The file that holds guest data.
    #[inline]
    pub(crate) fn data_file(&self) -> FileId {
        // Set before the image is open, and never changed.
        if self.map.two_files.load(Ordering::Relaxed) { FileId::Data } else { FileId::Image }
    }

    /// What the host said of the file that holds guest data.
    #[inline]
    pub(crate) fn data_limits(&self) -> &Limits {
        self.limits(self.data_file())
    }

    /// Whether zeroing guest data's storage costs what writing costs, as far as is known.
    pub(crate) fn zeroing_is_dear(&self) -> bool {
        !self.data_limits().cheap_zeroing || self.zeroing_is_dear.load(Ordering::Acquire)
    }

    /// Whether the bitmap of a compact image says what of its chunks was written, to spare zeroing them.
    pub(crate) fn has_zero_bits(&self) -> bool {
        self.map.zero_from.load(Ordering::Acquire) < self.map.covered.load(Ordering::Acquire)
    }

    /// The length of a file of flat guest data is a multiple of this: bytes. A data file ends where the disk
    /// does, if the host can write so: others read it as a raw image.
    pub(crate) fn data_end_unit(&self) -> u64 {
        match self.data_file() {
            FileId::Data => u64::from(self.data_limits().request_alignment).max(SECTOR),
            _ => PAGE_SIZE as u64,
        }
    }

    /// Makes the image unusable for all but reads (R11).
    pub fn poison(&self, why: &str) {
        lock(&self.why_poisoned).get_or_insert_with(|| why.to_owned());
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            self.map.no_direct_writes.fetch_add(1, Ordering::SeqCst);
        }
        // Whoever waits for a commit or a checkpoint must look again.
        self.commit_wait.wake_all();
        self.checkpoint_wait.wake_all();
        self.space_wait.wake_all();
    }

    /// Whether an earlier failure made the image unusable.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// An error if the image is poisoned.
    pub(crate) fn check_poison(&self) -> Result<()> {
        if !self.is_poisoned() {
            return Ok(());
        }
        let why = lock(&self.why_poisoned).clone().unwrap_or_default();
        Err(Error::poisoned().context(&why))
    }

    /// An error unless the image may be changed.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.config.read_only {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only"));
        }
        self.check_poison()
    }

    #[inline]
    pub(crate) fn begin(&self, slot: usize) -> BracketToken {
        self.brackets.begin(slot)
    }

    /// Ends the bracket of a [`Lookup::Data`](crate::Lookup::Data): exactly once, from any thread.
    #[inline]
    pub fn end(&self, token: BracketToken) {
        if self.brackets.end(token) && self.narrowing.load(Ordering::SeqCst) > 0 {
            self.narrow_wait.wake_all();
        }
    }

    /// Waits for every request that began before (R5). What they may no longer rely on was
    /// published before this is called.
    pub(crate) async fn narrow(&self) {
        let _one_at_a_time = self.narrow_lock.lock().await;
        self.narrowing.fetch_add(1, Ordering::SeqCst);
        for _ in 0..2 {
            let old = self.brackets.flip();
            self.narrow_wait.until(|| self.brackets.drained(old).then_some(())).await;
        }
        self.narrowing.fetch_sub(1, Ordering::SeqCst);
    }

    /// A bracket slot for a new queue: counted by image, so that an image's life does not depend on
    /// others in the process.
    pub(crate) fn next_slot(&self) -> usize {
        self.next_slot.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn task_started(&self) {
        self.tasks.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn task_ended(&self) {
        self.tasks.fetch_sub(1, Ordering::AcqRel);
        self.tasks_wait.wake_all();
    }

    /// Tasks under way, on all queues.
    pub(crate) fn tasks(&self) -> usize {
        self.tasks.load(Ordering::Acquire)
    }

    /// Whether pending changes are to be committed now that the timer fired.
    pub(crate) fn timer_fired(&self) -> bool {
        let mut meta = self.meta();
        if !faulty!(self, TimerNotRearmed) {
            meta.timer_at = None;
        }
        meta.pending.is_due() && self.state() == State::Open && !self.is_poisoned()
    }

    /// A page was read. One of a checkpoint that did not finish is not in the header's sum yet,
    /// and is written again by recovery's checkpoint.
    pub(crate) fn note_loaded(&self, page: &PageHeader) {
        let mut meta = self.meta();
        if !self.config.read_only && page.checkpoint > meta.last_checkpoint && meta.written.insert((page.kind, page.index)) {
            let sum = meta.count_sums.entry(page.kind).or_default();
            *sum = sum.wrapping_add(1);
            match page.kind {
                RegionKind::PageMap => meta.dirty_map_pages.insert(page.index),
                kind => meta.dirty_pages.insert((kind, page.index)),
            };
        }
    }

    /// A picture of the open image.
    pub fn info(&self) -> Result<Info> {
        let meta = self.meta();
        let Some(header) = meta.header.clone() else {
            return Err(Error::new(Kind::State, "the image is not open"));
        };
        let free_chunks = meta.space.as_ref().map(Space::free_chunks);
        Ok(Info { header, free_chunks, was_clean: meta.was_clean, commits_replayed: meta.commits_replayed, stats: meta.stats })
    }

    /// Whether the planted fault is `fault`.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn fault(&self, fault: crate::faults::Fault) -> bool {
        self.config.fault == Some(fault)
    }
}

/// `faulty!(image, Name)`: whether the planted fault `Name` is on; constant false in real builds.
macro_rules! faulty {
    ($image:expr, $fault:ident) => {{
        #[cfg(feature = "planted-faults")]
        let on = $image.fault($crate::faults::Fault::$fault);
        #[cfg(not(feature = "planted-faults"))]
        let on = {
            let _ = &$image;
            false
        };
        on
    }};
}
pub(crate) use faulty;
