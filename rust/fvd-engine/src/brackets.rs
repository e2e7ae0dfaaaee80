// SPDX-License-Identifier: MIT OR Apache-2.0
//! Begin/end brackets around pass-through requests, and the wait for all that began before (R5).
//!
//! A request increments a counter, then reads what decides (size, bits, the *ask* flags); a
//! narrowing changes what decides, then reads the counters. Both sides store first and load second,
//! so both need a sequentially consistent fence between the two: acquire and release alone let
//! each side miss the other (`tests/loom_brackets.rs` shows it).
//!
//! Counters are per slot (one slot a thread, ideally) and per phase. A narrowing flips the phase
//! and waits for the old one, twice: a request may have read the phase before the first flip and
//! counted itself only after it.

// The loom test includes this file twice, once with a fence that does nothing.
#[cfg(loom)]
use super::fence;
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Number of counter pairs; slots are taken modulo this.
pub(crate) const SLOTS: usize = 16;

/// Names the counter that a bracket incremented. May be ended on any thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BracketToken(pub u32);

/// One cache line (two, for the adjacent-line prefetcher) a slot, so that threads do not share.
#[repr(align(128))]
struct Slot([AtomicU32; 2]);

/// The counters.
pub(crate) struct Brackets {
    phase: AtomicU32,
    slots: [Slot; SLOTS],
}

impl Brackets {
    pub(crate) fn new() -> Self {
        let slots = std::array::from_fn(|_| Slot([AtomicU32::new(0), AtomicU32::new(0)]));
        Self { phase: AtomicU32::new(0), slots }
    }

    /// Opens a bracket. What decides is read after this.
    #[inline]
    pub(crate) fn begin(&self, slot: usize) -> BracketToken {
        let slot = slot % SLOTS;
        let phase = (self.phase.load(Ordering::Relaxed) & 1) as usize;
        self.slots[slot].0[phase].fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        BracketToken((slot << 1 | phase) as u32)
    }

    /// Closes a bracket. True if its counter is now zero: somebody may be waiting for that.
    #[inline]
    pub(crate) fn end(&self, token: BracketToken) -> bool {
        let counter = &self.slots[(token.0 >> 1) as usize % SLOTS].0[(token.0 & 1) as usize];
        let before = counter.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "bracket ended twice");
        fence(Ordering::SeqCst);
        before == 1
    }

    /// Starts a new phase, after what decides was changed; returns the old one.
    pub(crate) fn flip(&self) -> usize {
        fence(Ordering::SeqCst);
        (self.phase.fetch_add(1, Ordering::AcqRel) & 1) as usize
    }

    /// Whether no bracket of `phase` is open.
    pub(crate) fn drained(&self, phase: usize) -> bool {
        fence(Ordering::SeqCst);
        self.slots.iter().all(|slot| slot.0[phase].load(Ordering::Acquire) == 0)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_phase_drains_when_its_brackets_end() {
        let brackets = Brackets::new();
        let one = brackets.begin(3);
        let two = brackets.begin(19);
        let old = brackets.flip();
        assert!(!brackets.drained(old));
        let late = brackets.begin(3);
        assert!(!brackets.end(one));
        assert!(brackets.end(two));
        assert!(brackets.drained(old));
        assert!(!brackets.drained(1 - old));
        assert!(brackets.end(late));
    }
}
