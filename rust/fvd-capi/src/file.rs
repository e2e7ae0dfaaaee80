// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd_file_*`: the ready-made host for files and block devices. One thread, one queue.
//!
//! Its queue is an ordinary one, so requests may be submitted to it; the blocking functions here
//! are such requests with a loop around.

use crate::error::{Failure, Result, answer, report};
use crate::handle::{Tag, check_flags, copy_in, free, get, make};
use crate::host::{CHost, LowSpace};
use crate::image::{ImageInner, fvd_image, set_options};
use crate::panic::guard;
use crate::queue::{QueueInner, fvd_queue};
use crate::request::{create_params, fvd_submit_close, fvd_submit_flush, fvd_submit_open, fvd_submit_read, fvd_submit_write};
use crate::types::*;
use fvd_engine::Image;
use fvd_host::disk::Disk;
use fvd_host::{FileIo, Files, Options};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;
use std::rc::Rc;
use std::time::Duration;

/// An image opened by path. Used by the thread that opened it.
pub struct fvd_file {
    _opaque: [u8; 0],
}

struct FileInner {
    image: *mut fvd_image,
    queue: *mut fvd_queue,
    io: Rc<FileIo>,
}

impl Tag for FileInner {
    type Opaque = fvd_file;
    const NAME: &'static str = "file";
    const MAGIC: u64 = 0x6661_7664_4669_6c31;
}

impl FileInner {
    fn open(path: &Path, options: &fvd_file_options) -> Result<Self> {
        let host_options = options_of(options)?;
        let files = Files::open(path, &host_options)?;
        let mut config = fvd_engine::Config {
            no_io: options.flags & FVD_OPEN_NO_IO != 0,
            discard_no_unref: options.flags & FVD_OPEN_DISCARD_NO_UNREF != 0,
            wait_for_space: options.flags & FVD_OPEN_WAIT_FOR_SPACE != 0,
            ..host_options.config(files.limits())
        };
        set_options(&mut config, options.commit_interval_ms, options.metadata_memory);
        let io = Rc::new(FileIo::new(files)?);
        let image = ImageInner { image: Image::new(config), ops: None, queues: Default::default() };
        let queue = make(QueueInner::over_file(&image, Rc::clone(&io), LowSpace { call: options.low_space, opaque: options.opaque }));
        Ok(Self { image: make(image), queue, io })
    }

    fn inner(&self) -> Result<&QueueInner> {
        // SAFETY: lives as long as this.
        unsafe { get::<QueueInner>(self.queue) }
    }

    fn process(&self, timeout: Option<Duration>) -> Result<usize> {
        let inner = self.inner()?;
        let host: &CHost = inner.queue.host();
        if host.is_entered() {
            return Err(Failure::new(libc::EBUSY, "called from a callback of the same queue"));
        }
        let finished = self.io.process(timeout)?;
        let count = finished.len();
        for (token, ret, op) in finished {
            host.file_completion(token, ret, op);
        }
        // A failure is the image's from now on: requests get it.
        if self.io.take_wake() {
            let _ = host.enter(|| inner.queue.run());
        }
        if self.io.take_timer() {
            let _ = host.enter(|| inner.queue.timer());
        }
        Ok(count)
    }

    /// As `process`; a failure does not leave requests behind whose memory is in use.
    fn must_process(&self) -> Result<()> {
        self.process(None).map(|_| ()).inspect_err(|failure| {
            if let Ok(inner) = self.inner()
                && failure.errno != libc::EBUSY
            {
                self.io.quiesce();
                inner.queue.host().abandon(&failure.text);
            }
        })
    }

    /// Submits a request and waits for its answer.
    fn wait(&self, submit: impl FnOnce(*mut fvd_queue, fvd_done_fn, *mut c_void)) -> Result<()> {
        if self.inner()?.queue.host().is_entered() {
            return Err(Failure::new(libc::EBUSY, "called from a callback of the same queue"));
        }
        let waiter = Waiter::default();
        submit(self.queue, Some(answered), std::ptr::from_ref(&waiter).cast_mut().cast());
        while waiter.ret.get().is_none() {
            // The answer comes in any case: `waiter` must not go away before.
            let _ = self.must_process();
        }
        match waiter.ret.get() {
            Some(ret) if ret < 0 => Err(Failure::new(c_int::try_from(-ret).unwrap_or(libc::EIO), waiter.text.take())),
            _ => Ok(()),
        }
    }

    /// Waits until nothing is under way.
    fn settle(&self) -> Result<()> {
        while !self.inner()?.is_idle() {
            self.must_process()?;
        }
        Ok(())
    }

    /// Frees everything. What could not be finished is waited for first.
    fn release(self) {
        let Ok(inner) = self.inner() else { return };
        if !inner.is_idle() {
            self.io.quiesce();
            inner.queue.host().abandon("the file was closed");
        }
        // SAFETY: nobody else frees these, and the caller gives up the handle.
        unsafe {
            drop(free::<QueueInner>(self.queue));
            drop(free::<ImageInner>(self.image));
        }
    }
}

/// Where the answer of a blocking call goes.
#[derive(Default)]
struct Waiter {
    ret: Cell<Option<i64>>,
    text: RefCell<String>,
}

unsafe extern "C" fn answered(opaque: *mut c_void, ret: i64, error: *const c_char) {
    // SAFETY: `FileInner::wait` keeps it until this was called.
    let waiter = unsafe { &*opaque.cast::<Waiter>() };
    if !error.is_null() {
        // SAFETY: a C string during the call.
        *waiter.text.borrow_mut() = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
    }
    waiter.ret.set(Some(ret));
}

fn options_of(options: &fvd_file_options) -> Result<Options> {
    let known = FVD_OPEN_RDONLY | FVD_OPEN_NO_IO | FVD_OPEN_DISCARD_NO_UNREF | FVD_OPEN_WAIT_FOR_SPACE | FVD_OPEN_METADATA | FVD_FILE_DIRECT | FVD_FILE_NO_LOCK | FVD_FILE_ALLOW_BASE | FVD_FILE_ALLOW_DATA;
    check_flags(options.flags, known, "struct fvd_file_options")?;
    let has = |flag| options.flags & flag != 0;
    Ok(Options {
        read_only: has(FVD_OPEN_RDONLY | FVD_OPEN_NO_IO | FVD_OPEN_METADATA),
        metadata_only: has(FVD_OPEN_METADATA),
        direct: has(FVD_FILE_DIRECT),
        no_lock: has(FVD_FILE_NO_LOCK),
        allow_base: has(FVD_FILE_ALLOW_BASE),
        allow_data: has(FVD_FILE_ALLOW_DATA),
        depth_max: options.depth,
        metadata_memory: options.metadata_memory,
        ..Options::default()
    })
}

/// Path and options of a call; no options are the defaults.
///
/// # Safety
/// NULL or valid.
unsafe fn arguments<'a>(path: *const c_char, options: *const fvd_file_options) -> Result<(&'a Path, fvd_file_options)> {
    if path.is_null() {
        return Err(Failure::invalid("path is NULL"));
    }
    // SAFETY: not NULL, so a C string by contract.
    let path = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()));
    let none = fvd_file_options { struct_size: 0, flags: 0, depth: 0, commit_interval_ms: 0, metadata_memory: 0, low_space: None, opaque: null_mut() };
    // SAFETY: the caller's promise.
    let options = if options.is_null() { none } else { unsafe { copy_in(options, false) }? };
    Ok((path, options))
}

/// Makes an image at path; what is there is overwritten unless it is in use.
/// The base named in params is opened with FVD_FILE_ALLOW_BASE, otherwise only
/// its name is recorded. The data file named in params, relative to path, is
/// made, or overwritten. options NULL: the defaults. Returns when done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_create(path: *const c_char, params: *const fvd_create, options: *const fvd_file_options) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise; so below.
        let (path, options) = unsafe { arguments(path, options) }?;
        let mut options = options_of(&options)?;
        // SAFETY: see above.
        let params = unsafe { create_params(params) }?;
        let open_base = std::mem::take(&mut options.allow_base);
        Disk::create(path, &params, open_base, &options, &mut |_| {})?;
        Ok(0)
    }))
}

/// Opens the image at path, with QEMU's locks unless FVD_FILE_NO_LOCK. The
/// base that the image names is opened with FVD_FILE_ALLOW_BASE only; without
/// it what is not in the image reads as zero. The data file that the image
/// names is opened with FVD_FILE_ALLOW_DATA only, by a path relative to the
/// image's; without it an image that has one does not open, unless it is opened
/// with FVD_OPEN_NO_IO or FVD_OPEN_METADATA. options NULL: the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_open(path: *const c_char, options: *const fvd_file_options, out: *mut *mut fvd_file) -> c_int {
    answer(guard(|| {
        if out.is_null() {
            return Err(Failure::invalid("out is NULL"));
        }
        // SAFETY: not NULL, so writable by contract; so below.
        unsafe { *out = null_mut() };
        // SAFETY: the caller's promise.
        let (path, options) = unsafe { arguments(path, options) }?;
        let file = FileInner::open(path, &options)?;
        // SAFETY: the queue is this file's; the answer is waited for.
        match file.wait(|queue, done, opaque| unsafe { fvd_submit_open(queue, done, opaque) }) {
            Ok(()) => {
                // SAFETY: see above.
                unsafe { *out = make(file) };
                Ok(0)
            }
            Err(failure) => {
                let _ = file.settle();
                file.release();
                Err(failure)
            }
        }
    }))
}

/// The file's queue, for asynchronous requests; it lives as long as the file.
/// NULL on wrong arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_queue(file: *mut fvd_file) -> *mut fvd_queue {
    // SAFETY: the caller's promise.
    match unsafe { get::<FileInner>(file) } {
        Ok(inner) => inner.queue,
        Err(failure) => {
            report(&failure);
            null_mut()
        }
    }
}

/// The file's image, for fvd_image_info; it lives as long as the file. NULL on
/// wrong arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_image(file: *mut fvd_file) -> *mut fvd_image {
    // SAFETY: the caller's promise.
    match unsafe { get::<FileInner>(file) } {
        Ok(inner) => inner.image,
        Err(failure) => {
            report(&failure);
            null_mut()
        }
    }
}

/// A file descriptor that is readable when fvd_file_process has something to
/// do. It belongs to the file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_fd(file: *mut fvd_file) -> c_int {
    // SAFETY: the caller's promise.
    answer(guard(|| Ok(unsafe { get::<FileInner>(file) }?.io.event_fd().as_raw_fd())))
}

/// Handles what is finished: done callbacks run in here. Waits for something
/// to be finished at most timeout_ms; 0: does not wait; -1: without limit. The
/// number of finished operations, or a negative errno. -EBUSY from within a
/// callback of the file's queue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_process(file: *mut fvd_file, timeout_ms: c_int) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<FileInner>(file) }?;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        Ok(c_int::try_from(inner.process(timeout)?).unwrap_or(c_int::MAX))
    }))
}

fn transferred(result: Result<usize>) -> i64 {
    match result {
        Ok(len) => len as i64,
        Err(failure) => i64::from(report(&failure)),
    }
}

/// Reads len bytes at guest byte offset. len, or a negative errno; -EBUSY from
/// within a callback of the file's queue. So do the next two.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_pread(file: *mut fvd_file, buf: *mut c_void, len: usize, offset: u64) -> i64 {
    transferred(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<FileInner>(file) }?;
        let iov = libc::iovec { iov_base: buf, iov_len: len };
        // SAFETY: the answer is waited for: array and memory stay valid until then.
        inner.wait(|queue, done, opaque| unsafe { fvd_submit_read(queue, offset, &raw const iov, 1, 0, done, opaque) })?;
        Ok(len)
    }))
}

/// Writes len bytes at guest byte offset. len, or a negative errno.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_pwrite(file: *mut fvd_file, buf: *const c_void, len: usize, offset: u64) -> i64 {
    transferred(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<FileInner>(file) }?;
        let iov = libc::iovec { iov_base: buf.cast_mut(), iov_len: len };
        // SAFETY: as in `fvd_file_pread`; a write only reads the memory.
        inner.wait(|queue, done, opaque| unsafe { fvd_submit_write(queue, offset, &raw const iov, 1, 0, done, opaque) })?;
        Ok(len)
    }))
}

/// Makes everything written durable. 0, or a negative errno.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_flush(file: *mut fvd_file) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<FileInner>(file) }?;
        // SAFETY: the answer is waited for.
        inner.wait(|queue, done, opaque| unsafe { fvd_submit_flush(queue, done, opaque) })?;
        Ok(0)
    }))
}

/// Closes the image as fvd_submit_close does. Its result; the file is freed
/// and *file set to NULL in any case but one: from within a callback of the
/// file's queue this is -EBUSY and nothing happens. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_file_close(file: *mut *mut fvd_file) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise: NULL or a pointer to a handle or NULL.
        let Some(slot) = (unsafe { file.as_mut() }).filter(|slot| !slot.is_null()) else { return Ok(0) };
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<FileInner>(*slot) }?;
        if inner.inner()?.queue.host().is_entered() {
            return Err(Failure::new(libc::EBUSY, "called from a callback of the same queue"));
        }
        // SAFETY: the caller's promise; nobody uses the handle any more.
        let inner = unsafe { free::<FileInner>(*slot) }?;
        *slot = null_mut();
        // SAFETY: the answer is waited for.
        let closed = inner.wait(|queue, done, opaque| unsafe { fvd_submit_close(queue, done, opaque) });
        let settled = inner.settle();
        inner.release();
        closed.and(settled).map(|()| 0)
    }))
}
