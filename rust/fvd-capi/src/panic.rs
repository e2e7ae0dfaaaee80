// SPDX-License-Identifier: MIT OR Apache-2.0
//! The border that no panic crosses.

use crate::error::{Failure, Result};
use fvd_engine::Image;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a panic said.
fn text_of(payload: Box<dyn Any + Send>) -> String {
    let said = match payload.downcast::<&str>() {
        Ok(text) => (*text).to_owned(),
        Err(payload) => match payload.downcast::<String>() {
            Ok(text) => *text,
            Err(payload) => {
                // Dropping something of unknown type might panic again.
                std::mem::forget(payload);
                "no text".to_owned()
            }
        },
    };
    format!("internal error: {said}")
}

/// Runs `f`; a panic becomes -EIO. For calls without an image.
pub(crate) fn guard<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // Unwind safety: whoever can see half-changed state gets it poisoned, or owns nothing yet.
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| Err(Failure::new(libc::EIO, text_of(payload))))
}

/// Runs `f`; a panic poisons `image` and becomes its text.
#[inline]
pub(crate) fn guard_image<T>(image: &Image, f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| poison(image, payload))
}

#[cold]
fn poison(image: &Image, payload: Box<dyn Any + Send>) -> String {
    let text = text_of(payload);
    // Waking others may call the host, and fail in turn; the flag is what counts, and is set first.
    let _ = guard(|| {
        image.poison(&text);
        Ok(())
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        let failure = guard::<()>(|| panic!("{} is {}", "one", 2)).unwrap_err();
        assert_eq!((failure.errno, failure.text.as_str()), (libc::EIO, "internal error: one is 2"));
        // Forgotten on purpose: of no size, so that LeakSanitizer has nothing to find.
        struct Odd;
        let odd = guard::<()>(|| std::panic::panic_any(Odd)).unwrap_err();
        assert_eq!(odd.text, "internal error: no text");
    }

    #[test]
    fn a_panic_poisons_the_image() {
        let image = Image::new(fvd_engine::Config::default());
        assert_eq!(guard_image(&image, || 3), Ok(3));
        assert!(!image.is_poisoned());
        assert_eq!(guard_image(&image, || -> u8 { panic!("oh") }), Err("internal error: oh".to_owned()));
        assert!(image.is_poisoned());
    }
}
