// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which parts of the disk the guest uses, and what the base holds there.
//!
//! A disk of some hundred MiB has several pages of bitmap and a region boundary or two; the guest
//! uses a few windows of it only, around what is special, so that its requests meet.

use crate::content::{self, BASE, Tag, ZERO};

/// Some cells in a row that the guest uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first cell.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Place of the first one among all cells in use.
    pub index: usize,
}

/// Cells and windows.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Bytes of a cell: 512, or less where requests are unaligned.
    pub cell: u64,
    /// In rising order, without overlap.
    pub windows: Vec<Window>,
}

impl Geometry {
    /// Windows at `starts`, each of about `count` cells, on a disk of `cells` cells; one ends the disk.
    pub fn new(cell: u64, cells: u64, mut starts: Vec<u64>, count: u64) -> Self {
        starts.push(cells.saturating_sub(count));
        starts.sort_unstable();
        let mut out = Self { cell, windows: Vec::new() };
        let mut free = 0;
        for start in starts {
            let first = start.max(free);
            let end = (start + count).min(cells);
            if first < end {
                out.push(first, end - first);
                free = end;
            }
        }
        out
    }

    fn push(&mut self, first: u64, count: u64) {
        let index = self.total();
        match self.windows.last_mut() {
            Some(last) if last.first + last.count == first => last.count += count,
            _ => self.windows.push(Window { first, count, index }),
        }
    }

    /// The disk grows from `from` to `to` cells: windows in the new part.
    pub fn grow(&mut self, from: u64, to: u64) {
        let count = 96;
        self.push(from, (to - from).min(count));
        if to - from > count {
            let first = (from + count).max(to.saturating_sub(count));
            self.push(first, to - first);
        }
    }

    /// The disk shrinks to `to` cells.
    pub fn shrink(&mut self, to: u64) {
        self.windows.retain(|w| w.first < to);
        if let Some(last) = self.windows.last_mut() {
            last.count = last.count.min(to - last.first);
        }
    }

    /// Number of cells in use.
    pub fn total(&self) -> usize {
        self.windows.last().map_or(0, |w| w.index + w.count as usize)
    }

    /// The place of cell `cell` among those in use.
    pub fn index(&self, cell: u64) -> usize {
        let window = self.windows.iter().rev().find(|w| w.first <= cell).expect("a cell in use");
        assert!(cell < window.first + window.count, "cell {cell} is not in use");
        window.index + (cell - window.first) as usize
    }

    /// The cell at place `index`.
    pub fn cell_at(&self, index: usize) -> u64 {
        let window = self.windows.iter().rev().find(|w| w.index <= index).expect("a place in use");
        window.first + (index - window.index) as u64
    }
}

/// The base image: a function of the address, with runs of zeroes.
#[derive(Clone, Debug)]
pub struct Base {
    /// Bytes in it.
    pub len: u64,
    /// Bytes of a cell.
    pub cell: u64,
    /// Runs of cells that hold data; zero elsewhere.
    pub data: Vec<(u64, u64)>,
}

impl Base {
    /// Whether cell `cell` holds data: position-dependent, never zero.
    fn has_data(&self, cell: u64) -> bool {
        let sectors = cell * self.cell / 512;
        sectors / 16 % 4 != 3 && self.data.iter().any(|(first, end)| (*first..*end).contains(&cell))
    }

    /// What cell `cell` reads as, when only the first `length` bytes of the base count.
    pub fn tag(&self, cell: u64, length: u64) -> Tag {
        let inside = (cell + 1) * self.cell <= self.len.min(length);
        if inside && self.has_data(cell) { BASE } else { ZERO }
    }

    /// Fills `to` from byte `offset` on.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let mut done = 0;
        while done < to.len() {
            let at = offset + done as u64;
            let (cell, within) = (at / self.cell, (at % self.cell) as usize);
            let n = (to.len() - done).min(self.cell as usize - within);
            let piece = &mut to[done..done + n];
            match self.tag(cell, u64::MAX) {
                ZERO => piece.fill(0),
                tag if n == self.cell as usize => content::fill(tag, cell, piece),
                tag => {
                    let mut whole = [0; content::SECTOR];
                    content::fill(tag, cell, &mut whole[..self.cell as usize]);
                    piece.copy_from_slice(&whole[within..within + n]);
                }
            }
            done += n;
        }
    }

    /// Whether the bytes from `offset` on may be data, and for how many of `len` that holds.
    pub fn status(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = (offset + len).div_ceil(self.cell);
        let first = offset / self.cell;
        let beyond = |cell: u64| cell * self.cell >= self.len || !self.data.iter().any(|(a, b)| (*a..*b).contains(&cell));
        let data = !beyond(first);
        // Zero runs within a run of data are not told: a host need not know them.
        let next = self.data.iter().flat_map(|(a, b)| [*a, *b]).chain([self.len / self.cell]).filter(|c| *c > first).min();
        let stop = next.unwrap_or(end).min(end) * self.cell;
        (data, (stop - offset).min(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_neither_overlap_nor_leave_the_disk() {
        let mut geometry = Geometry::new(512, 1000, vec![0, 40, 500], 64);
        let spans: Vec<_> = geometry.windows.iter().map(|w| (w.first, w.count, w.index)).collect();
        assert_eq!(spans, [(0, 104, 0), (500, 64, 104), (936, 64, 168)]);
        geometry.grow(1000, 1010);
        assert_eq!(geometry.total(), 242);
        assert_eq!(geometry.index(1009), 241);
        let mut shrunk = geometry.clone();
        shrunk.shrink(510);
        assert_eq!((shrunk.total(), shrunk.index(509)), (114, 113));
        assert_eq!((0..242).map(|i| geometry.index(geometry.cell_at(i))).collect::<Vec<_>>(), (0..242).collect::<Vec<_>>());
    }

    #[test]
    fn the_base_tells_where_it_has_data() {
        let base = Base { len: 100 * 512, cell: 512, data: vec![(10, 40)] };
        assert_eq!(base.status(0, 1 << 20), (false, 10 * 512));
        assert_eq!(base.status(11 * 512, 512), (true, 512));
        assert_eq!(base.status(39 * 512, 1 << 20), (true, 512));
        assert_eq!(base.status(50 * 512, 1 << 20), (false, 50 * 512));
        let mut bytes = vec![1; 1024];
        base.read(10 * 512 + 100, &mut bytes);
        let mut whole = vec![0; 2048];
        base.read(10 * 512, &mut whole);
        assert_eq!(bytes, whole[100..1124]);
    }
}
