// SPDX-License-Identifier: MIT OR Apache-2.0
//! Other outcomes of a power cut. To get to a cut takes a session of the guest's work; what the cut
//! leaves is up to chance. So at each cut some more outcomes than the plan's own are drawn, and each
//! is recovered on the side: with a model of its own, which knows what this disk was seen to hold.
//! The plan then goes on as if nothing had been.
//!
//! Only images that must be recovered are tried – the plan's own outcome takes care of clean ones –,
//! and of equal files one.

use crate::checker::{Checker, Mode};
use crate::disk::Keep;
use crate::exhaustive::judge::header_of;
use crate::plan::Cut;
use crate::prng::{Prng, mix};
use crate::run::{Report, Run, Verdict, until_done};
use crate::store::Files;
use crate::world::{Remains, World};
use fvd_engine::Request;
use std::cell::RefCell;
use std::rc::Rc;

/// Most host operations of a recovery after which a cut is drawn; most recoveries have fewer.
const CUT_MAX: u64 = 24;
/// Most cuts in the middle of recovery, one after the other.
const CUTS: u64 = 2;

impl Run<'_> {
    /// Recovers what a cut may leave as well: one outcome for each of `seeds`, unless it is equal to
    /// the plan's own, `left`, or to another.
    pub(crate) fn branches(&mut self, remains: &Remains, left: &Files, seeds: &[u64]) -> Verdict<()> {
        if seeds.is_empty() || self.model.is_none() {
            return Ok(());
        }
        let stable = &remains.stable();
        let mut seen = vec![left.hash_beside(stable)];
        for seed in seeds {
            let files = remains.cut(&Keep::Seeded(*seed));
            // What cannot be read must be opened too, and fails there.
            if header_of(&files.image).is_ok_and(|header| header.clean) {
                continue;
            }
            let hash = files.hash_beside(stable);
            if seen.contains(&hash) {
                continue;
            }
            seen.push(hash);
            self.branch(files, *seed).map_err(|text| format!("in the branch {seed:#x}, which another outcome of the cut begins: {text}"))?;
        }
        Ok(())
    }

    fn branch(&mut self, files: Files, seed: u64) -> Verdict<()> {
        let model = self.model.as_ref().expect("an image that was made").borrow().clone();
        let mut branch = Run {
            plan: self.plan,
            options: self.options,
            fault: self.fault,
            trace: self.trace,
            report: Report::default(),
            files,
            model: Some(Rc::new(RefCell::new(model))),
            cells: self.cells,
            maybe_cells: self.maybe_cells,
            next_tag: self.next_tag,
            older: None,
            unclean: true,
            leaks: self.leaks,
        };
        if self.trace {
            branch.report.trace.push(format!("branch {seed:#x} begins"));
        }
        let result = branch.recover_on_the_side(seed);
        if self.trace {
            branch.report.trace.push(format!("branch {seed:#x} ends: the power cut before it has another outcome"));
        }
        let report = &mut self.report;
        report.totals.add(&branch.report.totals);
        report.totals.branches += 1;
        report.hash = mix(report.hash ^ branch.report.hash);
        report.trace.append(&mut branch.report.trace);
        result
    }

    /// Recovers, after some attempts that a cut ends; everything is compared and checked. Whatever
    /// recovery showed once, it must show again.
    fn recover_on_the_side(&mut self, seed: u64) -> Verdict<()> {
        let mut prng = Prng::stream(seed, 4);
        if prng.chance(15) {
            self.look(prng.bits())?;
        }
        let mut cuts = if prng.chance(35) { prng.between(1, CUTS) } else { 0 };
        let mut again = prng.chance(35);
        let mut recovered = false;
        loop {
            let cut = (cuts > 0).then(|| Cut { at: prng.below(CUT_MAX), keep: Keep::Seeded(prng.bits()) });
            cuts = cuts.saturating_sub(1);
            let world = World::new(self.setup(prng.bits(), 1), Checker::new(Mode::Open, self.model.clone()));
            world.submit(0, Request::Open, 0);
            match until_done(&world, 0, cut.as_ref())? {
                None => {}
                Some(Err(error)) => return Err(format!("the image does not open: {error}")),
                Some(Ok(_)) => {
                    self.opened(&world)?;
                    self.report.totals.repeated += u64::from(recovered);
                    recovered = true;
                    self.read_all(&world, None)?;
                    self.ask_check(&world)?;
                    if !std::mem::take(&mut again) {
                        return self.leave(&world);
                    }
                }
            }
            self.power_cut(&world, &Keep::Seeded(prng.bits()), &[])?;
        }
    }
}
