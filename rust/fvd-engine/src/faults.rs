// SPDX-License-Identifier: MIT OR Apache-2.0
//! Planted faults: mistakes a programmer would make, one at a time, to prove that the tests and
//! the simulator would catch them. Compiled in only with the feature `planted-faults`.

/// The mistakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The journal is written without a sync of the data it exposes (R1).
    NoDataSync,
    /// The bits of a write are set before its data is written (R1).
    BitBeforeData,
    /// A flush returns although a commit that froze before it is still on its way (R2).
    FlushSharesRunningCommit,
    /// The journal is not synced after the append (R2).
    NoJournalSync,
    /// The header moves the first sequence before the pages are in place (R2).
    HeaderBeforePages,
    /// Pages are written in place without the double-write area.
    NoDoubleWrite,
    /// The page-map bit of a newly stored page is forgotten.
    PageMapForgotten,
    /// Copy-on-write fills the head of a block but not its tail.
    NarrowHull,
    /// A header update writes copy 1 only.
    HeaderOneCopy,
    /// A sync that failed is retried and then believed (R11).
    FailedSyncForgotten,
    /// A poisoned image still writes (R11).
    WritesAfterPoison,
    /// A write panics between its host write and setting its bits.
    PanicInWrite,
    /// Overlapping copy-on-write requests do not wait for each other (R12).
    NoRangeLock,
    /// A header names new regions before they are stable.
    RegionsAfterHeader,
    /// Close sets the clean mark without a checkpoint.
    CleanWithoutCheckpoint,
    /// Regions are built anew, but the header still lets old commits count.
    OldCommitsCount,
    /// The bitmap is enlarged without the block in which it ended being made whole.
    LastBlockLeftHalf,
    /// The bitmap is emptied while writes that found a block in the image are on their way (R5).
    EmptyWithoutNarrowing,
    /// A disk that grows does not zero what lay behind it.
    GrowthShowsOldBytes,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 18] = [
        Self::NoDataSync,
        Self::BitBeforeData,
        Self::FlushSharesRunningCommit,
        Self::NoJournalSync,
        Self::HeaderBeforePages,
        Self::NoDoubleWrite,
        Self::PageMapForgotten,
        Self::NarrowHull,
        Self::HeaderOneCopy,
        Self::FailedSyncForgotten,
        Self::WritesAfterPoison,
        Self::NoRangeLock,
        Self::RegionsAfterHeader,
        Self::CleanWithoutCheckpoint,
        Self::OldCommitsCount,
        Self::LastBlockLeftHalf,
        Self::EmptyWithoutNarrowing,
        Self::GrowthShowsOldBytes,
    ];
}
