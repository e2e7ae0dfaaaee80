// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every maximum of the format, in one place (`docs/format.md`, table of limits).

/// Metadata page, header copy and journal unit: bytes.
pub const PAGE_SIZE: usize = 4096;
/// Sector: the unit of virtual size and of addresses a guest can name; bytes.
pub const SECTOR: u64 = 512;
/// Largest virtual disk: bytes (8 EiB less one sector fits signed 63-bit offsets).
pub const VIRTUAL_SIZE_MAX: u64 = (1 << 63) - SECTOR;
/// Smallest block (copy-on-write unit): bytes.
pub const BLOCK_SIZE_MIN: u32 = 4 << 10;
/// Largest block: bytes.
pub const BLOCK_SIZE_MAX: u32 = 2 << 20;
/// Largest bitmap that the default block size aims at: bytes.
pub const BITMAP_DEFAULT_MAX: u64 = 2 << 20;
/// Smallest chunk (allocation unit): bytes.
pub const CHUNK_SIZE_MIN: u32 = if cfg!(feature = "small-chunks") { 4 << 10 } else { 64 << 10 };
/// Largest chunk: bytes.
pub const CHUNK_SIZE_MAX: u32 = 64 << 20;
/// Default chunk: bytes.
pub const CHUNK_SIZE_DEFAULT: u32 = 1 << 20;
/// Largest number of chunks of a compact disk.
pub const CHUNKS_MAX: u64 = 1 << 31;
/// Default growth step of a compact image: bytes.
pub const STORAGE_GROW_UNIT_DEFAULT: u64 = 64 << 20;
/// Largest growth step that creators give: bytes.
pub const STORAGE_GROW_UNIT_MAX: u64 = 1 << 40;
/// Smallest journal: bytes.
pub const JOURNAL_SIZE_MIN: u64 = 1 << 20;
/// Largest journal: bytes.
pub const JOURNAL_SIZE_MAX: u64 = 256 << 20;
/// Default journal: bytes.
pub const JOURNAL_SIZE_DEFAULT: u64 = 16 << 20;
/// Size of the double-write area: bytes.
pub const DOUBLE_WRITE_SIZE: u64 = 1 << 20;
/// Largest number of snapshots.
pub const SNAPSHOTS_MAX: u32 = 65_535;
/// Longest snapshot or dirty-bitmap name: bytes of UTF-8.
pub const NAME_MAX: usize = 255;
/// Longest path: bytes, without the terminating NUL.
pub const PATH_MAX: usize = 1023;
/// Longest format name: bytes, without the terminating NUL.
pub const FORMAT_NAME_MAX: usize = 31;
/// Longest id string of a snapshot: bytes of UTF-8 (QEMU's field holds 127 and a NUL).
pub const SNAPSHOT_ID_MAX: usize = 127;
/// Deepest chain of bases.
pub const CHAIN_DEPTH_MAX: u32 = 64;
/// Largest host write granule that the format protects against tearing: bytes.
pub const WRITE_GRANULE_MAX: u64 = 64 << 10;
/// Most data one commit may carry (R9): bytes.
pub const CARRIED_MAX: u32 = 64 << 10;
/// Own bits that the default own grain aims at: bytes for the whole virtual disk.
pub const OWN_BITS_DEFAULT_MAX: u64 = 8 << 20;
/// Largest region `KeyArea` (two LUKS1 areas): bytes.
pub const KEY_AREA_MAX: u64 = 32 << 20;
/// Most runs of a recorded boot order.
pub const PROFILE_RUNS_MAX: u32 = 65_536;
/// Most persistent dirty bitmaps.
pub const DIRTY_BITMAPS_MAX: u32 = 65_535;

const _: () = assert!(VIRTUAL_SIZE_MAX % SECTOR == 0);
const _: () = assert!(BLOCK_SIZE_MIN as usize == PAGE_SIZE && BLOCK_SIZE_MAX > BLOCK_SIZE_MIN);
const _: () = assert!(CHUNK_SIZE_MIN >= BLOCK_SIZE_MIN && CHUNK_SIZE_MAX >= BLOCK_SIZE_MAX);
const _: () = assert!(JOURNAL_SIZE_MIN % (2 * PAGE_SIZE as u64) == 0);

/// The default block size for `length` bytes under copy-on-write (base length, or the virtual size
/// where the base's length is unknown): the smallest power of two ≥ 4 KiB whose bitmap is ≤ 2 MiB,
/// and at most [`BLOCK_SIZE_MAX`].
pub fn default_block_size(length: u64) -> u32 {
    smallest_block(length, BITMAP_DEFAULT_MAX)
}

/// The default grain at which a compact image of `virtual_size` bytes notes what of a chunk was written
/// (FMT-33, FMT-95): the smallest power of two ≥ 4 KiB whose bits are ≤ 8 MiB, and at most [`BLOCK_SIZE_MAX`].
pub fn default_own_grain(virtual_size: u64) -> u32 {
    smallest_block(virtual_size, OWN_BITS_DEFAULT_MAX)
}

/// The default growth step of a compact image of `virtual_size` bytes in a file that grows by itself: a 64th
/// of the disk as a power of two, from [`STORAGE_GROW_UNIT_DEFAULT`] to four of them. It costs the host no space.
pub fn default_grow_unit(virtual_size: u64) -> u64 {
    (virtual_size / 64).next_power_of_two().clamp(STORAGE_GROW_UNIT_DEFAULT, 4 * STORAGE_GROW_UNIT_DEFAULT)
}

fn smallest_block(length: u64, most: u64) -> u32 {
    let mut block = BLOCK_SIZE_MIN;
    while block < BLOCK_SIZE_MAX && length.div_ceil(u64::from(block)).div_ceil(8) > most {
        block *= 2;
    }
    block
}
