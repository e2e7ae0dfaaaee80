// SPDX-License-Identifier: MIT OR Apache-2.0
//! Journal records that the engine reads and does not write, and, of compact images, those that no image
//! can have: every checksum is right.

use crate::common::sim::*;
use crate::common::*;
use crate::hostile::{head, with_commit};
use crate::samples::{SIZE, Sample, header_of};
use fvd_engine::{Config, CreateParams, Error, Kind, Place, Repair, Reply, Request};
use fvd_format::RegionKind;
use fvd_format::journal::Record;

const CHUNK: u64 = 64 * KIB;
/// Guest chunks: their entries, one by one, are more than a journal's reader has in memory at once.
const CHUNKS: u64 = 70_000;
/// Chunks that were written, and more than a growth step, so that the journal has a reach.
const WRITTEN: u64 = 20;

fn open(bytes: &Store, read_only: bool) -> Result<Sim, Error> {
    Sim::try_open(bytes, None, limits(1), Config { read_only, ..Config::default() })
}

/// A compact image after a cut, and the entries of the chunks that were written.
fn cut() -> (Sample, Vec<u32>) {
    let params = CreateParams {
        virtual_size: Some(CHUNKS * CHUNK),
        journal_size: MIB,
        compact: true,
        chunk_size: CHUNK as u32,
        storage_grow_unit: 16 * CHUNK,
        ..CreateParams::default()
    };
    let sim = Sim::new(params, None);
    let data = sim.info().header.data_offset;
    let entries = (0..WRITTEN).map(|chunk| {
        sim.write(chunk * CHUNK, vec![1 + chunk as u8; CHUNK as usize]);
        sim.flush();
        match sim.status(chunk * CHUNK, CHUNK).place {
            Place::Data { offset, .. } => ((offset - data) / CHUNK) as u32 + 1,
            other => panic!("{other:?}"),
        }
    });
    let entries = entries.collect();
    let bytes = sim.crash();
    (Sample { name: "compact", header: header_of(&bytes), bytes, base: Vec::new(), data: vec![0; SIZE as usize], older: None }, entries)
}

/// A record with values of its own may be larger than what is read of the journal at once.
#[test]
fn entries_one_by_one_are_read() {
    let (sample, entries) = cut();
    // The first and the last guest chunk take over what two others had; one keeps its own.
    let mut values = vec![0; CHUNKS as usize];
    for (chunk, from) in [(0, 7), (CHUNKS - 1, 2), (9, 9)] {
        values[chunk as usize] = entries[from];
    }
    let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut payload = Vec::new();
    Record::Entries { region: RegionKind::Table, first: 0, values: &values }.encode(&mut payload);
    let mut bytes = with_commit(&sample, &payload);
    // From the journal without a change, then by recovery, then from the pages.
    for read_only in [true, false, true] {
        let sim = open(&bytes, read_only).unwrap();
        for (chunk, byte) in [(0, 8), (1, 0), (2, 0), (7, 0), (9, 10), (WRITTEN - 1, 0), (CHUNKS - 1, 3)] {
            same(&sim.read(chunk * CHUNK, CHUNK), &[byte; CHUNK as usize], &format!("chunk {chunk}, read-only {read_only}"));
        }
        match sim.ask(Request::Check { repair: Repair::None }) {
            Ok(Reply::Check(report)) => assert_eq!((report.corruptions, report.chunks_allocated), (0, 3), "{:?}", report.findings),
            other => panic!("{other:?}"),
        }
        bytes = sim.close();
    }
}

#[test]
fn records_that_a_compact_image_cannot_have_are_refused() {
    let (sample, _) = cut();
    let record = |record: Record| {
        let mut payload = Vec::new();
        record.encode(&mut payload);
        payload
    };
    let entries = |first, values: &[u8]| record(Record::Entries { region: RegionKind::Table, first, values });
    let run = |first, count, value, step| record(Record::EntryRun { region: RegionKind::Table, first, count, value, step });
    let cases = [
        ("an entry past the last chunk", entries(CHUNKS, &[0; 4])),
        ("entries that end too far", entries(CHUNKS - 1, &[0; 8])),
        ("an entry far away", entries(u64::MAX, &[0; 4])),
        ("storage beyond the reach", entries(0, &[0xff; 4])),
        ("no storage, then storage beyond the reach", entries(0, &[0, 0, 0, 0, 0, 0, 0, 0x7f])),
        ("a run that ends too far", run(CHUNKS - 1, 2, 0, 0)),
        ("a run of storage beyond the reach", run(0, 1, u32::MAX, 0)),
        ("a run that ends beyond the reach", run(0, CHUNKS as u32, 1, 1)),
        ("a run with step 2", [head(3, 2, 5, 2, 0), vec![1, 0, 0, 0]].concat()),
        ("a reach that no file has", record(Record::Reach(1 << 63))),
        ("a reach that this file has not", record(Record::Reach(1 << 40))),
        ("bits without a bitmap", record(Record::Bits { region: RegionKind::Bitmap, value: true, first: 0, count: 1 })),
        ("entries of the bitmap", [head(2, 0, 4, 1, 0), vec![0; 4]].concat()),
    ];
    for (name, payload) in cases {
        let bytes = with_commit(&sample, &payload);
        for read_only in [true, false] {
            let world = World::new(bytes.clone(), None, 1, limits(1));
            let queue = world.queue(Config { read_only, ..Config::default() });
            let error = world.request(&queue, Request::Open).unwrap().expect_err(name);
            assert!(matches!(error.kind, Kind::Corrupt | Kind::Unsupported), "{name}: {error:?}");
            assert_eq!(world.counts.borrow().writes, 0, "{name}: a refused open wrote");
        }
    }
}

/// What the journal says of storage must be there: whoever cut the file took data away.
#[test]
fn a_file_shorter_than_what_its_journal_says_is_refused() {
    let (sample, _) = cut();
    let mut bytes = sample.bytes.clone();
    bytes.resize(bytes.len - 4096);
    for read_only in [true, false] {
        let error = open(&bytes, read_only).err().expect("too short");
        assert!(error.kind == Kind::Corrupt && error.text.contains("the journal says"), "{error:?}");
    }
    open(&sample.bytes, false).unwrap().close();
}

/// One record of 16 bytes may name more pages than may be in memory.
#[test]
fn a_record_of_many_pages_needs_the_memory_for_them() {
    let size = 20 << 30;
    let sim = Sim::new(over_base(size), None);
    sim.write(0, vec![1; 512]);
    sim.flush();
    let bytes = sim.crash();
    let sample = Sample { name: "large", header: header_of(&bytes), bytes, base: Vec::new(), data: Vec::new(), older: None };
    let mut payload = Vec::new();
    Record::Bits { region: RegionKind::Bitmap, value: true, first: 0, count: (size / 4096) as u32 }.encode(&mut payload);
    let bytes = with_commit(&sample, &payload);
    for read_only in [true, false] {
        let open = |metadata_memory| Sim::try_open(&bytes, None, limits(1), Config { read_only, metadata_memory, ..Config::default() });
        let error = open(300 << 10).err().expect("160 pages");
        assert!(error.kind == Kind::NoMemory && error.text.contains("metadata-memory"), "{error:?}");
        let sim = open(Config::default().metadata_memory).unwrap();
        assert_eq!(sim.read(0, 512), vec![1; 512]);
        sim.close();
    }
}
