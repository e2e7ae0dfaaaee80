// SPDX-License-Identifier: MIT OR Apache-2.0
//! CRC-32 (IEEE 802.3) with a seed, as every FVD structure uses it.
//!
//! Plain CRC-32 finds rot; seeding it with the image's UUID and the structure's own address also
//! finds whole pages that belong elsewhere (misdirected) or to another image (foreign).

use crate::Uuid;

/// A checksum of something that arrives in pieces.
pub struct Seeded(crc32fast::Hasher);

impl Seeded {
    /// Starts with `uuid`, `kind` (LE), `index` (LE).
    pub fn new(uuid: &Uuid, kind: u32, index: u64) -> Self {
        // In one piece: three short ones take longer.
        let mut seed = [0; 28];
        seed[..16].copy_from_slice(uuid);
        seed[16..20].copy_from_slice(&kind.to_le_bytes());
        seed[20..].copy_from_slice(&index.to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&seed);
        Self(hasher)
    }

    /// Adds the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// The checksum.
    pub fn finish(self) -> u32 {
        self.0.finalize()
    }
}

/// CRC-32 over `uuid`, `kind` (LE), `index` (LE), then `parts` in order.
pub fn seeded(uuid: &Uuid, kind: u32, index: u64, parts: &[&[u8]]) -> u32 {
    let mut crc = Seeded::new(uuid, kind, index);
    for part in parts {
        crc.update(part);
    }
    crc.finish()
}

/// Seed kinds of structures that are not region pages (regions use their own number, 1–16).
pub mod kind {
    /// Page 0.
    pub const PAGE_ZERO: u32 = 0x100;
    /// Header copy; index is the copy's number, 1 or 2.
    pub const HEADER: u32 = 0x101;
    /// Journal unit; index is the sequence number.
    pub const JOURNAL_UNIT: u32 = 0x102;
    /// Payload of a whole commit; index is the commit's number.
    pub const COMMIT: u32 = 0x103;
    /// Head of the double-write area; index is the batch's number.
    pub const BATCH: u32 = 0x104;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_ieee_802_3() {
        // The check value of CRC-32/ISO-HDLC for "123456789".
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn every_part_of_the_seed_counts() {
        let base = seeded(&[1; 16], 4, 7, &[b"abc"]);
        assert_ne!(base, seeded(&[2; 16], 4, 7, &[b"abc"]));
        assert_ne!(base, seeded(&[1; 16], 5, 7, &[b"abc"]));
        assert_ne!(base, seeded(&[1; 16], 4, 8, &[b"abc"]));
        assert_ne!(base, seeded(&[1; 16], 4, 7, &[b"abd"]));
        assert_eq!(base, seeded(&[1; 16], 4, 7, &[b"a", b"bc"]));
    }
}
