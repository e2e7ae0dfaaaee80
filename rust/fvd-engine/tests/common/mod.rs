// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small simulated world for tests: a disk with a volatile write cache, operations completed in
//! an order drawn from a seed, power cuts that keep any subset of unflushed writes torn at 512
//! bytes, and an oracle that knows which values each sector may have (C4).
#![allow(dead_code)]

pub mod sim;

use fvd_engine::host::*;
use fvd_engine::{Config, Error, Image, Queue, Reply, Request};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub const SECTOR: usize = 512;
pub const EIO: i64 = -5;
pub const ENOSPC: i64 = -28;
pub const ENOMEDIUM: i64 = -123;

/// xorshift64*: stable across releases of everything.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Guest memory of a test.
#[derive(Clone, Debug)]
pub struct Buf(pub Rc<RefCell<Vec<u8>>>);

impl Buf {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Rc::new(RefCell::new(bytes)))
    }
}

impl GuestBuf for Buf {
    fn len(&self) -> usize {
        self.0.borrow().len()
    }
    fn is_aligned(&self, at: usize, len: usize, alignment: usize) -> bool {
        at.is_multiple_of(alignment) && len.is_multiple_of(alignment)
    }
    fn zero(&self, at: usize, len: usize) {
        self.0.borrow_mut()[at..at + len].fill(0);
    }
    fn fill(&self, at: usize, from: &[u8]) {
        self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
    }
    fn read(&self, at: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0.borrow()[at..at + to.len()]);
    }
}

enum Change {
    Bytes(u64, Vec<u8>),
    Zero(u64, u64),
    Length(u64),
}

/// Bytes of a file, most of them zero; clones share their pages.
#[derive(Clone, Default)]
pub struct Store {
    pages: BTreeMap<u64, Rc<[u8; 4096]>>,
    pub len: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({} bytes)", self.len)
    }
}

impl Store {
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let mut at = 0;
        while at < to.len() {
            let (page, within) = ((offset + at as u64) / 4096, (offset as usize + at) % 4096);
            let n = (to.len() - at).min(4096 - within);
            match self.pages.get(&page) {
                Some(bytes) => to[at..at + n].copy_from_slice(&bytes[within..within + n]),
                None => to[at..at + n].fill(0),
            }
            at += n;
        }
    }

    pub fn write(&mut self, offset: u64, from: &[u8]) {
        let mut at = 0;
        while at < from.len() {
            let (page, within) = ((offset + at as u64) / 4096, (offset as usize + at) % 4096);
            let n = (from.len() - at).min(4096 - within);
            let bytes = self.pages.entry(page).or_insert_with(|| Rc::new([0; 4096]));
            Rc::make_mut(bytes)[within..within + n].copy_from_slice(&from[at..at + n]);
            at += n;
        }
        self.len = self.len.max(offset + from.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(4096 - at % 4096);
            if n == 4096 {
                self.pages.remove(&(at / 4096));
            } else if self.pages.contains_key(&(at / 4096)) {
                self.write(at, &vec![0; n as usize]);
            }
            at += n;
        }
        self.len = self.len.max(offset + len);
    }

    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Bytes(offset, bytes) => self.write(*offset, bytes),
            Change::Zero(offset, len) => self.zero(*offset, *len),
            Change::Length(len) => self.resize(*len),
        }
    }
}

/// A disk with a volatile cache: `view` is what reads see, `stable` what a cut is sure to leave.
pub struct Disk {
    pub stable: Store,
    pub view: Store,
    unflushed: Vec<Change>,
    /// Where guest data begins: below it a cut may destroy whole 4 KiB pages that were being
    /// written, as devices with larger sectors do.
    pub data_offset: u64,
}

impl Disk {
    pub fn new(bytes: Store) -> Self {
        Self { view: bytes.clone(), stable: bytes, unflushed: Vec::new(), data_offset: 0 }
    }

    fn change(&mut self, change: Change) {
        self.view.apply(&change);
        self.unflushed.push(change);
    }

    /// Power cut: any subset of what was not flushed survives, in any sector-wise mixture.
    pub fn cut(&mut self, rng: &mut Rng) {
        let mode = rng.below(6);
        for change in std::mem::take(&mut self.unflushed) {
            match change {
                Change::Bytes(offset, bytes) if mode == 5 && offset + bytes.len() as u64 <= self.data_offset => {
                    for (i, page) in bytes.chunks(4096).enumerate() {
                        let at = offset + (i * 4096) as u64;
                        match rng.below(3) {
                            0 => self.stable.write(at, page),
                            1 => self.stable.write(at, &vec![0xdb; page.len()]),
                            _ => {}
                        }
                    }
                }
                Change::Bytes(offset, bytes) if mode >= 3 => {
                    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                        if rng.chance(if mode == 3 { 50 } else { 90 }) {
                            self.stable.write(offset + (i * SECTOR) as u64, sector);
                        }
                    }
                }
                change if mode == 1 || (mode >= 2 && rng.chance(50)) => self.stable.apply(&change),
                _ => {}
            }
        }
        self.view = self.stable.clone();
    }

    fn flush(&mut self, upto: usize) {
        for change in self.unflushed.drain(..upto) {
            self.stable.apply(&change);
        }
    }
}

pub type Token64 = u64;

/// What the test wants the host to do wrong: operation number → errno.
#[derive(Default)]
pub struct Plan {
    pub fail_at: Option<u64>,
    pub fail_ever: bool,
    pub errno: i64,
    pub cut_at: Option<u64>,
}

pub struct World {
    pub disk: RefCell<Disk>,
    /// The data file, where there is one.
    pub data: RefCell<Option<Disk>>,
    pub base: Option<Vec<u8>>,
    pub rng: RefCell<Rng>,
    pub pending: RefCell<Vec<(Token64, HostOp<Buf>, usize)>>,
    pub ops: Cell<u64>,
    pub plan: RefCell<Plan>,
    pub now: Cell<u64>,
    pub timer: Cell<u64>,
    pub results: RefCell<Vec<(u64, Result<Reply, Error>)>>,
    pub log: RefCell<Vec<String>>,
    pub counts: RefCell<Counts>,
    /// Operations performed, in order of completion.
    pub trace: RefCell<Vec<Traced>>,
    pub limits: Limits,
    /// Cheap zeroing is refused, whatever the limits say.
    pub zeroing_is_dear: Cell<bool>,
}

/// One operation the host performed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    pub kind: OpKind,
    pub file: FileId,
    pub offset: u64,
    pub len: u64,
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counts {
    pub writes: u64,
    pub bytes_written: u64,
    pub reads: u64,
    pub syncs: u64,
}

pub struct TestHost(pub Rc<World>);
pub struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

impl Host for TestHost {
    type Buf = Buf;
    type Done = u64;

    fn submit(&self, token: Token, op: HostOp<Buf>) {
        let align = u64::from(self.0.limits.request_alignment);
        if matches!(op.kind, OpKind::Read | OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard) {
            assert!(op.offset % align == 0 && op.len % align == 0 && op.len > 0, "misaligned host request {op:?}");
        }
        assert!(op.file != FileId::Base || matches!(op.kind, OpKind::Read | OpKind::GetLength | OpKind::BaseStatus), "{op:?}");
        for segment in &op.segments {
            if let (Segment::Guest { buf, at, len }, true) = (segment, op.file != FileId::Base) {
                assert!(buf.is_aligned(*at, *len, self.0.limits.memory_alignment as usize), "misaligned memory {op:?}");
            }
        }
        if !op.segments.is_empty() {
            assert_eq!(op.segments.iter().map(|s| s.len() as u64).sum::<u64>(), op.len);
        }
        // A flush covers what was complete when it was issued.
        let issued = match (op.file, &*self.0.data.borrow()) {
            (FileId::Data, Some(data)) => data.unflushed.len(),
            _ => self.0.disk.borrow().unflushed.len(),
        };
        self.0.pending.borrow_mut().push((token, op, issued));
    }
    fn done(&self, done: u64, result: Result<Reply, Error>) {
        self.0.results.borrow_mut().push((done, result));
    }
    fn now_ns(&self) -> u64 {
        self.0.now.get()
    }
    fn random(&self, to: &mut [u8]) {
        for byte in to {
            *byte = self.0.rng.borrow_mut().next() as u8;
        }
    }
    fn set_timer(&self, at_ns: u64) {
        self.0.timer.set(at_ns);
    }
    fn low_space(&self, free: u64, wanted: u64) {
        self.0.log.borrow_mut().push(format!("low space: {free} of {wanted}"));
    }
    fn log(&self, _: LogLevel, text: &str) {
        self.0.log.borrow_mut().push(text.to_owned());
    }
}

impl World {
    pub fn new(bytes: Store, base: Option<Vec<u8>>, seed: u64, limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            disk: RefCell::new(Disk::new(bytes)),
            data: RefCell::default(),
            base,
            rng: RefCell::new(Rng::new(seed)),
            pending: RefCell::default(),
            ops: Cell::new(0),
            plan: RefCell::default(),
            now: Cell::new(0),
            timer: Cell::new(u64::MAX),
            results: RefCell::default(),
            log: RefCell::default(),
            counts: RefCell::default(),
            trace: RefCell::default(),
            limits,
            zeroing_is_dear: Cell::new(false),
        })
    }

    pub fn queue(self: &Rc<Self>, mut config: Config) -> Rc<Queue<TestHost>> {
        (config.limits[0], config.limits[1]) = (self.limits, self.limits);
        config.limits[2] = Limits { request_alignment: self.limits.request_alignment, ..Limits::default() };
        Queue::new(Image::new(config), TestHost(self.clone()), Box::new(NoWake))
    }

    fn perform(&self, op: &mut HostOp<Buf>, issued: usize) -> i64 {
        let (mut image, mut data) = (self.disk.borrow_mut(), self.data.borrow_mut());
        let disk = match (op.file, &mut *data) {
            (FileId::Data, Some(data)) => data,
            (FileId::Data, None) => return ENOMEDIUM,
            _ => &mut *image,
        };
        let mut counts = self.counts.borrow_mut();
        self.trace.borrow_mut().push(Traced { kind: op.kind, file: op.file, offset: op.offset, len: op.len });
        let file_len = if op.file == FileId::Base {
            match &self.base {
                None => return ENOMEDIUM,
                Some(base) => base.len() as u64,
            }
        } else {
            disk.view.len
        };
        match op.kind {
            OpKind::Read => {
                counts.reads += 1;
                let mut at = op.offset as usize;
                for segment in &mut op.segments {
                    let len = segment.len();
                    let mut bytes = vec![0; len];
                    match &self.base {
                        Some(base) if op.file == FileId::Base => {
                            let have = base.len().saturating_sub(at).min(len);
                            bytes[..have].copy_from_slice(&base[at.min(base.len())..][..have]);
                        }
                        _ => disk.view.read(at as u64, &mut bytes),
                    }
                    match segment {
                        Segment::Guest { buf, at, .. } => buf.fill(*at, &bytes),
                        Segment::Own { buf, at, .. } => buf.write(*at, &bytes),
                    }
                    at += len;
                }
                0
            }
            OpKind::Write { .. } => {
                let mut bytes = Vec::new();
                for segment in &op.segments {
                    match segment {
                        Segment::Guest { buf, at, len } => bytes.extend_from_slice(&buf.0.borrow()[*at..*at + *len]),
                        Segment::Own { buf, at, len } => bytes.extend(buf.to_vec(*at, *len)),
                    }
                }
                counts.writes += 1;
                counts.bytes_written += bytes.len() as u64;
                disk.change(Change::Bytes(op.offset, bytes));
                0
            }
            OpKind::ZeroCheaply if self.zeroing_is_dear.get() => -95,
            OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard => {
                disk.change(Change::Zero(op.offset, op.len));
                0
            }
            OpKind::Flush => {
                counts.syncs += 1;
                let upto = issued.min(disk.unflushed.len());
                disk.flush(upto);
                // Flushes in flight have counted the same changes.
                for (_, other, issued) in self.pending.borrow_mut().iter_mut() {
                    if other.kind == OpKind::Flush && other.file == op.file {
                        *issued = issued.saturating_sub(upto);
                    }
                }
                0
            }
            OpKind::Truncate => {
                disk.change(Change::Length(op.offset));
                0
            }
            OpKind::GetLength => file_len as i64,
            OpKind::BaseStatus => op.len.min(file_len.saturating_sub(op.offset).max(1)) as i64 | STATUS_DATA,
        }
    }

    /// Completes one operation, drawn from the seed. False if there is none, or the power went.
    pub fn step(&self, queue: &Rc<Queue<TestHost>>) -> bool {
        self.step_where(queue, |_| true)
    }

    /// The same, for operations that `may` end now: the others stay on their way.
    pub fn step_where(&self, queue: &Rc<Queue<TestHost>>, may: impl Fn(&HostOp<Buf>) -> bool) -> bool {
        let able: Vec<usize> = self.pending.borrow().iter().enumerate().filter(|(_, p)| may(&p.1)).map(|(i, _)| i).collect();
        let count = able.len();
        if count == 0 {
            return false;
        }
        let number = self.ops.get();
        if self.plan.borrow().cut_at.is_some_and(|at| number >= at) {
            return false;
        }
        self.ops.set(number + 1);
        self.now.set(self.now.get() + 1000);
        let pick = self.rng.borrow_mut().below(count as u64) as usize;
        let (token, mut op, issued) = self.pending.borrow_mut().remove(able[pick]);
        let fails = {
            let plan = self.plan.borrow();
            plan.fail_at.is_some_and(|at| number == at || (plan.fail_ever && number > at))
        };
        let ret = if fails {
            if op.kind == OpKind::Flush {
                // A failed flush drops what it was to write.
                let mut disk = self.disk.borrow_mut();
                let issued = issued.min(disk.unflushed.len());
                disk.unflushed.drain(..issued);
                for (_, other, issued_other) in self.pending.borrow_mut().iter_mut() {
                    if other.kind == OpKind::Flush {
                        *issued_other = issued_other.saturating_sub(issued);
                    }
                }
            }
            self.plan.borrow().errno
        } else {
            self.perform(&mut op, issued)
        };
        assert!(queue.complete(token, ret, op), "the engine knows its operations");
        true
    }

    /// The power goes. What was on its way may have reached the disk in part.
    pub fn cut(&self, rng: &mut Rng) {
        for (_, mut op, issued) in self.pending.take() {
            if op.file == FileId::Image && matches!(op.kind, OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard) {
                self.perform(&mut op, issued);
            }
        }
        self.disk.borrow_mut().cut(rng);
    }

    /// Runs until nothing is left to do; false after a cut.
    pub fn drain(&self, queue: &Rc<Queue<TestHost>>) -> bool {
        queue.run();
        while self.step(queue) {
            queue.run();
        }
        if !self.pending.borrow().is_empty() {
            return false;
        }
        assert!(queue.is_idle(), "the engine waits for nothing: {:?}", self.log.borrow());
        true
    }

    /// One request, to its end. `None` after a cut.
    pub fn request(&self, queue: &Rc<Queue<TestHost>>, request: Request<Buf>) -> Option<Result<Reply, Error>> {
        let id = u64::MAX;
        queue.submit(request, id);
        self.drain(queue);
        let mut results = self.results.borrow_mut();
        let at = results.iter().position(|r| r.0 == id)?;
        Some(results.remove(at).1)
    }
}

/// The content of a sector: derived from a tag, which identifies the write.
pub fn sector(tag: u64, index: u64) -> Vec<u8> {
    if tag == 0 {
        return vec![0; SECTOR];
    }
    let mut out = Vec::with_capacity(SECTOR);
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&index.to_le_bytes());
    let mut rng = Rng::new(tag ^ index << 32);
    while out.len() < SECTOR {
        out.extend_from_slice(&rng.next().to_le_bytes());
    }
    out
}

pub fn pattern(tag: u64, first_sector: u64, sectors: u64) -> Vec<u8> {
    (first_sector..first_sector + sectors).flat_map(|s| sector(tag, s)).collect()
}

/// A base whose every sector differs, with some zero runs.
pub fn base_image(sectors: u64) -> Vec<u8> {
    (0..sectors).flat_map(|s| sector(if s / 16 % 4 == 3 { 0 } else { 1 }, s)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Version {
    tag: u64,
    begun: u64,
    done: u64,
}

/// Which values each sector may have.
pub struct Oracle {
    sectors: Vec<Vec<Version>>,
    clock: u64,
}

const NEVER: u64 = u64::MAX;

impl Oracle {
    pub fn new(sectors: u64, base: Option<&[u8]>) -> Self {
        let tag = |s: u64| match base {
            Some(base) if (s as usize + 1) * SECTOR <= base.len() => u64::from(base[s as usize * SECTOR..][..SECTOR].iter().any(|&b| b != 0)),
            _ => 0,
        };
        Self { sectors: (0..sectors).map(|s| vec![Version { tag: tag(s), begun: 0, done: 0 }]).collect(), clock: 1 }
    }

    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn grow(&mut self, sectors: u64) {
        self.sectors.resize(sectors as usize, vec![Version { tag: 0, begun: 0, done: 0 }]);
    }

    pub fn begin_write(&mut self, tag: u64, first: u64, count: u64) {
        let begun = self.tick();
        for s in first..first + count {
            self.sectors[s as usize].push(Version { tag, begun, done: NEVER });
        }
    }

    pub fn end_write(&mut self, tag: u64, first: u64, count: u64) {
        let done = self.tick();
        for s in first..first + count {
            for v in self.sectors[s as usize].iter_mut().filter(|v| v.tag == tag && v.done == NEVER) {
                v.done = done;
            }
        }
    }

    /// Zeroes: like a write of tag 0 (several may be in flight).
    pub fn end_zero(&mut self, begun: u64, first: u64, count: u64) {
        let done = self.tick();
        for s in first..first + count {
            for v in self.sectors[s as usize].iter_mut().filter(|v| v.tag == 0 && v.begun == begun) {
                v.done = done;
            }
        }
    }

    /// A discard is done: zero stays possible, and so does what was there before.
    pub fn end_discard(&mut self, begun: u64, first: u64, count: u64) {
        let done = self.tick();
        for s in first..first + count {
            let versions = &mut self.sectors[s as usize];
            for v in versions.iter_mut().filter(|v| v.tag == 0 && v.begun == begun) {
                // It supersedes nothing, but a later write supersedes it.
                (v.begun, v.done) = (0, done);
            }
        }
    }

    /// A FUA write of `tag` is durable: what was complete before it began is gone. Writes that
    /// came in between may have missed its flush.
    pub fn flushed_range(&mut self, first: u64, count: u64, tag: u64) {
        for s in first..first + count {
            let versions = &mut self.sectors[s as usize];
            if let Some(begun) = versions.iter().find(|v| v.tag == tag).map(|v| v.begun) {
                versions.retain(|v| v.done >= begun);
            }
        }
    }

    pub fn now(&self) -> u64 {
        self.clock
    }

    /// A flush that began at `begun` is complete: versions superseded by then are gone.
    pub fn flushed(&mut self, begun: u64) {
        for versions in &mut self.sectors {
            Self::prune(versions, begun);
        }
    }

    fn prune(versions: &mut Vec<Version>, upto: u64) {
        let newest = versions.iter().filter(|v| v.done <= upto).map(|v| v.begun).max().unwrap_or(0);
        versions.retain(|v| v.done >= newest);
    }

    /// What a read that begins now may find in each of `count` sectors; later writes come on top.
    pub fn begin_read(&mut self, first: u64, count: u64) -> Vec<Vec<u64>> {
        let now = self.tick();
        let tags = |s: u64| {
            let mut versions = self.sectors[s as usize].clone();
            Self::prune(&mut versions, now);
            versions.iter().map(|v| v.tag).collect()
        };
        (first..first + count).map(tags).collect()
    }

    /// Whether a read may return `bytes` for sector `s`, given what it could find at its begin.
    pub fn may_read(&self, s: u64, at_begin: &[u64], bytes: &[u8]) -> bool {
        let later = self.sectors[s as usize].iter().map(|v| v.tag);
        at_begin.iter().copied().chain(later).any(|tag| sector(tag, s) == bytes)
    }

    /// Whether sector `s` may be `bytes` after a crash; from then on it is.
    pub fn settle(&mut self, s: u64, bytes: &[u8]) -> bool {
        let Some(v) = self.sectors[s as usize].iter().find(|v| sector(v.tag, s) == bytes).copied() else { return false };
        self.sectors[s as usize] = vec![Version { tag: v.tag, begun: 0, done: 0 }];
        true
    }

    pub fn explain(&self, s: u64) -> String {
        format!("sector {s} may be {:?}", self.sectors[s as usize])
    }
}

pub fn image_of(queue: &Rc<Queue<TestHost>>) -> Arc<Image> {
    queue.image().clone()
}
