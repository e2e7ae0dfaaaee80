// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lookup table in memory: 32-bit entries, two to a word of the pages that hold them.
//!
//! Readers are lock-free. An entry is stored with release order after the data it exposes was
//! written; entries change only under the mutex of the metadata.

use crate::bits::{Bits, SEGMENT_BITS};
use fvd_format::page::PAYLOAD_ENTRIES;

/// Bits of an entry.
pub(crate) const ENTRY_BITS: u64 = 32;

/// Page that holds entry `entry`.
pub(crate) fn page_of_entry(entry: u64) -> u64 {
    entry / PAYLOAD_ENTRIES
}

/// What some entries start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryRun {
    /// `count` (> 0) guest chunks have no storage.
    Free {
        /// How many.
        count: u64,
    },
    /// `count` (> 0) guest chunks lie one behind the other, from storage chunk `id` on.
    Chunks {
        /// The first one.
        id: u64,
        /// How many.
        count: u64,
    },
    /// The segment is not in memory.
    Missing(u64),
    /// The page of the first entry is damaged.
    Bad,
}

impl Bits {
    /// The value of entry `entry`, whose segment is loaded.
    pub(crate) fn entry(&self, entry: u64) -> u32 {
        let word = self.word(entry / 2).expect("segment loaded before its entries are read");
        (word >> (entry % 2 * ENTRY_BITS)) as u32
    }

    /// Changes entry `entry`. The caller holds the metadata's mutex.
    pub(crate) fn set_entry(&self, entry: u64, value: u32) {
        let shift = entry % 2 * ENTRY_BITS;
        self.replace_in_word(entry / 2, u64::from(u32::MAX) << shift, u64::from(value) << shift);
    }

    /// The run that starts at entry `first` and ends before `end`, within one segment.
    #[inline]
    pub(crate) fn entry_run(&self, first: u64, end: u64) -> EntryRun {
        let index = first * ENTRY_BITS / SEGMENT_BITS;
        let Some(segment) = self.segment(index) else { return EntryRun::Missing(index) };
        if segment.any_bad() && self.is_bad(page_of_entry(first)) {
            return EntryRun::Bad;
        }
        let base = index * (SEGMENT_BITS / ENTRY_BITS);
        let mut to = (end - base).min(SEGMENT_BITS / ENTRY_BITS);
        if segment.any_bad() {
            to = to.min((page_of_entry(first) + 1) * PAYLOAD_ENTRIES - base);
        }
        let at = |entry: u64| (segment.word((entry / 2) as usize) >> (entry % 2 * ENTRY_BITS)) as u32;
        let from = first - base;
        let value = at(from);
        let step = u32::from(value != 0);
        let count = (1..to - from).take_while(|k| at(from + k) == value.wrapping_add(step * *k as u32)).count() as u64 + 1;
        match value {
            0 => EntryRun::Free { count },
            _ => EntryRun::Chunks { id: u64::from(value) - 1, count },
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::bits::Segment;

    #[test]
    fn runs_of_entries() {
        let table = Bits::new(100 * ENTRY_BITS);
        assert_eq!(table.entry_run(3, 9), EntryRun::Missing(0));
        table.insert(0, Segment::initial());
        assert_eq!(table.entry_run(3, 9), EntryRun::Free { count: 6 });
        for (entry, value) in [(4, 11), (5, 12), (6, 13), (7, 15), (8, 16)] {
            table.set_entry(entry, value);
        }
        assert_eq!(table.entry_run(3, 100), EntryRun::Free { count: 1 });
        assert_eq!(table.entry_run(4, 100), EntryRun::Chunks { id: 10, count: 3 });
        assert_eq!(table.entry_run(5, 6), EntryRun::Chunks { id: 11, count: 1 });
        assert_eq!(table.entry_run(7, 100), EntryRun::Chunks { id: 14, count: 2 });
        assert_eq!(table.entry_run(9, 100), EntryRun::Free { count: 91 });
        table.set_entry(5, 0);
        assert_eq!((table.entry(4), table.entry(5), table.entry(6)), (11, 0, 13));
    }

    #[test]
    fn runs_stop_before_bad_pages() {
        let end = 3 * PAYLOAD_ENTRIES;
        let table = Bits::new(end * ENTRY_BITS);
        table.insert(0, Segment::initial());
        assert_eq!(table.entry_run(3, end), EntryRun::Free { count: end - 3 });
        table.segment(0).unwrap().mark_bad(1);
        assert_eq!(table.entry_run(3, end), EntryRun::Free { count: PAYLOAD_ENTRIES - 3 });
        assert_eq!(table.entry_run(3, 9), EntryRun::Free { count: 6 });
        assert_eq!(table.entry_run(PAYLOAD_ENTRIES, end), EntryRun::Bad);
        assert_eq!(table.entry_run(2 * PAYLOAD_ENTRIES - 1, end), EntryRun::Bad);
        assert_eq!(table.entry_run(2 * PAYLOAD_ENTRIES, end), EntryRun::Free { count: PAYLOAD_ENTRIES });
    }
}
