// SPDX-License-Identifier: MIT OR Apache-2.0
//! Appends to the journal: data before records (CC-3), the order of commits (CC-5, CC-6), and units
//! that still count are left alone (CC-23).

use super::{Model, Verdict, guest_disk};
use crate::disk::Disk;
use crate::store::PAGE;
use fvd_format::journal::{Record, decode_unit};
use fvd_format::page::{self, PAYLOAD_ENTRIES};
use fvd_format::{Header, RegionKind};
use std::cell::RefCell;
use std::collections::BTreeMap;

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
    /// What durable commits said of the reach.
    reach: u64,
    /// Entries of the table, as durable commits say; read when the first record comes.
    table: Option<BTreeMap<u64, u32>>,
    /// Entries that the last durable commit changed, as they were before.
    before: BTreeMap<u64, u32>,
}

/// The table as the durable pages in place say: right between an open and its first append.
fn table_in_place(disk: &Disk, header: &Header) -> BTreeMap<u64, u32> {
    let mut out = BTreeMap::new();
    let Some(region) = header.region(RegionKind::Table) else { return out };
    for index in 0..region.pages() {
        let Some(bytes) = disk.stable.page(region.offset / PAGE as u64 + index) else { continue };
        if page::open(&header.uuid, RegionKind::Table, region.generation, index, bytes).is_ok() {
            for (i, entry) in bytes[page::HEADER_SIZE..].chunks_exact(4).enumerate() {
                let entry = u32::from_le_bytes(entry.try_into().expect("four bytes"));
                out.extend((entry != 0).then_some((index * PAYLOAD_ENTRIES + i as u64, entry)));
            }
        }
    }
    out
}

/// The entries that a commit changes.
fn entries_of(payload: &[u8]) -> Result<Vec<(u64, u32)>, String> {
    let (mut rest, mut out) = (payload, Vec::new());
    while !rest.is_empty() {
        match Record::decode(&mut rest).map_err(|error| format!("an invalid record is journaled: {error}"))? {
            Record::EntryRun { first, count, value, step, .. } => out.extend((0..count).map(|k| (first + u64::from(k), value + step * k))),
            Record::Entries { first, values, .. } => {
                out.extend((first..).zip(values.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))));
            }
            _ => {}
        }
    }
    Ok(out)
}

impl Journal {
    /// The image as it is found; later calls change nothing.
    pub fn opened(&mut self, header: &Header) {
        self.old_epoch.get_or_insert(header.epoch);
    }

    /// Units are about to be written at file offset `offset`.
    pub fn submit(&mut self, disks: &[Disk; 2], header: &Header, offset: u64, bytes: &[u8], model: Option<&RefCell<Model>>) -> Verdict {
        let disk = &disks[0];
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
            let table = self.table.get_or_insert_with(|| table_in_place(disk, header));
            exposes(guest_disk(disks, header), header, &append.payload, table, model)?;
        }
        Ok(())
    }

    /// The reach that durable commits of this session gave.
    pub fn reach(&self) -> u64 {
        self.reach
    }

    /// The table as durable commits say, if any record came yet; with it, what the last commit changed,
    /// as it was before.
    pub fn table(&self) -> Option<(&BTreeMap<u64, u32>, &BTreeMap<u64, u32>)> {
        Some((self.table.as_ref()?, &self.before))
    }

    /// Regions were built anew: the table in place says it all.
    pub fn rebuilt(&mut self) {
        self.table = None;
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
            let mut rest = &append.payload[..];
            while let Ok(record) = Record::decode(&mut rest) {
                if let Record::Reach(reach) = record {
                    self.reach = self.reach.max(reach);
                }
            }
            if let (Some(table), Ok(entries)) = (&mut self.table, entries_of(&append.payload)) {
                self.before = entries.iter().map(|(chunk, _)| (*chunk, table.get(chunk).copied().unwrap_or(0))).collect();
                table.extend(entries);
            }
        }
    }
}

/// Whatever the records expose must be durable, and right: if the power went now and the records
/// survived, the guest would see it (CC-1, CC-3). What fills fresh space need not be there yet: till
/// then the zeroes of before are (R6).
fn exposes(disk: &Disk, header: &Header, payload: &[u8], table: &BTreeMap<u64, u32>, model: Option<&RefCell<Model>>) -> Verdict {
    let Some(model) = model else { return Ok(()) };
    let model = model.borrow();
    let changed: BTreeMap<u64, u32> = entries_of(payload)?.into_iter().collect();
    let place = |at: u64| place_of(header, |chunk| changed.get(&chunk).or_else(|| table.get(&chunk)).copied(), at);
    let check = |from: u64, to: u64| match not_durable(disk, &model, place, from, to) {
        Some(text) => Err(format!("a record exposes a cell before its data is durable (CC-3): {text}")),
        None => Ok(()),
    };
    let mut rest = payload;
    while !rest.is_empty() {
        let record = Record::decode(&mut rest).map_err(|error| format!("an invalid record is journaled: {error}"))?;
        if let Record::Bits { region: RegionKind::Bitmap, value, first, count } = record {
            let block = u64::from(header.block_size);
            let (from, to) = (first * block, ((first + u64::from(count)) * block).min(header.covered));
            if value {
                check(from, to)?;
            } else if from < header.zero_from() {
                return Err(format!("a record gives blocks {first}+{count} back to the base (CC-67)"));
            } else if let Some(text) = not_durable(disk, &model, |_| None, from, to) {
                return Err(format!("a record says zero of a cell that is not (CC-67): {text}"));
            }
        }
    }
    // Beyond what the bitmap covers, an entry alone exposes.
    let chunk = u64::from(header.chunk_size);
    for number in changed.keys() {
        check((number * chunk).max(header.covered), ((number + 1) * chunk).min(header.virtual_size))?;
    }
    two_names(table, &changed)
}

/// Where guest byte `at` is in the file when the table says what `entry` does; `None`: nowhere, it
/// reads as zero.
pub fn place_of(header: &Header, entry: impl Fn(u64) -> Option<u32>, at: u64) -> Option<u64> {
    match u64::from(header.chunk_size) {
        0 => Some(header.data_offset + at),
        chunk => u64::from(entry(at / chunk).unwrap_or(0)).checked_sub(1).map(|id| header.chunk_offset(id) + at % chunk),
    }
}

/// No storage chunk has two guest chunks (FMT-77).
fn two_names(table: &BTreeMap<u64, u32>, changed: &BTreeMap<u64, u32>) -> Verdict {
    let mut owners = BTreeMap::new();
    let now = table.iter().filter(|(chunk, _)| !changed.contains_key(chunk)).chain(changed);
    for (chunk, entry) in now.filter(|(_, entry)| **entry != 0) {
        if let Some(other) = owners.insert(entry, chunk) {
            return Err(format!("a record gives the storage of guest chunk {other} to guest chunk {chunk} (R4)"));
        }
    }
    Ok(())
}

/// Why guest bytes `from..to`, which lie where `place` says, may not show what is durable there: text.
pub fn not_durable(disk: &Disk, model: &Model, place: impl Fn(u64) -> Option<u64>, from: u64, to: u64) -> Option<String> {
    let cell = model.geometry.cell;
    let mut bytes = [0; crate::content::SECTOR];
    let bytes = &mut bytes[..cell as usize];
    for window in &model.geometry.windows {
        for number in window.first.max(from.div_ceil(cell))..(window.first + window.count).min(to / cell) {
            match place(number * cell) {
                Some(at) => disk.stable.read(at, bytes),
                None => bytes.fill(0),
            }
            let index = window.index + (number - window.first) as usize;
            if !model.oracle.may_survive(index, number, bytes) {
                return Some(format!("cell {number} is {}; {}", crate::content::describe(bytes), model.oracle.explain(index)));
            }
        }
    }
    None
}
