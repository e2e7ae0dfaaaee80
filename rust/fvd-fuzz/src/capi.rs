// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sequences of C calls, in orders that the contract allows though no sensible host uses them:
//! requests before open and after close, frees while work is under way, operations completed in any
//! order, inline or late, with errors, tokens that name nothing, handles of another type.
//!
//! What must hold at the end: every submit had its one `done` (API-20), everything can be freed, and
//! all memory is back (the replay counts it; under a sanitizer, the sanitizer does).

use crate::input::Input;
use crate::memory::{File, TEMPLATES, templates};
use fvd::*;
use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::rc::Rc;

const EIO: i64 = -5;
const ENOSPC: i64 = -28;
const ENOMEDIUM: i64 = -123;
/// Most queues, requests and lookups at a time.
const QUEUES: usize = 3;
const REQUESTS: usize = 48;

/// What an operation asked for.
enum What {
    Read(*const libc::iovec, c_int),
    Write(*const libc::iovec, c_int),
    Zero(u64),
    Truncate,
    Length,
    Flush,
}

struct Pending {
    token: u64,
    file: u32,
    offset: u64,
    what: What,
}

/// What all queues share.
struct Files {
    image: RefCell<File>,
    base: Option<Vec<u8>>,
}

/// The opaque of a queue.
struct HostQueue {
    files: Rc<Files>,
    queue: Cell<*mut fvd_queue>,
    pending: RefCell<Vec<Pending>>,
    /// Operations end within the callback.
    inline: Cell<bool>,
}

impl HostQueue {
    fn perform(&self, op: &Pending) -> i64 {
        let mut image = self.files.image.borrow_mut();
        let base = self.files.base.as_ref().filter(|_| op.file == FVD_FILE_BASE);
        if op.file == FVD_FILE_DATA || (op.file == FVD_FILE_BASE && base.is_none()) {
            return ENOMEDIUM;
        }
        let each = |iov: *const libc::iovec, count: c_int, f: &mut dyn FnMut(u64, *mut u8, usize)| {
            let mut at = op.offset;
            for i in 0..count as usize {
                // SAFETY: the library promises `count` valid entries until the completion (API-8).
                let piece = unsafe { *iov.add(i) };
                f(at, piece.iov_base.cast(), piece.iov_len);
                at += piece.iov_len as u64;
            }
        };
        match op.what {
            What::Read(iov, count) => each(iov, count, &mut |at, to, len| {
                // SAFETY: valid and nobody else's until the completion (API-6, API-8).
                let to = unsafe { std::slice::from_raw_parts_mut(to, len) };
                match base {
                    Some(base) => {
                        to.fill(0);
                        let from = (at as usize).min(base.len());
                        let n = len.min(base.len() - from);
                        to[..n].copy_from_slice(&base[from..from + n]);
                    }
                    None => image.read(at, to),
                }
            }),
            What::Write(iov, count) => each(iov, count, &mut |at, from, len| {
                // SAFETY: as above.
                image.write(at, unsafe { std::slice::from_raw_parts(from, len) });
            }),
            What::Zero(len) => image.zero(op.offset, len),
            What::Truncate => image.resize(op.offset),
            What::Length => return base.map_or(image.len, |base| base.len() as u64) as i64,
            What::Flush => {}
        }
        0
    }

    /// Completes pending operation `i`, with `error` unless that is 0.
    fn complete(&self, i: usize, error: i64) {
        let op = self.pending.borrow_mut().remove(i);
        let ret = if error != 0 { error } else { self.perform(&op) };
        // SAFETY: the queue lives until it has no operation under way.
        unsafe { fvd_complete(self.queue.get(), op.token, ret) };
    }
}

/// Called by the library.
///
/// # Safety
/// `opaque` is a `HostQueue` that outlives its queue.
unsafe fn started(opaque: *mut c_void, op: Pending) {
    // SAFETY: the caller's promise.
    let host = unsafe { &*opaque.cast::<HostQueue>() };
    host.pending.borrow_mut().push(op);
    if host.inline.get() {
        let last = host.pending.borrow().len() - 1;
        host.complete(last, 0);
    }
}

// SAFETY (all of these): called by the library with the opaque of `fvd_queue_new`.
unsafe extern "C" fn read(o: *mut c_void, token: u64, file: u32, offset: u64, iov: *const libc::iovec, iovcnt: c_int, _: u64) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset, what: What::Read(iov, iovcnt) }) }
}
unsafe extern "C" fn write(o: *mut c_void, token: u64, file: u32, offset: u64, iov: *const libc::iovec, iovcnt: c_int, _: u64, flags: u32) {
    assert_eq!(flags & FVD_REQ_FUA, 0, "no limit allows it (API-48)");
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset, what: What::Write(iov, iovcnt) }) }
}
unsafe extern "C" fn flush(o: *mut c_void, token: u64, file: u32) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset: 0, what: What::Flush }) }
}
unsafe extern "C" fn write_zeroes(o: *mut c_void, token: u64, file: u32, offset: u64, len: u64, _: u32) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset, what: What::Zero(len) }) }
}
unsafe extern "C" fn discard(o: *mut c_void, token: u64, file: u32, offset: u64, len: u64) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset, what: What::Zero(len) }) }
}
unsafe extern "C" fn truncate(o: *mut c_void, token: u64, file: u32, offset: u64) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset, what: What::Truncate }) }
}
unsafe extern "C" fn get_length(o: *mut c_void, token: u64, file: u32) {
    // SAFETY: see above.
    unsafe { started(o, Pending { token, file, offset: 0, what: What::Length }) }
}
unsafe extern "C" fn wake(_: *mut c_void) {}

/// A request: what the library writes to, and how often it was done.
struct Asked {
    done: Cell<u32>,
    iov: [libc::iovec; 2],
    memory: *mut [u8],
    status: fvd_block_status,
    check: fvd_check,
}

impl Drop for Asked {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`, and the library gave it back with `done` (API-6).
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

unsafe extern "C" fn done(opaque: *mut c_void, ret: i64, error: *const c_char) {
    // SAFETY: the opaque is an `Asked` that lives till the end of the run.
    let asked = unsafe { &(*opaque.cast::<Asked>()).done };
    asked.set(asked.get() + 1);
    assert_eq!(ret < 0, !error.is_null(), "a text on failure, NULL on success (API-9)");
}

unsafe extern "C" fn finding(_: *mut c_void, text: *const c_char) {
    assert!(!text.is_null());
}

/// One run.
struct Run {
    image: *mut fvd_image,
    /// Boxed: their addresses are the queues' opaque.
    hosts: Vec<*mut HostQueue>,
    asked: Vec<*mut Asked>,
    tokens: Vec<u32>,
    files: Rc<Files>,
}

/// Byte 0: the template and the limits. Then calls.
pub fn capi_calls(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let template = &templates()[usize::from(how) % TEMPLATES];
    let files = Rc::new(Files { image: RefCell::new(template.file.clone()), base: template.base.clone() });
    let mut run = Run { image: null_mut(), hosts: Vec::new(), asked: Vec::new(), tokens: Vec::new(), files };
    run.new_image(how);
    // Most inputs should get past here.
    if how & 128 == 0 && run.new_queue(true) {
        // SAFETY: a queue of this run.
        run.submit(0, |queue, asked| unsafe { fvd_submit_open(queue, Some(done), asked.cast()) });
    }
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        run.call(&mut input);
    }
    run.finish();
}

impl Run {
    fn new_image(&mut self, how: u8) {
        let optional = how & 8 == 0;
        let ops = fvd_host_ops {
            struct_size: size_of::<fvd_host_ops>(),
            read: Some(read),
            write: Some(write),
            flush: Some(flush),
            write_zeroes: if optional { Some(write_zeroes) } else { None },
            discard: if optional { Some(discard) } else { None },
            truncate: if optional { Some(truncate) } else { None },
            get_length: Some(get_length),
            base_status: None,
            wake: Some(wake),
            now_ns: None,
            random_bytes: None,
            set_timer: None,
            log: None,
            low_space: None,
        };
        let limits = fvd_limits {
            struct_size: size_of::<fvd_limits>() as u32,
            request_alignment: if how & 16 != 0 { 512 } else { 1 },
            memory_alignment: if how & 32 != 0 { 512 } else { 1 },
            write_granule: 0,
            flags: FVD_LIMIT_GROWS_ZEROED | FVD_LIMIT_CHEAP_ZEROING,
            reserved: 0,
        };
        let config = fvd_config {
            struct_size: size_of::<fvd_config>(),
            flags: if how & 64 != 0 { FVD_OPEN_RDONLY } else { 0 },
            reserved: 0,
            limits: [limits; 3],
            commit_interval_ms: 0,
            metadata_memory: 8 << 20,
        };
        // SAFETY: valid structs and a place for the answer.
        assert_eq!(unsafe { fvd_image_new(&raw const ops, &raw const config, &raw mut self.image) }, 0);
    }

    fn new_queue(&mut self, inline: bool) -> bool {
        if self.hosts.len() == QUEUES || self.image.is_null() {
            return false;
        }
        let host = HostQueue { files: Rc::clone(&self.files), queue: Cell::new(null_mut()), pending: RefCell::default(), inline: Cell::new(inline) };
        let host = Box::into_raw(Box::new(host));
        // SAFETY: the image lives, the opaque lives longer than the queue.
        assert_eq!(unsafe { fvd_queue_new(self.image, host.cast(), (*host).queue.as_ptr()) }, 0);
        self.hosts.push(host);
        true
    }

    fn host(&self, i: usize) -> &HostQueue {
        // SAFETY: boxed by `new_queue`, freed only together with its entry.
        unsafe { &*self.hosts[i] }
    }

    /// Submits with memory of its own.
    fn submit(&mut self, queue: usize, f: impl FnOnce(*mut fvd_queue, *mut Asked)) {
        self.submit_with(queue, 0, f);
    }

    fn submit_with(&mut self, queue: usize, len: usize, f: impl FnOnce(*mut fvd_queue, *mut Asked)) {
        if self.asked.len() == REQUESTS {
            return;
        }
        let memory = Box::into_raw(vec![0x77u8; len].into_boxed_slice());
        let at = memory.cast::<u8>();
        let cut = len / 3;
        // SAFETY: within the allocation.
        let second = unsafe { at.add(cut) };
        let iov = [libc::iovec { iov_base: at.cast(), iov_len: cut }, libc::iovec { iov_base: second.cast(), iov_len: len - cut }];
        let status = fvd_block_status { struct_size: size_of::<fvd_block_status>(), place: 0, file: 0, offset: 0, len: 0 };
        let check = fvd_check {
            struct_size: size_of::<fvd_check>(),
            corruptions: 0,
            leaked: 0,
            blocks_total: 0,
            blocks_present: 0,
            image_end: 0,
            chunks_total: 0,
            chunks_allocated: 0,
            chunks_fragmented: 0,
            corruptions_fixed: 0,
            leaked_fixed: 0,
            lost_bytes: 0,
        };
        let asked = Box::into_raw(Box::new(Asked { done: Cell::new(0), iov, memory, status, check }));
        self.asked.push(asked);
        f(self.host(queue).queue.get(), asked);
    }

    fn call(&mut self, input: &mut Input<'_>) {
        let op = input.u8();
        let pick = usize::from(op >> 4);
        if self.hosts.is_empty() && !self.new_queue(pick & 1 == 0) {
            return;
        }
        let queue = pick % self.hosts.len();
        match op & 15 {
            0 => {
                self.new_queue(pick & 1 == 0);
            }
            1..=4 => self.request(queue, op & 15, input),
            5 | 6 => self.complete_one(queue, input),
            7 => {
                let host = self.host(queue);
                host.inline.set(!host.inline.get());
            }
            // SAFETY (these): a queue or an image of this run; wrong handles are answered (API-29).
            8 => unsafe { fvd_queue_run(self.host(queue).queue.get()) },
            // SAFETY: see above.
            9 => unsafe { fvd_queue_timer(self.host(queue).queue.get()) },
            10 => self.free_queue(queue),
            11 => {
                let before = self.image;
                // SAFETY: see above. With queues it does nothing (API-4).
                unsafe { fvd_image_free(&raw mut self.image) };
                assert_eq!(self.image, before, "an image with queues stays");
            }
            12 => self.lookup(input),
            13 => {
                let token = self.tokens.pop();
                // SAFETY: see above.
                token.into_iter().for_each(|token| unsafe { fvd_end(self.image, token) });
            }
            14 => self.ask_things(queue),
            // SAFETY: see above. The token names nothing, or what was completed long ago (API-23).
            _ => unsafe { fvd_complete(self.host(queue).queue.get(), input.number() << 40 | 0xffff, 0) },
        }
    }

    /// A request of any kind, in whatever state the image is.
    fn request(&mut self, queue: usize, group: u8, input: &mut Input<'_>) {
        let (kind, offset) = (input.u8(), input.number());
        let len = usize::from(input.u16() % 20_000);
        let flags = u32::from(kind >> 5);
        // SAFETY (the whole function): arguments of the right types; memory and answers live in
        // `Asked`, which lives till the end of the run. Wrong values are what is tested (API-30).
        unsafe {
            match (group, kind & 7) {
                (1, _) => self.submit_with(queue, len, |q, a| fvd_submit_read(q, offset, (*a).iov.as_ptr(), 2, flags & 4, Some(done), a.cast())),
                (2, _) => self.submit_with(queue, len, |q, a| fvd_submit_write(q, offset, (*a).iov.as_ptr(), 2, flags & 5, Some(done), a.cast())),
                (3, 0) => self.submit(queue, |q, a| fvd_submit_open(q, Some(done), a.cast())),
                (3, 1) => self.submit(queue, |q, a| fvd_submit_close(q, Some(done), a.cast())),
                (3, 2 | 3) => self.submit(queue, |q, a| fvd_submit_flush(q, Some(done), a.cast())),
                (3, 4) => self.submit(queue, |q, a| fvd_submit_read(q, offset, null(), kind as c_int - 8, 0, Some(done), a.cast())),
                (3, 5) => self.submit(queue, |q, a| fvd_submit_flush(q, None, a.cast())),
                (3, _) => self.submit(queue, |q, a| {
                    let out = if flags == 0 { null_mut() } else { &raw mut (*a).check };
                    fvd_submit_check(q, out, flags & 7, Some(finding), Some(done), a.cast());
                }),
                (_, 0 | 1) => self.submit(queue, |q, a| fvd_submit_write_zeroes(q, offset, len as u64, flags, Some(done), a.cast())),
                (_, 2 | 3) => self.submit(queue, |q, a| fvd_submit_discard(q, offset, len as u64, Some(done), a.cast())),
                (_, 4) if flags & 3 == 3 => {
                    let amend = fvd_amend {
                        struct_size: size_of::<fvd_amend>(),
                        given: len as u32 & 63,
                        flags: flags & FVD_CREATE_COMPACT,
                        storage_grow_unit: offset,
                        chunk_size: len as u64,
                        block_size: 4096,
                        journal_size: 1 << 20,
                    };
                    self.submit(queue, |q, a| fvd_submit_amend(q, &raw const amend, Some(done), a.cast()));
                }
                (_, 4) => self.submit(queue, |q, a| fvd_submit_resize(q, offset, flags & 4, Some(done), a.cast())),
                (_, 5) => self.submit(queue, |q, a| fvd_submit_block_status(q, offset, len as u64, &raw mut (*a).status, Some(done), a.cast())),
                (_, 6) => self.submit(queue, |q, a| fvd_submit_change_base(q, c"x".as_ptr(), c"raw".as_ptr(), Some(done), a.cast())),
                _ => {
                    let create = fvd_create {
                        struct_size: size_of::<fvd_create>(),
                        virtual_size: offset,
                        block_size: 0,
                        preallocation: 0,
                        journal_size: 1 << 20,
                        detect_sparse_hole: 0,
                        base_name: null(),
                        base_format: null(),
                        flags: flags & FVD_CREATE_COMPACT,
                        chunk_size: if flags & FVD_CREATE_COMPACT == 0 { 0 } else { 64 << 10 },
                        storage_grow_unit: 0,
                        data_name: null(),
                        data_format: null(),
                    };
                    self.submit(queue, |q, a| fvd_submit_create(q, &raw const create, Some(done), a.cast()));
                }
            }
        }
        if group == 3 && kind & 7 == 5 {
            // No done, no request (API-21).
            // SAFETY: just pushed, and the library did not take it.
            self.asked.pop().into_iter().for_each(|asked| drop(unsafe { Box::from_raw(asked) }));
        }
    }

    fn complete_one(&self, queue: usize, input: &mut Input<'_>) {
        let host = self.host(queue);
        let count = host.pending.borrow().len();
        if count > 0 {
            let how = input.u8();
            let error = match how >> 4 {
                0 => EIO,
                1 => ENOSPC,
                2 => i64::MIN,
                _ => 0,
            };
            host.complete(usize::from(how & 15) % count, error);
        }
    }

    fn free_queue(&mut self, i: usize) {
        // SAFETY: a queue of this run; if it is busy nothing happens (API-5).
        let ret = unsafe { fvd_queue_free(self.host(i).queue.as_ptr()) };
        assert_eq!(ret == 0, self.host(i).queue.get().is_null());
        if ret == 0 {
            assert!(self.host(i).pending.borrow().is_empty());
            // SAFETY: its queue is gone, nobody else has the address.
            drop(unsafe { Box::from_raw(self.hosts.remove(i)) });
        }
    }

    fn lookup(&mut self, input: &mut Input<'_>) {
        let mut found = fvd_mapping { file: 99, token: 0, offset: 0, len: 0 };
        let (offset, len, flags) = (input.number(), input.number(), u32::from(input.u8() & 3));
        // SAFETY: the image lives and `found` is writable.
        let answer = unsafe { fvd_lookup(self.image, 1, offset, len, flags, &raw mut found) };
        if answer == FVD_LOOKUP_DATA {
            assert!(found.file == FVD_FILE_IMAGE && found.len > 0 && found.len <= len);
            self.tokens.push(found.token);
        } else {
            assert!(found.file == 99, "out is left alone (API-56)");
        }
    }

    /// Calls that only ask, and handles of another type.
    fn ask_things(&self, queue: usize) {
        let queue = self.host(queue).queue.get();
        // SAFETY: live handles and writable answers; wrong handles are answered (API-29).
        unsafe {
            let mut info: fvd_info = std::mem::zeroed();
            info.struct_size = size_of::<fvd_info>();
            let known = fvd_image_info(self.image, &raw mut info);
            assert!(known == 0 || known == -libc::EBUSY);
            assert!(matches!(fvd_queue_is_idle(queue), 0 | 1));
            assert_eq!(fvd_image_info(queue.cast(), &raw mut info), -libc::EINVAL);
            assert_eq!(fvd_queue_is_idle(self.image.cast()), -libc::EINVAL);
            assert_eq!(fvd_queue_is_idle(null()), -libc::EINVAL);
            fvd_queue_run(null_mut());
            fvd_end(null_mut(), 1);
            assert!(!fvd_error().is_null());
        }
    }

    /// Ends everything that is under way, in the order a host must, and frees it.
    fn finish(mut self) {
        for token in self.tokens.drain(..) {
            // SAFETY: the image lives.
            unsafe { fvd_end(self.image, token) };
        }
        // Queues wake each other, and inline operations leave nothing to see: rounds are bounded, and
        // each request needs a handful.
        for _ in 0..20 * REQUESTS {
            for i in 0..self.hosts.len() {
                let host = self.host(i);
                host.inline.set(true);
                while !host.pending.borrow().is_empty() {
                    host.complete(0, 0);
                }
                // SAFETY: a live queue.
                unsafe { fvd_queue_run(host.queue.get()) };
            }
            if self.idle() {
                break;
            }
        }
        assert!(self.idle(), "a request waits for nothing");
        while !self.hosts.is_empty() {
            let before = self.hosts.len();
            self.free_queue(0);
            assert!(self.hosts.len() < before, "an idle queue can be freed");
        }
        // SAFETY: the image has no queues any more.
        unsafe { fvd_image_free(&raw mut self.image) };
        assert!(self.image.is_null(), "an image without queues can be freed");
        for asked in self.asked.drain(..) {
            // SAFETY: made by `submit_with`; the library is done with it, as is checked first.
            let asked = unsafe { Box::from_raw(asked) };
            assert_eq!(asked.done.get(), 1, "each submit has its one done (API-20)");
        }
    }

    fn idle(&self) -> bool {
        // SAFETY: live queues.
        (0..self.hosts.len()).all(|i| unsafe { fvd_queue_is_idle(self.host(i).queue.get()) } == 1)
    }
}
