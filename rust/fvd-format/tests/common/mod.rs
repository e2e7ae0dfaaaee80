// SPDX-License-Identifier: MIT OR Apache-2.0
//! What several tests of the format share.
#![allow(dead_code)] // each test binary uses its part

use fvd_format::header::{BASE_LENGTH_UNKNOWN, REGION_SLOTS};
use fvd_format::{Header, Region, RegionKind};

/// `text` without anything but hexadecimal digits, as bytes.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    assert!(digits.len().is_multiple_of(2), "odd number of digits");
    digits.chunks_exact(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

/// Rows of 16 bytes as text; rows of zeros are left out.
pub fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (i, row) in bytes.chunks(16).enumerate().filter(|(_, row)| row.iter().any(|&b| b != 0)) {
        let cells: Vec<String> = row.iter().map(|b| format!("{b:02x}")).collect();
        out += &format!("{:04x}: {}\n", i * 16, cells.join(" "));
    }
    out
}

/// The image of section 25 of `docs/format.md`.
pub fn example() -> Header {
    let mut header = Header {
        uuid: std::array::from_fn(|i| i as u8),
        generation: 1,
        virtual_size: 64 << 20,
        crypt_method: 0,
        clean: true,
        pristine: false,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        block_size: 4096,
        chunk_size: 0,
        base_length: 16 << 20,
        covered: 16 << 20,
        data_offset: 0x30_0000,
        storage_grow_unit: 0,
        reach: 0,
        epoch: 1,
        first_seq: 0,
        first_commit: 1,
        last_batch: 0,
        last_checkpoint: 0,
        base_name: "base.raw".into(),
        base_format: "raw".into(),
        data_name: String::new(),
        data_format: String::new(),
        regions: [None; REGION_SLOTS],
    };
    let region = |offset, length, count_sum| Some(Region { offset, length, generation: 1, map_first: 0, count_sum });
    *header.region_mut(RegionKind::PageMap) = region(0x4_0000, 4096, 1);
    *header.region_mut(RegionKind::Bitmap) = region(0x4_1000, 4096, 0);
    *header.region_mut(RegionKind::DoubleWrite) = region(0x8_0000, 1 << 20, 0);
    *header.region_mut(RegionKind::Journal) = region(0x18_0000, 1 << 20, 0);
    header
}

/// A header in which every field differs from every other and from zero; not a valid one.
pub fn distinct() -> Header {
    let mut next = 0x1122_3344_5566_7700u64;
    let mut number = || {
        next += 0x0102_0304_0506_0709;
        next
    };
    Header {
        uuid: *b"distinctive-uuid",
        generation: number(),
        virtual_size: number(),
        crypt_method: number() as u32,
        clean: true,
        pristine: false,
        incompatible: number(),
        compatible: number(),
        autoclear: number(),
        block_size: number() as u32,
        chunk_size: number() as u32,
        base_length: BASE_LENGTH_UNKNOWN - 5,
        covered: number(),
        data_offset: number(),
        storage_grow_unit: number(),
        reach: number(),
        epoch: number(),
        first_seq: number(),
        first_commit: number(),
        last_batch: number(),
        last_checkpoint: number(),
        base_name: "templates/debian 13 é.raw".into(),
        base_format: "raw-format-name".into(),
        data_name: "data/disk é.img".into(),
        data_format: "another-format".into(),
        regions: std::array::from_fn(|_| {
            Some(Region { offset: number(), length: number(), generation: number() as u32, map_first: number(), count_sum: number() })
        }),
    }
}
