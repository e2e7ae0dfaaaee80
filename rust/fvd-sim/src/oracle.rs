// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each cell of the guest's disk may hold (C4).
//!
//! Each request that changes cells is a version of them, with the moment it began and the moment it
//! was done. A read may return any version that no other one, done before the read began, has
//! replaced; a power cut may leave any that no other one, done before the last finished flush
//! began, has replaced. What failed, and what was discarded, may show or not: it replaces nothing,
//! but what comes later replaces it.

use crate::content::{self, BASE, Tag, ZERO};
use crate::geometry::{Base, Geometry};

/// A moment of the oracle's own clock, which counts events.
pub type Moment = u64;
const NEVER: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Version {
    tag: Tag,
    begun: Moment,
    done: Moment,
}

/// Versions of a cell, of which there is always one; most have no more, and are copied at no cost.
#[derive(Clone, Debug)]
struct Versions {
    first: Version,
    more: Vec<Version>,
}

impl Versions {
    fn len(&self) -> usize {
        1 + self.more.len()
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = &Version> {
        std::iter::once(&self.first).chain(&self.more)
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut Version> {
        std::iter::once(&mut self.first).chain(&mut self.more)
    }

    /// Leaves out what does not satisfy `stays`; something always does.
    fn retain(&mut self, stays: impl Fn(&Version) -> bool) {
        self.more.retain(&stays);
        if !stays(&self.first) {
            self.first = self.more.remove(0);
        }
    }
}

/// One cell.
#[derive(Clone, Debug)]
struct Cell {
    versions: Versions,
    /// When the newest FUA write that is durable began.
    durable: Moment,
}

impl Cell {
    /// The newest version that was done at `moment`: when it began.
    fn newest(&self, moment: Moment) -> Moment {
        self.versions.iter().filter(|v| v.done <= moment).map(|v| v.begun).max().unwrap_or(0)
    }
}

/// The oracle.
#[derive(Clone)]
pub struct Oracle {
    cells: Vec<Cell>,
    clock: Moment,
    /// When the last flush that finished began.
    flushed: Moment,
    /// The base, and how many bytes of it count.
    pub base: Option<(Base, u64)>,
    /// The base came, went or changed its length under the image: its cells may read as zero too.
    pub loose: bool,
}

impl Oracle {
    /// An oracle for cells that hold `tags`.
    pub fn new(tags: Vec<Tag>) -> Self {
        let mut out = Self { cells: Vec::new(), clock: 1, flushed: 0, base: None, loose: false };
        out.grow(tags);
        out
    }

    /// More cells.
    pub fn grow(&mut self, tags: Vec<Tag>) {
        let cell = |tag| Cell { versions: Versions { first: Version { tag, begun: 0, done: 0 }, more: Vec::new() }, durable: 0 };
        self.cells.extend(tags.into_iter().map(cell));
    }

    /// Fewer cells.
    pub fn shrink(&mut self, count: usize) {
        self.cells.truncate(count);
    }

    /// Number of cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether there are no cells.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The next moment.
    pub fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    /// A request begins that writes `tag` to `count` cells. `readers` is the moment at which the
    /// oldest read that is under way began.
    pub fn begin(&mut self, tag: Tag, first: usize, count: usize, readers: Option<Moment>) -> Moment {
        let begun = self.tick();
        let reading = readers.unwrap_or(begun);
        for cell in &mut self.cells[first..first + count] {
            if cell.versions.len() > 1 {
                let gone = cell.newest(self.flushed).max(cell.durable).min(cell.newest(reading));
                cell.versions.retain(|v| v.done >= gone);
            }
            cell.versions.more.push(Version { tag, begun, done: NEVER });
        }
        begun
    }

    fn each(&mut self, begun: Moment, first: usize, count: usize, mut f: impl FnMut(&mut Version)) {
        for cell in &mut self.cells[first..first + count] {
            cell.versions.iter_mut().filter(|v| v.begun == begun && v.done == NEVER).for_each(&mut f);
        }
    }

    /// The request that began at `begun` is done.
    pub fn end(&mut self, begun: Moment, first: usize, count: usize) {
        let done = self.tick();
        self.each(begun, first, count, |v| v.done = done);
    }

    /// The same for a request that may have changed the cells or not: one that failed, a discard.
    pub fn end_maybe(&mut self, begun: Moment, first: usize, count: usize) {
        let done = self.tick();
        self.each(begun, first, count, |v| (v.begun, v.done) = (0, done));
    }

    /// The FUA request that began at `begun` is done, and durable.
    pub fn durable(&mut self, begun: Moment, first: usize, count: usize) {
        for cell in &mut self.cells[first..first + count] {
            cell.durable = cell.durable.max(begun);
        }
    }

    /// A flush that began at `begun` is done.
    pub fn flushed(&mut self, begun: Moment) {
        self.flushed = self.flushed.max(begun);
    }

    /// Everything done so far is durable: the image was closed.
    pub fn flushed_all(&mut self) {
        self.flushed = self.clock;
    }

    fn holds(&self, tag: Tag, cell: u64, bytes: &[u8]) -> bool {
        if tag != BASE {
            return content::matches(tag, cell, bytes);
        }
        let tag = self.base.as_ref().map_or(ZERO, |(base, length)| base.tag(cell, *length));
        content::matches(tag, cell, bytes) || (self.loose && content::matches(ZERO, cell, bytes))
    }

    /// Whether `bytes` are what cell number `cell` holds if nothing is in the image: base, however much
    /// of it counts by now, or zero.
    pub fn is_untouched(&self, cell: u64, bytes: &[u8]) -> bool {
        let base = self.base.as_ref().map_or(ZERO, |(base, _)| base.tag(cell, u64::MAX));
        content::matches(base, cell, bytes) || content::matches(ZERO, cell, bytes)
    }

    /// Whether a read that began at `began` may find `bytes` in cell number `cell`.
    pub fn may_read(&self, index: usize, cell: u64, began: Moment, bytes: &[u8]) -> bool {
        let state = &self.cells[index];
        let newest = if state.versions.len() > 1 { state.newest(began) } else { 0 };
        state.versions.iter().rev().any(|v| v.done >= newest && self.holds(v.tag, cell, bytes))
    }

    /// Whether a power cut now may leave `bytes` in cell number `cell`.
    pub fn may_survive(&self, index: usize, cell: u64, bytes: &[u8]) -> bool {
        self.survivors(index).rev().any(|tag| self.holds(tag, cell, bytes))
    }

    /// Versions that a power cut now may leave in cell `index`.
    pub fn survivors(&self, index: usize) -> impl DoubleEndedIterator<Item = Tag> {
        let state = &self.cells[index];
        let newest = if state.versions.len() > 1 { state.newest(self.flushed).max(state.durable) } else { 0 };
        state.versions.iter().filter(move |v| v.done >= newest).map(|v| v.tag)
    }

    /// The power went: what may be left is one of the survivors, for good.
    pub fn crash(&mut self) {
        for index in 0..self.cells.len() {
            if self.cells[index].versions.len() == 1 {
                continue;
            }
            let tags: Vec<Tag> = self.survivors(index).collect();
            self.replace(index, tags);
        }
    }

    fn replace(&mut self, index: usize, mut tags: Vec<Tag>) {
        tags.sort_unstable();
        tags.dedup();
        let state = &mut self.cells[index];
        state.durable = 0;
        let mut versions = tags.into_iter().map(|tag| Version { tag, begun: 0, done: 0 });
        state.versions.first = versions.next().expect("one survives");
        state.versions.more.clear();
        state.versions.more.extend(versions);
    }

    /// The same; from now on the cell holds just that. Zero may be a write of zeroes or a base that
    /// is away: both stay possible.
    pub fn settle(&mut self, index: usize, cell: u64, bytes: &[u8]) -> bool {
        if self.cells[index].versions.len() == 1 {
            return self.holds(self.cells[index].versions.first.tag, cell, bytes);
        }
        let tags: Vec<Tag> = self.survivors(index).filter(|tag| self.holds(*tag, cell, bytes)).collect();
        if tags.is_empty() {
            return false;
        }
        self.replace(index, tags);
        true
    }

    /// Whether cell `index` may still be in the base, for a question asked at `began`.
    pub fn may_be_base(&self, index: usize, began: Moment) -> bool {
        let state = &self.cells[index];
        let newest = state.newest(began);
        state.versions.iter().any(|v| v.tag == BASE && v.done >= newest)
    }

    /// Checks `bytes` against the cells of a read that began at `began`.
    pub fn check_read(&self, geometry: &Geometry, first: u64, began: Moment, bytes: &[u8]) -> Result<(), String> {
        let index = geometry.index(first);
        for (i, piece) in bytes.chunks_exact(geometry.cell as usize).enumerate() {
            let cell = first + i as u64;
            if !self.may_read(index + i, cell, began, piece) {
                return Err(format!("a read that began at {began} found {} in cell {cell}: {}", content::describe(piece), self.explain(index + i)));
            }
        }
        Ok(())
    }

    /// For people: what a cell may hold.
    pub fn explain(&self, index: usize) -> String {
        let state = &self.cells[index];
        let mut out = format!("flushed at {}, durable {};", self.flushed, state.durable);
        for v in state.versions.iter() {
            let name = match v.tag {
                ZERO => "zero".to_owned(),
                BASE => "base".to_owned(),
                content::GARBAGE => "garbage".to_owned(),
                tag => format!("write {tag}"),
            };
            let done = if v.done == NEVER { "under way".to_owned() } else { v.done.to_string() };
            out += &format!(" {name} ({}–{done})", v.begun);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(tag: Tag) -> Vec<u8> {
        let mut out = vec![0; 512];
        content::fill(tag, 0, &mut out);
        out
    }

    #[test]
    fn a_flush_rules_out_what_was_replaced_before_it() {
        let mut oracle = Oracle::new(vec![ZERO]);
        let one = oracle.begin(100, 0, 1, None);
        oracle.end(one, 0, 1);
        let two = oracle.begin(101, 0, 1, None);
        assert!([0, 100, 101].iter().all(|t| oracle.may_survive(0, 0, &cell(*t))));
        let read = oracle.tick();
        assert!(!oracle.may_read(0, 0, read, &cell(ZERO)) && oracle.may_read(0, 0, read, &cell(100)) && oracle.may_read(0, 0, read, &cell(101)));
        let flush = oracle.tick();
        oracle.end(two, 0, 1);
        oracle.flushed(flush);
        assert!(!oracle.may_survive(0, 0, &cell(ZERO)) && oracle.may_survive(0, 0, &cell(100)) && oracle.may_survive(0, 0, &cell(101)));
        // A read from before the second write was done may still see the first.
        let three = oracle.begin(102, 0, 1, Some(read));
        assert!(oracle.may_read(0, 0, read, &cell(100)));
        oracle.end_maybe(three, 0, 1);
        let later = oracle.tick();
        assert!(oracle.may_read(0, 0, later, &cell(101)) && oracle.may_read(0, 0, later, &cell(102)) && !oracle.may_read(0, 0, later, &cell(100)));
        let four = oracle.begin(103, 0, 1, None);
        oracle.end(four, 0, 1);
        oracle.durable(four, 0, 1);
        assert!(!oracle.may_survive(0, 0, &cell(102)) && oracle.may_survive(0, 0, &cell(103)));
        assert!(oracle.settle(0, 0, &cell(103)) && !oracle.may_survive(0, 0, &cell(102)));
    }
}
