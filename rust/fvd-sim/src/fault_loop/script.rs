// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fault loops run: hosts of several geometries, and on each the life of an image in phases.
//! A phase starts from what the ones before leave behind when nothing fails, so that only the phase
//! with the failure is run for each N.

use crate::checker::{Checker, Mode, Model};
use crate::clock::{Latency, SECOND, US};
use crate::content::{BASE, FIRST_WRITE, GARBAGE, Tag, ZERO};
use crate::disk::{Keep, Tear};
use crate::geometry::Geometry;
use crate::guest::Guest;
use crate::options::{BaseIs, Options};
use crate::oracle::Oracle;
use crate::plan::{Act, Cut, Plan, Step};
use crate::run::{Run, Verdict, until_done};
use crate::store::Files;
use crate::world::{Answer, Leaks, World};
use fvd_engine::{Repair, Request};
use fvd_engine::faults::Fault;
use fvd_engine::host::{FileId, Limits, OpKind};
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS};
use fvd_format::{Header, RegionKind};
use std::cell::RefCell;
use std::rc::Rc;

/// A host.
pub struct Variant {
    /// Its name.
    pub name: &'static str,
    /// Alignment of requests: bytes.
    align: u32,
    /// Write granule: bytes. A large one fills the journal in a few commits.
    granule: u32,
    /// The storage neither grows nor reads as zero.
    fixed: bool,
    /// Chunk of a compact image: bytes; 0: flat.
    chunk: u32,
    /// Guest data lies in a file of its own.
    two_files: bool,
    /// In how many of 100 cases an operation ends before `submit` returns.
    inline_percent: u64,
    /// How long operations take, at most: nanoseconds. With a time of their own they overlap.
    spread: u64,
}

/// The hosts.
pub const VARIANTS: [Variant; 10] = [
    Variant { name: "512-growing", align: 512, granule: 4096, fixed: false, chunk: 0, two_files: false, inline_percent: 0, spread: 0 },
    Variant { name: "4096-growing", align: 4096, granule: 65536, fixed: false, chunk: 0, two_files: false, inline_percent: 0, spread: 0 },
    Variant { name: "512-fixed", align: 512, granule: 65536, fixed: true, chunk: 0, two_files: false, inline_percent: 100, spread: 0 },
    Variant { name: "4096-fixed", align: 4096, granule: 4096, fixed: true, chunk: 0, two_files: false, inline_percent: 0, spread: 0 },
    Variant { name: "512-slow", align: 512, granule: 4096, fixed: false, chunk: 0, two_files: false, inline_percent: 0, spread: 200 * US },
    Variant { name: "512-compact", align: 512, granule: 4096, fixed: false, chunk: 8192, two_files: false, inline_percent: 0, spread: 0 },
    Variant { name: "4096-compact-fixed", align: 4096, granule: 16384, fixed: true, chunk: 16384, two_files: false, inline_percent: 0, spread: 0 },
    Variant { name: "512-compact-slow", align: 512, granule: 4096, fixed: false, chunk: 16384, two_files: false, inline_percent: 0, spread: 200 * US },
    Variant { name: "512-data", align: 512, granule: 4096, fixed: false, chunk: 0, two_files: true, inline_percent: 0, spread: 0 },
    Variant { name: "4096-compact-data", align: 4096, granule: 4096, fixed: true, chunk: 4096, two_files: true, inline_percent: 0, spread: 0 },
];

/// Cells of the disk, which ends within a block; blocks are 8 cells.
const CELLS: u64 = 203;
/// Sectors of the base as it is recorded, which ends within a block, and as it is later.
const BASE_SECTORS: [u64; 2] = [117, 400];

const fn write(first: u64, count: u64) -> Act {
    Act::Write { first, count, fua: false }
}

const fn fua(first: u64, count: u64) -> Act {
    Act::Write { first, count, fua: true }
}

const fn zero(first: u64, count: u64, may_unmap: bool, fua: bool) -> Act {
    Act::Zero { first, count, may_unmap, fua }
}

/// Requests, in groups that are under way together.
pub type Steps = &'static [&'static [Act]];

const LATER: Act = Act::Sleep { ns: 6 * SECOND };
const ALL: Act = Act::Read { first: 0, count: CELLS };

const WRITE: Steps = &[
    &[write(1, 1)],
    &[write(16, 8)],
    &[write(30, 20)],
    &[Act::Flush],
    &[fua(3, 2)],
    &[write(60, 9), Act::Read { first: 55, count: 20 }, Act::Flush],
    &[zero(40, 11, true, false)],
    &[zero(70, 17, false, true)],
    &[Act::Discard { first: 16, count: 8 }],
    &[Act::Discard { first: 30, count: 7 }],
    // The block in which the base ends stays as it is.
    &[write(106, 6)],
    &[write(120, CELLS - 120)],
    &[Act::Flush],
    &[Act::Status { first: 0, count: CELLS }],
    &[write(80, 19)],
    &[LATER],
    &[write(100, 1)],
    &[Act::Flush, write(104, 3)],
    &[write(0, 6), write(4, 8), Act::Flush],
    &[Act::Flush],
    &[CHECK],
    &[ALL],
    &[fua(51, 3)],
];

const LAYOUT: Steps = &[
    &[write(24, 1)],
    &[Act::Grow { cells: 60 }],
    &[write(195, 21)],
    &[Act::ChangeBase],
    &[Act::Amend { chunks: 2 }],
    &[write(240, 5)],
    &[Act::Flush],
    &[Act::Empty],
    &[fua(9, 3)],
    &[Act::Grow { cells: 6000 }],
    &[write(250, 40)],
    &[zero(100, 50, true, false), Act::Flush],
    &[Act::Empty],
    &[write(22, 7)],
    &[Act::Shrink { cells: 6000 }],
    &[write(230, 33), Act::Flush],
    &[Act::Shrink { cells: 60 }, write(20, 9)],
    &[Act::Amend { chunks: 5 }, write(40, 30)],
    &[Act::Grow { cells: 50 }],
    &[write(212, 9)],
    &[CHECK],
];

const RECOVERED: Steps = &[&[Act::Read { first: 0, count: 150 }], &[write(2, 3)], &[write(86, 20)], &[Act::Flush], &[zero(5, 20, false, false)], &[fua(77, 1)]];

/// A look at everything.
const CHECK: Act = Act::Check { repair: Repair::None };
const LOOK: Steps = &[&[ALL], &[Act::Status { first: 0, count: CELLS }], &[CHECK]];

const PRISTINE: Steps = &[
    &[Act::Read { first: 0, count: 20 }],
    &[write(3, 1)],
    &[write(10, 20), zero(60, 9, true, false)],
    &[Act::Flush],
    &[Act::Discard { first: 0, count: 8 }],
    &[Act::Grow { cells: 100 }],
    &[write(195, 30)],
    &[LATER],
];

const PRISTINE_GROWTH: Steps = &[&[Act::Grow { cells: 100 }], &[fua(195, 30)]];

/// An image at rest, and what the guest knows of it.
#[derive(Clone)]
pub struct Start {
    /// The files.
    pub files: Files,
    /// `None`: there is no image yet.
    pub model: Option<Model>,
    cells: u64,
    tag: Tag,
    leaks: Leaks,
}

/// What is done in a phase.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// The image is made.
    Create,
    /// It is opened and used.
    Session,
    /// It is opened only to be read.
    Look,
}

/// A part of an image's life.
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// The image and the host.
    pub plan: Rc<Plan>,
    /// What it starts from.
    pub start: Start,
    /// What is done.
    pub work: Work,
    /// The guest's requests.
    pub steps: Steps,
}

impl Phase {
    /// A run of this phase, at its start.
    pub fn run(&self, fault: Option<Fault>, trace: bool) -> Run<'_> {
        let start = &self.start;
        let model = start.model.clone().map(|model| Rc::new(RefCell::new(model)));
        Run { files: start.files.clone(), model, cells: start.cells, next_tag: start.tag, leaks: start.leaks, ..Run::new(&self.plan, fault, trace) }
    }
}

fn plan(variant: &Variant, base: BaseIs, preallocate: bool) -> Rc<Plan> {
    let image = Limits {
        request_alignment: variant.align,
        memory_alignment: 512,
        write_granule: variant.granule,
        grows_zeroed: !variant.fixed,
        cheap_zeroing: !variant.fixed || variant.chunk == 0,
        can_fua: false,
    };
    let options = Options {
        cell: 512,
        cells: CELLS,
        starts: vec![0],
        window: CELLS,
        base,
        base_bytes: BASE_SECTORS.map(|sectors| sectors * 512),
        block_size: 4096,
        chunk_size: variant.chunk,
        step_chunks: 3,
        fixed_room: 4 << 20,
        // The regions end where the data begins, so that new ones are in the way of growth.
        journal_size: 1664 << 10,
        holes: base == BaseIs::Known,
        preallocate,
        data: variant.two_files.then_some(image),
        limits: [image, Limits { request_alignment: variant.align, memory_alignment: 512, ..Limits::default() }],
        queues: 1,
        inline_percent: variant.inline_percent,
        checkpoint_after: 3,
        commit_interval_ns: 5 * SECOND,
        latency: [Latency { spread: variant.spread, ..Latency::NONE }; 2],
        discard_ignored_percent: 0,
        zeroing_is_dear: variant.fixed && variant.two_files,
        discard_no_unref: false,
        answer: Answer::default(),
        wait_for_space: false,
        ..Options::draw(0)
    };
    Rc::new(Plan { options, create_cuts: Vec::new(), sessions: Vec::new() })
}

/// What the guest knows of an image just made. Nothing is loose here: what lies beyond the recorded
/// end of the base is zero, and only emptying shows more of it.
pub fn model(run: &Run, header: &Header) -> Model {
    let options = run.options;
    let geometry = Geometry::new(options.cell, options.cells, vec![0], options.window);
    let unknown = header.pristine || header.base_length == BASE_LENGTH_UNKNOWN;
    let (covered, length) = (if header.pristine { u64::MAX } else { header.covered }, if unknown { u64::MAX } else { header.base_length });
    let tag = |index| match geometry.cell_at(index) * options.cell {
        at if at < covered.min(length) => BASE,
        at if at >= covered && !options.data_limits().grows_zeroed && !options.preallocate && options.chunk_size == 0 => GARBAGE,
        _ => ZERO,
    };
    let mut oracle = Oracle::new((0..geometry.total()).map(tag).collect());
    oracle.base = run.base(1).map(|base| (base, u64::MAX));
    Model { oracle, geometry, grow_units: vec![header.storage_grow_unit] }
}

/// Lets the guest do a group of requests, which all end.
pub fn work(guest: &mut Guest, world: &World, model: &RefCell<Model>, steps: &[Step]) -> Verdict<()> {
    for step in steps {
        guest.issue(step);
        // The base never goes, and is no longer than the oracle knows.
        model.borrow_mut().oracle.loose = false;
    }
    while guest.under_way() > 0 {
        if !world.step() && !guest.reap() {
            return Err(format!("requests hang: {}", guest.describe()));
        }
        guest.reap();
        if let Some(text) = guest.overdue().or_else(|| world.violation()) {
            return Err(text);
        }
    }
    if steps.iter().any(|step| matches!(step.act, Act::Sleep { .. })) {
        // The timer, and what it starts.
        world.step();
        world.settle();
    }
    world.violation().map_or(Ok(()), Err)
}

/// The acts of a group as steps; reads and writes go by turns as the engine's and as QEMU's do.
pub fn steps_of(number: usize, acts: &[Act]) -> Vec<Step> {
    acts.iter().map(|act| Step { act: *act, queue: 0, shim: number % 2 == 1, address: 0 }).collect()
}

/// When the power goes in a run that prepares the start of a phase.
#[derive(Clone, Copy)]
enum Crash {
    /// After the last request.
    End,
    /// While a page is written in place, which destroys it.
    InPlace,
    /// While header copy 1 is written, which destroys it.
    Header,
    /// Never: the image is closed.
    No,
}

impl Crash {
    /// Whether the time has come.
    fn now(self, world: &World) -> bool {
        let Ok(info) = world.image().info() else { return false };
        let within = |kind, at: u64| info.header.region(kind).is_some_and(|r| (r.offset..r.end()).contains(&at));
        world.under_way().into_iter().any(|(op, file, at, _)| {
            let writes = file == FileId::Image && matches!(op, OpKind::Write { .. });
            writes
                && match self {
                    Self::InPlace => within(RegionKind::Bitmap, at) || within(RegionKind::PageMap, at),
                    Self::Header => at == HEADER_OFFSETS[0],
                    Self::End | Self::No => false,
                }
        })
    }
}

/// What a phase leaves behind when nothing fails, or the power goes in it.
fn after(phase: &Phase, fault: Option<Fault>, crash: Crash) -> Verdict<Start> {
    let mut run = phase.run(fault, false);
    let model = run.model();
    let mut setup = run.setup(0, 1);
    // What has to be caught under way must be under way.
    setup.inline_percent = 0;
    let world = World::new(setup, Checker::new(Mode::Open, Some(model.clone())));
    until_done(&world, 0, submit(&world, Request::Open))?.expect("nothing cuts it").map_err(|error| error.to_string())?;
    run.opened(&world)?;
    let mut guest = Guest::new(world.clone(), model.clone(), run.cells, run.next_tag);
    for (number, acts) in phase.steps.iter().enumerate() {
        for step in steps_of(number, acts) {
            guest.issue(&step);
            model.borrow_mut().oracle.loose = false;
        }
        while guest.under_way() > 0 && !crash.now(&world) {
            world.step();
            guest.reap();
        }
        if crash.now(&world) {
            break;
        }
        work(&mut guest, &world, &model, &[])?;
    }
    let destroyed = crash.now(&world);
    if matches!(crash, Crash::InPlace | Crash::Header) && !destroyed {
        return Err(format!("no crash of that kind in {}", phase.name));
    }
    (run.cells, run.maybe_cells) = (guest.cells, guest.maybe_cells);
    if let Crash::No = crash {
        until_done(&world, 0, submit(&world, Request::Close))?.expect("nothing cuts it").map_err(|error| error.to_string())?;
        run.files = world.cut(&Keep::Seeded(0));
        run.leave(&world)?;
        run.leaks = world.leaks();
        model.borrow_mut().oracle.flushed_all();
    } else {
        let header = world.image().info().map_err(|error| error.to_string())?.header;
        world.set_metadata_end(&header);
        let changes = world.unflushed() + usize::from(destroyed);
        let survivors = (1u64 << changes.min(63)) - 1;
        let keep = match world.under_way().len() {
            0 => Keep::Subset { survivors, tear: Tear::Whole },
            1 => Keep::Subset { survivors, tear: Tear::Destroyed(0) },
            // Which of them is destroyed is left to chance: only metadata may be.
            _ => Keep::Seeded(0),
        };
        run.power_cut(&world, &keep, &[])?;
    }
    let model = model.borrow().clone();
    Ok(Start { files: run.files, model: Some(model), cells: run.cells, tag: guest.next_tag, leaks: run.leaks })
}

fn submit(world: &Rc<World>, request: Request<crate::memory::Buf>) -> Option<&'static Cut> {
    world.submit(0, request, 0);
    None
}

/// An image just made.
fn created(empty: &Phase, fault: Option<Fault>) -> Verdict<Start> {
    let mut run = empty.run(fault, false);
    let mut setup = run.setup(0, 0);
    setup.attached = run.options.base == BaseIs::Known;
    let world = World::new(setup, Checker::new(Mode::Create, None));
    let params = Request::Create(Box::new(run.params()));
    until_done(&world, 0, submit(&world, params))?.expect("nothing cuts it").map_err(|error| error.to_string())?;
    run.files = world.cut(&Keep::Seeded(0));
    run.leave(&world)?;
    let header = run.try_header(0)?.map_err(|error| error.to_string())?;
    let model = model(&run, &header);
    Ok(Start { model: Some(model), files: run.files, ..empty.start.clone() })
}

/// The phases on a host.
pub fn phases(variant: &Variant, fault: Option<Fault>) -> Verdict<Vec<Phase>> {
    let known = plan(variant, BaseIs::Known, false);
    let phase = |name, plan: &Rc<Plan>, start: &Start, work, steps| Phase { name, plan: plan.clone(), start: start.clone(), work, steps };
    let Run { files, leaks, .. } = Run::new(&known, fault, false);
    let none = Start { files, model: None, cells: CELLS, tag: FIRST_WRITE, leaks };
    let create = phase("create", &known, &none, Work::Create, &[]);
    let made = created(&create, fault)?;
    let writes = phase("write", &known, &made, Work::Session, WRITE);
    let closed = after(&writes, fault, Crash::No)?;
    // Storage that does not grow keeps what it held beyond the base, unless it is written.
    let full = plan(variant, BaseIs::Known, variant.fixed);
    let mut out = vec![phase("create-again", &full, &closed, Work::Create, &[]), phase("layout", &known, &closed, Work::Session, LAYOUT)];
    let crashes = [("recover-journal", "look-journal", Crash::End), ("recover-pages", "look-pages", Crash::InPlace), ("recover-header", "look-header", Crash::Header)];
    for (recover, look, crash) in crashes {
        let start = after(&writes, fault, crash)?;
        out.push(phase(recover, &known, &start, Work::Session, RECOVERED));
        out.push(phase(look, &known, &start, Work::Look, LOOK));
    }
    if !variant.fixed || variant.chunk > 0 {
        let surprise = plan(variant, if variant.fixed { BaseIs::None } else { BaseIs::Surprise }, false);
        let bare = phase("create-bare", &surprise, &none, Work::Create, &[]);
        let start = created(&bare, fault)?;
        out.push(phase("pristine", &surprise, &start, Work::Session, PRISTINE));
        out.push(phase("pristine-growth", &surprise, &start, Work::Session, PRISTINE_GROWTH));
        out.push(bare);
    }
    out.extend([create, writes]);
    Ok(out)
}
