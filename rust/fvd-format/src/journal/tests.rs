// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

const UUID: Uuid = [3; 16];

fn put(journal: &mut [u8], units: &[u8], seq: u64) {
    let total = (journal.len() / PAGE_SIZE) as u64;
    for (i, unit) in units.chunks_exact(PAGE_SIZE).enumerate() {
        let place = ((seq + i as u64) % total) as usize * PAGE_SIZE;
        journal[place..place + PAGE_SIZE].copy_from_slice(unit);
    }
}

#[test]
fn records_round_trip() {
    let data = [7u8; 1024];
    let records = [
        Record::Bits { region: RegionKind::Bitmap, value: true, first: 77, count: 5 },
        Record::Entries { region: RegionKind::Table, first: 3, values: &data[..12] },
        Record::EntryRun { region: RegionKind::Table, first: 3, count: 9, value: 100, step: 1 },
        Record::Reach(1 << 40),
        Record::Carried { guest: 8192, data: &data },
        Record::Confirm(12),
    ];
    let mut payload = Vec::new();
    for record in &records {
        record.encode(&mut payload);
    }
    let mut rest = payload.as_slice();
    for record in &records {
        assert_eq!(Record::decode(&mut rest).unwrap(), *record);
    }
    assert!(rest.is_empty());
    for cut in 1..RECORD_HEAD {
        assert!(Record::decode(&mut &payload[..cut]).is_err());
    }
}

#[test]
fn a_scan_returns_whole_commits_across_the_wrap() {
    let mut journal = vec![0; 16 * PAGE_SIZE];
    let mut seq = 13;
    for commit in 5..9u64 {
        let payload = vec![commit as u8; UNIT_PAYLOAD * 2 + 100];
        let units = encode_commit(&UUID, CommitId { epoch: 2, seq, commit }, &payload, PAGE_SIZE);
        put(&mut journal, &units, seq);
        seq += (units.len() / PAGE_SIZE) as u64;
    }
    let from = CommitId { epoch: 2, seq: 13, commit: 5 };
    let found = scan(&UUID, &journal, from);
    assert_eq!((found.commits.len(), found.next_seq, found.next_commit, found.damaged), (4, seq, 9, false));
    assert_eq!(found.commits[2], vec![7; UNIT_PAYLOAD * 2 + 100]);
    // Another epoch sees nothing.
    assert!(scan(&UUID, &journal, CommitId { epoch: 3, ..from }).commits.is_empty());
    // A unit of the last commit lost: the commit is not applied, and it is a cut.
    let mut cut = journal.clone();
    let place = ((seq - 2) % 16) as usize * PAGE_SIZE;
    cut[place..place + PAGE_SIZE].fill(0);
    let found = scan(&UUID, &cut, from);
    assert_eq!((found.commits.len(), found.damaged), (3, false));
    // A unit of an earlier one lost: later commits prove that it is damage.
    let mut rot = journal.clone();
    let place = (17 % 16) * PAGE_SIZE;
    rot[place..place + PAGE_SIZE].fill(0);
    let found = scan(&UUID, &rot, from);
    assert_eq!((found.commits.len(), found.damaged), (1, true));
}

#[test]
fn fillers_pad_to_the_granule() {
    let granule = 4 * PAGE_SIZE;
    let units = encode_commit(&UUID, CommitId { epoch: 1, seq: 0, commit: 1 }, b"x", granule);
    assert_eq!(units.len(), granule);
    let mut journal = vec![0; 16 * PAGE_SIZE];
    put(&mut journal, &units, 0);
    let found = scan(&UUID, &journal, CommitId { epoch: 1, seq: 0, commit: 1 });
    assert_eq!((found.commits.len(), found.next_seq), (1, 4));
}

#[test]
fn any_flipped_bit_of_a_unit_is_found() {
    let unit = encode_commit(&UUID, CommitId { epoch: 1, seq: 5, commit: 1 }, b"payload", PAGE_SIZE);
    assert!(decode_unit(&UUID, &unit).is_some());
    for bit in 0..PAGE_SIZE * 8 {
        let mut rotten = unit.clone();
        rotten[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_unit(&UUID, &rotten).is_none(), "bit {bit}");
    }
}
