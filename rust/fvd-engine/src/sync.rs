// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting without blocking: condition queues, an async mutex, range locks.
//!
//! All are `Sync` and wake by the standard [`Waker`], which is a task id in some queue's inbox.
//! No `std` mutex here is held across a wake-up.

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Poll, Waker};

/// What threads share is made of these, so that `loom_tests.rs` explores the engine's own types.
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Locks `mutex`; a panic elsewhere poisons the image, not its mutexes.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tasks that wait until some condition holds.
#[derive(Default)]
pub(crate) struct WaitQueue(Mutex<Vec<Waker>>);

impl WaitQueue {
    /// Waits until `ready` returns a value. Whoever makes it ready calls [`WaitQueue::wake_all`]
    /// afterwards, holding no lock that `ready` takes.
    pub(crate) async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| {
            // Checked under the lock, so that a change made before `wake_all` takes it is seen.
            let mut waiters = lock(&self.0);
            if let Some(value) = ready() {
                return Poll::Ready(value);
            }
            waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Lets every waiter look again.
    pub(crate) fn wake_all(&self) {
        let waiters = std::mem::take(&mut *lock(&self.0));
        for waker in waiters {
            waker.wake();
        }
    }
}

/// A mutex whose holder may wait for I/O.
#[derive(Default)]
pub(crate) struct AsyncMutex {
    held: Mutex<bool>,
    waiters: WaitQueue,
}

/// Releases an [`AsyncMutex`].
pub(crate) struct AsyncGuard<'a>(&'a AsyncMutex);

impl AsyncMutex {
    /// Takes the mutex.
    pub(crate) async fn lock(&self) -> AsyncGuard<'_> {
        self.waiters
            .until(|| {
                let mut held = lock(&self.held);
                (!std::mem::replace(&mut *held, true)).then_some(())
            })
            .await;
        AsyncGuard(self)
    }
}

impl Drop for AsyncGuard<'_> {
    fn drop(&mut self) {
        *lock(&self.0.held) = false;
        self.0.waiters.wake_all();
    }
}

#[derive(Default)]
struct Ranges {
    next: u64,
    /// In order of arrival: a range is held once no earlier one overlaps it, so that nobody starves.
    entries: Vec<(u64, u64, u64)>,
}

/// Exclusive locks on ranges of guest addresses, first come first served.
#[derive(Default)]
pub(crate) struct RangeLock {
    ranges: Mutex<Ranges>,
    waiters: WaitQueue,
}

/// Releases a range.
pub(crate) struct RangeGuard<'a> {
    owner: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    /// Takes `start..end`; waits for earlier holders and waiters that overlap it.
    pub(crate) async fn lock(&self, start: u64, end: u64) -> RangeGuard<'_> {
        assert!(start < end);
        let id = {
            let mut ranges = lock(&self.ranges);
            let id = ranges.next;
            ranges.next += 1;
            ranges.entries.push((id, start, end));
            id
        };
        let guard = RangeGuard { owner: self, id };
        self.waiters
            .until(|| {
                let ranges = lock(&self.ranges);
                let clash = ranges.entries.iter().take_while(|e| e.0 != id).any(|e| e.1 < end && start < e.2);
                (!clash).then_some(())
            })
            .await;
        guard
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        lock(&self.owner.ranges).entries.retain(|e| e.0 != self.id);
        self.owner.waiters.wake_all();
    }
}
