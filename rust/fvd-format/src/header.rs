// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page 0 and the header (FMT-1…FMT-19).
//!
//! Page 0 holds what never changes, so that a torn update can never hide the image. The header has
//! two copies; an update writes copy 2, syncs, writes copy 1, syncs; the valid copy with the higher
//! generation counts. The header is the only commit point of anything big: it names every region.

use crate::codec::*;
use crate::error::{FormatError, Kind, Result};
use crate::limits::*;
use crate::page::{PAYLOAD_BITS, PAYLOAD_ENTRIES, PAYLOAD_SIZE};
use crate::{Uuid, bitmap, checksum};

/// The first eight bytes of every image.
pub const MAGIC: [u8; 8] = *b"FVD\0\r\n\x1a\n";
/// The first eight bytes of a header copy.
pub const HEADER_MAGIC: [u8; 8] = *b"FVDHEAD2";
/// The first four bytes of an image of version 1 (IBM, 2011).
pub const MAGIC_V1: [u8; 4] = [0xa9, 0xf5, 0x43, 0x51];
/// The version this code reads and writes.
pub const VERSION: u32 = 2;
/// File offsets of header copies 1 and 2. At least 64 KiB apart, so that no device write granule
/// up to that size can tear both.
pub const HEADER_OFFSETS: [u64; 2] = [4096, 128 << 10];
/// First byte that regions may use.
pub const REGIONS_START: u64 = 256 << 10;
/// A page that no structure uses, between header copy 2 and the regions, in no write granule of theirs: reserved
/// bytes, so zero (FMT-2).
pub const UNUSED_PAGE: u64 = 192 << 10;
const _: () = assert!(HEADER_OFFSETS[1] + PAGE_SIZE as u64 <= UNUSED_PAGE && UNUSED_PAGE + PAGE_SIZE as u64 <= REGIONS_START);
/// `base_length` when it is not known.
pub const BASE_LENGTH_UNKNOWN: u64 = u64::MAX;

/// Incompatible features: code that does not know a set bit refuses the image.
pub mod incompatible {
    /// Storage is allocated by the lookup table (region `Table`).
    pub const COMPACT: u64 = 1 << 0;
    /// Guest data lies in a file of its own.
    pub const DATA_FILE: u64 = 1 << 1;
    /// Guest data is encrypted (AES-256-XTS; region `KeyArea`).
    pub const ENCRYPTED: u64 = 1 << 2;
    /// Snapshots exist or existed (regions `Refcounts`, `SnapshotDir`, origins).
    pub const SNAPSHOTS: u64 = 1 << 3;
    /// Origins exist (regions `OriginIds`, `OwnBits`).
    pub const ORIGINS: u64 = 1 << 4;
    /// Journal records may carry data.
    pub const CARRIED_DATA: u64 = 1 << 5;
    /// What this code implements.
    pub const KNOWN: u64 = COMPACT | DATA_FILE;
}

/// Compatible features: code that does not know a set bit may ignore it.
pub mod compatible {
    /// Blocks read from the base are kept.
    pub const COPY_ON_READ: u64 = 1 << 0;
    /// A recorded boot order is present (region `Profile`).
    pub const PROFILE: u64 = 1 << 1;
    /// Storage did not read as zero when the image was created: no zero promise past the base.
    pub const NON_ZEROING: u64 = 1 << 2;
    /// The prefetch parameters of the header count.
    pub const PREFETCH: u64 = 1 << 3;
}

/// Autoclear features: code that does not know a set bit clears it on the first write.
pub mod autoclear {
    /// Persistent dirty bitmaps are consistent with the data (region `DirtyBitmaps`).
    pub const DIRTY_BITMAPS: u64 = 1 << 0;
    /// What this code implements.
    pub const KNOWN: u64 = 0;
}

/// Regions of metadata; the discriminant is the on-disk number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum RegionKind {
    /// A bit for each page of the other paged regions: stored / still initial.
    PageMap = 1,
    /// The double-write area.
    DoubleWrite = 2,
    /// The journal.
    Journal = 3,
    /// Copy-on-write bits.
    Bitmap = 4,
    /// Lookup table of compact images.
    Table = 5,
    /// Snapshot reference counts.
    Refcounts = 6,
    /// Snapshot directory.
    SnapshotDir = 7,
    /// Origin chunk ids.
    OriginIds = 8,
    /// Own bits.
    OwnBits = 9,
    /// LUKS key area.
    KeyArea = 10,
    /// Recorded boot order.
    Profile = 11,
    /// Persistent dirty bitmaps.
    DirtyBitmaps = 12,
}

/// Number of region slots in the header.
pub const REGION_SLOTS: usize = 16;

impl RegionKind {
    /// All kinds, in on-disk order.
    pub const ALL: [RegionKind; 12] = [
        Self::PageMap,
        Self::DoubleWrite,
        Self::Journal,
        Self::Bitmap,
        Self::Table,
        Self::Refcounts,
        Self::SnapshotDir,
        Self::OriginIds,
        Self::OwnBits,
        Self::KeyArea,
        Self::Profile,
        Self::DirtyBitmaps,
    ];

    /// The kind with on-disk number `n`.
    pub fn from_u16(n: u16) -> Option<Self> {
        Self::ALL.get(usize::from(n).checked_sub(1)?).copied()
    }

    /// Whether the region consists of metadata pages that the page map covers.
    pub fn is_mapped(self) -> bool {
        !matches!(self, Self::PageMap | Self::DoubleWrite | Self::Journal | Self::KeyArea)
    }

    fn slot(self) -> usize {
        self as usize - 1
    }

    /// The incompatible feature without which the region must not be there; 0 if none.
    pub fn feature(self) -> u64 {
        match self {
            Self::Table => incompatible::COMPACT,
            Self::Refcounts | Self::SnapshotDir => incompatible::SNAPSHOTS,
            Self::OriginIds | Self::OwnBits => incompatible::ORIGINS,
            Self::KeyArea => incompatible::ENCRYPTED,
            _ => 0,
        }
    }
}

/// Where a region lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// File offset, a multiple of 4 KiB.
    pub offset: u64,
    /// Length in bytes, a multiple of 4 KiB.
    pub length: u64,
    /// Generation: a region built anew gets the next one.
    pub generation: u32,
    /// Page-map bit of the region's first page (0 where the page map does not cover the region).
    pub map_first: u64,
    /// Sum of the write counts of all its stored pages, as of the last finished checkpoint.
    pub count_sum: u64,
}

impl Region {
    /// Pages in the region.
    pub fn pages(&self) -> u64 {
        self.length / PAGE_SIZE as u64
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Page 0: identity, written at creation and never again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageZero {
    /// The image's identity.
    pub uuid: Uuid,
}

impl PageZero {
    /// The 4 KiB page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE_SIZE];
        page[..8].copy_from_slice(&MAGIC);
        put_u32(&mut page, 8, VERSION);
        put_u32(&mut page, 12, PAGE_SIZE as u32);
        page[16..32].copy_from_slice(&self.uuid);
        put_u64(&mut page, 32, HEADER_OFFSETS[0]);
        put_u64(&mut page, 40, HEADER_OFFSETS[1]);
        let crc = checksum::seeded(&self.uuid, checksum::kind::PAGE_ZERO, 0, &[&page[..48]]);
        put_u32(&mut page, 48, crc);
        page
    }

    /// Parses the start of an image; 64 bytes are enough.
    pub fn decode(page: &[u8]) -> Result<Self> {
        if page.len() >= 4 && page[..4] == MAGIC_V1 {
            return Err(FormatError::new(Kind::Unsupported, "version", "FVD version 1 (2011): convert it first"));
        }
        if page.len() < 64 || page[..8] != MAGIC {
            return Err(FormatError::new(Kind::NotFvd, "magic", "not an FVD image"));
        }
        let version = get_u32(page, 8);
        if version != VERSION {
            return Err(FormatError::new(Kind::Unsupported, "version", format!("version {version}, this program knows {VERSION}")));
        }
        let uuid: Uuid = page[16..32].try_into().expect("16 bytes");
        if get_u32(page, 48) != checksum::seeded(&uuid, checksum::kind::PAGE_ZERO, 0, &[&page[..48]]) {
            return Err(FormatError::new(Kind::Checksum, "page 0", "checksum mismatch"));
        }
        if get_u32(page, 12) != PAGE_SIZE as u32 || get_u64(page, 32) != HEADER_OFFSETS[0] || get_u64(page, 40) != HEADER_OFFSETS[1] {
            return Err(FormatError::invalid("page 0", "header offsets out of range"));
        }
        Ok(Self { uuid })
    }
}

/// The header: everything about the image that is not per block, per chunk or per snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The image's identity, as in page 0.
    pub uuid: Uuid,
    /// Raised by every update.
    pub generation: u64,
    /// Size of the virtual disk: bytes, a multiple of 512.
    pub virtual_size: u64,
    /// 0 none, 1 LUKS key area. Stored big-endian, for libvirt.
    pub crypt_method: u32,
    /// The image was closed in good order: the journal holds nothing, pages are current.
    pub clean: bool,
    /// Nothing was ever written: every block's state is in the base, or zero, though no bitmap says
    /// so. Cleared, stable, before the first write.
    pub pristine: bool,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Copy-on-write unit in bytes; 0 without bitmap.
    pub block_size: u32,
    /// Allocation unit in bytes; 0 unless compact.
    pub chunk_size: u32,
    /// Length of the base in bytes when the image was made, rounded up to 512;
    /// [`BASE_LENGTH_UNKNOWN`]; 0 without base.
    pub base_length: u64,
    /// Guest bytes that the bitmap covers; everything beyond is in this image.
    pub covered: u64,
    /// Offset of guest byte 0 (flat) or of chunk 0 (compact), in the file that holds guest data.
    pub data_offset: u64,
    /// Growth step of compact images in bytes; 0 if flat.
    pub storage_grow_unit: u64,
    /// "May be written up to" (R6): bytes below it, of the file that holds guest data, are not known
    /// to be zero.
    pub reach: u64,
    /// Epoch of the journal units that count.
    pub epoch: u64,
    /// Sequence number of the first journal unit that still counts; a commit starts there.
    pub first_seq: u64,
    /// Number of the commit that starts there.
    pub first_commit: u64,
    /// Number of the last finished double-write batch.
    pub last_batch: u64,
    /// Number of the last finished checkpoint.
    pub last_checkpoint: u64,
    /// Path of the base, as the user gave it; empty without base.
    pub base_name: String,
    /// Format of the base; never empty if `base_name` is not.
    pub base_format: String,
    /// Path of the data file, as the user gave it; empty without one. Never opened because it
    /// stands here: that is the caller's choice.
    pub data_name: String,
    /// Format of the data file; empty exactly if `data_name` is.
    pub data_format: String,
    /// The regions, by slot.
    pub regions: [Option<Region>; REGION_SLOTS],
}

mod at {
    pub const CRC: usize = 8;
    pub const LENGTH: usize = 12;
    pub const UUID: usize = 16;
    pub const GENERATION: usize = 32;
    pub const VIRTUAL_SIZE: usize = 40;
    pub const CRYPT_METHOD: usize = 48;
    pub const STATE: usize = 52;
    pub const INCOMPATIBLE: usize = 56;
    pub const COMPATIBLE: usize = 64;
    pub const AUTOCLEAR: usize = 72;
    pub const BLOCK_SIZE: usize = 80;
    pub const CHUNK_SIZE: usize = 84;
    pub const BASE_LENGTH: usize = 96;
    pub const COVERED: usize = 104;
    pub const DATA_OFFSET: usize = 112;
    pub const STORAGE_GROW_UNIT: usize = 120;
    pub const REACH: usize = 128;
    pub const EPOCH: usize = 136;
    pub const FIRST_SEQ: usize = 144;
    pub const FIRST_COMMIT: usize = 152;
    pub const LAST_BATCH: usize = 160;
    pub const LAST_CHECKPOINT: usize = 168;
    pub const BASE_NAME: usize = 512;
    pub const BASE_FORMAT: usize = 1536;
    pub const DATA_NAME: usize = 1568;
    pub const DATA_FORMAT: usize = 2592;
    pub const REGIONS: usize = 2688;
    pub const REGION_SIZE: usize = 64;
    pub const REGIONS_END: usize = REGIONS + super::REGION_SLOTS * REGION_SIZE;
}
const _: () = assert!(at::REGIONS_END <= PAGE_SIZE);
const _: () = assert!(at::BASE_NAME + PATH_MAX < at::BASE_FORMAT && at::BASE_FORMAT + FORMAT_NAME_MAX < at::DATA_NAME);
const _: () = assert!(at::DATA_NAME + PATH_MAX < at::DATA_FORMAT && at::DATA_FORMAT + FORMAT_NAME_MAX < at::REGIONS);

const STATE_CLEAN: u32 = 1;
const STATE_PRISTINE: u32 = 2;

impl Header {
    /// The region of `kind`, if the image has one.
    pub fn region(&self, kind: RegionKind) -> Option<&Region> {
        self.regions[kind.slot()].as_ref()
    }

    /// The region of `kind`, for changing.
    pub fn region_mut(&mut self, kind: RegionKind) -> &mut Option<Region> {
        &mut self.regions[kind.slot()]
    }

    /// One past the last byte that any region uses.
    pub fn regions_end(&self) -> u64 {
        self.regions.iter().flatten().map(Region::end).max().unwrap_or(REGIONS_START)
    }

    /// Bits of the bitmap.
    pub fn blocks(&self) -> u64 {
        if self.block_size == 0 { 0 } else { bitmap::blocks(self.covered, self.block_size) }
    }

    /// From this guest byte on, up to the covered length, a bit 0 says that the block reads as zero: it lies
    /// past the base's last block (FMT-31). A multiple of the block size, or the covered length.
    pub fn zero_from(&self) -> u64 {
        self.base_length.checked_next_multiple_of(u64::from(self.block_size).max(1)).map_or(self.covered, |end| end.min(self.covered))
    }

    /// Whether there is anything from [`Header::zero_from`] on.
    pub fn has_zero_bits(&self) -> bool {
        self.zero_from() < self.covered
    }

    /// Whether storage is allocated by the lookup table.
    pub fn is_compact(&self) -> bool {
        self.incompatible & incompatible::COMPACT != 0
    }

    /// Whether guest data lies in a file of its own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Guest chunks of a compact image; 0 if flat. The last one may be partial.
    pub fn chunks(&self) -> u64 {
        if self.chunk_size == 0 { 0 } else { self.virtual_size.div_ceil(u64::from(self.chunk_size)) }
    }

    /// Storage chunks of a compact image that lie wholly below file byte `end`.
    pub fn chunks_below(&self, end: u64) -> u64 {
        if self.chunk_size == 0 { 0 } else { end.saturating_sub(self.data_offset) / u64::from(self.chunk_size) }
    }

    /// First file byte of storage chunk `id` of a compact image.
    pub fn chunk_offset(&self, id: u64) -> u64 {
        self.data_offset + id * u64::from(self.chunk_size)
    }

    /// Units of the journal.
    pub fn journal_units(&self) -> u64 {
        self.region(RegionKind::Journal).map_or(0, Region::pages)
    }

    /// One past the last byte of guest data of a flat image, in the file that holds it.
    pub fn flat_data_end(&self) -> u64 {
        self.data_offset + self.virtual_size
    }

    /// Bytes the image file must have: shorter is an error, longer is tolerated.
    pub fn file_length_min(&self) -> u64 {
        if self.has_data_file() { self.regions_end() } else { self.guest_data_end().max(self.regions_end()) }
    }

    /// Bytes the data file must have, likewise; 0 without one.
    pub fn data_length_min(&self) -> u64 {
        if self.has_data_file() { self.guest_data_end() } else { 0 }
    }

    /// One past the last byte that guest data may lie in.
    fn guest_data_end(&self) -> u64 {
        let data = if self.is_compact() { self.data_offset } else { self.flat_data_end() };
        data.max(self.reach)
    }

    /// Copy `copy` (1 or 2) as it stands in the file.
    pub fn encode(&self, copy: usize) -> Vec<u8> {
        let mut page = vec![0; PAGE_SIZE];
        page[..8].copy_from_slice(&HEADER_MAGIC);
        put_u32(&mut page, at::LENGTH, PAGE_SIZE as u32);
        page[at::UUID..at::UUID + 16].copy_from_slice(&self.uuid);
        put_u64(&mut page, at::GENERATION, self.generation);
        put_u64(&mut page, at::VIRTUAL_SIZE, self.virtual_size);
        page[at::CRYPT_METHOD..at::CRYPT_METHOD + 4].copy_from_slice(&self.crypt_method.to_be_bytes());
        let state = if self.clean { STATE_CLEAN } else { 0 } | if self.pristine { STATE_PRISTINE } else { 0 };
        put_u32(&mut page, at::STATE, state);
        put_u64(&mut page, at::INCOMPATIBLE, self.incompatible);
        put_u64(&mut page, at::COMPATIBLE, self.compatible);
        put_u64(&mut page, at::AUTOCLEAR, self.autoclear);
        put_u32(&mut page, at::BLOCK_SIZE, self.block_size);
        put_u32(&mut page, at::CHUNK_SIZE, self.chunk_size);
        put_u64(&mut page, at::BASE_LENGTH, self.base_length);
        put_u64(&mut page, at::COVERED, self.covered);
        put_u64(&mut page, at::DATA_OFFSET, self.data_offset);
        put_u64(&mut page, at::STORAGE_GROW_UNIT, self.storage_grow_unit);
        put_u64(&mut page, at::REACH, self.reach);
        put_u64(&mut page, at::EPOCH, self.epoch);
        put_u64(&mut page, at::FIRST_SEQ, self.first_seq);
        put_u64(&mut page, at::FIRST_COMMIT, self.first_commit);
        put_u64(&mut page, at::LAST_BATCH, self.last_batch);
        put_u64(&mut page, at::LAST_CHECKPOINT, self.last_checkpoint);
        put_str(&mut page[at::BASE_NAME..at::BASE_NAME + PATH_MAX + 1], &self.base_name);
        put_str(&mut page[at::BASE_FORMAT..at::BASE_FORMAT + FORMAT_NAME_MAX + 1], &self.base_format);
        put_str(&mut page[at::DATA_NAME..at::DATA_NAME + PATH_MAX + 1], &self.data_name);
        put_str(&mut page[at::DATA_FORMAT..at::DATA_FORMAT + FORMAT_NAME_MAX + 1], &self.data_format);
        for (i, region) in self.regions.iter().enumerate() {
            if let Some(region) = region {
                let to = &mut page[at::REGIONS + i * at::REGION_SIZE..][..at::REGION_SIZE];
                put_u64(to, 0, region.offset);
                put_u64(to, 8, region.length);
                put_u32(to, 16, region.generation);
                put_u64(to, 24, region.map_first);
                put_u64(to, 32, region.count_sum);
            }
        }
        let crc = checksum::seeded(&self.uuid, checksum::kind::HEADER, copy as u64, &[&page[..at::CRC], &page[at::LENGTH..]]);
        put_u32(&mut page, at::CRC, crc);
        page
    }

    /// Parses and validates copy `copy` (1 or 2) of the image `uuid`.
    pub fn decode(uuid: &Uuid, copy: usize, page: &[u8]) -> Result<Self> {
        assert_eq!(page.len(), PAGE_SIZE);
        let crc = checksum::seeded(uuid, checksum::kind::HEADER, copy as u64, &[&page[..at::CRC], &page[at::LENGTH..]]);
        if page[..8] != HEADER_MAGIC || get_u32(page, at::CRC) != crc || page[at::UUID..at::UUID + 16] != *uuid {
            return Err(FormatError::new(Kind::Checksum, "header", format!("copy {copy}: checksum mismatch")));
        }
        let string = |from: usize, size: usize, field: &'static str| {
            get_str(&page[from..from + size]).ok_or_else(|| FormatError::invalid(field, "not NUL-padded UTF-8"))
        };
        let mut regions = [None; REGION_SLOTS];
        for (i, slot) in regions.iter_mut().enumerate() {
            let from = &page[at::REGIONS + i * at::REGION_SIZE..][..at::REGION_SIZE];
            let length = get_u64(from, 8);
            if length != 0 {
                *slot = Some(Region {
                    offset: get_u64(from, 0),
                    length,
                    generation: get_u32(from, 16),
                    map_first: get_u64(from, 24),
                    count_sum: get_u64(from, 32),
                });
            } else if !is_zero(from) {
                return Err(FormatError::invalid("region", format!("slot {i} has no length but other fields")));
            }
        }
        let state = get_u32(page, at::STATE);
        // Without the feature these bytes are reserved (FMT-2).
        let has_data_file = get_u64(page, at::INCOMPATIBLE) & incompatible::DATA_FILE != 0;
        let data_string = |from, size, field| if has_data_file { string(from, size, field) } else { Ok(String::new()) };
        let header = Self {
            uuid: *uuid,
            generation: get_u64(page, at::GENERATION),
            virtual_size: get_u64(page, at::VIRTUAL_SIZE),
            crypt_method: u32::from_be_bytes(page[at::CRYPT_METHOD..at::CRYPT_METHOD + 4].try_into().expect("four bytes")),
            clean: state & STATE_CLEAN != 0,
            pristine: state & STATE_PRISTINE != 0,
            incompatible: get_u64(page, at::INCOMPATIBLE),
            compatible: get_u64(page, at::COMPATIBLE),
            autoclear: get_u64(page, at::AUTOCLEAR),
            block_size: get_u32(page, at::BLOCK_SIZE),
            chunk_size: get_u32(page, at::CHUNK_SIZE),
            base_length: get_u64(page, at::BASE_LENGTH),
            covered: get_u64(page, at::COVERED),
            data_offset: get_u64(page, at::DATA_OFFSET),
            storage_grow_unit: get_u64(page, at::STORAGE_GROW_UNIT),
            reach: get_u64(page, at::REACH),
            epoch: get_u64(page, at::EPOCH),
            first_seq: get_u64(page, at::FIRST_SEQ),
            first_commit: get_u64(page, at::FIRST_COMMIT),
            last_batch: get_u64(page, at::LAST_BATCH),
            last_checkpoint: get_u64(page, at::LAST_CHECKPOINT),
            base_name: string(at::BASE_NAME, PATH_MAX + 1, "base name")?,
            base_format: string(at::BASE_FORMAT, FORMAT_NAME_MAX + 1, "base format")?,
            data_name: data_string(at::DATA_NAME, PATH_MAX + 1, "data file name")?,
            data_format: data_string(at::DATA_FORMAT, FORMAT_NAME_MAX + 1, "data file format")?,
            regions,
        };
        if state & !(STATE_CLEAN | STATE_PRISTINE) != 0 {
            return Err(FormatError::invalid("state", format!("unknown bits {state:#x}")));
        }
        if get_u32(page, at::LENGTH) != PAGE_SIZE as u32 {
            return Err(FormatError::invalid("header length", format!("{}", get_u32(page, at::LENGTH))));
        }
        header.validate()?;
        Ok(header)
    }

    /// Every rule that one header must satisfy by itself (FMT-10…FMT-19).
    pub fn validate(&self) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(FormatError::new(Kind::Unsupported, "incompatible features", format!("unknown bits {unknown:#x}")));
        }
        if self.crypt_method != 0 {
            return Err(FormatError::new(Kind::Unsupported, "crypt method", format!("{}", self.crypt_method)));
        }
        if self.virtual_size > VIRTUAL_SIZE_MAX || self.virtual_size % SECTOR != 0 {
            return Err(FormatError::invalid("virtual size", format!("{} is above {VIRTUAL_SIZE_MAX} or no multiple of 512", self.virtual_size)));
        }
        if self.generation == 0 || self.generation == u64::MAX || self.epoch == 0 || self.epoch == u64::MAX {
            return Err(FormatError::invalid("generation or epoch", "out of range"));
        }
        // Headroom: sequence arithmetic never overflows in the life of an image.
        for (name, value) in [
            ("first sequence", self.first_seq),
            ("first commit", self.first_commit),
            ("last batch", self.last_batch),
            ("last checkpoint", self.last_checkpoint),
        ] {
            if value > u64::MAX / 2 {
                return Err(FormatError::invalid(name, format!("{value}")));
            }
        }
        if self.reach > i64::MAX as u64 {
            return Err(FormatError::invalid("reach", format!("{}", self.reach)));
        }
        self.validate_chunks()?;
        self.validate_data()?;
        self.validate_base()?;
        self.validate_regions()
    }

    /// FMT-14, FMT-110.
    fn validate_data(&self) -> Result<()> {
        let (unit, least) = match (self.has_data_file(), self.is_compact()) {
            (true, _) => (SECTOR, 0),
            (false, true) => (u64::from(self.chunk_size), REGIONS_START),
            (false, false) => (PAGE_SIZE as u64, REGIONS_START),
        };
        let data = if self.is_compact() { 0 } else { self.virtual_size };
        if self.data_offset % unit != 0 || self.data_offset < least || self.data_offset.checked_add(data).is_none_or(|end| end > i64::MAX as u64) {
            return Err(FormatError::invalid("data offset", format!("{}", self.data_offset)));
        }
        match (self.has_data_file(), self.data_name.is_empty(), self.data_format.is_empty()) {
            (true, false, false) | (false, true, true) => Ok(()),
            (true, true, _) => Err(FormatError::invalid("data file name", "missing")),
            (true, false, true) => Err(FormatError::invalid("data file format", "missing")),
            (false, ..) => Err(FormatError::invalid("data file name", "set without the data-file feature")),
        }
    }

    /// FMT-13, FMT-75.
    fn validate_chunks(&self) -> Result<()> {
        if !self.is_compact() {
            if self.chunk_size != 0 || self.storage_grow_unit != 0 {
                return Err(FormatError::invalid("chunk size", "set without the compact feature"));
            }
            return Ok(());
        }
        if !self.chunk_size.is_power_of_two() || !(CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&self.chunk_size) || self.chunk_size < self.block_size {
            let text = format!("{} is no power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}, or smaller than a block", self.chunk_size);
            return Err(FormatError::invalid("chunk size", text));
        }
        if self.chunks() > CHUNKS_MAX {
            return Err(FormatError::invalid("virtual size", format!("{} chunks, at most {CHUNKS_MAX} fit", self.chunks())));
        }
        let unit = self.storage_grow_unit;
        if unit == 0 || unit % u64::from(self.chunk_size) != 0 || unit > i64::MAX as u64 {
            return Err(FormatError::invalid("storage grow unit", format!("{unit} is no multiple of the chunk size")));
        }
        match self.region(RegionKind::Table) {
            Some(table) if (self.chunks().div_ceil(PAYLOAD_ENTRIES)..=CHUNKS_MAX.div_ceil(PAYLOAD_ENTRIES)).contains(&table.pages()) => Ok(()),
            Some(table) => Err(FormatError::invalid("lookup table", format!("{} pages for {} chunks", table.pages(), self.chunks()))),
            None => Err(FormatError::invalid("lookup table", "missing")),
        }
    }

    fn validate_base(&self) -> Result<()> {
        if self.base_name.is_empty() != self.base_format.is_empty() {
            return Err(FormatError::invalid("base format", "a base needs a name and a format"));
        }
        if self.base_length != BASE_LENGTH_UNKNOWN && (self.base_length % SECTOR != 0 || self.base_length > VIRTUAL_SIZE_MAX) {
            return Err(FormatError::invalid("base length", format!("{}", self.base_length)));
        }
        let has_bitmap = self.region(RegionKind::Bitmap).is_some();
        if self.pristine && (has_bitmap || !self.clean) {
            return Err(FormatError::invalid("state", "pristine, but with a bitmap or not clean"));
        }
        if has_bitmap != (self.block_size != 0) || has_bitmap != (self.covered != 0) {
            return Err(FormatError::invalid("block size", "bitmap, block size and covered length go together"));
        }
        if !has_bitmap {
            return Ok(());
        }
        if !self.block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&self.block_size) {
            return Err(FormatError::invalid("block size", format!("{} is no power of two from 4096 to 2097152", self.block_size)));
        }
        // The block that holds the base's end is covered whole; of a compact image perhaps all others too.
        if self.covered > self.virtual_size || self.covered % SECTOR != 0 || (self.has_zero_bits() && !self.is_compact()) {
            return Err(FormatError::invalid("covered length", format!("{}", self.covered)));
        }
        Ok(())
    }

    fn validate_regions(&self) -> Result<()> {
        let mut taken: Vec<(u64, u64, &str)> = vec![(0, REGIONS_START, "header area")];
        if self.virtual_size > 0 && !self.is_compact() && !self.has_data_file() {
            taken.push((self.data_offset, self.flat_data_end(), "data"));
        }
        for (i, region) in self.regions.iter().enumerate() {
            let Some(region) = region else { continue };
            let bad = |what: &str| FormatError::invalid("region", format!("slot {i}: {what}"));
            let kind = RegionKind::from_u16(i as u16 + 1).ok_or_else(|| bad("unknown kind"))?;
            if self.incompatible & kind.feature() != kind.feature() {
                return Err(bad("belongs to a feature that is not set"));
            }
            let page = PAGE_SIZE as u64;
            if region.offset % page != 0 || region.length % page != 0 || region.generation == 0 {
                return Err(bad("offset, length or generation out of range"));
            }
            if region.offset.checked_add(region.length).is_none_or(|end| end > i64::MAX as u64) {
                return Err(bad("ends beyond the largest file"));
            }
            if !kind.is_mapped() && region.map_first != 0 {
                return Err(bad("is not covered by the page map"));
            }
            taken.push((region.offset, region.end(), "region"));
        }
        taken.sort_unstable();
        for pair in taken.windows(2) {
            if pair[0].1 > pair[1].0 {
                return Err(FormatError::invalid("region", format!("{} at {} overlaps {} at {}", pair[0].2, pair[0].0, pair[1].2, pair[1].0)));
            }
        }
        let Some(journal) = self.region(RegionKind::Journal) else {
            // An image with nothing that changes needs no journal, and then none of its helpers.
            return if self.regions.iter().all(Option::is_none) {
                Ok(())
            } else {
                Err(FormatError::invalid("journal", "missing"))
            };
        };
        if !(JOURNAL_SIZE_MIN..=JOURNAL_SIZE_MAX).contains(&journal.length) || journal.pages() % 2 != 0 {
            return Err(FormatError::invalid("journal", format!("length {}", journal.length)));
        }
        match self.region(RegionKind::DoubleWrite) {
            Some(area) if area.length == DOUBLE_WRITE_SIZE => {}
            _ => return Err(FormatError::invalid("double-write area", "missing or of another length")),
        }
        let map = self.region(RegionKind::PageMap).ok_or_else(|| FormatError::invalid("page map", "missing"))?;
        if let Some(bits) = self.region(RegionKind::Bitmap) {
            let pages = bitmap::pages(self.blocks());
            if bits.pages() != pages {
                return Err(FormatError::invalid("bitmap", format!("{} pages instead of {pages}", bits.pages())));
            }
        }
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for kind in RegionKind::ALL.into_iter().filter(|k| k.is_mapped()) {
            if let Some(region) = self.region(kind) {
                let end = region.map_first.checked_add(region.pages());
                match end {
                    Some(end) if end.div_ceil(PAYLOAD_BITS) <= map.pages() => ranges.push((region.map_first, end)),
                    _ => return Err(FormatError::invalid("page map", format!("too short for {kind:?}"))),
                }
            }
        }
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err(FormatError::invalid("page map", "two regions share bits"));
        }
        Ok(())
    }

    /// Of two copies as read, the one that counts: valid, with the higher generation (FMT-7).
    pub fn choose(uuid: &Uuid, copy1: &[u8], copy2: &[u8]) -> Result<Self> {
        Self::choose_decoded(Self::decode(uuid, 1, copy1), Self::decode(uuid, 2, copy2))
    }

    /// The same of copies that were decoded already.
    pub fn choose_decoded(copy1: Result<Self>, copy2: Result<Self>) -> Result<Self> {
        match (copy1, copy2) {
            (Ok(one), Ok(two)) if one.generation == two.generation && one != two => {
                Err(FormatError::invalid("header", "two copies of one generation differ"))
            }
            (Ok(one), Ok(two)) => Ok(if two.generation > one.generation { two } else { one }),
            (Ok(one), Err(error)) => if error.kind == Kind::Checksum { Ok(one) } else { Err(error) },
            (Err(error), Ok(two)) => if error.kind == Kind::Checksum { Ok(two) } else { Err(error) },
            (Err(error), Err(_)) => Err(error),
        }
    }
}

const _: () = assert!(PAYLOAD_SIZE % 8 == 0);

#[cfg(test)]
mod tests;
