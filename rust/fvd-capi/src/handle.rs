// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handles and structs that cross the border: what can be checked is checked.
//!
//! A handle starts with a number that says what it is. NULL, misaligned pointers and handles of
//! another type are found reliably; a freed handle only as long as nothing reuses its memory (the
//! free functions clear the caller's variable, so that the usual mistake is a NULL).

use crate::error::{Failure, Result};
use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, size_of};

/// Contents of a handle. Several C types may not share one.
pub(crate) trait Tag {
    /// The opaque type in the header.
    type Opaque;
    /// For messages.
    const NAME: &'static str;
    /// What the memory starts with.
    const MAGIC: u64;
}

/// Overwrites the number of a handle that is freed.
const FREED: u64 = 0xdead_dead_dead_dead;

#[repr(C)]
struct Tagged<T> {
    magic: u64,
    value: T,
}

/// A new handle; it belongs to the caller, who gives it back to [`free`].
pub(crate) fn make<T: Tag>(value: T) -> *mut T::Opaque {
    Box::into_raw(Box::new(Tagged { magic: T::MAGIC, value })).cast()
}

/// The contents of a handle.
///
/// # Safety
/// `handle` is NULL, or points to readable memory that, if it is a handle of this library, is not
/// freed during `'a`.
#[inline]
pub(crate) unsafe fn get<'a, T: Tag>(handle: *const T::Opaque) -> Result<&'a T> {
    let tagged = handle.cast::<Tagged<T>>();
    if tagged.is_null() || !tagged.is_aligned() {
        return Err(bad::<T>(handle.is_null(), 0));
    }
    // SAFETY: not NULL, aligned, readable by contract; any bytes are a number.
    let magic = unsafe { (*tagged).magic };
    if magic != T::MAGIC {
        return Err(bad::<T>(false, magic));
    }
    // SAFETY: the number says that this is a live handle of this type.
    Ok(unsafe { &(*tagged).value })
}

#[cold]
fn bad<T: Tag>(null: bool, magic: u64) -> Failure {
    let name = T::NAME;
    Failure::invalid(match (null, magic) {
        (true, _) => format!("the {name} is NULL"),
        (_, FREED) => format!("the {name} was freed before"),
        _ => format!("this is no {name}"),
    })
}

/// Takes a handle back.
///
/// # Safety
/// As [`get`]; nobody else uses the handle now or later.
pub(crate) unsafe fn free<T: Tag>(handle: *mut T::Opaque) -> Result<T> {
    // SAFETY: the caller's promise.
    unsafe { get::<T>(handle) }?;
    let tagged = handle.cast::<Tagged<T>>();
    // Volatile: the compiler may not drop a write to memory that is freed next.
    // SAFETY: a live handle, checked above.
    unsafe { std::ptr::write_volatile(&raw mut (*tagged).magic, FREED) };
    // SAFETY: `make` got it from a box.
    Ok(unsafe { Box::from_raw(tagged) }.value)
}

/// Structs of the header that start with their size, hold plain numbers, pointers and nullable
/// functions, and so have no invalid bytes.
///
/// # Safety
/// That is true, and the first field is `struct_size: usize`.
pub(crate) unsafe trait Sized_: Copy {
    /// For messages.
    const NAME: &'static str;
    /// Size of the part that every caller has.
    const SIZE_MIN: usize;
}

/// Larger than any struct of this header will ever be.
const SIZE_MAX: usize = 1 << 16;

/// Reads the size of a struct and checks pointer and size.
///
/// # Safety
/// `from` is NULL or points to a readable `usize`.
unsafe fn size_of_struct<T: Sized_>(from: *const T) -> Result<usize> {
    let name = T::NAME;
    if from.is_null() {
        return Err(Failure::invalid(format!("struct {name} is NULL")));
    }
    if !from.is_aligned() {
        return Err(Failure::invalid(format!("struct {name} is not aligned")));
    }
    // SAFETY: not NULL, aligned, readable by contract.
    let size = unsafe { *from.cast::<usize>() };
    if !(T::SIZE_MIN..=SIZE_MAX).contains(&size) {
        return Err(Failure::invalid(format!("struct {name}: struct_size is {size}, at least {} is needed", T::SIZE_MIN)));
    }
    Ok(size)
}

/// A caller's struct in this library's size: what an older caller does not have is zero. Of a newer
/// caller's, `rest` says whether members unknown here may be anything (`true`) or must be zero.
///
/// # Safety
/// `from` is NULL or points to `struct_size` readable bytes.
pub(crate) unsafe fn copy_in<T: Sized_>(from: *const T, rest: bool) -> Result<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_struct(from) }?;
    let known = size.min(size_of::<T>());
    if !rest {
        // SAFETY: `struct_size` bytes are readable.
        let unknown = unsafe { std::slice::from_raw_parts(from.cast::<u8>().add(known), size - known) };
        if unknown.iter().any(|&byte| byte != 0) {
            let text = format!("struct {} has members that this version of the library does not know", T::NAME);
            return Err(Failure::new(libc::E2BIG, text));
        }
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: both have `known` bytes; all bytes are valid by the promise of `Sized_`.
    unsafe {
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), known);
        Ok(copy.assume_init())
    }
}

/// A caller's struct that an answer goes to.
#[derive(Debug)]
pub(crate) struct Out<T> {
    to: *mut T,
    size: usize,
}

impl<T: Sized_> Out<T> {
    /// Checks it.
    ///
    /// # Safety
    /// `to` is NULL or points to `struct_size` writable bytes, until the last [`Out::write`].
    pub unsafe fn new(to: *mut T) -> Result<Self> {
        // SAFETY: the caller's promise.
        let size = unsafe { size_of_struct(to.cast_const()) }?;
        Ok(Self { to, size })
    }

    /// Writes what fits of `value`, but not the size; members unknown here become zero.
    pub fn write(&self, value: &T) {
        let skip = size_of::<usize>();
        let known = self.size.min(size_of::<T>());
        // SAFETY: `size` bytes are writable by the promise of `new`; `value` has `known` of them.
        // The two are different objects.
        unsafe {
            let to = self.to.cast::<u8>();
            std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>().add(skip), to.add(skip), known - skip);
            std::ptr::write_bytes(to.add(known), 0, self.size - known);
        }
    }
}

/// A string argument; NULL is the empty string.
///
/// # Safety
/// `text` is NULL or a C string.
pub(crate) unsafe fn string(text: *const c_char, name: &str) -> Result<String> {
    if text.is_null() {
        return Ok(String::new());
    }
    // SAFETY: not NULL, so a C string by contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(str::to_owned).map_err(|_| Failure::invalid(format!("{name} is not UTF-8")))
}

/// Fails if `flags` has any but the `known` bits.
pub(crate) fn check_flags(flags: u32, known: u32, name: &str) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        odd => Err(Failure::invalid(format!("{name}: unknown flag 0x{odd:x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{fvd_block_status, fvd_create};

    struct One(u32);
    struct Two;
    impl Tag for One {
        type Opaque = One;
        const NAME: &'static str = "one";
        const MAGIC: u64 = 11;
    }
    impl Tag for Two {
        type Opaque = Two;
        const NAME: &'static str = "two";
        const MAGIC: u64 = 22;
    }

    #[test]
    fn handles_know_what_they_are() {
        let one = make(One(5));
        // SAFETY: a live handle, then NULL, then a handle of another type, then an odd address.
        unsafe {
            assert_eq!(get::<One>(one).unwrap().0, 5);
            assert_eq!(get::<One>(std::ptr::null()).map(|_| ()).unwrap_err().text, "the one is NULL");
            assert_eq!(get::<Two>(one.cast()).map(|_| ()).unwrap_err().text, "this is no two");
            assert!(get::<One>(one.cast::<u8>().add(1).cast()).is_err());
            assert_eq!(free::<One>(one).unwrap().0, 5);
        }
        // What a freed handle's memory looks like until somebody reuses it.
        let freed = Box::new(Tagged { magic: FREED, value: One(0) });
        // SAFETY: readable memory.
        let failure = unsafe { get::<One>(std::ptr::from_ref(&*freed).cast()) }.map(|_| ()).unwrap_err();
        assert_eq!((failure.errno, failure.text.as_str()), (libc::EINVAL, "the one was freed before"));
    }

    #[test]
    fn older_and_newer_structs_are_understood() {
        let mut bytes = [1u64; 16];
        let with_size = |bytes: &mut [u64; 16], size: usize| {
            bytes[0] = size as u64;
            // SAFETY: `bytes` holds more than any size used here.
            unsafe { copy_in::<fvd_create>(bytes.as_ptr().cast(), false) }
        };
        // An older caller, who has no journal_size.
        let old = with_size(&mut bytes, 24).unwrap();
        assert_eq!((old.virtual_size, old.journal_size), (1, 0));
        assert!(old.base_name.is_null());
        assert!(with_size(&mut bytes, 8).is_err());
        assert!(with_size(&mut bytes, 1 << 20).is_err());
        // A newer one: unknown members must be zero.
        let known = size_of::<fvd_create>();
        assert_eq!(with_size(&mut bytes, known + 8).unwrap_err().errno, libc::E2BIG);
        bytes[known / 8] = 0;
        assert!(with_size(&mut bytes, known + 8).is_ok());
        // SAFETY: NULL is checked.
        assert!(unsafe { copy_in::<fvd_create>(std::ptr::null(), false) }.is_err());
    }

    #[test]
    fn answers_fit_the_callers_struct() {
        let value = fvd_block_status { struct_size: 0, place: 1, file: 2, offset: 3, len: 4 };
        for words in [2usize, 4, 6] {
            let mut bytes = [9u64; 8];
            bytes[0] = words as u64 * 8;
            // SAFETY: `bytes` is longer than the size it states.
            let out = unsafe { Out::<fvd_block_status>::new(bytes.as_mut_ptr().cast()) }.unwrap();
            out.write(&value);
            assert_eq!(bytes[0], words as u64 * 8, "the size is the caller's");
            assert_eq!(bytes[1], 2 << 32 | 1);
            assert_eq!(bytes[2], if words > 2 { 3 } else { 9 });
            assert_eq!(bytes[3], if words > 3 { 4 } else { 9 });
            assert_eq!(bytes[5], if words == 6 { 0 } else { 9 });
            assert_eq!(bytes[6], 9, "nothing past the caller's struct");
        }
    }
}
