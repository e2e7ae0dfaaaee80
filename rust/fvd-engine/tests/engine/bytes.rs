// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of any size and offset against a model of bytes, several in flight.

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::host::Limits;
use fvd_engine::{Config, CreateParams, Request};

struct Case {
    align: u32,
    memory: u32,
    base: u64,
    size: u64,
    block: u32,
    seed: u64,
}

fn run(case: &Case) {
    let Case { align, memory, base, size, block, seed } = *case;
    let limits = Limits { request_alignment: align, memory_alignment: memory, ..Limits::default() };
    let mut base = pattern(1, 0, base.div_ceil(512));
    base.truncate(case.base as usize);
    let params = CreateParams { block_size: block, detect_sparse_hole: seed % 2, ..over_base(size) };
    let image = create(params, Some(base.clone()), limits).unwrap();
    let mut model = base.clone();
    model.resize(size as usize, 0);
    let mut rng = Rng::new(seed);
    let mut bytes = image;
    for session in 0..3 {
        let world = World::new(bytes.clone(), Some(base.clone()), seed << 4 | session, limits);
        let queue = world.queue(Config { checkpoint_after: 3, ..Config::default() });
        world.request(&queue, Request::Open).unwrap().unwrap();
        for round in 0..60 {
            // Disjoint ranges, in one place, so that they meet in sectors and blocks.
            let mut at = rng.below(size);
            let mut reads = Vec::new();
            let mut discards = Vec::new();
            let mut expected = 0;
            for id in 0..1 + rng.below(7) {
                let most = *[30, 700, 5000, 40_000].get(rng.below(4) as usize).unwrap();
                let len = (1 + rng.below(most)).min(size - at);
                if len == 0 {
                    break;
                }
                let range = at as usize..(at + len) as usize;
                match rng.below(10) {
                    0..5 => {
                        let data: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                        model[range].copy_from_slice(&data);
                        queue.submit(Request::Write { offset: at, buf: Buf::new(data), fua: rng.chance(10) }, id);
                    }
                    5 => {
                        model[range].fill(0);
                        queue.submit(Request::WriteZeroes { offset: at, len, may_unmap: rng.chance(50), fua: false }, id);
                    }
                    6 => {
                        discards.push(range);
                        queue.submit(Request::Discard { offset: at, len }, id);
                    }
                    _ => {
                        let buf = Buf::new(vec![0xee; len as usize]);
                        reads.push((range, buf.clone()));
                        queue.submit(Request::Read { offset: at, buf }, id);
                    }
                }
                expected += 1;
                at += len + if rng.chance(70) { 0 } else { rng.below(5000) };
                if at >= size {
                    break;
                }
                for _ in 0..rng.below(4) {
                    queue.run();
                    world.step(&queue);
                }
            }
            if rng.chance(20) {
                queue.submit(Request::Flush, 100);
                expected += 1;
            }
            world.drain(&queue);
            let results = world.results.take();
            assert_eq!(results.len(), expected);
            for (id, result) in results {
                result.unwrap_or_else(|e| panic!("seed {seed} session {session} round {round} request {id}: {e}"));
            }
            let what = format!("seed {seed} align {align}/{memory} session {session} round {round}");
            for (range, buf) in reads {
                same(&buf.0.borrow(), &model[range], &what);
            }
            for range in discards {
                let buf = Buf::new(vec![0xee; range.len()]);
                world.request(&queue, Request::Read { offset: range.start as u64, buf: buf.clone() }).unwrap().unwrap();
                for (i, &found) in buf.0.borrow().iter().enumerate() {
                    let at = range.start + i;
                    assert!(found == model[at] || found == 0, "{what}: discarded byte {at}");
                    model[at] = found;
                }
            }
        }
        let all = Buf::new(vec![0xee; size as usize]);
        world.request(&queue, Request::Read { offset: 0, buf: all.clone() }).unwrap().unwrap();
        same(&all.0.borrow(), &model, &format!("seed {seed} align {align}/{memory} session {session}"));
        // Durable after a flush, whatever else is lost; or closed.
        if session == 1 {
            world.request(&queue, Request::Close).unwrap().unwrap();
        } else {
            world.request(&queue, Request::Flush).unwrap().unwrap();
            std::mem::forget(queue);
        }
        bytes = world.disk.borrow().stable.clone();
    }
    let again = Sim::try_open(&bytes, Some(base), limits, Config { read_only: true, ..Config::default() }).unwrap();
    same(&again.read(0, size), &model, &format!("seed {seed} align {align}/{memory}: opened again"));
    again.close();
}

fn sweep(align: u32, memory: u32) {
    for seed in 0..24 {
        let mut rng = Rng::new(seed ^ u64::from(align) << 20 ^ u64::from(memory) << 40);
        let size = (16 + rng.below(600)) * 512;
        let base = match seed % 4 {
            0 => size,
            1 => rng.below(size),
            2 => size + rng.below(100_000),
            _ => size.saturating_sub(rng.below(9000)),
        };
        // A base of odd bytes counts as if rounded up to a sector.
        run(&Case { align, memory, base, size, block: [4096, 16384][rng.below(2) as usize], seed });
    }
}

#[test]
fn any_request_on_a_host_without_alignment() {
    sweep(1, 1);
}

#[test]
fn any_request_on_512_byte_sectors() {
    sweep(512, 1);
}

#[test]
fn any_request_on_4096_byte_sectors() {
    sweep(4096, 1);
}

#[test]
fn any_request_with_memory_that_must_be_bounced() {
    sweep(512, 4096);
    sweep(4096, 4096);
    sweep(1, 512);
}

/// Requests larger than the engine's own buffers.
#[test]
fn requests_of_megabytes() {
    for align in [1, 512, 4096] {
        let limits = Limits { request_alignment: align, memory_alignment: 512, ..Limits::default() };
        let size = 12 * MIB;
        let base = pattern(1, 0, 10 * MIB / 512);
        let params = CreateParams { block_size: 2 << 20, ..over_base(size) };
        let image = create(params, Some(base.clone()), limits).unwrap();
        let sim = Sim::try_open(&image, Some(base.clone()), limits, Config::default()).unwrap();
        let mut model = base;
        model.resize(size as usize, 0);
        for (at, len) in [(3 * MIB + 77, 1), (100, 5 * MIB + 333), (9 * MIB - 1, 3 * MIB + 1)] {
            let data: Vec<u8> = (0..len).map(|i| (i * 7 + at) as u8).collect();
            model[at as usize..(at + len) as usize].copy_from_slice(&data);
            sim.write(at, data);
            same(&sim.read(0, size), &model, &format!("align {align}, {len} at {at}"));
            same(&sim.read(1, size - 2), &model[1..size as usize - 1], &format!("align {align}, misaligned read"));
        }
        sim.close();
    }
}
