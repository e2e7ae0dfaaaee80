// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be wrong with bytes read from an image.

use std::fmt;

/// Result of parsing or validating on-disk bytes.
pub type Result<T> = std::result::Result<T, FormatError>;

/// Classes of format errors; callers match on this, people read the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The bytes are not an FVD image at all.
    NotFvd,
    /// An FVD image of a version, or with an incompatible feature, that this code does not know.
    Unsupported,
    /// A checksum does not match: rotten, torn, misdirected or foreign bytes.
    Checksum,
    /// A field is outside its range or contradicts another one.
    Invalid,
}

/// A format error: which class, which field, and what was wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// The class.
    pub kind: Kind,
    /// The field or structure, as `docs/format.md` names it.
    pub field: &'static str,
    /// The offending value and the range, for people.
    pub detail: String,
}

impl FormatError {
    /// An error of class `kind` about `field`.
    pub fn new(kind: Kind, field: &'static str, detail: impl Into<String>) -> Self {
        Self { kind, field, detail: detail.into() }
    }

    /// Shorthand for [`Kind::Invalid`].
    pub fn invalid(field: &'static str, detail: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, field, detail)
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.detail)
    }
}

impl std::error::Error for FormatError {}
