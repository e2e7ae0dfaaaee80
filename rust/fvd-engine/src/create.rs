// SPDX-License-Identifier: MIT OR Apache-2.0
//! Creating an image. Page 0 is wiped first and written last, so that a creation cut short never
//! looks like an image (FMT-9).

use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind, OwnBuf, STATUS_DATA};
use crate::image::{State, faulty};
use crate::io::{BOUNCE_MAX, ENOMEDIUM, bare, ceil, result_of};
use crate::layout::{REGION_ALIGNMENT, place_regions};
use crate::request::{CreateParams, Preallocation};
use crate::resize::{check_base, check_path};
use bitvec::prelude::*;
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS, REGION_SLOTS, compatible, incompatible};
use fvd_format::limits::*;
use fvd_format::page::{PAYLOAD_ENTRIES, PAYLOAD_WORDS};
use fvd_format::{Header, PageZero, RegionKind};
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// With blocks of a given size, a bitmap does not go on behind the base if it would be longer: bytes.
const ZERO_BITS_MAX: u64 = 8 * OWN_BITS_DEFAULT_MAX;

/// Zeroing is asked for in steps of this, so that one request stays short: bytes.
const ZERO_STEP: u64 = 1 << 30;

impl<H: Host> Queue<H> {
    /// Makes a new image.
    pub(crate) async fn create(self: &Rc<Self>, params: &CreateParams) -> Result<()> {
        let image = self.image().clone();
        if image.state() != State::New {
            return fail(Kind::State, "an image is created through a handle that is not open");
        }
        image.check_writable()?;
        check_base(&params.base_name, &params.base_format)?;
        check_data_file(&params.data_name, &params.data_format)?;
        image.map.two_files.store(!params.data_name.is_empty(), Ordering::Release);
        let mut header = self.plan(params).await?;
        if header.is_compact() && !header.pristine && header.covered < header.virtual_size && !image.zeroing_is_dear() && !image.limits(FileId::Image).grows_zeroed {
            // The image to be overwritten has nothing there.
            self.probe_zeroing().await?;
            if image.zeroing_is_dear() {
                header = self.plan(params).await?;
            }
        }
        let holes = self.find_holes(params, &header).await?;
        self.write_image(params, header, holes).await
    }

    /// Derives the header from the parameters.
    async fn plan(self: &Rc<Self>, params: &CreateParams) -> Result<Header> {
        let has_base = !params.base_name.is_empty();
        let mut base_length = if has_base { BASE_LENGTH_UNKNOWN } else { 0 };
        if has_base {
            let (ret, op) = self.io(bare(OpKind::GetLength, FileId::Base, 0, 0)).await;
            if ret != -i64::from(ENOMEDIUM) {
                let length = result_of(&op, ret).map_err(|error| error.context(&format!("the base '{}'", params.base_name)))?;
                base_length = ceil(length as u64, SECTOR);
            }
        }
        let virtual_size = match params.virtual_size {
            Some(size) => size,
            None if has_base && base_length != BASE_LENGTH_UNKNOWN => base_length,
            None => return fail(Kind::Invalid, "a size is needed: there is no base, or its length is not known"),
        };
        if virtual_size > VIRTUAL_SIZE_MAX - (1 << 40) || !virtual_size.is_multiple_of(SECTOR) {
            return fail(Kind::OutOfRange, format!("size {virtual_size} is above the largest disk or no multiple of 512"));
        }
        let journal_size = if params.journal_size == 0 { JOURNAL_SIZE_DEFAULT } else { params.journal_size };
        if !(JOURNAL_SIZE_MIN..=JOURNAL_SIZE_MAX).contains(&journal_size) || !journal_size.is_multiple_of(REGION_ALIGNMENT) {
            return fail(Kind::Invalid, format!("journal_size {journal_size} is not from {JOURNAL_SIZE_MIN} to {JOURNAL_SIZE_MAX} in multiples of {REGION_ALIGNMENT}"));
        }
        if params.block_size != 0 && (!params.block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&params.block_size)) {
            return fail(Kind::Invalid, format!("block_size {} is no power of two from {BLOCK_SIZE_MIN} to {BLOCK_SIZE_MAX}", params.block_size));
        }
        let (chunk_size, storage_grow_unit) = plan_chunks(params, virtual_size, self.image().data_limits().grows_zeroed)?;
        if params.compact && params.block_size > chunk_size {
            return fail(Kind::Invalid, format!("block_size {} is larger than chunk_size {chunk_size}", params.block_size));
        }
        if params.detect_sparse_hole != 0 && !has_base {
            return fail(Kind::Invalid, "detect_sparse_hole needs a base");
        }
        let counted = if base_length == BASE_LENGTH_UNKNOWN { virtual_size } else { base_length.min(virtual_size) };
        // Where zeroing is dear the bitmap goes on behind the base, to say what is zero.
        let zero_bits = params.compact && params.preallocation == Preallocation::Off && self.image().zeroing_is_dear();
        let block_size = match params.block_size {
            _ if counted == 0 => 0,
            0 if zero_bits => default_block_size(counted).max(default_own_grain(virtual_size)).min(chunk_size),
            0 if params.compact => default_block_size(counted).min(chunk_size),
            0 => default_block_size(counted),
            given => given,
        };
        // The base's last block is covered whole, so that no host sector is half covered.
        let covered = match u64::from(block_size) {
            0 => 0,
            block if zero_bits && virtual_size.div_ceil(block) / 8 <= ZERO_BITS_MAX => virtual_size,
            block => ceil(counted, block).min(virtual_size),
        };
        let mut uuid = [0; 16];
        self.host().random(&mut uuid);
        let mut header = Header {
            uuid,
            generation: 1,
            virtual_size,
            crypt_method: 0,
            clean: true,
            // Without a base nothing is tracked until the first write, which may find one (FMT-140).
            pristine: !has_base && (params.compact || self.image().data_limits().grows_zeroed) && params.preallocation == Preallocation::Off,
            incompatible: if params.compact { incompatible::COMPACT } else { 0 } | if params.data_name.is_empty() { 0 } else { incompatible::DATA_FILE },
            compatible: if self.image().data_limits().grows_zeroed { 0 } else { compatible::NON_ZEROING },
            autoclear: 0,
            block_size,
            chunk_size,
            base_length,
            covered,
            data_offset: 0,
            storage_grow_unit,
            reach: 0,
            epoch: 1,
            first_seq: 0,
            first_commit: 1,
            last_batch: 0,
            last_checkpoint: 0,
            base_name: params.base_name.clone(),
            base_format: params.base_format.clone(),
            data_name: params.data_name.clone(),
            data_format: params.data_format.clone(),
            regions: [None; REGION_SLOTS],
        };
        place_regions(&mut header, journal_size, zero_bits);
        if params.compact {
            let mapped = if params.preallocation == Preallocation::Off { 0 } else { header.chunks() };
            header.reach = header.chunk_offset(mapped);
        }
        header.validate()?;
        Ok(header)
    }

    /// Blocks that are zero in the base, in runs that are long enough; `None` if not asked for.
    async fn find_holes(self: &Rc<Self>, params: &CreateParams, header: &Header) -> Result<Option<BitVec<u64, Lsb0>>> {
        if params.detect_sparse_hole == 0 || header.covered == 0 {
            return Ok(None);
        }
        if header.base_length == BASE_LENGTH_UNKNOWN {
            return fail(Kind::Invalid, format!("detect_sparse_hole: the base '{}' cannot be read", params.base_name));
        }
        if !self.image().data_limits().grows_zeroed {
            // A preset bit promises zeroes that this storage does not have (R7).
            self.host().log(LogLevel::Warning, "detect_sparse_hole is ignored: the storage does not read as zero");
            return Ok(None);
        }
        let block = u64::from(header.block_size);
        let mut zero: BitVec<u64, Lsb0> = bitvec![u64, Lsb0; 0; header.blocks() as usize];
        let mut at = 0;
        while at < header.covered {
            let ask = (header.covered - at).min(ZERO_STEP);
            let status = self.op(bare(OpKind::BaseStatus, FileId::Base, at, ask)).await?;
            let len = (status & !STATUS_DATA) as u64;
            if len == 0 || len > ask {
                return fail(Kind::Host(5), format!("the host answered {len} to a block status of {ask} bytes"));
            }
            if status & STATUS_DATA == 0 {
                let (first, end) = (at.div_ceil(block), if at + len == header.covered { header.blocks() } else { (at + len) / block });
                if first < end {
                    zero[first as usize..end as usize].fill(true);
                }
                at += len;
                continue;
            }
            // Whole blocks, a buffer at a time; a run that ends within a block counts as data there.
            let stop = ceil(at + len, block).min(header.covered);
            at = at / block * block;
            while at < stop {
                let n = (stop - at).min(BOUNCE_MAX.max(block));
                let bytes = self.read_base_created(header, at, n).await?;
                for (i, piece) in bytes.chunks(block as usize).enumerate() {
                    zero.set((at / block) as usize + i, piece.iter().all(|&b| b == 0));
                }
                at += n;
            }
        }
        // Runs shorter than asked for are not worth a fragment.
        let least = params.detect_sparse_hole.div_ceil(block).max(1) as usize;
        let mut from = 0;
        while let Some(start) = zero[from..].first_one().map(|i| from + i) {
            let end = zero[start..].first_zero().map_or(zero.len(), |i| start + i);
            if end - start < least {
                zero[start..end].fill(false);
            }
            from = end;
        }
        Ok(Some(zero))
    }

    /// Reads the base before the image is open.
    async fn read_base_created(self: &Rc<Self>, header: &Header, at: u64, len: u64) -> Result<Vec<u8>> {
        assert!(at < header.base_length, "the bitmap covers whole blocks of the base");
        let mut out = vec![0; len as usize];
        let usable = (header.base_length - at).min(len);
        let (buf, skip) = self.read_own(FileId::Base, at, usable).await?;
        buf.for_each(skip, usable as usize, |i, piece| out[i..i + piece.len()].copy_from_slice(piece));
        Ok(out)
    }

    async fn write_image(self: &Rc<Self>, params: &CreateParams, mut header: Header, holes: Option<BitVec<u64, Lsb0>>) -> Result<()> {
        let image = self.image().clone();
        let data = image.data_file();
        let total = ceil(header.file_length_min(), PAGE_SIZE as u64);
        let length = self.op(bare(OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        if !image.limits(FileId::Image).grows_zeroed && length < total {
            return fail(Kind::NoSpace, format!("the storage has {length} bytes, the image needs {total}"));
        }
        let data_end = if data == FileId::Data { ceil(header.data_length_min(), image.data_end_unit()) } else { total };
        if data == FileId::Data {
            let length = self.op(bare(OpKind::GetLength, data, 0, 0)).await? as u64;
            if !image.data_limits().grows_zeroed && length < data_end {
                return fail(Kind::NoSpace, format!("the storage of the data file has {length} bytes, the disk needs {data_end}"));
            }
        }
        if length >= PAGE_SIZE as u64 && !faulty!(image, CreateKeepsPageZero) {
            self.write_own(FileId::Image, 0, OwnBuf::zeroed(PAGE_SIZE), PAGE_SIZE as u64).await?;
            self.sync().await?;
        }
        let files = [(FileId::Image, total), (FileId::Data, data_end)];
        for (file, end) in files.into_iter().filter(|(file, _)| [FileId::Image, data].contains(file)) {
            if image.limits(file).grows_zeroed {
                self.op(bare(OpKind::Truncate, file, 0, 0)).await?;
                self.op(bare(OpKind::Truncate, file, end, 0)).await?;
            }
        }
        // Metadata is really allocated: a commit must never find the storage full.
        for region in header.regions.iter().flatten() {
            self.op(bare(OpKind::WriteZeroes { may_unmap: false }, FileId::Image, region.offset, region.length)).await?;
        }
        self.preallocate(params.preallocation, &header, data_end).await?;
        let preallocated = header.is_compact() && params.preallocation != Preallocation::Off;
        let chunks = header.chunks();
        let words = |kind: RegionKind, index: u64| {
            if kind == RegionKind::Table {
                return preallocated.then(|| identity_page(index, chunks));
            }
            let words = holes.as_ref()?.as_raw_slice().chunks(PAYLOAD_WORDS).nth(index as usize)?;
            words.iter().any(|&w| w != 0).then(|| words.to_vec())
        };
        self.write_new_regions(&mut header, words).await?;
        for copy in [2, 1] {
            self.write_own(FileId::Image, HEADER_OFFSETS[copy - 1], OwnBuf::from_slice(&header.encode(copy)), PAGE_SIZE as u64).await?;
        }
        if !faulty!(image, CreateNotSynced) {
            self.sync().await?;
        }
        if data == FileId::Data && !faulty!(image, DataNotSyncedAtCreation) {
            self.sync_data().await?;
        }
        let zero = PageZero { uuid: header.uuid };
        self.write_own(FileId::Image, 0, OwnBuf::from_slice(&zero.encode()), PAGE_SIZE as u64).await?;
        self.sync().await
    }

    async fn preallocate(self: &Rc<Self>, how: Preallocation, header: &Header, end: u64) -> Result<()> {
        let mut at = header.data_offset;
        let file = self.image().data_file();
        let zeroed = self.image().data_limits().grows_zeroed;
        while at < end {
            let n = match how {
                Preallocation::Off => return Ok(()),
                // Chunks that have their place read as zero.
                Preallocation::Metadata if zeroed || !header.is_compact() => return Ok(()),
                Preallocation::Metadata | Preallocation::Falloc => {
                    let n = (end - at).min(ZERO_STEP);
                    self.op(bare(OpKind::WriteZeroes { may_unmap: false }, file, at, n)).await?;
                    n
                }
                Preallocation::Full => {
                    let n = (end - at).min(BOUNCE_MAX);
                    self.write_own(file, at, OwnBuf::zeroed(n as usize), n).await?;
                    n
                }
            };
            at += n;
        }
        Ok(())
    }
}

/// Checks the name and format of a data file.
fn check_data_file(name: &str, format: &str) -> Result<()> {
    check_path("data file", name)?;
    match (name.is_empty(), format) {
        (true, "") | (false, "raw") => Ok(()),
        (true, _) => fail(Kind::Invalid, format!("a data file format '{format}' without a data file")),
        (false, "") => fail(Kind::Invalid, format!("the format of the data file '{name}' is missing; it is never guessed")),
        (false, _) => fail(Kind::Unsupported, format!("data file '{name}': format '{format}' is not supported, only raw")),
    }
}

/// Chunk size and growth step; 0 unless the image is to be compact.
fn plan_chunks(params: &CreateParams, virtual_size: u64, grows_zeroed: bool) -> Result<(u32, u64)> {
    if !params.compact {
        return match (params.chunk_size, params.storage_grow_unit) {
            (0, 0) => Ok((0, 0)),
            _ => fail(Kind::Invalid, "chunk_size and storage_grow_unit need compact_image=on"),
        };
    }
    let mut chunk = if params.chunk_size == 0 { CHUNK_SIZE_DEFAULT.max(params.block_size) } else { params.chunk_size };
    if !chunk.is_power_of_two() || !(CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&chunk) {
        return fail(Kind::Invalid, format!("chunk_size {chunk} is no power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}"));
    }
    while params.chunk_size == 0 && chunk < CHUNK_SIZE_MAX && virtual_size.div_ceil(u64::from(chunk)) > CHUNKS_MAX {
        chunk *= 2;
    }
    let chunks = virtual_size.div_ceil(u64::from(chunk));
    if chunks > CHUNKS_MAX {
        return fail(Kind::OutOfRange, format!("size {virtual_size} needs {chunks} chunks of {chunk} bytes, at most {CHUNKS_MAX} fit"));
    }
    let unit = match params.storage_grow_unit {
        // A step is zeroed on storage that does not read as zero.
        0 => if grows_zeroed { default_grow_unit(virtual_size) } else { STORAGE_GROW_UNIT_DEFAULT }.max(u64::from(chunk)),
        given => given,
    };
    check_grow_unit(unit, chunk)?;
    Ok((chunk, unit))
}

/// Checks the growth step of a compact image.
pub(crate) fn check_grow_unit(unit: u64, chunk: u32) -> Result<()> {
    if unit == 0 || !unit.is_multiple_of(u64::from(chunk)) || unit > STORAGE_GROW_UNIT_MAX {
        return fail(Kind::Invalid, format!("storage_grow_unit {unit} is no multiple of chunk_size {chunk}, or above {STORAGE_GROW_UNIT_MAX}"));
    }
    Ok(())
}

/// Page `index` of a table of `chunks` chunks in which each has the storage chunk of its number.
fn identity_page(index: u64, chunks: u64) -> Vec<u64> {
    let first = index * PAYLOAD_ENTRIES;
    let entry = |n: u64| if n < chunks { n + 1 } else { 0 };
    (0..PAYLOAD_WORDS as u64).map(|word| entry(first + 2 * word) | entry(first + 2 * word + 1) << 32).collect()
}
