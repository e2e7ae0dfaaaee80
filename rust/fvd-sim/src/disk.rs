// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk with a volatile write cache.
//!
//! A completed change is durable only after a flush that began after it completed. At a power cut
//! any subset of the other changes survives, each torn at 512 bytes; a file's length is a change
//! like any other. Metadata writes may also lose whole pages: where a device's sectors are 4 KiB or
//! a write granule, the cut leaves neither old nor new there.

use crate::content::SECTOR;
use crate::prng::Prng;
use crate::store::Store;
use std::rc::Rc;

/// What a write, a zeroing, a discard or a truncation does to the file.
#[derive(Clone, Debug)]
pub enum Change {
    /// These bytes, from this offset on.
    Bytes(u64, Rc<Vec<u8>>),
    /// Zeroes.
    Zero(u64, u64),
    /// The file's length.
    Length(u64),
}

/// Applies a change.
pub fn apply(store: &mut Store, change: &Change) {
    match change {
        Change::Bytes(offset, bytes) => store.write(*offset, bytes),
        Change::Zero(offset, len) => store.zero(*offset, *len),
        Change::Length(len) => store.resize(*len),
    }
}

/// How a power cut treats what was not flushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// As a stream of random numbers says.
    Seeded(u64),
    /// Bit `i`: whether unflushed change `i` survives (the first 64, in order of completion; then
    /// those under way, in order of issue), whole or torn. Those of a data file come first.
    Subset {
        /// The bits.
        survivors: u64,
        /// What becomes of the survivor with the highest number, if it is a write.
        tear: Tear,
    },
}

/// How the last surviving write is torn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// Not at all.
    Whole,
    /// Only its first so many 512-byte sectors arrive.
    Sectors(u32),
    /// Its first so many 4 KiB pages arrive, the next is destroyed, the rest stays old. For
    /// metadata only.
    Destroyed(u32),
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// What a cut is sure to leave.
    pub stable: Store,
    /// What reads see.
    pub view: Store,
    /// Changes that are not durable, in order of completion; numbers are counted from `flushed`.
    unflushed: Vec<Change>,
    /// Changes flushed or dropped so far.
    flushed: u64,
    /// File bytes below this are metadata, where a cut may destroy pages.
    pub metadata_end: u64,
    /// What the storage tears metadata at: bytes.
    pub granule: usize,
}

/// What a destroyed page is full of.
const DESTROYED: u8 = 0xdb;

impl Disk {
    /// A disk that holds `bytes`, all of it durable.
    pub fn new(bytes: Store) -> Self {
        Self { view: bytes.clone(), stable: bytes, granule: 4096, ..Self::default() }
    }

    /// Performs a change; not durable yet.
    pub fn change(&mut self, change: Change) {
        apply(&mut self.view, &change);
        self.unflushed.push(change);
    }

    /// The mark a flush that begins now goes by.
    pub fn mark(&self) -> u64 {
        self.flushed + self.unflushed.len() as u64
    }

    /// Makes everything before `mark` durable.
    pub fn flush(&mut self, mark: u64) {
        let upto = mark.saturating_sub(self.flushed) as usize;
        for change in self.unflushed.drain(..upto) {
            apply(&mut self.stable, &change);
        }
        self.flushed += upto as u64;
    }

    /// A flush that failed: what it was to write is no longer written by any other, though reads
    /// still see it. Some of it arrived.
    pub fn flush_failed(&mut self, mark: u64, prng: &mut Prng) {
        let upto = mark.saturating_sub(self.flushed) as usize;
        let arrives = prng.pick(&[0, 0, 30, 80]);
        for change in self.unflushed.drain(..upto) {
            if prng.chance(arrives) {
                apply(&mut self.stable, &change);
            }
        }
        self.flushed += upto as u64;
    }

    /// Number of changes that are not durable.
    pub fn unflushed(&self) -> &[Change] {
        &self.unflushed
    }

    /// What is left if the power goes, with `under_way` not complete.
    pub fn cut(&self, under_way: &[Change], keep: &Keep) -> Store {
        let mut left = self.stable.clone();
        match keep {
            Keep::Seeded(seed) => self.cut_seeded(&mut left, under_way, &mut Prng::new(*seed)),
            Keep::Subset { survivors, tear } => {
                let last = 63u32.saturating_sub(survivors.leading_zeros()) as usize;
                let all = self.unflushed.iter().chain(under_way);
                for (i, change) in all.enumerate().take(64).filter(|(i, _)| survivors >> i & 1 == 1) {
                    survive(&mut left, change, if i == last { *tear } else { Tear::Whole });
                }
            }
        }
        left
    }

    fn cut_seeded(&self, left: &mut Store, under_way: &[Change], prng: &mut Prng) {
        let mut all: Vec<&Change> = self.unflushed.iter().collect();
        for change in under_way {
            // It may have reached the disk before others that completed earlier.
            let at = prng.below(all.len().min(8) as u64 + 1) as usize;
            all.insert(all.len() - at, change);
        }
        let mode = prng.below(7);
        let odds = prng.pick(&[10, 50, 90]);
        for change in all {
            match (change, mode) {
                (_, 0) => {}
                (_, 1) => apply(left, change),
                (Change::Bytes(offset, bytes), 4 | 5) => {
                    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                        if prng.chance(odds) {
                            left.write(offset + (i * SECTOR) as u64, sector);
                        }
                    }
                }
                (Change::Bytes(offset, bytes), 6) if offset + bytes.len() as u64 <= self.metadata_end => self.destroy(left, *offset, bytes, prng),
                _ => {
                    if prng.chance(odds) {
                        apply(left, change);
                    }
                }
            }
        }
    }

    /// Parts arrive, parts stay, parts are destroyed: in the units that the storage tears.
    fn destroy(&self, left: &mut Store, offset: u64, bytes: &[u8], prng: &mut Prng) {
        let whole = offset.is_multiple_of(self.granule as u64) && bytes.len().is_multiple_of(self.granule);
        let unit = if whole { self.granule } else { 4096 };
        for (i, part) in bytes.chunks(unit).enumerate() {
            let at = offset + (i * unit) as u64;
            match prng.below(3) {
                0 => left.write(at, part),
                1 => left.write(at, &vec![DESTROYED; part.len()]),
                _ => {}
            }
        }
    }
}

fn survive(left: &mut Store, change: &Change, tear: Tear) {
    match (change, tear) {
        (Change::Bytes(offset, bytes), Tear::Sectors(n)) => left.write(*offset, &bytes[..bytes.len().min(n as usize * SECTOR)]),
        (Change::Bytes(offset, bytes), Tear::Destroyed(n)) => {
            let whole = bytes.len().min(n as usize * 4096);
            left.write(*offset, &bytes[..whole]);
            let gone = (bytes.len() - whole).min(4096);
            left.write(offset + whole as u64, &vec![DESTROYED; gone]);
        }
        _ => apply(left, change),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_completed_before_it_began() {
        let mut disk = Disk::new(Store::default());
        let bytes = |b: u8| Rc::new(vec![b; 512]);
        disk.change(Change::Bytes(0, bytes(1)));
        let mark = disk.mark();
        disk.change(Change::Bytes(512, bytes(2)));
        let second = disk.mark();
        disk.flush(mark);
        assert_eq!(disk.stable.bytes(0, 1024), [[1; 512], [0; 512]].concat());
        disk.flush(mark);
        let none = Keep::Subset { survivors: 0, tear: Tear::Whole };
        assert_eq!(disk.cut(&[], &none).len(), 512);
        let all = Keep::Subset { survivors: 1, tear: Tear::Whole };
        assert_eq!(disk.cut(&[], &all).bytes(512, 1), [2]);
        disk.flush_failed(second, &mut Prng::new(1));
        assert_eq!(disk.view.len(), 1024);
        disk.flush(disk.mark());
        assert_eq!(disk.unflushed().len(), 0);
    }
}
