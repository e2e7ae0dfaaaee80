// SPDX-License-Identifier: MIT OR Apache-2.0
//! What cells of the disk hold: bytes that name the write they come from and their own address, so
//! that a stale, foreign or misplaced cell is recognised at sight.
//!
//! A cell is the unit of the oracle: 512 bytes, or less where requests are unaligned.

use crate::prng::mix;

/// The write a cell comes from. Small numbers are special; others count writes.
pub type Tag = u64;
/// Reads as zero.
pub const ZERO: Tag = 0;
/// Whatever the base has there; zero where there is no base.
pub const BASE: Tag = 1;
/// What non-zeroing storage held before the image was made.
pub const GARBAGE: Tag = 2;
/// The first tag of a write.
pub const FIRST_WRITE: Tag = 16;

/// Byte that non-zeroing storage is full of.
pub const GARBAGE_BYTE: u8 = 0xa5;
/// Largest cell: bytes. What a cut tears is a multiple of this.
pub const SECTOR: usize = 512;

/// The words of a cell after its first 16 bytes.
fn words(tag: Tag, index: u64) -> impl Iterator<Item = u64> {
    let first = mix(tag ^ index.rotate_left(32));
    (0..).map(move |i: u64| first.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Fills `to` with cell number `index` of write `tag`.
pub fn fill(tag: Tag, index: u64, to: &mut [u8]) {
    match tag {
        ZERO => to.fill(0),
        GARBAGE => to.fill(GARBAGE_BYTE),
        _ => {
            let (head, rest) = to.split_at_mut(16);
            head[..8].copy_from_slice(&tag.to_le_bytes());
            head[8..].copy_from_slice(&index.to_le_bytes());
            for (piece, word) in rest.chunks_exact_mut(8).zip(words(tag, index)) {
                piece.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// Whether `bytes` are cell number `index` of write `tag`.
pub fn matches(tag: Tag, index: u64, bytes: &[u8]) -> bool {
    match tag {
        ZERO => is_all(bytes, 0),
        GARBAGE => is_all(bytes, GARBAGE_BYTE),
        _ => {
            // Most cells that do not match differ in their first 16 bytes; the rest is compared without
            // an early end, so that the compiler takes many bytes at a time.
            let word = |piece: &[u8]| u64::from_le_bytes(piece.try_into().expect("eight bytes"));
            let (head, rest) = bytes.split_at(16);
            (word(&head[..8]), word(&head[8..])) == (tag, index)
                && rest.chunks_exact(8).zip(words(tag, index)).fold(0, |differ, (piece, expect)| differ | (word(piece) ^ expect)) == 0
        }
    }
}

fn is_all(bytes: &[u8], byte: u8) -> bool {
    let word = u64::from_ne_bytes([byte; 8]);
    let differs = |piece: &[u8]| u64::from_ne_bytes(piece.try_into().expect("eight bytes")) ^ word;
    // Most cells that are something else begin with something else.
    bytes.first() == Some(&byte) && bytes.chunks_exact(8).fold(0, |any, piece| any | differs(piece)) == 0
}

/// The tag that `bytes` claim to come from; for people and for a quick first look.
pub fn claimed(bytes: &[u8]) -> Tag {
    let word = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    if is_all(bytes, GARBAGE_BYTE) { GARBAGE } else { word }
}

/// Text for people: what `bytes` look like.
pub fn describe(bytes: &[u8]) -> String {
    let index = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    match claimed(bytes) {
        ZERO if is_all(bytes, 0) => "zero".into(),
        GARBAGE => "garbage of the storage".into(),
        BASE => format!("cell {index} of the base"),
        tag if matches(tag, index, bytes) => format!("cell {index} of write {tag}"),
        _ => format!("noise {:?}", &bytes[..16]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_told_apart() {
        for size in [16, 64, 512] {
            let mut cell = vec![0; size];
            fill(77, 5, &mut cell);
            assert!(matches(77, 5, &cell) && !matches(77, 6, &cell) && !matches(78, 5, &cell) && !matches(ZERO, 5, &cell));
            assert_eq!(claimed(&cell), 77);
            cell[size - 1] ^= 1;
            assert!(!matches(77, 5, &cell));
        }
        assert!(matches(ZERO, 9, &[0; 64]) && matches(GARBAGE, 9, &[GARBAGE_BYTE; 64]));
    }
}
