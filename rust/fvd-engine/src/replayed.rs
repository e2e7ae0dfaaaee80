// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a journal says of pages, kept until the page is at hand (FMT-136).
//!
//! A record of 16 bytes may name 2³² blocks. Pages of which every bit is said cost nothing each, only
//! their runs do; the others cost four bytes a record at first and two pages at most. So what a
//! journal says never needs much more memory than the journal itself, and as much time.

use crate::image::PageId;
use fvd_format::RegionKind;
use fvd_format::page::{PAYLOAD_BITS, PAYLOAD_ENTRIES, PAYLOAD_WORDS};
use std::collections::{BTreeMap, BTreeSet};

/// Runs of one page that are kept as runs: as many as fit in what [`Said::Each`] costs.
const RUNS_MAX: usize = PAYLOAD_WORDS * 4;
/// A bit number of a page fits in so many bits.
const SHIFT: u32 = 15;
const _: () = assert!(PAYLOAD_BITS <= 1 << SHIFT && 2 * SHIFT < 32);

/// What is said of some bits of a page, on top of what is said of all of them.
enum Said {
    /// First bit, last bit and value of runs, in the order in which they count.
    Runs(Vec<u32>),
    /// Which bits are said, and what they are.
    Each(Box<[[u64; PAYLOAD_WORDS]; 2]>),
}

/// What a journal says of the regions that its records change.
#[derive(Default)]
pub(crate) struct Replayed {
    /// Of the bitmap.
    pub(crate) bits: SaidBits,
    /// Of the lookup table.
    pub(crate) entries: SaidEntries,
}

impl Replayed {
    /// Whether nothing is said.
    pub(crate) fn is_empty(&self) -> bool {
        self.bits.is_empty() && self.entries.is_empty()
    }

    /// Number of pages of which anything is said, at most.
    pub(crate) fn pages(&self) -> u64 {
        self.bits.pages() + self.entries.pages
    }

    /// The pages of which anything is said.
    pub(crate) fn indices(&self) -> BTreeSet<PageId> {
        let bits = self.bits.indices().into_iter().map(|page| (RegionKind::Bitmap, page));
        bits.chain(self.entries.indices().into_iter().map(|page| (RegionKind::Table, page))).collect()
    }

    /// Changes the words of a page to what is said of it; whether anything is.
    pub(crate) fn apply(&self, (kind, page): PageId, words: &mut [u64]) -> bool {
        match kind {
            RegionKind::Table => self.entries.apply(page, words),
            _ => {
                let mut any = false;
                self.bits.tell(page, |first, end, value| {
                    any = true;
                    crate::bits::set_words(words, first, end, value);
                });
                any
            }
        }
    }
}

/// Entries that follow each other: the first, one past the last, the first value, and by how much each
/// is more than the one before.
struct EntriesSaid {
    first: u64,
    end: u64,
    value: u32,
    step: u32,
}

/// Pages over which a run of entries is named page by page.
const SHORT_RUN: u64 = 4;

/// The last word of a journal on each table entry that it names.
#[derive(Default)]
pub(crate) struct SaidEntries {
    /// In the order in which they count.
    said: Vec<EntriesSaid>,
    /// Those that concern a page.
    by_page: BTreeMap<u64, Vec<u32>>,
    /// Those that concern many pages.
    long: Vec<u32>,
    /// Pages named, those named twice counted twice.
    pages: u64,
}

impl SaidEntries {
    fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// Bytes of memory, at most.
    pub(crate) fn memory(&self) -> u64 {
        (self.said.len() * (size_of::<EntriesSaid>() + 8) + self.by_page.len() * 64) as u64
    }

    /// Entries `first..end` are `value`, `value + step`, …, whatever was said of them before.
    pub(crate) fn say(&mut self, first: u64, end: u64, value: u32, step: u32) {
        if let Some(last) = self.said.last_mut()
            && last.end == first
            && first % PAYLOAD_ENTRIES != 0
            && end - first == 1
        {
            // Single values join what they continue.
            let next = |step: u32| last.value.wrapping_add(step.wrapping_mul((first - last.first) as u32)) == value;
            let single = last.end - last.first == 1;
            let joins = [0, 1].into_iter().find(|step| (single || last.step == *step) && next(*step));
            if let Some(step) = joins {
                (last.end, last.step) = (end, step);
                return;
            }
        }
        let number = self.said.len() as u32;
        let (from, to) = (first / PAYLOAD_ENTRIES, (end - 1) / PAYLOAD_ENTRIES);
        self.said.push(EntriesSaid { first, end, value, step });
        self.pages += to - from + 1;
        if to - from >= SHORT_RUN {
            self.long.push(number);
        } else {
            (from..=to).for_each(|page| self.by_page.entry(page).or_default().push(number));
        }
    }

    fn indices(&self) -> BTreeSet<u64> {
        let runs = self.long.iter().map(|number| &self.said[*number as usize]);
        let long = runs.flat_map(|said| said.first / PAYLOAD_ENTRIES..=(said.end - 1) / PAYLOAD_ENTRIES);
        long.chain(self.by_page.keys().copied()).collect()
    }

    /// Changes the words of a page to what is said of it; whether anything is.
    fn apply(&self, page: u64, words: &mut [u64]) -> bool {
        let (from, to) = (page * PAYLOAD_ENTRIES, (page + 1) * PAYLOAD_ENTRIES);
        let overlaps = |number: &&u32| {
            let said = &self.said[**number as usize];
            said.first < to && from < said.end
        };
        let mut numbers: Vec<u32> = self.long.iter().filter(overlaps).chain(self.by_page.get(&page).into_iter().flatten()).copied().collect();
        numbers.sort_unstable();
        for said in numbers.iter().map(|number| &self.said[*number as usize]) {
            for entry in said.first.max(from)..said.end.min(to) {
                let value = said.value.wrapping_add(said.step.wrapping_mul((entry - said.first) as u32));
                let (word, shift) = (((entry - from) / 2) as usize, (entry - from) % 2 * 32);
                words[word] = words[word] & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
            }
        }
        !numbers.is_empty()
    }
}

/// The last word of a journal on each bit that it names.
#[derive(Default)]
pub(crate) struct SaidBits {
    /// Pages of which every bit was said at once: first page → end and value.
    whole: BTreeMap<u64, (u64, bool)>,
    /// What was said later of some bits of a page, or of a page that is not among those.
    pages: BTreeMap<u64, Said>,
    /// Pages of which anything is said.
    count: u64,
}

impl SaidBits {
    /// Whether nothing is said.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of pages of which anything is said.
    pub(crate) fn pages(&self) -> u64 {
        self.count
    }

    /// The pages of which anything is said.
    pub(crate) fn indices(&self) -> BTreeSet<u64> {
        self.whole.iter().flat_map(|(first, (end, _))| *first..*end).chain(self.pages.keys().copied()).collect()
    }

    fn whole_value(&self, page: u64) -> Option<bool> {
        self.whole.range(..=page).next_back().filter(|(_, (end, _))| *end > page).map(|(_, (_, value))| *value)
    }

    /// Bits `first..end` of the bitmap have `value`, whatever was said of them before.
    pub(crate) fn say(&mut self, first: u64, end: u64, value: bool) {
        let (whole_first, whole_end) = (first.div_ceil(PAYLOAD_BITS), end / PAYLOAD_BITS);
        if whole_first > whole_end {
            // Within one page.
            return self.say_some(whole_end, first % PAYLOAD_BITS, end % PAYLOAD_BITS, value);
        }
        if !first.is_multiple_of(PAYLOAD_BITS) {
            self.say_some(whole_first - 1, first % PAYLOAD_BITS, PAYLOAD_BITS, value);
        }
        if whole_first < whole_end {
            self.say_whole(whole_first, whole_end, value);
        }
        if !end.is_multiple_of(PAYLOAD_BITS) {
            self.say_some(whole_end, 0, end % PAYLOAD_BITS, value);
        }
    }

    /// Every bit of pages `first..end`.
    fn say_whole(&mut self, first: u64, end: u64, value: bool) {
        let covered: Vec<u64> = self.pages.range(first..end).map(|(page, _)| *page).collect();
        for page in covered {
            self.pages.remove(&page);
            self.count -= u64::from(self.whole_value(page).is_none());
        }
        let mut before = 0;
        let mut at = self.whole.range(..first).next_back().filter(|(_, (to, _))| *to > first).map_or(first, |(from, _)| *from);
        while let Some((&from, &(to, old))) = self.whole.range(at..end).next() {
            self.whole.remove(&from);
            before += to.min(end) - from.max(first);
            if from < first {
                self.whole.insert(from, (first, old));
            }
            if to > end {
                self.whole.insert(end, (to, old));
            }
            if to >= end {
                break;
            }
            at = to;
        }
        self.count += end - first - before;
        match self.whole.range_mut(..first).next_back() {
            Some((_, (to, old))) if *to == first && *old == value => *to = end,
            _ => drop(self.whole.insert(first, (end, value))),
        }
    }

    /// Bits `first..end` of one page.
    fn say_some(&mut self, page: u64, first: u64, end: u64, value: bool) {
        if !self.pages.contains_key(&page) {
            self.count += u64::from(self.whole_value(page).is_none());
        }
        let said = self.pages.entry(page).or_insert_with(|| Said::Runs(Vec::new()));
        if let Said::Runs(runs) = said {
            let newest = runs.last().copied().map(unpack).filter(|run| run.2 == value && run.0 <= first && first <= run.1 && run.1 <= end);
            if let Some((from, ..)) = newest {
                *runs.last_mut().expect("just seen") = pack(from, end, value);
                return;
            }
            if runs.len() < RUNS_MAX {
                return runs.push(pack(first, end, value));
            }
            let mut each = Box::new([[0; PAYLOAD_WORDS]; 2]);
            runs.iter().copied().map(unpack).for_each(|(first, end, value)| set_each(&mut each, first, end, value));
            *said = Said::Each(each);
        }
        if let Said::Each(each) = said {
            set_each(each, first, end, value);
        }
    }

    /// Tells what is said of `page`: runs of its bits, in the order in which they count.
    pub(crate) fn tell(&self, page: u64, mut run: impl FnMut(u64, u64, bool)) {
        if let Some(value) = self.whole_value(page) {
            run(0, PAYLOAD_BITS, value);
        }
        match self.pages.get(&page) {
            None => {}
            Some(Said::Runs(runs)) => runs.iter().copied().map(unpack).for_each(|(first, end, value)| run(first, end, value)),
            Some(Said::Each(each)) => {
                for at in 0..PAYLOAD_WORDS {
                    let [named, values] = [each[0][at], each[1][at]];
                    for (mut left, value) in [(named & values, true), (named & !values, false)] {
                        while left != 0 {
                            let from = left.trailing_zeros();
                            let len = (left >> from).trailing_ones();
                            let first = at as u64 * 64 + u64::from(from);
                            run(first, first + u64::from(len), value);
                            left &= !(u64::MAX >> (64 - len) << from);
                        }
                    }
                }
            }
        }
    }
}

fn pack(first: u64, end: u64, value: bool) -> u32 {
    assert!(first < end && end <= PAYLOAD_BITS);
    first as u32 | (end as u32 - 1) << SHIFT | u32::from(value) << (2 * SHIFT)
}

fn unpack(run: u32) -> (u64, u64, bool) {
    let mask = (1 << SHIFT) - 1;
    (u64::from(run & mask), u64::from(run >> SHIFT & mask) + 1, run >> (2 * SHIFT) == 1)
}

fn set_each(each: &mut [[u64; PAYLOAD_WORDS]; 2], first: u64, end: u64, value: bool) {
    crate::bits::set_words(&mut each[0], first, end, true);
    crate::bits::set_words(&mut each[1], first, end, value);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = if cfg!(miri) { 2 } else { 7 };

    proptest! {
        /// Against a plain array.
        #[test]
        fn what_is_said_last_counts(ops in prop::collection::vec((0..PAGES * PAYLOAD_BITS, prop_oneof![1u64..200, 1..3 * PAYLOAD_BITS], any::<bool>(), any::<bool>()), 1..60)) {
            let mut replayed = SaidBits::default();
            let mut plain = vec![None; (PAGES * PAYLOAD_BITS) as usize];
            for (first, len, value, aligned) in ops {
                let first = if aligned { first / PAYLOAD_BITS * PAYLOAD_BITS } else { first };
                let end = (first + len).min(PAGES * PAYLOAD_BITS);
                replayed.say(first, end, value);
                plain[first as usize..end as usize].fill(Some(value));
            }
            let mut named = BTreeSet::new();
            for page in 0..PAGES {
                let mut found = vec![None; PAYLOAD_BITS as usize];
                replayed.tell(page, |first, end, value| found[first as usize..end as usize].fill(Some(value)));
                let expect = &plain[(page * PAYLOAD_BITS) as usize..][..PAYLOAD_BITS as usize];
                prop_assert!(found == expect, "page {}", page);
                named.extend(expect.iter().any(Option::is_some).then_some(page));
            }
            prop_assert_eq!(replayed.pages(), named.len() as u64);
            prop_assert_eq!(replayed.indices(), named);
        }
    }

    #[test]
    fn a_page_of_many_runs_keeps_them() {
        let mut replayed = SaidBits::default();
        let mut plain = vec![None; PAYLOAD_BITS as usize];
        for i in 0..3 * RUNS_MAX as u64 {
            let (first, value) = (i * 7919 % (PAYLOAD_BITS - 3), i % 3 != 0);
            replayed.say(first, first + 1 + i % 3, value);
            plain[first as usize..(first + 1 + i % 3) as usize].fill(Some(value));
        }
        assert!(matches!(replayed.pages[&0], Said::Each(_)));
        let mut found = vec![None; PAYLOAD_BITS as usize];
        replayed.tell(0, |first, end, value| found[first as usize..end as usize].fill(Some(value)));
        assert!(found == plain);
    }

    proptest! {
        /// Entries, against a plain array.
        #[test]
        fn what_is_said_last_of_entries_counts(ops in prop::collection::vec((0..8000u64, prop_oneof![1u64..3, 1..2000u64, 5000..8000u64], any::<u16>(), 0u32..2), 1..60)) {
            let mut said = SaidEntries::default();
            let mut plain = vec![None; 8000];
            for (first, len, value, step) in ops {
                let end = (first + len).min(8000);
                said.say(first, end, u32::from(value), step);
                for entry in first..end {
                    plain[entry as usize] = Some(u32::from(value) + step * (entry - first) as u32);
                }
            }
            for (page, expect) in plain.chunks(PAYLOAD_ENTRIES as usize).enumerate() {
                let mut words = vec![u64::MAX; PAYLOAD_WORDS];
                let any = said.apply(page as u64, &mut words);
                let found = words.iter().flat_map(|w| [*w as u32, (*w >> 32) as u32]);
                prop_assert!(found.zip(expect).all(|(found, expect)| found == expect.unwrap_or(u32::MAX)));
                prop_assert_eq!(any, expect.iter().any(Option::is_some));
                prop_assert_eq!(said.indices().contains(&(page as u64)), any);
            }
        }
    }
}
