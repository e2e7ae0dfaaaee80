// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors at the border: classes become errno values, texts go to the thread's last-error slot.

use fvd_engine::{Error, Kind};
use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};

/// A failure on its way to C: a positive errno and a text for people.
#[derive(Debug)]
pub(crate) struct Failure {
    pub errno: c_int,
    pub text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub fn new(errno: c_int, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, text)
    }

    /// The text for C.
    pub fn c_text(&self) -> CString {
        c_text(&self.text)
    }
}

/// The one table from error classes to errno values (API-31).
pub(crate) fn errno_of(kind: Kind) -> c_int {
    match kind {
        // A host must answer with a real errno; 0 or less would look like success in C.
        Kind::Host(errno) if errno > 0 => errno,
        Kind::Host(_) => libc::EIO,
        Kind::Invalid | Kind::OutOfRange => libc::EINVAL,
        Kind::Corrupt | Kind::Poisoned => libc::EIO,
        Kind::Unsupported => libc::ENOTSUP,
        Kind::ReadOnly => libc::EROFS,
        Kind::NoSpace => libc::ENOSPC,
        Kind::NoMemory => libc::ENOMEM,
        Kind::State => libc::EBUSY,
        // The engine may learn new classes before this table does.
        _ => libc::EIO,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { errno: errno_of(error.kind), text: error.text }
    }
}

/// `text` as C sees it; a NUL inside becomes a blank.
pub(crate) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Remembers `failure` as this thread's last, and returns its negative errno.
pub(crate) fn report(failure: &Failure) -> c_int {
    let text = failure.c_text();
    // Fails only while the thread ends: then nobody can ask any more.
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = text;
        }
    });
    -failure.errno
}

/// What a C function returns for `result`: the value, or a negative errno with the text remembered.
pub(crate) fn answer(result: Result<c_int>) -> c_int {
    result.unwrap_or_else(|failure| report(&failure))
}

/// Text of the last failed call on this thread, "" if there was none. Never
/// NULL. Valid until the next call fails on this thread, or the thread ends.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_error() -> *const c_char {
    LAST.try_with(|last| last.try_borrow().map_or(c"".as_ptr(), |last| last.as_ptr())).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn every_class_has_its_errno() {
        let table = [
            (Kind::Host(libc::ENXIO), libc::ENXIO),
            (Kind::Host(0), libc::EIO),
            (Kind::Host(-5), libc::EIO),
            (Kind::Invalid, libc::EINVAL),
            (Kind::OutOfRange, libc::EINVAL),
            (Kind::Corrupt, libc::EIO),
            (Kind::Unsupported, libc::ENOTSUP),
            (Kind::ReadOnly, libc::EROFS),
            (Kind::Poisoned, libc::EIO),
            (Kind::NoSpace, libc::ENOSPC),
            (Kind::NoMemory, libc::ENOMEM),
            (Kind::State, libc::EBUSY),
        ];
        for (kind, errno) in table {
            assert_eq!(errno_of(kind), errno, "{kind:?}");
        }
    }

    #[test]
    fn texts_are_per_thread_and_survive_a_nul() {
        assert_eq!(report(&Failure::invalid("one\0two")), -libc::EINVAL);
        // SAFETY: a C string by contract.
        let text = || unsafe { CStr::from_ptr(fvd_error()) }.to_str().unwrap().to_owned();
        assert_eq!(text(), "one two");
        // SAFETY: as above.
        let other = std::thread::spawn(|| unsafe { CStr::from_ptr(fvd_error()) }.to_owned()).join().unwrap();
        assert_eq!(other.as_c_str(), c"");
        assert_eq!(text(), "one two");
    }
}
