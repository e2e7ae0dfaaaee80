// SPDX-License-Identifier: MIT OR Apache-2.0
//! The scan of a journal and the records in its commits.

use crate::input::Input;
use crate::patch::{Page, page_of, seal_journal};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::journal::{CommitId, RECORD_HEAD, Record, encode_commit, scan, units_for};

const UUID: [u8; 16] = [9; 16];

/// A few commits made of the input's bytes, then patches of the units, then, where byte 0 says so,
/// right checksums.
pub fn journal_scan(data: &[u8]) {
    let mut input = Input::new(data);
    let (how, total, from) = (input.u8(), u64::from(input.u8() % 31) + 1, u64::from(input.u8()));
    let from = CommitId { epoch: 3, seq: from, commit: 1 };
    let mut journal: Vec<Page> = (0..total).map(|_| page_of(&[])).collect();
    let mut id = from;
    for _ in 0..how & 7 {
        let len = usize::from(input.u16()) % (3 * PAGE_SIZE);
        let repeat = usize::from(input.u8()) % 8 + 1;
        let payload = input.bytes(len.div_ceil(repeat)).repeat(repeat);
        let units = encode_commit(&UUID, id, &payload, PAGE_SIZE << (how >> 3 & 1));
        for unit in units.chunks_exact(PAGE_SIZE) {
            journal[(id.seq % total) as usize] = page_of(unit);
            id.seq += 1;
        }
        id.commit += 1;
    }
    while !input.is_empty() {
        let (unit, at) = (u64::from(input.u8()) % total, usize::from(input.u8()) % 80);
        let bytes = input.bytes(1 + usize::from(how >> 4 & 7));
        journal[unit as usize][at..at + bytes.len()].copy_from_slice(bytes);
    }
    if how & 128 != 0 {
        let first = (from.seq % total) as usize;
        journal.rotate_left(first);
        seal_journal(&UUID, &mut journal);
        journal.rotate_right(first);
    }
    let bytes: Vec<u8> = journal.iter().flat_map(|unit| unit.iter().copied()).collect();
    let found = scan(&UUID, &bytes, from);
    assert_eq!(found.next_commit, from.commit + found.commits.len() as u64);
    let least: u64 = found.commits.iter().map(|payload| units_for(payload.len())).sum();
    assert!(found.next_seq - from.seq >= least.min(total) && found.next_seq - from.seq <= total);
    for payload in &found.commits {
        records(payload);
    }
}

/// Every record that is taken is the one that would be written.
fn records(payload: &[u8]) {
    let mut rest = payload;
    while !rest.is_empty() {
        let before = rest;
        let Ok(record) = Record::decode(&mut rest) else {
            assert_eq!(rest, before, "an error takes nothing");
            return;
        };
        let taken = &before[..before.len() - rest.len()];
        assert!(taken.len() >= RECORD_HEAD);
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again, taken, "{record:?}");
    }
}
