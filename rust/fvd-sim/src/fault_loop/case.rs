// SPDX-License-Identifier: MIT OR Apache-2.0
//! One case of a fault loop: a phase in which the N-th host operation fails, once or for ever, and
//! everything that must hold afterwards.

use super::script::{Phase, Work, model, steps_of, work};
use super::{After, Mode};
use crate::checker::{self, Checker, Model};
use crate::disk::Keep;
use crate::guest::Guest;
use crate::memory::Buf;
use crate::options::BaseIs;
use crate::plan::{Act, Step};
use crate::prng::mix;
use crate::run::{Run, Verdict, until_done};
use crate::world::{FAILED_KINDS, Failures, Leaks, RequestId, World};
use fvd_engine::faults::Fault;
use fvd_engine::{Error, Kind, Request};
use std::cell::RefCell;
use std::rc::Rc;

/// Header and page writes are tried so often before the image is poisoned (CC-20, CC-24).
const ATTEMPTS: u64 = 3;
/// Place of writes in [`FAILED_KINDS`].
const WRITES: usize = 1;
/// Names requests that are not the guest's.
const ID: RequestId = RequestId::MAX;

/// What is run.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The phase.
    pub phase: &'a Phase,
    /// What fails, and how long.
    pub mode: Mode,
    /// What ends it.
    pub after: After,
    /// The operation of the phase that fails, counted from 1.
    pub at: u64,
    /// A planted fault.
    pub fault: Option<Fault>,
}

/// What came of it.
#[derive(Default)]
pub struct Outcome {
    /// Operations made to fail, by kind.
    pub failed: [u64; FAILED_KINDS.len()],
    /// Where in the script the run was when the promise was broken, or at its end.
    pub place: String,
    /// The first broken promise.
    pub violation: Option<String>,
    /// The text of every event, where asked for.
    pub trace: Vec<String>,
}

/// Runs a case.
pub fn run(case: &Case, trace: bool) -> Outcome {
    let mut judge = Judge { run: case.phase.run(case.fault, trace), case, out: Outcome::default() };
    judge.out.violation = match case.phase.work {
        Work::Create => judge.create(),
        Work::Session | Work::Look => judge.session(),
    }
    .err();
    judge.out.trace = std::mem::take(&mut judge.run.report.trace);
    judge.out
}

struct Judge<'a> {
    run: Run<'a>,
    case: &'a Case<'a>,
    out: Outcome,
}

impl Judge<'_> {
    fn seed(&self) -> u64 {
        mix(self.case.at ^ (self.case.mode as u64) << 32)
    }

    fn failures(&self) -> Failures {
        let mode = self.case.mode;
        Failures { at: Some(self.case.at - 1), forever: !mode.passes(), reach: mode.reach(), errno: mode.errno(), ..Failures::default() }
    }

    fn at(&mut self, place: impl Into<String>) {
        self.out.place = place.into();
    }

    fn world(&self, mode: checker::Mode, number: usize) -> Rc<World> {
        // One seed for all N: up to the failure every run is the same.
        let mut setup = self.run.setup(mix(self.case.mode as u64), number);
        setup.failures = self.failures();
        setup.config.read_only = mode == checker::Mode::ReadOnly;
        setup.attached = mode != checker::Mode::Create || self.run.options.base == BaseIs::Known;
        World::new(setup, Checker::new(mode, self.run.model.clone()))
    }

    /// A request that is not the guest's, to its end.
    fn ask(&self, world: &Rc<World>, request: Request<Buf>) -> Verdict<Result<(), Error>> {
        world.submit(0, request, ID);
        Ok(until_done(world, ID, None)?.expect("nothing cuts it").map(|_| ()))
    }

    /// An error must be the one that was injected, or say that the image is poisoned.
    fn right(&self, world: &World, error: &Error) -> Verdict<()> {
        let poisoned = error.kind == Kind::Poisoned && world.image().is_poisoned();
        if world.counters().injected == 0 || (error.kind != self.case.mode.kind() && !poisoned) {
            return Err(format!("the wrong error, {:?} instead of {:?}: {error}", error.kind, self.case.mode.kind()));
        }
        Ok(())
    }

    /// A failed sync poisons, and so does a header or page write that stays failed; nothing else (R11).
    fn poison(&self, world: &World) -> Verdict<()> {
        let counters = world.counters();
        let stuck = !self.case.mode.passes() && counters.failed[WRITES] >= ATTEMPTS;
        match (world.image().is_poisoned(), counters.flushes_failed > 0) {
            (false, true) => Err("a sync failed, and the image is not poisoned (R11)".into()),
            (true, false) if !stuck => Err("the image is poisoned, though no sync failed and no write stays failed (R11)".into()),
            _ => Ok(()),
        }
    }

    /// The world is over; what it counted stays.
    fn leave(&mut self, world: &Rc<World>) -> Verdict<()> {
        self.out.failed = world.counters().failed;
        self.run.leave(world)
    }

    fn session(&mut self) -> Verdict<()> {
        let read_only = self.case.phase.work == Work::Look;
        let world = self.world(if read_only { checker::Mode::ReadOnly } else { checker::Mode::Open }, 1);
        self.at("open");
        if let Err(error) = self.ask(&world, Request::Open)? {
            self.right(&world, &error)?;
            self.poison(&world)?;
            self.killed(&world)?;
            return self.reopen(None);
        }
        self.run.opened(&world)?;
        let mut guest = Guest::new(world.clone(), self.run.model(), self.run.cells, self.run.next_tag);
        let mut later = Vec::new();
        for (number, acts) in self.case.phase.steps.iter().enumerate() {
            self.at(format!("step {number} {acts:?}"));
            self.step(&mut guest, &world, &steps_of(number, acts), &mut later)?;
        }
        world.settle();
        let mut seen = None;
        if world.counters().injected > 0 {
            seen = self.after_failure(&mut guest, &world, later)?;
        }
        (self.run.cells, self.run.maybe_cells, self.run.next_tag) = (guest.cells, guest.maybe_cells, guest.next_tag);
        // Where nothing failed yet, the close is what a failure may hit.
        let closed = (self.case.after == After::Close || world.counters().injected == 0) && self.close(&world)?;
        if !closed {
            self.killed(&world)?;
        }
        self.reopen(seen.filter(|_| closed))
    }

    /// One group of requests. What failed is asked for again where the failure has passed, otherwise
    /// noted in `later`.
    fn step(&mut self, guest: &mut Guest, world: &Rc<World>, steps: &[Step], later: &mut Vec<Step>) -> Verdict<()> {
        let model = self.run.model();
        let (before, poisoned) = (world.counters().injected, world.image().is_poisoned());
        work(guest, world, &model, steps)?;
        let errors = std::mem::take(&mut guest.errors);
        for (step, error) in &errors {
            self.right(world, error)?;
            let over = self.case.mode.passes() && before > 0;
            if over && (!poisoned || reads(step)) {
                return Err(format!("{:?} fails, though the failure has passed: {error}", step.act));
            }
        }
        self.poison(world)?;
        self.failed_resize(guest, world)?;
        let failed = errors.into_iter().map(|(step, _)| step);
        if self.case.mode.passes() {
            return self.again(guest, world, failed.collect());
        }
        later.extend(failed);
        Ok(())
    }

    /// A resize that failed without poisoning the image did not happen.
    fn failed_resize(&self, guest: &mut Guest, world: &World) -> Verdict<()> {
        if guest.maybe_cells.is_none() || world.image().is_poisoned() {
            return Ok(());
        }
        guest.maybe_cells = None;
        let size = world.image().info().map_err(|error| error.to_string())?.header.virtual_size;
        if size != guest.cells * self.run.options.cell {
            return Err(format!("a resize failed, and the disk has {size} bytes"));
        }
        Ok(())
    }

    /// Nothing fails any more: requests work, or say that the image is poisoned; reads work always.
    fn again(&mut self, guest: &mut Guest, world: &World, steps: Vec<Step>) -> Verdict<()> {
        let model = self.run.model();
        for step in steps {
            let poisoned = world.image().is_poisoned();
            if poisoned && guest.maybe_cells.is_some() && matches!(step.act, Act::Grow { .. } | Act::Shrink { .. } | Act::Empty) {
                // The guest does not ask while it does not know its size.
                continue;
            }
            if matches!(step.act, Act::Amend { .. }) && self.run.options.chunk_size == 0 {
                // Nor a flat image for growth steps.
                continue;
            }
            work(guest, world, &model, &[step])?;
            match guest.errors.pop() {
                None if poisoned && !reads(&step) => return Err(format!("{:?} succeeds on a poisoned image (R11)", step.act)),
                Some((_, error)) if !poisoned || reads(&step) => return Err(format!("{:?} fails again, though nothing fails any more: {error}", step.act)),
                Some((_, error)) if error.kind != Kind::Poisoned => return Err(format!("{:?} on a poisoned image: {error}", step.act)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Something failed, and no longer does: memory agrees with the oracle, what failed can be asked
    /// for again, and a poisoned image changes nothing. Returns what the disk then reads as.
    fn after_failure(&mut self, guest: &mut Guest, world: &Rc<World>, later: Vec<Step>) -> Verdict<Option<Vec<u8>>> {
        self.at(format!("{}; afterwards", self.out.place));
        world.cure();
        self.poison(world)?;
        let poisoned = world.image().is_poisoned();
        let changes = world.counters().changes;
        self.everything(world)?;
        self.again(guest, world, later)?;
        if poisoned {
            let more = [Act::Flush, Act::Write { first: 0, count: 9, fua: false }, Act::Write { first: 190, count: 1, fua: true }];
            self.again(guest, world, steps_of(0, &more))?;
            // The timer too.
            world.sleep(60 * crate::clock::SECOND);
            world.step();
            world.settle();
            if world.counters().changes != changes {
                return Err("a poisoned image is written to (R11)".into());
            }
        }
        world.settle();
        let seen = self.everything(world)?;
        Ok((!poisoned).then_some(seen))
    }

    /// Reads all cells in use, which hold what the oracle allows.
    fn everything(&self, world: &Rc<World>) -> Verdict<Vec<u8>> {
        let model: Rc<RefCell<Model>> = self.run.model();
        let (windows, cell) = (model.borrow().geometry.windows.clone(), self.run.options.cell);
        let mut out = Vec::new();
        for window in windows {
            let began = model.borrow_mut().oracle.tick();
            let buf = Buf::new(vec![0xee; (window.count * cell) as usize], 0);
            let outcome = self.ask(world, Request::Read { offset: window.first * cell, buf: buf.clone() })?;
            outcome.map_err(|error| format!("a read fails, though nothing fails any more: {error}"))?;
            let model = model.borrow();
            buf.with(|bytes| model.oracle.check_read(&model.geometry, window.first, began, bytes).map(|()| out.extend_from_slice(bytes)))?;
        }
        Ok(out)
    }

    /// Closes. True if the image is closed; false after an error that there is a reason for.
    fn close(&mut self, world: &Rc<World>) -> Verdict<bool> {
        let (failed, poisoned, changes) = (world.counters().injected > 0, world.image().is_poisoned(), world.counters().changes);
        self.at("close");
        match self.ask(world, Request::Close)? {
            Ok(()) if poisoned => return Err("a poisoned image closes without an error (R11)".into()),
            Ok(()) => {}
            Err(error) => {
                self.right(world, &error)?;
                self.poison(world)?;
                if failed && !poisoned {
                    return Err(format!("close fails, though nothing fails any more: {error}"));
                }
                if poisoned && world.counters().changes != changes {
                    return Err("closing a poisoned image writes to it (R11)".into());
                }
                return Ok(false);
            }
        }
        self.run.files = world.cut(&Keep::Seeded(self.seed()));
        self.leave(world)?;
        self.run.unclean = false;
        self.run.leaks = world.leaks();
        self.run.model().borrow_mut().oracle.flushed_all();
        Ok(true)
    }

    /// The program ends without a close – what it wrote gets to the disk by and by, unless a sync
    /// dropped it – or the power goes.
    fn killed(&mut self, world: &Rc<World>) -> Verdict<()> {
        world.settle();
        if self.case.after == After::Close && world.counters().flushes_failed == 0 {
            self.run.files = world.view();
        } else {
            if let Ok(info) = world.image().info() {
                world.set_metadata_end(&info.header);
            }
            self.run.files = world.cut(&Keep::Seeded(self.seed()));
        }
        if let Some(model) = &self.run.model {
            model.borrow_mut().oracle.crash();
        }
        self.run.unclean = true;
        self.run.leaks = Leaks { disturbed: true, ..world.leaks() };
        self.leave(world)
    }

    /// The image opens, shows what it may show, and a check finds nothing; after a close it shows
    /// what was seen before.
    fn reopen(&mut self, seen: Option<Vec<u8>>) -> Verdict<()> {
        self.at(format!("{}; reopened", self.out.place));
        if let Some(seen) = seen {
            let mut setup = self.run.setup(self.seed(), 1);
            setup.config.read_only = true;
            let world = World::new(setup, Checker::new(checker::Mode::ReadOnly, None));
            self.ask(&world, Request::Open)?.map_err(|error| format!("the image does not open: {error}"))?;
            if self.everything(&world)? != seen {
                return Err("the disk reads otherwise than before it was closed".into());
            }
            self.run.leave(&world)?;
        }
        self.run.look(self.seed())?;
        self.run.verify(self.seed())
    }

    /// Creation: what failed leaves no image, or a whole one, and can be repeated.
    fn create(&mut self) -> Verdict<()> {
        let world = self.world(checker::Mode::Create, 0);
        let params = self.run.params();
        self.at("creation");
        let outcome = self.ask(&world, Request::Create(Box::new(params.clone())))?;
        match &outcome {
            Err(error) => {
                self.right(&world, error)?;
                self.killed(&world)?;
            }
            Ok(()) => {
                self.run.files = world.cut(&Keep::Seeded(self.seed()));
                self.leave(&world)?;
            }
        }
        let old = self.case.phase.start.model.as_ref().map(|_| self.case.phase.run(None, false)).map(|mut run| run.try_header(0)).transpose()?.and_then(Result::ok);
        self.at("creation; what it left");
        match self.run.try_header(self.seed())? {
            // The first thing creation does failed: the image that was there is whole.
            Ok(header) if outcome.is_err() && old.as_ref().is_some_and(|old| old.uuid == header.uuid) => self.run.verify(self.seed())?,
            Ok(header) => {
                self.run.model = Some(Rc::new(RefCell::new(model(&self.run, &header))));
                self.run.verify(self.seed())?;
            }
            Err(error) if outcome.is_ok() => return Err(format!("an image just made does not open: {error}")),
            Err(error) if error.kind == Kind::Invalid => {}
            Err(error) => return Err(format!("creation failed, and the file looks like an image: {error} (CC-33)")),
        }
        if outcome.is_err() { self.create_again(params) } else { Ok(()) }
    }

    fn create_again(&mut self, params: fvd_engine::CreateParams) -> Verdict<()> {
        self.at("creation; again");
        let mut setup = self.run.setup(self.seed(), 0);
        setup.attached = self.run.options.base == BaseIs::Known;
        let world = World::new(setup, Checker::new(checker::Mode::Create, None));
        self.ask(&world, Request::Create(Box::new(params)))?.map_err(|error| format!("creation fails again, though nothing fails any more: {error}"))?;
        self.run.files = world.cut(&Keep::Seeded(self.seed()));
        self.run.leave(&world)?;
        self.run.leaks.disturbed = false;
        let header = self.run.try_header(0)?.map_err(|error| format!("an image just made does not open: {error}"))?;
        self.run.model = Some(Rc::new(RefCell::new(model(&self.run, &header))));
        self.run.verify(self.seed())
    }
}

/// Whether an act only reads: that works on a poisoned image too.
fn reads(step: &Step) -> bool {
    matches!(step.act, Act::Read { .. } | Act::Status { .. })
}
