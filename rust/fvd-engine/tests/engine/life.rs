// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening, closing, lookup, limits, and what is left after a failure.

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::faults::Fault;
use fvd_engine::host::{FileId, HostOp, OpKind};
use fvd_engine::{Config, CreateParams, Kind, Lookup, Request};
use fvd_format::RegionKind;
use fvd_format::header::HEADER_OFFSETS;

const BLOCK: u64 = 4096;

/// An image after a cut: five commits in the journal, nothing in place.
fn crashed() -> (Store, Vec<u8>, Vec<u8>) {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    let mut expect = base.clone();
    for i in 0..5 {
        let at = i * 7 * BLOCK + 512;
        sim.write(at, vec![i as u8 + 1; 5000]);
        expect[at as usize..at as usize + 5000].fill(i as u8 + 1);
        sim.flush();
    }
    (sim.crash(), base, expect)
}

fn changes(sim: &Sim) -> usize {
    sim.world.trace.borrow().iter().filter(|t| !matches!(t.kind, OpKind::Read | OpKind::GetLength | OpKind::BaseStatus)).count()
}

fn reader(bytes: &Store, base: &[u8]) -> Sim {
    Sim::try_open(bytes, Some(base.to_vec()), limits(1), Config { read_only: true, ..Config::default() }).unwrap()
}

#[test]
fn a_read_only_open_after_a_crash_shows_everything_and_writes_nothing() {
    let (image, base, expect) = crashed();
    for align in [1, 4096] {
        let sim = Sim::try_open(&image, Some(base.clone()), limits(align), Config { read_only: true, ..Config::default() }).unwrap();
        assert_eq!(sim.info().commits_replayed, 5);
        assert!(!sim.info().was_clean);
        same(&sim.read(0, MIB), &expect, "disk");
        sim.flush();
        assert_eq!(sim.check().0, 0);
        for request in [
            Request::Write { offset: 0, buf: Buf::new(vec![1]), fua: false },
            Request::WriteZeroes { offset: 0, len: 1, may_unmap: true, fua: false },
            Request::Discard { offset: 0, len: 4096 },
            Request::Resize { size: 2 * MIB, zeroed: true },
            Request::ChangeBase { name: "a".into(), format: "raw".into() },
            Request::Amend(Box::default()),
        ] {
            assert_eq!(sim.ask(request).unwrap_err().kind, Kind::ReadOnly);
        }
        // A present block: not even by lookup.
        assert!(matches!(sim.queue.image().lookup(0, 512, 512, false), Lookup::Data { token, .. } if { sim.queue.image().end(token); true }));
        assert_eq!(sim.queue.image().lookup(0, 512, 512, true), Lookup::Ask);
        assert_eq!(changes(&sim), 0);
        let world = sim.world.clone();
        sim.close();
        assert_eq!(world.counts.borrow().writes + world.counts.borrow().syncs, 0);
    }
    // Recovery shows the same, and makes the image clean at close.
    let sim = Sim::open(&image, Some(base.clone()));
    assert_eq!(sim.info().commits_replayed, 5);
    same(&sim.read(0, MIB), &expect, "recovered");
    let sim = reader(&sim.close(), &base);
    assert!(sim.info().was_clean && sim.info().commits_replayed == 0);
    same(&sim.read(0, MIB), &expect, "closed");
    sim.close();
}

#[test]
fn open_and_close_of_a_clean_image_write_nothing() {
    let (image, base, _) = crashed();
    let clean = Sim::open(&image, Some(base.clone())).close();
    for bytes in [clean, create(over_base(MIB), Some(base.clone()), limits(1)).unwrap()] {
        let sim = Sim::open(&bytes, Some(base.clone()));
        sim.read(0, MIB);
        let world = sim.world.clone();
        sim.close();
        assert!(world.trace.borrow().iter().all(|t| !matches!(t.kind, OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::Truncate)));
        // A flush with nothing dirty is one sync, no header update.
        let sim = Sim::open(&bytes, Some(base.clone()));
        sim.flush();
        let world = sim.world.clone();
        sim.close();
        assert_eq!(world.counts.borrow().writes, 0);
        assert!(reader(&bytes, &base).info().was_clean);
    }
}

#[test]
fn header_copies_agree_after_the_first_writable_open() {
    let (image, base, _) = crashed();
    let clean = Sim::open(&image, Some(base.clone())).close();
    for copy in [0, 1] {
        let mut rotten = clean.clone();
        rotten.write(HEADER_OFFSETS[copy] + 300, &[0xff]);
        let sim = reader(&rotten, &base);
        assert_eq!((sim.check().0, changes(&sim)), (1, 0), "a reader sees it and leaves it");
        sim.close();
        let sim = Sim::open(&rotten, Some(base.clone()));
        assert_eq!(sim.check(), (0, vec![]), "a writer repairs copy {}", copy + 1);
        let mended = sim.close();
        let sim = reader(&mended, &base);
        assert_eq!(sim.check(), (0, vec![]));
        assert!(sim.info().was_clean);
        sim.close();
    }
    let mut rotten = clean.clone();
    rotten.write(HEADER_OFFSETS[0] + 300, &[0xff]);
    rotten.write(HEADER_OFFSETS[1] + 300, &[0xff]);
    let error = Sim::try_open(&rotten, Some(base), limits(1), Config::default()).err().unwrap();
    assert_eq!(error.kind, Kind::Corrupt);
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_writer_only() {
    let (image, base, _) = crashed();
    let clean = Sim::open(&image, Some(base.clone())).close();
    let mut header = reader(&clean, &base).info().header;
    header.autoclear = 1 << 17;
    header.compatible |= 1 << 40;
    let mut bytes = clean;
    for copy in [1, 2] {
        bytes.write(HEADER_OFFSETS[copy - 1], &header.encode(copy));
    }
    assert_eq!(reader(&bytes, &base).info().header.autoclear, 1 << 17);
    let after = Sim::open(&bytes, Some(base.clone())).close();
    let header = reader(&after, &base).info().header;
    assert_eq!((header.autoclear, header.compatible & 1 << 40), (0, 1 << 40), "compatible bits stay");
}

/// A lookup that must be data: its file offset, length and token.
fn data(sim: &Sim, offset: u64, len: u64, write: bool) -> (u64, u64, fvd_engine::BracketToken) {
    match sim.queue.image().lookup(3, offset, len, write) {
        Lookup::Data { file: FileId::Image, offset, len, token } => (offset, len, token),
        other => panic!("{other:?}"),
    }
}

#[test]
fn lookup_tells_runs_in_the_image_and_asks_for_all_else() {
    let base = base_image(1024);
    let sim = Sim::new(over_base(MIB), Some(base));
    let image = sim.queue.image().clone();
    let start = sim.info().header.data_offset;
    assert_eq!(image.lookup(0, 0, BLOCK, false), Lookup::Ask, "in the base");
    sim.write(2 * BLOCK, vec![1; 3 * 4096]);
    for write in [false, true] {
        let (offset, len, token) = data(&sim, 2 * BLOCK + 100, 50, write);
        assert_eq!((offset, len), (start + 2 * BLOCK + 100, 50));
        image.end(token);
        let (offset, len, token) = data(&sim, 3 * BLOCK, 20 * BLOCK, write);
        assert_eq!((offset, len), (start + 3 * BLOCK, 2 * BLOCK), "the first run only");
        image.end(token);
        assert_eq!(image.lookup(1, BLOCK, 2 * BLOCK, write), Lookup::Ask, "the first block decides");
        // Past the base everything is in the image.
        let (offset, len, token) = data(&sim, 600 * KIB, 424 * KIB, write);
        assert_eq!((offset, len), (start + 600 * KIB, 424 * KIB));
        image.end(token);
        for (offset, len) in [(0, 0), (MIB - 1, 2), (MIB, 1), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            assert_eq!(image.lookup(0, offset, len, write), Lookup::Ask, "{len} at {offset}");
        }
    }
    sim.close();
    assert_eq!(image.lookup(0, 2 * BLOCK, BLOCK, false), Lookup::Ask, "closed");
}

#[test]
#[should_panic(expected = "ended twice")]
fn a_bracket_ends_once() {
    let sim = Sim::new(over_base(MIB), Some(base_image(8)));
    let (_, _, token) = data(&sim, 512 * KIB, 512, false);
    sim.queue.image().end(token);
    sim.queue.image().end(token);
}

/// Read-modify-write of a host sector waits for the pass-through writes that began before, and
/// keeps new ones away until it is over (R5).
#[test]
fn a_read_modify_write_waits_for_brackets_opened_before() {
    let base = base_image(64);
    let image = create(over_base(MIB), Some(base.clone()), limits(4096)).unwrap();
    let sim = Sim::try_open(&image, Some(base), limits(4096), Config::default()).unwrap();
    let engine = sim.queue.image().clone();
    let at = 512 * KIB;
    let (place, _, token) = data(&sim, at, 512, true);
    let (_, _, other) = data(&sim, at, 512, false);
    sim.queue.submit(Request::Write { offset: at + 512, buf: Buf::new(vec![7; 512]), fua: false }, 1);
    sim.queue.run();
    assert!(sim.world.pending.borrow().is_empty(), "it reads what the pass-through write may still change");
    assert_eq!(engine.lookup(0, at, 512, true), Lookup::Ask, "no new writes meanwhile");
    let (_, _, late) = data(&sim, at, 512, false);
    // The pass-through write, and its end.
    sim.world.disk.borrow_mut().view.write(place, &[5; 512]);
    engine.end(token);
    sim.queue.run();
    assert!(sim.world.pending.borrow().is_empty(), "a reader that began before is waited for, too");
    engine.end(other);
    sim.queue.run();
    // One that began while it waited may be waited for once, not for ever.
    if sim.world.pending.borrow().is_empty() {
        engine.end(late);
        sim.queue.run();
    } else {
        engine.end(late);
    }
    assert_eq!(sim.world.pending.borrow().len(), 1, "now it reads the sector");
    sim.world.drain(&sim.queue);
    assert!(sim.world.results.take()[0].1.is_ok());
    assert_eq!(sim.read(at, 1024), [vec![5; 512], vec![7; 512]].concat());
    engine.end(data(&sim, at, 512, true).2);
    sim.close();
}

#[test]
fn two_read_modify_writes_of_one_sector_follow_each_other() {
    let image = create(over_base(MIB), None, limits(4096)).unwrap();
    for seed in 0..40 {
        let world = World::new(image.clone(), None, seed, limits(4096));
        let queue = world.queue(Config::default());
        world.request(&queue, Request::Open).unwrap().unwrap();
        for i in 0..8 {
            queue.submit(Request::Write { offset: i * 512, buf: Buf::new(vec![i as u8 + 1; 512]), fua: false }, i);
        }
        world.drain(&queue);
        let buf = Buf::new(vec![0; 4096]);
        world.request(&queue, Request::Read { offset: 0, buf: buf.clone() }).unwrap().unwrap();
        for i in 0..8 {
            assert!(buf.0.borrow()[i * 512..(i + 1) * 512].iter().all(|&b| b == i as u8 + 1), "seed {seed}: sector {i}");
        }
        world.request(&queue, Request::Close).unwrap().unwrap();
    }
}

#[test]
fn requests_need_an_open_handle() {
    let requests = || {
        [
            Request::Read { offset: 0, buf: Buf::new(vec![0; 512]) },
            Request::Write { offset: 0, buf: Buf::new(vec![0; 512]), fua: false },
            Request::Flush,
            Request::WriteZeroes { offset: 0, len: 1, may_unmap: false, fua: false },
            Request::Discard { offset: 0, len: 1 },
            Request::Resize { size: 2 * MIB, zeroed: false },
            Request::BlockStatus { offset: 0, len: 1 },
            Request::ChangeBase { name: String::new(), format: String::new() },
            Request::Check { repair: fvd_engine::Repair::None },
            Request::Close,
        ]
    };
    let (image, base, _) = crashed();
    let world = World::new(image.clone(), Some(base.clone()), 1, limits(1));
    let queue = world.queue(Config::default());
    assert_eq!(queue.image().info().unwrap_err().kind, Kind::State);
    for request in requests() {
        assert_eq!(world.request(&queue, request).unwrap().unwrap_err().kind, Kind::State, "unopened");
    }
    assert_eq!(world.ops.get(), 0);
    world.request(&queue, Request::Open).unwrap().unwrap();
    assert_eq!(world.request(&queue, Request::Open).unwrap().unwrap_err().kind, Kind::State, "opened twice");
    assert_eq!(world.request(&queue, Request::Create(Box::new(over_base(MIB)))).unwrap().unwrap_err().kind, Kind::State);
    world.request(&queue, Request::Close).unwrap().unwrap();
    let ops = world.ops.get();
    for request in requests().into_iter().chain([Request::Open]) {
        assert_eq!(world.request(&queue, request).unwrap().unwrap_err().kind, Kind::State, "closed");
    }
    assert_eq!(world.ops.get(), ops);
    // A failed open leaves a handle that serves nothing.
    let world = World::new(Store::default(), None, 1, limits(1));
    let queue = world.queue(Config::default());
    assert_eq!(world.request(&queue, Request::Open).unwrap().unwrap_err().kind, Kind::Invalid);
    for request in requests() {
        assert_eq!(world.request(&queue, request).unwrap().unwrap_err().kind, Kind::State);
    }
}

#[test]
fn close_waits_for_everything_accepted_before() {
    let sim = Sim::new(over_base(MIB), Some(base_image(64)));
    sim.write(0, vec![1; 8192]);
    // A pass-through write, a copy-on-write, a read of both; none has ended when close comes.
    sim.queue.submit(Request::Write { offset: 0, buf: Buf::new(vec![2; 4096]), fua: false }, 1);
    sim.queue.submit(Request::Write { offset: 12_345, buf: Buf::new(vec![3; 100]), fua: false }, 2);
    sim.queue.submit(Request::Read { offset: 100, buf: Buf::new(vec![0; 30_000]) }, 3);
    sim.queue.submit(Request::Close, 4);
    sim.world.drain(&sim.queue);
    let order: Vec<u64> = sim.world.results.take().into_iter().map(|(id, result)| result.map(|_| id).unwrap()).collect();
    assert_eq!((order.len(), order.last()), (4, Some(&4)), "close is the last to end: {order:?}");
    let image = sim.world.disk.borrow().stable.clone();
    let sim = reader(&image, &base_image(64));
    assert!(sim.info().was_clean);
    assert_eq!((sim.read(0, 1), sim.read(4096, 1), sim.read(12_345, 1)), (vec![2], vec![1], vec![3]));
    sim.close();
}

/// A host thread's bracket is a request as well: its file must not be closed under it.
#[test]
fn close_waits_for_pass_through_requests_of_the_host() {
    let sim = Sim::new(over_base(MIB), Some(base_image(64)));
    let (_, _, token) = data(&sim, 512 * KIB, 512, true);
    sim.queue.submit(Request::Close, 4);
    sim.world.step(&sim.queue);
    while sim.world.step(&sim.queue) {}
    assert!(sim.world.results.borrow().is_empty(), "closed with a bracket open");
    sim.queue.image().end(token);
    sim.world.drain(&sim.queue);
    assert_eq!(sim.world.results.take().len(), 1);
}

#[test]
fn an_open_for_inspection_reads_little_and_serves_nothing() {
    let (image, base, _) = crashed();
    let sim = Sim::try_open(&image, Some(base), limits(1), Config { no_io: true, ..Config::default() }).unwrap();
    let read: u64 = sim.world.trace.borrow().iter().filter(|t| t.kind == OpKind::Read).map(|t| t.len).sum();
    assert!(read <= 64 * KIB, "{read} bytes read");
    assert_eq!(sim.info().header.virtual_size, MIB);
    assert!(!sim.info().header.clean);
    for request in [Request::Flush, Request::Read { offset: 0, buf: Buf::new(vec![0; 512]) }, Request::Check { repair: fvd_engine::Repair::None }, Request::BlockStatus { offset: 0, len: 1 }] {
        assert_eq!(sim.ask(request).unwrap_err().kind, Kind::State);
    }
    let write = Request::Write { offset: 900 * KIB, buf: Buf::new(vec![0; 512]), fua: false };
    assert_eq!(sim.ask(write).unwrap_err().kind, Kind::State);
    assert_eq!(sim.queue.image().lookup(0, 900 * KIB, 512, false), Lookup::Ask);
    assert_eq!(changes(&sim), 0);
    let world = sim.world.clone();
    sim.close();
    assert_eq!(world.counts.borrow().writes, 0);
}

#[test]
fn metadata_memory_has_a_limit() {
    let size = 20 << 30;
    let image = create(over_base(size), None, limits(1)).unwrap();
    let open = |memory| Sim::try_open(&image, None, limits(1), Config { metadata_memory: memory, ..Config::default() });
    assert_eq!(open(4095).err().unwrap().kind, Kind::NoMemory, "not even the page map");
    // A segment is 64 pages: room for one.
    let sim = open(300 << 10).unwrap();
    sim.write(0, vec![1; 512]);
    for offset in [10 << 30, size - 512] {
        assert_eq!(sim.try_read(offset, 512).unwrap_err().kind, Kind::NoMemory);
        let write = Request::Write { offset, buf: Buf::new(vec![1; 512]), fua: false };
        assert_eq!(sim.ask(write).unwrap_err().kind, Kind::NoMemory);
        let zero = Request::WriteZeroes { offset, len: 512, may_unmap: true, fua: false };
        assert_eq!(sim.ask(zero).unwrap_err().kind, Kind::NoMemory);
    }
    // What does fit is served on, and nothing of the refused writes is there.
    sim.write(4 * MIB, vec![2; 512]);
    let image = sim.close();
    let sim = Sim::open(&image, None);
    assert_eq!((sim.read(0, 1), sim.read(4 * MIB, 1), sim.read(10 << 30, 512)), (vec![1], vec![2], vec![0; 512]));
    assert_eq!(sim.check().0, 0);
    sim.close();
}

/// Reads of all kinds work, all else fails, close fails and writes nothing; and the image opens
/// again with what was flushed.
fn poisoned(sim: Sim, base: &[u8], flushed: &[u8]) {
    assert!(sim.queue.image().is_poisoned());
    assert_eq!(sim.info().header.virtual_size, MIB);
    same(&sim.read(0, 4096), &flushed[..4096], "read by pass-through");
    same(&sim.read(900 * KIB, 4096), &base[900 * 1024..904 * 1024], "read of the base");
    sim.read(0, MIB);
    sim.status(0, MIB);
    let before = changes(&sim);
    for request in [
        Request::Write { offset: 0, buf: Buf::new(vec![9; 4096]), fua: false },
        Request::Write { offset: 700 * KIB, buf: Buf::new(vec![9; 10]), fua: true },
        Request::Flush,
        Request::WriteZeroes { offset: 0, len: 4096, may_unmap: true, fua: false },
        Request::Discard { offset: 0, len: 4096 },
        Request::Resize { size: 2 * MIB, zeroed: true },
        Request::ChangeBase { name: "a".into(), format: "raw".into() },
        Request::Amend(Box::default()),
        Request::Close,
    ] {
        let what = format!("{request:?}");
        assert_eq!(sim.ask(request).unwrap_err().kind, Kind::Poisoned, "{what}");
    }
    assert_eq!(changes(&sim), before, "nothing is written");
    let image = sim.crash();
    let sim = Sim::open(&image, Some(base.to_vec()));
    assert!(!sim.info().was_clean);
    same(&sim.read(0, 4096), &flushed[..4096], "opened again");
    assert_eq!(sim.check(), (0, vec![]));
    sim.close();
}

/// An image with block 0 written and flushed, with its base and what the disk holds.
fn one_flushed_block() -> (Sim, Vec<u8>, Vec<u8>) {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.write(0, vec![4; 4096]);
    sim.flush();
    let mut expect = base.clone();
    expect[..4096].fill(4);
    (sim, base, expect)
}

#[test]
fn a_failed_sync_poisons() {
    for errno in [EIO, ENOSPC] {
        for nth in 0..2 {
            let (sim, base, expect) = one_flushed_block();
            sim.write(50 * BLOCK, vec![5; 4096]);
            // Data sync, journal write, journal sync.
            *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get() + 2 * nth), errno, ..Plan::default() };
            let error = sim.ask(Request::Flush).unwrap_err();
            assert!(matches!(error.kind, Kind::Host(5) | Kind::NoSpace), "{error:?}");
            *sim.world.plan.borrow_mut() = Plan::default();
            poisoned(sim, &base, &expect);
        }
    }
}

#[test]
fn a_failed_journal_write_is_repeated_by_the_next_flush() {
    let (sim, base, mut expect) = one_flushed_block();
    sim.write(50 * BLOCK, vec![5; 4096]);
    *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get() + 1), errno: ENOSPC, ..Plan::default() };
    assert_eq!(sim.ask(Request::Flush).unwrap_err().kind, Kind::NoSpace);
    sim.write(60 * BLOCK, vec![6; 4096]);
    sim.flush();
    expect[50 * 4096..51 * 4096].fill(5);
    expect[60 * 4096..61 * 4096].fill(6);
    let sim = Sim::open(&sim.crash(), Some(base));
    same(&sim.read(0, MIB), &expect, "disk");
    sim.close();
}

#[test]
fn a_failed_data_write_fails_the_request_and_changes_nothing() {
    let (sim, base, expect) = one_flushed_block();
    for (errno, kind) in [(EIO, Kind::Host(5)), (ENOSPC, Kind::NoSpace)] {
        *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get()), errno, ..Plan::default() };
        let write = Request::Write { offset: 80 * BLOCK, buf: Buf::new(vec![9; 4096]), fua: false };
        assert_eq!(sim.ask(write).unwrap_err().kind, kind);
        same(&sim.read(0, MIB), &expect, "after the failure");
    }
    // A base that fails fails the copy-on-write.
    *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get()), errno: EIO, ..Plan::default() };
    let write = Request::Write { offset: 80 * BLOCK + 5, buf: Buf::new(vec![9; 10]), fua: false };
    assert_eq!(sim.ask(write).unwrap_err().kind, Kind::Host(5));
    same(&sim.read(0, MIB), &expect, "after the failed copy");
    sim.flush();
    let sim = Sim::open(&sim.close(), Some(base));
    same(&sim.read(0, MIB), &expect, "opened again");
    sim.close();
}

#[test]
fn a_poisoned_image_reads_on_and_writes_nothing() {
    let (sim, base, expect) = one_flushed_block();
    sim.write(20 * BLOCK, vec![8; 4096]);
    sim.queue.image().poison("the test says so");
    assert!(sim.ask(Request::Flush).unwrap_err().text.contains("the test says so"));
    poisoned(sim, &base, &expect);
}

/// The engine catches its own panics: the request fails, the image is poisoned, the queue goes on,
/// and so do what other guests have on their way and who waits for the same block.
#[test]
fn a_panic_within_a_request_leaves_a_queue_that_reads() {
    let (sim, base, expect) = one_flushed_block();
    let image = sim.close();
    for seed in 0..30 {
        let config = Config { fault: Some(Fault::PanicInWrite), ..Config::default() };
        let sim = Sim::try_open(&image, Some(base.clone()), limits(1), config).unwrap();
        *sim.world.rng.borrow_mut() = Rng::new(seed);
        let write = |offset| Request::Write { offset, buf: Buf::new(vec![8; 10]), fua: false };
        sim.queue.submit(write(90 * BLOCK + 1), 1);
        sim.queue.submit(Request::Read { offset: 500 * KIB, buf: Buf::new(vec![0; 512]) }, 2);
        sim.queue.submit(write(90 * BLOCK + 100), 3);
        sim.queue.submit(Request::Flush, 4);
        caught(|| sim.world.drain(&sim.queue)).expect("nothing unwinds out of the engine");
        let mut ended = sim.world.results.take();
        ended.sort_by_key(|r| r.0);
        assert_eq!(ended.iter().map(|r| r.0).collect::<Vec<_>>(), [1, 2, 3, 4], "seed {seed}");
        let error = ended[0].1.as_ref().unwrap_err();
        assert!(error.kind == Kind::Poisoned && error.text.contains("internal error"), "seed {seed}: {error:?}");
        assert!(ended[1].1.is_ok() && ended[2].1.is_err(), "seed {seed}");
        assert!(sim.world.log.borrow().len() < 5);
        // The image was closed in good order before; nothing has changed that yet.
        same(&sim.read(0, MIB), &expect, "reads go on");
        assert_eq!(sim.ask(Request::Flush).unwrap_err().kind, Kind::Poisoned);
        let before = changes(&sim);
        assert_eq!(sim.ask(Request::Close).unwrap_err().kind, Kind::Poisoned);
        assert_eq!(changes(&sim), before);
        let again = Sim::open(&sim.crash(), Some(base.clone()));
        same(&again.read(0, MIB), &expect, "opened again");
        again.close();
    }
}

/// The host may still be writing to the memory of a request that panicked: it ends when the last
/// of its operations has, and not before.
#[test]
fn a_request_that_panicked_ends_after_its_operations() {
    let base = base_image(10);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.write(0, vec![1; 4096]);
    sim.flush();
    // The first part comes from the image, the second from the base; the rest is zeroed, which panics.
    let buf = Buf::new(vec![0; 8192]);
    let borrowed = buf.0.borrow();
    caught(|| sim.queue.submit(Request::Read { offset: 0, buf: buf.clone() }, 1)).expect("nothing unwinds out of the engine");
    drop(borrowed);
    assert!(sim.queue.image().is_poisoned());
    for under_way in [2, 1] {
        assert_eq!(sim.world.pending.borrow().len(), under_way);
        assert!(sim.world.results.borrow().is_empty(), "the request ended while the host has its memory");
        assert!(sim.world.step(&sim.queue));
        sim.queue.run();
    }
    let results = sim.world.results.take();
    assert!(matches!(&results[..], [(1, Err(error))] if error.kind == Kind::Poisoned && error.text.contains("internal error")), "{results:?}");
    assert!(sim.queue.is_idle());
    same(&sim.read(4096, 1024), &base[4096..], "reads go on");
    let again = Sim::open(&sim.crash(), Some(base));
    assert_eq!(again.read(0, 4096), vec![1; 4096]);
    again.close();
}

/// Every operation of a session fails once: requests fail with its errno, memory and disk agree,
/// and the image opens afterwards with nothing lost that was flushed.
#[test]
fn any_operation_may_fail_and_the_image_stays_openable() {
    let base = base_image(2048);
    let image = create(over_base(MIB), Some(base.clone()), limits(1)).unwrap();
    for nth in 0..90 {
        for errno in [EIO, ENOSPC] {
            let world = World::new(image.clone(), Some(base.clone()), nth, limits(1));
            let queue = world.queue(Config { checkpoint_after: 1, ..Config::default() });
            *world.plan.borrow_mut() = Plan { fail_at: Some(nth), errno, ..Plan::default() };
            let mut sure = base.clone();
            let mut memory = base.clone();
            let mut torn = Vec::new();
            if world.request(&queue, Request::Open).unwrap().is_ok() {
                for i in 0..6u64 {
                    let range = (i * 9000) as usize..(i * 9000) as usize + 3000;
                    let write = Request::Write { offset: i * 9000, buf: Buf::new(vec![i as u8 + 1; 3000]), fua: false };
                    match world.request(&queue, write).unwrap() {
                        Ok(_) => memory[range].fill(i as u8 + 1),
                        Err(_) => torn.push(range),
                    }
                    if world.request(&queue, Request::Flush).unwrap().is_ok() {
                        sure.copy_from_slice(&memory);
                    }
                }
                if world.request(&queue, Request::Close).unwrap().is_ok() {
                    sure.copy_from_slice(&memory);
                }
            }
            std::mem::forget(queue);
            let stable = world.disk.borrow().stable.clone();
            let sim = Sim::open(&stable, Some(base.clone()));
            let found = sim.read(0, MIB);
            for at in 0..MIB as usize {
                let fine = found[at] == sure[at] || found[at] == memory[at] || torn.iter().any(|r| r.contains(&at));
                assert!(fine, "operation {nth} failed with {errno}: byte {at} is {} instead of {}", found[at], sure[at]);
            }
            assert_eq!(sim.check(), (0, vec![]), "operation {nth} failed with {errno}");
            sim.close();
        }
    }
}

/// A journal full of commits that nobody could write back: a flush says so and later ones succeed.
#[test]
fn a_checkpoint_that_cannot_write_fails_flushes_but_loses_nothing() {
    let sim = Sim::new(over_base(4096 * BLOCK), None);
    let header = sim.info().header;
    let area = *header.region(RegionKind::DoubleWrite).unwrap();
    let is_area = move |op: &HostOp<Buf>| matches!(op.kind, OpKind::Write { .. }) && op.offset == area.offset;
    // Only writes to the area fail, each of them.
    let ask = |request| {
        sim.queue.submit(request, 1);
        while sim.world.results.borrow().is_empty() {
            sim.queue.run();
            let fail = sim.world.pending.borrow().iter().any(|p| is_area(&p.1));
            *sim.world.plan.borrow_mut() = Plan { fail_at: fail.then(|| sim.world.ops.get()), errno: EIO, ..Plan::default() };
            assert!(sim.world.step_where(&sim.queue, |op| !fail || is_area(op)), "a request hangs");
        }
        *sim.world.plan.borrow_mut() = Plan::default();
        sim.world.results.borrow_mut().remove(0).1
    };
    let (mut block, mut failed) = (0, 0);
    while failed < 3 {
        ask(Request::Write { offset: block * BLOCK, buf: Buf::new(vec![1; 4096]), fua: false }).unwrap();
        block += 1;
        assert!(block < 1000, "the journal is never full");
        failed += u64::from(ask(Request::Flush).is_err());
    }
    assert!(block >= 256, "{block} commits fit");
    assert!(!sim.queue.image().is_poisoned());
    sim.world.drain(&sim.queue);
    sim.flush();
    let sim = Sim::open(&sim.crash(), None);
    for i in 0..block {
        assert_eq!(sim.read(i * BLOCK, 1), [1], "block {i}");
    }
    assert_eq!(sim.check(), (0, vec![]));
    sim.close();
}

/// A disk shrinks to nothing and grows again: nothing of before shows, and a check finds nothing.
#[test]
fn a_disk_of_nothing_grows_again() {
    for is_compact in [false, true] {
        let base = base_image(4096);
        let params = CreateParams { chunk_size: if is_compact { 64 << 10 } else { 0 }, compact: is_compact, ..over_base(MIB) };
        let sim = Sim::new(params, Some(base.clone()));
        sim.write(3 * KIB, vec![9; 300 * KIB as usize]);
        sim.flush();
        sim.ask(Request::Check { repair: fvd_engine::Repair::None }).unwrap();
        let sim = Sim::open(&sim.close(), Some(base.clone()));
        sim.write(5 * KIB, vec![8; 100 * KIB as usize]);
        sim.write(900 * KIB, vec![8; 50 * KIB as usize]);
        sim.ask(Request::Resize { size: 0, zeroed: false }).unwrap();
        assert_eq!(sim.check(), (0, Vec::new()), "compact: {is_compact}");
        sim.ask(Request::Resize { size: MIB / 2, zeroed: true }).unwrap();
        assert_eq!(sim.read(0, MIB / 2), vec![0; MIB as usize / 2]);
        assert_eq!(sim.check(), (0, Vec::new()), "compact: {is_compact}");
        sim.write(7 * KIB, vec![6; 512]);
        sim.ask(Request::ChangeBase { name: "other".into(), format: "raw".into() }).unwrap();
        assert_eq!(sim.check(), (0, Vec::new()), "compact: {is_compact}");
        let bytes = sim.close();
        let sim = Sim::open(&bytes, Some(base));
        let mut expect = vec![0; MIB as usize / 2];
        expect[7 * KIB as usize..][..512].fill(6);
        assert_eq!(sim.read(0, MIB / 2), expect);
        assert_eq!(sim.check(), (0, Vec::new()), "compact: {is_compact}");
        sim.close();
    }
}
