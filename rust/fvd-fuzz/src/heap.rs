// SPDX-License-Identifier: MIT OR Apache-2.0
//! An allocator that counts, by thread: what lives now, and the most there was. Where it is not the
//! program's, nothing is counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The allocator: a program that wants to count makes it the global one.
pub struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Memory freed while a thread ends is not counted: nobody looks any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: everything is the system allocator's; counting neither allocates nor unwinds. `realloc` is
// the trait's own, so that moving a block counts old and new at once.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Bytes that this thread allocated and nobody on it freed.
pub fn live() -> isize {
    LIVE.get()
}

/// Runs `f`; returns the most bytes that lived at once in it, beyond those that lived before.
pub fn peak_of<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = live();
    PEAK.set(before);
    let result = f();
    (result, (PEAK.get() - before) as usize)
}
