// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs a plan: creation, then sessions that end in a power cut or a close; after each, the disk is
//! compared with what the oracle allows.

use crate::checker::{Checker, Mode, Model};
use crate::clock::SECOND;
use crate::content::{BASE, FIRST_WRITE, GARBAGE, GARBAGE_BYTE, Tag, ZERO};
use crate::damage::{self, Broken};
use crate::disk::Keep;
use crate::geometry::{Base, Geometry};
use crate::guest::{Guest, check_report};
use crate::memory::Buf;
use crate::options::{BaseIs, Options};
use crate::oracle::Oracle;
use crate::plan::{Act, Cut, Plan, Session};
use crate::prng::{Prng, mix};
use crate::store::Files;
use crate::world::{Failures, Leaks, RequestId, Setup, World};
use fvd_engine::faults::Fault;
use fvd_engine::host::{FILES, Limits};
use fvd_engine::{Config, CreateParams, Error, Kind, Place, Preallocation, Repair, Reply, Request};
use fvd_format::Header;
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS};
use fvd_format::limits::PAGE_SIZE;
use std::cell::RefCell;
use std::rc::Rc;

/// Steps of a world that a session may take, at most.
const STEPS_MAX: u64 = 400_000;
/// What a commit may take, with a checkpoint before it: nanoseconds.
const COMMIT_SLACK: u64 = 10 * SECOND;
/// Storage that does not grow, when the image is made: bytes.
const FIXED_LENGTH: u64 = 16 << 20;

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests of the guest that ended.
    pub guest_ops: u64,
    /// Operations of the host.
    pub host_ops: u64,
    /// Power cuts.
    pub cuts: u64,
    /// Outcomes of power cuts that were tried beside those that the plans went on with.
    pub branches: u64,
    /// Writable opens of an image that was not closed.
    pub recoveries: u64,
    /// Of these, opens of an image that a recovery had left and a power cut did not let be closed.
    pub repeated: u64,
    /// Read-only opens of an image that was not closed: recovery in memory.
    pub replays: u64,
    /// Operations made to fail.
    pub injected: u64,
    /// Writes of metadata whose order was checked.
    pub ordered: u64,
    /// Damaged files opened.
    pub damaged: u64,
    /// Damaged files repaired.
    pub repaired: u64,
    /// Guests that fell silent and whose changes were found committed.
    pub quiet: u64,
}

impl Totals {
    /// Adds another run's numbers.
    pub fn add(&mut self, other: &Self) {
        self.guest_ops += other.guest_ops;
        self.host_ops += other.host_ops;
        self.cuts += other.cuts;
        self.branches += other.branches;
        self.recoveries += other.recoveries;
        self.repeated += other.repeated;
        self.replays += other.replays;
        self.injected += other.injected;
        self.ordered += other.ordered;
        self.damaged += other.damaged;
        self.repaired += other.repaired;
        self.quiet += other.quiet;
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What it did.
    pub totals: Totals,
    /// A hash of every event.
    pub hash: u64,
    /// The text of every event, where asked for.
    pub trace: Vec<String>,
    /// The first broken promise.
    pub violation: Option<String>,
}

/// Runs `plan`.
pub fn run(plan: &Plan, fault: Option<Fault>, trace: bool) -> Report {
    let mut run = Run::new(plan, fault, trace);
    if let Err(text) = run.go() {
        run.report.violation = Some(text);
    }
    run.report
}

/// A broken promise ends the run.
pub(crate) type Verdict<T> = Result<T, String>;

/// One run, on its way.
pub(crate) struct Run<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) options: &'a Options,
    pub(crate) fault: Option<Fault>,
    pub(crate) trace: bool,
    pub(crate) report: Report,
    pub(crate) files: Files,
    pub(crate) model: Option<Rc<RefCell<Model>>>,
    pub(crate) cells: u64,
    pub(crate) maybe_cells: Option<u64>,
    pub(crate) next_tag: Tag,
    /// The files as the last close but one left them.
    pub(crate) older: Option<Files>,
    /// A power cut came since the last close.
    pub(crate) unclean: bool,
    /// What may have left unused space in the file.
    pub(crate) leaks: Leaks,
}

/// How a session ended.
enum End {
    Cut,
    Closed,
}

impl<'a> Run<'a> {
    pub(crate) fn new(plan: &'a Plan, fault: Option<Fault>, trace: bool) -> Self {
        let options = &plan.options;
        let mut files = Files::default();
        if !options.limits[0].grows_zeroed {
            files.image.fill_pages(0, FIXED_LENGTH, GARBAGE_BYTE);
        }
        if options.data.is_some() && !options.data_limits().grows_zeroed {
            files.data.fill_pages(0, FIXED_LENGTH, GARBAGE_BYTE);
        }
        Self {
            plan,
            options,
            fault,
            trace,
            report: Report::default(),
            files,
            model: None,
            cells: options.cells,
            maybe_cells: None,
            next_tag: FIRST_WRITE,
            older: None,
            unclean: false,
            leaks: Leaks { disturbed: false, largest_disk: options.disk_bytes(), largest_write: 0, largest_step: 0 },
        }
    }

    fn go(&mut self) -> Verdict<()> {
        self.create()?;
        for (number, session) in self.plan.sessions.iter().enumerate() {
            self.session(number, session)?;
        }
        self.verify(self.plan.options.seed ^ 0xf1a1)
    }

    pub(crate) fn base(&self, number: usize) -> Option<Base> {
        let options = self.options;
        let len = options.base_bytes[number.min(1)];
        let data = options.starts.iter().map(|s| (s.saturating_sub(4), s + options.window + 400)).collect();
        (options.base != BaseIs::None).then_some(Base { len, cell: options.cell, data })
    }

    fn config(&self, read_only: bool) -> Config {
        let options = self.options;
        let limits: [Limits; FILES] = [options.limits[0], options.data_limits(), options.limits[1]];
        Config { limits, read_only, fault: self.fault, checkpoint_after: options.checkpoint_after, batch_pages: options.batch_pages, commit_interval_ns: options.commit_interval_ns, discard_no_unref: options.discard_no_unref, wait_for_space: options.wait_for_space, ..Config::default() }
    }

    pub(crate) fn setup(&self, seed: u64, number: usize) -> Setup {
        let options = self.options;
        Setup {
            queues: options.queues,
            seed,
            latency: options.latency,
            inline_percent: options.inline_percent,
            discard_ignored_percent: options.discard_ignored_percent,
            zeroing_is_dear: options.zeroing_is_dear,
            answer: options.answer,
            leaks: self.leaks,
            trace: self.trace,
            two_files: options.data.is_some(),
            ..Setup::scripted(self.files.clone(), self.base(number), self.config(false))
        }
    }

    /// Takes over what a world counted; an error if a promise was broken in it.
    pub(crate) fn leave(&mut self, world: &Rc<World>) -> Verdict<()> {
        world.end();
        let counters = world.counters();
        self.report.totals.host_ops += counters.ops;
        self.report.totals.injected += counters.injected;
        self.report.totals.ordered += world.checker().applied;
        self.report.hash = mix(self.report.hash ^ world.hash());
        self.report.trace.extend(world.take_trace());
        world.violation().map_or(Ok(()), Err)
    }

    /// Takes the power away; what is left is the next session's file. Other outcomes are tried by
    /// the way, one for each of `branches`.
    pub(crate) fn power_cut(&mut self, world: &Rc<World>, keep: &Keep, branches: &[u64]) -> Verdict<()> {
        world.say(|| format!("power cut: {keep:?}"));
        let remains = world.remains();
        self.files = remains.cut(keep);
        self.report.totals.cuts += 1;
        self.unclean = true;
        self.leaks = Leaks { disturbed: true, ..world.leaks() };
        if let Some(model) = &self.model {
            model.borrow_mut().oracle.crash();
        }
        self.leave(world)?;
        let left = self.files.clone();
        self.branches(&remains, &left, branches)
    }

    pub(crate) fn params(&self) -> CreateParams {
        let options = self.options;
        let named = matches!(options.base, BaseIs::Known | BaseIs::Named);
        CreateParams {
            virtual_size: Some(options.disk_bytes()),
            block_size: options.block_size,
            journal_size: options.journal_size,
            base_name: if named { "base".into() } else { String::new() },
            base_format: if named { "raw".into() } else { String::new() },
            detect_sparse_hole: u64::from(options.holes),
            data_name: if options.data.is_some() { "disk.raw".into() } else { String::new() },
            data_format: if options.data.is_some() { "raw".into() } else { String::new() },
            preallocation: if options.preallocate { Preallocation::Full } else { Preallocation::Off },
            compact: options.chunk_size > 0,
            chunk_size: options.chunk_size,
            storage_grow_unit: options.step_chunks * u64::from(options.chunk_size),
        }
    }

    /// Makes the image, after some attempts that a power cut ends.
    fn create(&mut self) -> Verdict<()> {
        let known = self.options.base == BaseIs::Known;
        for (attempt, cut) in self.plan.create_cuts.iter().map(Some).chain([None]).enumerate() {
            let mut setup = self.setup(mix(self.options.seed ^ attempt as u64), 0);
            setup.attached = known;
            let world = World::new(setup, Checker::new(Mode::Create, None));
            world.submit(0, Request::Create(Box::new(self.params())), 0);
            let Some(outcome) = until_done(&world, 0, cut)? else {
                self.power_cut(&world, &cut.expect("only a cut stops it").keep, &[])?;
                self.after_creation_cut(attempt as u64)?;
                continue;
            };
            if let Err(error) = outcome {
                return Err(format!("creation fails: {error}"));
            }
            // Nothing may be lost any more.
            self.files = world.cut(&Keep::Seeded(self.options.seed));
            self.leave(&world)?;
            if cut.is_none() {
                break;
            }
        }
        self.unclean = false;
        self.leaks.disturbed = false;
        let header = self.read_header()?;
        if header.is_compact() && !self.options.data_limits().grows_zeroed && !self.options.preallocate {
            // A device with room for so much.
            let file = if header.has_data_file() { &mut self.files.data } else { &mut self.files.image };
            file.resize(header.data_offset + self.options.fixed_room);
        }
        self.model = Some(Rc::new(RefCell::new(self.make_model(&header))));
        Ok(())
    }

    /// Creation was cut short: the file is no image, or a whole one (CC-33).
    fn after_creation_cut(&mut self, attempt: u64) -> Verdict<()> {
        match self.try_header(attempt)? {
            Ok(_) => Ok(()),
            Err(error) if error.kind == Kind::Invalid => Ok(()),
            Err(error) => Err(format!("creation was cut short, and the file looks like an image: {error} (CC-33)")),
        }
    }

    pub(crate) fn try_header(&mut self, seed: u64) -> Verdict<Result<Header, Error>> {
        let mut setup = self.setup(seed, 0);
        setup.config.read_only = true;
        let world = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let opened = world.request(0, Request::Open).ok_or("an open hangs")?;
        let header = opened.and_then(|_| world.image().info()).map(|info| info.header);
        self.leave(&world)?;
        Ok(header)
    }

    fn read_header(&mut self) -> Verdict<Header> {
        self.try_header(0)?.map_err(|error| format!("an image just made does not open: {error}"))
    }

    pub(crate) fn make_model(&self, header: &Header) -> Model {
        let options = self.options;
        let geometry = Geometry::new(options.cell, options.cells, options.starts.clone(), options.window);
        let beyond = if options.data_limits().grows_zeroed || options.preallocate || options.chunk_size > 0 { ZERO } else { GARBAGE };
        let covered = if header.pristine { u64::MAX } else { header.covered };
        let tag = |i| if geometry.cell_at(i) * options.cell < covered { BASE } else { beyond };
        let mut oracle = Oracle::new((0..geometry.total()).map(tag).collect());
        let counts = if header.pristine || header.base_length == BASE_LENGTH_UNKNOWN { u64::MAX } else { header.base_length };
        // What counts of the base may change with its length: then both are possible.
        let [first, later] = options.base_bytes.map(|len| len.min(counts));
        oracle.loose = first != later;
        oracle.base = self.base(0).map(|base| (Base { len: base.len.max(options.base_bytes[1]), ..base }, counts));
        Model { oracle, geometry, grow_units: vec![header.storage_grow_unit] }
    }

    pub(crate) fn model(&self) -> Rc<RefCell<Model>> {
        self.model.clone().expect("made by the creation")
    }

    /// One session.
    fn session(&mut self, number: usize, session: &Session) -> Verdict<()> {
        let mut prng = Prng::stream(session.seed, 3);
        if prng.chance(if self.unclean { 50 } else { 25 }) {
            self.look(prng.bits())?;
        }
        let mut setup = self.setup(session.seed, number);
        setup.failures = session.failures.clone();
        let world = World::new(setup, Checker::new(Mode::Open, self.model.clone()));
        let cut = session.cut.as_ref();
        world.submit(0, Request::Open, 0);
        let Some(opened) = until_done(&world, 0, cut)? else {
            return self.power_cut(&world, &cut.expect("only a cut stops it").keep, &session.branches);
        };
        if let Err(error) = opened {
            if world.counters().injected == 0 {
                return Err(format!("the image does not open: {error}"));
            }
            return self.power_cut(&world, &Keep::Seeded(session.seed), &session.branches);
        }
        self.opened(&world)?;
        match self.work(&world, session, &mut prng)? {
            End::Cut => {
                let keep = cut.map_or(Keep::Seeded(session.seed), |cut| cut.keep.clone());
                self.power_cut(&world, &keep, &session.branches)?;
                self.after_cut(session)
            }
            End::Closed => {
                // Whatever was done before is durable, so that this takes nothing away.
                self.files = world.cut(&Keep::Seeded(session.seed));
                self.leave(&world)?;
                self.unclean = false;
                self.leaks = world.leaks();
                self.model().borrow_mut().oracle.flushed_all();
                self.after_close(session)
            }
        }
    }

    /// The image is open: its size is the one it had, or the one that a resize may have left.
    pub(crate) fn opened(&mut self, world: &Rc<World>) -> Verdict<()> {
        let info = world.image().info().map_err(|error| error.to_string())?;
        if !info.was_clean {
            self.report.totals.recoveries += 1;
        }
        world.set_metadata_end(&info.header);
        self.model().borrow_mut().check_grow_unit(info.header.storage_grow_unit)?;
        let cells = info.header.virtual_size / self.options.cell;
        if let Some(to) = self.maybe_cells.take().filter(|to| *to == cells) {
            let model = &mut *self.model.as_ref().expect("made").borrow_mut();
            model.resize(self.cells, to, info.header.pristine);
            self.cells = to;
        }
        if cells != self.cells {
            return Err(format!("the disk has {cells} cells after open, not {}", self.cells));
        }
        Ok(())
    }

    /// The guest's requests, then the close.
    fn work(&mut self, world: &Rc<World>, session: &Session, prng: &mut Prng) -> Verdict<End> {
        if self.read_all(world, session.cut.as_ref())?.is_none() {
            return Ok(End::Cut);
        }
        let mut guest = Guest::new(world.clone(), self.model(), self.cells, self.next_tag);
        guest.has_base = self.options.base != BaseIs::None;
        guest.fixed = !self.options.limits[0].grows_zeroed || !self.options.data_limits().grows_zeroed;
        guest.compact = self.options.chunk_size > 0;
        let mut end = drive(&mut guest, world, session, self.options.depth, prng.chance(30));
        if end == Ok(true) && guest.under_way() == 0 && prng.chance(25) {
            end = self.quiet(world, session.cut.as_ref());
        }
        if end == Ok(true) {
            end = close(&mut guest, world, session.cut.as_ref());
        }
        self.next_tag = guest.next_tag;
        self.cells = guest.cells;
        self.maybe_cells = guest.maybe_cells;
        self.report.totals.guest_ops += guest.ended;
        match world.violation() {
            Some(text) => Err(text),
            None => Ok(if end? { End::Closed } else { End::Cut }),
        }
    }

    /// The guest asks for nothing more: what it changed is committed in time by itself (R1). Seen from
    /// outside: a block that is in the image is there in what a power cut would leave, too.
    fn quiet(&mut self, world: &Rc<World>, cut: Option<&Cut>) -> Verdict<bool> {
        let by = world.now() + self.options.commit_interval_ns + COMMIT_SLACK;
        while world.next_at().is_some_and(|at| at <= by) {
            if world.violation().is_some() || reached(world, cut) {
                return Ok(false);
            }
            world.step();
        }
        if world.counters().injected > 0 {
            return Ok(true);
        }
        let mut setup = Setup { files: world.stable(), ..self.setup(self.options.seed, 1) };
        setup.config.read_only = true;
        let after = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let opened = after.request(0, Request::Open).ok_or("a read-only open hangs")?;
        opened.map_err(|error| format!("a read-only open fails: {error}"))?;
        let cell = self.options.cell;
        for window in &self.model().borrow().geometry.windows {
            let mut at = window.first * cell;
            let end = at + window.count * cell;
            while at < end {
                let (here, len) = place(world, at, end - at)?;
                let (there, len) = if here { place(&after, at, len)? } else { (false, len) };
                if here != there {
                    return Err(format!("cell {} is in the image, and {} s after the last request no commit says so (R1)", at / cell, (self.options.commit_interval_ns + COMMIT_SLACK) / SECOND));
                }
                at += len;
            }
        }
        self.report.totals.quiet += 1;
        self.leave(&after)?;
        Ok(true)
    }

    /// Reads every cell in use; each then holds what was read. `None` after a cut.
    pub(crate) fn read_all(&mut self, world: &Rc<World>, cut: Option<&Cut>) -> Verdict<Option<()>> {
        let model = self.model();
        let (windows, cell) = (model.borrow().geometry.windows.clone(), self.options.cell);
        let cells = world.image().info().map_err(|error| error.to_string())?.header.virtual_size / cell;
        for mut window in windows.into_iter().filter(|w| w.first < cells) {
            // The disk may have shrunk.
            window.count = window.count.min(cells - window.first);
            let buf = Buf::new(vec![0xee; (window.count * cell) as usize], 0);
            world.submit(0, Request::Read { offset: window.first * cell, buf: buf.clone() }, RequestId::MAX);
            let Some(outcome) = until_done(world, RequestId::MAX, cut)? else { return Ok(None) };
            if let Err(error) = outcome {
                if world.counters().injected > 0 {
                    continue;
                }
                return Err(format!("a read after open fails: {error}"));
            }
            buf.end();
            let oracle = &mut model.borrow_mut().oracle;
            let wrong = buf.with(|bytes| {
                let mut cells = bytes.chunks_exact(cell as usize).enumerate();
                cells.find(|(i, piece)| !oracle.settle(window.index + i, window.first + *i as u64, piece)).map(|(i, piece)| (i, crate::content::describe(piece)))
            });
            if let Some((i, found)) = wrong {
                return Err(format!("after open, cell {} is {found}: {} (C4)", window.first + i as u64, oracle.explain(window.index + i)));
            }
        }
        Ok(Some(()))
    }

    /// A read-only open: shows what the oracle allows, and changes nothing.
    pub(crate) fn look(&mut self, seed: u64) -> Verdict<()> {
        let mut setup = self.setup(seed, 1);
        setup.config.read_only = true;
        let world = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let opened = world.request(0, Request::Open).ok_or("a read-only open hangs")?;
        opened.map_err(|error| format!("a read-only open fails: {error}"))?;
        self.report.totals.replays += u64::from(!world.image().info().map_err(|e| e.to_string())?.was_clean);
        let header = world.image().info().map_err(|e| e.to_string())?.header;
        // What a later open finds may still be another one.
        self.model().borrow().clone().check_grow_unit(header.storage_grow_unit)?;
        let cells = header.virtual_size / self.options.cell;
        if cells != self.cells && self.maybe_cells != Some(cells) {
            return Err(format!("the disk has {cells} cells in a read-only open, not {}", self.cells));
        }
        self.read_all(&world, None)?;
        if seed % 2 == 0 {
            self.ask_check(&world)?;
        }
        world.request(0, Request::Close).ok_or("a read-only close hangs")?.map_err(|error| format!("a read-only close fails: {error}"))?;
        self.leave(&world)
    }

    pub(crate) fn ask_check(&self, world: &Rc<World>) -> Verdict<()> {
        let report: Reply = world.request(0, Request::Check { repair: Repair::None }).ok_or("a check hangs")?.map_err(|error| format!("a check fails: {error}"))?;
        check_report(world, &report);
        Ok(())
    }

    /// Opens, compares, checks, closes: nothing is made to fail.
    pub(crate) fn verify(&mut self, seed: u64) -> Verdict<()> {
        let world = World::new(self.setup(seed, 1), Checker::new(Mode::Open, self.model.clone()));
        let opened = world.request(0, Request::Open).ok_or("an open hangs")?;
        opened.map_err(|error| format!("the image does not open: {error}"))?;
        self.opened(&world)?;
        self.read_all(&world, None)?;
        self.ask_check(&world)?;
        world.request(0, Request::Close).ok_or("a close hangs")?.map_err(|error| format!("a close fails: {error}"))?;
        self.files = world.stable();
        self.leave(&world)
    }

    fn after_cut(&mut self, session: &Session) -> Verdict<()> {
        let Some(seed) = session.damage else { return Ok(()) };
        match damage::journal(&self.files, &mut Prng::new(seed)) {
            Some(harmed) => self.open_damaged(&harmed, false, seed),
            None => Ok(()),
        }
    }

    fn after_close(&mut self, session: &Session) -> Verdict<()> {
        if let Some(seed) = session.damage {
            let mut prng = Prng::new(seed);
            let harmed = damage::draw(&self.files, self.older.as_ref(), &mut prng);
            if let Some(harmed) = harmed {
                self.open_damaged(&harmed, prng.chance(50), seed)?;
            }
            let grow = [&self.options.limits[0], &self.options.data_limits()].map(|limits| limits.grows_zeroed);
            if let Some(broken) = damage::break_image(&self.files, grow, &mut prng) {
                self.repair(&broken, &mut prng)?;
            }
        }
        self.older = Some(self.files.clone());
        Ok(())
    }

    /// Opens a damaged copy: an error, or nothing but right data; a lost page is found by check.
    fn open_damaged(&mut self, harmed: &damage::Harmed, read_only: bool, seed: u64) -> Verdict<()> {
        self.report.totals.damaged += 1;
        let mut setup = Setup { files: harmed.files.clone(), ..self.setup(seed, 1) };
        setup.config.read_only = read_only;
        setup.failures = Failures::default();
        let world = World::new(setup, Checker::new(if read_only { Mode::ReadOnly } else { Mode::Damaged }, None));
        let what = &harmed.what;
        let opened = world.request(0, Request::Open).ok_or_else(|| format!("an open hangs after {what}"))?;
        if harmed.in_data {
            self.look_at_metadata(harmed, seed)?;
        }
        if opened.is_ok() {
            if harmed.must_not_open {
                return Err(format!("the image opens after {what}"));
            }
            let report = world.request(0, Request::Check { repair: Repair::None }).ok_or_else(|| format!("a check hangs after {what}"))?;
            if harmed.check_must_find && matches!(&report, Ok(Reply::Check(report)) if report.corruptions == 0) {
                return Err(format!("check finds nothing after {what}"));
            }
            if !harmed.check_must_find {
                self.read_damaged(&world, what)?;
            }
        }
        self.leave(&world)
    }

    /// An image whose data file is too short: its metadata can be looked at, and a check says what is wrong.
    fn look_at_metadata(&mut self, harmed: &damage::Harmed, seed: u64) -> Verdict<()> {
        let mut setup = Setup { files: harmed.files.clone(), ..self.setup(seed, 1) };
        setup.config.metadata_only = true;
        setup.failures = Failures::default();
        let world = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let what = &harmed.what;
        let opened = world.request(0, Request::Open).ok_or_else(|| format!("an open for metadata hangs after {what}"))?;
        opened.map_err(|error| format!("an open for metadata fails after {what}: {error}"))?;
        match world.request(0, Request::Check { repair: Repair::None }) {
            Some(Ok(Reply::Check(report))) if report.corruptions == 1 => {}
            other => return Err(format!("a check for metadata answers {other:?} after {what}")),
        }
        let buf = Buf::new(vec![0; 512], 0);
        if !matches!(world.request(0, Request::Read { offset: 0, buf }), Some(Err(error)) if error.kind == Kind::State) {
            return Err(format!("an open for metadata reads guest data after {what}"));
        }
        self.leave(&world)
    }

    fn read_damaged(&self, world: &Rc<World>, what: &str) -> Verdict<()> {
        let model = self.model();
        let (windows, cell) = (model.borrow().geometry.windows.clone(), self.options.cell);
        for window in windows {
            let buf = Buf::new(vec![0xee; (window.count * cell) as usize], 0);
            let outcome = world.request(0, Request::Read { offset: window.first * cell, buf: buf.clone() });
            if !matches!(outcome, Some(Ok(_))) {
                continue;
            }
            let model = model.borrow();
            for i in 0..window.count as usize {
                let at = i * cell as usize;
                let right = buf.with(|bytes| model.oracle.may_survive(window.index + i, window.first + i as u64, &bytes[at..at + cell as usize]));
                if !right {
                    return Err(format!("after {what}, cell {} is read wrong without an error: {}", window.first + i as u64, model.oracle.explain(window.index + i)));
                }
            }
        }
        Ok(())
    }
}

impl Run<'_> {
    /// A broken copy: looked at, repaired with the power going meanwhile, and looked at again. What is
    /// not under damaged metadata reads right all the time.
    fn repair(&mut self, broken: &Broken, prng: &mut Prng) -> Verdict<()> {
        self.report.totals.repaired += 1;
        self.look_at_broken(broken, &broken.files, false, prng.bits()).map_err(|text| format!("{text}, after {}", broken.what))?;
        let mut files = broken.files.clone();
        let attempts = prng.pick(&[1, 1, 2, 2, 3, 4]);
        for cuts_left in (0..attempts).rev() {
            let cut = (cuts_left > 0).then(|| Cut { at: prng.between(4, 60), keep: Keep::Seeded(prng.bits()) });
            // Or an operation fails.
            let fails = (cuts_left > 0 && prng.chance(40)).then(|| prng.below(50));
            let done = self.repair_once(broken, &files, cut.as_ref(), fails, prng.bits());
            let (left, whole, found) = done.map_err(|text| format!("{text}, in a repair after {}", broken.what))?;
            files = left;
            if whole {
                if !found && attempts == 1 {
                    return Err(format!("a repair finds nothing after {}", broken.what));
                }
                break;
            }
        }
        self.look_at_broken(broken, &files, true, prng.bits()).map_err(|text| format!("{text}, after the repair of {}", broken.what))
    }

    /// One attempt to repair; what is left in the file, whether it came to its end, and found something.
    fn repair_once(&mut self, broken: &Broken, files: &Files, cut: Option<&Cut>, fails: Option<u64>, seed: u64) -> Verdict<(Files, bool, bool)> {
        let mut setup = Setup { files: files.clone(), ..self.setup(seed, 1) };
        setup.failures = Failures { at: fails, errno: -5, ..Failures::default() };
        let mut cut = cut.filter(|_| fails.is_none()).cloned();
        let world = World::new(setup, Checker::new(Mode::Damaged, None));
        let repair = |repair| Request::Check { repair };
        let mut reports = Vec::new();
        for (id, request) in [Request::Open, repair(Repair::All), repair(Repair::None), Request::Close].into_iter().enumerate() {
            world.submit(0, request, id as RequestId);
            let Some(outcome) = until_done(&world, id as RequestId, cut.as_ref())? else {
                let left = world.cut(&cut.expect("only a cut stops it").keep);
                self.leave(&world)?;
                return Ok((left, false, false));
            };
            if outcome.is_err() && fails.is_some() {
                // What is written to shared storage shows in both guest chunks.
                if broken.anything.is_empty() {
                    self.write_back(&world);
                }
                let left = world.cut(&Keep::Seeded(mix(seed)));
                self.leave(&world)?;
                return Ok((left, false, false));
            }
            match outcome.map_err(|error| format!("request {id} fails: {error}"))? {
                Reply::Check(report) => reports.push(report),
                _ if id == 0 => {
                    world.set_metadata_end(&world.image().info().map_err(|error| error.to_string())?.header);
                    // A header copy rots while the image is open, and the power goes soon.
                    if seed % 4 < 3 {
                        world.rot(HEADER_OFFSETS[(seed % 4 / 2) as usize] + seed / 4 % PAGE_SIZE as u64);
                        if let Some(cut) = &mut cut {
                            cut.at = world.counters().ops + 2 + seed / 4 % 16;
                        }
                    }
                }
                _ => {}
            }
            if id == 2 && fails.is_none() {
                self.read_broken(&world, broken, true)?;
            }
        }
        if fails.is_some() {
            // Something may be left, and is told: the next attempt finds it.
            let left = world.stable();
            self.leave(&world)?;
            return Ok((left, false, false));
        }
        let [first, second] = &reports[..] else { return Err("two checks have two answers".into()) };
        let no_space = first.findings.iter().any(|text| text.contains("still share storage"));
        if (second.corruptions > 0 || second.leaked > 0) && !no_space {
            return Err(format!("a check finds {:?} and {} leaked bytes", second.findings, second.leaked));
        }
        let left = world.stable();
        self.leave(&world)?;
        Ok((left, true, first.corruptions_fixed + first.leaked_fixed > 0 || no_space))
    }

    /// A guest goes on after a repair that failed: it writes what it reads.
    fn write_back(&self, world: &Rc<World>) {
        let (windows, cell) = (self.model().borrow().geometry.windows.clone(), self.options.cell);
        for window in windows {
            let buf = Buf::new(vec![0; (window.count.min(8) * cell) as usize], 0);
            if matches!(world.request(0, Request::Read { offset: window.first * cell, buf: buf.clone() }), Some(Ok(_))) {
                let _ = world.request(0, Request::Write { offset: window.first * cell, buf, fua: true });
            }
        }
    }

    /// A read-only open, with a check.
    fn look_at_broken(&mut self, broken: &Broken, files: &Files, repaired: bool, seed: u64) -> Verdict<()> {
        let mut setup = Setup { files: files.clone(), ..self.setup(seed, 1) };
        setup.config.read_only = true;
        setup.failures = Failures::default();
        let world = World::new(setup, Checker::new(Mode::ReadOnly, None));
        let opened = world.request(0, Request::Open).ok_or("a read-only open hangs")?;
        opened.map_err(|error| format!("a read-only open fails: {error}"))?;
        self.read_broken(&world, broken, repaired)?;
        let reply = world.request(0, Request::Check { repair: Repair::None }).ok_or("a check hangs")?;
        match reply.map_err(|error| format!("a check fails: {error}"))? {
            Reply::Check(report) if !repaired && report.corruptions + report.leaked == 0 => return Err("a check finds nothing".into()),
            Reply::Check(report) if repaired && report.corruptions + report.leaked > 0 => {
                let known = self.options.chunk_size > 0 && !self.options.data_limits().grows_zeroed;
                if !known {
                    return Err(format!("a check finds {:?} and {} leaked bytes", report.findings, report.leaked));
                }
            }
            _ => {}
        }
        self.leave(&world)
    }

    /// Reads what is in use: right, but for what the damage took.
    fn read_broken(&self, world: &Rc<World>, broken: &Broken, repaired: bool) -> Verdict<()> {
        let model = self.model();
        let (windows, cell) = (model.borrow().geometry.windows.clone(), self.options.cell);
        let touches = |ranges: &[(u64, u64)], first: u64, count: u64| ranges.iter().any(|(start, end)| *start < (first + count) * cell && first * cell < *end);
        for window in windows {
            // In pieces, so that what can be read is.
            let mut done = 0;
            while done < window.count {
                let (first, count) = (window.first + done, (window.count - done).min(8));
                let buf = Buf::new(vec![0xee; (count * cell) as usize], 0);
                let outcome = world.request(0, Request::Read { offset: first * cell, buf: buf.clone() }).ok_or("a read hangs")?;
                match outcome {
                    Err(error) if repaired || !touches(&broken.unreadable, first, count) => return Err(format!("a read of cells {first}+{count} fails: {error}")),
                    Err(_) => {}
                    Ok(_) => {
                        let model = model.borrow();
                        for i in 0..count {
                            let (index, number) = (window.index + (done + i) as usize, first + i);
                            let right = buf.with(|bytes| {
                                let bytes = &bytes[(i * cell) as usize..][..cell as usize];
                                model.oracle.may_survive(index, number, bytes)
                                    || touches(&broken.anything, number, 1)
                                    || (touches(&broken.lost, number, 1) && model.oracle.is_untouched(number, bytes))
                            });
                            if !right {
                                return Err(format!("cell {number} is read wrong: {}", model.oracle.explain(index)));
                            }
                        }
                    }
                }
                done += count;
            }
        }
        Ok(())
    }
}

/// Whether the bytes at `offset` are in the image, and how far.
fn place(world: &World, offset: u64, len: u64) -> Verdict<(bool, u64)> {
    match world.request(0, Request::BlockStatus { offset, len }) {
        Some(Ok(Reply::Status(status))) if status.len > 0 => Ok((matches!(status.place, Place::Data { .. }), status.len.min(len))),
        other => Err(format!("block status answers {other:?}")),
    }
}

/// Whether the time of the power cut has come.
fn reached(world: &World, cut: Option<&Cut>) -> bool {
    cut.is_some_and(|cut| world.counters().ops >= cut.at)
}

/// Runs until request `id` ends; `None` if the power goes first.
pub(crate) fn until_done(world: &Rc<World>, id: RequestId, cut: Option<&Cut>) -> Verdict<Option<Result<Reply, Error>>> {
    for _ in 0..STEPS_MAX {
        if let Some((ended, outcome)) = world.take_done() {
            if ended != id {
                return Err(format!("request {ended} ends instead of {id}"));
            }
            return Ok(Some(outcome));
        }
        if reached(world, cut) {
            return Ok(None);
        }
        if let Some(text) = world.violation() {
            return Err(text);
        }
        if !world.step() {
            return Err(format!("request {id} hangs"));
        }
    }
    Err(format!("request {id} does not end"))
}

/// Does the steps of a session. False after a cut. With `overlap`, the last requests may still be
/// under way at the end.
fn drive(guest: &mut Guest, world: &Rc<World>, session: &Session, depth: usize, overlap: bool) -> Verdict<bool> {
    let cut = session.cut.as_ref();
    let mut steps = session.steps.iter();
    let mut next = steps.next();
    for _ in 0..STEPS_MAX {
        if world.violation().is_some() || reached(world, cut) {
            return Ok(false);
        }
        match next {
            Some(step) if guest.under_way() < depth && (step.act != Act::Drain || guest.under_way() == 0) => {
                guest.issue(step);
                next = steps.next();
            }
            None if guest.under_way() == 0 || (overlap && guest.all_by_engine()) => return Ok(true),
            _ => {
                if !world.step() && !guest.reap() {
                    return Err(format!("requests hang: {}", guest.describe()));
                }
            }
        }
        guest.reap();
        if let Some(text) = guest.overdue() {
            return Err(text);
        }
    }
    Err(format!("a session of {} requests does not end: {}", session.steps.len(), guest.describe()))
}

/// Closes, with what is still under way. False if the power goes first, or an error that was made
/// to happen stops it.
fn close(guest: &mut Guest, world: &Rc<World>, cut: Option<&Cut>) -> Verdict<bool> {
    const ID: RequestId = RequestId::MAX - 1;
    guest.closing = true;
    world.submit(0, Request::Close, ID);
    for _ in 0..STEPS_MAX {
        match world.take_done() {
            Some((ID, outcome)) if guest.under_way() > 0 => return Err(format!("close ends before {}: {outcome:?}", guest.describe())),
            Some((ID, Ok(_))) => return Ok(true),
            Some((ID, Err(_))) if world.counters().injected > 0 => return Ok(false),
            Some((ID, Err(error))) => return Err(format!("close fails though nothing was made to fail: {error}")),
            Some(other) => guest.take(other),
            None if reached(world, cut) || world.violation().is_some() => return Ok(false),
            None if !world.step() => return Err(format!("close hangs; {}", guest.describe())),
            None => {}
        }
    }
    Err("close does not end".into())
}
