// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of metadata on their way into the journal: what memory says and no commit has frozen yet,
//! or what the commit on its way says.

use fvd_format::RegionKind;
use fvd_format::journal::{RECORD_HEAD, Record};
use std::collections::BTreeMap;

/// Runs of bits: start → end.
pub(crate) type Runs = BTreeMap<u64, u64>;

/// Adds `start..end` to a set of runs, joining neighbours.
pub(crate) fn add_run(runs: &mut Runs, mut start: u64, mut end: u64) {
    if let Some((&s, &e)) = runs.range(..=start).next_back()
        && e >= start
    {
        start = s;
        end = end.max(e);
    }
    while let Some((&s, &e)) = runs.range(start..=end).next() {
        runs.remove(&s);
        end = end.max(e);
    }
    runs.insert(start, end);
}

/// Takes `start..end` out of a set of runs.
fn remove_run(runs: &mut Runs, start: u64, end: u64) {
    let touched: Vec<(u64, u64)> = runs.range(..end).rev().take_while(|(_, e)| **e > start).map(|(s, e)| (*s, *e)).collect();
    for (s, e) in touched {
        runs.remove(&s);
        if s < start {
            runs.insert(s, start);
        }
        if e > end {
            runs.insert(end, e);
        }
    }
}

/// Bytes of an entry that stands alone in a journal.
const ENTRY_BYTES: usize = RECORD_HEAD + 4;

/// A set of changes that belong together.
#[derive(Default)]
pub(crate) struct Changes {
    /// Bits of the bitmap that were set.
    pub(crate) bits: Runs,
    /// Bits that were cleared: blocks past the base that read as zero. Never one of `bits`.
    pub(crate) cleared: Runs,
    /// Entries of the lookup table that changed: guest chunk → value.
    pub(crate) entries: BTreeMap<u64, u32>,
    /// The file may be written up to here (R6).
    pub(crate) reach: Option<u64>,
    /// Storage chunks that nothing names any more once these changes, and all before, are stable: runs.
    pub(crate) freed: Runs,
    /// What the records expose must be stable before they are: more than sectors that read as zero
    /// before and lie in fresh space (R6).
    pub(crate) data_first: bool,
}

impl Changes {
    /// Whether the journal has nothing to say of it.
    pub(crate) fn is_empty(&self) -> bool {
        self.bits.is_empty() && self.cleared.is_empty() && self.entries.is_empty() && self.reach.is_none()
    }

    /// Whether a commit has something to do.
    pub(crate) fn is_due(&self) -> bool {
        !self.is_empty() || !self.freed.is_empty()
    }

    /// Most bytes that the records need.
    pub(crate) fn bytes(&self) -> usize {
        (self.bits.len() + self.cleared.len()) * RECORD_HEAD + self.entries.len() * ENTRY_BYTES + self.reach.map_or(0, |_| RECORD_HEAD)
    }

    /// The bits of blocks `start..end` are `value` now.
    pub(crate) fn say_bits(&mut self, start: u64, end: u64, value: bool) {
        let (to, from) = if value { (&mut self.bits, &mut self.cleared) } else { (&mut self.cleared, &mut self.bits) };
        remove_run(from, start, end);
        add_run(to, start, end);
    }

    /// Takes off what does not fit in `most` bytes. Each part is right alone, if they become stable in
    /// order: an entry of a block that has no bit yet exposes nothing, but a bit without its entry
    /// would expose zeroes in the place of the base, and an entry with a bit that is to be cleared what
    /// lay in its storage before. Freed chunks wait for the last part.
    pub(crate) fn split(&mut self, most: usize) -> Option<Self> {
        if self.bytes() <= most {
            return None;
        }
        let mut room = most - self.reach.map_or(0, |_| RECORD_HEAD).min(most);
        let mut rest = Self { freed: std::mem::take(&mut self.freed), data_first: self.data_first, ..Self::default() };
        if let Some(&key) = self.cleared.keys().nth(room / RECORD_HEAD) {
            rest.cleared = self.cleared.split_off(&key);
            rest.entries = std::mem::take(&mut self.entries);
            rest.bits = std::mem::take(&mut self.bits);
            return Some(rest);
        }
        room -= self.cleared.len() * RECORD_HEAD;
        if let Some(&key) = self.entries.keys().nth(room / ENTRY_BYTES) {
            rest.entries = self.entries.split_off(&key);
            rest.bits = std::mem::take(&mut self.bits);
            return Some(rest);
        }
        room -= self.entries.len() * ENTRY_BYTES;
        if let Some(&key) = self.bits.keys().nth(room / RECORD_HEAD) {
            rest.bits = self.bits.split_off(&key);
        }
        Some(rest)
    }

    /// Takes back changes that were frozen and did not become stable. What changed since is newer.
    pub(crate) fn take_back(&mut self, old: Self) {
        let newer = [std::mem::take(&mut self.bits), std::mem::take(&mut self.cleared)];
        (self.bits, self.cleared) = (old.bits, old.cleared);
        for (runs, value) in newer.into_iter().zip([true, false]) {
            runs.into_iter().for_each(|(start, end)| self.say_bits(start, end, value));
        }
        for (start, end) in old.freed {
            add_run(&mut self.freed, start, end);
        }
        for (chunk, value) in old.entries {
            self.entries.entry(chunk).or_insert(value);
        }
        self.reach = self.reach.max(old.reach);
        self.data_first |= old.data_first;
    }

    /// The records, in an order in which every beginning of them is right alone.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        if let Some(reach) = self.reach {
            Record::Reach(reach).encode(&mut payload);
        }
        encode_bits(&mut payload, &self.cleared, false);
        self.encode_entries(&mut payload);
        encode_bits(&mut payload, &self.bits, true);
        payload
    }

    /// Neighbours with rising or equal values in one record.
    fn encode_entries(&self, payload: &mut Vec<u8>) {
        let mut entries = self.entries.iter().map(|(c, v)| (*c, *v)).peekable();
        while let Some((first, value)) = entries.next() {
            let mut count = 1;
            let mut step = None;
            while count < u32::MAX
                && let Some((_, next)) = entries.next_if(|(c, v)| {
                    let follows = |step: u32| value.checked_add(step.wrapping_mul(count)) == Some(*v);
                    // No storage is not the one before the first.
                    *c == first + u64::from(count) && step.map_or(follows(0) || (value != 0 && follows(1)), follows)
                })
            {
                step.get_or_insert(next - value);
                count += 1;
            }
            let region = RegionKind::Table;
            Record::EntryRun { region, first, count, value, step: step.unwrap_or(0) }.encode(payload);
        }
    }
}

/// Appends records for runs of bits; one record holds at most 2³²−1 of them.
fn encode_bits(payload: &mut Vec<u8>, runs: &Runs, value: bool) {
    for (&start, &end) in runs {
        let mut first = start;
        while first < end {
            let count = (end - first).min(u64::from(u32::MAX)) as u32;
            Record::Bits { region: RegionKind::Bitmap, value, first, count }.encode(payload);
            first += u64::from(count);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn runs_join() {
        let mut runs = Runs::new();
        for (start, end) in [(10, 20), (30, 40), (20, 25), (24, 31), (50, 60), (5, 70)] {
            add_run(&mut runs, start, end);
        }
        assert_eq!(runs, Runs::from([(5, 70)]));
        add_run(&mut runs, 72, 73);
        add_run(&mut runs, 6, 7);
        assert_eq!(runs, Runs::from([(5, 70), (72, 73)]));
    }

    fn decoded(changes: &Changes) -> Vec<(u64, u32)> {
        let payload = changes.encode();
        let (mut rest, mut out) = (&payload[..], Vec::new());
        while !rest.is_empty() {
            match Record::decode(&mut rest).unwrap() {
                Record::EntryRun { first, count, value, step, .. } => out.extend((0..count).map(|k| (first + u64::from(k), value + step * k))),
                Record::Bits { .. } | Record::Reach(_) => {}
                other => panic!("{other:?}"),
            }
        }
        out
    }

    #[test]
    fn entries_are_encoded_in_runs() {
        let list = [(1, 5), (2, 6), (3, 7), (4, 7), (5, 7), (7, 8), (8, 0), (9, 0), (10, 0), (11, u32::MAX >> 1)];
        let changes = Changes { entries: list.into(), reach: Some(9), ..Changes::default() };
        assert_eq!(decoded(&changes), list);
        assert!(changes.encode().len() < 9 * ENTRY_BYTES);
    }

    #[test]
    fn a_bit_is_set_or_cleared_whichever_came_last() {
        let mut changes = Changes::default();
        changes.say_bits(10, 50, true);
        changes.say_bits(20, 30, false);
        changes.say_bits(5, 12, false);
        changes.say_bits(25, 26, true);
        assert_eq!(changes.bits, [(12, 20), (25, 26), (30, 50)].into());
        assert_eq!(changes.cleared, [(5, 12), (20, 25), (26, 30)].into());
        changes.say_bits(0, 60, false);
        assert_eq!((changes.bits, changes.cleared), (Runs::new(), [(0, 60)].into()));
    }

    #[test]
    fn parts_lose_nothing_and_bits_follow_their_entries() {
        let mut changes = Changes {
            entries: (0..50).map(|c| (c * 2, c as u32 + 1)).collect(),
            bits: (0..20).map(|b| (b * 3, b * 3 + 1)).collect(),
            cleared: (0..20).map(|b| (b * 3 + 1, b * 3 + 2)).collect(),
            freed: [(4, 5)].into(),
            ..Changes::default()
        };
        let (mut entries, mut bits, mut cleared, mut parts) = (0, 0, 0, 0);
        loop {
            let rest = changes.split(200);
            assert!(changes.bytes() <= 200);
            assert!(changes.bits.is_empty() || entries + changes.entries.len() == 50);
            cleared += changes.cleared.len();
            assert!(changes.entries.is_empty() || cleared == 20);
            assert_eq!(changes.freed.is_empty(), rest.is_some());
            entries += changes.entries.len();
            bits += changes.bits.len();
            parts += 1;
            let Some(rest) = rest else { break };
            changes = rest;
        }
        assert_eq!((entries, bits, cleared), (50, 20, 20));
        assert!(parts > 8);
    }

    #[test]
    fn what_is_taken_back_does_not_hide_what_is_newer() {
        let mut now = Changes { entries: [(1, 7)].into(), bits: [(8, 9)].into(), cleared: [(1, 3)].into(), ..Changes::default() };
        let old = Changes { entries: [(1, 3), (2, 4)].into(), bits: [(0, 2)].into(), cleared: [(6, 12)].into(), ..Changes::default() };
        now.take_back(Changes { reach: Some(5), data_first: true, ..old });
        assert_eq!(now.entries, [(1, 7), (2, 4)].into());
        assert_eq!((now.reach, now.data_first), (Some(5), true));
        assert_eq!((now.bits, now.cleared), ([(0, 1), (8, 9)].into(), [(1, 3), (6, 8), (9, 12)].into()));
    }
}
