// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compact images: sizes, what an allocation costs the host, freed and reused chunks, storage that
//! runs out. What a cut may leave of them is the simulator's.

mod common;

use common::sim::*;
use common::*;
use fvd_engine::host::{FileId, Limits, OpKind};
use fvd_engine::{BlockStatus, Config, CreateParams, Kind, Place, Preallocation, Reply, Request};
use fvd_format::{RegionKind, page};

const KIB: u64 = 1 << 10;
const CHUNK: u64 = 64 * KIB;

fn compact(size: u64) -> CreateParams {
    CreateParams { virtual_size: Some(size), compact: true, chunk_size: CHUNK as u32, storage_grow_unit: 16 * CHUNK, ..CreateParams::default() }
}

fn over(params: CreateParams, base_format: &str) -> CreateParams {
    CreateParams { base_name: "base".into(), base_format: base_format.into(), ..params }
}

fn discard(sim: &Sim, offset: u64, len: u64) {
    assert_eq!(sim.ask(Request::Discard { offset, len }), Ok(Reply::Done));
}

fn place(sim: &Sim, offset: u64) -> Option<u64> {
    match sim.status(offset, 512).place {
        Place::Data { file: FileId::Image, offset } => Some(offset),
        Place::Zero => None,
        other => panic!("{other:?}"),
    }
}

fn mapped(sim: &Sim) -> u64 {
    match sim.ask(Request::Check { repair: fvd_engine::Repair::None }) {
        Ok(Reply::Check(report)) => {
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            report.chunks_allocated
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_terabyte_starts_small_with_and_without_a_base() {
    for base in [false, true] {
        let params = CreateParams { virtual_size: Some(1 << 40), compact: true, ..CreateParams::default() };
        let params = if base { over(params, "raw") } else { params };
        let image = create(params, None, limits(1)).unwrap();
        let sim = Sim::open(&image, None);
        let header = sim.info().header;
        let journal = header.region(RegionKind::Journal).unwrap().length;
        assert!(image.len - journal <= 8 * MIB, "{} bytes beside the journal", image.len - journal);
        let bytes = |kind| header.region(kind).map_or(0, |r| r.length);
        // The figure of the design: 4.1 MiB of table and 2.1 of bitmap.
        assert!(bytes(RegionKind::Table) + bytes(RegionKind::Bitmap) <= (62 * MIB) / 10);
        assert_eq!(bytes(RegionKind::Bitmap) > 0, base);
        sim.close();
    }
}

#[test]
fn an_allocating_write_and_its_flush_are_two_writes_and_one_sync() {
    for align in [1, 512, 4096] {
        let limits = Limits { request_alignment: align, memory_alignment: 512, ..Limits::default() };
        let image = create(compact(256 * MIB), None, limits).unwrap();
        let sim = Sim::try_open(&image, None, limits, Config::default()).unwrap();
        sim.write(0, vec![1; 4096]);
        sim.flush();
        sim.counts();
        let mut rng = Rng::new(7);
        let mut steps = 0;
        for i in 1..100 {
            // Everywhere, never twice in a chunk.
            sim.write((i * 37 % 4096) * CHUNK + rng.below(15) * 4096, vec![2; 4096]);
            sim.flush();
            let counts = sim.counts();
            if counts.syncs == 1 {
                assert_eq!((counts.writes, counts.bytes_written, counts.reads), (2, 8192, 0), "write {i}");
            } else {
                // A growth step, ahead of need: two syncs and its record, alone or with the write's.
                assert!(counts.writes <= 3 && counts.bytes_written <= 12288 && counts.reads == 0 && counts.syncs <= 3, "write {i}: {counts:?}");
                steps += 1;
            }
        }
        assert!((5..=7).contains(&steps), "{steps} steps of 16 chunks for 100 chunks");
        sim.close();
    }
}

#[test]
fn over_a_base_or_in_used_space_it_is_one_sync_more() {
    let base = base_image(2048);
    let image = create(over(compact(MIB), "raw"), Some(base.clone()), limits(512)).unwrap();
    let sim = Sim::open(&image, Some(base));
    sim.write(0, vec![1; 4096]);
    sim.flush();
    sim.counts();
    sim.write(5 * CHUNK, vec![1; 4096]);
    sim.flush();
    let counts = sim.counts();
    assert_eq!((counts.writes, counts.bytes_written, counts.syncs), (2, 8192, 2));
    let image = sim.close();
    // Opened again, what is left of the step is not known to be zero.
    let sim = Sim::open(&image, None);
    sim.write(7 * CHUNK, vec![1; 4096]);
    sim.flush();
    sim.counts();
    sim.write(9 * CHUNK, vec![1; 4096]);
    sim.flush();
    assert_eq!(sim.counts().syncs, 2);
    sim.close();
}

#[test]
fn neighbours_stay_neighbours() {
    let sim = Sim::new(compact(64 * MIB), None);
    for i in 0..160 {
        sim.write(i * CHUNK, vec![1; CHUNK as usize]);
    }
    let BlockStatus { place: Place::Data { .. }, len } = sim.status(0, 64 * MIB) else { panic!("no data") };
    assert_eq!(len, 160 * CHUNK, "one run, across ten growth steps");
    // A large write is one write, however many chunks it fills.
    sim.counts();
    sim.write(200 * CHUNK, vec![3; 8 * CHUNK as usize]);
    assert!(sim.counts().writes <= 1 + 1, "one, and the record of a growth step");
    assert_eq!(mapped(&sim), 168);
    sim.close();
}

#[test]
fn zeroes_and_discards_take_no_storage_and_give_it_back() {
    let base = base_image(4096);
    let sim = Sim::new(over(compact(2 * MIB), "raw"), Some(base.clone()));
    let zero = |offset, len, may_unmap| assert_eq!(sim.ask(Request::WriteZeroes { offset, len, may_unmap, fua: false }), Ok(Reply::Done));
    zero(0, 4 * CHUNK, false);
    assert_eq!(mapped(&sim), 0);
    same(&sim.read(0, 4 * CHUNK), &vec![0; 4 * CHUNK as usize], "zeroes over the base");
    same(&sim.read(4 * CHUNK, CHUNK), &base[4 * CHUNK as usize..][..CHUNK as usize], "the base");
    // Part of a block that is in the base has to be written.
    zero(5 * CHUNK + 512, 512, true);
    assert_eq!(mapped(&sim), 1);
    let mut expect = base[5 * CHUNK as usize..][..4096].to_vec();
    expect[512..1024].fill(0);
    same(&sim.read(5 * CHUNK, 4096), &expect, "part of a block");
    discard(&sim, 5 * CHUNK, CHUNK);
    assert_eq!((mapped(&sim), place(&sim, 5 * CHUNK)), (0, None));
    same(&sim.read(5 * CHUNK, CHUNK), &vec![0; CHUNK as usize], "a discarded chunk hides the base");
    sim.close();
}

#[test]
fn freed_chunks_are_used_again_before_new_storage() {
    let size = 40 * CHUNK;
    let sim = Sim::new(compact(size), None);
    let data = sim.info().header.data_offset;
    for round in 0..100u64 {
        let tag = 1 + round as u8;
        for i in 0..40 {
            sim.write((i * 7 % 40) * CHUNK, vec![tag; CHUNK as usize]);
        }
        if round % 3 == 0 {
            sim.flush();
        }
        discard(&sim, 0, size);
        // Only part of a chunk, later: what is around it must be zero again.
        sim.write(3 * CHUNK + 4096, vec![tag; 4096]);
        same(&sim.read(3 * CHUNK, 4096), &[0; 4096], "before");
        same(&sim.read(3 * CHUNK + 8192, CHUNK - 8192), &vec![0; CHUNK as usize - 8192], "behind");
    }
    let reach = sim.info().header.reach;
    let image = sim.close();
    assert!(image.len <= data + size + CHUNK + 16 * CHUNK, "{} bytes, reach {reach}", image.len);
}

#[test]
fn storage_that_is_full_fails_the_write_and_nothing_else() {
    let fixed = Limits { grows_zeroed: false, ..limits(512) };
    // Journal, double-write area and table, then room for a few chunks.
    let mut storage = Store::default();
    storage.write(0, &vec![0xa5; 4 * MIB as usize]);
    let params = CreateParams { journal_size: MIB, ..compact(64 * CHUNK) };
    let storage = create_in(storage, params, None, fixed).unwrap();
    let sim = Sim::try_open(&storage, None, fixed, Config::default()).unwrap();
    let mut written = 0;
    let error = loop {
        match sim.ask(Request::Write { offset: written * CHUNK, buf: Buf::new(vec![1 + written as u8; 4096]), fua: false }) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind, Kind::NoSpace, "{error}");
    assert!(written > 2 && written < 64);
    for i in 0..written {
        let mut expect = vec![0; CHUNK as usize];
        expect[..4096].fill(1 + i as u8);
        same(&sim.read(i * CHUNK, CHUNK), &expect, "no old bytes");
    }
    // Room by a discard, once that is committed.
    discard(&sim, 0, CHUNK);
    sim.write(written * CHUNK, vec![7; 4096]);
    // Room by more storage.
    assert!(sim.ask(Request::Write { offset: 63 * CHUNK, buf: Buf::new(vec![9; 512]), fua: false }).is_err());
    {
        let disk = &mut *sim.world.disk.borrow_mut();
        let end = disk.view.len;
        for store in [&mut disk.view, &mut disk.stable] {
            store.write(end, &vec![0x5a; 2 * CHUNK as usize]);
        }
    }
    sim.write(63 * CHUNK, vec![9; 512]);
    same(&sim.read(63 * CHUNK + 512, 4096), &[0; 4096], "no old bytes");
    sim.flush();
    assert_eq!(mapped(&sim), written + 1);
    sim.close();
}

#[test]
fn a_disk_that_outgrows_its_table_gets_a_larger_one() {
    let sim = Sim::new(compact(64 * MIB), None);
    sim.write(60 * MIB, vec![1; 4096]);
    let table = *sim.info().header.region(RegionKind::Table).unwrap();
    assert_eq!(sim.ask(Request::Resize { size: 1 << 30, zeroed: true }), Ok(Reply::Done));
    assert_ne!(sim.info().header.region(RegionKind::Table).unwrap().offset, table.offset);
    sim.write(1000 * MIB, vec![2; 4096]);
    same(&sim.read(60 * MIB, 4096), &[1; 4096], "old part");
    same(&sim.read(100 * MIB, 4096), &[0; 4096], "new part");
    assert_eq!(mapped(&sim), 2);
    let sim = Sim::open(&sim.close(), None);
    same(&sim.read(1000 * MIB, 4096), &[2; 4096], "opened again");
    // Where the regions lie now is nobody's storage.
    for i in 0..40 {
        sim.write(i * CHUNK, vec![3; 512]);
    }
    assert_eq!(mapped(&sim), 42);
    sim.close();
}

/// A disk of 16 GiB has a table of 1 MiB, for which there is no room before the data.
const LARGE: u64 = 16 << 30;

fn length(sim: &Sim) -> u64 {
    sim.world.disk.borrow().view.len
}

fn table(sim: &Sim) -> u64 {
    sim.info().header.region(RegionKind::Table).unwrap().offset
}

/// The first allocation of a session reads the table; what comes meanwhile waits for that.
#[test]
fn first_changes_at_once_look_for_free_chunks_once() {
    let sim = Sim::new(compact(LARGE), None);
    for i in 0..4 {
        sim.write(i * (LARGE / 4), vec![1 + i as u8; 4096]);
    }
    let sim = Sim::open(&sim.close(), None);
    for i in 1..5 {
        sim.queue.submit(Request::Write { offset: i * CHUNK, buf: Buf::new(vec![10 + i as u8; 4096]), fua: false }, i);
    }
    sim.queue.submit(Request::Discard { offset: LARGE / 2, len: CHUNK }, 5);
    sim.world.drain(&sim.queue);
    let results = sim.world.results.take();
    assert!(results.len() == 5 && results.iter().all(|(_, result)| result.is_ok()), "{results:?}");
    let places: std::collections::BTreeSet<_> = (0..5).map(|i| place(&sim, i * CHUNK).unwrap()).collect();
    assert_eq!((places.len(), mapped(&sim)), (5, 7));
    let sim = Sim::open(&sim.close(), None);
    for i in 0..4 {
        let there = if i == 2 { 0 } else { 1 + i as u8 };
        same(&sim.read(i * (LARGE / 4), 4096), &[there; 4096], "what was there");
        same(&sim.read((i + 1) * CHUNK, 4096), &[11 + i as u8; 4096], "what came at once");
    }
    sim.close();
}

#[test]
fn a_larger_table_takes_freed_chunks_before_new_storage() {
    let sim = Sim::new(compact(64 * MIB), None);
    sim.write(0, vec![1; 40 * CHUNK as usize]);
    sim.write(60 * MIB, vec![2; 4096]);
    sim.flush();
    discard(&sim, 0, 40 * CHUNK);
    sim.flush();
    let before = length(&sim);
    assert_eq!(sim.ask(Request::Resize { size: LARGE, zeroed: true }), Ok(Reply::Done));
    assert_eq!(length(&sim), before, "there was room");
    assert!((sim.info().header.data_offset..before).contains(&table(&sim)));
    same(&sim.read(60 * MIB, 4096), &[2; 4096], "old part");
    // What is left of the freed chunks is data again, and the table is nobody's storage.
    for i in 0..60 {
        sim.write(i * CHUNK, vec![3; 512]);
    }
    same(&sim.read(512, CHUNK - 512), &vec![0; CHUNK as usize - 512], "no old bytes");
    assert_eq!(mapped(&sim), 61);
    let sim = Sim::open(&sim.close(), None);
    assert_eq!(mapped(&sim), 61);
    same(&sim.read(LARGE - 4096, 4096), &[0; 4096], "new part");
    sim.close();
}

/// Nothing was ever written: the growth step for the table comes before the first session.
#[test]
fn what_a_larger_table_leaves_of_its_growth_step_is_used() {
    let sim = Sim::new(compact(64 * MIB), None);
    assert_eq!(sim.ask(Request::Resize { size: LARGE, zeroed: true }), Ok(Reply::Done));
    let (steps, before) = (sim.stats().growth_steps, length(&sim));
    assert!(steps > 0 && (sim.info().header.data_offset..before).contains(&table(&sim)));
    // After a cut right now the disk has its new size, and nothing lies where the table does.
    let image = sim.crash();
    let sim = Sim::open(&image, None);
    assert_eq!((sim.info().header.virtual_size, mapped(&sim)), (LARGE, 0));
    for i in 0..8 {
        sim.write(i * CHUNK, vec![4; CHUNK as usize]);
    }
    assert_eq!(length(&sim), before, "there was room for eight chunks");
    assert_eq!(mapped(&sim), 8);
    let sim = Sim::open(&sim.close(), None);
    same(&sim.read(0, 8 * CHUNK), &vec![4; 8 * CHUNK as usize], "opened again");
    sim.close();
}

#[test]
fn chunks_of_a_table_that_was_outgrown_become_data() {
    let sim = Sim::new(compact(64 * MIB), None);
    assert_eq!(sim.ask(Request::Resize { size: LARGE, zeroed: true }), Ok(Reply::Done));
    let old = *sim.info().header.region(RegionKind::Table).unwrap();
    assert!(old.offset >= sim.info().header.data_offset);
    assert_eq!(sim.ask(Request::Resize { size: 4 * LARGE, zeroed: true }), Ok(Reply::Done));
    assert_ne!(table(&sim), old.offset);
    let reused = (0..60).filter(|i| {
        sim.write(i * CHUNK, vec![5; 4096]);
        (old.offset..old.end()).contains(&place(&sim, i * CHUNK).unwrap())
    });
    assert_eq!(reused.count() as u64, old.length.div_ceil(CHUNK), "before new storage");
    same(&sim.read(4096, CHUNK - 4096), &vec![0; CHUNK as usize - 4096], "nothing of the old table");
    assert_eq!(mapped(&sim), 60);
    let sim = Sim::open(&sim.close(), None);
    same(&sim.read(59 * CHUNK, 4096), &[5; 4096], "opened again");
    assert_eq!(mapped(&sim), 60);
    sim.close();
}

#[test]
fn without_room_for_a_larger_table_the_disk_keeps_its_size_and_its_room() {
    let fixed = Limits { grows_zeroed: false, ..limits(512) };
    let mut storage = Store::default();
    storage.write(0, &vec![0xa5; 4 * MIB as usize]);
    let params = CreateParams { journal_size: MIB, ..compact(64 * CHUNK) };
    let storage = create_in(storage, params, None, fixed).unwrap();
    let fill = |sim: &Sim| {
        let mut written = 0;
        while sim.ask(Request::Write { offset: written * CHUNK, buf: Buf::new(vec![1 + written as u8; 4096]), fua: false }).is_ok() {
            written += 1;
        }
        written
    };
    let room = fill(&Sim::try_open(&storage, None, fixed, Config::default()).unwrap());
    assert!(room > 2 && room < 64);
    for written in [false, true] {
        let sim = Sim::try_open(&storage, None, fixed, Config::default()).unwrap();
        if written {
            sim.write(0, vec![1; 4096]);
        }
        let error = sim.ask(Request::Resize { size: 4 * LARGE, zeroed: true }).unwrap_err();
        // The first write made all there is a run to write to.
        assert!(error.kind == Kind::NoSpace && error.text.contains(if written { "is free" } else { "in a row" }), "{error}");
        assert_eq!(sim.info().header.virtual_size, 64 * CHUNK);
        // All that was there before is still there to write to.
        assert_eq!(fill(&sim), room);
        assert_eq!(mapped(&sim), room);
        sim.close();
    }
}

#[test]
fn preallocated_chunks_have_their_place_and_read_zero() {
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let sim = Sim::new(CreateParams { preallocation: how, ..compact(10 * CHUNK + 512) }, None);
        assert_eq!(mapped(&sim), 11);
        let BlockStatus { len, .. } = sim.status(0, 10 * CHUNK + 512);
        assert_eq!(len, 10 * CHUNK + 512);
        sim.counts();
        sim.write(3 * CHUNK, vec![1; 4096]);
        sim.flush();
        let counts = sim.counts();
        assert_eq!((counts.writes, counts.syncs), (1, 1), "nothing to commit");
        same(&sim.read(3 * CHUNK + 4096, 4096), &[0; 4096], "the rest");
        sim.close();
    }
}

/// What a host does that cannot zero: one that says so, and one that finds out.
#[test]
fn where_zeroing_is_dear_bits_say_what_was_written() {
    let said = Limits { grows_zeroed: false, cheap_zeroing: false, ..limits(512) };
    let unsaid = Limits { cheap_zeroing: true, ..said };
    for limits in [said, unsaid] {
        let open = |bytes: &Store| {
            let sim = Sim::try_open(bytes, None, limits, Config::default()).unwrap();
            sim.world.zeroing_is_dear.set(true);
            sim
        };
        let mut storage = Store::default();
        storage.write(0, &vec![0xa5; 10 * MIB as usize]);
        let params = CreateParams { journal_size: MIB, storage_grow_unit: 128 * CHUNK, ..compact(64 * CHUNK + 512) };
        let sim = open(&create_in(storage, params, None, limits).unwrap());
        sim.write(0, vec![1; 512]);
        sim.flush();
        let header = sim.info().header;
        assert_eq!((header.block_size, header.covered, header.base_length), (4096, 64 * CHUNK + 512, 0));
        // Whatever a write leaves of its chunk is not written, and reads as zero.
        let mut expect = vec![0; (64 * CHUNK + 512) as usize];
        expect[..512].fill(1);
        let write = |sim: &Sim, expect: &mut Vec<u8>, offset: u64, value: u8| {
            sim.counts();
            sim.world.trace.take();
            sim.write(offset, vec![value; 4096]);
            sim.flush();
            let counts = sim.counts();
            assert_eq!((counts.writes, counts.bytes_written, counts.syncs), (2, 8192, 2));
            assert!(!sim.world.trace.take().iter().any(|op| matches!(op.kind, OpKind::WriteZeroes { .. })));
            expect[offset as usize..][..4096].fill(value);
        };
        for (value, chunk) in [5, 6, 9, 20].into_iter().enumerate() {
            write(&sim, &mut expect, chunk * CHUNK + 8192, 2 + value as u8);
        }
        same(&sim.read(0, expect.len() as u64), &expect, "written");
        // A part of a chunk is zeroed without a write, for good; the chunk keeps its place.
        let before = place(&sim, 9 * CHUNK + 8192).unwrap();
        sim.counts();
        sim.ask(Request::WriteZeroes { offset: 9 * CHUNK + 4096, len: 12288, may_unmap: false, fua: true }).unwrap();
        assert_eq!((sim.counts().writes, place(&sim, 9 * CHUNK + 8192)), (1, None), "the journal");
        expect[(9 * CHUNK + 4096) as usize..][..12288].fill(0);
        write(&sim, &mut expect, 9 * CHUNK + 12288, 7);
        assert_eq!(place(&sim, 9 * CHUNK + 12288), Some(before + 4096));
        // A sector of a block is another matter.
        sim.ask(Request::WriteZeroes { offset: 9 * CHUNK + 12288 + 512, len: 512, may_unmap: true, fua: false }).unwrap();
        expect[(9 * CHUNK + 12288 + 512) as usize..][..512].fill(0);
        discard(&sim, 6 * CHUNK, CHUNK);
        discard(&sim, 20 * CHUNK + 8192, 4096);
        expect[(6 * CHUNK) as usize..(7 * CHUNK) as usize].fill(0);
        expect[(20 * CHUNK + 8192) as usize..][..4096].fill(0);
        // Storage that was freed is as good as any.
        sim.flush();
        write(&sim, &mut expect, 6 * CHUNK + 16384, 8);
        let sim = open(&sim.close());
        same(&sim.read(0, expect.len() as u64), &expect, "opened again");
        // The first commit of a session updates the header.
        sim.write(0, vec![1; 512]);
        sim.write(4096, vec![1; 512]);
        expect[4096..4608].fill(1);
        sim.flush();
        write(&sim, &mut expect, 6 * CHUNK + 20480, 9);
        write(&sim, &mut expect, 30 * CHUNK, 10);
        // What is added, too, has bits.
        sim.ask(Request::Resize { size: 80 * CHUNK, zeroed: true }).unwrap();
        expect.resize(80 * CHUNK as usize, 0);
        assert_eq!(sim.info().header.covered, 80 * CHUNK);
        write(&sim, &mut expect, 70 * CHUNK + 4096, 11);
        write(&sim, &mut expect, 64 * CHUNK + 4096, 12);
        let sim = open(&sim.crash());
        same(&sim.read(0, expect.len() as u64), &expect, "after a crash");
        assert_eq!(mapped(&sim), 8);
        sim.close();
    }
}

/// Past a base that is shorter than the disk, bits say zero; another base does not show there.
#[test]
fn a_longer_base_does_not_show_where_bits_say_zero() {
    let dear = Limits { grows_zeroed: false, cheap_zeroing: false, ..limits(512) };
    let mut storage = Store::default();
    storage.write(0, &vec![0xa5; 10 * MIB as usize]);
    let params = CreateParams { journal_size: MIB, ..over(compact(32 * CHUNK), "raw") };
    let short = vec![0x77; (4 * CHUNK + 512) as usize];
    let storage = create_in(storage, params, Some(short.clone()), dear).unwrap();
    let sim = Sim::try_open(&storage, Some(short.clone()), dear, Config::default()).unwrap();
    assert_eq!((sim.info().header.covered, sim.info().header.base_length), (32 * CHUNK, 4 * CHUNK + 512));
    let mut expect = vec![0; 32 * CHUNK as usize];
    expect[..short.len()].copy_from_slice(&short);
    for at in [CHUNK, 4 * CHUNK + 1024, 9 * CHUNK] {
        sim.write(at, vec![1; 1024]);
        expect[at as usize..][..1024].fill(1);
    }
    same(&sim.read(0, 32 * CHUNK), &expect, "over the shorter base");
    let long = vec![0x77; (20 * CHUNK) as usize];
    let sim = Sim::try_open(&sim.close(), Some(long.clone()), dear, Config::default()).unwrap();
    sim.ask(Request::ChangeBase { name: "long".into(), format: "raw".into() }).unwrap();
    let sim = Sim::try_open(&sim.close(), Some(long.clone()), dear, Config::default()).unwrap();
    same(&sim.read(0, 32 * CHUNK), &expect, "over the longer base");
    // But what is given back to it does.
    sim.ask(Request::MakeEmpty).unwrap();
    expect.fill(0);
    expect[..long.len()].copy_from_slice(&long);
    same(&sim.read(0, 32 * CHUNK), &expect, "emptied");
    sim.close();
}

#[test]
fn bad_parameters_are_named() {
    let fails = |params: CreateParams, what: &str| {
        let error = create(params, None, limits(1)).unwrap_err();
        assert!(error.text.contains(what), "{error}");
    };
    fails(CreateParams { chunk_size: 1 << 20, ..over_base(MIB) }, "compact_image=on");
    fails(CreateParams { chunk_size: 3 << 16, ..compact(MIB) }, "chunk_size 196608");
    fails(CreateParams { chunk_size: 1 << 27, ..compact(MIB) }, "chunk_size 134217728");
    fails(CreateParams { storage_grow_unit: 100_000, ..compact(MIB) }, "storage_grow_unit 100000");
    fails(CreateParams { block_size: 1 << 20, ..over(compact(MIB), "raw") }, "block_size 1048576");
    fails(CreateParams { virtual_size: Some(1 << 48), ..compact(0) }, "4294967296 chunks");
}

/// A compact image on a device with room for two more chunks, which waits for storage.
fn waiting() -> Sim {
    let fixed = Limits { grows_zeroed: false, ..limits(512) };
    let mut storage = Store::default();
    storage.write(0, &vec![0xa5; 4 * MIB as usize]);
    let params = CreateParams { journal_size: MIB, ..compact(64 * CHUNK) };
    let mut storage = create_in(storage, params, None, fixed).unwrap();
    storage.resize(Sim::try_open(&storage, None, fixed, Config::default()).unwrap().info().header.data_offset + 2 * CHUNK);
    Sim::try_open(&storage, None, fixed, Config { wait_for_space: true, ..Config::default() }).unwrap()
}

fn write_of(chunk: u64, count: u64) -> Request<Buf> {
    Request::Write { offset: chunk * CHUNK, buf: Buf::new(vec![1 + chunk as u8; (count * CHUNK) as usize]), fua: false }
}

/// Submits a request and lets everything happen that can.
fn begin(sim: &Sim, request: Request<Buf>, id: u64) {
    sim.queue.submit(request, id);
    settle(sim);
}

fn settle(sim: &Sim) {
    sim.queue.run();
    while sim.world.step(&sim.queue) {
        sim.queue.run();
    }
}

fn lengthen(sim: &Sim, chunks: u64) {
    let disk = &mut *sim.world.disk.borrow_mut();
    let end = disk.view.len;
    for store in [&mut disk.view, &mut disk.stable] {
        store.write(end, &vec![0x5a; (chunks * CHUNK) as usize]);
    }
}

fn told(sim: &Sim) -> Vec<String> {
    sim.world.log.borrow().iter().filter(|text| text.starts_with("low space")).cloned().collect()
}

#[test]
fn a_write_waits_for_storage_and_nothing_else_does() {
    let sim = waiting();
    sim.write(0, vec![1; CHUNK as usize]);
    // Ahead of need: the device ends within this growth step.
    assert_eq!(told(&sim), [format!("low space: {} of {}", 2 * CHUNK, 16 * CHUNK)]);
    begin(&sim, write_of(2, 3), 7);
    begin(&sim, write_of(9, 1), 8);
    assert!(sim.world.results.borrow().is_empty(), "{:?}", sim.world.results.borrow());
    assert_eq!(told(&sim).len(), 1, "the device is as long as it was");
    // Reads, flushes and writes to storage that is there go on.
    begin(&sim, Request::Flush, 9);
    begin(&sim, write_of(0, 1), 10);
    assert_eq!(sim.world.results.take().into_iter().map(|r| (r.0, r.1.is_ok())).collect::<Vec<_>>(), [(9, true), (10, true)]);

    // Not enough: the host is told again, once.
    lengthen(&sim, 1);
    sim.queue.image().space_changed(true);
    settle(&sim);
    assert!(sim.world.results.borrow().is_empty());
    assert_eq!(told(&sim).len(), 2);
    lengthen(&sim, 2);
    sim.queue.image().space_changed(true);
    settle(&sim);
    let mut results = sim.world.results.take();
    results.sort_by_key(|r| r.0);
    assert_eq!(results, [(7, Ok(Reply::Done)), (8, Ok(Reply::Done))]);
    same(&sim.read(4 * CHUNK, CHUNK), &vec![3; CHUNK as usize], "what waited");
}

#[test]
fn waiting_for_storage_ends_when_the_host_says_so_and_at_close() {
    let sim = waiting();
    begin(&sim, write_of(0, 3), 7);
    assert!(sim.world.results.borrow().is_empty());
    sim.queue.image().set_wait_for_space(false);
    settle(&sim);
    let ended = |id, kind| {
        let results = sim.world.results.take();
        assert!(matches!(&results[..], [(i, Err(error))] if *i == id && error.kind == kind), "{results:?}");
    };
    ended(7, Kind::NoSpace);
    // Nor does another write wait.
    begin(&sim, write_of(0, 3), 8);
    ended(8, Kind::NoSpace);
    sim.queue.image().set_wait_for_space(true);
    begin(&sim, write_of(0, 3), 14);
    assert!(sim.world.results.borrow().is_empty());
    sim.queue.image().space_changed(false);
    settle(&sim);
    ended(14, Kind::NoSpace);
    // Storage that a discard frees does as well.
    begin(&sim, write_of(5, 1), 9);
    assert!(sim.world.results.borrow().is_empty());
    begin(&sim, Request::Discard { offset: 0, len: CHUNK }, 10);
    begin(&sim, Request::Flush, 11);
    assert_eq!(sim.world.results.take().iter().filter(|r| r.1.is_ok()).count(), 3);
    begin(&sim, write_of(0, 1), 12);
    assert!(sim.world.results.borrow().is_empty());
    // A close does not wait.
    begin(&sim, Request::Close, 13);
    let results = sim.world.results.take();
    assert!(matches!(&results[..], [(12, Err(error)), (13, Ok(_))] if error.kind == Kind::NoSpace), "{results:?}");
}

/// With everything locked, no discard could end the wait.
#[test]
fn a_repair_does_not_wait_for_storage() {
    let sim = waiting();
    sim.write(0, vec![1; CHUNK as usize]);
    sim.write(2 * CHUNK, vec![3; CHUNK as usize]);
    let header = sim.info().header;
    let mut storage = sim.close();
    // Guest chunk 1 names the storage of guest chunk 0.
    let table = header.region(RegionKind::Table).unwrap();
    let mut page = vec![0; 4096];
    storage.read(table.offset, &mut page);
    let head = page::open(&header.uuid, RegionKind::Table, table.generation, 0, &page).unwrap();
    page.copy_within(page::HEADER_SIZE..page::HEADER_SIZE + 4, page::HEADER_SIZE + 4);
    page::seal(&header.uuid, &head, &mut page);
    storage.write(table.offset, &page);
    let fixed = Limits { grows_zeroed: false, ..limits(512) };
    let sim = Sim::try_open(&storage, None, fixed, Config { wait_for_space: true, ..Config::default() }).unwrap();
    match sim.ask(Request::Check { repair: fvd_engine::Repair::All }) {
        Ok(Reply::Check(report)) => assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0), "{:?}", report.findings),
        other => panic!("{other:?}"),
    }
    lengthen(&sim, 1);
    match sim.ask(Request::Check { repair: fvd_engine::Repair::All }) {
        Ok(Reply::Check(report)) => assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{:?}", report.findings),
        other => panic!("{other:?}"),
    }
    same(&sim.read(CHUNK, CHUNK), &vec![1; CHUNK as usize], "the copy");
    sim.close();
}
