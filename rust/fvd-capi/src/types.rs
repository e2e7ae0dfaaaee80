// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the header declares: constants, structs, types of callbacks.

use std::ffi::{c_char, c_int, c_void};

/// The image file: metadata, and guest data unless a data file holds it.
pub const FVD_FILE_IMAGE: u32 = 0;
/// The data file, where there is one.
pub const FVD_FILE_DATA: u32 = 1;
/// The base, as the guest sees it. Only ever read.
pub const FVD_FILE_BASE: u32 = 2;

/// Writes, and whatever would write, are refused.
pub const FVD_OPEN_RDONLY: u32 = 1;
/// Only the header is read, and only fvd_image_info answers.
pub const FVD_OPEN_NO_IO: u32 = 2;
/// Discarded chunks of a compact image keep their place: what is discarded is
/// punched or zeroed there, so that the disk stays in order in its file.
pub const FVD_OPEN_DISCARD_NO_UNREF: u32 = 4;
/// Writes that find no storage, where it does not grow by itself, wait for
/// fvd_image_space_changed instead of failing with -ENOSPC.
pub const FVD_OPEN_WAIT_FOR_SPACE: u32 = 8;
/// fvd_file_options: past the page cache (O_DIRECT).
pub const FVD_FILE_DIRECT: u32 = 16;
/// fvd_file_options: take no locks.
pub const FVD_FILE_NO_LOCK: u32 = 32;
/// fvd_file_options: open the base that the header names.
pub const FVD_FILE_ALLOW_BASE: u32 = 64;
/// fvd_file_options: open the data file that the header names.
pub const FVD_FILE_ALLOW_DATA: u32 = 128;
/// The data file may be missing or too short: fvd_image_info, block status and
/// a check without repair answer, everything else fails. Read-only.
pub const FVD_OPEN_METADATA: u32 = 256;

/// Durable on completion.
pub const FVD_REQ_FUA: u32 = 1;
/// The storage may be given back.
pub const FVD_REQ_MAY_UNMAP: u32 = 2;
/// Resize: fail unless the new space reads as zero.
pub const FVD_REQ_ZEROED: u32 = 4;
/// Zeroing asked of the host: answer -ENOTSUP where it would take writing
/// zeroes.
pub const FVD_REQ_NO_FALLBACK: u32 = 8;

/// The file grows by truncate, and the new space reads as zero.
pub const FVD_LIMIT_GROWS_ZEROED: u32 = 1;
/// Zeroing a range costs no data transfer.
pub const FVD_LIMIT_CHEAP_ZEROING: u32 = 2;
/// Writes may carry FVD_REQ_FUA.
pub const FVD_LIMIT_CAN_FUA: u32 = 4;

/// Something failed.
pub const FVD_LOG_ERROR: u32 = 0;
/// Something is odd but handled.
pub const FVD_LOG_WARNING: u32 = 1;
/// Worth knowing.
pub const FVD_LOG_INFO: u32 = 2;

// 1 << 62, as a literal: cbindgen would print an int shift.
/// Added to the result of base_status when the bytes may be data.
pub const FVD_STATUS_DATA: i64 = 4611686018427387904;
const _: () = assert!(FVD_STATUS_DATA == fvd_engine::host::STATUS_DATA);

/// Nothing but the length.
pub const FVD_PREALLOC_OFF: u32 = 0;
/// Compact: every chunk has its place. Otherwise as FVD_PREALLOC_OFF.
pub const FVD_PREALLOC_METADATA: u32 = 1;
/// Space for the whole disk, without a data transfer where the host can.
pub const FVD_PREALLOC_FALLOC: u32 = 2;
/// Zeroes written to the whole disk.
pub const FVD_PREALLOC_FULL: u32 = 3;

/// fvd_submit_check: space that nothing uses is given back.
pub const FVD_CHECK_REPAIR_LEAKS: u32 = 1;
/// fvd_submit_check: leaks, and all damage that can be repaired.
pub const FVD_CHECK_REPAIR_ALL: u32 = 2;

/// fvd_create: storage is allocated a chunk at a time, by a lookup table.
pub const FVD_CREATE_COMPACT: u32 = 1;

/// fvd_amend: storage_grow_unit is given.
pub const FVD_AMEND_STORAGE_GROW_UNIT: u32 = 1;
/// fvd_amend: flags are given.
pub const FVD_AMEND_FLAGS: u32 = 2;
/// fvd_amend: chunk_size is given.
pub const FVD_AMEND_CHUNK_SIZE: u32 = 4;
/// fvd_amend: block_size is given.
pub const FVD_AMEND_BLOCK_SIZE: u32 = 8;
/// fvd_amend: journal_size is given.
pub const FVD_AMEND_JOURNAL_SIZE: u32 = 16;

/// In a file of this image.
pub const FVD_PLACE_DATA: u32 = 0;
/// Reads as zero.
pub const FVD_PLACE_ZERO: u32 = 1;
/// In the base, at the same offset.
pub const FVD_PLACE_BASE: u32 = 2;

/// Answer of fvd_lookup: submit a request instead.
pub const FVD_LOOKUP_ASK: c_int = 0;
/// Answer of fvd_lookup: do the I/O there, then call fvd_end.
pub const FVD_LOOKUP_DATA: c_int = 1;
/// Flag of fvd_lookup: for a write.
pub const FVD_LOOKUP_WRITE: u32 = 1;

/// The image was marked clean when it was opened.
pub const FVD_INFO_CLEAN: u32 = 1;
/// base_length is known.
pub const FVD_INFO_HAS_BASE_LENGTH: u32 = 2;
/// Space past the base is not known to read as zero.
pub const FVD_INFO_NON_ZEROING: u32 = 4;
/// An earlier failure made the image unusable; open it anew.
pub const FVD_INFO_POISONED: u32 = 8;

/// Called once when a request is done, on the queue's thread.
///
/// ret is 0 or a negative errno. error is NULL on success, else a text that
/// is valid during the call.
pub type fvd_done_fn = Option<unsafe extern "C" fn(opaque: *mut c_void, ret: i64, error: *const c_char)>;

/// Called for one finding of a check; text is valid during the call.
pub type fvd_finding_fn = Option<unsafe extern "C" fn(opaque: *mut c_void, text: *const c_char)>;

/// What a file can do. All zero, struct_size too: requests of any alignment,
/// no flags.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_limits {
    /// sizeof(struct fvd_limits), or 0 if all is 0.
    pub struct_size: u32,
    /// Offsets and lengths of requests are multiples of it: a power of two,
    /// 1 to 4096; 0 is 1.
    pub request_alignment: u32,
    /// Addresses of buffers are multiples of it: a power of two, 1 to 4096;
    /// 0 is 1.
    pub memory_alignment: u32,
    /// The storage tears writes at multiples of it: a power of two up to
    /// 65536; less than 4096 counts as 4096.
    pub write_granule: u32,
    /// FVD_LIMIT_*
    pub flags: u32,
    /// 0
    pub reserved: u32,
}

/// What the library asks of its host.
///
/// read to base_status start an operation. They are called on the queue's
/// thread; the host completes each operation exactly once, by
/// fvd_complete(queue, token, ret) on that thread, at once or later. ret is a
/// negative errno on failure, otherwise 0 or more. iov, and the memory it
/// names, stay valid until the operation completes. file is FVD_FILE_*.
///
/// read, write, flush, get_length and wake are required; each other member
/// may be NULL, with the fallback stated here.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_host_ops {
    /// sizeof(struct fvd_host_ops)
    pub struct_size: usize,
    /// Fill iov from the file; past the file's end with zeroes. From the base
    /// where there is none: -ENOMEDIUM.
    pub read: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32, offset: u64, iov: *const libc::iovec, iovcnt: c_int, len: u64)>,
    /// Write iov to the file. flags: FVD_REQ_FUA, only where the limits allow
    /// it.
    pub write: Option<
        unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32, offset: u64, iov: *const libc::iovec, iovcnt: c_int, len: u64, flags: u32),
    >,
    /// Make every operation that completed durable, the file's length
    /// included.
    pub flush: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32)>,
    /// Make the range read as zero. flags: FVD_REQ_MAY_UNMAP, and
    /// FVD_REQ_NO_FALLBACK where the limits say FVD_LIMIT_CHEAP_ZEROING.
    /// NULL: the library writes zeroes.
    pub write_zeroes: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32, offset: u64, len: u64, flags: u32)>,
    /// The range's content is not needed any more; afterwards it reads as
    /// before or as zero. NULL: nothing is discarded.
    pub discard: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32, offset: u64, len: u64)>,
    /// Set the file's length. NULL: the file does not grow (-ENOSPC).
    pub truncate: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32, length: u64)>,
    /// ret: the file's length in bytes. Of the base, or the data file, where
    /// there is none: -ENOMEDIUM.
    pub get_length: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, file: u32)>,
    /// ret: how many bytes of the base from offset on (1 to len) are alike:
    /// known to read as zero or, with FVD_STATUS_DATA added, possibly data.
    /// NULL: all of it is data.
    pub base_status: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, token: u64, offset: u64, len: u64)>,
    /// Have fvd_queue_run called soon on the queue's thread. Called from any
    /// thread; must not call the library. Not called any more once
    /// fvd_queue_free has returned.
    pub wake: Option<unsafe extern "C" fn(queue_opaque: *mut c_void)>,
    /// Nanoseconds of a monotonic clock. NULL: CLOCK_MONOTONIC.
    pub now_ns: Option<unsafe extern "C" fn(queue_opaque: *mut c_void) -> u64>,
    /// Fill buf with unpredictable bytes: 0, or anything else on failure.
    /// NULL, or failure: getrandom(2).
    pub random_bytes: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, buf: *mut c_void, len: usize) -> c_int>,
    /// Call fvd_queue_timer once at or after at_ns of now_ns's clock. Replaces
    /// the time set before; UINT64_MAX: do not call it. NULL: metadata is
    /// committed by flushes and by its size only.
    pub set_timer: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, at_ns: u64)>,
    /// A message for people. level: FVD_LOG_*. text is valid during the call.
    /// NULL: nobody reads it.
    pub log: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, level: u32, text: *const c_char)>,
    /// Storage that does not grow by itself (no FVD_LIMIT_GROWS_ZEROED) is
    /// nearly used up: free bytes of it are left for guest data, and the image
    /// can use wanted bytes more, at most storage_grow_unit. Called ahead of
    /// need, when less than a growth step is left behind what the image uses,
    /// and when a write finds nothing; once for each length of the storage,
    /// and again after each fvd_image_space_changed. Make the storage longer
    /// and call that function, from here or later from any thread. NULL:
    /// nobody is asked.
    pub low_space: Option<unsafe extern "C" fn(queue_opaque: *mut c_void, free: u64, wanted: u64)>,
}

/// How an image is opened or created.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_config {
    /// sizeof(struct fvd_config)
    pub struct_size: usize,
    /// FVD_OPEN_*
    pub flags: u32,
    /// 0
    pub reserved: u32,
    /// What the host's files can do, by FVD_FILE_*.
    pub limits: [fvd_limits; 3],
    /// Longest time that metadata stays uncommitted without a flush;
    /// 0: 5000.
    pub commit_interval_ms: u64,
    /// Most memory for metadata in bytes; 0: 1 GiB.
    pub metadata_memory: u64,
}

/// Parameters of a new image.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_create {
    /// sizeof(struct fvd_create)
    pub struct_size: usize,
    /// Bytes, a multiple of 512; UINT64_MAX: the base's length.
    pub virtual_size: u64,
    /// Copy-on-write unit in bytes: a power of two, 4 KiB to 2 MiB; 0: chosen
    /// by the base's length.
    pub block_size: u32,
    /// FVD_PREALLOC_*
    pub preallocation: u32,
    /// Bytes: 1 to 256 MiB, a multiple of 64 KiB; 0: 16 MiB.
    pub journal_size: u64,
    /// Look for runs of zeroes at least this long in the base, and do not read
    /// them from there later; 0: do not look; 1: one block.
    pub detect_sparse_hole: u64,
    /// Path of the base as it will stand in the image, UTF-8; NULL or empty:
    /// no base.
    pub base_name: *const c_char,
    /// Format of the base; mandatory with base_name.
    pub base_format: *const c_char,
    /// FVD_CREATE_*
    pub flags: u32,
    /// Compact: allocation unit in bytes, a power of two, 64 KiB to 64 MiB;
    /// 0: 1 MiB, or more where a block is larger or the disk would have more
    /// than 2^31 chunks.
    pub chunk_size: u32,
    /// Compact: the file grows in steps of so many bytes, a multiple of the
    /// chunk size; 0: 64 MiB, of larger disks in files up to 256 MiB.
    pub storage_grow_unit: u64,
    /// Path of the data file as it will stand in the image, UTF-8; NULL or
    /// empty: guest data lies in the image file. What FVD_FILE_DATA holds is
    /// lost.
    pub data_name: *const c_char,
    /// Format of the data file: "raw"; mandatory with data_name.
    pub data_format: *const c_char,
}

/// What an image that exists is asked to have.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_amend {
    /// sizeof(struct fvd_amend)
    pub struct_size: usize,
    /// FVD_AMEND_*: which of the members below are given.
    pub given: u32,
    /// FVD_CREATE_*; cannot change.
    pub flags: u32,
    /// Compact: steps of the file's growth in bytes, a multiple of the chunk
    /// size.
    pub storage_grow_unit: u64,
    /// As fvd_info has it; cannot change.
    pub chunk_size: u64,
    /// As fvd_info has it; cannot change.
    pub block_size: u64,
    /// As fvd_info has it; cannot change.
    pub journal_size: u64,
}

/// Where the first len bytes of a range are, all alike.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_block_status {
    /// sizeof(struct fvd_block_status), set by the caller.
    pub struct_size: usize,
    /// FVD_PLACE_*
    pub place: u32,
    /// FVD_PLACE_DATA: in which file (FVD_FILE_*)
    pub file: u32,
    /// FVD_PLACE_DATA: and where in it.
    pub offset: u64,
    /// 1 to the length asked for.
    pub len: u64,
}

/// What a check found.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_check {
    /// sizeof(struct fvd_check), set by the caller.
    pub struct_size: usize,
    /// Damaged structures that are left.
    pub corruptions: u64,
    /// Bytes at the end of the files that nothing uses, and are left.
    pub leaked: u64,
    /// Blocks that the bitmap covers.
    pub blocks_total: u64,
    /// Of these, blocks that are in this image.
    pub blocks_present: u64,
    /// One past the last byte of the image file in use.
    pub image_end: u64,
    /// Compact: chunks of the disk.
    pub chunks_total: u64,
    /// Compact: of these, chunks with storage.
    pub chunks_allocated: u64,
    /// Compact: of these, chunks whose storage does not follow that of the
    /// chunk before.
    pub chunks_fragmented: u64,
    /// Damaged structures that were repaired, which corruptions does not count.
    pub corruptions_fixed: u64,
    /// Bytes that were given back, which leaked does not count.
    pub leaked_fixed: u64,
    /// Guest bytes of which nobody can tell what they held: they cannot be
    /// read, and read as the base or as zero after a repair.
    pub lost_bytes: u64,
}

/// Answer of fvd_lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_mapping {
    /// FVD_FILE_IMAGE or FVD_FILE_DATA
    pub file: u32,
    /// For fvd_end.
    pub token: u32,
    /// First byte in the file.
    pub offset: u64,
    /// 1 to the length asked for.
    pub len: u64,
}

/// A picture of an open image.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_info {
    /// sizeof(struct fvd_info), set by the caller.
    pub struct_size: usize,
    /// The image's identity.
    pub uuid: [u8; 16],
    /// Version of the format.
    pub version: u32,
    /// Copy-on-write unit in bytes; 0: the image has no bitmap.
    pub block_size: u32,
    /// Allocation unit in bytes; 0: the image is not compact.
    pub chunk_size: u32,
    /// FVD_INFO_*
    pub flags: u32,
    /// Bytes.
    pub virtual_size: u64,
    /// Number of header updates.
    pub generation: u64,
    /// Number of writing sessions.
    pub epoch: u64,
    /// Length of the base at creation, with FVD_INFO_HAS_BASE_LENGTH.
    pub base_length: u64,
    /// Guest bytes that the bitmap covers; all beyond is in this image.
    pub covered: u64,
    /// Where guest data starts, in the file that holds it.
    pub data_offset: u64,
    /// Bytes.
    pub journal_size: u64,
    /// Bytes of all metadata regions.
    pub metadata_bytes: u64,
    /// Blocks that the bitmap covers.
    pub blocks: u64,
    /// Commits that recovery replayed when the image was opened.
    pub commits_replayed: u64,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits.
    pub compatible: u64,
    /// Feature bits.
    pub autoclear: u64,
    /// Since open: commits made durable.
    pub stat_commits: u64,
    /// Since open: journal bytes written.
    pub stat_journal_bytes: u64,
    /// Since open: checkpoints finished.
    pub stat_checkpoints: u64,
    /// Since open: metadata pages written in place.
    pub stat_pages_written: u64,
    /// Since open: header updates finished.
    pub stat_header_updates: u64,
    /// Since open: writes that had to wait for a commit or a checkpoint.
    pub stat_write_waits: u64,
    /// Since open: flushes that had to wait for a checkpoint.
    pub stat_flush_waits: u64,
    /// Since open: bytes read from the base.
    pub stat_base_bytes: u64,
    /// Path of the base; empty: none.
    pub base_name: [c_char; 1024],
    /// Format of the base.
    pub base_format: [c_char; 32],
    /// Compact: the file grows in steps of so many bytes.
    pub storage_grow_unit: u64,
    /// Compact: where the storage that chunks may lie in ends in the file, as
    /// the header has it.
    pub reach: u64,
    /// Compact: chunks of the disk.
    pub chunks: u64,
    /// Path of the data file, which the caller opens if it likes; empty: guest
    /// data lies in the image file.
    pub data_name: [c_char; 1024],
    /// Format of the data file.
    pub data_format: [c_char; 32],
}

/// How the ready-made file host opens an image.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fvd_file_options {
    /// sizeof(struct fvd_file_options)
    pub struct_size: usize,
    /// FVD_OPEN_*, FVD_FILE_DIRECT, FVD_FILE_NO_LOCK, FVD_FILE_ALLOW_BASE,
    /// FVD_FILE_ALLOW_DATA
    pub flags: u32,
    /// Longest chain of bases; 0: 64.
    pub depth: u32,
    /// As in fvd_config.
    pub commit_interval_ms: u64,
    /// As in fvd_config.
    pub metadata_memory: u64,
    /// As in fvd_host_ops; of use where the image lies on a block device.
    /// NULL: nobody is asked.
    pub low_space: Option<unsafe extern "C" fn(opaque: *mut c_void, free: u64, wanted: u64)>,
    /// What low_space is called with.
    pub opaque: *mut c_void,
}
