// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one guest operation costs the host, exactly, after the session's one header update.
//! Checkpoints are counted apart: none runs here.

mod common;

use common::sim::*;
use common::*;
use fvd_engine::host::{FileId, Limits, OpKind};
use fvd_engine::{Config, CreateParams, Request};

const BLOCK: u64 = 4096;

/// An open image over a base of 8 MiB whose second half is zero; the session has begun.
fn begun(align: u32) -> Sim {
    let mut base = pattern(1, 0, 8 * MIB / 512);
    base[4 << 20..].fill(0);
    let limits = Limits { request_alignment: align, memory_alignment: 512, ..Limits::default() };
    let params = CreateParams { detect_sparse_hole: 1, journal_size: 16 * MIB, ..over_base(32 * MIB) };
    let image = create(params, Some(base.clone()), limits).unwrap();
    let sim = Sim::try_open(&image, Some(base), limits, Config::default()).unwrap();
    sim.write(0, vec![1; 4096]);
    sim.flush();
    sim.counts();
    sim.world.trace.borrow_mut().clear();
    sim
}

/// Reads of guest data: from the base, or from the image past its metadata.
fn data_reads(sim: &Sim) -> usize {
    let data = sim.info().header.data_offset;
    sim.world.trace.borrow().iter().filter(|t| t.kind == OpKind::Read && (t.file == FileId::Base || t.offset >= data)).count()
}

fn cost(writes: u64, bytes_written: u64, reads: u64, syncs: u64) -> Counts {
    Counts { writes, bytes_written, reads, syncs }
}

#[test]
fn first_write_over_the_base_and_flush() {
    for align in [1, 512, 4096] {
        let sim = begun(align);
        for i in 1..50 {
            sim.write(i * BLOCK, vec![2; 4096]);
            sim.flush();
            // Data and one journal unit; the data is not read, neither is the base.
            assert_eq!(sim.counts(), cost(2, 8192, 0, 2), "block {i}");
        }
        assert_eq!(data_reads(&sim), 0);
        assert_eq!(sim.stats().header_updates, 1, "one for the whole session");
        sim.close();
    }
}

#[test]
fn first_write_over_the_base_without_flush() {
    let sim = begun(512);
    for i in 1..200 {
        sim.write(i * BLOCK, vec![2; 4096]);
        assert_eq!(sim.counts(), cost(1, 4096, 0, 0), "block {i}");
    }
    // The flush of them all: one record, one unit, two syncs.
    sim.flush();
    assert_eq!(sim.counts(), cost(1, 4096, 0, 2));
    sim.close();
}

#[test]
fn first_write_of_scattered_blocks_and_flush() {
    // 253 records fit into a unit: a commit is one write, however many blocks.
    let sim = begun(512);
    for i in 0..500 {
        sim.write((3 + 2 * i) * BLOCK, vec![2; 4096]);
    }
    assert_eq!(sim.counts(), cost(500, 500 * 4096, 0, 0));
    sim.flush();
    assert_eq!(sim.counts(), cost(1, 2 * 4096, 0, 2));
    sim.close();
}

#[test]
fn part_of_a_block_over_the_base() {
    // Head and tail are read from the base and written together with the guest's bytes.
    let sim = begun(512);
    sim.write(9 * BLOCK + 1024, vec![2; 512]);
    assert_eq!(sim.counts(), cost(1, 4096, 2, 0));
    sim.write(10 * BLOCK, vec![2; 512]);
    assert_eq!(sim.counts(), cost(1, 4096, 1, 0), "no head");
    sim.write(12 * BLOCK - 512, vec![2; 512]);
    assert_eq!(sim.counts(), cost(1, 4096, 1, 0), "no tail");
    sim.write(20 * BLOCK + 512, vec![2; 9 * 4096]);
    assert_eq!(sim.counts(), cost(1, 10 * 4096, 2, 0), "a long one");
    sim.close();
}

#[test]
fn overwrite_of_a_present_block_and_flush() {
    let sim = begun(4096);
    sim.write(5 * BLOCK, vec![2; 8 * 4096]);
    sim.flush();
    sim.counts();
    for i in 0..8 {
        sim.write((5 + i) * BLOCK, vec![3; 4096]);
        sim.flush();
        assert_eq!(sim.counts(), cost(1, 4096, 0, 1));
    }
    sim.close();
}

#[test]
fn write_past_the_base_or_to_a_known_zero_block_and_flush() {
    let sim = begun(512);
    for offset in [8 * MIB, 20 * MIB + 512, 32 * MIB - 4096, 4 * MIB, 6 * MIB + 512] {
        sim.write(offset, vec![3; 4096]);
        sim.flush();
        assert_eq!(sim.counts(), cost(1, 4096, 0, 1), "at {offset}");
    }
    sim.close();
}

#[test]
fn a_session_that_tracks_nothing_updates_no_header() {
    let base = base_image(64);
    let sim = Sim::new(over_base(MIB), Some(base));
    sim.counts();
    sim.write(512 * KIB, vec![3; 4096]);
    sim.flush();
    assert_eq!(sim.counts(), cost(1, 4096, 0, 1));
    assert_eq!(sim.stats().header_updates, 0);
    let world = sim.world.clone();
    sim.close();
    // Close is one sync of what may not have been flushed.
    assert_eq!(*world.counts.borrow(), cost(0, 0, 0, 1));
}

#[test]
fn flush_with_nothing_dirty() {
    let sim = begun(512);
    for _ in 0..5 {
        sim.flush();
        assert_eq!(sim.counts(), cost(0, 0, 0, 1));
    }
    sim.close();
}

#[test]
fn fua_write() {
    let sim = begun(512);
    let write = |offset| Request::Write { offset, buf: Buf::new(vec![4; 4096]), fua: true };
    sim.ask(write(7 * BLOCK)).unwrap();
    assert_eq!(sim.counts(), cost(2, 8192, 0, 2));
    sim.ask(write(7 * BLOCK)).unwrap();
    assert_eq!(sim.counts(), cost(1, 4096, 0, 1));
    sim.close();
}

#[test]
fn reads() {
    let sim = begun(512);
    for (offset, len) in [(0, 4096), (BLOCK, 512), (10 * BLOCK, 100 * BLOCK), (4 * MIB, MIB), (9 * MIB, MIB)] {
        sim.read(offset, len);
        assert_eq!(sim.counts(), cost(0, 0, 1, 0), "{len} at {offset}");
    }
    // A run in the image, then one in the base.
    sim.read(0, 2 * BLOCK);
    assert_eq!(sim.counts(), cost(0, 0, 2, 0));
    sim.close();
}

#[test]
fn zeroes_and_discard() {
    let sim = begun(512);
    sim.ask(Request::WriteZeroes { offset: 40 * BLOCK, len: 20 * BLOCK, may_unmap: true, fua: false }).unwrap();
    assert_eq!(sim.counts(), cost(0, 0, 0, 0), "the storage zeroes");
    sim.flush();
    assert_eq!(sim.counts(), cost(1, 4096, 0, 2));
    sim.ask(Request::Discard { offset: 0, len: 64 * BLOCK }).unwrap();
    sim.ask(Request::BlockStatus { offset: 0, len: 64 * BLOCK }).unwrap();
    assert_eq!(sim.counts(), cost(0, 0, 0, 0));
    sim.close();
}

/// The header update is the session's first commit, not its open, and happens once.
#[test]
fn the_first_commit_of_a_session() {
    let base = base_image(2048);
    let sim = Sim::new(over_base(MIB), Some(base.clone()));
    sim.counts();
    sim.write(0, vec![1; 4096]);
    sim.flush();
    // Data and journal; two header copies, each synced.
    assert_eq!(sim.counts(), cost(4, 4 * 4096, 0, 4));
    let image = sim.close();
    let sim = Sim::open(&image, Some(base));
    sim.read(0, 4096);
    sim.counts();
    sim.write(BLOCK, vec![1; 4096]);
    sim.flush();
    assert_eq!(sim.counts(), cost(4, 4 * 4096, 0, 4));
    sim.close();
}

/// What a checkpoint costs, so that a change is seen: area, pages, header.
#[test]
fn a_checkpoint() {
    let sim = begun(512);
    let world = sim.world.clone();
    sim.close();
    // One sync of the data; head and page to the area; its place (the page map knows it already,
    // from creation); two header copies; a sync after each of the four steps.
    assert_eq!(*world.counts.borrow(), cost(4, (2 + 1 + 2) * 4096, 0, 5));
}

/// Bitmap of a 1 TiB base: at most 2.1 MiB on disk, header and page map included; in memory whole
/// segments of 64 pages.
#[test]
fn metadata_of_a_terabyte() {
    let image = create(CreateParams { block_size: 0, ..over_base(1 << 40) }, None, limits(512)).unwrap();
    let config = Config { metadata_memory: 9 * 64 * 4096, ..Config::default() };
    let sim = Sim::try_open(&image, None, limits(512), config).unwrap();
    let reads: u64 = sim.world.trace.borrow().iter().filter(|t| t.kind == OpKind::Read).map(|t| t.len).sum();
    assert!(reads <= 64 * KIB, "{reads} bytes read by open");
    let header = sim.info().header;
    assert_eq!(header.block_size, 65536);
    let bytes = |kind| header.region(kind).unwrap().length;
    let total = bytes(fvd_format::RegionKind::Bitmap) + bytes(fvd_format::RegionKind::PageMap) + 2 * 4096;
    assert!(total <= 21 * MIB / 10, "{total} bytes of metadata");
    // All of it in memory at once.
    for segment in 0..10 {
        sim.write(segment * (1 << 37) % (1 << 40), vec![1; 512]);
    }
    sim.ask(Request::BlockStatus { offset: 1 << 39, len: 1 << 38 }).unwrap();
    sim.close();
}
