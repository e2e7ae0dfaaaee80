// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong in the engine. The C border maps [`Kind`] to an errno; nothing here does.

use std::fmt;

/// Result of an engine operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Classes of errors; callers match on this, people read the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The host failed an operation with this positive errno.
    Host(i32),
    /// A parameter is out of range.
    Invalid,
    /// The request lies outside the disk, or the disk is too large.
    OutOfRange,
    /// The image, or the bytes a request needs, are damaged.
    Corrupt,
    /// A valid image or request that this version cannot serve.
    Unsupported,
    /// The image is open read-only.
    ReadOnly,
    /// An earlier failure of a sync, or a panic, made the image unusable for all but reads.
    Poisoned,
    /// No storage is left.
    NoSpace,
    /// The limit on metadata memory is reached.
    NoMemory,
    /// The handle is in the wrong state for this call.
    State,
}

/// An error: its class and, for people, what was wrong with which value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The class.
    pub kind: Kind,
    /// For people.
    pub text: String,
}

impl Error {
    /// An error of class `kind`.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// The same error with `what` in front of its text.
    #[must_use]
    pub fn context(mut self, what: &str) -> Self {
        self.text = format!("{what}: {}", self.text);
        self
    }

    pub(crate) fn poisoned() -> Self {
        Self::new(Kind::Poisoned, "an earlier error made the image unusable; reopen it")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

impl From<fvd_format::FormatError> for Error {
    fn from(error: fvd_format::FormatError) -> Self {
        use fvd_format::error::Kind as Format;
        let kind = match error.kind {
            Format::NotFvd => Kind::Invalid,
            Format::Unsupported => Kind::Unsupported,
            _ => Kind::Corrupt,
        };
        Self::new(kind, error.to_string())
    }
}
