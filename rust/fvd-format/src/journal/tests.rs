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
    for bit in (0..PAGE_SIZE * 8).step_by(if cfg!(miri) { 4801 } else { 1 }) {
        let mut rotten = unit.clone();
        rotten[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_unit(&UUID, &rotten).is_none(), "bit {bit}");
    }
}

/// FMT-54 and FMT-55 as they read, with the whole journal at hand: the oracle of [`Scanner`].
fn scan_slowly(uuid: &Uuid, bytes: &[u8], from: CommitId) -> Scan<Vec<u8>> {
    assert!(!bytes.is_empty() && bytes.len() % PAGE_SIZE == 0);
    let total = (bytes.len() / PAGE_SIZE) as u64;
    let at = |seq: u64| {
        let place = (seq % total) as usize * PAGE_SIZE;
        decode_unit(uuid, &bytes[place..place + PAGE_SIZE]).filter(|u| u.epoch == from.epoch)
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


/// Journals of commits that are whole, cut, repeated, of wrong epochs, numbers, flags and checksums.
#[test]
fn a_scan_unit_by_unit_finds_what_the_rules_say() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % n
    };
    let mut seen = [0; 4];
    for _ in 0..if cfg!(miri) { 10 } else { 3000 } {
        let total = 2 + below(14);
        let from = CommitId { epoch: 7, seq: below(40), commit: below(3) };
        let mut journal = vec![0; total as usize * PAGE_SIZE];
        let mut id = from;
        let end = from.seq + below(total + 4);
        while id.seq < end {
            let payload = vec![id.commit as u8; below(2 * UNIT_PAYLOAD as u64) as usize];
            let written = CommitId { epoch: 7 - u64::from(below(20) == 0), commit: id.commit + u64::from(below(20) == 0), ..id };
            let units = encode_commit(&UUID, written, &payload, PAGE_SIZE << below(2));
            put(&mut journal, &units, id.seq);
            id.seq += (units.len() / PAGE_SIZE) as u64;
            id.commit += 1;
        }
        for _ in 0..below(3) {
            let unit = &mut journal[below(total) as usize * PAGE_SIZE..][..PAGE_SIZE];
            match below(4) {
                0 => unit.fill(0),
                1 => unit[4] ^= 1 << below(3),
                2 => unit[36] ^= 1,
                _ => unit[24] = below(12) as u8,
            }
            // A unit with a wrong field and a right checksum, so that the field is what is judged.
            let crc = checksum::seeded(&UUID, checksum::kind::JOURNAL_UNIT, get_u64(unit, 16), &[&unit[4..]]);
            put_u32(unit, 0, crc);
        }
        let found = scan(&UUID, &journal, from);
        assert_eq!(found, scan_slowly(&UUID, &journal, from), "from {from:?} of {total}");
        seen[found.commits.len().min(3)] += 1;
        seen[3] += u32::from(found.damaged);
    }
    assert!(cfg!(miri) || seen.iter().all(|&n| n > 100), "{seen:?}");
}
