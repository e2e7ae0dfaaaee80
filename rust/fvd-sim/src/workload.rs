// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests that hurt: overlapping and adjacent, at the borders of blocks, pages and windows, many
//! at once.

use crate::clock::{MS, SECOND};
use crate::disk::Keep;
use crate::geometry::Geometry;
use crate::options::{BaseIs, KINDS, Kind, Options};
use crate::plan::{Act, Cut, Plan, Session, Step};
use crate::prng::{Prng, mix};
use crate::world::Failures;
use fvd_engine::Repair;

/// Outcomes of a power cut that are drawn beside the plan's own.
const BRANCHES: u64 = 4;

/// Draws the plan of a seed.
pub fn plan(seed: u64) -> Plan {
    let options = Options::draw(seed);
    let mut prng = Prng::stream(seed, 2);
    let mut create_cuts = Vec::new();
    while prng.chance(30) && create_cuts.len() < 3 {
        create_cuts.push(Cut { at: prng.below(20), keep: Keep::Seeded(prng.bits()) });
    }
    let mut draw = Draw {
        geometry: Geometry::new(options.cell, options.cells, options.starts.clone(), options.window),
        cells: options.cells,
        last: 0,
        whole: None,
        follows_shrink: 0,
        prng,
        options: &options,
    };
    let sessions = (0..options.sessions).map(|i| draw.session(i)).collect();
    Plan { create_cuts, sessions, options }
}

struct Draw<'a> {
    options: &'a Options,
    geometry: Geometry,
    /// Cells of the disk, if every growth so far happened.
    cells: u64,
    /// Where the last request ended.
    last: u64,
    /// Whole chunks that a request was about, and how many more may be about a part of them.
    whole: Option<(u64, u64, u8)>,
    /// The disk shrank, and this much is left to follow at once: its last chunk loses its storage, then
    /// the disk grows.
    follows_shrink: u8,
    prng: Prng,
}

impl Draw<'_> {
    fn session(&mut self, number: usize) -> Session {
        let options = self.options;
        let p = &mut self.prng;
        let wanted = p.between(options.requests / 4, options.requests);
        let cut = p.chance(options.cut_percent).then(|| {
            let at = match p.below(10) {
                // During recovery, or the first write of all.
                0 | 1 => p.below(30),
                _ => p.below(3 * wanted + 40),
            };
            Cut { at, keep: Keep::Seeded(p.bits()) }
        });
        let mut failures = Failures::default();
        if p.chance(options.fail_percent) {
            failures.errno = p.pick(&[-5, -5, -28]);
            match p.below(6) {
                0 => failures.image_one_in = p.pick(&[15, 60, 300]),
                1 => failures.base_one_in = p.pick(&[3, 20]),
                2 | 3 => failures.flush_one_in = p.pick(&[4, 15, 40]),
                n => (failures.at, failures.forever) = (Some(p.below(3 * wanted)), n == 4 && p.chance(40)),
            }
        }
        if number == 0 && options.base == BaseIs::Surprise && p.chance(30) {
            // The first write asks for the base.
            failures.base_one_in = 2;
        }
        if options.batches_fail {
            failures.metadata_one_in = p.pick(&[3, 8, 20]);
        }
        let damage = p.one_in(4).then(|| p.bits());
        let seed = p.bits();
        let mut steps = Vec::with_capacity(wanted as usize);
        for i in 0..wanted {
            // The first write of an image is special; it should not be the same every time.
            let act = self.act(number == 0 && i < 3);
            let address = if self.options.cell < 512 { self.prng.below(64) * 64 } else { self.prng.pick(&[0, 0, 0, 512, 64, 3584]) };
            let queue = self.prng.below(self.options.queues as u64) as u8;
            steps.push(Step { act, queue, shim: self.prng.chance(self.options.shim_percent), address: address as u16 });
        }
        let branches = (1..=BRANCHES).map(|i| mix(seed ^ i.rotate_left(48))).collect();
        Session { seed, cut, failures, steps, branches, damage }
    }

    fn act(&mut self, early: bool) -> Act {
        self.follows_shrink = self.follows_shrink.saturating_sub(1);
        let chunk = u64::from(self.options.chunk_size) / self.options.cell;
        match self.follows_shrink {
            2 if self.cells % chunk != 0 => return Act::Discard { first: self.cells / chunk * chunk, count: self.cells % chunk },
            1 => return self.grow(),
            _ => {}
        }
        let weights = &self.options.weights;
        let mut left = self.prng.below(weights.iter().sum());
        let mut kind = 0;
        while kind + 1 < KINDS && left >= weights[kind] {
            left -= weights[kind];
            kind += 1;
        }
        let (first, count) = self.range();
        let p = &mut self.prng;
        match kind {
            k if k == Kind::Write as usize => Act::Write { first, count, fua: false },
            k if k == Kind::Fua as usize => Act::Write { first, count, fua: true },
            k if k == Kind::Zero as usize => Act::Zero { first, count, may_unmap: p.chance(50), fua: p.chance(10) },
            k if k == Kind::Discard as usize => Act::Discard { first, count },
            k if k == Kind::Flush as usize => Act::Flush,
            k if k == Kind::Read as usize => Act::Read { first, count },
            k if k == Kind::Status as usize => Act::Status { first, count },
            k if k == Kind::Grow as usize && !early => self.grow(),
            k if k == Kind::Shrink as usize && !early => self.shrink(),
            k if k == Kind::ChangeBase as usize => Act::ChangeBase,
            k if k == Kind::Amend as usize => Act::Amend { chunks: p.pick(&[1, 2, 3, 5, 20]) },
            k if k == Kind::Empty as usize => Act::Empty,
            k if k == Kind::Check as usize => Act::Check { repair: p.pick(&[Repair::None, Repair::Leaks, Repair::All]) },
            k if k == Kind::Beyond as usize => Act::Beyond { write: p.chance(50) },
            k if k == Kind::Sleep as usize => Act::Sleep { ns: p.pick(&[MS, 200 * MS, 6 * SECOND]) },
            k if k == Kind::Attach as usize => Act::Attach { attached: p.chance(60) },
            k if k == Kind::Drain as usize => Act::Drain,
            _ => Act::Write { first, count, fua: false },
        }
    }

    fn grow(&mut self) -> Act {
        let sector = 512 / self.options.cell;
        let cells = match self.prng.below(8) {
            0 => self.prng.between(1, 5000) * sector,
            _ => self.prng.between(1, 40) * sector,
        };
        self.geometry.grow(self.cells, self.cells + cells);
        self.cells += cells;
        Act::Grow { cells }
    }

    fn shrink(&mut self) -> Act {
        let sector = 512 / self.options.cell;
        let p = &mut self.prng;
        let chunk = (u64::from(self.options.chunk_size) / self.options.cell).max(sector);
        let cells = match p.below(8) {
            0 => p.between(1, 5000) * sector,
            1 | 2 => p.between(1, 3) * chunk,
            _ => p.between(1, 40) * sector,
        };
        // Growth follows, sooner or later: the guest's windows stay as they are drawn.
        if cells < self.cells {
            self.geometry.shrink(self.cells - cells);
            self.cells -= cells;
            if self.options.chunk_size > 0 && self.prng.chance(25) {
                self.follows_shrink = 3;
            }
        }
        Act::Shrink { cells }
    }

    /// Where a request is: within one window.
    fn range(&mut self) -> (u64, u64) {
        let p = &mut self.prng;
        let block = u64::from(self.options.block_size.max(4096)) / self.options.cell;
        let windows = &self.geometry.windows;
        let window = windows[p.below(windows.len() as u64) as usize];
        let within = match p.below(100) {
            n if n < self.options.hot_percent => p.below(block.min(window.count) * 2).min(window.count - 1),
            n if n < self.options.hot_percent + 10 => {
                let at = self.last.saturating_sub(window.first);
                if at < window.count { at } else { 0 }
            }
            n if n % 2 == 0 => {
                // A border of blocks.
                let at = (window.first + p.below(window.count)) / block * block;
                at.max(window.first) - window.first
            }
            _ => p.below(window.count),
        };
        let most = window.count - within;
        let chunk = u64::from(self.options.chunk_size) / self.options.cell;
        if chunk > 0 && p.chance(15) {
            // Whole chunks, as far as the window has them, or the last one as far as the disk has it.
            let end = window.first + window.count;
            let last = self.cells / chunk * chunk;
            let at = if (window.first..end).contains(&last) && last < self.cells && p.chance(30) { last } else { window.first + within };
            let first = (at / chunk * chunk).max(window.first);
            let end = if first < self.cells { end.min(self.cells) } else { end };
            let count = (p.pick(&[1, 1, 2, 3]) * chunk).min(end - first).min(260);
            self.last = first + count;
            self.whole = Some((first, count, p.pick(&[1, 1, 2, 3])));
            return (first, count);
        }
        // What is done to a whole chunk meets what is done to part of it.
        if let Some((first, count, left)) = self.whole.take_if(|_| p.chance(70))
            && window.first <= first
            && first + count <= window.first + window.count
        {
            self.whole = (left > 1).then_some((first, count, left - 1));
            let at = p.below(count);
            return (first + at, p.between(1, 4).min(count - at));
        }
        let count = match p.below(12) {
            _ if p.chance(self.options.small_percent) => p.between(1, 3),
            0 | 1 => 1,
            2 => block,
            3 => block - 1,
            4 => block + 1,
            5 => 2 * block,
            6 => p.between(1, 5 * block),
            _ => p.between(1, block),
        };
        let first = window.first + within;
        let count = count.clamp(1, most.min(160));
        self.last = first + count;
        (first, count)
    }
}
