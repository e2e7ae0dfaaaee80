// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one thread waits on: completions, wake-ups from other threads, and the clock, behind one
//! file descriptor that any event loop can poll. Shared by all layers of a chain on that thread.

use crate::pool::Pool;
use crate::raw::os_error;
use fvd_engine::Result;
use fvd_engine::host::Wake;
use rustix::event::{EventfdFlags, epoll};
use rustix::time::{ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

fn io_error(what: &str, errno: rustix::io::Errno) -> fvd_engine::Error {
    os_error(what, &errno.into())
}

/// An event counter another thread can raise.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub fn signal(&self) {
        // Fails only when the counter is full: then the reader is awake anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

/// Nanoseconds of the monotonic clock.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as _ }
}

/// See the module's text.
pub(crate) struct Reactor {
    epoll: OwnedFd,
    timer: OwnedFd,
    armed: Cell<u64>,
    pub event: Arc<Event>,
    pub pool: Arc<Pool>,
}

impl Reactor {
    pub fn new(pool: Arc<Pool>) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| io_error("epoll_create", e))?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| io_error("eventfd", e))?;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
            .map_err(|e| io_error("timerfd_create", e))?;
        let reactor = Self { epoll, timer, armed: Cell::new(u64::MAX), event: Arc::new(Event(event)), pool };
        reactor.watch(reactor.event.0.as_fd())?;
        reactor.watch(reactor.timer.as_fd())?;
        Ok(reactor)
    }

    /// Makes the loop wake up when `fd` is readable. Closing `fd` ends that.
    pub fn watch(&self, fd: BorrowedFd<'_>) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN).map_err(|e| io_error("epoll_ctl", e))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Sleeps until something happens or the timeout is over.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        let timeout = timeout.map(|t| timespec(u64::try_from(t.as_nanos()).unwrap_or(u64::MAX)));
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 4];
        match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(io_error("epoll_wait", errno)),
        }
    }

    /// Forgets signals seen so far. What they announce must be looked for after this call.
    pub fn drain(&self) {
        self.event.drain();
        if rustix::io::read(&self.timer, &mut [0u8; 8]).is_ok() {
            self.armed.set(u64::MAX);
        }
    }

    /// Has the loop wake up at `at_ns` at the latest.
    pub fn arm(&self, at_ns: u64) {
        if at_ns >= self.armed.get() {
            return;
        }
        self.armed.set(at_ns);
        // Zero would disarm.
        let spec = Itimerspec { it_interval: timespec(0), it_value: timespec(at_ns.max(1)) };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec).expect("a timer of our own takes any time");
    }
}

/// Wakes the thread of a [`FileIo`](crate::FileIo), from any thread.
#[derive(Clone, Debug)]
pub struct WakeHandle {
    pub(crate) flag: Arc<AtomicBool>,
    pub(crate) event: Arc<Event>,
}

impl Wake for WakeHandle {
    fn wake(&self) {
        if !self.flag.swap(true, Ordering::AcqRel) {
            self.event.signal();
        }
    }
}

/// Results of pool threads on their way to the thread that asked.
#[derive(Debug)]
pub(crate) struct Mailbox {
    results: Mutex<Vec<(usize, i64)>>,
    event: Arc<Event>,
}

impl Mailbox {
    pub fn new(event: Arc<Event>) -> Self {
        Self { results: Mutex::default(), event }
    }

    pub fn post(&self, slot: usize, ret: i64) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push((slot, ret));
        self.event.signal();
    }

    pub fn take(&self) -> Vec<(usize, i64)> {
        std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
