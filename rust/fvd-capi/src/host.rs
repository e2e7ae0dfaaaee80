// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine's host behind a C queue: callbacks of the caller, or the ready-made file host.
//!
//! An operation stays in its slot, with its memory, from the callback to `fvd_complete`; slots and
//! their iovec arrays are reused, so that the hot path does not allocate. Slots have the index that
//! is in the engine's token.
//!
//! After a panic the engine's queue is not entered again (*broken*). Requests it had accepted still
//! get their one answer, -EIO, but only once the host has returned every operation: until then it
//! may be writing to their memory.

use crate::error::c_text;
use crate::panic::guard_image;
use crate::request::{Requests, Ticket};
use crate::types::*;
use fvd_engine::host::{FileId, Host, HostOp, LogLevel, OpKind, STATUS_DATA, Segment, Token, Wake};
use fvd_engine::{Error, Image, Kind, Queue, Reply, Result};
use fvd_host::{FileIo, IoVecBuf};
use libc::iovec;
use std::cell::{Cell, OnceCell, RefCell, UnsafeCell};
use std::ffi::{c_int, c_void};
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};

/// The caller's functions, and what they get as their first argument.
#[derive(Clone, Copy)]
pub(crate) struct Callbacks {
    pub ops: fvd_host_ops,
    pub opaque: *mut c_void,
}

/// Who does the operations.
pub(crate) enum World {
    Callbacks(Callbacks),
    File(Rc<FileIo>, LowSpace),
}

/// Who is told that storage is nearly used up.
#[derive(Clone, Copy)]
pub(crate) struct LowSpace {
    pub call: Option<unsafe extern "C" fn(*mut c_void, u64, u64)>,
    pub opaque: *mut c_void,
}

/// Zeroes written for a host that has no `write_zeroes`: one piece after the other, all with the
/// operation's token.
struct Zeroing {
    next: u64,
    end: u64,
    /// The host's write is running; a completion within it goes to `inline`, so that there is no
    /// recursion however long the range.
    calling: bool,
    inline: Option<i64>,
}

#[derive(Default)]
struct Slot {
    /// 0: free.
    token: Token,
    op: Option<HostOp<IoVecBuf>>,
    iov: Vec<iovec>,
    zeroing: Option<Zeroing>,
}

/// See the module's text.
pub(crate) struct CHost {
    world: World,
    image: Arc<Image>,
    queue: OnceCell<Weak<Queue<CHost>>>,
    slots: RefCell<Vec<Slot>>,
    in_flight: Cell<usize>,
    pub requests: RefCell<Requests>,
    depth: Cell<u32>,
    broken: Cell<bool>,
}

/// Zeroes for `Zeroing`: never written to, but not in the file either.
#[repr(align(4096))]
struct Zeroes(UnsafeCell<[u8; ZEROES_LEN]>);
const ZEROES_LEN: usize = 64 << 10;
/// How often they are repeated in one write.
const ZEROES_REPEAT: usize = 16;
// SAFETY: the bytes are only read.
unsafe impl Sync for Zeroes {}
static ZEROES: Zeroes = Zeroes(UnsafeCell::new([0; ZEROES_LEN]));

fn broken_error() -> Error {
    Error::new(Kind::Poisoned, "an internal error made this queue unusable; reopen the image")
}

impl CHost {
    pub fn new(world: World, image: Arc<Image>) -> Self {
        Self {
            world,
            image,
            queue: OnceCell::new(),
            slots: RefCell::default(),
            in_flight: Cell::new(0),
            requests: RefCell::default(),
            depth: Cell::new(0),
            broken: Cell::new(false),
        }
    }

    /// Says which queue this is the host of; once, before anything else.
    pub fn attach(&self, queue: &Rc<Queue<CHost>>) {
        // A second call would be a mistake in this crate, and change nothing.
        let _ = self.queue.set(Rc::downgrade(queue));
    }

    /// The file host, if this is one.
    pub fn file(&self) -> Option<&Rc<FileIo>> {
        match &self.world {
            World::File(io, _) => Some(io),
            World::Callbacks(_) => None,
        }
    }

    /// Whether a call into this queue is under way on the stack.
    pub fn is_entered(&self) -> bool {
        self.depth.get() > 0
    }

    /// Whether a panic made the queue unusable.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Whether no request and no operation is under way, as far as this border knows.
    pub fn is_idle(&self) -> bool {
        self.in_flight.get() == 0 && self.requests.borrow().is_empty()
    }

    /// Runs `f`, which calls the engine's queue. Nothing if the queue is broken; if `f` panics, it
    /// is from now on.
    #[inline]
    pub fn enter(&self, f: impl FnOnce()) -> std::result::Result<(), String> {
        if self.broken.get() {
            return Err(broken_error().text);
        }
        self.depth.set(self.depth.get() + 1);
        let result = guard_image(&self.image, f);
        self.depth.set(self.depth.get() - 1);
        if result.is_err() {
            self.broken.set(true);
        }
        if self.broken.get() {
            self.settle();
        }
        result
    }

    /// Answers the requests of a broken queue, once nobody uses their memory any more.
    fn settle(&self) {
        // Frames of the engine further up may still hold memory of requests.
        while self.depth.get() == 0 && self.in_flight.get() == 0 {
            let next = self.requests.borrow_mut().take_any();
            let Some(delivery) = next else { break };
            delivery.finish(Err(broken_error()));
        }
    }

    fn complete(&self, token: Token, ret: i64, op: HostOp<IoVecBuf>) -> bool {
        self.in_flight.set(self.in_flight.get() - 1);
        if self.broken.get() {
            drop(op);
            self.settle();
            return true;
        }
        match self.queue.get().and_then(Weak::upgrade) {
            Some(queue) => queue.complete(token, ret, op),
            None => true,
        }
    }

    /// The file host's operation is done.
    pub fn file_completion(&self, token: Token, ret: i64, op: HostOp<IoVecBuf>) {
        let land = || {
            self.complete(token, ret, op);
        };
        // A broken queue takes its operations back, too.
        let _ = if self.broken.get() { guard_image(&self.image, land) } else { self.enter(land) };
    }

    /// The file host failed and has nothing under way any more: all requests are answered.
    pub fn abandon(&self, why: &str) {
        self.image.poison(why);
        self.broken.set(true);
        self.in_flight.set(0);
        self.settle();
    }

    /// `fvd_complete`: false if `token` names no operation under way.
    pub fn callback_completion(&self, token: Token, ret: i64) -> bool {
        let op = {
            let mut slots = self.slots.borrow_mut();
            let Some(slot) = slots.get_mut(token as u32 as usize).filter(|slot| slot.token == token && token != 0) else {
                return false;
            };
            match &mut slot.zeroing {
                Some(zeroing) if zeroing.calling => {
                    return zeroing.inline.is_none() && {
                        zeroing.inline = Some(ret);
                        true
                    };
                }
                Some(zeroing) if ret >= 0 && zeroing.next < zeroing.end && !self.broken.get() => None,
                _ => {
                    slot.token = 0;
                    slot.zeroing = None;
                    slot.op.take()
                }
            }
        };
        match op {
            Some(op) => self.complete(token, ret, op),
            None => {
                self.zero_on(token);
                true
            }
        }
    }

    /// Puts an operation into its slot; returns its iovecs.
    fn store(&self, token: Token, op: HostOp<IoVecBuf>, zeroing: Option<Zeroing>) -> (*const iovec, c_int) {
        let index = token as u32 as usize;
        let mut slots = self.slots.borrow_mut();
        while slots.len() <= index {
            slots.push(Slot::default());
        }
        let slot = &mut slots[index];
        assert!(slot.token == 0 && slot.op.is_none(), "the engine reused a token under way");
        self.in_flight.set(self.in_flight.get() + 1);
        slot.token = token;
        slot.zeroing = zeroing;
        slot.iov.clear();
        // The operation first: its memory must not move any more when pointers to it are taken.
        iovecs(slot.op.insert(op), &mut slot.iov);
        let count = c_int::try_from(slot.iov.len()).expect("no request has that many segments");
        (slot.iov.as_ptr(), count)
    }

    /// Writes the next pieces of a zeroing until one does not complete at once.
    fn zero_on(&self, token: Token) {
        let World::Callbacks(Callbacks { ops, opaque }) = &self.world else { return };
        let index = token as u32 as usize;
        loop {
            let (offset, len, file, iov, count) = {
                let mut slots = self.slots.borrow_mut();
                let Slot { op: Some(op), iov, zeroing: Some(zeroing), .. } = &mut slots[index] else { return };
                let len = (zeroing.end - zeroing.next).min((ZEROES_LEN * ZEROES_REPEAT) as u64);
                let offset = zeroing.next;
                zeroing.next += len;
                zeroing.calling = true;
                iov.clear();
                let mut left = len as usize;
                while left > 0 {
                    let n = left.min(ZEROES_LEN);
                    iov.push(iovec { iov_base: ZEROES.0.get().cast(), iov_len: n });
                    left -= n;
                }
                (offset, len, op.file as u32, iov.as_ptr(), iov.len() as c_int)
            };
            if let Some(write) = ops.write {
                // SAFETY: the host promised working functions for the life of the image; the
                // array stays in the slot until completion.
                unsafe { write(*opaque, token, file, offset, iov, count, len, 0) };
            }
            let ret = {
                let mut slots = self.slots.borrow_mut();
                let Slot { zeroing: Some(zeroing), .. } = &mut slots[index] else { return };
                zeroing.calling = false;
                match zeroing.inline.take() {
                    None => return,
                    Some(ret) if ret >= 0 && zeroing.next < zeroing.end && !self.broken.get() => continue,
                    Some(ret) => ret,
                }
            };
            self.callback_completion(token, ret);
            return;
        }
    }

    fn submit_callbacks(&self, c: &Callbacks, token: Token, op: HostOp<IoVecBuf>) {
        let (kind, file, offset, len, opaque) = (op.kind, op.file as u32, op.offset, op.len, c.opaque);
        // Optional operations that the host does not have.
        let fallback = match kind {
            OpKind::Discard if c.ops.discard.is_none() => Some(0),
            OpKind::Truncate if c.ops.truncate.is_none() => Some(-i64::from(libc::ENOTSUP)),
            OpKind::BaseStatus if c.ops.base_status.is_none() => Some(STATUS_DATA | len.min(STATUS_DATA as u64 - 1) as i64),
            OpKind::WriteZeroes { .. } if len == 0 => Some(0),
            OpKind::ZeroCheaply if c.ops.write_zeroes.is_none() => Some(-i64::from(libc::ENOTSUP)),
            _ => None,
        };
        if let Some(ret) = fallback {
            self.in_flight.set(self.in_flight.get() + 1);
            self.complete(token, ret, op);
            return;
        }
        if matches!(kind, OpKind::WriteZeroes { .. }) && c.ops.write_zeroes.is_none() {
            let end = offset.checked_add(len).expect("the engine stays inside the file");
            self.store(token, op, Some(Zeroing { next: offset, end, calling: false, inline: None }));
            return self.zero_on(token);
        }
        let (iov, count) = self.store(token, op, None);
        // SAFETY: the host promised working functions for the life of the image; the array and the
        // memory stay in the slot until completion. No borrow is held.
        unsafe {
            match kind {
                OpKind::Read => c.ops.read.map(|f| f(opaque, token, file, offset, iov, count, len)),
                OpKind::Write { fua } => {
                    let flags = if fua { FVD_REQ_FUA } else { 0 };
                    c.ops.write.map(|f| f(opaque, token, file, offset, iov, count, len, flags))
                }
                OpKind::Flush => c.ops.flush.map(|f| f(opaque, token, file)),
                OpKind::WriteZeroes { may_unmap } => {
                    let flags = if may_unmap { FVD_REQ_MAY_UNMAP } else { 0 };
                    c.ops.write_zeroes.map(|f| f(opaque, token, file, offset, len, flags))
                }
                OpKind::ZeroCheaply => {
                    let flags = FVD_REQ_MAY_UNMAP | FVD_REQ_NO_FALLBACK;
                    c.ops.write_zeroes.map(|f| f(opaque, token, file, offset, len, flags))
                }
                OpKind::Discard => c.ops.discard.map(|f| f(opaque, token, file, offset, len)),
                OpKind::Truncate => c.ops.truncate.map(|f| f(opaque, token, file, offset)),
                OpKind::GetLength => c.ops.get_length.map(|f| f(opaque, token, file)),
                OpKind::BaseStatus => c.ops.base_status.map(|f| f(opaque, token, offset, len)),
            }
        };
    }
}

/// Nanoseconds of the system's monotonic clock.
fn system_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable. This clock cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Fills `to` with the system's random numbers.
fn system_random(mut to: &mut [u8]) {
    while !to.is_empty() {
        // SAFETY: `to` is writable memory.
        let n = unsafe { libc::getrandom(to.as_mut_ptr().cast(), to.len(), 0) };
        if n > 0 {
            to = &mut to[n as usize..];
        } else {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "no random numbers: {error}");
        }
    }
}

/// Where an operation's memory is.
fn iovecs(op: &mut HostOp<IoVecBuf>, out: &mut Vec<iovec>) {
    let reads = op.kind == OpKind::Read;
    for segment in &mut op.segments {
        match segment {
            Segment::Guest { buf, at, len } => {
                buf.pieces(*at, *len, |start, n| {
                    if n > 0 {
                        out.push(iovec { iov_base: start.cast(), iov_len: n });
                    }
                });
            }
            Segment::Own { len: 0, .. } => {}
            Segment::Own { buf, at, len } => {
                assert!(*at + *len <= buf.capacity(), "range outside the engine's buffer");
                let base = if reads { buf.pages_mut().as_mut_ptr().cast::<u8>() } else { buf.pages().as_ptr().cast::<u8>().cast_mut() };
                // `at` is inside the buffer: wrapping arithmetic cannot wrap.
                out.push(iovec { iov_base: base.wrapping_add(*at).cast(), iov_len: *len });
            }
        }
    }
}

impl Host for CHost {
    type Buf = IoVecBuf;
    type Done = Ticket;

    fn submit(&self, token: Token, op: HostOp<IoVecBuf>) {
        if self.broken.get() {
            // What is left of the engine's frames after a panic: nothing is started any more.
            return;
        }
        match &self.world {
            World::Callbacks(callbacks) => self.submit_callbacks(callbacks, token, op),
            World::File(io, _) => {
                self.in_flight.set(self.in_flight.get() + 1);
                io.submit(token, op);
            }
        }
    }

    fn done(&self, ticket: Ticket, result: Result<Reply>) {
        let found = self.requests.borrow_mut().take(ticket);
        // None: answered already, when the queue broke.
        if let Some(delivery) = found {
            delivery.finish(result);
        }
    }

    fn now_ns(&self) -> u64 {
        match &self.world {
            // SAFETY: the host promised working functions.
            World::Callbacks(Callbacks { ops: fvd_host_ops { now_ns: Some(f), .. }, opaque }) => unsafe { f(*opaque) },
            _ => system_ns(),
        }
    }

    fn random(&self, to: &mut [u8]) {
        if let World::Callbacks(Callbacks { ops: fvd_host_ops { random_bytes: Some(f), .. }, opaque }) = &self.world {
            // SAFETY: the host promised working functions; the memory is writable for the call.
            if unsafe { f(*opaque, to.as_mut_ptr().cast(), to.len()) } == 0 {
                return;
            }
        }
        system_random(to);
    }

    fn set_timer(&self, at_ns: u64) {
        match &self.world {
            // SAFETY: the host promised working functions.
            World::Callbacks(Callbacks { ops: fvd_host_ops { set_timer: Some(f), .. }, opaque }) => unsafe { f(*opaque, at_ns) },
            World::Callbacks(_) => {}
            World::File(io, _) => io.set_timer(at_ns),
        }
    }

    fn low_space(&self, free: u64, wanted: u64) {
        let who = match &self.world {
            World::Callbacks(Callbacks { ops, opaque }) => LowSpace { call: ops.low_space, opaque: *opaque },
            World::File(_, who) => *who,
        };
        if let Some(f) = who.call {
            // SAFETY: the host promised working functions.
            unsafe { f(who.opaque, free, wanted) };
        }
    }

    fn log(&self, level: LogLevel, text: &str) {
        // The file host's options have no place for a log.
        if let World::Callbacks(Callbacks { ops: fvd_host_ops { log: Some(f), .. }, opaque }) = &self.world {
            let text = c_text(text);
            // SAFETY: the host promised working functions; the text lives during the call.
            unsafe { f(*opaque, level as u32, text.as_ptr()) };
        }
    }
}

/// The host's wake function, until the queue is freed.
///
/// The lock is held during the call: once [`WakeGate::shut`] returns, no call is under way and none
/// comes. Therefore the function must not call the library.
pub(crate) struct WakeGate(Mutex<Option<Target>>);

struct Target {
    wake: unsafe extern "C" fn(*mut c_void),
    opaque: *mut c_void,
}
// SAFETY: the host promised that `wake` may be called from any thread.
unsafe impl Send for Target {}

impl WakeGate {
    pub fn new(wake: unsafe extern "C" fn(*mut c_void), opaque: *mut c_void) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Target { wake, opaque }))))
    }

    pub fn shut(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What the engine gets of a [`WakeGate`].
pub(crate) struct GateWake(pub Arc<WakeGate>);

impl Wake for GateWake {
    fn wake(&self) {
        if let Some(target) = &*self.0.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: the host promised a working function; the queue is not freed yet.
            unsafe { (target.wake)(target.opaque) };
        }
    }
}

const _: () = assert!(FileId::Image as u32 == FVD_FILE_IMAGE && FileId::Data as u32 == FVD_FILE_DATA && FileId::Base as u32 == FVD_FILE_BASE);
