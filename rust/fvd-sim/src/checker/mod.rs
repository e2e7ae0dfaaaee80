// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks of what the engine asks of its host, at the moment it asks: the contract of
//! `fvd_engine::host`, and the orderings of `docs/crash-consistency.md` that a power cut would
//! only show by luck.

mod header;
mod journal;
mod pages;

use crate::content;
use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::memory::Buf;
use crate::oracle::Oracle;
use crate::store::PAGE;
use crate::world::{bytes_of, is_change};
use fvd_engine::host::*;
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::{Header, PageZero, RegionKind};
use std::cell::RefCell;
use std::rc::Rc;

/// What the guest knows of its disk.
#[derive(Clone)]
pub struct Model {
    /// What each cell may hold.
    pub oracle: Oracle,
    /// Where the cells are.
    pub geometry: Geometry,
    /// Growth steps that the header may state, in bytes; the last is the one asked for last.
    pub grow_units: Vec<u64>,
}

impl Model {
    /// The disk grew. Of an image that has no bitmap yet all is in the base, should one come.
    pub fn grow(&mut self, from: u64, to: u64, pristine: bool) {
        let before = self.geometry.total();
        self.geometry.grow(from, to);
        let tag = if pristine { content::BASE } else { content::ZERO };
        self.oracle.grow(vec![tag; self.geometry.total() - before]);
    }
}

impl Model {
    /// The disk shrank.
    pub fn shrink(&mut self, to: u64) {
        self.geometry.shrink(to);
        self.oracle.shrink(self.geometry.total());
    }

    /// The image was opened, and states this growth step: from now on it is the only one.
    pub fn check_grow_unit(&mut self, unit: u64) -> Result<(), String> {
        if !self.grow_units.contains(&unit) {
            return Err(format!("the image grows by {unit} bytes after open, not by one of {:?} (CC-37)", self.grow_units));
        }
        self.grow_units = vec![unit];
        Ok(())
    }

    /// The disk has another size.
    pub fn resize(&mut self, from: u64, to: u64, pristine: bool) {
        if to < from { self.shrink(to) } else { self.grow(from, to, pristine) }
    }
}

/// What a session may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Work on an image.
    #[default]
    Open,
    /// Make one: nothing names regions yet.
    Create,
    /// Read only.
    ReadOnly,
    /// Work on an image whose durable metadata is not to be trusted.
    Damaged,
}

/// The checks of one session.
#[derive(Default)]
pub struct Checker {
    mode: Mode,
    model: Option<Rc<RefCell<Model>>>,
    /// The header that counts among what is durable.
    stable: Option<Rc<Header>>,
    stable_is_current: bool,
    /// Its copies.
    copies: [Option<Copy>; 2],
    /// A sync failed: nothing may be written any more (R11).
    sync_failed: bool,
    journal: journal::Journal,
    pages: pages::Pages,
    /// Times at which the rules of this module were applied, so that nobody trusts an idle check.
    pub applied: u64,
}

type Verdict = Result<(), String>;

/// A copy of the header among what is durable.
struct Copy {
    raw: Box<[u8; PAGE]>,
    /// If it is valid.
    header: Option<Rc<Header>>,
}

impl Checker {
    /// Checks for a session of kind `mode`; with `model`, also what the journal exposes.
    pub fn new(mode: Mode, model: Option<Rc<RefCell<Model>>>) -> Self {
        Self { mode, model, ..Self::default() }
    }

    /// The engine, or the guest's side, asks for an operation.
    pub fn submit(&mut self, disks: &[Disk; 2], limits: &Limits, op: &HostOp<Buf>, engine: bool) -> Verdict {
        contract(limits, op)?;
        if !is_change(op.kind) {
            return Ok(());
        }
        let what = || format!("{:?} of {} bytes at {}", op.kind, op.len, op.offset);
        if op.file == FileId::Base {
            return Err(format!("{} in {:?}", what(), op.file));
        }
        if self.mode == Mode::ReadOnly {
            return Err(format!("a read-only open changes the file: {}", what()));
        }
        if self.sync_failed && self.mode == Mode::Open {
            return Err(format!("after a failed sync: {}", what()));
        }
        if !engine || self.mode != Mode::Open || !matches!(op.kind, OpKind::Write { .. }) {
            return Ok(());
        }
        self.refresh(&disks[0]);
        let Some(header) = self.stable.clone() else { return Ok(()) };
        let guest_data = (op.file == FileId::Data) == header.has_data_file();
        if header.is_compact() && guest_data {
            let reach = self.journal.reach().max(header.reach);
            if op.offset >= header.data_offset && op.offset + op.len > reach {
                return Err(format!("{} beyond the durable reach {reach} (R6)", what()));
            }
        } else if guest_data && op.offset >= header.data_offset && op.offset < header.flat_data_end().next_multiple_of(PAGE as u64) {
            return Ok(());
        }
        if op.file == FileId::Data {
            return if guest_data { Ok(()) } else { Err(format!("{} in a data file that the header lacks", what())) };
        }
        self.applied += 1;
        let bytes = bytes_of(op);
        if let Some(copy) = HEADER_OFFSETS.iter().position(|at| op.offset == *at) {
            let other = self.copies[1 - copy].as_ref().and_then(|copy| copy.header.as_deref());
            return header::submit(disks, &header, other, copy + 1, &bytes);
        }
        match region_at(&header, op)? {
            Some(RegionKind::Journal) => self.journal.submit(disks, &header, op.offset, &bytes, self.model.as_deref()),
            Some(RegionKind::DoubleWrite) => self.pages.submit_area(disks, &header, &bytes, self.model.as_deref(), self.journal.table()),
            Some(kind) => self.pages.submit_in_place(&disks[0], &header, kind, op.offset, &bytes),
            None => Ok(()),
        }
    }

    /// An operation ended with `ret`; `mark` is what a flush covered. `disk` is the image file's.
    pub fn complete(&mut self, disk: &Disk, op: &HostOp<Buf>, mark: u64, ret: i64, engine: bool) {
        if op.file == FileId::Data && op.kind == OpKind::Flush {
            self.sync_failed |= ret < 0;
        }
        if op.file != FileId::Image || !engine {
            return;
        }
        match op.kind {
            OpKind::Flush => {
                self.stable_is_current = false;
                self.sync_failed |= ret < 0;
                if ret >= 0 {
                    self.journal.flushed(mark);
                    self.pages.flushed(mark);
                }
            }
            OpKind::Write { .. } if ret >= 0 => {
                let kind = self.stable.as_ref().and_then(|header| region_at(header, op).ok().flatten());
                match kind {
                    Some(RegionKind::Journal) => self.journal.written(disk.mark()),
                    Some(RegionKind::DoubleWrite) | None => {}
                    Some(_) => self.pages.in_place_written(op.offset, disk.mark()),
                }
            }
            _ => {}
        }
    }

    fn refresh(&mut self, disk: &Disk) {
        if std::mem::replace(&mut self.stable_is_current, true) {
            return;
        }
        let page = |at: u64| disk.stable.page(at / PAGE as u64);
        let raw = HEADER_OFFSETS.map(page);
        let alike = |(old, new): (&Option<Copy>, &Option<&[u8; PAGE]>)| old.as_ref().map(|copy| &*copy.raw) == *new;
        if self.copies.iter().zip(&raw).all(alike) && self.stable.is_some() {
            return;
        }
        let zero = page(0).and_then(|bytes| PageZero::decode(bytes).ok());
        let same_image = zero.as_ref().map(|zero| zero.uuid) == self.stable.as_ref().map(|header| header.uuid);
        for (number, (copy, raw)) in self.copies.iter_mut().zip(raw).enumerate() {
            if !same_image || !alike((&*copy, &raw)) {
                let header = |raw| zero.as_ref().and_then(|zero| Header::decode(&zero.uuid, number + 1, raw).ok()).map(Rc::new);
                *copy = raw.map(|raw| Copy { raw: Box::new(*raw), header: header(raw) });
            }
        }
        let table = |header: &Option<Rc<Header>>| header.as_ref().and_then(|h| h.region(RegionKind::Table).map(|r| r.generation));
        let before = table(&self.stable);
        let valid = self.copies.iter().flatten().filter_map(|copy| copy.header.clone());
        self.stable = valid.max_by_key(|header| header.generation);
        if table(&self.stable) != before {
            self.journal.rebuilt();
        }
        if let Some(header) = &self.stable {
            self.journal.opened(header);
        }
    }
}

/// The disk that guest data lies on.
fn guest_disk<'a>(disks: &'a [Disk; 2], header: &Header) -> &'a Disk {
    &disks[usize::from(header.has_data_file())]
}

/// The region that an operation lies in; an error if it touches one in part.
fn region_at(header: &Header, op: &HostOp<Buf>) -> Result<Option<RegionKind>, String> {
    for kind in RegionKind::ALL {
        let Some(region) = header.region(kind) else { continue };
        if op.offset < region.end() && region.offset < op.offset + op.len {
            if op.offset < region.offset || op.offset + op.len > region.end() {
                return Err(format!("a write of {} bytes at {} reaches beyond the region {kind:?}", op.len, op.offset));
            }
            return Ok(Some(kind));
        }
    }
    Ok(None)
}

/// What `fvd_engine::host` says of every operation.
fn contract(limits: &Limits, op: &HostOp<Buf>) -> Verdict {
    let align = u64::from(limits.request_alignment);
    let ranged = matches!(op.kind, OpKind::Read | OpKind::Write { .. } | OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard);
    if matches!(op.kind, OpKind::ZeroCheaply) && !limits.cheap_zeroing {
        return Err("cheap zeroing is asked of a host that has none".into());
    }
    if ranged && ((op.offset | op.len) % align != 0 || op.len == 0) {
        return Err(format!("{:?} of {:?}: {} bytes at {} are not aligned to {align}", op.kind, op.file, op.len, op.offset));
    }
    if matches!(op.kind, OpKind::Write { fua: true }) && !limits.can_fua {
        return Err("a FUA write to a host that cannot".into());
    }
    let transfers = matches!(op.kind, OpKind::Read | OpKind::Write { .. });
    let total: u64 = op.segments.iter().map(|s| s.len() as u64).sum();
    if transfers != !op.segments.is_empty() || (transfers && total != op.len) {
        return Err(format!("{:?}: {} bytes with memory for {total}", op.kind, op.len));
    }
    for segment in &op.segments {
        let memory = limits.memory_alignment as usize;
        let fine = match segment {
            Segment::Guest { buf, at, len } => !buf.is_misused() && buf.is_aligned(*at, *len, memory),
            Segment::Own { buf, at, len } => at + len <= buf.capacity() && at % memory == 0 && len % memory == 0,
        };
        if !fine && align > 1 {
            return Err(format!("{:?} at {}: memory is not aligned to {memory}: {segment:?}", op.kind, op.offset));
        }
    }
    Ok(())
}
