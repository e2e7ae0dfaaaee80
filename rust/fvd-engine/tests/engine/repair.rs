// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damage that is repaired: what is told, what is lost, what stays (CC-50…).

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::{CheckReport, Config, CreateParams, Kind, Repair, Reply, Request};
use fvd_format::RegionKind;
use fvd_format::header::HEADER_OFFSETS;

const BLOCK: u64 = 4096;

fn base() -> Vec<u8> {
    (0..4 * MIB).map(|i| 1 + (i / 512 % 251) as u8).collect()
}

fn for_repair(bytes: &Store) -> Sim {
    Sim::try_open(bytes, Some(base()), limits(1), Config { repair: true, ..Config::default() }).unwrap()
}

fn ask(sim: &Sim, repair: Repair) -> CheckReport {
    match sim.ask(Request::Check { repair }).unwrap() {
        Reply::Check(report) => *report,
        other => panic!("{other:?}"),
    }
}

/// An image of which blocks 3 and 5 were written, and its bitmap's place.
fn written() -> (Store, u64) {
    let sim = Sim::new(over_base(4 * MIB), Some(base()));
    sim.write(3 * BLOCK, vec![0xaa; 4096]);
    sim.write(5 * BLOCK, vec![0xbb; 4096]);
    let bitmap = sim.info().header.region(RegionKind::Bitmap).unwrap().offset;
    (sim.close(), bitmap)
}

fn flip(bytes: &mut Store, at: u64) {
    let mut page = vec![0; 4096];
    bytes.read(at / 4096 * 4096, &mut page);
    page[(at % 4096) as usize] ^= 1;
    bytes.write(at / 4096 * 4096, &page);
}

#[test]
fn blocks_of_a_lost_bitmap_page_read_as_the_base() {
    let (mut bytes, bitmap) = written();
    flip(&mut bytes, bitmap + 99);
    let sim = for_repair(&bytes);
    assert_eq!(sim.try_read(3 * BLOCK, 4096).unwrap_err().kind, Kind::Corrupt);
    let found = ask(&sim, Repair::None);
    assert_eq!((found.corruptions, found.corruptions_fixed), (1, 0), "{:?}", found.findings);
    // Space is all that may be touched.
    assert_eq!(ask(&sim, Repair::Leaks).corruptions, 1);
    let report = ask(&sim, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed, report.lost_bytes), (0, 1, 4 * MIB), "{:?}", report.findings);
    assert_eq!(report.lost, [(0, 4 * MIB)]);
    assert_eq!(sim.read(0, 4 * MIB), base());
    sim.write(5 * BLOCK, vec![0xcc; 4096]);
    let sim = Sim::open(&sim.close(), Some(base()));
    assert_eq!(sim.check(), (0, Vec::new()));
    assert_eq!(sim.read(5 * BLOCK, 4096), vec![0xcc; 4096]);
    sim.close();
}

#[test]
fn a_header_copy_is_written_again_from_the_other() {
    for copy in HEADER_OFFSETS {
        let (mut bytes, _) = written();
        flip(&mut bytes, copy + 200);
        let config = Config { read_only: true, ..Config::default() };
        let sim = Sim::try_open(&bytes, Some(base()), limits(1), config).unwrap();
        assert_eq!(sim.check().0, 1);
        assert_eq!(sim.ask(Request::Check { repair: Repair::All }).unwrap_err().kind, Kind::ReadOnly);
        sim.close();
        let sim = for_repair(&bytes);
        let report = ask(&sim, Repair::All);
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{:?}", report.findings);
        let sim = Sim::open(&sim.close(), Some(base()));
        assert_eq!(sim.check(), (0, Vec::new()));
        assert_eq!(sim.read(3 * BLOCK, 4096), vec![0xaa; 4096]);
        sim.close();
    }
}

#[test]
fn space_behind_the_end_is_given_back() {
    let (bytes, _) = written();
    let mut longer = bytes.clone();
    longer.resize(bytes.len + 3 * MIB);
    let sim = for_repair(&longer);
    assert_eq!(ask(&sim, Repair::None).leaked, 3 * MIB);
    let report = ask(&sim, Repair::Leaks);
    assert_eq!((report.leaked, report.leaked_fixed), (0, 3 * MIB));
    let repaired = sim.close();
    assert_eq!(repaired.len, bytes.len);
    let sim = Sim::open(&repaired, Some(base()));
    assert_eq!(sim.read(5 * BLOCK, 4096), vec![0xbb; 4096]);
    sim.close();
}

/// Three commits of one session, and then the second one's unit is rotten.
fn damaged_journal() -> Store {
    let sim = Sim::new(over_base(4 * MIB), Some(base()));
    for block in 0..4 {
        sim.write(block * BLOCK, vec![0xa0 + block as u8; 4096]);
        sim.flush();
    }
    let header = sim.info().header;
    let journal = header.region(RegionKind::Journal).unwrap().offset;
    let second = (header.first_seq + 1) % header.journal_units();
    let mut bytes = sim.crash();
    flip(&mut bytes, journal + second * 4096 + 60);
    bytes
}

#[test]
fn of_a_damaged_journal_what_follows_is_dropped_when_asked_for() {
    let bytes = damaged_journal();
    let open = |config: Config| Sim::try_open(&bytes, Some(base()), limits(1), config);
    assert_eq!(open(Config::default()).err().unwrap().kind, Kind::Corrupt);
    let sim = open(Config { read_only: true, ..Config::default() }).unwrap();
    assert_eq!(sim.read(0, 4096), vec![0xa0; 4096]);
    assert_eq!(sim.read(BLOCK, 4096), base()[BLOCK as usize..][..4096]);
    assert_eq!(sim.check().0, 1);
    sim.close();
    // Opened for repair: nothing is written until it is asked for.
    let sim = for_repair(&bytes);
    assert_eq!(sim.ask(Request::Write { offset: 0, buf: Buf::new(vec![1; 512]), fua: false }).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(ask(&sim, Repair::None).corruptions, 1);
    assert_eq!(ask(&sim, Repair::Leaks).corruptions, 1);
    assert_eq!(sim.counts().writes, 0);
    let same = sim.close();
    assert!(Sim::try_open(&same, Some(base()), limits(1), Config::default()).is_err());
    let sim = for_repair(&bytes);
    let report = ask(&sim, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{:?}", report.findings);
    sim.write(7 * BLOCK, vec![0xee; 4096]);
    sim.flush();
    let sim = Sim::open(&sim.crash(), Some(base()));
    assert_eq!(sim.check(), (0, Vec::new()));
    assert_eq!(sim.read(0, 4096), vec![0xa0; 4096]);
    assert_eq!(sim.read(BLOCK, 4096), base()[BLOCK as usize..][..4096]);
    assert_eq!(sim.read(7 * BLOCK, 4096), vec![0xee; 4096]);
    sim.close();
}

/// The journal names a page that is rotten in place: a read-only open shows what others say, and a
/// repair goes on from there.
#[test]
fn recovery_over_a_rotten_page_waits_for_a_repair() {
    let params = CreateParams { virtual_size: Some(512 * MIB), ..over_base(0) };
    let (bytes, bitmap) = {
        let sim = Sim::new(params, Some(base()));
        sim.write(3 * BLOCK, vec![0xaa; 4096]);
        let sim = Sim::open(&sim.close(), Some(base()));
        sim.write(5 * BLOCK, vec![0xbb; 4096]);
        sim.flush();
        let bitmap = sim.info().header.region(RegionKind::Bitmap).unwrap().offset;
        (sim.crash(), bitmap)
    };
    let mut bytes = bytes;
    flip(&mut bytes, bitmap + 99);
    assert_eq!(Sim::try_open(&bytes, Some(base()), limits(1), Config::default()).err().unwrap().kind, Kind::Corrupt);
    let config = Config { read_only: true, ..Config::default() };
    let sim = Sim::try_open(&bytes, Some(base()), limits(1), config).unwrap();
    assert!(sim.try_read(3 * BLOCK, 4096).is_err());
    assert!(sim.check().0 > 0);
    sim.close();
    let sim = for_repair(&bytes);
    assert!(ask(&sim, Repair::All).corruptions_fixed >= 2);
    assert_eq!(sim.check().0, 0);
    let sim = Sim::open(&sim.close(), Some(base()));
    assert_eq!(sim.check(), (0, Vec::new()));
    assert_eq!(sim.read(3 * BLOCK, 4096), base()[3 * BLOCK as usize..][..4096]);
    assert_eq!(sim.read(5 * BLOCK, 4096), vec![0xbb; 4096], "the journal still said so");
    sim.close();
}
