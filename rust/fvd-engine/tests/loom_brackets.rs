// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every interleaving of begin/end and narrowing, with the memory order the code asks for (CC-12).
//!
//! Run: RUSTFLAGS="--cfg loom" cargo test -p fvd-engine --release --test loom_brackets
//! Without `--cfg loom` this file is empty and loom is not compiled.
//!
//! The code under test is the engine's own file, included twice: once as it is, once with a fence
//! that does nothing, for which loom must find an interleaving that breaks the promise. Loom treats
//! a SeqCst access as AcqRel (which may invent failures, never hide one); SeqCst *fences*, which the
//! code relies on, it models.
#![cfg(loom)]

// The path makes the directory of an inline module the file's own.
#[path = "."]
mod real {
    pub(crate) use loom::sync::atomic::fence;
    #[path = "../src/brackets.rs"]
    #[allow(dead_code)]
    pub(crate) mod brackets;
}

#[path = "."]
mod unfenced {
    pub(crate) fn fence(_: loom::sync::atomic::Ordering) {}
    #[path = "../src/brackets.rs"]
    #[allow(dead_code)]
    pub(crate) mod brackets;
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

/// What the tests ask of either version.
trait Brackets: Send + Sync + 'static {
    fn new() -> Self;
    fn begin(&self, slot: usize) -> u32;
    fn end(&self, token: u32) -> bool;
    fn flip(&self) -> usize;
    fn drained(&self, phase: usize) -> bool;
}

macro_rules! version {
    ($module:ident) => {
        impl Brackets for $module::brackets::Brackets {
            fn new() -> Self {
                Self::new()
            }
            fn begin(&self, slot: usize) -> u32 {
                self.begin(slot).0
            }
            fn end(&self, token: u32) -> bool {
                self.end($module::brackets::BracketToken(token))
            }
            fn flip(&self) -> usize {
                self.flip()
            }
            fn drained(&self, phase: usize) -> bool {
                self.drained(phase)
            }
        }
    };
}
version!(real);
version!(unfenced);

/// A place that lookups promise until it is taken away.
struct Place {
    taken: AtomicBool,
    /// Read by whoever was promised the place, written by whoever took it away: loom sees if both
    /// do at once.
    content: UnsafeCell<u32>,
}

// SAFETY: the promise under test is that nobody writes while somebody reads; loom checks it.
unsafe impl Sync for Place {}

struct World<B> {
    brackets: B,
    places: [Place; 2],
}

impl<B: Brackets> World<B> {
    fn new() -> Arc<Self> {
        let place = || Place { taken: AtomicBool::new(false), content: UnsafeCell::new(0) };
        Arc::new(Self { brackets: B::new(), places: [place(), place()] })
    }

    /// As a pass-through request: begin, look, do the I/O, end. Relaxed, so that nothing but the
    /// brackets orders the look.
    fn request(&self, slot: usize, place: usize) {
        let token = self.brackets.begin(slot);
        let place = &self.places[place];
        if !place.taken.load(Ordering::Relaxed) {
            // SAFETY: see `Place`.
            place.content.with(|p| unsafe { std::ptr::read_volatile(p) });
        }
        self.brackets.end(token);
    }

    /// As `Image::narrow`: publish, then wait for all that began before; then the place is free.
    fn narrow(&self, place: usize, flips: u32) {
        let place = &self.places[place];
        place.taken.store(true, Ordering::Relaxed);
        for _ in 0..flips {
            let old = self.brackets.flip();
            while !self.brackets.drained(old) {
                thread::yield_now();
            }
        }
        // SAFETY: see `Place`.
        place.content.with_mut(|p| unsafe { std::ptr::write_volatile(p, 1) });
    }
}

fn model(preemptions: Option<usize>, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    builder.preemption_bound = preemptions;
    builder.check(test);
}

fn one_request_one_narrowing<B: Brackets>() {
    model(None, || {
        let world = World::<B>::new();
        let guest = {
            let world = world.clone();
            thread::spawn(move || world.request(0, 0))
        };
        world.narrow(0, 2);
        guest.join().unwrap();
    });
}

/// A request that read the phase long ago counts itself in an old one: the first narrowing misses
/// it rightly (it will see what that one published), the second must not.
fn one_request_two_narrowings<B: Brackets>(flips: u32) {
    model(Some(4), move || {
        let world = World::<B>::new();
        let guest = {
            let world = world.clone();
            thread::spawn(move || world.request(0, 1))
        };
        world.narrow(0, flips);
        world.narrow(1, flips);
        guest.join().unwrap();
    });
}

fn two_requests_one_narrowing<B: Brackets>(slots: [usize; 2]) {
    model(Some(3), move || {
        let world = World::<B>::new();
        let guests = slots.map(|slot| {
            let world = world.clone();
            thread::spawn(move || world.request(slot, 0))
        });
        world.narrow(0, 2);
        for guest in guests {
            guest.join().unwrap();
        }
    });
}

/// Who ends the last bracket sees that somebody waits, or who waits sees that it ended: else it
/// waits for ever. As `Image::end` and the first look of `Image::narrow`.
fn wake_ups_are_not_lost<B: Brackets>() {
    model(None, || {
        let world = World::<B>::new();
        let narrowing = Arc::new(AtomicBool::new(false));
        let token = world.brackets.begin(0);
        let guest = {
            let (world, narrowing) = (world.clone(), narrowing.clone());
            thread::spawn(move || world.brackets.end(token) && narrowing.load(Ordering::Relaxed))
        };
        narrowing.store(true, Ordering::Relaxed);
        let old = world.brackets.flip();
        let seen = world.brackets.drained(old);
        let woken = guest.join().unwrap();
        assert!(seen || woken, "nobody wakes the narrowing");
    });
}

#[test]
fn a_narrowing_waits_for_a_request_that_began_before() {
    one_request_one_narrowing::<real::brackets::Brackets>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_fences_a_request_is_missed() {
    one_request_one_narrowing::<unfenced::brackets::Brackets>();
}

#[test]
fn two_narrowings_in_a_row_wait() {
    one_request_two_narrowings::<real::brackets::Brackets>(2);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn one_flip_is_not_enough() {
    one_request_two_narrowings::<real::brackets::Brackets>(1);
}

#[test]
fn requests_of_one_slot_and_of_two() {
    two_requests_one_narrowing::<real::brackets::Brackets>([0, 0]);
    two_requests_one_narrowing::<real::brackets::Brackets>([0, 1]);
}

#[test]
fn a_narrowing_that_waits_is_woken() {
    wake_ups_are_not_lost::<real::brackets::Brackets>();
}

#[test]
#[should_panic(expected = "nobody wakes the narrowing")]
fn without_the_fences_a_wake_up_is_lost() {
    wake_ups_are_not_lost::<unfenced::brackets::Brackets>();
}
