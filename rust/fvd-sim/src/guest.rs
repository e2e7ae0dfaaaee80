// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest of one session: its requests under way, by the engine or the way QEMU takes, and what
//! each must have come to when it ends.

use crate::checker::Model;
use crate::content::{self, BASE, Tag, ZERO};
use crate::memory::Buf;
use crate::oracle::Moment;
use crate::plan::{Act, Step};
use crate::world::{Outcome, RequestId, World};
use fvd_engine::host::{FileId, HostOp, OpKind, Segment};
use fvd_engine::{AmendParams, BracketToken, CheckReport, Kind, Lookup, Place, Reply, Request};
use std::cell::RefCell;
use std::rc::Rc;

/// Longest time a request may take: nanoseconds of simulated time.
const PATIENCE: u64 = 3600 * crate::clock::SECOND;

#[derive(Debug)]
enum What {
    Change { begun: Moment, first: u64, count: u64, fua: bool, maybe: bool },
    Read { began: Moment, first: u64 },
    Status { began: Moment, first: u64, count: u64 },
    Flush { begun: Moment },
    Grow { cells: u64 },
    Shrink { cells: u64 },
    Empty { begun: Moment },
    Amend { unit: u64 },
    Beyond,
    Check,
    Other,
}

/// A request that goes the way QEMU takes.
#[derive(Debug)]
struct Shim {
    offset: u64,
    done: usize,
    write: bool,
    token: Option<BracketToken>,
    /// Bytes of the piece under way.
    piece: usize,
    /// The engine was asked for the rest: its memory.
    rest: Option<Buf>,
}

#[derive(Debug)]
struct Flight {
    id: RequestId,
    step: Step,
    what: What,
    buf: Option<Buf>,
    shim: Option<Shim>,
    queue: usize,
    since: u64,
    /// The disk shrank below its end since it began.
    cut: bool,
}

/// The guest.
pub struct Guest {
    world: Rc<World>,
    model: Rc<RefCell<Model>>,
    flights: Vec<Flight>,
    next_id: RequestId,
    /// Tag of the next write.
    pub next_tag: Tag,
    /// Cells of the disk.
    pub cells: u64,
    /// The size that a resize under way, or one that failed, may have left.
    pub maybe_cells: Option<u64>,
    /// Requests that ended.
    pub ended: u64,
    /// The base may be attached and detached: it has content.
    pub has_base: bool,
    /// The storage does not grow.
    pub fixed: bool,
    /// Storage is allocated as the guest writes.
    pub compact: bool,
    /// The image is being closed: no storage comes any more.
    pub closing: bool,
    /// Steps that failed since this was last emptied, for whoever wants to judge or repeat them.
    pub errors: Vec<(Step, fvd_engine::Error)>,
    alignment: [u32; 2],
}

impl Guest {
    /// The guest of a session.
    pub fn new(world: Rc<World>, model: Rc<RefCell<Model>>, cells: u64, next_tag: Tag) -> Self {
        let alignment = world.data_alignment();
        Self { world, model, flights: Vec::new(), next_id: 1, next_tag, cells, maybe_cells: None, ended: 0, has_base: true, fixed: false, compact: false, closing: false, errors: Vec::new(), alignment }
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// Whether none of the requests under way needs another lookup.
    pub fn all_by_engine(&self) -> bool {
        self.flights.iter().all(|f| f.shim.is_none())
    }

    /// When the oldest read under way began.
    fn readers(&self) -> Option<Moment> {
        self.flights.iter().filter_map(|f| if let What::Read { began, .. } = f.what { Some(began) } else { None }).min()
    }

    /// Whether the guest uses all these cells.
    fn fits(&self, first: u64, count: u64) -> bool {
        let model = self.model.borrow();
        first + count <= self.cells && model.geometry.windows.iter().any(|w| w.first <= first && first + count <= w.first + w.count)
    }

    /// Does a step of the plan; what does not fit the disk any more is left out.
    pub fn issue(&mut self, step: &Step) {
        let cell = self.model.borrow().geometry.cell;
        match step.act {
            Act::Write { first, count, fua } if self.fits(first, count) => self.write(step, first, count, fua),
            Act::Zero { first, count, may_unmap, fua } if self.fits(first, count) => {
                let what = self.change(ZERO, first, count, fua, false);
                self.submit(step, what, None, Request::WriteZeroes { offset: first * cell, len: count * cell, may_unmap, fua });
            }
            Act::Discard { first, count } if self.fits(first, count) => {
                let what = self.change(ZERO, first, count, false, true);
                self.submit(step, what, None, Request::Discard { offset: first * cell, len: count * cell });
            }
            Act::Read { first, count } if self.fits(first, count) => self.read(step, first, count),
            Act::Status { first, count } if self.fits(first, count) => {
                let began = self.model.borrow_mut().oracle.tick();
                self.submit(step, What::Status { began, first, count }, None, Request::BlockStatus { offset: first * cell, len: count * cell });
            }
            Act::Flush => {
                let begun = self.model.borrow_mut().oracle.tick();
                self.submit(step, What::Flush { begun }, None, Request::Flush);
            }
            Act::Empty if self.has_base && self.maybe_cells.is_none() => {
                let readers = self.readers();
                let begun = {
                    let oracle = &mut self.model.borrow_mut().oracle;
                    // From now on all of the base may count, whatever its recorded length.
                    oracle.loose = true;
                    oracle.base.iter_mut().for_each(|(_, counts)| *counts = u64::MAX);
                    oracle.begin(BASE, 0, oracle.len(), readers)
                };
                self.submit(step, What::Empty { begun }, None, Request::MakeEmpty);
            }
            // What began before the disk shrank must not find it grown again: nobody could tell what it does.
            Act::Grow { cells } if self.maybe_cells.is_none() && !self.flights.iter().any(|f| f.cut) && !self.flights.iter().any(|f| matches!(f.what, What::Empty { .. })) => {
                let to = self.cells + cells;
                self.maybe_cells = Some(to);
                self.submit(step, What::Grow { cells: to }, None, Request::Resize { size: to * cell, zeroed: true });
            }
            Act::Shrink { cells } if self.maybe_cells.is_none() && cells < self.cells && !self.flights.iter().any(|f| matches!(f.what, What::Empty { .. })) => {
                let to = self.cells - cells;
                self.maybe_cells = Some(to);
                self.submit(step, What::Shrink { cells: to }, None, Request::Resize { size: to * cell, zeroed: false });
            }
            Act::ChangeBase => {
                let name = format!("base {}", self.next_id);
                self.submit(step, What::Other, None, Request::ChangeBase { name, format: "raw".into() });
            }
            // One at a time: nobody could tell which of two was last.
            Act::Amend { chunks } if !self.flights.iter().any(|f| matches!(f.what, What::Amend { .. })) => {
                let chunk = self.world.image().info().map_or(0, |info| u64::from(info.header.chunk_size));
                if chunk > 0 {
                    let unit = chunks * chunk;
                    self.model.borrow_mut().grow_units.push(unit);
                    let params = AmendParams { storage_grow_unit: Some(unit), chunk_size: Some(chunk), ..AmendParams::default() };
                    self.submit(step, What::Amend { unit }, None, Request::Amend(Box::new(params)));
                }
            }
            Act::Check { repair } => self.submit(step, What::Check, None, Request::Check { repair }),
            Act::Beyond { write } if self.maybe_cells.is_none() => {
                let buf = Buf::new(vec![0; cell as usize * 2], 0);
                let offset = (self.cells - 1) * cell;
                let request = if write { Request::Write { offset, buf, fua: false } } else { Request::Read { offset, buf } };
                self.submit(step, What::Beyond, None, request);
            }
            Act::Sleep { ns } => self.world.sleep(ns),
            Act::Attach { attached } => {
                self.model.borrow_mut().oracle.loose = true;
                self.world.attach(attached && self.has_base);
            }
            _ => {}
        }
    }

    fn change(&mut self, tag: Tag, first: u64, count: u64, fua: bool, maybe: bool) -> What {
        let readers = self.readers();
        let model = &mut *self.model.borrow_mut();
        let begun = model.oracle.begin(tag, model.geometry.index(first), count as usize, readers);
        What::Change { begun, first, count, fua, maybe }
    }

    fn write(&mut self, step: &Step, first: u64, count: u64, fua: bool) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let cell = self.model.borrow().geometry.cell;
        let mut bytes = vec![0; (count * cell) as usize];
        for (i, piece) in bytes.chunks_exact_mut(cell as usize).enumerate() {
            content::fill(tag, first + i as u64, piece);
        }
        let what = self.change(tag, first, count, fua, false);
        let buf = Buf::new(bytes, usize::from(step.address));
        if step.shim && !fua && self.shim_can(first * cell, count * cell, step) {
            return self.begin_shim(step, what, buf, first * cell, true);
        }
        self.submit(step, what, Some(buf.clone()), Request::Write { offset: first * cell, buf, fua });
    }

    fn read(&mut self, step: &Step, first: u64, count: u64) {
        let (cell, began) = {
            let mut model = self.model.borrow_mut();
            (model.geometry.cell, model.oracle.tick())
        };
        let buf = Buf::new(vec![0xee; (count * cell) as usize], usize::from(step.address));
        let what = What::Read { began, first };
        if step.shim && self.shim_can(first * cell, count * cell, step) {
            return self.begin_shim(step, what, buf, first * cell, false);
        }
        self.submit(step, what, Some(buf.clone()), Request::Read { offset: first * cell, buf });
    }

    fn flight(&mut self, step: &Step, what: What, buf: Option<Buf>, shim: Option<Shim>) -> RequestId {
        let id = self.next_id;
        self.next_id += 1;
        self.flights.push(Flight { id, step: *step, what, buf, shim, queue: usize::from(step.queue), since: self.world.now(), cut: false });
        id
    }

    fn submit(&mut self, step: &Step, what: What, buf: Option<Buf>, request: Request<Buf>) {
        let id = self.flight(step, what, buf, None);
        self.world.submit(usize::from(step.queue), request, id);
    }

    /// QEMU's block layer aligns requests before the driver sees them.
    fn shim_can(&self, offset: u64, len: u64, step: &Step) -> bool {
        let [request, memory] = self.alignment;
        (offset | len) % u64::from(request) == 0 && u64::from(step.address) % u64::from(memory) == 0 && len % u64::from(memory) == 0
    }

    fn begin_shim(&mut self, step: &Step, what: What, buf: Buf, offset: u64, write: bool) {
        let id = self.flight(step, what, Some(buf), Some(Shim { offset, done: 0, write, token: None, piece: 0, rest: None }));
        self.continue_shim(id);
    }

    /// The next piece of a request: by a lookup, or what is left by the engine.
    fn continue_shim(&mut self, id: RequestId) {
        let flight = self.flights.iter_mut().find(|f| f.id == id).expect("a request under way");
        let (queue, buf) = (flight.queue, flight.buf.clone().expect("a request with memory"));
        let shim = flight.shim.as_mut().expect("a request of the guest's side");
        let left = buf.with(<[u8]>::len) - shim.done;
        let at = shim.offset + shim.done as u64;
        match self.world.lookup(queue, at, left as u64, shim.write) {
            Lookup::Data { file, offset, len, token } => {
                if len == 0 || len > left as u64 || file != self.world.data_file() {
                    self.world.fail(format!("a lookup of {left} bytes answers {len} in {file:?}"));
                }
                (shim.token, shim.piece) = (Some(token), len as usize);
                let segment = Segment::Guest { buf, at: shim.done, len: len as usize };
                let kind = if shim.write { OpKind::Write { fua: false } } else { OpKind::Read };
                self.world.own_io(id, HostOp { kind, file, offset, len, segments: vec![segment] });
            }
            Lookup::Ask => {
                let rest = Buf::new(buf.with(|bytes| bytes[shim.done..].to_vec()), 0);
                shim.rest = Some(rest.clone());
                let request = if shim.write { Request::Write { offset: at, buf: rest, fua: false } } else { Request::Read { offset: at, buf: rest } };
                self.world.submit(queue, request, id);
            }
        }
    }

    /// Takes note of everything that ended. True if anything did.
    pub fn reap(&mut self) -> bool {
        let mut any = false;
        while let Some((id, ret)) = self.world.take_own_done() {
            any = true;
            self.own_done(id, ret);
        }
        while let Some(done) = self.world.take_done() {
            any = true;
            self.take(done);
        }
        any
    }

    /// Takes note of one request that ended.
    pub fn take(&mut self, (id, outcome): (RequestId, Outcome)) {
        match self.flights.iter().position(|f| f.id == id) {
            Some(at) => {
                let flight = self.flights.swap_remove(at);
                self.finish(flight, outcome);
            }
            None => self.world.fail(format!("request {id} ends twice, or never began")),
        }
    }

    fn own_done(&mut self, id: RequestId, ret: i64) {
        let at = self.flights.iter().position(|f| f.id == id).expect("own I/O of a request under way");
        let flight = &mut self.flights[at];
        let shim = flight.shim.as_mut().expect("a request of the guest's side");
        shim.done += shim.piece;
        let (done, token) = (shim.done, shim.token.take().expect("a bracket"));
        let all = flight.buf.as_ref().is_some_and(|buf| buf.with(<[u8]>::len) == done);
        self.world.image().end(token);
        if ret < 0 || all {
            let flight = self.flights.swap_remove(at);
            let kind = if ret == -28 { Kind::NoSpace } else { Kind::Host(-ret as i32) };
            let error = || fvd_engine::Error { kind, text: "the guest's own I/O failed".into() };
            self.finish(flight, if ret < 0 { Err(error()) } else { Ok(Reply::Done) });
        } else {
            self.continue_shim(id);
        }
    }

    fn finish(&mut self, flight: Flight, outcome: Outcome) {
        self.ended += 1;
        let rest = flight.shim.as_ref().and_then(|shim| shim.rest.clone());
        if let (Some(rest), Some(buf), Some(shim)) = (&rest, &flight.buf, &flight.shim) {
            if !shim.write {
                rest.with(|bytes| buf.with_mut(shim.done, bytes.len(), |to| to.copy_from_slice(bytes)));
            }
        }
        if ![&rest, &flight.buf].iter().all(|buf| buf.as_ref().is_none_or(Buf::end)) {
            self.world.fail("memory of a request was used after its end");
        }
        match outcome {
            Ok(reply) => self.succeeded(flight, &reply),
            Err(error) => self.failed(flight, &error),
        }
    }

    /// Where cells are in the model: those that the disk still has.
    fn place(&self, first: u64, count: u64) -> Option<(usize, usize)> {
        (first < self.cells).then(|| (self.model.borrow().geometry.index(first), count.min(self.cells - first) as usize))
    }

    fn failed(&mut self, flight: Flight, error: &fvd_engine::Error) {
        let shrinks = flight.cut || self.maybe_cells.is_some_and(|to| to < self.cells);
        self.errors.push((flight.step, error.clone()));
        if error.text.contains("internal error") {
            self.world.fail(format!("the engine panicked: {error}"));
        }
        match flight.what {
            What::Beyond if error.kind == Kind::OutOfRange => return,
            What::Grow { .. } | What::Shrink { .. } if error.kind == Kind::NoSpace && self.fixed && self.world.counters().injected == 0 => {
                self.maybe_cells = None;
                return;
            }
            What::Change { begun, first, count, .. } => {
                if let Some((first, count)) = self.place(first, count) {
                    self.model.borrow_mut().oracle.end_maybe(begun, first, count);
                }
                // The storage is full, and no more came.
                if error.kind == Kind::NoSpace && self.fixed && self.compact && (self.closing || !self.world.always_supplies()) {
                    return;
                }
            }
            What::Empty { begun } => {
                let oracle = &mut self.model.borrow_mut().oracle;
                oracle.end_maybe(begun, 0, oracle.len());
                // No base so far, or no room for a bitmap that covers the disk.
                if matches!(error.kind, Kind::Unsupported | Kind::NoSpace) {
                    return;
                }
            }
            _ => {}
        }
        // The disk shrank, or is about to, under a request that reaches beyond its new end.
        if shrinks && error.kind == Kind::OutOfRange {
            return;
        }
        if self.world.counters().injected == 0 {
            self.world.fail(format!("{:?} fails though nothing was made to fail: {error}", flight.what));
        }
    }

    fn succeeded(&mut self, flight: Flight, reply: &Reply) {
        let at = match flight.what {
            What::Change { first, count, .. } => self.place(first, count),
            _ => None,
        };
        let model = &mut *self.model.borrow_mut();
        match flight.what {
            What::Change { begun, fua, maybe, .. } => {
                // What is gone is gone.
                let Some((first, count)) = at else { return };
                if maybe {
                    model.oracle.end_maybe(begun, first, count);
                } else {
                    model.oracle.end(begun, first, count);
                }
                if fua {
                    model.oracle.durable(begun, first, count);
                }
            }
            What::Read { began, first } => {
                let buf = flight.buf.expect("a read has memory");
                let left = self.cells.saturating_sub(first) * model.geometry.cell;
                let check = |bytes: &[u8]| model.oracle.check_read(&model.geometry, first, began, &bytes[..bytes.len().min(left as usize)]);
                if let Err(text) = if left == 0 { Ok(()) } else { buf.with(check) } {
                    self.world.fail(text);
                }
            }
            What::Flush { begun } => model.oracle.flushed(begun),
            What::Empty { begun } => {
                let all = model.oracle.len();
                model.oracle.end(begun, 0, all);
                model.oracle.durable(begun, 0, all);
            }
            What::Amend { unit } => model.grow_units = vec![unit],
            What::Grow { cells } => {
                let pristine = self.world.image().info().is_ok_and(|info| info.header.pristine);
                model.grow(self.cells, cells, pristine);
                (self.cells, self.maybe_cells) = (cells, None);
            }
            What::Shrink { cells } => {
                model.shrink(cells);
                (self.cells, self.maybe_cells) = (cells, None);
                for flight in &mut self.flights {
                    let end = match flight.what {
                        What::Change { first, count, .. } | What::Status { first, count, .. } => first + count,
                        What::Read { first, .. } => first + flight.buf.as_ref().map_or(0, |buf| buf.with(<[u8]>::len) as u64) / model.geometry.cell,
                        _ => 0,
                    };
                    flight.cut |= end > cells;
                }
            }
            // A disk that shrank may answer of before.
            What::Status { .. } if flight.cut => {}
            What::Status { began, first, count } => {
                if let Err(text) = check_status(model, began, first, count, reply, self.world.image()) {
                    self.world.fail(text);
                }
            }
            What::Beyond => self.world.fail("a request beyond the end of the disk succeeds"),
            What::Check => check_report(&self.world, reply),
            What::Other => {}
        }
    }

    /// Requests end in bounded time: says which does not.
    pub fn overdue(&self) -> Option<String> {
        let now = self.world.now();
        let late = self.flights.iter().find(|f| now - f.since > PATIENCE)?;
        Some(format!("a request has not ended for {} s: {:?}", (now - late.since) / crate::clock::SECOND, late.what))
    }

    /// Requests under way, as text.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        for flight in &self.flights {
            out += &format!("{:?}; ", flight.what);
        }
        out
    }
}

/// Demands that a check found nothing. A header copy that a cut tore is made whole by the next
/// writable open; till then nobody can tell it from a rotten one, and a reader says so.
pub fn check_report(world: &World, reply: &Reply) {
    // A cut in the first or last header update of a session: the other copy says that the image is clean.
    let torn = |report: &CheckReport, start: &str| report.findings.iter().all(|text| text.starts_with(start));
    if let Reply::Check(report) = reply {
        let limit = world.leak_limit();
        if report.leaked > limit {
            world.fail(format!("check finds {} leaked bytes, {limit} may be (C6)", report.leaked));
        }
    }
    match reply {
        Reply::Check(report) if report.corruptions == 0 && (report.corruptions_fixed == 0 || torn(report, "header copy")) => {}
        Reply::Check(report) if world.read_only() && torn(report, "header: copy") => {}
        Reply::Check(report) => world.fail(format!("check finds damage: {:?}", report.findings)),
        other => world.fail(format!("a check answers {other:?}")),
    }
}

fn check_status(model: &Model, began: Moment, first: u64, count: u64, reply: &Reply, image: &fvd_engine::Image) -> Result<(), String> {
    let Reply::Status(status) = reply else { return Err(format!("block status answers {reply:?}")) };
    let cell = model.geometry.cell;
    if status.len == 0 || status.len > count * cell {
        return Err(format!("a block status of {} bytes answers {}", count * cell, status.len));
    }
    match status.place {
        Place::Data { file, offset } => {
            let header = image.info().map_err(|error| error.to_string())?.header;
            let chunk = u64::from(header.chunk_size);
            let right = match chunk {
                0 => offset == header.data_offset + first * cell,
                _ => offset >= header.data_offset && (offset - header.data_offset) % chunk == first * cell % chunk,
            };
            if file != (if header.has_data_file() { FileId::Data } else { FileId::Image }) || !right {
                return Err(format!("block status of cell {first} names byte {offset} of {file:?}"));
            }
        }
        Place::Base => {
            let index = model.geometry.index(first);
            for i in 0..(status.len / cell) as usize {
                if !model.oracle.may_be_base(index + i, began) {
                    return Err(format!("block status says base for cell {}: {}", first + i as u64, model.oracle.explain(index + i)));
                }
            }
        }
        Place::Zero => {
            let index = model.geometry.index(first);
            let zero = vec![0; cell as usize];
            for i in 0..(status.len / cell) as usize {
                let number = first + i as u64;
                if !model.oracle.may_read(index + i, number, began, &zero) {
                    return Err(format!("block status says zero for cell {number}: {}", model.oracle.explain(index + i)));
                }
            }
        }
    }
    Ok(())
}
