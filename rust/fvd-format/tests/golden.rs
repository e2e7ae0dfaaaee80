// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of every structure, written out, so that the format cannot drift unseen. Checksums in
//! here were computed by another CRC-32 (zlib's) from the rule in FMT-3.

mod common;

use common::{dump, hex};
use fvd_format::double_write::{Batch, BatchEntry};
use fvd_format::header::{autoclear, compatible, incompatible};
use fvd_format::journal::{CommitId, Record, encode_commit};
use fvd_format::page::{self, PageHeader};
use fvd_format::{RegionKind, Uuid};

const UUID: Uuid = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn encoded(record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

#[test]
fn records() {
    let carried = [0xab; 512];
    let mut carried_bytes = hex("05 00 00 00 00 02 00 00 00 10 00 00 00 00 00 00");
    carried_bytes.extend_from_slice(&carried);
    let cases = [
        (Record::Bits { region: RegionKind::Bitmap, value: true, first: 5, count: 3 }, hex("01 01 0400 03000000 0500000000000000")),
        (
            Record::Bits { region: RegionKind::OwnBits, value: false, first: 0x0102_0304_0506_0708, count: 0x1122_3344 },
            hex("01 00 0900 44332211 0807060504030201"),
        ),
        (
            Record::Entries { region: RegionKind::Table, first: 9, values: &[1, 0, 0, 0, 2, 0, 0, 0x80] },
            hex("02 00 0500 02000000 0900000000000000 01000000 02000080"),
        ),
        (
            Record::EntryRun { region: RegionKind::OriginIds, first: 7, count: 256, value: 0x0a0b_0c0d, step: 1 },
            hex("03 01 0800 00010000 0700000000000000 0d0c0b0a"),
        ),
        (Record::Reach(0x1_0000_0000), hex("04 00 0000 00000000 0000000001000000")),
        (Record::Carried { guest: 4096, data: &carried }, carried_bytes),
        (Record::Confirm(77), hex("06 00 0000 00000000 4d00000000000000")),
    ];
    for (record, bytes) in cases {
        assert_eq!(encoded(&record), bytes, "{record:?}");
        assert_eq!(Record::decode(&mut bytes.as_slice()).unwrap(), record);
    }
}

#[test]
fn journal_unit() {
    let payload = hex("01 01 0400 03000000 0500000000000000");
    let id = CommitId { epoch: 2, seq: 0x1234, commit: 9 };
    let units = encode_commit(&UUID, id, &payload, 8192);
    assert_eq!(
        dump(&units[..4096]),
        "0000: 0e cb ae 6d 03 00 00 00 02 00 00 00 00 00 00 00\n\
         0010: 34 12 00 00 00 00 00 00 09 00 00 00 00 00 00 00\n\
         0020: 10 00 00 00 ac dc 41 a9 00 00 00 00 00 00 00 00\n\
         0030: 01 01 04 00 03 00 00 00 05 00 00 00 00 00 00 00\n"
    );
    assert_eq!(
        dump(&units[4096..]),
        "0000: 0f 39 65 b6 04 00 00 00 02 00 00 00 00 00 00 00\n\
         0010: 35 12 00 00 00 00 00 00 09 00 00 00 00 00 00 00\n"
    );
}

#[test]
fn flags_of_a_longer_commit() {
    let units = encode_commit(&UUID, CommitId { epoch: 1, seq: 0, commit: 1 }, &[7; 4048 * 2 + 1], 16384);
    let heads: Vec<(u8, u8, u8)> = units.chunks(4096).map(|u| (u[4], u[32], u[33])).collect();
    // flags, payload bytes: first; neither; last; filler.
    assert_eq!(heads, [(1, 0xd0, 0x0f), (0, 0xd0, 0x0f), (2, 1, 0), (4, 0, 0)]);
}

#[test]
fn page_head() {
    let mut bytes = vec![0; 4096];
    bytes[32] = 0xe0;
    bytes[4095] = 0x55;
    let header = PageHeader { kind: RegionKind::Bitmap, generation: 3, index: 0x1_0002, write_count: 4, checkpoint: 0x55 };
    page::seal(&UUID, &header, &mut bytes);
    assert_eq!(
        dump(&bytes),
        "0000: 66 83 ec 4c 04 00 00 00 03 00 00 00 04 00 00 00\n\
         0010: 55 00 00 00 00 00 00 00 02 00 01 00 00 00 00 00\n\
         0020: e0 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         0ff0: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 55\n"
    );
}

#[test]
fn double_write_head() {
    let entry = |kind, index, crc| BatchEntry { kind, index, crc };
    let batch = Batch {
        number: 6,
        entries: vec![entry(RegionKind::Bitmap, 0x0102, 0xdead_beef), entry(RegionKind::PageMap, 0, 0x0506_0708)],
    };
    assert_eq!(
        dump(&batch.encode(&UUID)),
        "0000: de 40 88 82 02 00 00 00 06 00 00 00 00 00 00 00\n\
         0020: 04 00 00 00 ef be ad de 02 01 00 00 00 00 00 00\n\
         0030: 01 00 00 00 08 07 06 05 00 00 00 00 00 00 00 00\n"
    );
}

#[test]
fn numbers_of_regions_and_features() {
    use RegionKind::*;
    let numbers = [
        (PageMap, 1, false),
        (DoubleWrite, 2, false),
        (Journal, 3, false),
        (Bitmap, 4, true),
        (Table, 5, true),
        (Refcounts, 6, true),
        (SnapshotDir, 7, true),
        (OriginIds, 8, true),
        (OwnBits, 9, true),
        (KeyArea, 10, false),
        (Profile, 11, true),
        (DirtyBitmaps, 12, true),
    ];
    assert_eq!(RegionKind::ALL.len(), numbers.len());
    for (kind, number, mapped) in numbers {
        assert_eq!((kind as u16, kind.is_mapped(), RegionKind::from_u16(number)), (number, mapped, Some(kind)));
    }
    assert_eq!((RegionKind::from_u16(0), RegionKind::from_u16(13)), (None, None));
    let incompatible = [
        incompatible::COMPACT,
        incompatible::DATA_FILE,
        incompatible::ENCRYPTED,
        incompatible::SNAPSHOTS,
        incompatible::ORIGINS,
        incompatible::CARRIED_DATA,
    ];
    assert_eq!(incompatible, [1, 2, 4, 8, 16, 32]);
    let compatible = [compatible::COPY_ON_READ, compatible::PROFILE, compatible::NON_ZEROING, compatible::PREFETCH];
    assert_eq!(compatible, [1, 2, 4, 8]);
    assert_eq!(autoclear::DIRTY_BITMAPS, 1);
}
