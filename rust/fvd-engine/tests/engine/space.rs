// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bases of any length, holes, growth, block status, zeroes and discard.

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::host::{FileId, Limits, OpKind};
use fvd_engine::{BlockStatus, Config, CreateParams, Kind, Place, Preallocation, Reply, Request};
use fvd_format::header::BASE_LENGTH_UNKNOWN;

const BLOCK: u64 = 4096;

fn tagged(tag: u64, offset: u64, len: u64) -> Vec<u8> {
    pattern(tag, offset / 512, len / 512)
}

/// The base's bytes as the guest sees them: cut or continued with zeroes.
fn seen_of(base: &[u8], size: u64) -> Vec<u8> {
    let mut out = base.to_vec();
    out.resize(size as usize, 0);
    out
}

#[test]
fn past_a_shorter_base_the_disk_reads_zero_and_a_write_there_costs_one_write() {
    let base = base_image(100);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    same(&sim.read(0, MIB), &seen_of(&base, MIB), "disk");
    sim.write(512 * KIB, tagged(5, 512 * KIB, 4096));
    sim.flush();
    assert_eq!(sim.stats().commits, 0, "no bit covers what is past the base");
    let again = Sim::open(&sim.crash(), Some(base));
    same(&again.read(512 * KIB, 4096), &tagged(5, 512 * KIB, 4096), "disk");
    again.close();
}

#[test]
fn a_longer_base_is_cut_at_the_disks_end() {
    let base = base_image(4096);
    let sim = Sim::new(over_base(MIB + 512), Some(base.clone()));
    same(&sim.read(0, MIB + 512), &seen_of(&base, MIB + 512), "disk");
    sim.write(MIB, vec![9; 512]);
    same(&sim.read(MIB, 512), &vec![9; 512], "disk");
    assert_eq!(sim.ask(Request::Read { offset: MIB, buf: Buf::new(vec![0; 513]) }).unwrap_err().kind, Kind::OutOfRange);
    sim.close();
}

#[test]
fn a_base_that_is_absent_reads_as_zero_and_may_come_later() {
    let image = create(over_base(MIB), None, limits(1)).unwrap();
    let sim = Sim::open(&image, None);
    assert_eq!(sim.info().header.base_length, BASE_LENGTH_UNKNOWN);
    assert_eq!(sim.info().header.covered, MIB);
    same(&sim.read(0, MIB), &vec![0; MIB as usize], "disk");
    // A partly written block takes its rest from where there is nothing.
    sim.write(10 * BLOCK + 512, tagged(7, 10 * BLOCK + 512, 512));
    assert_eq!(sim.world.log.borrow().as_slice(), [""; 0]);
    let image = sim.close();
    let base = base_image(300);
    let sim = Sim::open(&image, Some(base.clone()));
    let mut expect = seen_of(&base, MIB);
    expect[10 * 4096..11 * 4096].fill(0);
    expect[10 * 4096 + 512..10 * 4096 + 1024].copy_from_slice(&tagged(7, 10 * BLOCK + 512, 512));
    same(&sim.read(0, MIB), &expect, "disk");
    sim.close();
}

#[test]
fn a_recorded_base_length_is_honoured_with_a_warning() {
    let base = base_image(256);
    let image = create(over_base(MIB), Some(base.clone()), limits(1)).unwrap();
    for (sectors, warned) in [(256, false), (200, true), (2048, true)] {
        let other = base_image(sectors);
        let sim = Sim::open(&image, Some(other.clone()));
        let mut expect = seen_of(&other[..other.len().min(base.len())], MIB);
        expect.resize(MIB as usize, 0);
        same(&sim.read(0, MIB), &expect, &format!("base of {sectors} sectors"));
        // Copy-on-write takes the same bytes.
        let at = 255 * 512;
        sim.write(at - 512, vec![3; 512]);
        expect[at as usize - 512..at as usize].fill(3);
        same(&sim.read(0, MIB), &expect, &format!("base of {sectors} sectors, after a write"));
        let log = sim.world.log.borrow().join("\n");
        assert_eq!(log.contains("the base has") && log.contains("reads as zero"), warned, "{log}");
        sim.close();
    }
}

#[test]
fn a_base_of_odd_length_ends_within_a_sector() {
    let mut base = base_image(20);
    base.truncate(20 * 512 - 100);
    let sim = Sim::new(over_base(64 * KIB), Some(base.clone()));
    assert_eq!(sim.info().header.base_length, 20 * 512);
    same(&sim.read(0, 64 * KIB), &seen_of(&base, 64 * KIB), "disk");
    sim.write(16 * 512, vec![1; 10]);
    let mut expect = seen_of(&base, 64 * KIB);
    expect[16 * 512..16 * 512 + 10].fill(1);
    same(&sim.read(0, 64 * KIB), &expect, "disk");
    sim.close();
}

/// Blocks 0, 1 data, 2 zero, 3 data, 4–7 zero, 8 data, 9 data up to its middle.
fn holed() -> Vec<u8> {
    let mut base = tagged(1, 0, 10 * BLOCK);
    for block in [2, 4, 5, 6, 7] {
        base[block * 4096..(block + 1) * 4096].fill(0);
    }
    base.truncate(9 * 4096 + 2048);
    base
}

#[test]
fn zero_runs_of_the_base_are_found_when_asked_for() {
    for (least, present) in [(0, vec![]), (1, vec![2, 4, 5, 6, 7]), (4097, vec![4, 5, 6, 7]), (4 * 4096, vec![4, 5, 6, 7]), (4 * 4096 + 1, vec![])] {
        let params = CreateParams { detect_sparse_hole: least, ..over_base(MIB) };
        let sim = Sim::new(params, Some(holed()));
        for block in 0..10 {
            let status = sim.status(block * BLOCK, BLOCK);
            let data = matches!(status.place, Place::Data { .. });
            assert_eq!(data, present.contains(&block), "runs of {least}, block {block}: {status:?}");
        }
        same(&sim.read(0, MIB), &seen_of(&holed(), MIB), "disk");
        assert_eq!(sim.check().0, 0);
        // What is known to be zero is written without a copy and without a commit.
        if present.contains(&5) {
            sim.counts();
            sim.write(5 * BLOCK + 7, vec![1; 9]);
            sim.flush();
            let counts = sim.counts();
            assert_eq!((counts.writes, counts.syncs, counts.reads), (1, 1, 0));
        }
        let image = sim.close();
        assert_eq!(Sim::open(&image, Some(holed())).check().0, 0);
    }
    let params = CreateParams { detect_sparse_hole: 1, base_name: String::new(), base_format: String::new(), ..over_base(MIB) };
    assert_eq!(create(params, None, limits(1)).unwrap_err().kind, Kind::Invalid);
    let params = CreateParams { detect_sparse_hole: 1, ..over_base(MIB) };
    assert_eq!(create(params, None, limits(1)).unwrap_err().kind, Kind::Invalid);
}

#[test]
fn holes_are_not_preset_on_storage_that_does_not_read_as_zero() {
    let limits = Limits { grows_zeroed: false, ..Limits::default() };
    let mut noise = Store::default();
    for page in 0..2048 {
        noise.write(page * 4096, &tagged(99, page * 4096, 4096));
    }
    let world = World::new(noise, Some(holed()), 1, limits);
    let queue = world.queue(Config::default());
    let params = CreateParams { detect_sparse_hole: 1, preallocation: Preallocation::Full, ..over_base(MIB) };
    world.request(&queue, Request::Create(Box::new(params))).unwrap().unwrap();
    assert!(world.log.borrow().join("").contains("detect_sparse_hole is ignored"));
    let image = world.disk.borrow().stable.clone();
    let sim = Sim::try_open(&image, Some(holed()), limits, Config::default()).unwrap();
    assert_eq!(sim.status(2 * BLOCK, BLOCK).place, Place::Base);
    same(&sim.read(0, MIB), &seen_of(&holed(), MIB), "disk");
    sim.write(2 * BLOCK + 5, vec![8; 3]);
    let mut expect = seen_of(&holed(), MIB);
    expect[2 * 4096 + 5..2 * 4096 + 8].fill(8);
    same(&sim.read(0, MIB), &expect, "disk");
    sim.close();
}

#[test]
fn preallocation_writes_what_it_says() {
    for (how, written) in [(Preallocation::Off, 0), (Preallocation::Metadata, 0), (Preallocation::Falloc, 0), (Preallocation::Full, MIB)] {
        let world = World::new(Store::default(), Some(base_image(64)), 1, limits(1));
        let queue = world.queue(Config::default());
        let params = CreateParams { preallocation: how, ..over_base(MIB) };
        world.request(&queue, Request::Create(Box::new(params))).unwrap().unwrap();
        let image = world.disk.borrow().stable.clone();
        let sim = Sim::open(&image, Some(base_image(64)));
        let data = sim.info().header.data_offset;
        let trace = world.trace.borrow();
        let bytes = |wanted: fn(OpKind) -> bool| trace.iter().filter(|t| wanted(t.kind) && t.offset >= data).map(|t| t.len).sum::<u64>();
        assert_eq!(bytes(|k| matches!(k, OpKind::Write { .. })), written, "{how:?}");
        let allocated = if how == Preallocation::Falloc { MIB } else { 0 };
        assert_eq!(bytes(|k| k == OpKind::WriteZeroes { may_unmap: false }), allocated, "{how:?}");
        same(&sim.read(0, MIB), &seen_of(&base_image(64), MIB), "disk");
        sim.close();
    }
}

#[test]
fn a_grown_disk_reads_zero_behind_and_survives_a_cut() {
    let base = base_image(4096);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.ask(Request::Resize { size: 2 * MIB, zeroed: true }).unwrap();
    same(&sim.read(MIB, MIB), &vec![0; MIB as usize], "never the longer base's bytes");
    sim.write(2 * MIB - 512, vec![4; 512]);
    sim.flush();
    let sim = Sim::open(&sim.crash(), Some(base.clone()));
    assert_eq!(sim.info().header.virtual_size, 2 * MIB);
    let mut expect = base[..MIB as usize].to_vec();
    expect.resize(2 * MIB as usize, 0);
    expect[2 * MIB as usize - 512..].fill(4);
    same(&sim.read(0, 2 * MIB), &expect, "disk");
    assert_eq!(sim.ask(Request::Resize { size: 2 * MIB + 1, zeroed: false }).unwrap_err().kind, Kind::Invalid);
    assert_eq!(sim.ask(Request::Resize { size: 1 << 63, zeroed: false }).unwrap_err().kind, Kind::OutOfRange);
    assert_eq!(sim.ask(Request::Resize { size: !511, zeroed: false }).unwrap_err().kind, Kind::OutOfRange);
    sim.close();
}

/// The last covered block may be partial; growth puts guest data behind its covered part.
#[test]
fn copy_on_write_stops_where_the_bitmap_ends() {
    for align in [1, 512, 4096] {
        let base = base_image(64);
        let image = create(over_base(10 * 512), Some(base.clone()), limits(align)).unwrap();
        let sim = Sim::try_open(&image, Some(base.clone()), limits(align), Config::default()).unwrap();
        sim.ask(Request::Resize { size: 40 * 512, zeroed: true }).unwrap();
        let mut expect = base[..10 * 512].to_vec();
        expect.resize(40 * 512, 0);
        same(&sim.read(0, 40 * 512), &expect, &format!("alignment {align}: grown"));
        sim.write(12 * 512, vec![7; 512]);
        expect[12 * 512..13 * 512].fill(7);
        sim.write(8 * 512, vec![6; 512]);
        expect[8 * 512..9 * 512].fill(6);
        same(&sim.read(0, 40 * 512), &expect, &format!("alignment {align}: written"));
        sim.close();
    }
}

#[test]
fn zeroing_stops_copying_where_the_bitmap_ends() {
    let base = base_image(64);
    let sim = Sim::new(over_base(10 * 512), Some(base.clone()));
    sim.ask(Request::Resize { size: 40 * 512, zeroed: true }).unwrap();
    sim.write(12 * 512, vec![7; 512]);
    sim.ask(Request::WriteZeroes { offset: 8 * 512, len: 512, may_unmap: true, fua: false }).unwrap();
    let mut expect = base[..10 * 512].to_vec();
    expect.resize(40 * 512, 0);
    expect[8 * 512..9 * 512].fill(0);
    expect[12 * 512..13 * 512].fill(7);
    same(&sim.read(0, 40 * 512), &expect, "disk");
    sim.close();
}

#[test]
fn two_resizes_at_once_follow_each_other() {
    for seed in 0..40 {
        let base = base_image(64);
        let image = create(over_base(MIB), Some(base.clone()), limits(1)).unwrap();
        let world = World::new(image, Some(base), seed, limits(1));
        let queue = world.queue(Config::default());
        world.request(&queue, Request::Open).unwrap().unwrap();
        queue.submit(Request::Resize { size: 3 * MIB, zeroed: true }, 1);
        queue.submit(Request::Resize { size: 2 * MIB, zeroed: true }, 2);
        let mut sizes = vec![MIB];
        while world.step(&queue) {
            sizes.push(queue.image().info().unwrap().header.virtual_size);
        }
        assert!(world.results.borrow().iter().all(|r| r.1.is_ok()));
        sizes.dedup();
        assert!(sizes == [MIB, 3 * MIB, 2 * MIB] || sizes == [MIB, 2 * MIB, 3 * MIB], "seed {seed}: {sizes:?}");
        world.request(&queue, Request::Close).unwrap().unwrap();
    }
}

#[test]
fn discarded_chunks_keep_their_place_if_asked_to() {
    for keep in [false, true] {
        let params = CreateParams { compact: true, chunk_size: 64 << 10, storage_grow_unit: MIB, ..over_base(4 * MIB) };
        let base = base_image(8);
        let image = create(params, Some(base.clone()), limits(512)).unwrap();
        let sim = Sim::try_open(&image, Some(base), limits(512), Config { discard_no_unref: keep, ..Config::default() }).unwrap();
        sim.write(MIB, tagged(3, MIB, 512 * KIB));
        sim.flush();
        let before: Vec<_> = (0..8).map(|i| sim.status(MIB + i * 64 * KIB, 512).place).collect();
        sim.ask(Request::Discard { offset: MIB, len: 128 * KIB }).unwrap();
        sim.ask(Request::WriteZeroes { offset: MIB + 256 * KIB, len: 128 * KIB, may_unmap: true, fua: false }).unwrap();
        same(&sim.read(MIB + 256 * KIB, 128 * KIB), &vec![0; 128 << 10], "zeroes");
        same(&sim.read(MIB + 384 * KIB, 128 * KIB), &tagged(3, MIB + 384 * KIB, 128 * KIB), "what was left alone");
        let after: Vec<_> = (0..8).map(|i| sim.status(MIB + i * 64 * KIB, 512).place).collect();
        let lost = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert_eq!(lost, if keep { 0 } else { 4 });
        assert_eq!(sim.check(), (0, Vec::new()));
        sim.close();
    }
}

fn in_chunks() -> CreateParams {
    CreateParams { virtual_size: Some(16 * MIB), compact: true, chunk_size: 64 << 10, storage_grow_unit: MIB, ..CreateParams::default() }
}

#[test]
fn growth_steps_are_opened_before_they_are_needed() {
    let sim = Sim::new(in_chunks(), None);
    for i in 0..100 {
        sim.write(i * 64 * KIB, tagged(2, i * 64 * KIB, 64 * KIB));
        // What runs in the background ends between two writes.
        while sim.world.step(&sim.queue) {}
    }
    let stats = sim.stats();
    assert_eq!((stats.growth_steps, stats.steps_ahead), (7, 6), "only the first one was waited for");
    assert_eq!(sim.info().free_chunks, Some(7 * 16 - 100));
    sim.close();
}

#[test]
fn who_can_add_storage_is_told_before_it_is_used_up() {
    let limits = Limits { grows_zeroed: false, ..Limits::default() };
    let noise = |bytes: &mut Store, from: u64, to: u64| (from..to).step_by(4096).for_each(|at| bytes.write(at, &tagged(99, at, 4096)));
    let mut bytes = Store::default();
    noise(&mut bytes, 0, 6 * MIB);
    let world = World::new(bytes, None, 1, limits);
    let queue = world.queue(Config::default());
    world.request(&queue, Request::Create(Box::new(CreateParams { journal_size: MIB, ..in_chunks() }))).unwrap().unwrap();
    let bytes = world.disk.borrow().stable.clone();
    let sim = Sim::try_open(&bytes, None, limits, Config::default()).unwrap();
    let write = |i: u64| {
        let result = sim.ask(Request::Write { offset: i * 64 * KIB, buf: Buf::new(tagged(2, i * 64 * KIB, 64 * KIB)), fua: false });
        while sim.world.step(&sim.queue) {}
        result
    };
    let told = || sim.world.log.borrow().iter().filter(|text| text.starts_with("low space")).count();
    let full = (0..).find(|i| write(*i).is_err_and(|error| error.kind == Kind::NoSpace)).unwrap();
    assert_eq!(told(), 1, "once: {:?}", sim.world.log.borrow());
    assert!(write(full).is_err() && told() == 1);
    // Storage that got longer is found at the next write, and the host hears of its end again.
    let end = sim.world.disk.borrow().stable.len;
    noise(&mut sim.world.disk.borrow_mut().stable, end, end + MIB);
    noise(&mut sim.world.disk.borrow_mut().view, end, end + MIB);
    let more = (full..).find(|i| write(*i).is_err()).unwrap();
    assert_eq!((more - full, told()), (16, 2));
    for i in 0..more {
        same(&sim.read(i * 64 * KIB, 64 * KIB), &tagged(2, i * 64 * KIB, 64 * KIB), "what was written");
    }
    sim.close();
}

/// Shrinks a full disk to a size within a block and a chunk, and lets it grow again.
fn shrink_and_grow(compact: bool) {
    let small = MIB + 512 * 3;
    let base = base_image(8 * MIB / 512);
    let params = || CreateParams { compact, chunk_size: if compact { 64 << 10 } else { 0 }, storage_grow_unit: if compact { 1 << 20 } else { 0 }, ..over_base(8 * MIB) };
    let sim = Sim::new(params(), Some(base.clone()));
    for at in (0..8 * MIB).step_by(MIB as usize) {
        sim.write(at, tagged(9, at, 256 * KIB));
    }
    sim.write(small - 1024, tagged(8, small - 1024, 64 * KIB));
    let before = sim.read(0, small);
    sim.ask(Request::Resize { size: small, zeroed: false }).unwrap();
    let error = sim.try_read(small - 512, 1024).unwrap_err();
    assert_eq!(error.kind, Kind::OutOfRange);
    same(&sim.read(0, small), &before, "the shrunk disk");
    assert_eq!(sim.check(), (0, Vec::new()));
    let bytes = sim.crash();
    if !compact {
        assert!(bytes.len <= 4 * MIB + small, "the file has {} bytes", bytes.len);
    }
    let sim = Sim::open(&bytes, Some(base));
    same(&sim.read(0, small), &before, "the shrunk disk, opened again");
    sim.ask(Request::Resize { size: 8 * MIB, zeroed: true }).unwrap();
    let mut expect = before;
    expect.resize(8 << 20, 0);
    same(&sim.read(0, 8 * MIB), &expect, "the grown disk");
    sim.write(small, tagged(7, small, 512));
    expect[small as usize..][..512].copy_from_slice(&tagged(7, small, 512));
    sim.ask(Request::Resize { size: 0, zeroed: false }).unwrap();
    sim.ask(Request::Resize { size: MIB, zeroed: true }).unwrap();
    same(&sim.read(0, MIB), &vec![0; MIB as usize], "a disk that was empty");
    assert_eq!(sim.check(), (0, Vec::new()));
    sim.close();
}

#[test]
fn what_a_shrunk_disk_lost_reads_zero_when_it_grows() {
    shrink_and_grow(false);
}

#[test]
fn what_a_shrunk_compact_disk_lost_reads_zero_when_it_grows() {
    shrink_and_grow(true);
}

#[test]
fn trailing_bytes_behind_the_image_never_show_up_by_growth() {
    let base = base_image(64);
    let mut image = create(over_base(MIB), Some(base.clone()), limits(1)).unwrap();
    let end = image.len;
    image.write(end, &tagged(66, 0, 64 * KIB));
    let sim = Sim::open(&image, Some(base));
    sim.ask(Request::Resize { size: 2 * MIB, zeroed: true }).unwrap();
    same(&sim.read(MIB, MIB), &vec![0; MIB as usize], "disk");
    sim.close();
}

#[test]
fn block_status_says_what_the_bits_say() {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base));
    let mut present = [false; 256];
    let mut rng = Rng::new(3);
    for _ in 0..40 {
        let (first, count) = (rng.below(256), 1 + rng.below(3));
        let last = (first + count).min(256);
        sim.write(first * BLOCK, vec![1; ((last - first) * BLOCK) as usize]);
        present[first as usize..last as usize].fill(true);
    }
    let data_offset = sim.info().header.data_offset;
    for _ in 0..300 {
        let offset = rng.below(MIB / 512 - 1) * 512;
        let len = 512 * (1 + rng.below((MIB - offset) / 512));
        let is = present[(offset / BLOCK) as usize];
        let mut end = offset;
        while end < offset + len && present[(end / BLOCK) as usize] == is {
            end = (end / BLOCK + 1) * BLOCK;
        }
        let expect = BlockStatus {
            place: if is { Place::Data { file: FileId::Image, offset: data_offset + offset } } else { Place::Base },
            len: end.min(offset + len) - offset,
        };
        assert_eq!(sim.status(offset, len), expect, "{len} at {offset}");
    }
    assert_eq!(sim.ask(Request::BlockStatus { offset: 0, len: 0 }).unwrap_err().kind, Kind::Invalid);
    assert_eq!(sim.ask(Request::BlockStatus { offset: MIB, len: 1 }).unwrap_err().kind, Kind::OutOfRange);
    assert_eq!(sim.ask(Request::BlockStatus { offset: u64::MAX, len: u64::MAX }).unwrap_err().kind, Kind::OutOfRange);
    sim.close();
    // Past a recorded base, within the last block that the bitmap covers: zero.
    let sim = Sim::new(over_base(MIB), Some(base_image(9)));
    assert_eq!(sim.status(0, MIB), BlockStatus { place: Place::Base, len: 9 * 512 });
    assert_eq!(sim.status(9 * 512, MIB - 9 * 512), BlockStatus { place: Place::Zero, len: 7 * 512 });
    sim.close();
}

#[test]
fn zeroes_hide_the_base_and_stay_after_a_flush() {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    let mut expect = base.clone();
    sim.write(40 * BLOCK, tagged(2, 40 * BLOCK, 8 * BLOCK));
    expect[40 * 4096..48 * 4096].copy_from_slice(&tagged(2, 40 * BLOCK, 8 * BLOCK));
    for (offset, len, may_unmap) in [(0, BLOCK, false), (3 * BLOCK + 512, 1024, true), (10 * BLOCK + 100, 9 * BLOCK, true), (44 * BLOCK, 20 * BLOCK + 1, false)]
    {
        sim.ask(Request::WriteZeroes { offset, len, may_unmap, fua: false }).unwrap();
        expect[offset as usize..(offset + len) as usize].fill(0);
        same(&sim.read(0, MIB), &expect, &format!("zeroes of {len} at {offset}"));
    }
    // Durable on completion where asked for.
    sim.ask(Request::WriteZeroes { offset: 100 * BLOCK, len: 4 * BLOCK, may_unmap: true, fua: true }).unwrap();
    expect[100 * 4096..104 * 4096].fill(0);
    let sim = Sim::open(&sim.crash(), Some(base));
    same(&sim.read(0, MIB), &expect, "disk");
    assert_eq!(sim.ask(Request::WriteZeroes { offset: MIB, len: 1, may_unmap: true, fua: false }).unwrap_err().kind, Kind::OutOfRange);
    sim.close();
}

#[test]
fn a_zeroed_range_that_storage_zeroes_is_not_written() {
    let sim = Sim::new(over_base(64 * MIB), Some(base_image(2048)));
    sim.counts();
    sim.ask(Request::WriteZeroes { offset: 0, len: 64 * MIB, may_unmap: true, fua: false }).unwrap();
    assert_eq!(sim.counts().writes, 0);
    same(&sim.read(0, MIB), &vec![0; MIB as usize], "disk");
    sim.close();
}

#[test]
fn discard_gives_back_what_is_here_and_leaves_what_is_in_the_base() {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.write(4 * BLOCK, tagged(2, 4 * BLOCK, 4 * BLOCK));
    sim.world.trace.borrow_mut().clear();
    sim.ask(Request::Discard { offset: 2 * BLOCK + 100, len: 4 * BLOCK }).unwrap();
    let data = sim.info().header.data_offset;
    let discards: Vec<_> = sim.world.trace.borrow().iter().filter(|t| t.kind == OpKind::Discard).map(|t| (t.offset - data, t.len)).collect();
    assert_eq!(discards, [(4 * BLOCK, 2 * BLOCK)], "whole sectors of what is in the image");
    same(&sim.read(0, 4 * BLOCK), &base[..4 * 4096], "disk");
    same(&sim.read(4 * BLOCK, 2 * BLOCK), &vec![0; 8192], "disk");
    same(&sim.read(6 * BLOCK, 2 * BLOCK), &tagged(2, 6 * BLOCK, 2 * BLOCK), "disk");
    assert_eq!(sim.ask(Request::Discard { offset: MIB - 1, len: 2 }).unwrap_err().kind, Kind::OutOfRange);
    sim.ask(Request::Discard { offset: MIB, len: 0 }).unwrap();
    sim.close();
}

#[test]
fn creation_says_what_is_wrong_with_which_value() {
    let wrong = |change: &dyn Fn(&mut CreateParams), word: &str| {
        let mut params = over_base(MIB);
        change(&mut params);
        let error = create(params, Some(base_image(64)), limits(1)).unwrap_err();
        assert!(error.text.contains(word), "{error}");
    };
    wrong(&|p| p.virtual_size = Some(1000), "1000");
    wrong(&|p| p.virtual_size = Some(1 << 63), "size");
    wrong(&|p| p.virtual_size = Some(u64::MAX), "size");
    wrong(&|p| p.block_size = 2048, "block_size 2048");
    wrong(&|p| p.block_size = 12288, "block_size 12288");
    wrong(&|p| p.block_size = 4 << 20, "block_size 4194304");
    wrong(&|p| p.journal_size = MIB - 1, "journal_size 1048575");
    wrong(&|p| p.journal_size = 257 * MIB, "journal_size");
    wrong(&|p| p.journal_size = MIB + 4096, "journal_size");
    wrong(&|p| p.base_format = String::new(), "format");
    wrong(&|p| p.base_name = String::new(), "base");
    wrong(&|p| p.base_name = "x".repeat(1024), "1024");
    wrong(&|p| p.base_format = "x".repeat(32), "32");
    wrong(&|p| p.base_name = "a\0b".into(), "path");
    let no_size = CreateParams { virtual_size: None, ..over_base(0) };
    assert!(create(no_size.clone(), None, limits(1)).unwrap_err().text.contains("size"));
    // With a base its length is the default.
    let sim = Sim::new(no_size, Some(base_image(100)));
    assert_eq!(sim.info().header.virtual_size, 100 * 512);
    sim.close();
}

/// A host that cannot say how long a run of the base is must not keep creation in a loop, nor lead it beyond the base.
#[test]
fn creation_refuses_a_block_status_that_makes_no_sense() {
    for answer in [0, 1 << 40, (1 << 40) | fvd_engine::host::STATUS_DATA] {
        let world = World::new(Store::default(), Some(holed()), 1, limits(1));
        let queue = world.queue(Config::default());
        // The base's length is the first thing asked for.
        *world.plan.borrow_mut() = Plan { fail_at: Some(1), errno: answer, ..Plan::default() };
        let params = CreateParams { detect_sparse_hole: 1, ..over_base(MIB) };
        let error = world.request(&queue, Request::Create(Box::new(params))).unwrap().unwrap_err();
        assert!(error.kind == Kind::Host(5) && error.text.contains("block status"), "{answer}: {error}");
        assert_eq!(world.trace.borrow().iter().filter(|t| t.file == FileId::Image).count(), 0, "nothing was begun");
    }
}

#[test]
fn creation_on_storage_that_is_too_short_leaves_it_alone() {
    let fixed = Limits { grows_zeroed: false, ..limits(1) };
    let mut device = Store::default();
    device.write(0, &tagged(9, 0, MIB));
    let world = World::new(device, None, 1, fixed);
    let queue = world.queue(Config::default());
    let error = world.request(&queue, Request::Create(Box::new(over_base(MIB)))).unwrap().unwrap_err();
    assert!(error.kind == Kind::NoSpace && error.text.contains("1048576"), "{error}");
    assert_eq!(world.counts.borrow().writes, 0);
    let mut kept = vec![0; MIB as usize];
    world.disk.borrow().view.read(0, &mut kept);
    same(&kept, &tagged(9, 0, MIB), "the storage");
}

#[test]
fn a_disk_without_a_base_serves_everything_and_a_disk_of_nothing_opens() {
    for size in [0, 512, MIB] {
        let params = CreateParams { base_name: String::new(), base_format: String::new(), ..over_base(size) };
        let sim = Sim::new(params, None);
        same(&sim.read(0, size), &vec![0; size as usize], "disk");
        if size > 0 {
            sim.write(size - 512, vec![1; 512]);
            sim.flush();
        }
        assert_eq!(sim.check().0, 0);
        let sim = Sim::open(&sim.crash(), None);
        if size > 0 {
            same(&sim.read(size - 512, 512), &vec![1; 512], "disk");
        }
        assert_eq!(sim.ask(Request::Check { repair: fvd_engine::Repair::None }).map(|r| matches!(r, Reply::Check(_))), Ok(true));
        sim.close();
    }
}

#[test]
fn a_named_base_changes_without_changing_the_blocks() {
    let base = base_image(64);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.write(0, vec![1; 4096]);
    sim.ask(Request::ChangeBase { name: "other".into(), format: "qcow2".into() }).unwrap();
    assert_eq!(sim.ask(Request::ChangeBase { name: "other".into(), format: String::new() }).unwrap_err().kind, Kind::Invalid);
    sim.flush();
    let sim = Sim::open(&sim.crash(), Some(base.clone()));
    let header = sim.info().header;
    assert_eq!((header.base_name.as_str(), header.base_format.as_str()), ("other", "qcow2"));
    let mut expect = seen_of(&base, MIB);
    expect[..4096].fill(1);
    same(&sim.read(0, MIB), &expect, "disk");
    sim.ask(Request::ChangeBase { name: String::new(), format: String::new() }).unwrap();
    same(&sim.read(0, MIB), &expect, "disk");
    sim.close();
}

fn pristine(size: u64) -> CreateParams {
    CreateParams { base_name: String::new(), base_format: String::new(), ..over_base(size) }
}

/// An image made without a base, opened with one: the first write makes the bitmap.
#[test]
fn a_first_base_may_come_after_creation() {
    let base = base_image(1000);
    let image = create(pristine(MIB), None, limits(1)).unwrap();
    for crash in [false, true] {
        let sim = Sim::open(&image, Some(base.clone()));
        same(&sim.read(0, MIB), &seen_of(&base, MIB), "before the first write");
        sim.write(5 * BLOCK + 1, vec![7; 2]);
        sim.flush();
        let mut expect = seen_of(&base, MIB);
        expect[5 * 4096 + 1..5 * 4096 + 3].fill(7);
        same(&sim.read(0, MIB), &expect, "after it");
        let later = if crash { sim.crash() } else { sim.close() };
        let sim = Sim::open(&later, Some(base.clone()));
        same(&sim.read(0, MIB), &expect, "opened again");
        assert_eq!(sim.check().0, 0);
        sim.close();
    }
}

#[test]
fn growth_and_the_first_write_at_once_both_happen() {
    for seed in 0..60 {
        let base = base_image(64);
        let image = create(pristine(MIB), None, limits(1)).unwrap();
        let world = World::new(image, Some(base.clone()), seed, limits(1));
        let queue = world.queue(Config::default());
        world.request(&queue, Request::Open).unwrap().unwrap();
        queue.submit(Request::Write { offset: 0, buf: Buf::new(vec![1; 512]), fua: false }, 1);
        queue.submit(Request::Resize { size: 2 * MIB, zeroed: true }, 2);
        queue.submit(Request::ChangeBase { name: "new".into(), format: "raw".into() }, 3);
        world.drain(&queue);
        let results = world.results.take();
        assert!(results.iter().all(|r| r.1.is_ok()), "seed {seed}: {results:?}");
        let header = queue.image().info().unwrap().header;
        assert_eq!((header.virtual_size, header.base_name.as_str()), (2 * MIB, "new"), "seed {seed}");
        let buf = Buf::new(vec![0; 512]);
        world.request(&queue, Request::Read { offset: 2 * MIB - 512, buf: buf.clone() }).unwrap().unwrap();
        world.request(&queue, Request::Close).unwrap().unwrap();
        let again = Sim::open(&world.disk.borrow().stable.clone(), Some(base));
        assert_eq!((again.info().header.virtual_size, again.read(0, 512)), (2 * MIB, vec![1; 512]), "seed {seed}");
        again.close();
    }
}

/// What growth adds is not in the base, however long that is.
#[test]
fn a_disk_grown_before_its_first_write_reads_zero_behind() {
    let base = base_image(8192);
    let image = create(pristine(MIB), None, limits(1)).unwrap();
    let sim = Sim::open(&image, Some(base.clone()));
    sim.ask(Request::Resize { size: 2 * MIB, zeroed: true }).unwrap();
    let mut expect = seen_of(&base[..MIB as usize], 2 * MIB);
    same(&sim.read(0, 2 * MIB), &expect, "grown");
    sim.write(0, vec![1; 512]);
    expect[..512].fill(1);
    same(&sim.read(0, 2 * MIB), &expect, "written");
    sim.close();
}

/// Where zeroing is dear, a disk grows without it if nobody asks: what is behind then is anything, as on the storage.
#[test]
fn growth_is_zeroed_at_a_price_only_if_asked_for() {
    let dear = Limits { grows_zeroed: false, cheap_zeroing: false, ..limits(512) };
    let mut storage = Store::default();
    storage.write(0, &vec![0xa5; 8 * MIB as usize]);
    let storage = create_in(storage, pristine(MIB), None, dear).unwrap();
    let sim = Sim::try_open(&storage, None, dear, Config::default()).unwrap();
    sim.write(MIB - 4096, vec![1; 4096]);
    let zeroed = |sim: &Sim| sim.world.trace.take().iter().filter(|op| matches!(op.kind, OpKind::WriteZeroes { .. })).map(|op| op.len).sum::<u64>();
    zeroed(&sim);
    assert_eq!(sim.ask(Request::Resize { size: 2 * MIB, zeroed: false }), Ok(Reply::Done));
    assert_eq!((sim.info().header.virtual_size, zeroed(&sim)), (2 * MIB, 0));
    assert_eq!(sim.ask(Request::Resize { size: 3 * MIB, zeroed: true }), Ok(Reply::Done));
    assert_eq!((sim.info().header.virtual_size, zeroed(&sim)), (3 * MIB, MIB));
    sim.write(2 * MIB - 4096, vec![2; 4096]);
    let sim = Sim::try_open(&sim.close(), None, dear, Config::default()).unwrap();
    same(&sim.read(MIB - 4096, 4096), &[1; 4096], "what was there");
    same(&sim.read(2 * MIB - 4096, 4096), &[2; 4096], "what was written behind");
    same(&sim.read(2 * MIB, MIB), &vec![0; MIB as usize], "what was asked for");
    sim.close();
}
