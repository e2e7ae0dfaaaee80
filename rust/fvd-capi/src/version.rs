// SPDX-License-Identifier: MIT OR Apache-2.0
//! Versions, and what a file is.

use fvd_format::header::{MAGIC, MAGIC_V1};
use std::ffi::{CStr, c_char, c_int, c_void};

const fn number(text: &str) -> u32 {
    let bytes = text.as_bytes();
    let mut value = 0;
    let mut i = 0;
    while i < bytes.len() {
        assert!(bytes[i].is_ascii_digit());
        value = value * 10 + (bytes[i] - b'0') as u32;
        i += 1;
    }
    value
}

const VERSION: u32 = number(env!("CARGO_PKG_VERSION_MAJOR")) << 16 | number(env!("CARGO_PKG_VERSION_MINOR")) << 8 | number(env!("CARGO_PKG_VERSION_PATCH"));

const VERSION_TEXT: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("a version has no NUL"),
};

/// The library's version: major << 16 | minor << 8 | patch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_version() -> u32 {
    VERSION
}

/// The library's version as text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_version_string() -> *const c_char {
    VERSION_TEXT.as_ptr()
}

/// What a file that starts with these len bytes is: 2: an FVD image of
/// version 2; 1: of version 1, which this library cannot open; 0: something
/// else. 64 bytes are enough, less than 8 are never an image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fvd_probe(buf: *const c_void, len: usize) -> c_int {
    if buf.is_null() || len < MAGIC.len() {
        return 0;
    }
    // SAFETY: not NULL, so `len` readable bytes by contract.
    let start = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), MAGIC.len()) };
    if start == MAGIC {
        2
    } else if start.starts_with(&MAGIC_V1) {
        1
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_recognised() {
        let probe = |bytes: &[u8]| {
            // SAFETY: a slice is readable.
            unsafe { fvd_probe(bytes.as_ptr().cast(), bytes.len()) }
        };
        let mut page = [0u8; 64];
        assert_eq!(probe(&page), 0);
        page[..8].copy_from_slice(&MAGIC);
        assert_eq!(probe(&page), 2);
        assert_eq!(probe(&page[..7]), 0);
        page[..4].copy_from_slice(&MAGIC_V1);
        assert_eq!(probe(&page), 1);
        // SAFETY: NULL is checked.
        assert_eq!(unsafe { fvd_probe(std::ptr::null(), 64) }, 0);
    }

    #[test]
    fn the_version_is_the_packages() {
        // SAFETY: no conditions.
        let (number, text) = unsafe { (fvd_version(), CStr::from_ptr(fvd_version_string())) };
        assert_eq!(text.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
        assert_eq!(format!("{}.{}.{}", number >> 16, number >> 8 & 255, number & 255), env!("CARGO_PKG_VERSION"));
    }
}
