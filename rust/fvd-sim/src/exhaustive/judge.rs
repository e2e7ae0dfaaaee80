// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest finds on a file that a power cut left: a read-only open and a recovery, which must
//! agree, and recoveries that are cut themselves.
//!
//! What a file shows depends on its bytes alone, so each is opened once, however many cuts leave
//! it; whether the oracle allows what it shows is asked of every cut. Recovery neither reads nor
//! writes guest data – which is checked whenever one runs –, so that files with the same metadata
//! are recovered alike, and only one of them is cut in the middle of it.

use super::tear::{Cut, Hashed};
use super::{Stage, alphabet};
use crate::checker::{Checker, Mode};
use crate::content::{self, BASE, FIRST_WRITE, SECTOR, ZERO};
use crate::memory::Buf;
use crate::store::{PAGE, Store};
use crate::world::World;
use fvd_engine::host::{FileId, OpKind};
use fvd_engine::{Repair, Reply, Request};
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::{Header, PageZero};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Number of a cell's content: its bit in a mask of what is allowed.
type Code = u8;
/// Whether these file bytes are metadata, where a cut may destroy whole pages. Regions that no header
/// names yet count as data.
pub fn is_metadata(header: &Header, at: u64, len: u64) -> bool {
    let beyond = !header.is_compact() && at >= header.flat_data_end();
    at + len <= header.data_offset || beyond || header.regions.iter().flatten().any(|r| r.offset <= at && at + len <= r.end())
}

/// Content that nobody wrote.
const NOISE: Code = 255;
const SHARDS: u64 = 64;

/// What a file shows the guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shown {
    /// The code of each cell.
    pub cells: Vec<Code>,
    /// The header names the longer base.
    pub long: bool,
    /// Growth step of a compact image.
    pub grow_unit: u64,
}

/// What all threads know of files they have seen.
#[derive(Default)]
pub struct Known {
    shown: Vec<Mutex<HashMap<u64, Arc<Shown>>>>,
    contents: Mutex<BTreeMap<Shown, Arc<Shown>>>,
    first: Vec<Mutex<HashSet<u64>>>,
    recovered: Mutex<HashSet<u64>>,
    /// Files opened: read-only, and recovered.
    pub opened: AtomicU64,
    /// Writable opens that recovered an image that was not closed.
    pub recoveries: AtomicU64,
    /// Distinct files that a cut in recovery left, by metadata recovered.
    pub second: AtomicU64,
    /// Crash points in recoveries.
    pub second_cuts: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Known {
    /// Nothing is known.
    pub fn new() -> Self {
        let shards = || 0..SHARDS;
        Self { shown: shards().map(|_| Mutex::default()).collect(), first: shards().map(|_| Mutex::default()).collect(), ..Self::default() }
    }

    fn recall(&self, hash: u64) -> Option<Arc<Shown>> {
        lock(&self.shown[(hash % SHARDS) as usize]).get(&hash).cloned()
    }

    fn learn(&self, hash: u64, shown: Shown) -> Arc<Shown> {
        let shared = lock(&self.contents).entry(shown.clone()).or_insert_with(|| Arc::new(shown)).clone();
        lock(&self.shown[(hash % SHARDS) as usize]).insert(hash, shared.clone());
        shared
    }

    /// Distinct files that a cut in a sequence left.
    pub fn distinct(&self) -> u64 {
        self.first.iter().map(|shard| lock(shard).len() as u64).sum()
    }

    /// Distinct metadata recovered.
    pub fn metadata(&self) -> u64 {
        lock(&self.recovered).len() as u64
    }
}

/// What a cut may leave: a mask of codes for each cell, the sizes, the names of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Of each cell, as far as the disk may reach.
    pub cells: Vec<u64>,
    /// Cells of the disk.
    pub sizes: [u64; 2],
    /// The shorter base; the longer.
    pub bases: [bool; 2],
    /// Growth steps.
    pub grow_units: Vec<u64>,
}

/// The code of content `tag`.
pub fn code(tag: content::Tag) -> Code {
    match tag {
        ZERO => 0,
        BASE => 1,
        tag if (FIRST_WRITE..FIRST_WRITE + 60).contains(&tag) => (tag - FIRST_WRITE + 2) as Code,
        _ => NOISE,
    }
}

impl Allowed {
    /// Whether the guest may find `shown` after the cut.
    pub fn check(&self, shown: &Shown) -> Result<(), String> {
        if !self.sizes.contains(&(shown.cells.len() as u64)) {
            return Err(format!("the disk has {} cells, not one of {:?}", shown.cells.len(), self.sizes));
        }
        if !self.bases[usize::from(shown.long)] {
            return Err(format!("the header names the {} base", if shown.long { "longer" } else { "shorter" }));
        }
        if !self.grow_units.contains(&shown.grow_unit) {
            return Err(format!("the image grows by {} bytes, not by one of {:?} (CC-37)", shown.grow_unit, self.grow_units));
        }
        let base_cells = if shown.long { alphabet::LONG } else { alphabet::SHORT };
        for (cell, (found, allowed)) in shown.cells.iter().zip(&self.cells).enumerate() {
            // Where the base has ended, what is in the base reads as zero.
            let zero_by_base = *found == code(ZERO) && allowed >> code(BASE) & 1 == 1 && cell as u64 >= base_cells;
            if *found == NOISE || (allowed >> found & 1 == 0 && !zero_by_base) {
                return Err(format!("cell {cell} shows {} (C4), allowed is {}", name(*found), self.names(cell)));
            }
        }
        Ok(())
    }

    fn names(&self, cell: usize) -> String {
        (0..64).filter(|bit| self.cells[cell] >> bit & 1 == 1).map(name).collect::<Vec<_>>().join(" or ")
    }
}

fn name(code: Code) -> String {
    match code {
        0 => "zero".into(),
        1 => "the base".into(),
        NOISE => "noise".into(),
        n => format!("write {}.{}", (n - 2) / 2 + 1, (n - 2) % 2 + 1),
    }
}

/// Judges files: one for each thread.
pub struct Judge<'a> {
    stage: &'a Stage,
    known: &'a Known,
}

type Verdict<T> = Result<T, String>;

/// The header that counts in `store`.
pub fn header_of(store: &Store) -> Verdict<Header> {
    let page = |at: u64| store.bytes(at, PAGE);
    let zero = PageZero::decode(&page(0)).map_err(|error| format!("page 0 of the image: {error}"))?;
    Header::choose(&zero.uuid, &page(HEADER_OFFSETS[0]), &page(HEADER_OFFSETS[1])).map_err(|error| format!("the image has no header: {error}"))
}

impl<'a> Judge<'a> {
    /// A judge.
    pub fn new(stage: &'a Stage, known: &'a Known) -> Self {
        Self { stage, known }
    }

    /// A file that a cut in a sequence left; must show something that is `allowed`.
    pub fn judge(&self, file: &Hashed, allowed: &Allowed) -> Verdict<()> {
        let is_new = lock(&self.known.first[(file.hash % SHARDS) as usize]).insert(file.hash);
        let shown = match self.known.recall(file.hash) {
            Some(shown) => shown,
            None => self.open(file)?,
        };
        allowed.check(&shown)?;
        if is_new { self.cut_recovery(file, &shown) } else { Ok(()) }
    }

    /// What a file shows that was not seen before: read-only and after recovery.
    fn open(&self, file: &Hashed) -> Verdict<Arc<Shown>> {
        self.known.opened.fetch_add(1, Ordering::Relaxed);
        let header = header_of(&file.store)?;
        let looked = self.look(file, &header)?;
        let recovered = self.recover(file, &header, &mut |_| Ok(()))?;
        if looked != recovered {
            return Err(format!("a read-only open shows {looked:?}, recovery {recovered:?}"));
        }
        Ok(self.known.learn(file.hash, recovered))
    }

    /// A read-only open; the checker of the world sees that it changes nothing (CC-31).
    fn look(&self, file: &Hashed, header: &Header) -> Verdict<Shown> {
        let mut setup = self.stage.setup(file.store.clone(), header.base_name == "long", false);
        setup.config.read_only = true;
        let world = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let opened = world.request(0, Request::Open).ok_or("a read-only open hangs")?;
        opened.map_err(|error| format!("a read-only open fails: {error}"))?;
        let shown = read_all(&world, header)?;
        check(&world)?;
        world.request(0, Request::Close).ok_or("a read-only close hangs")?.map_err(|error| format!("a read-only close fails: {error}"))?;
        leave(&world)?;
        Ok(shown)
    }

    /// A writable open; `at_step` is called at each crash point of it, and at its end.
    fn recover(&self, file: &Hashed, header: &Header, at_step: &mut dyn FnMut(&World) -> Verdict<()>) -> Verdict<Shown> {
        let setup = self.stage.setup(file.store.clone(), header.base_name == "long", false);
        let world = World::new(setup, Checker::new(Mode::Damaged, None));
        world.submit(0, Request::Open, 0);
        let outcome = loop {
            let touches = |(kind, file, offset, len): &(OpKind, FileId, u64, u64)| {
                *file == FileId::Image && *len > 0 && *kind != OpKind::Truncate && !is_metadata(header, *offset, *len)
            };
            if let Some(op) = world.under_way().iter().find(|op| touches(op)) {
                return Err(format!("recovery touches guest data: {op:?}"));
            }
            at_step(&world)?;
            if let Some((_, outcome)) = world.take_done() {
                break outcome;
            }
            if !world.step() {
                return Err("an open hangs".into());
            }
        };
        outcome.map_err(|error| format!("the image does not open: {error} (C4)"))?;
        let clean = world.image().info().map_err(|error| error.to_string())?.was_clean;
        self.known.recoveries.fetch_add(u64::from(!clean), Ordering::Relaxed);
        let shown = read_all(&world, header)?;
        check(&world)?;
        leave(&world)?;
        Ok(shown)
    }

    /// Cuts the recovery of a file at each of its operations: what is left must show the same.
    fn cut_recovery(&self, file: &Hashed, shown: &Shown) -> Verdict<()> {
        let header = header_of(&file.store)?;
        let moved = header.is_compact() && header.regions_end() > header.data_offset;
        let end = if header.is_compact() { u64::MAX } else { header.flat_data_end() };
        let metadata = if moved { file.hash } else { file.hash_without(header.data_offset, end) };
        if !lock(&self.known.recovered).insert(metadata) {
            return Ok(());
        }
        let mut left: BTreeMap<u64, Hashed> = BTreeMap::new();
        let mut cuts = 0;
        let mut before = None;
        let mut seen = BTreeSet::new();
        self.recover(file, &header, &mut |world| {
            cuts += 1;
            let under_way = world.changes_under_way();
            let disk = world.disk();
            let state = (disk.mark() - disk.unflushed().len() as u64, disk.mark(), world.under_way());
            if before.as_ref() == Some(&state) {
                return Ok(());
            }
            before = Some(state);
            let changes: Vec<_> = disk.unflushed().iter().cloned().chain(under_way).collect();
            let stable = Hashed::new(disk.stable.clone());
            Cut::new(&changes, |at, len| is_metadata(&header, at, len)).each(&stable, &mut |file, _| {
                if seen.insert(file.hash) {
                    left.insert(file.hash, file.clone());
                }
                Ok(())
            })
        })?;
        self.known.second_cuts.fetch_add(cuts, Ordering::Relaxed);
        self.known.second.fetch_add(left.len() as u64, Ordering::Relaxed);
        for file in left.values() {
            let again = match self.known.recall(file.hash) {
                Some(again) => again,
                None => self.open(file).map_err(|text| format!("after a cut in recovery: {text}"))?,
            };
            if *again != *shown {
                return Err(format!("after a cut in recovery the disk shows {again:?}, without {shown:?}"));
            }
        }
        Ok(())
    }
}

/// Everything the guest can read.
fn read_all(world: &Rc<World>, header: &Header) -> Verdict<Shown> {
    let buf = Buf::new(vec![0xee; header.virtual_size as usize], 0);
    let outcome = world.request(0, Request::Read { offset: 0, buf: buf.clone() }).ok_or("a read hangs")?;
    outcome.map_err(|error| format!("a read fails: {error}"))?;
    let cell = |(i, bytes): (usize, &[u8])| {
        let tag = content::claimed(bytes);
        let right = content::matches(tag, i as u64, bytes);
        if right { code(tag) } else { NOISE }
    };
    let cells = buf.with(|bytes| bytes.chunks_exact(SECTOR).enumerate().map(cell).collect());
    Ok(Shown { cells, long: header.base_name == "long", grow_unit: header.storage_grow_unit })
}

fn check(world: &Rc<World>) -> Verdict<()> {
    let report: Reply = world.request(0, Request::Check { repair: Repair::None }).ok_or("a check hangs")?.map_err(|error| format!("a check fails: {error}"))?;
    crate::guest::check_report(world, &report);
    Ok(())
}

fn leave(world: &Rc<World>) -> Verdict<()> {
    world.end();
    world.violation().map_or(Ok(()), Err)
}
