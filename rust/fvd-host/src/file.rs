// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread's way to the files of an image: takes the engine's operations, returns them done.
//!
//! Reads, writes and syncs go through io_uring, or through the thread pool where there is none;
//! what else can block goes through the pool. Reads of a base that is an FVD image become requests
//! to that image's own engine, on the same thread.
//!
//! Lifetimes: an operation, its memory included, stays in `pending` until nobody works on it any
//! more; dropping a `FileIo` waits for that.

use crate::disk::LocalHost;
use crate::files::{BaseFile, Files};
use crate::iovec::{self, Cursor, IoVecBuf};
use crate::raw::RawFile;
use crate::reactor::{Mailbox, Reactor, WakeHandle, now_ns};
#[cfg(feature = "uring")]
use crate::uring::Ring;
use fvd_engine::host::{FILES, FileId, Host, HostOp, Limits, OpKind, STATUS_DATA, Token};
use fvd_engine::{Place, Queue, Reply, Request, Result};
use std::cell::{Cell, RefCell};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A finished operation: its token, its result (≥ 0 or a negative errno), and itself.
pub type Completion = (Token, i64, HostOp<IoVecBuf>);

struct Pending {
    token: Token,
    op: HostOp<IoVecBuf>,
    /// What the kernel, or the engine below, is given; the list must not move while they use it.
    cursor: Cursor,
}

impl Pending {
    /// Where the rest of a read or write begins, part of which may be done; else the operation's offset.
    fn next_offset(&self) -> u64 {
        match self.op.kind {
            OpKind::Read | OpKind::Write { .. } => self.op.offset + (self.op.len - self.cursor.left as u64),
            _ => self.op.offset,
        }
    }
}

/// Operations under way; a slot stays the same from start to end.
#[derive(Default)]
struct Slab {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl Slab {
    fn insert(&mut self, pending: Pending) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(pending);
        slot
    }

    fn get(&mut self, slot: usize) -> &mut Pending {
        self.slots[slot].as_mut().expect("slot of an operation under way")
    }

    fn remove(&mut self, slot: usize) -> Pending {
        let pending = self.slots[slot].take().expect("slot of an operation under way");
        self.free.push(slot);
        pending
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

/// The engine of a base, with this thread's queue.
struct Nested {
    queue: Rc<Queue<LocalHost>>,
    io: Rc<FileIo>,
    length: u64,
}

/// What follows a completion in the ring.
#[cfg(feature = "uring")]
enum Step {
    Done(i64),
    /// The rest, by the ring again.
    More,
    /// The rest, by a thread.
    Threads,
}

/// See the module's text. Belongs to the thread that made it.
pub struct FileIo {
    // First, so that they are gone before the files are closed.
    #[cfg(feature = "uring")]
    ring: Option<RefCell<Ring>>,
    nested: Option<Nested>,
    files: Arc<Files>,
    reactor: Rc<Reactor>,
    pending: RefCell<Slab>,
    finished: RefCell<Vec<Completion>>,
    /// Results of operations on the nested image: slot and result.
    answered: Rc<RefCell<Vec<(usize, i64)>>>,
    mailbox: Arc<Mailbox>,
    wake: WakeHandle,
    timer: Cell<u64>,
    reached: Cell<[u64; FILES]>,
}

impl FileIo {
    /// Opens an image for this thread; more threads take [`FileIo::files`] and [`FileIo::new`].
    pub fn open(path: &std::path::Path, options: &crate::Options) -> Result<Self> {
        Self::new(Files::open(path, options)?)
    }

    /// A way to opened files for the calling thread.
    pub fn new(files: Arc<Files>) -> Result<Self> {
        let reactor = Rc::new(Reactor::new(Arc::clone(&files.pool))?);
        Self::over(files, reactor)
    }

    fn over(files: Arc<Files>, reactor: Rc<Reactor>) -> Result<Self> {
        let nested = match &files.base {
            Some(BaseFile::Fvd(base)) => {
                let io = Rc::new(Self::over(Arc::clone(&base.files), Rc::clone(&reactor))?);
                let queue = Queue::new(Arc::clone(&base.image), LocalHost::new(Rc::clone(&io)), Box::new(io.wake_handle()));
                Some(Nested { queue, io, length: base.length })
            }
            _ => None,
        };
        #[cfg(feature = "uring")]
        let ring = match if files.threads { None } else { Ring::new() } {
            Some(ring) => {
                reactor.watch(ring.fd())?;
                Some(RefCell::new(ring))
            }
            None => None,
        };
        Ok(Self {
            #[cfg(feature = "uring")]
            ring,
            nested,
            files,
            pending: RefCell::default(),
            finished: RefCell::default(),
            answered: Rc::default(),
            mailbox: Arc::new(Mailbox::new(Arc::clone(&reactor.event))),
            wake: WakeHandle { flag: Arc::new(AtomicBool::new(false)), event: Arc::clone(&reactor.event) },
            reactor,
            timer: Cell::new(u64::MAX),
            reached: Cell::new([0; FILES]),
        })
    }

    /// The opened files, for other threads.
    pub fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// What a file can do; defaults where it is not there.
    pub fn limits(&self, file: FileId) -> Limits {
        self.files.limits()[file as usize]
    }

    /// Whether reads and writes go through io_uring.
    pub fn uses_uring(&self) -> bool {
        #[cfg(feature = "uring")]
        return self.ring.is_some();
        #[cfg(not(feature = "uring"))]
        false
    }

    /// Becomes readable when [`FileIo::process`] has something to do.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.reactor.fd()
    }

    /// Wakes this thread up, from any thread; [`FileIo::take_wake`] then answers true once.
    pub fn wake_handle(&self) -> WakeHandle {
        self.wake.clone()
    }

    /// Whether somebody called the wake handle since the last call: the queue must be run.
    pub fn take_wake(&self) -> bool {
        self.wake.flag.swap(false, Ordering::AcqRel)
    }

    /// Sets the time of the next timer event, which replaces the one set before; `u64::MAX`: none.
    pub fn set_timer(&self, at_ns: u64) {
        self.timer.set(at_ns);
        if at_ns != u64::MAX {
            self.reactor.arm(at_ns);
        }
    }

    /// Whether the timer's time has come; true once: the queue's timer function must be called.
    pub fn take_timer(&self) -> bool {
        let due = self.timer_due();
        if due {
            self.timer.set(u64::MAX);
        }
        due
    }

    fn timer_due(&self) -> bool {
        let at = self.timer.get();
        at != u64::MAX && now_ns() >= at
    }

    /// One past the furthest byte of `file` that a finished operation touched: for progress.
    pub fn reached(&self, file: FileId) -> u64 {
        self.reached.get()[file as usize]
    }

    /// Whether no operation is under way and none waits to be fetched.
    pub fn is_idle(&self) -> bool {
        self.pending.borrow().is_empty() && self.finished.borrow().is_empty()
    }

    /// Starts an operation. It comes back, always, from a later [`FileIo::process`].
    pub fn submit(&self, token: Token, op: HostOp<IoVecBuf>) {
        let file = op.file;
        if file == FileId::Base {
            match (&self.files.base, op.kind) {
                (None, _) => return self.finish_now(token, op, -i64::from(libc::ENOMEDIUM)),
                (_, OpKind::Read | OpKind::GetLength | OpKind::BaseStatus) => {}
                _ => return self.finish_now(token, op, -i64::from(libc::EROFS)),
            }
        }
        match self.raw(file) {
            Some(_) => self.submit_raw(token, op),
            None if file == FileId::Base => self.submit_nested(token, op),
            None => self.finish_now(token, op, -i64::from(libc::ENOMEDIUM)),
        }
    }

    fn raw(&self, file: FileId) -> Option<&RawFile> {
        match (file, &self.files.base) {
            (FileId::Image, _) => Some(&self.files.image),
            (FileId::Data, _) => self.files.data.as_ref(),
            (FileId::Base, Some(BaseFile::Raw(raw))) => Some(raw),
            _ => None,
        }
    }

    fn submit_raw(&self, token: Token, mut op: HostOp<IoVecBuf>) {
        let (kind, file, offset, len) = (op.kind, op.file, op.offset, op.len);
        let raw = self.raw(file).expect("a raw file: looked up by the caller");
        match kind {
            OpKind::GetLength => return self.finish_now(token, op, raw.get_length()),
            OpKind::BaseStatus => return self.finish_now(token, op, raw.status(offset, len)),
            _ => {}
        }
        let cursor = Cursor::new(iovec::of_op(&mut op));
        if matches!(kind, OpKind::Read | OpKind::Write { .. }) {
            assert_eq!(cursor.left as u64, len, "length of an operation and of its memory");
            if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
                return self.finish_now(token, op, -i64::from(libc::EFBIG));
            }
            if len == 0 {
                return self.finish_now(token, op, 0);
            }
        }
        let slot = self.pending.borrow_mut().insert(Pending { token, op, cursor });
        #[cfg(feature = "uring")]
        if self.ring.is_some() && matches!(kind, OpKind::Read | OpKind::Write { .. } | OpKind::Flush) {
            return self.ring_start(slot);
        }
        self.pool_start(slot);
    }

    /// Has the pool do the operation in `slot`.
    fn pool_start(&self, slot: usize) {
        let (kind, file, offset, len, mut cursor) = {
            let mut pending = self.pending.borrow_mut();
            let pending = pending.get(slot);
            (pending.op.kind, pending.op.file, pending.next_offset(), pending.op.len, std::mem::take(&mut pending.cursor))
        };
        let files = Arc::clone(&self.files);
        let mailbox = Arc::clone(&self.mailbox);
        self.reactor.pool.run(move || {
            let raw = match (file, &files.base, &files.data) {
                (FileId::Base, Some(BaseFile::Raw(raw)), _) | (FileId::Data, _, Some(raw)) => raw,
                _ => &files.image,
            };
            let ret = match kind {
                // SAFETY: the operation stays in `pending`, with its memory, until this result
                // is posted; reads have writable memory (`of_op`).
                OpKind::Read => unsafe { raw.transfer(false, false, offset, &mut cursor) },
                // SAFETY: as above.
                OpKind::Write { fua } => unsafe { raw.transfer(true, fua, offset, &mut cursor) },
                OpKind::Flush => raw.flush(),
                OpKind::WriteZeroes { may_unmap } => raw.write_zeroes(offset, len, may_unmap),
                OpKind::ZeroCheaply => raw.zero_cheaply(offset, len),
                OpKind::Discard => raw.discard(offset, len),
                OpKind::Truncate => raw.truncate(offset),
                OpKind::GetLength => raw.get_length(),
                OpKind::BaseStatus => raw.status(offset, len),
            };
            // The files may be closed with the last handle: before the result says that all is over.
            drop(files);
            mailbox.post(slot, ret);
        });
    }

    #[cfg(feature = "uring")]
    fn ring_start(&self, slot: usize) {
        let Some(ring) = &self.ring else { return };
        let mut ring = ring.borrow_mut();
        let mut pending = self.pending.borrow_mut();
        let pending = pending.get(slot);
        let raw = self.raw(pending.op.file).expect("a raw file: checked at submit");
        let waits = match pending.op.kind {
            OpKind::Flush => ring.flush(slot, raw.fd()),
            kind => {
                let fua = kind == OpKind::Write { fua: true };
                // SAFETY: `pending` keeps list and memory in place until `collect` returns the
                // slot, and `files` keeps the file open; drop waits for all slots.
                unsafe { ring.transfer(slot, raw.fd(), kind != OpKind::Read, fua, pending.next_offset(), &pending.cursor) }
            }
        };
        if waits {
            // The kernel wants its completions collected first: have `process` called.
            self.reactor.event.signal();
        }
    }

    #[cfg(feature = "uring")]
    fn ring_collect(&self) {
        let Some(ring) = &self.ring else { return };
        let mut results = Vec::new();
        ring.borrow_mut().collect(&mut results);
        for (slot, ret) in results {
            match self.ring_step(slot, ret) {
                Step::Done(ret) => self.finish(slot, ret),
                Step::More => self.ring_start(slot),
                Step::Threads => self.pool_start(slot),
            }
        }
        if ring.borrow_mut().submit() {
            self.reactor.event.signal();
        }
    }

    /// The kernel returned `ret` for the operation in `slot`, or for part of it.
    #[cfg(feature = "uring")]
    fn ring_step(&self, slot: usize, ret: i64) -> Step {
        let mut pending = self.pending.borrow_mut();
        let pending = pending.get(slot);
        let reads = pending.op.kind == OpKind::Read;
        match i32::try_from(-ret).unwrap_or(0) {
            libc::EINTR => return Step::More,
            // Asking again at once could go on for ever; a thread can wait.
            libc::EAGAIN => return Step::Threads,
            _ if ret < 0 || pending.op.kind == OpKind::Flush => return Step::Done(ret),
            _ => {}
        }
        pending.cursor.advance(ret as usize);
        if pending.cursor.left == 0 {
            return Step::Done(0);
        }
        if reads && self.raw(pending.op.file).is_some_and(|raw| raw.ends_after(ret as usize)) {
            // SAFETY: the operation is pending: its memory is valid, and writable as it reads.
            unsafe { pending.cursor.zero_rest() };
            return Step::Done(0);
        }
        if reads || ret > 0 { Step::More } else { Step::Done(-i64::from(libc::EIO)) }
    }

    /// Sends an operation on the base to the engine of the base.
    fn submit_nested(&self, token: Token, mut op: HostOp<IoVecBuf>) {
        let nested = self.nested.as_ref().expect("a base that is no raw file has an engine");
        let (kind, offset, len) = (op.kind, op.offset, op.len);
        if kind == OpKind::GetLength {
            return self.finish_now(token, op, nested.length as i64);
        }
        let mut iov = iovec::of_op(&mut op);
        // Past the end of the base everything is zero.
        let inside = nested.length.saturating_sub(offset).min(len);
        if kind == OpKind::Read {
            let mut tail = Cursor::new(iov.clone());
            tail.advance(inside as usize);
            // SAFETY: memory of the operation, which reads.
            unsafe { tail.zero_rest() };
            cut(&mut iov, inside as usize);
        }
        let slot = self.pending.borrow_mut().insert(Pending { token, op, cursor: Cursor::new(iov) });
        let answered = Rc::clone(&self.answered);
        let event = Arc::clone(&self.reactor.event);
        // The thread may be in an event loop of its caller's when the answer comes.
        let answer = move |ret| {
            answered.borrow_mut().push((slot, ret));
            event.signal();
        };
        if inside == 0 {
            return answer(if kind == OpKind::Read { 0 } else { len.min(i64::MAX as u64 >> 2) as i64 });
        }
        if kind == OpKind::BaseStatus {
            return nested.status(offset, inside, Box::new(answer));
        }
        let (iov, count) = {
            let mut pending = self.pending.borrow_mut();
            let list = pending.get(slot).cursor.all();
            (list.as_ptr(), list.len())
        };
        // SAFETY: list and memory stay in `pending` until the engine below has answered.
        let buf = unsafe { IoVecBuf::new(iov, count) }.expect("an operation's memory fits an address space");
        let done = Box::new(move |result: Result<Reply>| answer(result.map_or_else(|error| errno(&error), |_| 0)));
        nested.queue.submit(Request::Read { offset, buf }, done);
    }

    /// Answers how many bytes of the base from `offset` on are alike; see [`OpKind::BaseStatus`].
    fn base_status(&self, offset: u64, len: u64, done: Box<dyn FnOnce(i64)>) {
        match (&self.files.base, &self.nested) {
            (Some(BaseFile::Raw(raw)), _) => done(raw.status(offset, len)),
            (_, Some(nested)) if offset < nested.length => nested.status(offset, len.min(nested.length - offset), done),
            // No base here, or past its end: zero.
            _ => done(len as i64),
        }
    }

    /// Answers as [`OpKind::BaseStatus`] for `len` guest bytes at `offset` which the image has at `place`.
    pub(crate) fn content_status(&self, place: Place, offset: u64, len: u64, done: Box<dyn FnOnce(i64)>) {
        match place {
            Place::Zero => done(len as i64),
            Place::Base => self.base_status(offset, len, done),
            // A hole in the file reads as zero: a flat disk does not know where it was never written.
            Place::Data { file: FileId::Image, offset } => done(self.files.image.status(offset, len)),
            Place::Data { .. } => done(STATUS_DATA + len as i64),
        }
    }

    fn finish_now(&self, token: Token, op: HostOp<IoVecBuf>, ret: i64) {
        self.note(&op);
        self.finished.borrow_mut().push((token, ret, op));
        self.reactor.event.signal();
    }

    fn finish(&self, slot: usize, ret: i64) {
        let pending = self.pending.borrow_mut().remove(slot);
        self.note(&pending.op);
        self.finished.borrow_mut().push((pending.token, ret, pending.op));
    }

    fn note(&self, op: &HostOp<IoVecBuf>) {
        let mut reached = self.reached.get();
        let file = &mut reached[op.file as usize];
        if matches!(op.kind, OpKind::Read | OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::BaseStatus) {
            *file = (*file).max(op.offset.saturating_add(op.len));
        }
        self.reached.set(reached);
    }

    /// Fetches what is done, in this layer and in all below, without waiting.
    fn collect(&self) {
        #[cfg(feature = "uring")]
        self.ring_collect();
        for (slot, ret) in self.mailbox.take() {
            self.finish(slot, ret);
        }
        if let Some(nested) = &self.nested {
            nested.pump();
        }
        let answered = std::mem::take(&mut *self.answered.borrow_mut());
        for (slot, ret) in answered {
            self.finish(slot, ret);
        }
    }

    /// Earliest timer of this layer and all below.
    fn next_timer(&self) -> u64 {
        self.timer.get().min(self.nested.as_ref().map_or(u64::MAX, |nested| nested.io.next_timer()))
    }

    /// Waits until operations are done, somebody wakes this thread, the timer's time has come, or
    /// `timeout` (`None`: for ever) is over, and returns the operations that are done. The caller
    /// gives them back to the queue, and asks [`FileIo::take_wake`] and [`FileIo::take_timer`].
    pub fn process(&self, timeout: Option<Duration>) -> Result<Vec<Completion>> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut timeout = timeout;
        loop {
            self.reactor.drain();
            self.collect();
            let next = self.next_timer();
            if next != u64::MAX {
                self.reactor.arm(next);
            }
            let finished = std::mem::take(&mut *self.finished.borrow_mut());
            if !finished.is_empty() || self.wake.flag.load(Ordering::Acquire) || self.timer_due() {
                return Ok(finished);
            }
            if timeout == Some(Duration::ZERO) {
                return Ok(finished);
            }
            self.reactor.wait(timeout)?;
            if let Some(deadline) = deadline {
                timeout = Some(deadline.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// One turn of an event loop for `queue`, whose host hands its operations to this `FileIo`:
    /// waits as [`FileIo::process`] does and tells the queue what happened. Returns how many
    /// operations were done.
    pub fn turn<H: Host<Buf = IoVecBuf>>(&self, queue: &Rc<Queue<H>>, timeout: Option<Duration>) -> Result<usize> {
        let finished = self.process(timeout)?;
        let count = finished.len();
        for (token, ret, op) in finished {
            let known = queue.complete(token, ret, op);
            assert!(known, "the queue started this operation");
        }
        if self.take_wake() {
            queue.run();
        }
        if self.take_timer() {
            queue.timer();
        }
        Ok(count)
    }

    /// Waits until nobody works on the memory of any operation, and forgets all of them.
    pub fn quiesce(&self) {
        loop {
            self.reactor.drain();
            self.collect();
            if self.pending.borrow().is_empty() {
                break;
            }
            if self.reactor.wait(None).is_err() {
                // Memory that the kernel may still write to must not be given back.
                std::process::abort();
            }
        }
        self.finished.borrow_mut().clear();
    }
}

impl Drop for FileIo {
    fn drop(&mut self) {
        self.quiesce();
    }
}

impl Nested {
    fn pump(&self) {
        loop {
            self.io.collect();
            let finished = std::mem::take(&mut *self.io.finished.borrow_mut());
            let (wake, timer) = (self.io.take_wake(), self.io.take_timer());
            if finished.is_empty() && !wake && !timer {
                return;
            }
            for (token, ret, op) in finished {
                let known = self.queue.complete(token, ret, op);
                assert!(known, "the queue started this operation");
            }
            if wake {
                self.queue.run();
            }
            if timer {
                self.queue.timer();
            }
        }
    }

    /// What the image has at `offset`; `len` is inside it and > 0.
    fn status(&self, offset: u64, len: u64, done: Box<dyn FnOnce(i64)>) {
        let io = Rc::downgrade(&self.io);
        let answer = Box::new(move |result: Result<Reply>| match result {
            Ok(Reply::Status(status)) => {
                let len = status.len.min(len);
                match io.upgrade() {
                    Some(io) => io.content_status(status.place, offset, len, done),
                    None => done(STATUS_DATA + len as i64),
                }
            }
            Ok(_) => done(-i64::from(libc::EIO)),
            Err(error) => done(errno(&error)),
        });
        self.queue.submit(Request::BlockStatus { offset, len }, answer);
    }
}

/// Shortens a list of iovecs to `len` bytes.
fn cut(iov: &mut Vec<libc::iovec>, mut len: usize) {
    iov.retain_mut(|entry| {
        entry.iov_len = entry.iov_len.min(len);
        len -= entry.iov_len;
        entry.iov_len > 0
    });
}

/// The result of an operation on a base whose engine failed.
fn errno(error: &fvd_engine::Error) -> i64 {
    match error.kind {
        fvd_engine::Kind::Host(errno) => -i64::from(errno),
        fvd_engine::Kind::NoMemory => -i64::from(libc::ENOMEM),
        _ => -i64::from(libc::EIO),
    }
}
