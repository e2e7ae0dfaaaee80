// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finding the whole commits of a journal, unit by unit (FMT-54, FMT-55).
//!
//! A journal may have 256 MiB, so nobody is asked to hold it: units are fed in sequence order, one
//! pass over all places, and what comes out are the places of commits. Their payload is read again
//! when it is applied.

use super::{CommitId, Unit, decode_unit_of};
use crate::limits::PAGE_SIZE;
use crate::{Uuid, checksum};

/// Where a whole commit lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its identity.
    pub id: CommitId,
    /// Units with payload; fillers are not counted.
    pub units: u64,
    /// Bytes of payload.
    pub len: usize,
}

/// What a journal scan found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan<C> {
    /// The whole commits, in order.
    pub commits: Vec<C>,
    /// Sequence number after the last whole commit (fillers included).
    pub next_seq: u64,
    /// Number of the next commit.
    pub next_commit: u64,
    /// A valid unit of this epoch and of a later commit stands past the end: damage, not a cut.
    pub damaged: bool,
}

/// A commit of which some units were seen.
struct Partial {
    units: u64,
    len: usize,
    crc: checksum::Seeded,
}

/// Where the chain of commits stands.
enum Chain {
    /// A commit must start here. After a commit its fillers may come first; one that is lost ends
    /// nothing, the next append starts there only if no whole commit follows.
    Between,
    /// In a commit.
    Inside(Partial),
    /// Ended by the first unit missing, bad or older (R2).
    Ended,
}

/// Collects whole commits from units that are fed in sequence order.
pub struct Scanner {
    uuid: Uuid,
    epoch: u64,
    /// Sequence number that the next unit should have.
    seq: u64,
    units_left: u64,
    chain: Chain,
    /// Highest commit number of any valid unit of this epoch, wherever it stands.
    newest: Option<u64>,
    found: Scan<Extent>,
}

impl Scanner {
    /// A scan of a journal of `total` units from `from` on.
    pub fn new(uuid: &Uuid, total: u64, from: CommitId) -> Self {
        assert!(total > 0);
        let found = Scan { commits: Vec::new(), next_seq: from.seq, next_commit: from.commit, damaged: false };
        Self { uuid: *uuid, epoch: from.epoch, seq: from.seq, units_left: total, chain: Chain::Between, newest: None, found }
    }

    /// The place (in units) of the unit that is to be fed next, in a journal of `total` units.
    pub fn place(&self, total: u64) -> u64 {
        self.seq % total
    }

    /// Units not fed yet.
    pub fn units_left(&self) -> u64 {
        self.units_left
    }

    /// Takes the unit at the next place.
    pub fn feed(&mut self, unit: &[u8]) {
        assert!(self.units_left > 0, "every place is fed once");
        let seq = self.seq;
        self.seq += 1;
        self.units_left -= 1;
        let unit = decode_unit_of(&self.uuid, self.epoch, unit);
        if let Some(unit) = &unit {
            self.newest = self.newest.max(Some(unit.commit));
        }
        let chain = std::mem::replace(&mut self.chain, Chain::Ended);
        self.chain = match unit.filter(|u| u.seq == seq) {
            Some(unit) => self.advance(chain, &unit),
            None => Chain::Ended,
        };
    }

    /// The chain's next state; `unit` has the sequence number of its place.
    fn advance(&mut self, chain: Chain, unit: &Unit<'_>) -> Chain {
        let found = &mut self.found;
        let mut partial = match chain {
            Chain::Ended => return Chain::Ended,
            Chain::Between if unit.filler && !found.commits.is_empty() && unit.commit == found.next_commit - 1 => {
                found.next_seq = unit.seq + 1;
                return Chain::Between;
            }
            Chain::Between if unit.first => {
                Partial { units: 0, len: 0, crc: checksum::Seeded::new(&self.uuid, checksum::kind::COMMIT, unit.commit) }
            }
            Chain::Inside(partial) if !unit.first => partial,
            _ => return Chain::Ended,
        };
        if unit.filler || unit.commit != found.next_commit {
            return Chain::Ended;
        }
        partial.units += 1;
        partial.len += unit.payload.len();
        partial.crc.update(unit.payload);
        if !unit.last {
            return Chain::Inside(partial);
        }
        if partial.crc.finish() != unit.commit_crc {
            return Chain::Ended;
        }
        let id = CommitId { epoch: self.epoch, seq: found.next_seq, commit: unit.commit };
        found.commits.push(Extent { id, units: partial.units, len: partial.len });
        found.next_seq = unit.seq + 1;
        found.next_commit += 1;
        Chain::Between
    }

    /// What was found, once every place was fed.
    pub fn finish(mut self) -> Scan<Extent> {
        assert_eq!(self.units_left, 0, "damage shows anywhere in the journal");
        self.found.damaged = self.newest.is_some_and(|newest| newest > self.found.next_commit);
        self.found
    }
}

/// Scans a journal that is in memory: `bytes` is the whole region. The payloads are returned.
pub fn scan(uuid: &Uuid, bytes: &[u8], from: CommitId) -> Scan<Vec<u8>> {
    assert!(!bytes.is_empty() && bytes.len() % PAGE_SIZE == 0);
    let total = (bytes.len() / PAGE_SIZE) as u64;
    let at = |place: u64| &bytes[place as usize * PAGE_SIZE..][..PAGE_SIZE];
    let mut scanner = Scanner::new(uuid, total, from);
    while scanner.units_left() > 0 {
        scanner.feed(at(scanner.place(total)));
    }
    let found = scanner.finish();
    let payload = |extent: &Extent| {
        let units = (extent.id.seq..extent.id.seq + extent.units).map(|seq| at(seq % total));
        units.flat_map(|unit| decode_unit_of(uuid, from.epoch, unit).expect("valid a moment ago").payload.iter().copied()).collect()
    };
    let commits = found.commits.iter().map(payload).collect();
    Scan { commits, next_seq: found.next_seq, next_commit: found.next_commit, damaged: found.damaged }
}
