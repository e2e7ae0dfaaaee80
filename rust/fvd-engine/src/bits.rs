// SPDX-License-Identifier: MIT OR Apache-2.0
//! A region of metadata pages in memory: atomic words, loaded a segment of 64 pages at a time. The
//! copy-on-write bitmap is one, the lookup table (`table.rs`) another.
//!
//! Readers are lock-free. A bit changes 0→1 with release order after the data it exposes was
//! written, so that whoever reads the bit with acquire order finds the data.

use crate::error::{Error, Kind, Result};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use fvd_format::page::{PAYLOAD_BITS, PAYLOAD_WORDS};
use std::sync::OnceLock;

/// Pages in a segment.
pub(crate) const SEGMENT_PAGES: u64 = 64;
/// Bits in a segment.
pub(crate) const SEGMENT_BITS: u64 = SEGMENT_PAGES * PAYLOAD_BITS;
/// Words in a segment.
const SEGMENT_WORDS: u64 = SEGMENT_BITS / 64;
/// Memory of a loaded segment: bytes.
pub(crate) const SEGMENT_MEMORY: u64 = SEGMENT_PAGES * 4096;
/// Segments in a row of the spine: about the square root of what a page map within the default
/// limit on metadata memory can name, so that neither rows nor their list are ever long.
const SPINE: u64 = 4096;
/// Segments in row 0, which stands for the first ones of row 1: most images need no other – with 4 KiB
/// blocks it is enough for 500 GiB –, and an open should not pay for a long one.
const SHORT: u64 = 64;
/// Rows the spine has at least beside row 0, so that the bitmap can grow: with 4 KiB blocks, to 2 PiB
/// of disk.
const ROWS_MIN: u64 = 64;

/// Row of segment `index`, its place there, and the length of the row.
#[inline]
fn place(index: u64) -> (usize, usize, u64) {
    if index < SHORT { (0, index as usize, SHORT) } else { ((index / SPINE) as usize + 1, (index % SPINE) as usize, SPINE) }
}

/// 64 pages' worth of bits.
pub(crate) struct Segment {
    words: Box<[AtomicU64]>,
    /// Write counts of the pages, for the next write in place.
    counts: Box<[AtomicU32]>,
    /// A bit a page: damaged on disk; its blocks cannot be served.
    bad: AtomicU64,
}

impl Segment {
    /// All bits 0, no page stored.
    pub(crate) fn initial() -> Self {
        // Each is an object of loom's model, which looks at the first blocks only.
        let pages = if cfg!(loom) { 0 } else { SEGMENT_PAGES };
        let words = (0..(pages as usize * PAYLOAD_WORDS).max(1)).map(|_| AtomicU64::new(0)).collect();
        let counts = (0..pages).map(|_| AtomicU32::new(0)).collect();
        Self { words, counts, bad: AtomicU64::new(0) }
    }

    /// Fills in page `page` (0…63) as read from disk.
    pub(crate) fn load_page(&self, page: u64, payload: &[u8], write_count: u32) {
        let words = &self.words[page as usize * PAYLOAD_WORDS..][..PAYLOAD_WORDS];
        for (word, bytes) in words.iter().zip(payload.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("eight bytes")), Ordering::Relaxed);
        }
        self.counts[page as usize].store(write_count, Ordering::Relaxed);
    }

    /// Sets or clears `first..end`, counted from the segment's first bit.
    pub(crate) fn write(&self, first: u64, end: u64, value: bool) {
        let mut at = first;
        while at < end {
            let n = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - n)) << (at % 64);
            let word = &self.words[(at / 64) as usize];
            if value {
                word.fetch_or(mask, Ordering::Release);
            } else {
                word.fetch_and(!mask, Ordering::Release);
            }
            at += n;
        }
    }

    /// The words of page `page` (0…63).
    pub(crate) fn page_words(&self, page: u64) -> Box<[u64]> {
        self.words[page as usize * PAYLOAD_WORDS..][..PAYLOAD_WORDS].iter().map(|w| w.load(Ordering::Acquire)).collect()
    }

    /// Replaces the words of page `page` (0…63) of a segment that nobody sees yet.
    pub(crate) fn set_page_words(&self, page: u64, words: &[u64]) {
        for (to, word) in self.words[page as usize * PAYLOAD_WORDS..].iter().zip(words) {
            to.store(*word, Ordering::Relaxed);
        }
    }

    /// Word `index` of the segment.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// Whether some page is damaged.
    #[inline]
    pub(crate) fn any_bad(&self) -> bool {
        self.bad.load(Ordering::Acquire) != 0
    }

    /// Marks page `page` (0…63) as damaged.
    pub(crate) fn mark_bad(&self, page: u64) {
        self.bad.fetch_or(1 << page, Ordering::Relaxed);
    }
}

/// What a run of blocks starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// `len` bits (> 0) have `value`.
    Bits {
        /// The value.
        value: bool,
        /// How many.
        len: u64,
    },
    /// The segment is not in memory.
    Missing(u64),
    /// The page of the first bit is damaged.
    Bad,
}

/// A paged region.
pub(crate) struct Bits {
    spine: Box<[OnceLock<Box<[OnceLock<Segment>]>>]>,
    /// Grows only, also where the region shrinks; who finds a block below the covered length finds its bit below this.
    bits: AtomicU64,
}

impl Bits {
    /// A bitmap of `bits` bits, nothing loaded.
    pub(crate) fn new(bits: u64) -> Self {
        let rows = bits.div_ceil(SEGMENT_BITS).div_ceil(SPINE).max(ROWS_MIN);
        Self { spine: (0..=rows).map(|_| OnceLock::new()).collect(), bits: AtomicU64::new(bits) }
    }

    /// Most bits that [`Bits::grow`] can make of it.
    pub(crate) fn capacity(&self) -> u64 {
        (self.spine.len() as u64 - 1) * SPINE * SEGMENT_BITS
    }

    /// Adds bits, of which nothing is loaded that was not loaded before. Of a region that shrank, the
    /// bits past its end stay, cleared: readers may be on their way to them.
    pub(crate) fn grow(&self, bits: u64) {
        assert!(bits <= self.capacity());
        self.bits.fetch_max(bits, Ordering::Release);
    }

    /// Clears the bits from `first` on. Nobody changes them meanwhile.
    pub(crate) fn clear_from(&self, first: u64) {
        for index in first / SEGMENT_BITS..self.len().div_ceil(SEGMENT_BITS) {
            let start = index * SEGMENT_BITS;
            if self.segment(index).is_some() {
                self.write(first.max(start), (start + SEGMENT_BITS).min(self.len()), false);
            }
        }
    }

    /// Number of bits.
    #[inline]
    pub(crate) fn len(&self) -> u64 {
        self.bits.load(Ordering::Relaxed)
    }

    /// Segment `index`, if loaded.
    #[inline]
    pub(crate) fn segment(&self, index: u64) -> Option<&Segment> {
        let (row, at, _) = place(index);
        self.spine[row].get()?[at].get()
    }

    /// Puts segment `index` in place; a second one is dropped.
    pub(crate) fn insert(&self, index: u64, segment: Segment) {
        let (row, at, len) = place(index);
        let row = self.spine[row].get_or_init(|| (0..len).map(|_| OnceLock::new()).collect());
        let _ = row[at].set(segment);
    }

    /// The run that starts at `first` and ends before `end`, within one segment.
    #[inline]
    pub(crate) fn run(&self, first: u64, end: u64) -> Run {
        assert!(first < end && end <= self.len());
        let index = first / SEGMENT_BITS;
        let Some(segment) = self.segment(index) else { return Run::Missing(index) };
        let from = first - index * SEGMENT_BITS;
        let mut to = (end - index * SEGMENT_BITS).min(SEGMENT_BITS);
        let bad = segment.bad.load(Ordering::Acquire);
        if bad != 0 {
            let page = from / PAYLOAD_BITS;
            if bad >> page & 1 == 1 {
                return Run::Bad;
            }
            to = to.min((page + 1) * PAYLOAD_BITS);
        }
        let (first_word, last_word) = ((from / 64) as usize, ((to - 1) / 64) as usize);
        let words = &segment.words[first_word..=last_word];
        let head = words[0].load(Ordering::Acquire) >> (from % 64);
        let value = head & 1 == 1;
        // Inverted where 1s are counted, so that the run always ends at the first 1.
        let flip = if value { u64::MAX } else { 0 };
        let mut at = from + u64::from((head ^ flip).trailing_zeros()).min(64 - from % 64);
        if at % 64 == 0 {
            for word in &words[1..] {
                let rest = word.load(Ordering::Acquire) ^ flip;
                at += u64::from(rest.trailing_zeros());
                if rest != 0 {
                    break;
                }
            }
        }
        Run::Bits { value, len: at.min(to) - from }
    }

    /// Sets or clears `first..end`; their segments are loaded.
    pub(crate) fn write(&self, first: u64, end: u64, value: bool) {
        assert!(first <= end && end <= self.len());
        let mut at = first;
        while at < end {
            let segment = self.segment(at / SEGMENT_BITS).expect("segment loaded before its bits change");
            let within = at % SEGMENT_BITS;
            let n = (SEGMENT_BITS - within).min(end - at);
            segment.write(within, within + n, value);
            at += n;
        }
    }

    /// Word `index`, if its segment is loaded.
    pub(crate) fn word(&self, index: u64) -> Option<u64> {
        Some(self.segment(index / SEGMENT_WORDS)?.word((index % SEGMENT_WORDS) as usize))
    }

    /// Replaces the bits `mask` of word `index`, whose segment is loaded. Changes of one word do not
    /// race with each other.
    pub(crate) fn replace_in_word(&self, index: u64, mask: u64, value: u64) {
        let segment = self.segment(index / SEGMENT_WORDS).expect("segment loaded before it changes");
        let word = &segment.words[(index % SEGMENT_WORDS) as usize];
        word.store(word.load(Ordering::Relaxed) & !mask | value, Ordering::Release);
    }

    /// Clears every bit; no page is stored any more.
    pub(crate) fn clear(&self) {
        for segment in (0..self.len().div_ceil(SEGMENT_BITS)).filter_map(|i| self.segment(i)) {
            segment.words.iter().for_each(|word| word.store(0, Ordering::Release));
            segment.counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
            segment.bad.store(0, Ordering::Relaxed);
        }
    }

    /// Whether page `page` is known to be damaged.
    pub(crate) fn is_bad(&self, page: u64) -> bool {
        self.segment(page / SEGMENT_PAGES).is_some_and(|s| s.bad.load(Ordering::Acquire) >> (page % SEGMENT_PAGES) & 1 == 1)
    }

    /// Page `page`, whose segment is loaded, is whole again: memory says what it holds.
    pub(crate) fn mark_good(&self, page: u64) {
        let segment = self.segment(page / SEGMENT_PAGES).expect("loaded");
        segment.bad.fetch_and(!(1 << (page % SEGMENT_PAGES)), Ordering::Release);
    }

    /// The words of page `page` as they are in memory now.
    pub(crate) fn page_words(&self, page: u64) -> Box<[u64]> {
        self.segment(page / SEGMENT_PAGES).expect("loaded").page_words(page % SEGMENT_PAGES)
    }

    /// The write count of page `page`.
    pub(crate) fn count(&self, page: u64) -> u32 {
        let segment = self.segment(page / SEGMENT_PAGES).expect("loaded");
        segment.counts[(page % SEGMENT_PAGES) as usize].load(Ordering::Relaxed)
    }

    /// Sets the write count of page `page`.
    pub(crate) fn set_count(&self, page: u64, count: u32) {
        let segment = self.segment(page / SEGMENT_PAGES).expect("loaded");
        segment.counts[(page % SEGMENT_PAGES) as usize].store(count, Ordering::Relaxed);
    }

    /// Number of 1 bits; every segment is loaded or entirely initial.
    pub(crate) fn count_ones(&self) -> u64 {
        let bits = self.len();
        let ones = |index: u64| {
            let used = (bits - index * SEGMENT_BITS).min(SEGMENT_BITS).div_ceil(64) as usize;
            self.segment(index).map_or(0, |s| s.words[..used].iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum::<u64>())
        };
        (0..bits.div_ceil(SEGMENT_BITS)).map(ones).sum()
    }
}

/// Sets bits in a page's words (a stable image).
pub(crate) fn set_words(words: &mut [u64], first: u64, end: u64, value: bool) {
    let mut at = first;
    while at < end {
        let n = (64 - at % 64).min(end - at);
        let mask = (u64::MAX >> (64 - n)) << (at % 64);
        let word = &mut words[(at / 64) as usize];
        *word = if value { *word | mask } else { *word & !mask };
        at += n;
    }
}

/// Checks the range of a record against the region it names.
pub(crate) fn check_range(first: u64, count: u64, most: u64) -> Result<u64> {
    match first.checked_add(count) {
        Some(end) if end <= most => Ok(end),
        _ => Err(Error::new(Kind::Corrupt, format!("journal record names bits or entries {first}+{count} of {most}"))),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use bitvec::prelude::*;
    use proptest::prelude::*;

    proptest! {
        /// The atomic bitmap against `bitvec` as oracle.
        #[test]
        fn runs_and_writes_agree_with_bitvec(ops in prop::collection::vec((0u64..200_000, 1u64..3000, any::<bool>()), 1..40), probes in prop::collection::vec((0u64..200_000, 1u64..5000), 1..40)) {
            let bits = 210_000;
            let ours = Bits::new(bits);
            ours.insert(0, Segment::initial());
            let mut oracle = bitvec![u64, Lsb0; 0; bits as usize];
            for (first, len, value) in ops {
                let end = (first + len).min(bits);
                ours.write(first, end, value);
                oracle[first as usize..end as usize].fill(value);
            }
            prop_assert_eq!(ours.count_ones(), oracle.count_ones() as u64);
            for (first, len) in probes {
                let end = (first + len).min(bits);
                let slice = &oracle[first as usize..end as usize];
                let value = slice[0];
                let expect = if value { slice.first_zero() } else { slice.first_one() }.unwrap_or(slice.len());
                prop_assert_eq!(ours.run(first, end), Run::Bits { value, len: expect as u64 });
            }
            let words = ours.page_words(2);
            prop_assert_eq!(words.as_ref(), &oracle.as_raw_slice()[2 * PAYLOAD_WORDS..3 * PAYLOAD_WORDS]);
        }
    }

    #[test]
    fn segments_are_found_in_every_row() {
        let bits = Bits::new((SPINE + SHORT + 5) * SEGMENT_BITS);
        assert_eq!(bits.capacity(), ROWS_MIN * SPINE * SEGMENT_BITS);
        let some = [0, SHORT - 1, SHORT, SPINE - 1, SPINE, SPINE + SHORT + 4];
        for (i, index) in some.into_iter().enumerate() {
            assert!(bits.segment(index).is_none());
            bits.insert(index, Segment::initial());
            bits.write(index * SEGMENT_BITS, index * SEGMENT_BITS + i as u64 + 1, true);
        }
        for (i, index) in some.into_iter().enumerate() {
            assert_eq!(bits.run(index * SEGMENT_BITS, (index + 1) * SEGMENT_BITS), Run::Bits { value: true, len: i as u64 + 1 });
        }
        assert_eq!(bits.count_ones(), (1..=some.len() as u64).sum());
    }

    #[test]
    fn runs_stop_at_segments_and_bad_pages() {
        let bits = Bits::new(2 * SEGMENT_BITS);
        assert_eq!(bits.run(5, 9), Run::Missing(0));
        bits.insert(0, Segment::initial());
        assert_eq!(bits.run(5, 2 * SEGMENT_BITS), Run::Bits { value: false, len: SEGMENT_BITS - 5 });
        bits.segment(0).unwrap().mark_bad(1);
        assert_eq!(bits.run(5, SEGMENT_BITS), Run::Bits { value: false, len: PAYLOAD_BITS - 5 });
        assert_eq!(bits.run(PAYLOAD_BITS, SEGMENT_BITS), Run::Bad);
        assert!(bits.is_bad(1) && !bits.is_bad(0));
    }
}
