// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commits, the wrapping journal, checkpoints: who waits for whom, and how much is written.

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::host::{FileId, HostOp, OpKind};
use fvd_engine::{Config, CreateParams, Kind, Request};
use fvd_format::RegionKind;

const BLOCK: u64 = 4096;

/// A large disk whose base is not attached: every block is tracked, nothing has to be read.
fn large(size: u64) -> Sim {
    Sim::new(over_base(size), None)
}

fn write_request(offset: u64, len: u64, value: u8) -> Request<Buf> {
    Request::Write { offset, buf: Buf::new(vec![value; len as usize]), fua: false }
}

#[test]
fn many_guests_at_once_never_wait_for_a_checkpoint() {
    let blocks = 52 * 256;
    let sim = large((blocks + 64) * BLOCK);
    let header = sim.info().header;
    assert_eq!(header.journal_units(), 256);
    // Pass-through traffic meanwhile, on blocks of its own behind the others.
    let extra = blocks * BLOCK;
    sim.write(extra, vec![1; 64 * 4096]);
    sim.flush();
    let (queue, world) = (&sim.queue, &sim.world);
    let (mut next, mut flushes, mut id) = (0, 0u64, 10u64);
    let mut expect = Vec::new();
    while next < blocks {
        // Up to four guests at once: write, flush, read, overwrite.
        for _ in 0..4 {
            id += 1;
            match id % 4 {
                0 if next < blocks => {
                    queue.submit(write_request(next * BLOCK, BLOCK, 1 + (next % 250) as u8), id);
                    expect.push((next, 1 + (next % 250) as u8));
                    next += 1;
                }
                1 => {
                    queue.submit(Request::Flush, id);
                    flushes += 1;
                }
                2 => {
                    let at = next.saturating_sub(2) * BLOCK;
                    queue.submit(Request::Read { offset: at, buf: Buf::new(vec![0; 4096]) }, id);
                }
                _ => queue.submit(write_request(extra + (id % 64) * BLOCK, BLOCK, id as u8), id),
            }
            queue.run();
            world.step(queue);
        }
        while world.pending.borrow().len() > 12 {
            queue.run();
            world.step(queue);
        }
        for (id, result) in world.results.take() {
            result.unwrap_or_else(|e| panic!("request {id}: {e}"));
        }
    }
    world.drain(queue);
    let stats = sim.stats();
    assert!(flushes * 4 > blocks, "{flushes} flushes");
    assert_eq!((stats.write_waits, stats.flush_waits), (0, 0), "{stats:?}");
    assert!(stats.commits > 2000 && stats.checkpoints > 20, "{stats:?}");
    sim.flush();
    assert!(stats.journal_bytes > 7 * MIB, "the journal wrapped: {stats:?}");
    let sim = Sim::open(&sim.crash(), None);
    for (block, value) in expect {
        let found = sim.read(block * BLOCK, BLOCK);
        assert!(found.iter().all(|b| *b == value), "block {block} is {} instead of {value}", found[0]);
    }
    assert_eq!(sim.check().0, 0);
    sim.close();
}

/// A commit a block; a checkpoint that began goes on while the next blocks are written.
#[test]
fn the_smallest_journal_wraps_fifty_times_and_nobody_waits() {
    let blocks = 51 * 256;
    let sim = large((blocks + 16) * BLOCK);
    sim.write(blocks * BLOCK, vec![1; 16 * 4096]);
    let (queue, world) = (&sim.queue, &sim.world);
    let region = *sim.info().header.region(RegionKind::Journal).unwrap();
    let finish = |id| {
        // Until this request is done; whatever else is on its way stays there or ends.
        while !world.results.borrow().iter().any(|r| r.0 == id) {
            queue.run();
            assert!(world.step(queue), "request {id} hangs");
        }
        world.results.borrow_mut().retain(|r| r.1.as_ref().map(|_| r.0 != id).expect("nothing fails"));
    };
    let (mut wraps, mut overlapped) = (0, 0);
    for block in 0..blocks {
        queue.submit(write_request((blocks + block % 16) * BLOCK, BLOCK, block as u8), 1);
        queue.submit(Request::Read { offset: block.saturating_sub(1) * BLOCK, buf: Buf::new(vec![0; 4096]) }, 2);
        queue.submit(write_request(block * BLOCK, BLOCK, 1 + (block % 255) as u8), 3);
        finish(3);
        overlapped += u64::from(world.pending.borrow().len() > 2);
        queue.submit(Request::Flush, 4);
        finish(4);
        finish(1);
        finish(2);
        let mut trace = world.trace.borrow_mut();
        wraps += trace.iter().filter(|t| matches!(t.kind, OpKind::Write { .. }) && t.offset == region.offset).count();
        trace.clear();
    }
    assert!(wraps >= 50, "{wraps} wraps");
    let stats = sim.stats();
    assert!(stats.commits >= blocks && stats.checkpoints >= 100 && overlapped > 50, "{stats:?}, {overlapped} overlapped");
    assert_eq!((stats.write_waits, stats.flush_waits), (0, 0), "{stats:?}");
    let sim = Sim::open(&sim.crash(), None);
    for block in (0..blocks).step_by(17) {
        assert_eq!(sim.read(block * BLOCK, 1), [1 + (block % 255) as u8], "block {block}");
    }
    assert_eq!(sim.check().0, 0);
    sim.close();
}

/// Whether an operation belongs to a checkpoint: double-write area, pages in place, header.
fn of_checkpoint(sim: &Sim) -> impl Fn(&HostOp<Buf>) -> bool + use<> {
    let header = sim.info().header;
    let journal = *header.region(RegionKind::Journal).unwrap();
    let data = header.data_offset;
    move |op| op.kind == OpKind::Write { fua: false } && op.offset < data && !(journal.offset..journal.end()).contains(&op.offset)
}

/// Does one request while nothing that `held` names may end. Whether it finished.
fn ask_held(sim: &Sim, request: Request<Buf>, held: &dyn Fn(&HostOp<Buf>) -> bool) -> bool {
    sim.queue.submit(request, 77);
    sim.queue.run();
    while sim.world.results.borrow().is_empty() && sim.world.step_where(&sim.queue, |op| !held(op)) {
        sim.queue.run();
    }
    let results = sim.world.results.take();
    results.into_iter().inspect(|(_, r)| assert!(r.is_ok(), "{r:?}")).count() == 1
}

#[test]
fn while_a_checkpoint_hangs_only_flushes_wait_and_only_when_the_journal_is_full() {
    let sim = large(4096 * BLOCK);
    sim.write(0, vec![1; 4096]);
    sim.flush();
    let held = of_checkpoint(&sim);
    let mut flushed = 1;
    let mut block = 1;
    loop {
        assert!(ask_held(&sim, write_request(block * BLOCK, BLOCK, 2), &held), "a write waits for a checkpoint");
        block += 1;
        if !ask_held(&sim, Request::Flush, &held) {
            break;
        }
        flushed += 1;
        assert!(flushed < 300, "the journal is never full");
    }
    assert_eq!(flushed, 256, "every unit of the journal is used before anybody waits");
    assert!(sim.stats().flush_waits > 0);
    // The flush hangs; reads, overwrites and writes that change metadata go on.
    for i in 0..50 {
        assert!(ask_held(&sim, Request::Read { offset: i * BLOCK, buf: Buf::new(vec![0; 8192]) }, &held));
        assert!(ask_held(&sim, write_request(i * BLOCK, BLOCK, 3), &held));
        assert!(ask_held(&sim, write_request((block + i) * BLOCK, BLOCK, 3), &held));
    }
    assert_eq!(sim.stats().write_waits, 0);
    sim.world.drain(&sim.queue);
    assert_eq!(sim.world.results.take().len(), 1, "the flush ends with the checkpoint");
    let sim = Sim::open(&sim.crash(), None);
    assert_eq!(sim.read((block - 1) * BLOCK, BLOCK), vec![2; 4096]);
    sim.close();
}

#[test]
fn writes_wait_only_beyond_half_a_half_of_dirty_metadata() {
    // Every second block, so that each is a record of its own; nothing ends but data writes.
    let sim = large(80_000 * BLOCK);
    let data = sim.info().header.data_offset;
    let held = move |op: &HostOp<Buf>| op.offset < data;
    let mut records = 0u64;
    while ask_held(&sim, write_request(records * 2 * BLOCK, BLOCK, 1), &held) {
        records += 1;
        assert!(records < 70_000, "nobody ever waits");
    }
    assert_eq!(sim.stats().write_waits, 1);
    // A quarter of a half is frozen in the commit that hangs; behind it half a half is pending.
    let units = |n: u64| n * 16 / 4048;
    assert!((32 + 64..=32 + 66).contains(&units(records)), "{records} records, {} units", units(records));
    sim.world.drain(&sim.queue);
    assert_eq!(sim.world.results.take().len(), 1);
    sim.close();
}

#[test]
fn dirty_metadata_is_bounded_in_size() {
    let sim = large(40_000 * BLOCK);
    for i in 0..20_000 {
        sim.write(i * 2 * BLOCK, vec![1; 4096]);
        let uncommitted = (i + 1) * 16 / 4048 - (sim.stats().journal_bytes / 4096).min((i + 1) * 16 / 4048);
        assert!(uncommitted <= 34, "{uncommitted} units are dirty after {i} writes");
    }
    assert!((2..=3).contains(&sim.stats().commits), "{:?}", sim.stats());
    assert_eq!(sim.stats().write_waits, 0);
    sim.close();
}

#[test]
fn dirty_metadata_is_bounded_in_time() {
    let image = create(over_base(MIB), None, limits(1)).unwrap();
    for interval in [5_000_000_000, 700_000_000] {
        let config = Config { commit_interval_ns: interval, ..Config::default() };
        let sim = Sim::try_open(&image, None, limits(1), config).unwrap();
        assert_eq!(sim.world.timer.get(), u64::MAX, "nothing to do, no timer");
        sim.write(0, vec![1; 4096]);
        sim.sleep(interval - 1_000_000);
        assert_eq!(sim.stats().commits, 0);
        sim.sleep(2_000_000);
        assert_eq!(sim.stats().commits, 1, "interval {interval}");
        sim.sleep(20_000_000_000);
        assert_eq!(sim.stats().commits, 1, "nothing is dirty");
        // And again.
        sim.write(BLOCK, vec![2; 4096]);
        sim.sleep(interval + 1_000_000);
        assert_eq!(sim.stats().commits, 2);
        let sim = Sim::open(&sim.crash(), None);
        assert_eq!(sim.read(0, 2 * BLOCK), [vec![1; 4096], vec![2; 4096]].concat());
        sim.close();
    }
}

/// A background commit that fails once is tried again without a guest asking.
#[test]
fn a_failed_background_commit_is_repeated_in_time() {
    let sim = large(MIB);
    sim.write(0, vec![1; 4096]);
    sim.flush();
    sim.write(BLOCK, vec![1; 4096]);
    let journal = *sim.info().header.region(RegionKind::Journal).unwrap();
    // The journal write fails once: the second operation from here, after the data sync.
    *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get() + 1), errno: ENOSPC, ..Plan::default() };
    sim.sleep(6_000_000_000);
    assert!(sim.world.log.borrow().join("").contains("background commit"), "{:?}", sim.world.log.borrow());
    assert!(!sim.queue.image().is_poisoned(), "no sync failed (journal at {})", journal.offset);
    *sim.world.plan.borrow_mut() = Plan::default();
    sim.sleep(6_000_000_000);
    let sim = Sim::open(&sim.crash(), None);
    assert_eq!(sim.read(BLOCK, 1), [1], "5 s later it is on disk");
    sim.close();
}

#[test]
fn a_set_larger_than_a_quarter_of_the_journal_is_cut_into_commits() {
    let pairs = 17_000;
    let sim = large(2 * pairs * BLOCK);
    let journal = *sim.info().header.region(RegionKind::Journal).unwrap();
    for i in 0..pairs {
        sim.write(i * 2 * BLOCK, vec![1; 4096]);
    }
    sim.flush();
    let before = sim.stats();
    sim.world.trace.borrow_mut().clear();
    // Every second block is present: as many runs as pairs, in one request.
    sim.ask(Request::WriteZeroes { offset: 0, len: 2 * pairs * BLOCK, may_unmap: true, fua: true }).unwrap();
    let stats = sim.stats();
    assert_eq!(stats.commits - before.commits, 2);
    let in_journal = |t: &&Traced| matches!(t.kind, OpKind::Write { .. }) && (journal.offset..journal.end()).contains(&t.offset);
    let most = sim.world.trace.borrow().iter().filter(in_journal).map(|t| t.len).max().unwrap();
    assert!(most <= journal.length / 4, "{most} bytes in one append");
    let sim = Sim::open(&sim.crash(), None);
    for i in (0..2 * pairs).step_by(501) {
        assert_eq!(sim.read(i * BLOCK, BLOCK), vec![0; 4096]);
    }
    assert_eq!(sim.check().0, 0);
    sim.close();
}

#[test]
fn concurrent_flushes_share_one_commit() {
    let sim = large(MIB);
    sim.write(0, vec![1; 4096]);
    sim.flush();
    sim.counts();
    let before = sim.stats().commits;
    sim.write(BLOCK, vec![1; 4096]);
    for id in 0..50 {
        sim.queue.submit(Request::Flush, id);
    }
    sim.world.drain(&sim.queue);
    assert_eq!(sim.world.results.take().len(), 50);
    assert_eq!(sim.stats().commits, before + 1);
    // The first one's two syncs; the others came after it froze and share one more.
    assert_eq!(sim.counts().syncs, 3);
    sim.close();
}

/// Flushes that share a commit share its failure; the next one repeats it.
#[test]
fn a_failed_commit_fails_every_flush_that_shares_it() {
    let sim = large(MIB);
    let journal = *sim.info().header.region(RegionKind::Journal).unwrap();
    let appends = |op: &HostOp<Buf>| op.kind == OpKind::Write { fua: false } && (journal.offset..journal.end()).contains(&op.offset);
    sim.write(0, vec![1; 4096]);
    sim.queue.submit(Request::Flush, 1);
    sim.queue.run();
    // The commit of the first flush hangs in its data sync; a write ends, and three flushes must cover it.
    let held = |op: &HostOp<Buf>| op.kind == OpKind::Flush;
    assert!(ask_held(&sim, write_request(BLOCK, BLOCK, 2), &held));
    for id in 2..5 {
        sim.queue.submit(Request::Flush, id);
    }
    sim.queue.run();
    while !sim.world.results.borrow().iter().any(|r| r.0 == 1) {
        assert!(sim.world.step(&sim.queue));
        sim.queue.run();
    }
    // Their commit's append fails.
    while !sim.world.pending.borrow().iter().any(|p| appends(&p.1)) {
        assert!(sim.world.step(&sim.queue));
        sim.queue.run();
    }
    *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get()), errno: ENOSPC, ..Plan::default() };
    sim.world.drain(&sim.queue);
    let mut results = sim.world.results.take();
    results.sort_by_key(|r| r.0);
    assert_eq!(results.iter().map(|r| r.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(results[0].1.is_ok(), "{results:?}");
    assert!(results[1..].iter().all(|r| r.1.as_ref().is_err_and(|e| e.kind == Kind::NoSpace)), "{results:?}");
    assert!(!sim.queue.image().is_poisoned() && sim.stats().commits == 1);
    sim.flush();
    assert_eq!(sim.stats().commits, 2);
    let sim = Sim::open(&sim.crash(), None);
    assert_eq!(sim.read(0, 2 * BLOCK), [vec![1; 4096], vec![2; 4096]].concat());
    sim.close();
}

#[test]
fn a_flush_with_nothing_dirty_is_one_sync() {
    let sim = large(MIB);
    sim.counts();
    sim.flush();
    assert_eq!(sim.counts(), Counts { syncs: 1, ..Counts::default() });
    sim.write(0, vec![1; 4096]);
    sim.flush();
    sim.counts();
    sim.flush();
    assert_eq!(sim.counts(), Counts { syncs: 1, ..Counts::default() });
    sim.close();
}

/// A commit may cross the wrap; a small journal and commits of 7 units see to it.
#[test]
fn commits_that_cross_the_wrap_are_replayed() {
    let sim = large(300_000 * BLOCK);
    let mut next = 0;
    let mut written = Vec::new();
    for round in 0..60 {
        // 1,600 records: 7 units; 256 is no multiple of it.
        for _ in 0..1600 {
            sim.queue.submit(write_request(next * BLOCK, 1, round + 1), 1);
            written.push((next, round + 1));
            next += 2;
        }
        sim.world.drain(&sim.queue);
        sim.flush();
        if round % 7 == 6 {
            let stable = sim.world.disk.borrow().stable.clone();
            let again = Sim::open(&stable, None);
            for &(block, value) in written.iter().step_by(97).chain(written.last()) {
                assert_eq!(again.read(block * BLOCK, 1), [value], "round {round}, block {block}");
            }
            assert_eq!(again.check(), (0, vec![]), "round {round}");
            again.close();
        }
    }
    sim.close();
}

/// Pages of several segments, of several checkpoints, cut anywhere: larger than what the simulator uses.
#[test]
fn a_bitmap_of_many_pages_survives_cuts() {
    for seed in 0..40u64 {
        let mut rng = Rng::new(seed + 1000);
        let pages = 140;
        let size = pages * 32_512 * BLOCK;
        let granule = [4096, 16384, 65536][seed as usize % 3];
        let limits = fvd_engine::host::Limits { write_granule: granule, ..limits(4096) };
        let mut image = create(over_base(size), None, limits).unwrap();
        // Sector → value, as of the last flush, and what was written after it.
        let mut sure = std::collections::BTreeMap::new();
        let mut tag = 0u8;
        for session in 0..4 {
            let mut maybe: Vec<(u64, u8)> = Vec::new();
            let world = World::new(image.clone(), None, seed << 8 | session, limits);
            let config = Config { checkpoint_after: 1 + rng.below(20), ..Config::default() };
            let queue = world.queue(config);
            *world.plan.borrow_mut() = Plan { cut_at: Some(rng.below(900)), ..Plan::default() };
            let mut alive = matches!(world.request(&queue, Request::Open), Some(Ok(_)));
            for _ in 0..rng.below(60) {
                for _ in 0..rng.below(40) {
                    let block = rng.below(pages) * 32_512 + rng.below(3);
                    tag = tag % 200 + 1;
                    if alive {
                        maybe.extend((block * 8..block * 8 + 8).map(|sector| (sector, tag)));
                        alive = matches!(world.request(&queue, write_request(block * BLOCK, BLOCK, tag)), Some(Ok(_)));
                    }
                }
                alive = alive && matches!(world.request(&queue, Request::Flush), Some(Ok(_)));
                if alive {
                    sure.extend(maybe.drain(..));
                }
            }
            std::mem::forget(queue);
            world.disk.borrow_mut().cut(&mut rng);
            image = world.disk.borrow().stable.clone();
            let seen = |read_only| {
                let sim = Sim::try_open(&image, None, limits, Config { read_only, ..Config::default() }).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                let mut seen = Vec::new();
                for block in (0..pages).flat_map(|page| page * 32_512..page * 32_512 + 3) {
                    for (i, bytes) in sim.read(block * BLOCK, BLOCK).chunks(512).enumerate() {
                        let (sector, value) = (block * 8 + i as u64, bytes[0]);
                        let allowed = sure.get(&sector).copied().unwrap_or(0) == value || maybe.contains(&(sector, value));
                        assert!(allowed, "seed {seed} session {session}: sector {i} of block {block} is {value}");
                        seen.push((sector, value));
                    }
                }
                if !read_only {
                    assert_eq!(sim.check(), (0, vec![]), "seed {seed} session {session}");
                }
                sim.crash();
                seen
            };
            let found = seen(true);
            assert!(found == seen(false), "seed {seed}: read-only and recovering opens differ");
            sure = found.into_iter().collect();
        }
    }
}

#[test]
fn a_large_write_granule_is_kept() {
    let limits = fvd_engine::host::Limits { write_granule: 65536, ..limits(512) };
    let image = create(CreateParams { ..over_base(300 * MIB) }, None, limits).unwrap();
    let sim = Sim::try_open(&image, None, limits, Config { checkpoint_after: 40, ..Config::default() }).unwrap();
    let header = sim.info().header;
    let journal = *header.region(RegionKind::Journal).unwrap();
    let bitmap = *header.region(RegionKind::Bitmap).unwrap();
    for i in 0..200 {
        sim.write(i * 3 * BLOCK * 100, vec![1; 512]);
        sim.flush();
    }
    for t in sim.world.trace.borrow().iter().filter(|t| matches!(t.kind, OpKind::Write { .. }) && t.file == FileId::Image) {
        if (journal.offset..journal.end()).contains(&t.offset) {
            assert_eq!((t.offset % 65536, t.len % 65536), (0, 0), "{t:?}");
        }
        if (bitmap.offset..bitmap.end()).contains(&t.offset) {
            let whole = t.offset % 65536 == 0 && (t.len % 65536 == 0 || t.offset + t.len == bitmap.end());
            assert!(whole, "{t:?}");
        }
    }
    assert!(sim.stats().checkpoints > 10);
    let sim = Sim::try_open(&sim.crash(), None, limits, Config::default()).unwrap();
    assert_eq!(sim.check().0, 0);
    sim.close();
}
