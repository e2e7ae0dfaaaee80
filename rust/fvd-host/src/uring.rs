// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring: reads, writes and syncs without a thread per operation.
//!
//! One ring per layer and thread. Each operation is handed to the kernel at once, because the next
//! call into this library may only come when the ring's descriptor is readable.

use crate::iovec::Cursor;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Entries of the submission queue; the kernel keeps more than that in flight.
const ENTRIES: u32 = 64;

pub(crate) struct Ring {
    ring: IoUring,
    /// Operations that found the queue full.
    backlog: VecDeque<squeue::Entry>,
}

impl Ring {
    /// `None` where the kernel, or a sandbox, has no io_uring for us.
    pub fn new() -> Option<Self> {
        let ring = IoUring::new(ENTRIES).ok()?;
        // Without it a burst of completions could get lost.
        ring.params().is_feature_nodrop().then(|| Self { ring, backlog: VecDeque::new() })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor for as long as the borrow lasts.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Starts the transfer of what `cursor` has left. Like all calls that start something, it
    /// returns what [`Ring::submit`] returns.
    ///
    /// # Safety
    /// `cursor`'s list and the memory it names stay valid and in place until `collect` has
    /// returned `slot`; `fd` stays open until then.
    pub unsafe fn transfer(&mut self, slot: usize, fd: BorrowedFd<'_>, write: bool, fua: bool, offset: u64, cursor: &Cursor) -> bool {
        let iov = cursor.next();
        let fd = types::Fd(fd.as_raw_fd());
        let entry = if write {
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, iov.as_ptr().cast(), iov.len() as u32).offset(offset).rw_flags(flags).build()
        } else {
            opcode::Readv::new(fd, iov.as_ptr().cast(), iov.len() as u32).offset(offset).build()
        };
        // SAFETY: by this function's contract.
        unsafe { self.push(entry.user_data(slot as u64)) }
    }

    /// Starts an fdatasync. `fd` must stay open until `collect` has returned `slot`.
    pub fn flush(&mut self, slot: usize, fd: BorrowedFd<'_>) -> bool {
        let entry = opcode::Fsync::new(types::Fd(fd.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: names no memory.
        unsafe { self.push(entry.user_data(slot as u64)) }
    }

    /// # Safety
    /// The memory that `entry` names stays valid until its completion is collected.
    unsafe fn push(&mut self, entry: squeue::Entry) -> bool {
        self.backlog.push_back(entry);
        self.submit()
    }

    /// Hands waiting operations to the kernel. Returns whether some still wait: then completions
    /// must be collected and this called again.
    pub fn submit(&mut self) -> bool {
        loop {
            let mut queue = self.ring.submission();
            while let Some(entry) = self.backlog.front() {
                // SAFETY: the promise made to `push` holds until completion.
                if unsafe { queue.push(entry) }.is_err() {
                    break;
                }
                self.backlog.pop_front();
            }
            if queue.is_empty() && !queue.cq_overflow() {
                return false;
            }
            drop(queue);
            match self.ring.submit() {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full, or memory is short.
                Err(_) => return true,
                Ok(_) if self.backlog.is_empty() => return !self.ring.submission().is_empty(),
                Ok(_) => {}
            }
        }
    }

    /// Completed operations: slot and result as the system call would have returned it.
    pub fn collect(&mut self, out: &mut Vec<(usize, i64)>) {
        for entry in self.ring.completion() {
            out.push((entry.user_data() as usize, i64::from(entry.result())));
        }
    }
}
