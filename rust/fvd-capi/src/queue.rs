// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd_queue_*` and `fvd_complete`: a thread's way into an image.

use crate::error::{Failure, answer, report};
use crate::handle::{Tag, free, get, make};
use crate::host::{CHost, Callbacks, GateWake, LowSpace, WakeGate, World};
use crate::image::{ImageInner, fvd_image};
use crate::panic::guard;
use fvd_engine::{Image, Queue};
use fvd_host::FileIo;
use std::ffi::{c_int, c_void};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A thread's way into an image. Used by one thread at a time.
pub struct fvd_queue {
    _opaque: [u8; 0],
}

pub(crate) struct QueueInner {
    pub queue: Rc<Queue<CHost>>,
    gate: Option<Arc<WakeGate>>,
    /// The image's count.
    queues: Arc<AtomicUsize>,
}

impl Tag for QueueInner {
    type Opaque = fvd_queue;
    const NAME: &'static str = "queue";
    const MAGIC: u64 = 0x6661_7664_5175_6531;
}

/// Addresses of queues that a panic made unusable.
static LOST: Mutex<Vec<usize>> = Mutex::new(Vec::new());

impl QueueInner {
    fn new(image: Arc<Image>, queues: &Arc<AtomicUsize>, world: World, wake: Box<dyn fvd_engine::host::Wake>, gate: Option<Arc<WakeGate>>) -> Self {
        let host = CHost::new(world, Arc::clone(&image));
        let queue = Queue::new(image, host, wake);
        queue.host().attach(&queue);
        queues.fetch_add(1, Ordering::AcqRel);
        Self { queue, gate, queues: Arc::clone(queues) }
    }

    /// The queue of the ready-made file host.
    pub fn over_file(image: &ImageInner, io: Rc<FileIo>, low_space: LowSpace) -> Self {
        let wake = Box::new(io.wake_handle());
        Self::new(Arc::clone(&image.image), &image.queues, World::File(io, low_space), wake, None)
    }

    pub fn is_idle(&self) -> bool {
        let host = self.queue.host();
        // A broken engine queue does not know any more.
        host.is_idle() && (host.is_broken() || self.queue.is_idle())
    }
}

impl Drop for QueueInner {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            gate.shut();
        }
        if self.queue.host().is_broken() {
            // Its tasks may hold anything in any state: they are never looked at again. Kept in a
            // list, so that leak checkers find them.
            let kept = Box::into_raw(Box::new(Rc::clone(&self.queue))).expose_provenance();
            LOST.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        }
        self.queues.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A queue of image. queue_opaque is the first argument of the callbacks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_queue_new(image: *mut fvd_image, queue_opaque: *mut c_void, out: *mut *mut fvd_queue) -> c_int {
    answer(guard(|| {
        if out.is_null() {
            return Err(Failure::invalid("out is NULL"));
        }
        // SAFETY: not NULL, so writable by contract; so below.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<ImageInner>(image) }?;
        let Some((ops, wake)) = inner.ops.and_then(|ops| Some((ops, ops.wake?))) else {
            return Err(Failure::invalid("the file host has one queue only: fvd_file_queue()"));
        };
        let gate = WakeGate::new(wake, queue_opaque);
        let world = World::Callbacks(Callbacks { ops, opaque: queue_opaque });
        let queue = QueueInner::new(Arc::clone(&inner.image), &inner.queues, world, Box::new(GateWake(Arc::clone(&gate))), Some(gate));
        // SAFETY: see above.
        unsafe { *out = make(queue) };
        Ok(0)
    }))
}

/// Frees a queue and sets *queue to NULL. -EBUSY, and nothing happens, unless
/// it is idle and no callback of it is running. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_queue_free(queue: *mut *mut fvd_queue) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise: NULL or a pointer to a handle or NULL.
        let Some(slot) = (unsafe { queue.as_mut() }).filter(|slot| !slot.is_null()) else { return Ok(0) };
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<QueueInner>(*slot) }?;
        if inner.gate.is_none() {
            return Err(Failure::invalid("this queue belongs to the file host: fvd_file_close()"));
        }
        if inner.queue.host().is_entered() || !inner.is_idle() {
            return Err(Failure::new(libc::EBUSY, "the queue has work under way"));
        }
        // SAFETY: the caller's promise.
        drop(unsafe { free::<QueueInner>(*slot) }?);
        *slot = std::ptr::null_mut();
        Ok(0)
    }))
}

/// 1: no request and no operation is under way. 0: some is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_queue_is_idle(queue: *const fvd_queue) -> c_int {
    answer(guard(|| {
        // SAFETY: the caller's promise.
        let inner = unsafe { get::<QueueInner>(queue) }?;
        Ok(c_int::from(inner.is_idle()))
    }))
}

/// Calls `f` with the queue; what goes wrong is in `fvd_error()` only.
///
/// # Safety
/// As [`get`].
unsafe fn enter(queue: *mut fvd_queue, f: impl FnOnce(&Rc<Queue<CHost>>)) {
    // SAFETY: the caller's promise.
    match unsafe { get::<QueueInner>(queue) } {
        Ok(inner) => {
            if let Err(text) = inner.queue.host().enter(|| f(&inner.queue)) {
                report(&Failure::new(libc::EIO, text));
            }
        }
        Err(failure) => {
            report(&failure);
        }
    }
}

/// Goes on with what other threads woke: after the host's wake was called.
/// Calling it without need is harmless.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_queue_run(queue: *mut fvd_queue) {
    // SAFETY: the caller's promise.
    unsafe { enter(queue, |queue| queue.run()) }
}

/// The time set by set_timer has come. Calling it without need is harmless.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_queue_timer(queue: *mut fvd_queue) {
    // SAFETY: the caller's promise.
    unsafe { enter(queue, |queue| queue.timer()) }
}

/// The operation token is done: on the queue's thread, exactly once for each,
/// also from inside the callback that started it. ret: a negative errno on
/// failure, otherwise what the operation returns. A token that is not under
/// way changes nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_complete(queue: *mut fvd_queue, token: u64, ret: i64) {
    // SAFETY: the caller's promise.
    match unsafe { get::<QueueInner>(queue) } {
        Ok(inner) => complete(inner, token, ret),
        Err(failure) => {
            report(&failure);
        }
    }
}

fn complete(inner: &QueueInner, token: u64, ret: i64) {
    let host = inner.queue.host();
    if host.file().is_some() {
        report(&Failure::invalid("the file host completes its operations itself"));
        return;
    }
    // No errno: rubbish from the host must not be taken for anything else.
    let ret = if ret < -4095 { -i64::from(libc::EIO) } else { ret };
    let mut known = true;
    let run = || known = host.callback_completion(token, ret);
    // A broken queue takes its operations back, too.
    let result = if host.is_broken() { crate::panic::guard_image(inner.queue.image(), run) } else { host.enter(run) };
    if let Err(text) = result {
        report(&Failure::new(libc::EIO, text));
    } else if !known {
        report(&Failure::invalid(format!("token {token:#x} names no operation under way")));
    }
}
