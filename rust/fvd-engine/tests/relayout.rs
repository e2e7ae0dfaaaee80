// SPDX-License-Identifier: MIT OR Apache-2.0
//! Regions built anew (CC-34, CC-40): a bitmap made, enlarged, emptied, metadata moved for growth. One
//! script of requests, one at a time, cut at every host operation; the disk must be as before or
//! as after the request that was cut.

mod common;

use common::sim::*;
use common::*;
use fvd_engine::faults::Fault;
use fvd_engine::host::{FileId, Limits, OpKind};
use fvd_engine::{Config, Kind, Request};
use fvd_format::RegionKind;
use fvd_format::header::HEADER_OFFSETS;
use std::rc::Rc;

/// Guest block: 4 KiB.
const BLOCK: usize = 4096;
/// The base is recorded with an end within a block.
const BASE_SHORT: usize = 20 * BLOCK + 1024;
const BASE_LONG: usize = 90 * BLOCK;
const DISK: u64 = 64 * BLOCK as u64 - 512;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, usize, usize),
    Rebase,
    Grow(u64),
    Shrink(u64),
    Empty,
    Reopen,
}

/// Everything once, and again on what it leaves behind.
const SCRIPT: &[Step] = &[
    Step::Write(2, 3, 5),
    Step::Write(3, 300, 9),
    Step::Rebase,
    Step::Write(4, 30, 11),
    Step::Grow(DISK + 5 * BLOCK as u64),
    Step::Write(5, 505, 20),
    Step::Reopen,
    Step::Write(6, 1, 1),
    Step::Empty,
    Step::Write(7, 9, 3),
    Step::Grow(DISK + 400 * BLOCK as u64),
    Step::Write(8, 510, 2000),
    Step::Empty,
    Step::Write(9, 22, 700),
    Step::Shrink(DISK - 7 * BLOCK as u64 - 512),
    Step::Write(10, 400, 30),
    Step::Shrink(2 * BLOCK as u64 + 1024),
    Step::Reopen,
    Step::Write(11, 13, 5),
    Step::Grow(DISK + 100 * BLOCK as u64),
    Step::Write(12, 30, 9),
];

/// As in the images of [`base_image`], but nowhere zero.
fn base() -> Vec<u8> {
    (0..(BASE_LONG / SECTOR) as u64).flat_map(|s| sector(1, s)).collect()
}

/// A disk whose regions end where its data begins: new ones find their place behind it only.
fn tight(size: u64) -> fvd_engine::CreateParams {
    fvd_engine::CreateParams { journal_size: 1664 * KIB, ..over_base(size) }
}

struct Script {
    base: Vec<u8>,
    limits: Limits,
    fault: Option<Fault>,
    /// What the disk holds, and what it may hold instead while a step is on its way.
    now: Vec<u8>,
    next: Vec<u8>,
}

impl Script {
    /// A disk over the short base, as recorded; `named`: or over one of unknown length; and what it holds.
    fn create(&mut self, named: bool) -> Store {
        let there = (!named).then(|| self.base[..BASE_SHORT].to_vec());
        let seen = if named { &self.base[..] } else { &self.base[..BASE_SHORT] };
        self.now = vec![0; DISK as usize];
        let n = seen.len().min(self.now.len());
        self.now[..n].copy_from_slice(&seen[..n]);
        self.next = self.now.clone();
        create(tight(DISK), there, self.limits).unwrap()
    }

    fn open(&self, bytes: &Store, seed: u64, read_only: bool) -> (Rc<World>, Rc<fvd_engine::Queue<TestHost>>) {
        let world = World::new(bytes.clone(), Some(self.base.clone()), seed, self.limits);
        let queue = world.queue(Config { fault: self.fault, read_only, ..Config::default() });
        (world, queue)
    }

    /// Runs the script from `bytes` and cuts at host operation `cut`. `None` if it ended before.
    fn run(&mut self, bytes: Store, seed: u64, cut: u64) -> Option<Store> {
        let (mut world, mut queue) = self.open(&bytes, seed, false);
        let mut done = 0;
        for step in [None].into_iter().chain(SCRIPT.iter().map(Some)).chain([Some(&Step::Reopen)]) {
            world.plan.borrow_mut().cut_at = Some(cut - done);
            let requests = match step {
                None => vec![Request::Open],
                Some(&Step::Write(tag, first, count)) => {
                    self.next[first * SECTOR..][..count * SECTOR].copy_from_slice(&pattern(tag, first as u64, count as u64));
                    let buf = Buf::new(pattern(tag, first as u64, count as u64));
                    vec![Request::Write { offset: (first * SECTOR) as u64, buf, fua: true }]
                }
                Some(Step::Rebase) => vec![Request::ChangeBase { name: "longer".into(), format: "raw".into() }],
                Some(&Step::Grow(size)) => {
                    self.next.resize(size as usize, 0);
                    vec![Request::Resize { size, zeroed: true }]
                }
                Some(&Step::Shrink(size)) => {
                    self.next.truncate(size as usize);
                    vec![Request::Resize { size, zeroed: false }]
                }
                Some(Step::Empty) => {
                    self.next.fill(0);
                    let n = self.next.len().min(BASE_LONG);
                    self.next[..n].copy_from_slice(&self.base[..n]);
                    vec![Request::MakeEmpty]
                }
                Some(Step::Reopen) => vec![Request::Close],
            };
            for request in requests {
                match world.request(&queue, request) {
                    Some(result) => result.map(|_| ()).unwrap_or_else(|e| panic!("{step:?}: {e}")),
                    None => return Some(self.cut(&world, queue, seed)),
                }
            }
            self.now = self.next.clone();
            if matches!(step, Some(Step::Reopen)) {
                done += world.ops.get();
                let stable = world.disk.borrow().stable.clone();
                self.verify(&stable, seed, "closing");
                (world, queue) = self.open(&stable, seed, false);
                world.plan.borrow_mut().cut_at = Some(cut - done);
                if world.request(&queue, Request::Open).map(|r| r.map(|_| ()).unwrap()).is_none() {
                    return Some(self.cut(&world, queue, seed));
                }
            }
        }
        None
    }

    fn cut(&mut self, world: &Rc<World>, queue: Rc<fvd_engine::Queue<TestHost>>, seed: u64) -> Store {
        // As in a process that was killed, nothing of it is dropped.
        std::mem::forget(queue);
        world.cut(&mut Rng::new(seed));
        let stable = world.disk.borrow().stable.clone();
        self.verify(&stable, seed, "a cut");
        stable
    }

    /// The disk is as it was, or as it was to become, sector by sector; read-only and recovering
    /// opens agree, and `check` finds nothing.
    fn verify(&self, bytes: &Store, seed: u64, when: &str) {
        let mut seen: Option<Vec<u8>> = None;
        for read_only in [true, false] {
            let (world, queue) = self.open(bytes, seed, read_only);
            world.request(&queue, Request::Open).unwrap().unwrap_or_else(|e| panic!("open after {when}: {e}"));
            let size = queue.image().info().unwrap().header.virtual_size as usize;
            assert!(size == self.now.len() || size == self.next.len(), "size {size}");
            let buf = Buf::new(vec![0xee; size]);
            world.request(&queue, Request::Read { offset: 0, buf: buf.clone() }).unwrap().unwrap();
            let found = buf.0.take();
            for (s, bytes) in found.chunks(SECTOR).enumerate() {
                let is = |of: &[u8]| of.get(s * SECTOR..(s + 1) * SECTOR).unwrap_or(&[0; SECTOR]) == bytes;
                assert!(is(&self.now) || is(&self.next), "after {when}: sector {s} is {:?}", &bytes[..16]);
            }
            let sim = Sim { world, queue };
            // A header copy may be torn, which only a writable open mends.
            let (corruptions, findings) = sim.check();
            let torn = read_only && findings.iter().all(|text| text.starts_with("header: copy"));
            assert!(corruptions == 0 || torn, "after {when}: {findings:?}");
            assert!(seen.get_or_insert_with(|| found.clone()) == &found, "read-only and recovering opens differ");
            sim.ask(Request::Close).unwrap();
        }
    }
}

/// Every cut of the script, `seeds` times each; stops at the first failure.
fn every_cut(fault: Option<Fault>, seeds: u64) -> Result<u64, String> {
    let mut cuts = 0;
    for (align, named) in [(512, false), (4096, true), (4096, false)] {
        for cut in 1.. {
            let mut ended = false;
            for seed in 0..seeds {
                let mut script =
                    Script { base: base(), limits: Limits { request_alignment: align, ..Limits::default() }, fault, now: Vec::new(), next: Vec::new() };
                let image = script.create(named);
                let run = || script.run(image, seed * 1000 + cut, cut);
                let result = if fault.is_some() { caught(run) } else { Ok(run()) };
                ended = result.map_err(|text| format!("align {align} named {named} cut {cut} seed {seed}: {text}"))?.is_none();
                cuts += 1;
            }
            if ended {
                break;
            }
        }
    }
    Ok(cuts)
}

#[test]
fn every_cut_leaves_the_disk_as_before_or_as_after() {
    let cuts = every_cut(None, 3).unwrap();
    assert!(cuts > 1000, "{cuts} cuts only");
}

#[test]
fn planted_faults_are_caught() {
    let faults = [Fault::RegionsAfterHeader, Fault::OldCommitsCount, Fault::LastBlockLeftHalf, Fault::GrowthShowsOldBytes];
    let missed: Vec<_> = faults.into_iter().filter(|&fault| every_cut(Some(fault), 3).inspect_err(|text| println!("{fault:?}: {text}")).is_ok()).collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// A write that a host does itself, into a block that is in the image, ends before the block goes
/// back to the base; with the fault it would be lost (R5).
fn empty_beside_a_write(fault: Option<Fault>) -> bool {
    let base = base();
    let image = create(over_base(DISK), Some(base.clone()), limits(1)).unwrap();
    let sim = Sim::try_open(&image, Some(base), limits(1), Config { fault, ..Config::default() }).unwrap();
    sim.write(0, vec![1; BLOCK]);
    sim.queue.submit(Request::Write { offset: 0, buf: Buf::new(vec![2; BLOCK]), fua: false }, 1);
    sim.queue.submit(Request::MakeEmpty, 2);
    let data = sim.info().header.data_offset;
    sim.queue.run();
    while sim.world.step_where(&sim.queue, |op| !(op.file == FileId::Image && op.offset == data && matches!(op.kind, OpKind::Write { .. }))) {
        sim.queue.run();
    }
    let early = sim.world.results.borrow().iter().any(|r| r.0 == 2);
    sim.world.drain(&sim.queue);
    let results = sim.world.results.take();
    assert!(results.len() == 2 && results.iter().all(|r| r.1.is_ok()), "{results:?}");
    sim.close();
    early
}

#[test]
fn emptying_waits_for_writes_that_began_before() {
    assert!(!empty_beside_a_write(None));
    assert!(empty_beside_a_write(Some(Fault::EmptyWithoutNarrowing)), "the fault would not be seen");
}

#[test]
fn a_disk_without_a_bitmap_gets_one_with_its_first_base() {
    let params = fvd_engine::CreateParams { base_name: String::new(), base_format: String::new(), ..over_base(DISK) };
    let sim = Sim::open(&create(params, None, limits(1)).unwrap(), None);
    sim.write(0, vec![7; BLOCK]);
    assert_eq!(sim.ask(Request::MakeEmpty).unwrap_err().kind, Kind::Unsupported);
    sim.ask(Request::ChangeBase { name: "base".into(), format: "raw".into() }).unwrap();
    assert_eq!(sim.info().header.covered, DISK);
    let mut expect = vec![0; DISK as usize];
    expect[..BLOCK].fill(7);
    let stable = sim.close();
    // What the disk held without a base it holds still; emptied, it is the base.
    let sim = Sim::open(&stable, Some(base()));
    same(&sim.read(0, DISK), &expect, "as before");
    assert_eq!(sim.check(), (0, vec![]));
    sim.ask(Request::MakeEmpty).unwrap();
    same(&sim.read(0, DISK), &base()[..DISK as usize], "emptied");
    sim.write(BLOCK as u64 + 5, vec![9; 3]);
    expect.copy_from_slice(&base()[..DISK as usize]);
    expect[BLOCK + 5..BLOCK + 8].fill(9);
    let sim = Sim::open(&sim.close(), Some(base()));
    same(&sim.read(0, DISK), &expect, "written again");
    sim.close();
}

/// Storage that cannot grow: refused, and nothing is lost.
#[test]
fn without_space_nothing_changes() {
    let fixed = Limits { grows_zeroed: false, cheap_zeroing: false, ..Limits::default() };
    let mut device = Store::default();
    device.resize(8 << 20);
    let base = base();
    let world = World::new(device, Some(base[..BASE_SHORT].to_vec()), 1, fixed);
    let queue = world.queue(Config::default());
    world.request(&queue, Request::Create(Box::new(tight(4 << 20)))).unwrap().unwrap();
    let full = world.disk.borrow().stable.clone();
    let file_end = {
        let sim = Sim::try_open(&full, Some(base.clone()), fixed, Config::default()).unwrap();
        let end = sim.info().header.file_length_min();
        sim.close();
        end
    };
    let mut full = full;
    full.resize(file_end);
    let sim = Sim::try_open(&full, Some(base.clone()), fixed, Config::default()).unwrap();
    sim.write(100, vec![3; 10]);
    let error = sim.ask(Request::MakeEmpty).unwrap_err();
    assert_eq!(error.kind, Kind::NoSpace, "{error}");
    // A new base needs no larger bitmap; it is only told.
    sim.ask(Request::ChangeBase { name: "longer".into(), format: "raw".into() }).unwrap();
    assert!(sim.world.log.borrow().iter().any(|text| text.contains("does not reach as far")), "{:?}", sim.world.log.borrow());
    assert!(sim.info().header.covered < 4 << 20);
    let growth = Request::Resize { size: 5 << 20, zeroed: true };
    assert_eq!(sim.ask(growth).unwrap_err().kind, Kind::NoSpace);
    assert_eq!(sim.info().header.virtual_size, 4 << 20);
    let expect: Vec<u8> = base[..100].iter().copied().chain([3; 10]).chain(base[110..1024].iter().copied()).collect();
    let sim = Sim::try_open(&sim.close(), Some(base.clone()), fixed, Config::default()).unwrap();
    same(&sim.read(0, 1024), &expect, "as before");
    assert_eq!(sim.check(), (0, vec![]));
    sim.close();
}

/// Nothing was written yet: the disk is its base already.
#[test]
fn emptying_a_pristine_disk_writes_nothing() {
    let params = fvd_engine::CreateParams { base_name: String::new(), base_format: String::new(), ..over_base(DISK) };
    let sim = Sim::open(&create(params, None, limits(1)).unwrap(), Some(base()));
    sim.counts();
    sim.ask(Request::MakeEmpty).unwrap();
    assert_eq!(sim.counts(), Counts::default());
    same(&sim.read(0, DISK), &base()[..DISK as usize], "disk");
    sim.close();
}

/// What an image is left as that refused to build its regions anew: usable.
fn goes_on(sim: Sim, base: &[u8]) {
    sim.write(BLOCK as u64, vec![5; BLOCK]);
    sim.flush();
    let sim = Sim::try_open(&sim.close(), Some(base.to_vec()), limits(1), Config::default()).unwrap();
    assert_eq!(sim.read(BLOCK as u64, BLOCK as u64), vec![5; BLOCK]);
    same(&sim.read(0, BLOCK as u64), &base[..BLOCK], "disk");
    assert_eq!(sim.check(), (0, vec![]));
    sim.close();
}

/// Readers find the bitmap through a spine that never moves; how far it reaches was settled at open.
#[test]
fn a_bitmap_that_would_outgrow_its_spine_is_refused() {
    let base = base()[..BASE_SHORT].to_vec();
    let params = fvd_engine::CreateParams { virtual_size: Some(1 << 52), ..over_base(0) };
    let image = create(params, Some(base.clone()), limits(1)).unwrap();
    let rebase = || Request::ChangeBase { name: "another".into(), format: "raw".into() };
    let open = |base: Option<Vec<u8>>, memory| Sim::try_open(&image, base, limits(1), Config { metadata_memory: memory, ..Config::default() }).unwrap();
    // Both ask for bits for the whole disk: a base of unknown length, and emptying.
    for (sim, request) in [(open(None, u64::MAX), rebase()), (open(Some(base.clone()), 1 << 30), Request::MakeEmpty)] {
        let before = sim.info().header;
        sim.counts();
        let error = sim.ask(request).unwrap_err();
        assert!(error.kind == Kind::Unsupported && error.text.contains("convert"), "{error}");
        assert_eq!(sim.counts().writes, 0);
        assert_eq!(sim.info().header, before);
        let base = sim.world.base.clone().unwrap_or_else(|| vec![0; BLOCK]);
        goes_on(sim, &base);
    }
    // Within the limit on memory it would not have come that far; a base is only told of it.
    let sim = open(None, 1 << 30);
    sim.ask(rebase()).unwrap();
    assert!(sim.world.log.borrow().iter().any(|text| text.contains("does not reach as far")), "{:?}", sim.world.log.borrow());
    goes_on(sim, &vec![0; BLOCK]);
}

/// What makes a bitmap leaves an image that opens again as it was opened.
#[test]
fn a_page_map_beyond_the_memory_limit_is_not_made() {
    let params = fvd_engine::CreateParams { base_name: String::new(), base_format: String::new(), ..over_base(1 << 52) };
    let image = create(params, None, limits(1)).unwrap();
    let base = base();
    // 2³¹ blocks, 66,053 pages of bitmap, 3 of page map.
    for (memory, fits) in [(3 * 4096 - 1, false), (3 * 4096, true)] {
        let config = Config { metadata_memory: memory, ..Config::default() };
        let open = |bytes: &Store| Sim::try_open(bytes, Some(base.clone()), limits(1), config.clone()).unwrap();
        let sim = open(&image);
        sim.counts();
        let result = sim.ask(Request::Write { offset: 0, buf: Buf::new(vec![1; BLOCK]), fua: false });
        if !fits {
            let error = result.unwrap_err();
            assert!(error.kind == Kind::NoMemory && error.text.contains("page map"), "{error}");
            assert_eq!(sim.counts().writes, 0);
        }
        let header = sim.info().header;
        assert_eq!(header.region(RegionKind::PageMap).map(|r| r.pages()), fits.then_some(3));
        let sim = open(&sim.close());
        assert_eq!(sim.info().header.virtual_size, 1 << 52);
        sim.close();
    }
}

/// Generations tell pages of a region from those of the one before: none may come twice.
#[test]
fn a_region_that_was_rebuilt_too_often_is_not_rebuilt() {
    let base = base();
    let mut image = create(over_base(DISK), Some(base.clone()), limits(1)).unwrap();
    let header = {
        let sim = Sim::open(&image, Some(base.clone()));
        let mut header = sim.info().header;
        header.region_mut(RegionKind::Bitmap).as_mut().unwrap().generation = u32::MAX;
        sim.close();
        header
    };
    for copy in [1, 2] {
        image.write(HEADER_OFFSETS[copy - 1], &header.encode(copy));
    }
    let sim = Sim::open(&image, Some(base.clone()));
    let error = sim.ask(Request::MakeEmpty).unwrap_err();
    assert!(error.kind == Kind::Unsupported && error.text.contains("convert"), "{error}");
    assert_eq!(sim.info().header.regions, header.regions);
    goes_on(sim, &base);
}
