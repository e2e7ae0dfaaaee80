// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd_lookup`, `fvd_end`: pass-through I/O, from any thread. Nothing here allocates or locks.

use crate::error::{Failure, report};
use crate::handle::get;
use crate::image::{ImageInner, fvd_image};
use crate::panic::guard_image;
use crate::types::*;
use fvd_engine::{BracketToken, Lookup};
use std::ffi::c_int;

/// Where guest bytes are, if the caller may do the I/O itself.
///
/// FVD_LOOKUP_DATA: the first out->len bytes are at out->offset of out->file.
/// Do the I/O there, then call fvd_end(image, out->token), exactly once; until
/// then the place stays theirs. FVD_LOOKUP_ASK: submit a request instead; out
/// is untouched, and there is nothing to end. Not for writes with
/// FVD_REQ_FUA. From any thread; slot is any number, best one per thread, and
/// flags FVD_LOOKUP_WRITE or 0. Wrong arguments are answered FVD_LOOKUP_ASK.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_lookup(image: *mut fvd_image, slot: u32, offset: u64, len: u64, flags: u32, out: *mut fvd_mapping) -> c_int {
    // SAFETY: the caller's promise.
    let Ok(inner) = (unsafe { get::<ImageInner>(image) }) else { return FVD_LOOKUP_ASK };
    if out.is_null() || flags & !FVD_LOOKUP_WRITE != 0 {
        return FVD_LOOKUP_ASK;
    }
    let found = guard_image(&inner.image, || inner.image.lookup(slot as usize, offset, len, flags & FVD_LOOKUP_WRITE != 0));
    match found {
        Ok(Lookup::Data { file, offset, len, token }) => {
            // SAFETY: not NULL, so writable by contract.
            unsafe { *out = fvd_mapping { file: file as u32, token: token.0, offset, len } };
            FVD_LOOKUP_DATA
        }
        _ => FVD_LOOKUP_ASK,
    }
}

/// The I/O after a lookup is done. From any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_end(image: *mut fvd_image, token: u32) {
    // SAFETY: the caller's promise.
    match unsafe { get::<ImageInner>(image) } {
        Ok(inner) => {
            if let Err(text) = guard_image(&inner.image, || inner.image.end(BracketToken(token))) {
                report(&Failure::new(libc::EIO, text));
            }
        }
        Err(failure) => {
            report(&failure);
        }
    }
}
