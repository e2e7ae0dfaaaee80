// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plays one sequence. Crash points are those of its last letter: those of the letters before it
//! belong to shorter sequences.

use super::alphabet::{ALPHABET, DISK, Do, SHORT};
use super::judge::{Allowed, Judge, code, is_metadata};
use super::tear::{Cut, Hashed};
use super::{Stage, Tally};
use crate::checker::{Checker, Mode, Model};
use crate::clock::SECOND;
use crate::content::{BASE, FIRST_WRITE, ZERO};
use crate::disk::{Keep, Tear};
use crate::geometry::Geometry;
use crate::guest::Guest;
use crate::memory::Buf;
use crate::oracle::{Moment, Oracle};
use crate::plan::{Act, Step};
use crate::store::Store;
use crate::world::{RequestId, World};
use fvd_engine::Request;
use fvd_engine::host::FileId;
use fvd_format::Header;
use std::cell::RefCell;
use std::rc::Rc;

/// Steps a letter may take, at most.
const STEPS_MAX: u64 = 100_000;
/// Ids of requests that are not the guest's.
const MINE: RequestId = 1 << 40;

type Verdict<T> = Result<T, String>;

/// What a crash point depends on.
#[derive(PartialEq, Eq)]
struct Point {
    flushed: u64,
    mark: u64,
    under_way: Vec<(fvd_engine::host::OpKind, FileId, u64, u64)>,
    allowed: Allowed,
}

/// A sequence under way.
pub struct Player<'a> {
    stage: &'a Stage,
    judge: &'a Judge<'a>,
    model: Rc<RefCell<Model>>,
    world: Rc<World>,
    guest: Guest,
    /// The longer base is attached, and from now on each commit is followed by a checkpoint.
    long: bool,
    eager: bool,
    /// Which bases the header may name.
    bases: [bool; 2],
    mine: Option<RequestId>,
    last: bool,
    newest: bool,
    before: Option<Point>,
    stable: Option<(u64, Hashed)>,
    tally: Tally,
}

/// Plays `sequence` and judges every file that a cut in its last letter may leave.
pub fn play(stage: &Stage, judge: &Judge<'_>, sequence: &[usize]) -> Verdict<Tally> {
    let mut player = Player::new(stage, judge);
    player.open()?;
    for (position, letter) in sequence.iter().enumerate() {
        player.last = position + 1 == sequence.len();
        player.guest.next_tag = FIRST_WRITE + 2 * position as u64;
        player.perform(ALPHABET[*letter].1).map_err(|text| format!("in '{}': {text}", ALPHABET[*letter].0))?;
        if stage.synced && !player.last {
            player.together(&[Act::Flush], false)?;
        }
    }
    player.world.end();
    player.world.violation().map_or(Ok(player.tally), Err)
}

impl<'a> Player<'a> {
    fn new(stage: &'a Stage, judge: &'a Judge<'a>) -> Self {
        let geometry = Geometry::new(512, DISK, vec![0], DISK);
        let mut oracle = Oracle::new((0..DISK).map(|cell| if cell < SHORT { BASE } else { ZERO }).collect());
        oracle.base = Some((stage.base(false), u64::MAX));
        let model = Rc::new(RefCell::new(Model { oracle, geometry, grow_units: vec![stage.grow_unit()] }));
        let world = World::new(stage.setup(stage.image.clone(), false, false), Checker::new(Mode::Open, Some(model.clone())));
        let guest = Guest::new(world.clone(), model.clone(), DISK, FIRST_WRITE);
        Self {
            stage,
            judge,
            model,
            world,
            guest,
            long: false,
            eager: false,
            bases: [true, false],
            mine: None,
            last: false,
            newest: false,
            before: None,
            stable: None,
            tally: Tally::default(),
        }
    }

    fn perform(&mut self, what: Do) -> Verdict<()> {
        match what {
            Do::Together(acts) => self.together(acts, false),
            Do::Newest(acts) => {
                self.newest = true;
                self.together(acts, false)?;
                self.newest = false;
                Ok(())
            }
            Do::Shim(acts) => self.together(acts, true),
            Do::Rebase => self.rebase(),
            Do::Empty => self.empty(),
            Do::EmptyBesideShim => {
                self.issue(Act::Write { first: 9, count: 2, fua: false }, true);
                self.empty()
            }
            Do::Tick => {
                self.world.sleep(6 * SECOND);
                self.watch()?;
                self.world.step();
                self.pump()
            }
            Do::Reopen => self.reopen(),
            Do::ReopenEager => {
                self.eager = true;
                self.reopen()
            }
            Do::Crash => self.crash(),
        }
    }

    fn issue(&mut self, act: Act, shim: bool) {
        self.guest.issue(&Step { act, queue: 0, shim, address: 0 });
    }

    fn together(&mut self, acts: &[Act], shim: bool) -> Verdict<()> {
        for act in acts {
            self.issue(*act, shim);
        }
        self.pump()
    }

    /// A request of the host's side.
    fn ask(&mut self, request: Request<Buf>) -> Verdict<()> {
        self.mine = Some(MINE);
        self.world.submit(0, request, MINE);
        self.pump()
    }

    /// Runs until nothing is under way, and looks at each crash point.
    fn pump(&mut self) -> Verdict<()> {
        for _ in 0..STEPS_MAX {
            while let Some((id, outcome)) = self.world.take_done() {
                if self.mine == Some(id) {
                    outcome.map_err(|error| format!("fails: {error}"))?;
                    self.mine = None;
                } else {
                    self.guest.take((id, outcome));
                }
            }
            self.guest.reap();
            if let Some(text) = self.world.violation() {
                return Err(text);
            }
            self.watch()?;
            let ended = self.mine.is_none() && self.guest.under_way() == 0;
            if ended && self.world.is_idle() {
                return Ok(());
            }
            let under_way = self.world.under_way().len();
            if self.newest && under_way > 1 {
                self.world.finish_nth(under_way - 1, None);
            } else if !self.world.step() && !ended {
                return Err(format!("requests hang: {}", self.guest.describe()));
            }
        }
        Err(format!("requests do not end: {}", self.guest.describe()))
    }

    fn open(&mut self) -> Verdict<()> {
        self.ask(Request::Open)
    }

    fn base_now(&mut self) {
        self.model.borrow_mut().oracle.base = Some((self.stage.base(self.long), u64::MAX));
    }

    fn rebase(&mut self) -> Verdict<()> {
        self.long = true;
        self.bases[1] = true;
        self.world.set_base(self.stage.base(true));
        self.base_now();
        // A block that was copied from the shorter base holds zeroes where the longer one has data.
        self.model.borrow_mut().oracle.loose = true;
        self.ask(Request::ChangeBase { name: "long".into(), format: "raw".into() })?;
        self.bases[0] = false;
        self.watch()
    }

    fn empty(&mut self) -> Verdict<()> {
        let cells = self.guest.cells as usize;
        let begun: Moment = self.model.borrow_mut().oracle.begin(BASE, 0, cells, None);
        self.ask(Request::MakeEmpty)?;
        {
            let oracle = &mut self.model.borrow_mut().oracle;
            oracle.end(begun, 0, cells);
            oracle.durable(begun, 0, cells);
        }
        self.watch()
    }

    fn reopen(&mut self) -> Verdict<()> {
        self.ask(Request::Close)?;
        self.model.borrow_mut().oracle.flushed_all();
        self.watch()?;
        let bytes = self.power_off();
        self.enter(bytes);
        self.open()
    }

    fn crash(&mut self) -> Verdict<()> {
        let bytes = self.power_off();
        self.model.borrow_mut().oracle.crash();
        self.enter(bytes);
        self.open()?;
        let cells = self.guest.cells;
        let buf = Buf::new(vec![0xee; (cells * 512) as usize], 0);
        let outcome = self.world.request(0, Request::Read { offset: 0, buf: buf.clone() }).ok_or("a read hangs")?;
        outcome.map_err(|error| format!("a read fails: {error}"))?;
        let oracle = &mut self.model.borrow_mut().oracle;
        let wrong = buf.with(|bytes| (0..cells).find(|cell| !oracle.settle(*cell as usize, *cell, &bytes[*cell as usize * 512..][..512])));
        wrong.map_or(Ok(()), |cell| Err(format!("after a crash, cell {cell} is wrong: {} (C4)", oracle.explain(cell as usize))))
    }

    fn power_off(&mut self) -> Store {
        let none = Keep::Subset { survivors: 0, tear: Tear::Whole };
        self.world.cut(&none).image
    }

    /// The next session, on what the last one left.
    fn enter(&mut self, bytes: Store) {
        let setup = self.stage.setup(bytes, self.long, self.eager);
        self.world = World::new(setup, Checker::new(Mode::Open, Some(self.model.clone())));
        let tag = self.guest.next_tag;
        self.guest = Guest::new(self.world.clone(), self.model.clone(), self.guest.cells, tag);
        (self.before, self.stable) = (None, None);
    }

    fn allowed(&self) -> Allowed {
        let model = self.model.borrow();
        let mask = |index| {
            let mask = model.oracle.survivors(index).fold(0u64, |mask, tag| mask | 1 << code(tag));
            let copied = self.long && index as u64 >= SHORT && mask >> code(BASE) & 1 == 1;
            mask | u64::from(copied) << code(ZERO)
        };
        let mut cells: Vec<u64> = (0..model.oracle.len()).map(mask).collect();
        let after = self.guest.maybe_cells.unwrap_or(self.guest.cells);
        // What a growth under way adds.
        cells.resize(cells.len().max(after as usize), 1 << code(ZERO));
        Allowed { cells, sizes: [self.guest.cells, after], bases: self.bases, grow_units: model.grow_units.clone() }
    }

    /// A crash point: judges all that a cut now may leave.
    fn watch(&mut self) -> Verdict<()> {
        if !self.last {
            return Ok(());
        }
        self.tally.cuts += 1;
        let (world, allowed) = (self.world.clone(), self.allowed());
        let under_way = world.changes_under_way();
        let disk = world.disk();
        let flushed = disk.mark() - disk.unflushed().len() as u64;
        let point = Point { flushed, mark: disk.mark(), under_way: world.under_way(), allowed };
        if self.before.as_ref() == Some(&point) {
            return Ok(());
        }
        if self.stable.as_ref().is_none_or(|(at, _)| *at != flushed) {
            self.stable = Some((flushed, Hashed::new(disk.stable.clone())));
        }
        let (_, stable) = self.stable.as_ref().expect("just made");
        let changes: Vec<_> = disk.unflushed().iter().cloned().chain(under_way).collect();
        let image = world.image().info().ok();
        let header = image.map(|info| Header { virtual_size: point.allowed.sizes.into_iter().max().expect("two sizes") * 512, ..info.header });
        let metadata = |at, len| header.as_ref().is_some_and(|header| is_metadata(header, at, len));
        let (judge, allowed, tally) = (self.judge, &point.allowed, &mut self.tally);
        tally.most = tally.most.max(changes.len() as u64);
        tally.sampled += u64::from(changes.len() > super::tear::ALL);
        let mut verdict = Cut::new(&changes, metadata).each(stable, &mut |file, kept| {
            tally.files += 1;
            judge.judge(file, allowed).map_err(|text| format!("cut {}, of {} changes {kept} survive: {text}", tally.cuts, changes.len()))
        });
        if let Err(text) = &mut verdict {
            for change in &changes {
                *text += &format!("\n    {}", describe(change));
            }
        }
        self.before = Some(point);
        verdict
    }
}

fn describe(change: &crate::disk::Change) -> String {
    match change {
        crate::disk::Change::Bytes(at, bytes) => format!("write of {} bytes at {at}", bytes.len()),
        crate::disk::Change::Zero(at, len) => format!("zeroing of {len} bytes at {at}"),
        crate::disk::Change::Length(len) => format!("length {len}"),
    }
}
