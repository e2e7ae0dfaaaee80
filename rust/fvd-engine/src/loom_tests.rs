// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every interleaving of lookups with allocation, narrowing and close, on the engine's own image,
//! bitmap and brackets (C3, R5, CC-12).
//!
//! Run: RUSTFLAGS="--cfg loom" cargo test -p fvd-engine --release --lib loom_tests
//! Segments are put in place before the threads start: `OnceLock` is the standard library's.
//! `tests/loom_brackets.rs` shows, with the same brackets, that the fences are needed.

use crate::bits::{Bits, Segment};
use crate::image::{Image, State};
use crate::lookup::Lookup;
use crate::request::Config;
use crate::table::ENTRY_BITS;
use crate::sync::atomic::Ordering;
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::thread;
use std::sync::Arc;

const BLOCK: u64 = 4096;

/// An open image of four blocks, all of them in the base, and what lies in the file.
struct World {
    image: Arc<Image>,
    /// The place of block 0: loom sees if somebody reads while another writes.
    place: UnsafeCell<u32>,
}

impl World {
    fn new(present: bool) -> Arc<Self> {
        let image = Image::new(Config::default());
        let map = &image.map;
        map.virtual_size.store(4 * BLOCK, Ordering::Relaxed);
        map.covered.store(4 * BLOCK, Ordering::Relaxed);
        map.block_shift.store(12, Ordering::Relaxed);
        map.data_offset.store(1 << 20, Ordering::Relaxed);
        let bits = Bits::new(4);
        bits.insert(0, Segment::initial());
        bits.write(0, 1, present);
        assert!(map.bits.set(bits).is_ok());
        image.set_state(State::Open);
        Arc::new(Self { image, place: UnsafeCell::new(0) })
    }

    /// A compact image of one chunk: whether block 0 is in the image, and whether the chunk has storage,
    /// in the same place of the file.
    fn compact(present: bool, stored: bool) -> Arc<Self> {
        let world = Self::new(present);
        let map = &world.image.map;
        map.chunk_shift.store(16, Ordering::Relaxed);
        let table = Bits::new(ENTRY_BITS);
        table.insert(0, Segment::initial());
        table.set_entry(0, u32::from(stored));
        assert!(map.table.set(table).is_ok());
        world
    }

    fn table(&self) -> &Bits {
        self.image.map.table.get().unwrap()
    }

    /// A pass-through request for block 0; whether it was served.
    fn request(&self, write: bool) -> bool {
        match self.image.lookup(0, 0, BLOCK, write) {
            Lookup::Data { offset, len, token, .. } => {
                assert_eq!((offset, len), (1 << 20, BLOCK));
                self.place.with(|_| ());
                self.image.end(token);
                true
            }
            Lookup::Ask => false,
        }
    }

    /// The place is changed by somebody who relies on nobody using it.
    fn take(&self) {
        self.place.with_mut(|_| ());
    }
}

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

fn with_guest(preemptions: usize, present: bool, write: bool, other: impl Fn(&World) + Send + Sync + 'static) {
    with_guest_of(preemptions, move || World::new(present), write, other);
}

fn with_guest_of(preemptions: usize, make: impl Fn() -> Arc<World> + Send + Sync + 'static, write: bool, other: impl Fn(&World) + Send + Sync + 'static) {
    model(preemptions, move || {
        let world = make();
        let guest = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.request(write))
        };
        other(&world);
        guest.join().unwrap();
    });
}

/// Allocation (CC-1): whoever sees the bit sees the data that was written before it.
#[test]
fn a_bit_is_seen_only_with_its_data() {
    with_guest(4, false, false, |world| {
        world.take();
        world.image.bits().write(0, 1, true);
    });
}

/// The test above can fail.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_bit_before_its_data_is_found() {
    with_guest(4, false, false, |world| {
        world.image.bits().write(0, 1, true);
        world.take();
    });
}

/// A cycle that reads, changes and writes host sectors (CC-13) has them for itself after the wait.
#[test]
fn after_a_narrowing_no_direct_write_is_under_way() {
    with_guest(3, true, true, |world| {
        world.image.map.no_direct_writes.fetch_add(1, Ordering::SeqCst);
        block_on(world.image.narrow());
        world.take();
        world.image.map.no_direct_writes.fetch_sub(1, Ordering::SeqCst);
    });
}

/// A block that is taken away (discard, and whatever else clears bits) is nobody's after the wait.
#[test]
fn a_cleared_bit_takes_the_block_away() {
    with_guest(3, true, false, |world| {
        world.image.bits().write(0, 1, false);
        block_on(world.image.narrow());
        world.take();
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_narrowing_that_does_not_wait_is_found() {
    with_guest(3, true, false, |world| {
        world.image.bits().write(0, 1, false);
        world.take();
    });
}

/// A smaller disk ends nobody's request in what was cut off.
#[test]
fn a_smaller_size_is_waited_for() {
    with_guest(3, true, false, |world| {
        world.image.map.virtual_size.store(0, Ordering::Release);
        block_on(world.image.narrow());
        world.take();
    });
}

/// After close nobody is in the file any more, and nobody is sent there (API-25).
#[test]
fn after_close_no_lookup_is_answered() {
    with_guest(3, true, true, |world| {
        world.image.advance(State::Open, State::Closing).unwrap();
        block_on(world.image.narrow());
        world.image.set_state(State::Closed);
        world.take();
    });
}

/// Two guests in one slot: a narrowing waits for both, and is woken.
#[test]
fn a_narrowing_waits_for_two_guests() {
    model(2, || {
        let world = World::new(true);
        let guests = [(); 2].map(|()| {
            let world = Arc::clone(&world);
            thread::spawn(move || world.request(false))
        });
        world.image.bits().write(0, 1, false);
        block_on(world.image.narrow());
        world.take();
        for guest in guests {
            guest.join().unwrap();
        }
    });
}

/// A chunk gets storage (CC-52): whoever sees the entry sees the data, whoever sees the bit sees the entry.
#[test]
fn an_entry_is_seen_only_with_its_data() {
    with_guest_of(4, || World::compact(true, false), false, |world| {
        world.take();
        world.table().set_entry(0, 1);
    });
    with_guest_of(4, || World::compact(false, false), false, |world| {
        world.take();
        world.table().set_entry(0, 1);
        world.image.bits().write(0, 1, true);
    });
}

/// The test above can fail.
#[test]
#[should_panic(expected = "Causality violation")]
fn an_entry_before_its_data_is_found() {
    with_guest_of(4, || World::compact(true, false), true, |world| {
        world.table().set_entry(0, 1);
        world.take();
    });
}

/// A chunk whose storage is taken away (CC-54) is nobody's after the wait.
#[test]
fn a_cleared_entry_takes_the_chunk_away() {
    with_guest_of(3, || World::compact(true, true), true, |world| {
        world.table().set_entry(0, 0);
        block_on(world.image.narrow());
        world.take();
    });
}
