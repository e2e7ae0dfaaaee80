// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damage that is repaired: what is told, what is lost, what stays (CC-60…).

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::{CheckReport, Config, Kind, Repair, Reply, Request};
use fvd_format::{Header, RegionKind};
use fvd_format::header::HEADER_OFFSETS;

const BLOCK: u64 = 4096;

fn base() -> Vec<u8> {
    (0..4 * MIB).map(|i| 1 + (i / 512 % 251) as u8).collect()
}

fn open(bytes: &Store) -> Sim {
    Sim::try_open(bytes, Some(base()), limits(1), Config::default()).unwrap()
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
    let sim = open(&bytes);
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
        let sim = open(&bytes);
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
    let sim = open(&longer);
    assert_eq!(ask(&sim, Repair::None).leaked, 3 * MIB);
    let report = ask(&sim, Repair::Leaks);
    assert_eq!((report.leaked, report.leaked_fixed), (0, 3 * MIB));
    let repaired = sim.close();
    assert_eq!(repaired.len, bytes.len);
    let sim = Sim::open(&repaired, Some(base()));
    assert_eq!(sim.read(5 * BLOCK, 4096), vec![0xbb; 4096]);
    sim.close();
}

/// A change that the engine did not make, there to stay.
fn behind_its_back(sim: &Sim, change: impl Fn(&mut Store)) {
    let disk = &mut *sim.world.disk.borrow_mut();
    change(&mut disk.view);
    change(&mut disk.stable);
}

/// Whatever a header copy has become under an open image: another of the same number, the one of the session before,
/// or none.
#[test]
fn a_header_copy_that_changed_under_an_open_image_is_written_again() {
    let (bytes, _) = written();
    for copy in [1, 2] {
        let place = HEADER_OFFSETS[copy - 1];
        for what in ["differs", "generation", "checksum"] {
            let sim = open(&bytes);
            sim.write(7 * BLOCK, vec![0xdd; 4096]);
            sim.flush();
            let header = sim.info().header;
            let page = match what {
                "differs" => Header { last_checkpoint: header.last_checkpoint + 1, ..header }.encode(copy),
                "generation" => {
                    let mut old = vec![0; 4096];
                    bytes.read(place, &mut old);
                    old
                }
                _ => vec![0x55; 4096],
            };
            behind_its_back(&sim, |store| store.write(place, &page));
            let found = ask(&sim, Repair::None);
            assert_eq!((found.corruptions, found.corruptions_fixed), (1, 0), "{:?}", found.findings);
            assert!(found.findings[0].contains(what) && found.findings[0].contains(&format!("copy {copy}")), "{:?}", found.findings);
            assert_eq!(ask(&sim, Repair::Leaks).corruptions, 1, "space is all that may be touched");
            let report = ask(&sim, Repair::All);
            assert_eq!((report.corruptions, report.corruptions_fixed, report.lost_bytes), (0, 1, 0), "{:?}", report.findings);
            // What counts is on the disk again, stable.
            let sim = Sim::open(&sim.crash(), Some(base()));
            assert_eq!(sim.check(), (0, Vec::new()));
            assert_eq!(sim.read(7 * BLOCK, 4096), vec![0xdd; 4096]);
            sim.close();
        }
    }
}

#[test]
fn a_file_that_was_cut_under_an_open_image_is_told() {
    let (bytes, _) = written();
    let sim = open(&bytes);
    behind_its_back(&sim, |store| store.resize(bytes.len - MIB));
    let (corruptions, findings) = sim.check();
    assert!(corruptions == 1 && findings[0].contains("what lay behind is lost"), "{findings:?}");
    // Nobody can bring it back.
    assert_eq!(ask(&sim, Repair::All).corruptions, 1);
    sim.close();
}

#[test]
fn space_that_the_host_does_not_take_back_is_told_and_given_back_later() {
    let (mut bytes, _) = written();
    let length = bytes.len;
    bytes.resize(length + 3 * MIB);
    let mut refused = 0;
    for number in 0.. {
        let sim = open(&bytes);
        let at = sim.world.ops.get() + number;
        *sim.world.plan.borrow_mut() = Plan { fail_at: Some(at), errno: EIO, ..Plan::default() };
        let answer = sim.ask(Request::Check { repair: Repair::Leaks });
        let over = sim.world.ops.get() <= at;
        if let Ok(Reply::Check(report)) = answer
            && !over
        {
            refused += 1;
            assert_eq!((report.leaked, report.leaked_fixed), (3 * MIB, 0), "operation {number}");
            assert!(report.findings.iter().any(|text| text.contains("cannot be cut")), "{:?}", report.findings);
            assert_eq!(ask(&sim, Repair::Leaks).leaked_fixed, 3 * MIB);
            assert_eq!(sim.close().len, length);
        }
        if over {
            break;
        }
    }
    assert_eq!(refused, 1, "of all operations only the one that cuts the file may fail without an error");
}
