// SPDX-License-Identifier: MIT OR Apache-2.0
//! Appends to the journal: data before records (CC-3), the order of commits (CC-5, CC-6), and units
//! that still count are left alone (CC-23).

use super::{Model, Verdict};
use crate::disk::Disk;
use crate::store::PAGE;
use fvd_format::journal::{Record, decode_unit};
use fvd_format::{Header, RegionKind};
use std::cell::RefCell;

/// The append on its way.
struct Append {
    commit: u64,
    first_seq: u64,
    next_seq: u64,
    payload: Vec<u8>,
    /// Its last unit was asked for.
    whole: bool,
    /// Parts asked for and not yet written.
    parts: u32,
    /// The moment at which all of it was written.
    written: Option<u64>,
}

/// What is known of the journal in this session.
#[derive(Default)]
pub struct Journal {
    /// The epoch that earlier sessions used.
    old_epoch: Option<u64>,
    append: Option<Append>,
    /// The last commit that is durable: its number and where the next starts.
    complete: Option<(u64, u64)>,
}

impl Journal {
    /// The image as it is found; later calls change nothing.
    pub fn opened(&mut self, header: &Header) {
        self.old_epoch.get_or_insert(header.epoch);
    }

    /// Units are about to be written at file offset `offset`.
    pub fn submit(&mut self, disk: &Disk, header: &Header, offset: u64, bytes: &[u8], model: Option<&RefCell<Model>>) -> Verdict {
        let region = header.region(RegionKind::Journal).expect("an append to a region");
        if header.clean {
            return Err("an append while the durable header says clean (CC-7)".into());
        }
        let parts = self.append.as_ref().map_or(0, |a| a.parts);
        for (i, bytes) in bytes.chunks(PAGE).enumerate() {
            let at = offset + (i * PAGE) as u64;
            let unit = decode_unit(&header.uuid, bytes).ok_or_else(|| format!("an invalid journal unit is written at {at}"))?;
            let place = (at - region.offset) / PAGE as u64;
            if unit.seq % region.pages() != place {
                return Err(format!("journal unit {} is written at place {place}", unit.seq));
            }
            if unit.epoch != header.epoch || self.old_epoch == Some(unit.epoch) {
                return Err(format!("unit {} has epoch {}, the durable header {}, the one before the session {:?} (CC-7)", unit.seq, unit.epoch, header.epoch, self.old_epoch));
            }
            self.overwritten(disk, header, at, unit.seq)?;
            if unit.first {
                self.begin(unit.seq, unit.commit)?;
            }
            let Some(append) = self.append.as_mut().filter(|a| a.commit == unit.commit && a.next_seq == unit.seq) else {
                return Err(format!("unit {} of commit {} does not follow the units before it", unit.seq, unit.commit));
            };
            append.next_seq += 1;
            append.payload.extend_from_slice(unit.payload);
            append.whole |= unit.last;
        }
        let append = self.append.as_mut().expect("begun above");
        append.parts = if append.parts == 0 || parts == 0 { 1 } else { parts + 1 };
        if append.whole {
            exposes(disk, header, &append.payload, model)?;
        }
        Ok(())
    }

    /// The unit at file offset `at` makes way for number `seq`: it must not count any more.
    fn overwritten(&self, disk: &Disk, header: &Header, at: u64, seq: u64) -> Verdict {
        let old = disk.stable.page(at / PAGE as u64).and_then(|bytes| decode_unit(&header.uuid, bytes));
        match old {
            Some(old) if old.epoch == header.epoch && old.seq != seq && old.seq >= header.first_seq => {
                Err(format!("unit {} is overwritten by {seq} while the durable header counts from {} (CC-23)", old.seq, header.first_seq))
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, seq: u64, commit: u64) -> Verdict {
        if let Some((number, next)) = self.complete
            && (commit != number + 1 || seq != next)
        {
            return Err(format!("commit {commit} starts at {seq}; the last durable one is {number}, and {next} is next (CC-6)"));
        }
        if let Some(before) = self.append.as_ref().filter(|_| self.complete.is_none())
            && (before.commit != commit || before.first_seq != seq)
        {
            return Err(format!("commit {commit} starts at {seq}, after {} that failed at {} (CC-6)", before.commit, before.first_seq));
        }
        self.append = Some(Append { commit, first_seq: seq, next_seq: seq, payload: Vec::new(), whole: false, parts: 0, written: None });
        Ok(())
    }

    /// A part of the append was written; the disk's mark is `mark`.
    pub fn written(&mut self, mark: u64) {
        if let Some(append) = &mut self.append {
            append.parts = append.parts.saturating_sub(1);
            if append.parts == 0 && append.whole {
                append.written = Some(mark);
            }
        }
    }

    /// A flush that covers everything before `mark` succeeded.
    pub fn flushed(&mut self, mark: u64) {
        if let Some(append) = &mut self.append
            && append.written.is_some_and(|at| at <= mark)
        {
            append.written = None;
            self.complete = Some((append.commit, append.next_seq));
        }
    }
}

/// Whatever the records expose must be durable, and right: if the power went now and the records
/// survived, the guest would see it (CC-1, CC-3).
fn exposes(disk: &Disk, header: &Header, payload: &[u8], model: Option<&RefCell<Model>>) -> Verdict {
    let Some(model) = model else { return Ok(()) };
    let model = model.borrow();
    let mut rest = payload;
    while !rest.is_empty() {
        let record = Record::decode(&mut rest).map_err(|error| format!("an invalid record is journaled: {error}"))?;
        let Record::Bits { region: RegionKind::Bitmap, value: true, first, count } = record else { continue };
        if let Some(text) = not_durable(disk, header, &model, first, first + u64::from(count)) {
            return Err(format!("a record exposes a cell before its data is durable (CC-3): {text}"));
        }
    }
    Ok(())
}

/// Which cell of blocks `first..end`, were they in the image, would show what it must not if the power
/// went now.
pub fn not_durable(disk: &Disk, header: &Header, model: &Model, first: u64, end: u64) -> Option<String> {
    let block = u64::from(header.block_size);
    let (from, to) = (first * block, (end * block).min(header.covered));
    let cell = model.geometry.cell;
    let mut bytes = [0; crate::content::SECTOR];
    let bytes = &mut bytes[..cell as usize];
    for window in &model.geometry.windows {
        for number in window.first.max(from / cell)..(window.first + window.count).min(to / cell) {
            disk.stable.read(header.data_offset + number * cell, bytes);
            let index = window.index + (number - window.first) as usize;
            if !model.oracle.may_survive(index, number, bytes) {
                return Some(format!("cell {number} is {}; {}", crate::content::describe(bytes), model.oracle.explain(index)));
            }
        }
    }
    None
}
