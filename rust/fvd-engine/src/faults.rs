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
    /// A write that waits for storage does not see what came while it looked.
    NewsMissed,
    /// The host is told once that storage runs low, and never again.
    ToldOnce,
    /// The host added storage, and nobody who waits for it is woken.
    NewsWakeNobody,
    /// A growth step makes the file longer than it is, also where what the file has behind the reach
    /// is enough: each power cut may leave one more step (C6).
    StepBehindFile,
    /// Entries that name no storage of guests are taken for good (CC-58).
    WildEntryUsed,
    /// A repair gives shared chunks new storage while wrong entries still name some (CC-62).
    RepairCopiesFirst,
    /// A repair mends a header copy only after it updated the header (CC-65).
    WrongCopyLater,
    /// Blocks that a discard or write-zeroes lets read as zero keep the bit that says data, though their chunk gets
    /// storage again that is not zeroed (CC-67).
    ZeroBitsKept,
    /// A block that is zeroed in part gets the bit that says zero (CC-67).
    ZeroBitsRoundOut,
    /// A host that refuses to zero cheaply is believed to have done it (CC-67).
    RefusalIsZero,
    /// An amended growth step is in memory only, until the header is written for another reason.
    AmendNotWritten,
    /// Regions are built anew, but the header still lets old commits count.
    OldCommitsCount,
    /// The bitmap is enlarged without the block in which it ended being made whole.
    LastBlockLeftHalf,
    /// The bitmap is emptied while writes that found a block in the image are on their way (R5).
    EmptyWithoutNarrowing,
    /// A disk that grows does not zero what lay behind it.
    GrowthShowsOldBytes,
    /// Recovery and the first append of a session keep the epoch (R2).
    EpochNotRaised,
    /// The clean mark is not cleared at the start of a session.
    CleanMarkKept,
    /// A header copy that a cut tore is left until the next update, which begins with the other one.
    HeaderNotRepaired,
    /// The first valid header copy counts, not the newer one.
    HeaderFirstValid,
    /// A commit that failed is appended behind its first place instead of there (R2).
    RetryBehind,
    /// The changes of a commit that failed are not pending any more.
    FailedCommitForgotten,
    /// A flush with nothing left to freeze returns though a commit is on its way.
    FlushFindsNothing,
    /// A read-modify-write of host sectors does not wait for pass-through writes (R5).
    NoNarrowing,
    /// A checkpoint lets go of commits that came while it was on its way.
    FirstSequenceTooFar,
    /// The double-write area is written again before the pages in place are synced.
    AreaReusedEarly,
    /// A page is counted again by each attempt at one checkpoint.
    PageCountedTwice,
    /// Recovery writes back a batch that finished long ago.
    BatchNumberIgnored,
    /// Recovery does not write back a batch that was cut short.
    BatchNotRestored,
    /// A read-only open reads pages in place though the double-write area has them.
    OverlayForgotten,
    /// Recovery goes on before the pages it wrote back are stable.
    RestoreNotSynced,
    /// Recovery flips the header without writing the pages that it replayed.
    RecoveryDropsPages,
    /// The next commit starts in the granule of the last one.
    PaddingForgotten,
    /// Two commits have one number.
    CommitNumberKept,
    /// A FUA write returns without a commit (R10).
    FuaNotCommitted,
    /// Write-zeroes sets the bits before it zeroes.
    BitBeforeZeroing,
    /// Write-zeroes of part of a block that is in the base zeroes the rest of it.
    ZeroWithoutHull,
    /// A discard of part of a host sector takes the whole sector.
    DiscardRoundsOut,
    /// Copy-on-write of the last block fills it with base data beyond the covered length.
    TailBeyondCovered,
    /// The range lock of a write is released before the data is written (R12).
    LockReleasedEarly,
    /// The header promises a new size before the file has it (CC-40).
    GrowthNotSynced,
    /// Growth leaves what lies behind the old end as it is.
    GrowthKeepsRest,
    /// Creation writes page 0 before the rest is stable (FMT-9).
    CreateNotSynced,
    /// Creation over an older image does not wipe page 0 first.
    CreateKeepsPageZero,
    /// A lookup looks at the first block only.
    LookupBeyondRun,
    /// Copy-on-write takes a base that fails for zeroes.
    BaseErrorIsZero,
    /// A base that fails to answer is taken for none when an image gets its bitmap.
    BaseErrorIsNone,
    /// A sync that passed is believed though another failed meanwhile (R11).
    SyncBesideFailed,
    /// The header lets go of the journal when the first batch of a checkpoint, or of recovery, is in place.
    HeaderAmongBatches,
    /// What changes while the data is synced goes into the commit on its way (R1).
    FreezeAfterSync,
    /// Units are written again once the pages are in place, before the header says so (R2).
    JournalReusedEarly,
    /// Recovery takes damage in the middle of the journal for the end of a session (R2).
    DamageIsCut,
    /// The timer of the background commit runs once (R1).
    TimerNotRearmed,
    /// A checkpoint writes pages as they are in memory, ahead of what is committed (R3).
    CheckpointFromMemory,
    /// Emptying gives back to the base only what has a bit already.
    EmptyWithinCovered,
    /// The look for free chunks forgets those that regions lie in.
    ScanForgetsRegions,
    /// Chunks found free are taken for zeroes (R6).
    FreeIsFresh,
    /// Freed chunks that were zeroed count as fresh before that is stable (R6).
    FreshNotSynced,
    /// A growth step is opened over what lies behind the reach (R6).
    StepNotZeroed,
    /// A growth step is used before the reach says so (R6).
    ReachForgotten,
    /// Emptying an image frees its chunks while they are still read (R5).
    EmptyFreesAtOnce,
    /// Reads by the engine hold no bracket (R4).
    ReadWithoutBracket,
    /// A write that waited while the image got its first bitmap keeps the lock it asked for before,
    /// which ends inside a block (R12).
    LockOfOldBlocks,
    /// A write does not look again for storage once it has the lock of its range (R12).
    NoSecondLook,
    /// A chunk that was used before is not zeroed (R7).
    ReuseNotZeroed,
    /// Freed chunks are reused while who began before still uses them (R5).
    FreeWithoutNarrowing,
    /// Freed chunks are reused before their freeing is stable (R4).
    FreedAtOnce,
    /// A commit that covers base data has one sync (R6).
    OneSyncOverBase,
    /// The page map keeps saying that a page is stored whose batch was not written.
    PageMapAhead,
    /// The file of a disk that shrinks is cut before the header says so (R6).
    ShrinkCutsFirst,
    /// A disk that shrinks keeps the bits and entries of what was cut off (FMT-30, FMT-76).
    ShrinkKeepsBits,
    /// The storage of what was cut off is given away while who began before still uses it (R5).
    ShrinkWithoutNarrowing,
    /// A compact disk that grows leaves the rest of its last chunk as it is.
    GrowthKeepsChunkRest,
    /// A growth step that was opened ahead of need is used before the reach says so (R6).
    StepAheadUsedEarly,
    /// A repair drops every entry of a table page that has a wrong one.
    RepairDropsGoodEntries,
    /// A compact disk grows before it is stable what its last chunk is.
    GrowthBeforeCommit,
    /// A repair whose checkpoint failed leaves pages good in memory alone.
    RepairForgetsError,
    /// A repair cuts the file where the last header update says that it ends.
    EndCutTooEarly,
    /// A repair leaves a storage chunk with two guest chunks.
    DoubleMappingKept,
    /// A repair gives a guest chunk storage of its own without a copy of what it shared.
    RepairCopyForgotten,
    /// A repair writes pages while the header says that the double-write area does not count.
    RepairWhileClean,
    /// A commit takes a sync of the image file for one of the data file (R1).
    DataFileNotSynced,
    /// A commit that fills fresh space of a data file leaves its data to the sync of the journal.
    OneSyncForTwoFiles,
    /// A disk that grows syncs the image file before the header says so, not the data file (CC-40).
    GrowthSyncsImage,
    /// Creation syncs the image file only (CC-33).
    DataNotSyncedAtCreation,
}

impl Fault {
    /// Those that the simulator must notice in what guests find or in the order of writes. The others have a
    /// test of their own.
    pub const ALL: [Fault; 97] = [
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
        Self::GrowthShowsOldBytes,
        Self::EpochNotRaised,
        Self::CleanMarkKept,
        Self::HeaderNotRepaired,
        Self::HeaderFirstValid,
        Self::RetryBehind,
        Self::FailedCommitForgotten,
        Self::FlushFindsNothing,
        Self::NoNarrowing,
        Self::FirstSequenceTooFar,
        Self::AreaReusedEarly,
        Self::PageCountedTwice,
        Self::BatchNumberIgnored,
        Self::BatchNotRestored,
        Self::OverlayForgotten,
        Self::RestoreNotSynced,
        Self::RecoveryDropsPages,
        Self::PaddingForgotten,
        Self::CommitNumberKept,
        Self::FuaNotCommitted,
        Self::BitBeforeZeroing,
        Self::ZeroWithoutHull,
        Self::DiscardRoundsOut,
        Self::TailBeyondCovered,
        Self::LockReleasedEarly,
        Self::GrowthNotSynced,
        Self::GrowthKeepsRest,
        Self::CreateNotSynced,
        Self::CreateKeepsPageZero,
        Self::LookupBeyondRun,
        Self::BaseErrorIsZero,
        Self::BaseErrorIsNone,
        Self::SyncBesideFailed,
        Self::HeaderAmongBatches,
        Self::FreezeAfterSync,
        Self::JournalReusedEarly,
        Self::DamageIsCut,
        Self::TimerNotRearmed,
        Self::CheckpointFromMemory,
        Self::EmptyWithinCovered,
        Self::ScanForgetsRegions,
        Self::FreeIsFresh,
        Self::FreshNotSynced,
        Self::StepNotZeroed,
        Self::StepBehindFile,
        Self::NewsMissed,
        Self::ToldOnce,
        Self::NewsWakeNobody,
        Self::ReachForgotten,
        Self::EmptyFreesAtOnce,
        Self::ReadWithoutBracket,
        Self::LockOfOldBlocks,
        Self::NoSecondLook,
        Self::ReuseNotZeroed,
        Self::FreeWithoutNarrowing,
        Self::FreedAtOnce,
        Self::OneSyncOverBase,
        Self::PageMapAhead,
        Self::ShrinkCutsFirst,
        Self::ShrinkKeepsBits,
        Self::ShrinkWithoutNarrowing,
        Self::GrowthKeepsChunkRest,
        Self::StepAheadUsedEarly,
        Self::RepairDropsGoodEntries,
        Self::GrowthBeforeCommit,
        Self::RepairForgetsError,
        Self::EndCutTooEarly,
        Self::DoubleMappingKept,
        Self::RepairCopyForgotten,
        Self::RepairWhileClean,
        Self::DataFileNotSynced,
        Self::OneSyncForTwoFiles,
        Self::GrowthSyncsImage,
        Self::DataNotSyncedAtCreation,
        Self::AmendNotWritten,
        Self::WildEntryUsed,
        Self::ZeroBitsKept,
        Self::ZeroBitsRoundOut,
        Self::RefusalIsZero,
        Self::RepairCopiesFirst,
        Self::WrongCopyLater,
    ];
}
