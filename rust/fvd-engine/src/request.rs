// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests, their parameters and their replies.

use crate::host::{FILES, FileId, Limits};
use fvd_format::Header;

/// What a handle is made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the host's files can do, by [`FileId`].
    pub limits: [Limits; FILES],
    /// Writes, and whatever would write, are refused; recovery happens in memory only.
    pub read_only: bool,
    /// Only the header is read and only [`Image::info`](crate::Image::info) answers: inspection of
    /// untrusted images, and QEMU's inactive state, where another program may be writing.
    pub no_io: bool,
    /// The data file may be missing or too short: only [`Request::Check`] without repair,
    /// [`Request::BlockStatus`], [`Request::Close`] and [`Image::info`](crate::Image::info) are served.
    /// Implies `read_only`.
    pub metadata_only: bool,
    /// Longest time that metadata stays uncommitted without a flush: nanoseconds, > 0.
    pub commit_interval_ns: u64,
    /// Journal units after whose use a checkpoint starts; 0: half the journal. Beyond the whole journal: it
    /// starts when the next commit finds no room.
    pub checkpoint_after: u64,
    /// Most pages of the bitmap that a checkpoint writes in one batch; 0: as many as there is room for.
    pub batch_pages: usize,
    /// Most memory for metadata pages: bytes.
    pub metadata_memory: u64,
    /// Discards and write-zeroes leave chunks their place: the storage is zeroed or punched there, so
    /// that a disk laid out well stays so. (QEMU's `discard-no-unref`.)
    pub discard_no_unref: bool,
    /// Writes that find no storage, where it does not grow by itself, wait until
    /// [`Image::space_changed`](crate::Image::space_changed) instead of failing with `NoSpace`. See
    /// [`Image::set_wait_for_space`](crate::Image::set_wait_for_space).
    pub wait_for_space: bool,
    /// The mistake to make.
    #[cfg(feature = "planted-faults")]
    pub fault: Option<crate::faults::Fault>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: [Limits::default(); FILES],
            read_only: false,
            no_io: false,
            metadata_only: false,
            commit_interval_ns: 5_000_000_000,
            checkpoint_after: 0,
            batch_pages: 0,
            metadata_memory: 1 << 30,
            discard_no_unref: false,
            wait_for_space: false,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }
}

/// How much of the guest data area exists after creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Preallocation {
    /// Nothing but its length.
    #[default]
    Off = 0,
    /// Compact: every chunk has its place. As `Off` in a flat image, which has none to give.
    Metadata = 1,
    /// Allocated, without a data transfer where the host can.
    Falloc = 2,
    /// Written with zeroes.
    Full = 3,
}

/// Parameters of a new image.
#[derive(Clone, Debug, Default)]
pub struct CreateParams {
    /// Virtual size in bytes, a multiple of 512; `None`: the base's length.
    pub virtual_size: Option<u64>,
    /// Copy-on-write unit in bytes: a power of two, 4 KiB–2 MiB; 0: chosen by the base's length.
    pub block_size: u32,
    /// Journal in bytes, 1–256 MiB, a multiple of 64 KiB; 0: 16 MiB.
    pub journal_size: u64,
    /// Path of the base as it will stand in the header; empty: no base.
    pub base_name: String,
    /// Format of the base; mandatory with `base_name`.
    pub base_format: String,
    /// Path of the data file as it will stand in the header; empty: guest data lies in the image file.
    /// What the host's data file holds is lost.
    pub data_name: String,
    /// Format of the data file: `raw`; mandatory with `data_name`.
    pub data_format: String,
    /// Look for runs of zeroes of at least this many bytes (rounded up to blocks) in the base, and
    /// mark them as present; 0: do not; 1: one block.
    pub detect_sparse_hole: u64,
    /// How much of the data area to allocate.
    pub preallocation: Preallocation,
    /// Storage is allocated a chunk at a time, by a lookup table.
    pub compact: bool,
    /// Allocation unit in bytes of a compact image: a power of two, 64 KiB–64 MiB; 0: 1 MiB, or more
    /// where a block is larger or the disk would have more than 2³¹ chunks.
    pub chunk_size: u32,
    /// Growth step in bytes of a compact image, a multiple of the chunk size; 0: 64 MiB, of larger disks in
    /// files up to 256 MiB.
    pub storage_grow_unit: u64,
}

/// What an existing image is asked to have; `None`: whatever it has. Only the growth step can change:
/// for the others the value that the image has is accepted, any other refused as `Unsupported`.
#[derive(Clone, Debug, Default)]
pub struct AmendParams {
    /// Growth step in bytes of a compact image, a multiple of the chunk size.
    pub storage_grow_unit: Option<u64>,
    /// Whether the image is compact.
    pub compact: Option<bool>,
    /// Allocation unit in bytes; 0: not compact.
    pub chunk_size: Option<u64>,
    /// Copy-on-write unit in bytes; 0: no bitmap.
    pub block_size: Option<u64>,
    /// Journal in bytes; 0: none yet.
    pub journal_size: Option<u64>,
}

/// A request to the engine.
#[derive(Debug)]
pub enum Request<B> {
    /// Makes a new image in the image file, and the data file if it is to have one; the handle stays
    /// unopened.
    Create(Box<CreateParams>),
    /// Opens the image.
    Open,
    /// Commits, checkpoints, marks the image clean. The handle serves nothing afterwards.
    Close,
    /// Fills `buf` from guest byte `offset` on.
    Read {
        /// First guest byte.
        offset: u64,
        /// Guest memory; its length is the request's.
        buf: B,
    },
    /// Writes `buf` at guest byte `offset`.
    Write {
        /// First guest byte.
        offset: u64,
        /// Guest memory; its length is the request's.
        buf: B,
        /// Durable on completion.
        fua: bool,
    },
    /// Makes every request that completed before this one durable.
    Flush,
    /// Makes a range read as zero.
    WriteZeroes {
        /// First guest byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The storage may be given back.
        may_unmap: bool,
        /// Durable on completion.
        fua: bool,
    },
    /// The range's content is no longer needed: afterwards each part reads as before or as zero.
    Discard {
        /// First guest byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Changes the virtual size.
    Resize {
        /// New size in bytes, a multiple of 512.
        size: u64,
        /// The new space must read as zero: refused where that cannot be had.
        zeroed: bool,
    },
    /// Where the range's content is.
    BlockStatus {
        /// First guest byte.
        offset: u64,
        /// Bytes, > 0.
        len: u64,
    },
    /// Records another base. What the guest sees of it follows the host's base file.
    ChangeBase {
        /// Path; empty: none.
        name: String,
        /// Format; mandatory with `name`.
        format: String,
    },
    /// Changes options of creation, durably, all or none.
    Amend(Box<AmendParams>),
    /// Gives every block back to the base: the disk reads as the base does.
    MakeEmpty,
    /// Checks the image, and repairs what it may.
    Check {
        /// What may be repaired.
        repair: Repair,
    },
}

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: it only looks.
    #[default]
    None,
    /// Space that nothing uses is given back.
    Leaks,
    /// All that can be: what is lost is reported, never invented.
    All,
}

/// What a request returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing but success.
    Done,
    /// Answer to [`Request::BlockStatus`].
    Status(BlockStatus),
    /// Answer to [`Request::Check`].
    Check(Box<CheckReport>),
}

/// Where the first `len` bytes of a range are, all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Where.
    pub place: Place,
    /// How many bytes from the start of the range: > 0.
    pub len: u64,
}

/// Where guest bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file of this image, from `offset` on.
    Data {
        /// The file.
        file: FileId,
        /// First byte in it.
        offset: u64,
    },
    /// They read as zero.
    Zero,
    /// In the base, at the same address.
    Base,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Damage: text for people, one finding each (at most [`CheckReport::FINDINGS_MAX`]).
    pub findings: Vec<String>,
    /// Number of damaged structures that are left.
    pub corruptions: u64,
    /// Number of damaged structures that were repaired.
    pub corruptions_fixed: u64,
    /// Bytes at the end of the files that nothing uses, and are left.
    pub leaked: u64,
    /// Bytes of them that were given back.
    pub leaked_fixed: u64,
    /// Guest bytes of which nobody can tell what they held, as (offset, length): at most
    /// [`CheckReport::FINDINGS_MAX`] ranges. Until a repair they cannot be read; afterwards they read as
    /// the base does, or as zero.
    pub lost: Vec<(u64, u64)>,
    /// All such bytes.
    pub lost_bytes: u64,
    /// Guest chunks of a compact image.
    pub chunks_total: u64,
    /// Of these, chunks with storage.
    pub chunks_allocated: u64,
    /// Of these, chunks whose storage does not follow that of the chunk before.
    pub chunks_fragmented: u64,
    /// Blocks that the bitmap covers.
    pub blocks_total: u64,
    /// Of these, blocks whose state is in this image.
    pub blocks_present: u64,
    /// One past the last byte of the image file in use.
    pub image_end: u64,
}

impl CheckReport {
    /// Most texts a report carries.
    pub const FINDINGS_MAX: usize = 100;

    pub(crate) fn corrupt(&mut self, text: String) {
        self.corruptions += 1;
        self.note(text);
    }

    /// A text for people.
    pub(crate) fn note(&mut self, text: String) {
        if self.findings.len() < Self::FINDINGS_MAX {
            self.findings.push(text);
        }
    }

    /// Nobody can tell what guest bytes `start..end` held.
    pub(crate) fn lose(&mut self, start: u64, end: u64) {
        self.lost_bytes += end - start;
        let room = self.lost.len() < Self::FINDINGS_MAX;
        match self.lost.last_mut() {
            Some((at, len)) if *at + *len == start => *len += end - start,
            _ if room => self.lost.push((start, end - start)),
            _ => {}
        }
    }

    /// `count` of the damaged structures are none any more.
    pub(crate) fn fixed(&mut self, count: u64) {
        self.corruptions -= count;
        self.corruptions_fixed += count;
    }
}

/// A picture of an open image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The header as it counts now.
    pub header: Header,
    /// Storage chunks below the reach that can be given to guest chunks, in a compact image that looked
    /// for them: those that wait for a commit are not counted.
    pub free_chunks: Option<u64>,
    /// Whether the header was marked clean when the image was opened.
    pub was_clean: bool,
    /// Commits replayed by recovery at open.
    pub commits_replayed: u64,
    /// Counters since open.
    pub stats: Stats,
}

/// Counters since open; each is a plain number of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Commits made durable.
    pub commits: u64,
    /// Journal bytes written.
    pub journal_bytes: u64,
    /// Checkpoints finished.
    pub checkpoints: u64,
    /// Metadata pages written in place.
    pub pages_written: u64,
    /// Header updates finished.
    pub header_updates: u64,
    /// Guest writes that had to wait for a commit or a checkpoint.
    pub write_waits: u64,
    /// Flushes that had to wait for a checkpoint.
    pub flush_waits: u64,
    /// Bytes read from the base.
    pub base_bytes: u64,
    /// Growth steps opened, in a compact image.
    pub growth_steps: u64,
    /// Of these, opened ahead of need.
    pub steps_ahead: u64,
}
