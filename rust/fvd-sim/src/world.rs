// SPDX-License-Identifier: MIT OR Apache-2.0
//! The world of one open image: a host of simulated files, clock, network and failures.
//!
//! One world is one session: it starts with the bytes of a file and ends with a power cut or a
//! close, which leave bytes for the next. It does nothing by itself: each [`World::step`] is one
//! event – an operation ends, a timer fires, a woken queue runs – and everything that could come
//! out otherwise is drawn from one stream of random numbers. Same setup and same calls, same
//! events, same [`World::hash`]. Nothing of a world is kept in statics, so that a script can be
//! run again with another power cut, another failing operation, or one request less.

mod files;

use crate::checker::Checker;
use crate::clock::Latency;
use crate::content::GARBAGE_BYTE;
use crate::disk::{Change, Disk, Keep, Tear};
use crate::geometry::Base;
use crate::memory::Buf;
use crate::prng::{Prng, mix};
use crate::store::Files;
use fvd_engine::host::*;
use fvd_engine::{Config, Error, Image, Lookup, Queue, Reply, Request};
use fvd_format::{Header, RegionKind};
use std::cell::{Ref, RefCell, RefMut};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use files::bytes_of;

/// Names a request of the guest.
pub type RequestId = u64;
/// Result of a guest request.
pub type Outcome = Result<Reply, Error>;

const EIO: i64 = -5;
const ENOMEDIUM: i64 = -123;
const ENOTSUP: i64 = -95;

/// Which operations a planned failure reaches; others go on as if nothing were wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All of them.
    #[default]
    All,
    /// Those that need space: a full disk still reads, syncs and gives back.
    Space,
    /// Those on the base.
    Base,
}

impl Reach {
    fn holds<B>(self, op: &HostOp<B>) -> bool {
        match self {
            Self::All => true,
            Self::Space => matches!(op.kind, OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Truncate),
            Self::Base => op.file == FileId::Base,
        }
    }
}

/// Which operations fail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// The operation with this number, counted from 0 in order of completion.
    pub at: Option<u64>,
    /// And every later one.
    pub forever: bool,
    /// Of these.
    pub reach: Reach,
    /// With this negative errno; 0: EIO.
    pub errno: i64,
    /// Any operation on the image file, in one of so many cases; 0: none.
    pub image_one_in: u64,
    /// Any operation on the base, likewise.
    pub base_one_in: u64,
    /// Any flush, likewise.
    pub flush_one_in: u64,
    /// Any write of the image file in front of the guest's data, likewise.
    pub metadata_one_in: u64,
}

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The files of the image.
    pub files: Files,
    /// Guest data lies in the data file.
    pub two_files: bool,
    /// The base, where there is one.
    pub base: Option<Base>,
    /// Whether the base is attached at the start.
    pub attached: bool,
    /// What the image handle is made with.
    pub config: Config,
    /// How many queues work on the image.
    pub queues: usize,
    /// Everything that is left to chance.
    pub seed: u64,
    /// How long operations on the image take, and on the base.
    pub latency: [Latency; 2],
    /// In how many of 100 cases an operation ends before `submit` returns.
    pub inline_percent: u64,
    /// Which operations fail.
    pub failures: Failures,
    /// A discard leaves the data as it was, in how many of 100 cases.
    pub discard_ignored_percent: u64,
    /// The host says that zeroing is cheap, until it is asked to do it.
    pub zeroing_is_dear: bool,
    /// What comes of it when the engine says that the storage is nearly used up.
    pub answer: Answer,
    /// What may have left space that nothing uses.
    pub leaks: Leaks,
    /// Keep a text of everything that happens.
    pub trace: bool,
}

/// Regions begin at multiples of so many bytes (FMT: `docs/format.md`).
const REGION_ALIGNMENT: u64 = 64 << 10;

/// How the host answers when it is told that the storage is nearly used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The storage gets so many bytes longer; 0: never, and whoever waits is told so.
    pub grows_by: u64,
    /// So much later; 0: before the engine goes on.
    pub after_ns: u64,
    /// In so many of 100 cases it does not, and whoever waits is told so.
    pub refuses_percent: u64,
}

/// What the host does about its storage, later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Supply {
    /// Answers.
    Answer,
    /// Lets writes wait again.
    WaitAgain,
}

/// Nanoseconds for which writes do not wait for storage after the host refused some.
const REFUSED_FOR: u64 = 100_000;

/// What may have left space in the image file that nothing uses (C6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaks {
    /// A power cut came or an operation failed since nothing was leaked.
    pub disturbed: bool,
    /// Bytes of the largest disk that a resize asked for.
    pub largest_disk: u64,
    /// Bytes of the largest write.
    pub largest_write: u64,
    /// Bytes of the largest growth step of an image that was given others; 0: it was not.
    pub largest_step: u64,
}

impl Leaks {
    /// How much there may be in an image with this header: regions that were built anew elsewhere; and
    /// after a cut or a failure a growth step of which no record became stable, or the part of a flat
    /// disk that grew or shrank.
    fn limit(&self, header: &Header) -> u64 {
        let rebuilt = [RegionKind::PageMap, RegionKind::Bitmap, RegionKind::Table];
        let regions: u64 = rebuilt.iter().filter_map(|kind| header.region(*kind)).map(|r| r.length.next_multiple_of(REGION_ALIGNMENT)).sum();
        if !self.disturbed {
            return if header.is_compact() && !header.has_data_file() { 0 } else { 2 * regions + REGION_ALIGNMENT };
        }
        if header.is_compact() {
            let chunk = u64::from(header.chunk_size);
            let step = |wanted: u64| [header.storage_grow_unit, self.largest_step.max(1)].map(|unit| wanted.next_multiple_of(unit)).into_iter().max().expect("two");
            // A write takes a chunk at either end that it covers in part.
            let wanted = self.largest_write + 2 * chunk;
            if header.has_data_file() {
                // Regions in one file, chunks in the other.
                return step(wanted) + 2 * regions + REGION_ALIGNMENT;
            }
            step(wanted.max(2 * regions + chunk))
        } else {
            let flat = self.largest_disk.saturating_sub(header.virtual_size);
            flat.saturating_add(2 * regions + REGION_ALIGNMENT)
        }
    }
}

impl Setup {
    /// A world without chance or failures, for scripts: one queue, operations end in order.
    pub fn scripted(files: impl Into<Files>, base: Option<Base>, config: Config) -> Self {
        Self {
            files: files.into(),
            two_files: false,
            base,
            attached: true,
            config,
            queues: 1,
            seed: 0,
            latency: [Latency::NONE; 2],
            inline_percent: 0,
            failures: Failures::default(),
            discard_ignored_percent: 0,
            zeroing_is_dear: false,
            answer: Answer::default(),
            leaks: Leaks { disturbed: true, largest_disk: u64::MAX, largest_write: 1 << 20, largest_step: 0 },
            trace: false,
        }
    }
}

/// Who asked for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The engine, by a queue.
    Engine(usize, Token),
    /// The guest's side, after a lookup: the way QEMU takes.
    Own(RequestId),
}

struct Pending {
    owner: Owner,
    op: HostOp<Buf>,
    /// What a flush covers.
    mark: u64,
}

/// Kinds of operations, for [`Counters::failed`].
pub const FAILED_KINDS: [&str; 8] = ["read", "write", "flush", "zero", "discard", "truncate", "length", "status"];

fn failed_kind(kind: OpKind) -> usize {
    match kind {
        OpKind::Read => 0,
        OpKind::Write { .. } => 1,
        OpKind::Flush => 2,
        OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply => 3,
        OpKind::Discard => 4,
        OpKind::Truncate => 5,
        OpKind::GetLength => 6,
        OpKind::BaseStatus => 7,
    }
}

/// Numbers of what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Host operations that ended.
    pub ops: u64,
    /// Of these, made to fail.
    pub injected: u64,
    /// Flushes among them.
    pub flushes_failed: u64,
    /// Operations made to fail, by [`FAILED_KINDS`].
    pub failed: [u64; FAILED_KINDS.len()],
    /// Writes, zeroings, discards, truncations that the engine asked for.
    pub changes: u64,
}

/// What the host keeps.
pub struct Inner {
    /// The disk of the image file, and that of the data file: each has a cache of its own.
    disks: [Disk; 2],
    base: Option<Base>,
    attached: bool,
    now: u64,
    prng: Prng,
    setup: Setup,
    pending: BTreeMap<(u64, u64), Pending>,
    issued: u64,
    timers: Vec<u64>,
    /// What the host does next about its storage, and when.
    supply: Option<(u64, Supply)>,
    done: VecDeque<(RequestId, Outcome)>,
    own_done: VecDeque<(RequestId, i64)>,
    /// The checks of the engine's side of the contract.
    pub checker: Checker,
    counters: Counters,
    hash: u64,
    trace: Vec<String>,
    violation: Option<String>,
}

/// The world.
pub struct World {
    inner: RefCell<Inner>,
    image: Arc<Image>,
    queues: RefCell<Vec<Rc<Queue<SimHost>>>>,
    woken: Vec<Arc<AtomicBool>>,
}

/// Disks without power.
pub struct Remains {
    /// What was on each, and what of that is not durable.
    disks: [Disk; 2],
    /// What was on its way to each.
    under_way: [Vec<Change>; 2],
}

impl Remains {
    /// What is left of the files: one of many outcomes. What one of them loses says nothing of the other.
    pub fn cut(&self, keep: &Keep) -> Files {
        let [image, data] = match keep {
            Keep::Seeded(seed) => [keep.clone(), Keep::Seeded(mix(*seed))],
            Keep::Subset { survivors, tear } => {
                let of_data = (self.disks[1].unflushed().len() + self.under_way[1].len()) as u32;
                let image = survivors.checked_shr(of_data).unwrap_or(0);
                let data = survivors & 1u64.checked_shl(of_data).unwrap_or(0).wrapping_sub(1);
                let tear_data = if image == 0 { *tear } else { Tear::Whole };
                [Keep::Subset { survivors: image, tear: *tear }, Keep::Subset { survivors: data, tear: tear_data }]
            }
        };
        Files { image: self.disks[0].cut(&self.under_way[0], &image), data: self.disks[1].cut(&self.under_way[1], &data) }
    }

    /// What is left for certain.
    pub fn stable(&self) -> Files {
        Files { image: self.disks[0].stable.clone(), data: self.disks[1].stable.clone() }
    }
}

/// The host of one queue.
pub struct SimHost {
    world: Rc<World>,
    queue: usize,
}

struct SimWake(Arc<AtomicBool>);

impl Wake for SimWake {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Host for SimHost {
    type Buf = Buf;
    type Done = RequestId;

    fn submit(&self, token: Token, op: HostOp<Buf>) {
        self.world.issue(Owner::Engine(self.queue, token), op);
    }
    fn done(&self, done: RequestId, result: Outcome) {
        let mut inner = self.world.inner.borrow_mut();
        inner.note(2, [done, result.as_ref().err().map_or(0, |e| e.text.len() as u64 + 1), 0, 0], || format!("request {done}: {result:?}"));
        inner.done.push_back((done, result));
    }
    fn now_ns(&self) -> u64 {
        self.world.inner.borrow().now
    }
    fn random(&self, to: &mut [u8]) {
        let mut inner = self.world.inner.borrow_mut();
        to.fill_with(|| inner.prng.bits() as u8);
    }
    fn set_timer(&self, at_ns: u64) {
        self.world.inner.borrow_mut().timers[self.queue] = at_ns;
    }
    fn low_space(&self, free: u64, wanted: u64) {
        let at_once = {
            let inner = &mut *self.world.inner.borrow_mut();
            inner.note(3, [free, wanted, 0, 0], || format!("{free} bytes of storage are left, {wanted} are wanted"));
            let Answer { grows_by, after_ns, .. } = inner.setup.answer;
            let at_once = after_ns == 0 && grows_by > 0;
            if !at_once && inner.supply.is_none() {
                inner.supply = Some((inner.now + after_ns, Supply::Answer));
            }
            at_once
        };
        if at_once {
            self.world.add_storage();
        }
    }
    fn log(&self, level: LogLevel, text: &str) {
        self.world.inner.borrow_mut().say(|| format!("log {level:?}: {text}"));
    }
}

fn kind_number(kind: OpKind) -> u64 {
    match kind {
        OpKind::Read => 1,
        OpKind::Write { .. } => 2,
        OpKind::Flush => 3,
        OpKind::WriteZeroes { may_unmap } => 4 + u64::from(may_unmap),
        OpKind::Discard => 6,
        OpKind::Truncate => 7,
        OpKind::GetLength => 8,
        OpKind::BaseStatus => 9,
        OpKind::ZeroCheaply => 10,
    }
}

/// Whether an operation changes a file.
pub fn is_change(kind: OpKind) -> bool {
    matches!(kind, OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard | OpKind::Truncate)
}

impl World {
    /// Whether the image is opened only to be read.
    pub fn read_only(&self) -> bool {
        self.inner.borrow().setup.config.read_only
    }

    /// Makes a world. The image is not open yet.
    pub fn new(setup: Setup, checker: Checker) -> Rc<Self> {
        let image = Image::new(setup.config.clone());
        let woken: Vec<_> = (0..setup.queues).map(|_| Arc::new(AtomicBool::new(false))).collect();
        let mut disks = [Disk::new(setup.files.image.clone()), Disk::new(setup.files.data.clone())];
        disks[0].granule = setup.config.limits[0].write_granule.max(4096) as usize;
        let inner = Inner {
            disks,
            base: setup.base.clone(),
            attached: setup.attached,
            now: 1,
            prng: Prng::new(setup.seed),
            pending: BTreeMap::new(),
            issued: 0,
            timers: vec![u64::MAX; setup.queues],
            supply: None,
            done: VecDeque::new(),
            own_done: VecDeque::new(),
            checker,
            counters: Counters::default(),
            hash: mix(setup.seed),
            trace: Vec::new(),
            violation: None,
            setup,
        };
        let world = Rc::new(Self { inner: RefCell::new(inner), image: image.clone(), queues: RefCell::default(), woken });
        for (queue, woken) in world.woken.iter().enumerate() {
            let host = SimHost { world: world.clone(), queue };
            world.queues.borrow_mut().push(Queue::new(image.clone(), host, Box::new(SimWake(woken.clone()))));
        }
        world
    }

    /// What may have left unused space by now.
    pub fn leaks(&self) -> Leaks {
        let inner = self.inner.borrow();
        Leaks { disturbed: inner.setup.leaks.disturbed || inner.counters.injected > 0, ..inner.setup.leaks }
    }

    /// Bytes that may be leaked.
    pub fn leak_limit(&self) -> u64 {
        self.image.info().map_or(0, |info| self.leaks().limit(&info.header))
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The file that holds guest data.
    pub fn data_file(&self) -> FileId {
        if self.inner.borrow().setup.two_files { FileId::Data } else { FileId::Image }
    }

    /// Alignment of requests and of memory that the file with guest data demands.
    pub fn data_alignment(&self) -> [u32; 2] {
        let limits = self.inner.borrow().setup.config.limits[self.data_file() as usize];
        [limits.request_alignment, limits.memory_alignment]
    }

    /// The checks.
    pub fn checker(&self) -> RefMut<'_, Checker> {
        RefMut::map(self.inner.borrow_mut(), |inner| &mut inner.checker)
    }

    /// The disk of the image file.
    pub fn disk(&self) -> Ref<'_, Disk> {
        Ref::map(self.inner.borrow(), |inner| &inner.disks[0])
    }

    /// What is durable of the files.
    pub fn stable(&self) -> Files {
        let [image, data] = &self.inner.borrow().disks;
        Files { image: image.stable.clone(), data: data.stable.clone() }
    }

    /// What reads see of the files.
    pub fn view(&self) -> Files {
        let [image, data] = &self.inner.borrow().disks;
        Files { image: image.view.clone(), data: data.view.clone() }
    }

    /// Number of changes that are not durable, in either file.
    pub fn unflushed(&self) -> usize {
        self.inner.borrow().disks.iter().map(|disk| disk.unflushed().len()).sum()
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.inner.borrow().counters
    }

    /// A hash of every event so far.
    pub fn hash(&self) -> u64 {
        self.inner.borrow().hash
    }

    /// The text of every event so far, where it is kept.
    pub fn take_trace(&self) -> Vec<String> {
        std::mem::take(&mut self.inner.borrow_mut().trace)
    }

    /// Which part of its contract the engine broke, or the guest's view of the disk.
    pub fn violation(&self) -> Option<String> {
        self.inner.borrow().violation.clone()
    }

    /// Notes a broken promise; the first one counts.
    pub fn fail(&self, text: impl Into<String>) {
        self.inner.borrow_mut().violation.get_or_insert(text.into());
    }

    /// Attaches or detaches the base.
    pub fn attach(&self, attached: bool) {
        let mut inner = self.inner.borrow_mut();
        inner.note(3, [u64::from(attached), 0, 0, 0], || format!("base attached: {attached}"));
        inner.attached = attached;
    }

    /// A byte of the image file rots, where it lies.
    pub fn rot(&self, offset: u64) {
        let disk = &mut self.inner.borrow_mut().disks[0];
        for store in [&mut disk.view, &mut disk.stable] {
            let mut byte = [0];
            store.read(offset, &mut byte);
            store.write(offset, &[byte[0] ^ 0x40]);
        }
    }

    /// Nothing fails any more.
    pub fn cure(&self) {
        self.inner.borrow_mut().setup.failures = Failures::default();
    }

    /// Moves the clock: timers fire at the next steps.
    pub fn sleep(&self, ns: u64) {
        self.inner.borrow_mut().now += ns;
    }

    /// The clock.
    pub fn now(&self) -> u64 {
        self.inner.borrow().now
    }

    /// Metadata ends where `header` says; a cut may destroy pages below.
    pub fn set_metadata_end(&self, header: &Header) {
        self.inner.borrow_mut().disks[0].metadata_end = if header.has_data_file() { u64::MAX } else { header.data_offset };
    }

    /// A request of the guest enters by a queue.
    pub fn submit(&self, queue: usize, request: Request<Buf>, id: RequestId) {
        {
            let step = self.image.info().map_or(0, |info| info.header.storage_grow_unit);
            let mut inner = self.inner.borrow_mut();
            inner.say(|| format!("queue {queue}: request {id} begins"));
            let leaks = &mut inner.setup.leaks;
            match &request {
                Request::Resize { size, .. } => leaks.largest_disk = leaks.largest_disk.max(*size),
                Request::Write { buf, .. } => leaks.largest_write = leaks.largest_write.max(buf.len() as u64),
                Request::Amend(params) => leaks.largest_step = leaks.largest_step.max(step).max(params.storage_grow_unit.unwrap_or(0)),
                Request::WriteZeroes { len, .. } => leaks.largest_write = leaks.largest_write.max(*len),
                _ => {}
            }
        }
        let queue = self.queues.borrow()[queue].clone();
        queue.submit(request, id);
    }

    /// The guest's side looks up a range, as QEMU's driver does. An answer with data is a bracket
    /// that [`Image::end`] closes.
    pub fn lookup(&self, queue: usize, offset: u64, len: u64, write: bool) -> Lookup {
        let found = self.image.lookup(queue, offset, len, write);
        let place = match found {
            Lookup::Data { offset, len, .. } => [1, offset, len, 0],
            Lookup::Ask => [0; 4],
        };
        self.inner.borrow_mut().note(4, place, || format!("lookup {offset}+{len} write {write}: {found:?}"));
        found
    }

    /// I/O of the guest's side on what a lookup gave it; ends with [`World::take_own_done`].
    pub fn own_io(&self, id: RequestId, op: HostOp<Buf>) {
        self.issue(Owner::Own(id), op);
    }

    /// A request of the guest that ended.
    pub fn take_done(&self) -> Option<(RequestId, Outcome)> {
        self.inner.borrow_mut().done.pop_front()
    }

    /// I/O of the guest's side that ended.
    pub fn take_own_done(&self) -> Option<(RequestId, i64)> {
        self.inner.borrow_mut().own_done.pop_front()
    }

    /// Operations under way: kind, file, offset, length, in the order in which they would end.
    pub fn under_way(&self) -> Vec<(OpKind, FileId, u64, u64)> {
        self.inner.borrow().pending.values().map(|p| (p.op.kind, p.op.file, p.op.offset, p.op.len)).collect()
    }

    /// What the operations under way would do to the image file, in order of issue: a power cut may
    /// leave any of it.
    pub fn changes_under_way(&self) -> Vec<Change> {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let mut ordered: Vec<_> = std::mem::take(&mut inner.pending).into_iter().collect();
        ordered.sort_by_key(|(key, _)| key.1);
        let image = ordered.iter().filter(|(_, pending)| pending.op.file == FileId::Image);
        let changes = image.filter_map(|(_, pending)| inner.change_of(&pending.op)).collect();
        inner.pending.extend(ordered);
        changes
    }

    /// The host puts another base in the place of the one it has.
    pub fn set_base(&self, base: Base) {
        self.inner.borrow_mut().base = Some(base);
    }

    fn issue(&self, owner: Owner, op: HostOp<Buf>) {
        let inline = {
            let mut inner = self.inner.borrow_mut();
            let inner = &mut *inner;
            let who = match owner {
                Owner::Engine(queue, token) => [queue as u64, token],
                Owner::Own(id) => [u64::MAX, id],
            };
            inner.note(0, [who[0] ^ who[1] << 8, kind_number(op.kind) << 4 | op.file as u64, op.offset, op.len], || {
                format!("{owner:?} {:?} {:?} {}+{}", op.file, op.kind, op.offset, op.len)
            });
            let engine = matches!(owner, Owner::Engine(..));
            if is_change(op.kind) && engine {
                inner.counters.changes += 1;
            }
            let limits = inner.setup.config.limits[op.file as usize];
            if let Err(text) = inner.checker.submit(&inner.disks, &limits, &op, engine) {
                inner.violation.get_or_insert(text);
            }
            if op.file == FileId::Data && !inner.setup.two_files {
                inner.violation.get_or_insert(format!("{:?} on a data file that is not there", op.kind));
            }
            let inline = engine && inner.setup.inline_percent > 0 && inner.prng.chance(inner.setup.inline_percent);
            let base = usize::from(op.file == FileId::Base);
            let due = if inline { 0 } else { inner.now + inner.setup.latency[base].draw(&mut inner.prng) };
            let key = (due, inner.issued);
            inner.issued += 1;
            let mark = inner.disk_of(op.file).mark();
            inner.pending.insert(key, Pending { owner, op, mark });
            inline.then_some(key)
        };
        if let Some(key) = inline {
            self.finish(key, None);
        }
    }

    /// When the next event comes by itself; `None`: never.
    pub fn next_at(&self) -> Option<u64> {
        let inner = self.inner.borrow();
        let woken = self.woken.iter().any(|woken| woken.load(Ordering::Relaxed)).then_some(inner.now);
        let ends = inner.pending.first_key_value().map(|(key, _)| key.0);
        let timer = inner.timers.iter().copied().filter(|at| *at != u64::MAX).min();
        let supply = inner.supply.map(|(at, _)| at);
        [woken, ends, timer, supply].into_iter().flatten().min()
    }

    /// Whether the storage always gets longer when it is nearly used up, and who needs it waits.
    pub fn always_supplies(&self) -> bool {
        let setup = &self.inner.borrow().setup;
        setup.config.wait_for_space && setup.answer.grows_by > 0 && setup.answer.refuses_percent == 0
    }

    /// The storage gets longer, at once and for good, as a device does.
    fn add_storage(&self) {
        {
            let inner = &mut *self.inner.borrow_mut();
            let two_files = usize::from(inner.setup.two_files);
            let (at, more) = (inner.disks[two_files].view.len(), inner.setup.answer.grows_by);
            inner.note(6, [at, more, 0, 0], || format!("the storage has {more} bytes more"));
            let disk = &mut inner.disks[two_files];
            for store in [&mut disk.stable, &mut disk.view] {
                store.fill_pages(at, more, GARBAGE_BYTE);
            }
        }
        self.image.space_changed(true);
    }

    /// The host does what it meant to do about its storage.
    fn supply(&self) {
        let (what, grows, once) = {
            let mut inner = self.inner.borrow_mut();
            let (at, what) = inner.supply.take().expect("looked");
            inner.now = inner.now.max(at);
            let Answer { grows_by, refuses_percent, .. } = inner.setup.answer;
            let grows = what == Supply::Answer && grows_by > 0 && !inner.prng.chance(refuses_percent);
            let refuses = what == Supply::Answer && !grows;
            let once = refuses && inner.prng.chance(50);
            if refuses && !once {
                inner.supply = Some((inner.now + REFUSED_FOR, Supply::WaitAgain));
            }
            inner.note(7, [what as u64, u64::from(grows), u64::from(once), 0], || format!("storage: {what:?}, grows {grows}, refuses once {once}"));
            (what, grows, once)
        };
        if grows {
            self.add_storage();
        } else if once {
            self.image.space_changed(false);
        } else {
            let waits = what == Supply::WaitAgain && self.inner.borrow().setup.config.wait_for_space;
            self.image.set_wait_for_space(waits);
        }
    }

    /// One event. False if nothing is left that could happen by itself.
    pub fn step(&self) -> bool {
        let busy = !self.inner.borrow().pending.is_empty();
        for (queue, woken) in self.woken.iter().enumerate() {
            if woken.load(Ordering::Relaxed) && !(busy && self.inner.borrow_mut().prng.chance(20)) {
                woken.store(false, Ordering::Relaxed);
                let queue = self.queues.borrow()[queue].clone();
                queue.run();
                return true;
            }
        }
        let (next, timer) = {
            let inner = self.inner.borrow();
            let timer = inner.timers.iter().enumerate().min_by_key(|(_, at)| **at).map(|(queue, at)| (*at, queue));
            (inner.pending.first_key_value().map(|(key, _)| *key), timer.filter(|(at, _)| *at != u64::MAX))
        };
        let supply = self.inner.borrow().supply.map(|(at, _)| at);
        if supply.is_some_and(|at| next.is_none_or(|key| at < key.0) && timer.is_none_or(|(t, _)| at <= t)) {
            self.supply();
            return true;
        }
        match (next, timer) {
            (Some(key), timer) if timer.is_none_or(|(at, _)| key.0 <= at) => self.finish(key, None),
            (_, Some((at, queue))) => {
                {
                    let mut inner = self.inner.borrow_mut();
                    inner.now = inner.now.max(at);
                    inner.timers[queue] = u64::MAX;
                    inner.note(5, [queue as u64, 0, 0, 0], || format!("timer of queue {queue}"));
                }
                let queue = self.queues.borrow()[queue].clone();
                queue.timer();
            }
            _ => return self.woken.iter().any(|w| w.load(Ordering::Relaxed)),
        }
        true
    }

    /// Ends the `nth` operation under way, in the order of [`World::under_way`]: for scripts that
    /// choose the order themselves. `Some(errno)` makes it fail.
    pub fn finish_nth(&self, nth: usize, errno: Option<i64>) {
        let key = *self.inner.borrow().pending.keys().nth(nth).expect("an operation under way");
        self.finish(key, errno);
    }

    fn finish(&self, key: (u64, u64), errno: Option<i64>) {
        let (owner, op, ret) = {
            let mut inner = self.inner.borrow_mut();
            let Pending { owner, mut op, mark } = inner.pending.remove(&key).expect("an operation under way");
            inner.now = inner.now.max(key.0);
            let errno = errno.or_else(|| inner.draw_failure(&op));
            let ret = match errno {
                Some(errno) => inner.fail_op(&op, mark, errno),
                None => inner.perform(&mut op, mark),
            };
            inner.counters.ops += 1;
            inner.note(1, [key.1, ret as u64, 0, 0], || format!("{owner:?} ends: {:?} {:?} {}+{} -> {ret}", op.file, op.kind, op.offset, op.len));
            let inner = &mut *inner;
            inner.checker.complete(&inner.disks[0], &op, mark, ret, matches!(owner, Owner::Engine(..)));
            (owner, op, ret)
        };
        match owner {
            Owner::Engine(queue, token) => {
                let queue = self.queues.borrow()[queue].clone();
                if !queue.complete(token, ret, op) {
                    self.fail(format!("the engine does not know operation {token:#x}"));
                }
            }
            Owner::Own(id) => self.inner.borrow_mut().own_done.push_back((id, ret)),
        }
    }

    /// Ends one request; `None` if nothing more can happen.
    pub fn request(&self, queue: usize, request: Request<Buf>) -> Option<Outcome> {
        self.submit(queue, request, RequestId::MAX);
        loop {
            if let Some((id, outcome)) = self.take_done() {
                assert_eq!(id, RequestId::MAX, "one request at a time");
                return Some(outcome);
            }
            if !self.step() {
                return None;
            }
        }
    }

    /// Runs until nothing is under way; timers that lie ahead do not count.
    pub fn settle(&self) {
        while !self.inner.borrow().pending.is_empty() || self.woken.iter().any(|w| w.load(Ordering::Relaxed)) {
            self.step();
        }
    }

    /// Whether no queue has anything to do.
    pub fn is_idle(&self) -> bool {
        self.queues.borrow().iter().all(|q| q.is_idle())
    }

    /// The power goes. Returns what is left of the files.
    pub fn cut(&self, keep: &Keep) -> Files {
        self.say(|| format!("power cut: {keep:?}"));
        self.remains().cut(keep)
    }

    /// A line of the trace, where one is kept.
    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        self.inner.borrow_mut().say(text);
    }

    /// The power goes. Returns what decides what may be left of the files.
    pub fn remains(&self) -> Remains {
        let remains = {
            let mut inner = self.inner.borrow_mut();
            let pending = std::mem::take(&mut inner.pending);
            let mut ordered: Vec<_> = pending.into_iter().collect();
            ordered.sort_by_key(|(key, _)| key.1);
            let mut under_way = [Vec::new(), Vec::new()];
            for (_, pending) in ordered {
                let change = inner.change_of(&pending.op);
                if pending.op.file != FileId::Base {
                    under_way[pending.op.file as usize].extend(change);
                }
            }
            Remains { disks: std::mem::take(&mut inner.disks), under_way }
        };
        self.end();
        remains
    }

    /// The session is over: what the queues still hold is dropped, as when a process ends.
    pub fn end(&self) {
        for queue in self.queues.take() {
            queue.abandon();
        }
        let mut inner = self.inner.borrow_mut();
        inner.pending.clear();
        inner.done.clear();
        inner.own_done.clear();
    }
}

impl Inner {
    /// The disk of a file; the base has none, and needs none.
    fn disk_of(&mut self, file: FileId) -> &mut Disk {
        &mut self.disks[usize::from(file == FileId::Data)]
    }

    /// Adds an event to the hash and, where one is kept, to the text.
    fn note(&mut self, what: u64, numbers: [u64; 4], text: impl FnOnce() -> String) {
        let mut hash = self.hash ^ what ^ self.now << 8;
        for number in numbers {
            hash = (hash.rotate_left(23) ^ number).wrapping_mul(0x9fb2_1c65_1e98_df25);
        }
        self.hash = hash ^ hash >> 29;
        self.say(text);
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        if self.setup.trace {
            self.trace.push(format!("{:>12} {}", self.now, text()));
        }
    }
}
