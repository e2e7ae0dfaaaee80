// SPDX-License-Identifier: MIT OR Apache-2.0
//! Journal units and records (FMT-50…).
//!
//! A commit is a stream of records, cut into 4 KiB units that carry epoch, sequence and commit
//! number. Unit `n` lies at place `n mod units`. The last unit carries the CRC of the whole stream,
//! so that a commit is applied whole or not at all.
//!
//! | offset | size | field of a unit |
//! |---|---|---|
//! | 0 | 4 | CRC-32, seeded with UUID and sequence number, over bytes 4…4095 |
//! | 4 | 4 | flags: 1 first unit of its commit, 2 last unit, 4 filler (no payload) |
//! | 8 | 8 | epoch |
//! | 16 | 8 | sequence number |
//! | 24 | 8 | commit number |
//! | 32 | 4 | bytes of payload in this unit |
//! | 36 | 4 | in the last unit: CRC-32 of the commit's payload, seeded with UUID and commit number |
//! | 40 | 8 | reserved, 0 |
//! | 48 | 4048 | payload |

use crate::codec::*;
use crate::error::{FormatError, Kind, Result};
use crate::limits::{CARRIED_MAX, PAGE_SIZE};
use crate::{RegionKind, Uuid, checksum};

/// Bytes of a unit's header.
pub const UNIT_HEADER: usize = 48;
/// Bytes of a unit's payload.
pub const UNIT_PAYLOAD: usize = PAGE_SIZE - UNIT_HEADER;
/// Bytes of a record's head.
pub const RECORD_HEAD: usize = 16;

const FIRST: u32 = 1;
const LAST: u32 = 2;
const FILLER: u32 = 4;

/// Number of units that a payload of `len` bytes needs; a commit without records has one.
pub fn units_for(len: usize) -> u64 {
    (len.div_ceil(UNIT_PAYLOAD).max(1)) as u64
}

/// Identity of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitId {
    /// Epoch of the session.
    pub epoch: u64,
    /// Sequence number of its first unit.
    pub seq: u64,
    /// Commit number; a retry keeps it.
    pub commit: u64,
}

/// The units of one commit, padded with filler units to a multiple of `granule` bytes.
pub fn encode_commit(uuid: &Uuid, id: CommitId, payload: &[u8], granule: usize) -> Vec<u8> {
    assert!(granule >= PAGE_SIZE && granule % PAGE_SIZE == 0);
    let used = units_for(payload.len()) as usize;
    let total = (used * PAGE_SIZE).div_ceil(granule) * granule / PAGE_SIZE;
    let commit_crc = checksum::seeded(uuid, checksum::kind::COMMIT, id.commit, &[payload]);
    let mut out = vec![0; total * PAGE_SIZE];
    let mut rest = payload;
    for (i, unit) in out.chunks_exact_mut(PAGE_SIZE).enumerate() {
        let (part, tail) = rest.split_at(rest.len().min(UNIT_PAYLOAD));
        rest = tail;
        let mut flags = 0;
        if i >= used {
            flags |= FILLER;
        } else {
            flags |= if i == 0 { FIRST } else { 0 };
            if i == used - 1 {
                flags |= LAST;
                put_u32(unit, 36, commit_crc);
            }
        }
        let seq = id.seq + i as u64;
        put_u32(unit, 4, flags);
        put_u64(unit, 8, id.epoch);
        put_u64(unit, 16, seq);
        put_u64(unit, 24, id.commit);
        put_u32(unit, 32, part.len() as u32);
        unit[UNIT_HEADER..UNIT_HEADER + part.len()].copy_from_slice(part);
        let crc = checksum::seeded(uuid, checksum::kind::JOURNAL_UNIT, seq, &[&unit[4..]]);
        put_u32(unit, 0, crc);
    }
    assert!(rest.is_empty());
    out
}

/// A valid unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit<'a> {
    /// Epoch.
    pub epoch: u64,
    /// Sequence number.
    pub seq: u64,
    /// Commit number.
    pub commit: u64,
    /// First unit of its commit.
    pub first: bool,
    /// Last unit of its commit that has payload.
    pub last: bool,
    /// Padding after a commit.
    pub filler: bool,
    /// Payload.
    pub payload: &'a [u8],
    /// CRC of the commit's payload; counts in the last unit.
    pub commit_crc: u32,
}

/// Parses the unit at some place; `None` if it is no valid unit of this image.
pub fn decode_unit<'a>(uuid: &Uuid, unit: &'a [u8]) -> Option<Unit<'a>> {
    assert_eq!(unit.len(), PAGE_SIZE);
    let seq = get_u64(unit, 16);
    if get_u32(unit, 0) != checksum::seeded(uuid, checksum::kind::JOURNAL_UNIT, seq, &[&unit[4..]]) {
        return None;
    }
    let flags = get_u32(unit, 4);
    let len = get_u32(unit, 32) as usize;
    let filler = flags & FILLER != 0;
    if flags & !(FIRST | LAST | FILLER) != 0 || len > UNIT_PAYLOAD || (filler && (flags != FILLER || len != 0)) {
        return None;
    }
    Some(Unit {
        epoch: get_u64(unit, 8),
        seq,
        commit: get_u64(unit, 24),
        first: flags & FIRST != 0,
        last: flags & LAST != 0,
        filler,
        payload: &unit[UNIT_HEADER..UNIT_HEADER + len],
        commit_crc: get_u32(unit, 36),
    })
}

/// What a journal scan found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Payloads of the whole commits, in order.
    pub commits: Vec<Vec<u8>>,
    /// Sequence number after the last whole commit (fillers included).
    pub next_seq: u64,
    /// Number of the next commit.
    pub next_commit: u64,
    /// A valid unit of this epoch and of a later commit stands past the end: damage, not a cut.
    pub damaged: bool,
}

/// Collects the whole commits in `bytes` (the whole journal region) from `from` on: in sequence,
/// of this epoch, ending at the first unit missing, bad or older (R2).
pub fn scan(uuid: &Uuid, bytes: &[u8], from: CommitId) -> Scan {
    assert!(!bytes.is_empty() && bytes.len() % PAGE_SIZE == 0);
    scan_units(uuid, (bytes.len() / PAGE_SIZE) as u64, |place| &bytes[place as usize * PAGE_SIZE..][..PAGE_SIZE], from)
}

/// The same for a journal of `total` units that need not lie in one slice: `unit` gives one by place.
pub fn scan_units<'a>(uuid: &Uuid, total: u64, unit: impl Fn(u64) -> &'a [u8], from: CommitId) -> Scan {
    let at = |seq: u64| {
        let bytes = unit(seq % total);
        // Most units are of other epochs, or were never written: no checksum is needed to tell.
        if get_u64(bytes, 8) != from.epoch {
            return None;
        }
        decode_unit(uuid, bytes)
    };
    let mut out = Scan { commits: Vec::new(), next_seq: from.seq, next_commit: from.commit, damaged: false };
    'commits: while out.next_seq - from.seq < total {
        let mut payload = Vec::new();
        let mut seq = out.next_seq;
        loop {
            let first = seq == out.next_seq;
            let unit = match at(seq) {
                Some(unit) if unit.seq == seq && unit.commit == out.next_commit && !unit.filler && unit.first == first => unit,
                _ => break 'commits,
            };
            payload.extend_from_slice(unit.payload);
            seq += 1;
            if unit.last {
                if unit.commit_crc != checksum::seeded(uuid, checksum::kind::COMMIT, unit.commit, &[&payload]) {
                    break 'commits;
                }
                break;
            }
            if seq - from.seq >= total {
                break 'commits;
            }
        }
        // Fillers belong to the commit; one that is lost ends nothing, the next append starts there
        // only if no whole commit follows.
        while at(seq).is_some_and(|u| u.seq == seq && u.filler && u.commit == out.next_commit) && seq - from.seq < total {
            seq += 1;
        }
        out.commits.push(payload);
        out.next_seq = seq;
        out.next_commit += 1;
    }
    out.damaged = (0..total).any(|place| at(place).is_some_and(|u| u.commit > out.next_commit));
    out
}

/// A journal record. Values are absolute: applying one twice, or over a newer page, is harmless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Bits `first … first+count` of a bit region (bitmap, own bits) have `value`.
    Bits {
        /// The region.
        region: RegionKind,
        /// The bits' value.
        value: bool,
        /// First bit.
        first: u64,
        /// Number of bits, > 0.
        count: u32,
    },
    /// Entries `first … first+count` of an entry region (table, origin ids) have these values.
    Entries {
        /// The region.
        region: RegionKind,
        /// First entry.
        first: u64,
        /// The values: LE `u32`s.
        values: &'a [u8],
    },
    /// Entries `first … first+count` are `value`, `value+step`, … (a run of one).
    EntryRun {
        /// The region.
        region: RegionKind,
        /// First entry.
        first: u64,
        /// Number of entries, > 0.
        count: u32,
        /// Value of the first entry.
        value: u32,
        /// 0 (all equal) or 1 (ascending).
        step: u32,
    },
    /// The file may be written up to here (R6).
    Reach(u64),
    /// The content of guest bytes `guest …` as of this commit (R9); a multiple of 512 bytes.
    Carried {
        /// First guest byte.
        guest: u64,
        /// The bytes as stored in the file (ciphertext if encrypted).
        data: &'a [u8],
    },
    /// Every commit up to this number is known to be stable with its data (R9).
    Confirm(u64),
}

const BITS: u8 = 1;
const ENTRIES: u8 = 2;
const ENTRY_RUN: u8 = 3;
const REACH: u8 = 4;
const CARRIED: u8 = 5;
const CONFIRM: u8 = 6;

/// The part of a 32-bit entry that is a number; bit 31 is a mark.
const ENTRY_NUMBER: u32 = (1 << 31) - 1;

fn carried_range(first: u64, count: u32) -> bool {
    (1..=CARRIED_MAX).contains(&count) && count % 512 == 0 && first % 512 == 0 && first.checked_add(u64::from(count)).is_some()
}

impl Record<'_> {
    /// Appends the record to a commit's payload.
    ///
    /// Head: type u8, value/step u8, region u16, count u32, first u64; then the type's data.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, kind: u8, flag: u8, region: u16, count: u32, first: u64| {
            out.push(kind);
            out.push(flag);
            out.extend_from_slice(&region.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&first.to_le_bytes());
        };
        match *self {
            Record::Bits { region, value, first, count } => head(out, BITS, u8::from(value), region as u16, count, first),
            Record::Entries { region, first, values } => {
                assert!(values.len() % 4 == 0);
                head(out, ENTRIES, 0, region as u16, (values.len() / 4) as u32, first);
                out.extend_from_slice(values);
            }
            Record::EntryRun { region, first, count, value, step } => {
                head(out, ENTRY_RUN, step as u8, region as u16, count, first);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Record::Reach(reach) => head(out, REACH, 0, 0, 0, reach),
            Record::Carried { guest, data } => {
                head(out, CARRIED, 0, 0, data.len() as u32, guest);
                out.extend_from_slice(data);
            }
            Record::Confirm(commit) => head(out, CONFIRM, 0, 0, 0, commit),
        }
    }

    /// Takes one record off the front of `payload`.
    pub fn decode<'a>(payload: &mut &'a [u8]) -> Result<Record<'a>> {
        let bad = |detail: &str| FormatError::new(Kind::Invalid, "journal record", detail);
        if payload.len() < RECORD_HEAD {
            return Err(bad("shorter than its head"));
        }
        let (head, mut rest) = payload.split_at(RECORD_HEAD);
        let (kind, flag) = (head[0], head[1]);
        let region = get_u16(head, 2);
        let count = get_u32(head, 4);
        let first = get_u64(head, 8);
        // Pages of other regions never change by records (FMT-58).
        let bits_of = || match RegionKind::from_u16(region) {
            Some(kind @ (RegionKind::Bitmap | RegionKind::OwnBits)) => Ok(kind),
            _ => Err(bad("not a region of bits")),
        };
        let entries_of = || match RegionKind::from_u16(region) {
            Some(kind @ (RegionKind::Table | RegionKind::OriginIds)) => Ok(kind),
            _ => Err(bad("not a region of entries")),
        };
        let mut take = |len: usize| {
            if rest.len() < len {
                return Err(bad("shorter than its data"));
            }
            let (data, tail) = rest.split_at(len);
            rest = tail;
            Ok(data)
        };
        if matches!(kind, BITS | ENTRIES | ENTRY_RUN) && (count == 0 || first.checked_add(u64::from(count)).is_none()) {
            return Err(bad("range out of bounds"));
        }
        let record = match kind {
            BITS if flag <= 1 => Record::Bits { region: bits_of()?, value: flag == 1, first, count },
            ENTRIES if flag == 0 => {
                let len = (count as usize).checked_mul(4).ok_or_else(|| bad("too long"))?;
                Record::Entries { region: entries_of()?, first, values: take(len)? }
            }
            ENTRY_RUN if flag <= 1 => {
                let value = get_u32(take(4)?, 0);
                // A run never carries into bit 31, which is no part of the number.
                if flag == 1 && u64::from(value & ENTRY_NUMBER) + u64::from(count) - 1 > u64::from(ENTRY_NUMBER) {
                    return Err(bad("run overflows"));
                }
                Record::EntryRun { region: entries_of()?, first, count, value, step: u32::from(flag) }
            }
            REACH if flag == 0 && region == 0 && count == 0 => Record::Reach(first),
            CARRIED if flag == 0 && region == 0 && carried_range(first, count) => Record::Carried { guest: first, data: take(count as usize)? },
            CONFIRM if flag == 0 && region == 0 && count == 0 => Record::Confirm(first),
            _ => return Err(bad("unknown type or flag")),
        };
        *payload = rest;
        Ok(record)
    }
}

#[cfg(test)]
mod tests;
