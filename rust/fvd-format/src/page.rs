// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata pages: 4 KiB, a 32-byte header and 4,064 bytes of payload (FMT-20…).
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | CRC-32, seeded with UUID, region and page index, over bytes 4…4095 |
//! | 4 | 2 | region kind |
//! | 6 | 2 | reserved, 0 |
//! | 8 | 4 | generation of the region |
//! | 12 | 4 | write count: how often this page was written in place, from 1 |
//! | 16 | 8 | number of the checkpoint that wrote it |
//! | 24 | 8 | page index in the region |

use crate::codec::*;
use crate::error::{FormatError, Kind, Result};
use crate::limits::PAGE_SIZE;
use crate::{RegionKind, Uuid, checksum};

/// Bytes of a page's header.
pub const HEADER_SIZE: usize = 32;
/// Bytes of a page's payload.
pub const PAYLOAD_SIZE: usize = PAGE_SIZE - HEADER_SIZE;
/// Payload as 64-bit words.
pub const PAYLOAD_WORDS: usize = PAYLOAD_SIZE / 8;
/// Payload as bits (bitmap, page map).
pub const PAYLOAD_BITS: u64 = PAYLOAD_SIZE as u64 * 8;
/// Payload as 32-bit entries (table).
pub const PAYLOAD_ENTRIES: u64 = PAYLOAD_SIZE as u64 / 4;

/// Where a page belongs and which version of it this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// The region.
    pub kind: RegionKind,
    /// Generation of the region: a region built anew has a new one.
    pub generation: u32,
    /// Index of the page in its region.
    pub index: u64,
    /// How often this page was written in place, from 1.
    pub write_count: u32,
    /// The checkpoint that wrote it.
    pub checkpoint: u64,
}

fn crc(uuid: &Uuid, kind: u16, index: u64, page: &[u8]) -> u32 {
    checksum::seeded(uuid, u32::from(kind), index, &[&page[4..]])
}

/// Fills in `page`'s header and checksum; the payload stands in `page[HEADER_SIZE..]` already.
pub fn seal(uuid: &Uuid, header: &PageHeader, page: &mut [u8]) {
    assert_eq!(page.len(), PAGE_SIZE);
    assert!(header.write_count > 0);
    put_u16(page, 4, header.kind as u16);
    put_u16(page, 6, 0);
    put_u32(page, 8, header.generation);
    put_u32(page, 12, header.write_count);
    put_u64(page, 16, header.checkpoint);
    put_u64(page, 24, header.index);
    let crc = crc(uuid, header.kind as u16, header.index, page);
    put_u32(page, 0, crc);
}

/// A whole page: `words` sealed under `header`.
pub fn of_words(uuid: &Uuid, header: &PageHeader, words: &[u64]) -> Vec<u8> {
    assert!(words.len() <= PAYLOAD_WORDS);
    let mut page = vec![0; PAGE_SIZE];
    for (to, word) in page[HEADER_SIZE..].chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    seal(uuid, header, &mut page);
    page
}

/// Checks that `page` is page `index` of generation `generation` of region `kind` of this image.
pub fn open(uuid: &Uuid, kind: RegionKind, generation: u32, index: u64, page: &[u8]) -> Result<PageHeader> {
    assert_eq!(page.len(), PAGE_SIZE);
    let bad = |what: String| FormatError::new(Kind::Checksum, "metadata page", format!("page {index} of {kind:?}: {what}"));
    if get_u32(page, 0) != crc(uuid, kind as u16, index, page) {
        return Err(bad("checksum mismatch".into()));
    }
    if get_u16(page, 4) != kind as u16 || get_u64(page, 24) != index {
        return Err(bad("page of another place".into()));
    }
    if get_u32(page, 8) != generation {
        return Err(bad(format!("generation {} instead of {generation}", get_u32(page, 8))));
    }
    let write_count = get_u32(page, 12);
    if write_count == 0 || get_u16(page, 6) != 0 {
        return Err(bad("header fields out of range".into()));
    }
    Ok(PageHeader { kind, generation, index, write_count, checkpoint: get_u64(page, 16) })
}

/// The checksum a sealed page carries; the double-write head lists it.
pub fn stored_crc(page: &[u8]) -> u32 {
    get_u32(page, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (PageHeader, Vec<u8>) {
        let mut page = vec![0; PAGE_SIZE];
        for (i, b) in page.iter_mut().enumerate() {
            *b = (i * 7) as u8;
        }
        let header = PageHeader { kind: RegionKind::Bitmap, generation: 3, index: 9, write_count: 2, checkpoint: 77 };
        seal(&[5; 16], &header, &mut page);
        (header, page)
    }

    #[test]
    fn round_trip() {
        let (header, page) = sample();
        assert_eq!(open(&[5; 16], RegionKind::Bitmap, 3, 9, &page).unwrap(), header);
    }

    #[test]
    fn misdirected_foreign_and_stale_pages_are_refused() {
        let (_, page) = sample();
        assert!(open(&[5; 16], RegionKind::Bitmap, 3, 10, &page).is_err());
        assert!(open(&[5; 16], RegionKind::Table, 3, 9, &page).is_err());
        assert!(open(&[5; 16], RegionKind::Bitmap, 4, 9, &page).is_err());
        assert!(open(&[6; 16], RegionKind::Bitmap, 3, 9, &page).is_err());
        assert!(open(&[5; 16], RegionKind::Bitmap, 3, 9, &vec![0; PAGE_SIZE]).is_err());
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let (_, page) = sample();
        for bit in (0..PAGE_SIZE * 8).step_by(if cfg!(miri) { 4801 } else { 1 }) {
            let mut rotten = page.clone();
            rotten[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&[5; 16], RegionKind::Bitmap, 3, 9, &rotten).is_err(), "bit {bit}");
        }
    }
}
