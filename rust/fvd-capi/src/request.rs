// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests: `fvd_submit_*`. Nothing is returned; every failure arrives at the done callback.

use crate::error::{Failure, Result, errno_of, report};
use crate::handle::{Out, check_flags, copy_in, get, string};
use crate::panic::guard;
use crate::queue::{QueueInner, fvd_queue};
use crate::types::*;
use fvd_engine::{AmendParams, CheckReport, CreateParams, Place, Preallocation, Repair, Reply, Request};
use fvd_host::IoVecBuf;
use std::ffi::{c_char, c_int, c_void};

/// Where the answer to a request goes.
enum Answer {
    Plain,
    Status(Out<fvd_block_status>),
    Check(Out<fvd_check>, fvd_finding_fn),
}

/// An accepted request's way back to C.
pub(crate) struct Delivery {
    done: unsafe extern "C" fn(*mut c_void, i64, *const c_char),
    opaque: *mut c_void,
    answer: Answer,
}

impl Delivery {
    /// Calls the done callback.
    pub fn finish(self, result: fvd_engine::Result<Reply>) {
        match result {
            Ok(reply) => {
                self.reply(&reply);
                // SAFETY: the caller of submit promised a working function.
                unsafe { (self.done)(self.opaque, 0, std::ptr::null()) };
            }
            Err(error) => self.fail(&error.into()),
        }
    }

    fn fail(&self, failure: &Failure) {
        let text = failure.c_text();
        // SAFETY: as in `finish`; the text lives during the call.
        unsafe { (self.done)(self.opaque, -i64::from(failure.errno), text.as_ptr()) };
    }

    fn reply(&self, reply: &Reply) {
        match (&self.answer, reply) {
            (Answer::Status(out), Reply::Status(status)) => {
                let (place, file, offset) = match status.place {
                    Place::Data { file, offset } => (FVD_PLACE_DATA, file as u32, offset),
                    Place::Zero => (FVD_PLACE_ZERO, 0, 0),
                    Place::Base => (FVD_PLACE_BASE, 0, 0),
                };
                out.write(&fvd_block_status { struct_size: 0, place, file, offset, len: status.len });
            }
            (Answer::Check(out, finding), Reply::Check(report)) => {
                out.write(&check_of(report));
                for text in finding.iter().flat_map(|_| &report.findings) {
                    let text = crate::error::c_text(text);
                    if let Some(finding) = finding {
                        // SAFETY: the caller of submit promised a working function.
                        unsafe { finding(self.opaque, text.as_ptr()) };
                    }
                }
            }
            _ => {}
        }
    }
}

fn check_of(report: &CheckReport) -> fvd_check {
    fvd_check {
        struct_size: 0,
        corruptions: report.corruptions,
        leaked: report.leaked,
        blocks_total: report.blocks_total,
        blocks_present: report.blocks_present,
        image_end: report.image_end,
        chunks_total: report.chunks_total,
        chunks_allocated: report.chunks_allocated,
        chunks_fragmented: report.chunks_fragmented,
        corruptions_fixed: report.corruptions_fixed,
        leaked_fixed: report.leaked_fixed,
        lost_bytes: report.lost_bytes,
    }
}

/// Names an accepted request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    index: u32,
    generation: u32,
}

#[derive(Default)]
struct Entry {
    generation: u32,
    delivery: Option<Delivery>,
}

/// The requests of a queue that were not answered yet.
#[derive(Default)]
pub(crate) struct Requests {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Requests {
    fn add(&mut self, delivery: Delivery) -> Ticket {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        entry.delivery = Some(delivery);
        Ticket { index, generation: entry.generation }
    }

    /// The way back for a request, once.
    pub fn take(&mut self, ticket: Ticket) -> Option<Delivery> {
        let entry = &mut self.entries[ticket.index as usize];
        if entry.generation != ticket.generation {
            return None;
        }
        let delivery = entry.delivery.take();
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(ticket.index);
        delivery
    }

    /// Any request that waits.
    pub fn take_any(&mut self) -> Option<Delivery> {
        let index = self.entries.iter().position(|entry| entry.delivery.is_some())? as u32;
        let generation = self.entries[index as usize].generation;
        self.take(Ticket { index, generation })
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }
}

/// Submits what `make` makes. Failures before the engine has the request go to `done` as well.
///
/// # Safety
/// `queue` as for [`get`]; `done` may be called with `opaque` once.
unsafe fn submit(queue: *mut fvd_queue, done: fvd_done_fn, opaque: *mut c_void, make: impl FnOnce() -> Result<(Request<IoVecBuf>, Answer)>) {
    let Some(done) = done else {
        // Nobody to tell: nothing is done, and the text is all there is.
        report(&Failure::invalid("the done callback is NULL"));
        return;
    };
    let delivery = |answer| Delivery { done, opaque, answer };
    // SAFETY: the caller's promise.
    let found = guard(|| unsafe { get::<QueueInner>(queue) });
    let inner = match found {
        Ok(inner) => inner,
        Err(failure) => return delivery(Answer::Plain).fail(&failure),
    };
    let host = inner.queue.host();
    let (request, answer) = match guard(make) {
        Ok(made) => made,
        Err(failure) => return delivery(Answer::Plain).fail(&failure),
    };
    if host.is_broken() {
        let failure = Failure::new(errno_of(fvd_engine::Kind::Poisoned), "an internal error made this queue unusable; reopen the image");
        return delivery(Answer::Plain).fail(&failure);
    }
    let ticket = host.requests.borrow_mut().add(delivery(answer));
    // A panic answers the request, from `enter`.
    let _ = host.enter(|| inner.queue.submit(request, ticket));
}

/// Guest memory of a request.
///
/// # Safety
/// The array and the memory stay valid until the request is done.
unsafe fn memory(iov: *const libc::iovec, iovcnt: c_int) -> Result<IoVecBuf> {
    let count = usize::try_from(iovcnt).map_err(|_| Failure::invalid(format!("iovcnt is {iovcnt}")))?;
    if count > 0 && (iov.is_null() || !iov.is_aligned()) {
        return Err(Failure::invalid("iov is NULL or misaligned"));
    }
    // SAFETY: checked above, and the caller's promise.
    unsafe { IoVecBuf::new(iov, count) }.ok_or_else(|| Failure::invalid("iov names impossible memory: NULL with a length, or too much"))
}

/// The engine's parameters for a new image.
///
/// # Safety
/// `params` is NULL or a valid struct with valid strings.
pub(crate) unsafe fn create_params(params: *const fvd_create) -> Result<CreateParams> {
    // SAFETY: the caller's promise.
    let params = unsafe { copy_in(params, false) }?;
    let preallocation = match params.preallocation {
        FVD_PREALLOC_OFF => Preallocation::Off,
        FVD_PREALLOC_METADATA => Preallocation::Metadata,
        FVD_PREALLOC_FALLOC => Preallocation::Falloc,
        FVD_PREALLOC_FULL => Preallocation::Full,
        other => return Err(Failure::invalid(format!("preallocation is {other}, 0 to 3 are known"))),
    };
    check_flags(params.flags, FVD_CREATE_COMPACT, "struct fvd_create")?;
    // SAFETY: the caller's promise.
    let (base_name, base_format) = unsafe { (string(params.base_name, "base_name")?, string(params.base_format, "base_format")?) };
    // SAFETY: the caller's promise.
    let (data_name, data_format) = unsafe { (string(params.data_name, "data_name")?, string(params.data_format, "data_format")?) };
    Ok(CreateParams {
        virtual_size: (params.virtual_size != u64::MAX).then_some(params.virtual_size),
        block_size: params.block_size,
        journal_size: params.journal_size,
        base_name,
        base_format,
        data_name,
        data_format,
        detect_sparse_hole: params.detect_sparse_hole,
        preallocation,
        compact: params.flags & FVD_CREATE_COMPACT != 0,
        chunk_size: params.chunk_size,
        storage_grow_unit: params.storage_grow_unit,
    })
}

/// The engine's parameters for an amendment.
///
/// # Safety
/// `params` is NULL or a valid struct.
unsafe fn amend_params(params: *const fvd_amend) -> Result<AmendParams> {
    // SAFETY: the caller's promise.
    let params = unsafe { copy_in(params, false) }?;
    let known = FVD_AMEND_STORAGE_GROW_UNIT | FVD_AMEND_FLAGS | FVD_AMEND_CHUNK_SIZE | FVD_AMEND_BLOCK_SIZE | FVD_AMEND_JOURNAL_SIZE;
    check_flags(params.given, known, "struct fvd_amend, given")?;
    check_flags(params.flags, FVD_CREATE_COMPACT, "struct fvd_amend")?;
    let given = |bit: u32, value: u64| (params.given & bit != 0).then_some(value);
    Ok(AmendParams {
        storage_grow_unit: given(FVD_AMEND_STORAGE_GROW_UNIT, params.storage_grow_unit),
        compact: given(FVD_AMEND_FLAGS, (params.flags & FVD_CREATE_COMPACT).into()).map(|flags| flags != 0),
        chunk_size: given(FVD_AMEND_CHUNK_SIZE, params.chunk_size),
        block_size: given(FVD_AMEND_BLOCK_SIZE, params.block_size),
        journal_size: given(FVD_AMEND_JOURNAL_SIZE, params.journal_size),
    })
}

/// Makes a new image in the image file, and the data file if it is to have one;
/// the handle stays unopened. params is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_create(queue: *mut fvd_queue, params: *const fvd_create, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: the caller's promises, as the header states them; so below.
    unsafe { submit(queue, done, opaque, || Ok((Request::Create(Box::new(create_params(params)?)), Answer::Plain))) }
}

/// Opens the image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_open(queue: *mut fvd_queue, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::Open, Answer::Plain))) }
}

/// Waits for the requests under way, writes all metadata and marks the image
/// clean. Nothing is served afterwards, whether this succeeds or not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_close(queue: *mut fvd_queue, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::Close, Answer::Plain))) }
}

/// Fills iov from guest byte offset on. The array and the memory stay valid
/// until done. flags: 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_read(
    queue: *mut fvd_queue,
    offset: u64,
    iov: *const libc::iovec,
    iovcnt: c_int,
    flags: u32,
    done: fvd_done_fn,
    opaque: *mut c_void,
) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            check_flags(flags, 0, "read")?;
            Ok((Request::Read { offset, buf: memory(iov, iovcnt)? }, Answer::Plain))
        });
    }
}

/// Writes iov at guest byte offset. The array and the memory stay valid until
/// done. flags: FVD_REQ_FUA.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_write(
    queue: *mut fvd_queue,
    offset: u64,
    iov: *const libc::iovec,
    iovcnt: c_int,
    flags: u32,
    done: fvd_done_fn,
    opaque: *mut c_void,
) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            check_flags(flags, FVD_REQ_FUA, "write")?;
            let buf = memory(iov, iovcnt)?;
            Ok((Request::Write { offset, buf, fua: flags & FVD_REQ_FUA != 0 }, Answer::Plain))
        });
    }
}

/// Makes every request that completed before durable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_flush(queue: *mut fvd_queue, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::Flush, Answer::Plain))) }
}

/// Makes a range read as zero. flags: FVD_REQ_FUA, FVD_REQ_MAY_UNMAP.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_write_zeroes(queue: *mut fvd_queue, offset: u64, len: u64, flags: u32, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            check_flags(flags, FVD_REQ_FUA | FVD_REQ_MAY_UNMAP, "write_zeroes")?;
            let (may_unmap, fua) = (flags & FVD_REQ_MAY_UNMAP != 0, flags & FVD_REQ_FUA != 0);
            Ok((Request::WriteZeroes { offset, len, may_unmap, fua }, Answer::Plain))
        });
    }
}

/// The range's content is not needed any more: each part reads as before or
/// as zero afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_discard(queue: *mut fvd_queue, offset: u64, len: u64, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::Discard { offset, len }, Answer::Plain))) }
}

/// Changes the virtual size. flags: FVD_REQ_ZEROED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_resize(queue: *mut fvd_queue, size: u64, flags: u32, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            check_flags(flags, FVD_REQ_ZEROED, "resize")?;
            Ok((Request::Resize { size, zeroed: flags & FVD_REQ_ZEROED != 0 }, Answer::Plain))
        });
    }
}

/// Where a range's content is. out stays valid until done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_block_status(
    queue: *mut fvd_queue,
    offset: u64,
    len: u64,
    out: *mut fvd_block_status,
    done: fvd_done_fn,
    opaque: *mut c_void,
) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::BlockStatus { offset, len }, Answer::Status(Out::new(out)?)))) }
}

/// Records another base: the names are copied. name NULL or empty: none. What
/// the guest sees of the base follows the host's FVD_FILE_BASE. No byte of the
/// disk that is in the image changes; where the bitmap does not reach as far as
/// the new base (of unknown length, if the host has none now), it is enlarged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_change_base(queue: *mut fvd_queue, name: *const c_char, format: *const c_char, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            let (name, format) = (string(name, "name")?, string(format, "format")?);
            Ok((Request::ChangeBase { name, format }, Answer::Plain))
        });
    }
}

/// Changes options of creation, all or none, in one step that a crash does not
/// divide; durable when it is done. Only the growth step can change; another
/// value than the image has of anything else is -ENOTSUP, and so is a growth
/// step for an image that is not compact. params is copied. The size and the
/// base have requests of their own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_amend(queue: *mut fvd_queue, params: *const fvd_amend, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::Amend(Box::new(amend_params(params)?)), Answer::Plain))) }
}

/// Gives every block back to the base, in one step that a crash does not
/// divide: the disk reads as the base does. For a disk whose content was written
/// to its base. -ENOTSUP without a base.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_make_empty(queue: *mut fvd_queue, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe { submit(queue, done, opaque, || Ok((Request::MakeEmpty, Answer::Plain))) }
}

/// Checks the image. out stays valid until done. finding, unless NULL, is
/// called with opaque for each finding (100 at most), right before done.
///
/// flags: 0 only looks; FVD_CHECK_REPAIR_LEAKS gives back what lies behind the
/// end of the image in its file; FVD_CHECK_REPAIR_ALL also repairs damage.
/// Nothing is invented: what damaged metadata spoke of reads afterwards as the
/// base does, or as zero, and is told by findings. The image must be open for
/// writing (-EROFS); every other write waits meanwhile. A crash leaves an image
/// that can be repaired again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_submit_check(queue: *mut fvd_queue, out: *mut fvd_check, flags: u32, finding: fvd_finding_fn, done: fvd_done_fn, opaque: *mut c_void) {
    // SAFETY: see `fvd_submit_create`.
    unsafe {
        submit(queue, done, opaque, || {
            check_flags(flags, FVD_CHECK_REPAIR_LEAKS | FVD_CHECK_REPAIR_ALL, "check")?;
            let repair = match flags {
                0 => Repair::None,
                FVD_CHECK_REPAIR_LEAKS => Repair::Leaks,
                _ => Repair::All,
            };
            Ok((Request::Check { repair }, Answer::Check(Out::new(out)?, finding)))
        })
    }
}
