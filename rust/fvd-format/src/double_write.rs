// SPDX-License-Identifier: MIT OR Apache-2.0
//! Head of the double-write area (FMT-40…): one 4 KiB page, followed by the batch's pages.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | CRC-32, seeded with UUID and batch number, over bytes 4…4095 |
//! | 4 | 4 | number of pages, 1–254 |
//! | 8 | 8 | batch number |
//! | 16 | 16 | reserved, 0 |
//! | 32 | 16 each | region kind u16, reserved u16, the page's CRC u32, page index u64 |

use crate::codec::*;
use crate::error::{FormatError, Kind, Result};
use crate::limits::{DOUBLE_WRITE_SIZE, PAGE_SIZE};
use crate::{RegionKind, Uuid, checksum};

/// Most pages one batch can hold: what the head can list, which is below what the area holds.
pub const BATCH_PAGES_MAX: usize = (PAGE_SIZE - 32) / 16;
const _: () = assert!(BATCH_PAGES_MAX as u64 + 1 <= DOUBLE_WRITE_SIZE / PAGE_SIZE as u64);

/// One page of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchEntry {
    /// Region of the page.
    pub kind: RegionKind,
    /// Index in the region.
    pub index: u64,
    /// The checksum the page carries.
    pub crc: u32,
}

/// A batch: its number and its pages, in the order they follow the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Batch number; it counts only if greater than the header's last finished one.
    pub number: u64,
    /// The pages.
    pub entries: Vec<BatchEntry>,
}

impl Batch {
    /// The head page.
    pub fn encode(&self, uuid: &Uuid) -> Vec<u8> {
        assert!((1..=BATCH_PAGES_MAX).contains(&self.entries.len()));
        let mut page = vec![0; PAGE_SIZE];
        put_u32(&mut page, 4, self.entries.len() as u32);
        put_u64(&mut page, 8, self.number);
        for (i, entry) in self.entries.iter().enumerate() {
            let at = 32 + 16 * i;
            put_u16(&mut page, at, entry.kind as u16);
            put_u32(&mut page, at + 4, entry.crc);
            put_u64(&mut page, at + 8, entry.index);
        }
        let crc = checksum::seeded(uuid, checksum::kind::BATCH, self.number, &[&page[4..]]);
        put_u32(&mut page, 0, crc);
        page
    }

    /// Parses a head page; an error means that no batch was completely written here.
    pub fn decode(uuid: &Uuid, page: &[u8]) -> Result<Self> {
        assert_eq!(page.len(), PAGE_SIZE);
        let bad = |detail: &str| FormatError::new(Kind::Checksum, "double-write head", detail);
        let number = get_u64(page, 8);
        if get_u32(page, 0) != checksum::seeded(uuid, checksum::kind::BATCH, number, &[&page[4..]]) {
            return Err(bad("checksum mismatch"));
        }
        let count = get_u32(page, 4) as usize;
        if !(1..=BATCH_PAGES_MAX).contains(&count) {
            return Err(bad("number of pages out of range"));
        }
        let mut entries = Vec::with_capacity(count);
        for i in 0..count {
            let at = 32 + 16 * i;
            let kind = RegionKind::from_u16(get_u16(page, at)).ok_or_else(|| bad("unknown region"))?;
            entries.push(BatchEntry { kind, crc: get_u32(page, at + 4), index: get_u64(page, at + 8) });
        }
        Ok(Self { number, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_rot() {
        let batch = Batch {
            number: 42,
            entries: (0..BATCH_PAGES_MAX as u64).map(|i| BatchEntry { kind: RegionKind::Bitmap, index: i, crc: i as u32 ^ 0xdead }).collect(),
        };
        let page = batch.encode(&[7; 16]);
        assert_eq!(Batch::decode(&[7; 16], &page).unwrap(), batch);
        assert!(Batch::decode(&[8; 16], &page).is_err());
        for bit in (0..PAGE_SIZE * 8).step_by(if cfg!(miri) { 6101 } else { 61 }) {
            let mut rotten = page.clone();
            rotten[bit / 8] ^= 1 << (bit % 8);
            assert!(Batch::decode(&[7; 16], &rotten).is_err(), "bit {bit}");
        }
    }
}
