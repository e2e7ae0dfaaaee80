// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power cuts at host operations, failing operations, and planted faults, all from seeds.

mod common;

use common::*;
use fvd_engine::faults::Fault;
use fvd_engine::host::Limits;
use fvd_engine::{Config, CreateParams, Reply, Request};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

/// One run: create, then sessions of random requests that end in a cut or a close; after each, the
/// disk is compared with the oracle.
struct Run {
    seed: u64,
    fault: Option<Fault>,
    disk_sectors: u64,
    base: Option<Vec<u8>>,
    limits: Limits,
    /// Journal units after which a checkpoint starts: small, so that there are many.
    checkpoint_after: u64,
    /// The base was neither named nor there at creation.
    surprise: bool,
    rng: Rng,
    next_tag: u64,
    oracle: Oracle,
}

#[derive(Debug)]
enum Pending {
    Write { tag: u64, first: u64, count: u64, fua: bool },
    Zero { begun: u64, first: u64, count: u64 },
    Discard { begun: u64, first: u64, count: u64 },
    Flush { begun: u64 },
    Read { allowed: Vec<Vec<u64>>, first: u64, buf: Buf },
    Status,
}

impl Run {
    fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut rng = Rng::new(seed);
        let disk_sectors = 64 + rng.below(900);
        let base_sectors = match rng.below(4) {
            0 => disk_sectors,
            1 => disk_sectors / 2 + rng.below(17),
            2 => disk_sectors * 2,
            _ => disk_sectors.saturating_sub(3),
        };
        let base = base_image(base_sectors);
        let align = if rng.chance(50) { 512 } else { 4096 };
        let granule = if rng.chance(80) { 4096 } else { 16384 };
        let limits = Limits { request_alignment: align, memory_alignment: 1, write_granule: granule, ..Limits::default() };
        let oracle = Oracle::new(disk_sectors, Some(&base));
        let checkpoint_after = if rng.chance(70) { 1 + rng.below(12) } else { 0 };
        Self { seed, fault, disk_sectors, base: Some(base), limits, checkpoint_after, surprise: false, rng, next_tag: 100, oracle }
    }

    fn config(&self, read_only: bool) -> Config {
        Config { fault: self.fault, read_only, checkpoint_after: self.checkpoint_after, ..Config::default() }
    }

    fn go(&mut self) {
        // The base may be known at creation, only named, or come later as a surprise.
        let (named, there) = *[(true, true), (true, true), (true, false), (false, false)].get(self.rng.below(4) as usize).unwrap();
        self.surprise = !named;
        let world = World::new(Store::default(), self.base.clone().filter(|_| there), self.seed, self.limits);
        let queue = world.queue(self.config(false));
        let holes = there && self.rng.chance(30);
        let params = CreateParams {
            virtual_size: Some(self.disk_sectors * SECTOR as u64),
            block_size: if self.rng.chance(70) { 4096 } else { 16384 },
            journal_size: 1 << 20,
            base_name: if named { "base".into() } else { String::new() },
            base_format: if named { "raw".into() } else { String::new() },
            detect_sparse_hole: u64::from(holes),
            ..CreateParams::default()
        };
        world.request(&queue, Request::Create(Box::new(params))).unwrap().unwrap();
        drop(queue);
        let mut bytes = world.disk.borrow().view.clone();
        for session in 0..6 {
            bytes = self.session(bytes, session);
        }
    }

    /// One session, ended by a cut or a close; returns the disk it leaves.
    fn session(&mut self, bytes: Store, session: u64) -> Store {
        let world = World::new(bytes, self.base.clone(), self.seed ^ session << 40, self.limits);
        let queue = world.queue(self.config(false));
        // A cut may come during recovery already.
        let cut = self.rng.chance(70).then(|| if self.rng.chance(25) { self.rng.below(40) } else { 20 + self.rng.below(400) });
        // The first write of an image that has no bitmap yet is short and busy.
        let cut = if session == 0 && self.surprise && self.rng.chance(60) { Some(self.rng.below(30)) } else { cut };
        // Or an operation fails, once or from then on.
        let fails = self.rng.chance(30);
        *world.plan.borrow_mut() = Plan {
            cut_at: cut,
            fail_at: fails.then(|| self.rng.below(300)),
            fail_ever: self.rng.chance(20),
            errno: if self.rng.chance(50) { EIO } else { ENOSPC },
            ..Plan::default()
        };
        match world.request(&queue, Request::Open) {
            Some(Ok(_)) => {}
            Some(Err(_)) if fails => return self.after_cut(world, queue),
            None => return self.after_cut(world, queue),
            Some(Err(e)) => panic!("open after a cut: {e}"),
        }
        let mut under_way: Vec<(u64, Pending)> = Vec::new();
        let mut next_id = 0;
        let requests = 20 + self.rng.below(120);
        let depth = 1 + self.rng.below(8);
        let mut issued = 0;
        let mut alive = true;
        while issued < requests || !under_way.is_empty() {
            if issued < requests && (under_way.len() as u64) < depth {
                let (request, pending) = self.draw();
                under_way.push((next_id, pending));
                queue.submit(request, next_id);
                next_id += 1;
                issued += 1;
            } else if !world.step(&queue) {
                if world.pending.borrow().is_empty() && !world.results.borrow().is_empty() {
                    self.reap(&world, &mut under_way, fails);
                    continue;
                }
                alive = false;
                break;
            }
            queue.run();
            if self.rng.chance(2) {
                world.now.set(world.now.get() + 6_000_000_000);
            }
            if world.timer.get() <= world.now.get() {
                world.timer.set(u64::MAX);
                queue.timer();
            }
            self.reap(&world, &mut under_way, fails);
        }
        if !alive {
            assert!(cut.is_some_and(|at| world.ops.get() >= at), "requests hang: {under_way:?}");
            return self.after_cut(world, queue);
        }
        match world.request(&queue, Request::Close) {
            None => self.after_cut(world, queue),
            Some(Err(_)) if fails => self.after_cut(world, queue),
            Some(result) => {
                result.unwrap();
                self.oracle.flushed(self.oracle.now());
                self.verify(world.disk.borrow().stable.clone(), "close")
            }
        }
    }

    fn draw(&mut self) -> (Request<Buf>, Pending) {
        let first = self.rng.below(self.disk_sectors);
        let most = if self.rng.chance(20) { 80 } else { 16 };
        let count = 1 + self.rng.below(most.min(self.disk_sectors - first));
        // A quarter lies in one small place, so that requests overlap.
        let (first, count) = if self.rng.chance(25) { (8 + first % 8, 1 + count % 16) } else { (first, count) };
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        match self.rng.below(100) {
            0..50 => {
                let (tag, fua) = (self.next_tag, self.rng.chance(5));
                self.next_tag += 1;
                self.oracle.begin_write(tag, first, count);
                let buf = Buf::new(pattern(tag, first, count));
                (Request::Write { offset, buf, fua }, Pending::Write { tag, first, count, fua })
            }
            50..60 => {
                self.oracle.begin_write(0, first, count);
                let begun = self.oracle.now();
                (Request::WriteZeroes { offset, len, may_unmap: self.rng.chance(50), fua: false }, Pending::Zero { begun, first, count })
            }
            60..65 => {
                // Afterwards each part is as before or zero: as if zeroes might be written.
                self.oracle.begin_write(0, first, count);
                let begun = self.oracle.now();
                (Request::Discard { offset, len }, Pending::Discard { begun, first, count })
            }
            65..80 => (Request::Flush, Pending::Flush { begun: self.oracle.tick() }),
            80..95 => {
                let buf = Buf::new(vec![0xee; len as usize]);
                (Request::Read { offset, buf: buf.clone() }, Pending::Read { allowed: self.oracle.begin_read(first, count), first, buf })
            }
            _ => (Request::BlockStatus { offset, len }, Pending::Status),
        }
    }

    fn reap(&mut self, world: &Rc<World>, under_way: &mut Vec<(u64, Pending)>, fails: bool) {
        for (id, result) in std::mem::take(&mut *world.results.borrow_mut()) {
            let at = under_way.iter().position(|p| p.0 == id).expect("each request completes once");
            let (_, pending) = under_way.swap_remove(at);
            // What failed may have happened in part, now or later: it stays possible for ever.
            let reply = match result {
                Ok(reply) => reply,
                Err(_) if fails => continue,
                Err(error) => panic!("{pending:?}: {error}"),
            };
            match pending {
                Pending::Write { tag, first, count, fua } => {
                    self.oracle.end_write(tag, first, count);
                    if fua {
                        self.oracle.flushed_range(first, count, tag);
                    }
                }
                Pending::Zero { begun, first, count } => self.oracle.end_zero(begun, first, count),
                // Stays allowed for ever, supersedes nothing.
                Pending::Discard { begun, first, count } => self.oracle.end_discard(begun, first, count),
                Pending::Flush { begun } => self.oracle.flushed(begun),
                Pending::Read { allowed, first, buf } => {
                    for (i, bytes) in buf.0.borrow().chunks(SECTOR).enumerate() {
                        let s = first + i as u64;
                        assert!(self.oracle.may_read(s, &allowed[i], bytes), "read: {}", self.oracle.explain(s));
                    }
                }
                Pending::Status => assert!(matches!(reply, Reply::Status(s) if s.len > 0)),
            }
        }
    }

    fn after_cut(&mut self, world: Rc<World>, queue: Rc<fvd_engine::Queue<TestHost>>) -> Store {
        world.results.borrow_mut().clear();
        let queue_header = queue.image().info().ok().map(|info| info.header);
        // The queue's tasks refer to it: it is never dropped, as in a process that was killed.
        std::mem::forget(queue);
        world.disk.borrow_mut().data_offset = queue_header.map_or(0, |h| h.data_offset);
        world.cut(&mut self.rng);
        let bytes = std::mem::replace(&mut *world.disk.borrow_mut(), Disk::new(Store::default())).stable;
        self.verify(bytes, "cut")
    }

    /// Reads everything, read-only first (which writes nothing), then with recovery.
    fn verify(&mut self, bytes: Store, when: &str) -> Store {
        let world = World::new(bytes.clone(), self.base.clone(), self.seed, self.limits);
        let queue = world.queue(self.config(true));
        world.request(&queue, Request::Open).unwrap().unwrap_or_else(|e| panic!("read-only open after {when}: {e}"));
        let seen = self.read_all(&world, &queue);
        assert_eq!(world.counts.borrow().writes, 0, "a read-only open writes nothing");
        world.request(&queue, Request::Close).unwrap().unwrap();
        for (s, sector) in seen.chunks(SECTOR).enumerate() {
            assert!(self.oracle.settle(s as u64, sector), "after {when}: {} and is {:?}", self.oracle.explain(s as u64), &sector[..8]);
        }
        // Recovery on a copy shows the same, and `check` finds nothing.
        let world = World::new(bytes.clone(), self.base.clone(), self.seed, self.limits);
        let queue = world.queue(self.config(false));
        world.request(&queue, Request::Open).unwrap().unwrap_or_else(|e| panic!("open after {when}: {e}"));
        assert!(self.read_all(&world, &queue) == seen, "read-only and recovering opens differ");
        match world.request(&queue, Request::Check).unwrap().unwrap() {
            Reply::Check(report) => assert_eq!(report.corruptions, 0, "{:?}", report.findings),
            other => panic!("{other:?}"),
        }
        world.request(&queue, Request::Close).unwrap().unwrap();
        bytes
    }

    fn read_all(&self, world: &Rc<World>, queue: &Rc<fvd_engine::Queue<TestHost>>) -> Vec<u8> {
        let buf = Buf::new(vec![0xee; self.disk_sectors as usize * SECTOR]);
        world.request(queue, Request::Read { offset: 0, buf: buf.clone() }).unwrap().unwrap();
        buf.0.take()
    }
}

fn run(seed: u64, fault: Option<Fault>) -> Result<(), String> {
    let result = catch_unwind(AssertUnwindSafe(|| Run::new(seed, fault).go()));
    result.map_err(|panic| {
        panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
    })
}

fn seeds() -> u64 {
    std::env::var("FVD_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(150)
}

#[test]
fn every_cut_leaves_a_disk_the_guest_can_trust() {
    if let Ok(seed) = std::env::var("FVD_SEED") {
        Run::new(seed.parse().expect("FVD_SEED is a number"), None).go();
        return;
    }
    for seed in 0..seeds() {
        if let Err(text) = run(seed, None) {
            panic!("FVD_SEED={seed}: {text}");
        }
    }
}

#[test]
fn planted_faults_are_caught() {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let mut missed = Vec::new();
    let only = std::env::var("FVD_FAULT").ok();
    // Those of `tests/relayout.rs` need requests that are not drawn here.
    let elsewhere = [Fault::OldCommitsCount, Fault::LastBlockLeftHalf, Fault::EmptyWithoutNarrowing, Fault::GrowthShowsOldBytes];
    for fault in Fault::ALL.into_iter().filter(|f| !elsewhere.contains(f)).filter(|f| only.as_ref().is_none_or(|name| format!("{f:?}") == *name)) {
        let limit = 3000;
        match (0..limit).find_map(|seed| run(seed, Some(fault)).err().map(|text| (seed, text))) {
            Some((seed, text)) => println!("{fault:?}: seed {seed}: {}", text.lines().next().unwrap_or_default()),
            None => missed.push(fault),
        }
    }
    std::panic::set_hook(quiet);
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
