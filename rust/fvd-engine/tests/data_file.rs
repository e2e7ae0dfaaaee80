// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images whose guest data lies in a file of its own: what each file holds, what a flush syncs, and
//! what happens without a sound data file. What a cut may leave of the two is the simulator's.

mod common;

use common::sim::*;
use common::*;
use fvd_engine::host::{FileId, OpKind};
use fvd_engine::{CheckReport, Config, CreateParams, Error, Kind, Lookup, Place, Repair, Reply, Request};
use std::rc::Rc;

const CHUNK: u64 = 64 * KIB;

fn in_data_file(params: CreateParams) -> CreateParams {
    CreateParams { data_name: "disk.raw".into(), data_format: "raw".into(), journal_size: MIB, ..params }
}

fn flat(size: u64) -> CreateParams {
    in_data_file(CreateParams { virtual_size: Some(size), ..CreateParams::default() })
}

fn compact(size: u64) -> CreateParams {
    CreateParams { compact: true, chunk_size: CHUNK as u32, storage_grow_unit: 4 * CHUNK, ..flat(size) }
}

/// A world with both files; what the base holds is at every byte its number's low bits.
fn world(files: &(Store, Option<Store>), base: bool) -> Rc<World> {
    let base = base.then(|| (0..MIB).map(|i| (i / 512) as u8 | 1).collect());
    let world = World::new(files.0.clone(), base, 3, limits(512));
    *world.data.borrow_mut() = files.1.clone().map(Disk::new);
    world
}

fn try_open(files: &(Store, Option<Store>), base: bool, config: Config) -> Result<Sim, Error> {
    let world = world(files, base);
    let queue = world.queue(config);
    world.request(&queue, Request::Open).unwrap().map(|_| Sim { world, queue })
}

fn open(files: &(Store, Option<Store>), base: bool) -> Sim {
    try_open(files, base, Config::default()).unwrap()
}

fn make(params: CreateParams, base: bool) -> (Store, Option<Store>) {
    let world = world(&(Store::default(), Some(Store::default())), base);
    world.request(&world.queue(Config::default()), Request::Create(Box::new(params))).unwrap().unwrap();
    stable(&world)
}

/// What is durable.
fn stable(world: &World) -> (Store, Option<Store>) {
    (world.disk.borrow().stable.clone(), world.data.borrow().as_ref().map(|data| data.stable.clone()))
}

fn close(sim: &Sim) -> (Store, Option<Store>) {
    sim.ask(Request::Close).unwrap();
    stable(&sim.world)
}

fn bytes(store: &Store) -> Vec<u8> {
    let mut out = vec![0; store.len as usize];
    store.read(0, &mut out);
    out
}

/// Flushes and writes since the last call, in the order in which they ended.
fn changes(sim: &Sim) -> Vec<(FileId, bool)> {
    let trace = std::mem::take(&mut *sim.world.trace.borrow_mut());
    let kinds = trace.iter().filter(|op| matches!(op.kind, OpKind::Write { .. } | OpKind::Flush));
    kinds.map(|op| (op.file, op.kind == OpKind::Flush)).collect()
}

fn check(sim: &Sim, repair: Repair) -> CheckReport {
    match sim.ask(Request::Check { repair }) {
        Ok(Reply::Check(report)) => *report,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_data_file_is_a_raw_image_of_the_disk() {
    let size = MIB + 1536;
    let files = make(flat(size), false);
    assert_eq!(files.1.as_ref().unwrap().len, size, "not a byte more than the disk");
    let sim = open(&files, false);
    sim.write(512, vec![7; 9000 / 512 * 512]);
    sim.write(size - 512, vec![8; 512]);
    assert!(sim.world.trace.borrow().iter().all(|op| op.file == FileId::Data || !matches!(op.kind, OpKind::Write { .. }) || op.offset < MIB));
    let disk = sim.read(0, size);
    assert_eq!(sim.status(0, size).place, Place::Data { file: FileId::Data, offset: 0 });
    match sim.queue.image().lookup(0, 4096, 512, true) {
        Lookup::Data { file, offset, len, token } => {
            assert_eq!((file, offset, len), (FileId::Data, 4096, 512));
            sim.queue.image().end(token);
        }
        Lookup::Ask => panic!("flat data needs nobody"),
    }
    assert_eq!(check(&sim, Repair::None).leaked, 0);
    let (image, data) = close(&sim);
    assert!(bytes(&data.unwrap()) == disk);
    assert!(image.len < 3 * MIB, "{}", image.len);
}

#[test]
fn over_a_base_the_data_file_holds_what_was_written() {
    let files = make(in_data_file(over_base(MIB)), true);
    let sim = open(&files, true);
    let before = sim.read(0, MIB);
    sim.write(4096 + 512, vec![9; 512]);
    sim.flush();
    let files = (sim.world.disk.borrow().stable.clone(), sim.world.data.borrow().as_ref().map(|data| data.stable.clone()));
    // A process that dies: the journal has the bit, the data file the block.
    let sim = open(&files, true);
    let mut disk = before;
    disk[4608..5120].fill(9);
    assert!(sim.read(0, MIB) == disk);
    assert_eq!(sim.status(4096, 4096).place, Place::Data { file: FileId::Data, offset: 4096 });
    assert_eq!(sim.status(0, 4096).place, Place::Base);
    let data = bytes(&close(&sim).1.unwrap());
    assert!(data[4096..8192] == disk[4096..8192] && data[8192..].iter().all(|b| *b == 0));
}

#[test]
fn a_flush_syncs_the_data_file_before_the_journal() {
    for params in [in_data_file(over_base(MIB)), compact(MIB)] {
        let sim = open(&make(params.clone(), true), true);
        sim.write(0, vec![1; 4096]);
        sim.flush();
        // The session has begun, storage is there.
        sim.write(CHUNK, vec![1; 4096]);
        changes(&sim);
        sim.flush();
        assert_eq!(changes(&sim), [(FileId::Data, true), (FileId::Image, false), (FileId::Image, true)], "{params:?}");
        // Nothing to commit: data that needed no record.
        sim.write(CHUNK, vec![2; 4096]);
        changes(&sim);
        sim.flush();
        assert_eq!(changes(&sim), [(FileId::Data, true)]);
    }
}

#[test]
fn a_failed_sync_of_either_file_poisons() {
    for (fails, name) in [(0, "the data file"), (2, "the image file")] {
        let sim = open(&make(in_data_file(over_base(MIB)), true), true);
        sim.write(0, vec![1; 4096]);
        sim.flush();
        sim.write(8192, vec![1; 4096]);
        *sim.world.plan.borrow_mut() = Plan { fail_at: Some(sim.world.ops.get() + fails), errno: EIO, ..Plan::default() };
        let error = sim.ask(Request::Flush).unwrap_err();
        assert!(error.text.contains(&format!("syncing {name}")), "{error}");
        let error = sim.ask(Request::Write { offset: 0, buf: Buf::new(vec![0; 512]), fua: false }).unwrap_err();
        assert_eq!(error.kind, Kind::Poisoned);
        assert_eq!(sim.read(0, 512), [1; 512]);
    }
}

#[test]
fn chunks_lie_in_the_data_file_and_metadata_does_not() {
    let files = make(compact(4 * MIB), false);
    assert_eq!(files.1.as_ref().unwrap().len, 0);
    let sim = open(&files, false);
    sim.write(3 * MIB, vec![5; 4096]);
    sim.write(0, vec![6; 4096]);
    assert_eq!(sim.status(3 * MIB, 512).place, Place::Data { file: FileId::Data, offset: 0 });
    assert_eq!(sim.status(0, 512).place, Place::Data { file: FileId::Data, offset: CHUNK });
    let (image, data) = close(&sim);
    assert_eq!(data.as_ref().unwrap().len, 4 * CHUNK);
    // The step counts in the data file, not in the image file.
    let sim = open(&(image, data), false);
    assert_eq!(sim.info().header.reach, 4 * CHUNK);
    assert_eq!((check(&sim, Repair::None).corruptions, check(&sim, Repair::None).leaked), (0, 0));
    sim.ask(Request::Discard { offset: 0, len: CHUNK }).unwrap();
    sim.flush();
    assert_eq!(sim.read(0, 4096), [0; 4096]);
    sim.write(MIB, vec![4; 512]);
    assert_eq!(sim.read(MIB, 1024), [[4; 512], [0; 512]].concat());
}

#[test]
fn resizing_resizes_the_data_file() {
    for params in [flat(MIB), in_data_file(over_base(MIB))] {
        let sim = open(&make(params, true), true);
        sim.write(0, vec![3; MIB as usize]);
        let length = || sim.world.data.borrow().as_ref().unwrap().view.len;
        sim.ask(Request::Resize { size: MIB / 2 + 512, zeroed: false }).unwrap();
        assert_eq!(length(), MIB / 2 + 512);
        // Somebody appends to it; growth does not show that.
        sim.world.data.borrow_mut().as_mut().unwrap().view.write(MIB / 2 + 512, &[0xaa; 9000]);
        sim.ask(Request::Resize { size: 2 * MIB, zeroed: true }).unwrap();
        assert_eq!(length(), 2 * MIB);
        let disk = sim.read(0, 2 * MIB);
        assert!(disk[..(MIB / 2 + 512) as usize].iter().all(|b| *b == 3) && disk[(MIB / 2 + 512) as usize..].iter().all(|b| *b == 0));
        assert_eq!(check(&sim, Repair::None).corruptions, 0);
        let data = bytes(&close(&sim).1.unwrap());
        assert!(data == disk);
    }
}

#[test]
fn without_a_sound_data_file_only_metadata_can_be_looked_at() {
    for params in [in_data_file(over_base(MIB)), CreateParams { ..compact(MIB) }] {
        let sim = open(&make(params, true), true);
        sim.write(0, vec![1; 4096]);
        let (image, data) = close(&sim);
        let mut short = data.clone().unwrap();
        short.resize(4096);
        for (data, text, kind) in [(None, "'disk.raw' is missing", Kind::Host(123)), (Some(short), "'disk.raw' is too short: 4096 bytes", Kind::Corrupt)] {
            let files = (image.clone(), data);
            for read_only in [false, true] {
                let error = try_open(&files, true, Config { read_only, ..Config::default() }).err().unwrap();
                assert!(error.text.contains(text) && error.kind == kind, "{error:?}");
            }
            // Inspection reads the header and nothing else.
            assert_eq!(try_open(&files, true, Config { no_io: true, read_only: true, ..Config::default() }).unwrap().info().header.data_name, "disk.raw");
            let sim = try_open(&files, true, Config { metadata_only: true, ..Config::default() }).unwrap();
            let report = check(&sim, Repair::None);
            assert!(report.corruptions == 1 && report.findings[0].contains(text), "{report:?}");
            assert_eq!(sim.status(0, 4096).place, Place::Data { file: FileId::Data, offset: 0 });
            assert_eq!(sim.queue.image().lookup(0, 0, 512, false), Lookup::Ask);
            let read = Request::Read { offset: 0, buf: Buf::new(vec![0; 512]) };
            for request in [read, Request::Flush, Request::Check { repair: Repair::All }] {
                let error = sim.ask(request).unwrap_err();
                assert!(error.text.contains("metadata only"), "{error}");
            }
            sim.ask(Request::Close).unwrap();
            // The image is as it was: with its data file it opens.
            assert_eq!(bytes(&stable(&sim.world).0), bytes(&image));
        }
        assert_eq!(open(&(image, data), true).read(0, 4096), [1; 4096]);
    }
}

#[test]
fn space_behind_either_end_is_leaked_and_can_be_given_back() {
    let (mut image, data) = make(in_data_file(over_base(MIB)), true);
    let mut data = data.unwrap();
    let end = image.len;
    image.resize(end + 8192);
    data.resize(data.len + 4096);
    let sim = open(&(image, Some(data)), true);
    assert_eq!(check(&sim, Repair::None).leaked, 12288);
    let report = check(&sim, Repair::Leaks);
    assert_eq!((report.leaked, report.leaked_fixed), (0, 12288));
    let (image, data) = close(&sim);
    assert_eq!((image.len, data.unwrap().len), (end, MIB));
}

#[test]
fn a_base_may_come_later_and_regions_move_within_the_image_file() {
    for params in [flat(MIB), compact(MIB)] {
        let files = make(params, false);
        let sim = open(&files, true);
        assert_eq!(sim.read(0, 512), [1; 512], "pristine: all of it is the base's");
        sim.write(512, vec![2; 512]);
        assert_eq!(sim.read(0, 1536), [[1; 512], [2; 512], [3; 512]].concat());
        sim.ask(Request::MakeEmpty).unwrap();
        assert_eq!(sim.read(512, 512), [1; 512]);
        sim.write(4096, vec![6; 512]);
        let files = close(&sim);
        let sim = open(&files, true);
        assert_eq!(sim.read(4096, 1024), [[6; 512], [9; 512]].concat());
        assert_eq!(check(&sim, Repair::None).corruptions, 0);
    }
}

#[test]
fn creation_says_what_is_wrong_with_a_data_file() {
    let fails = |params: CreateParams, text: &str| {
        let world = world(&(Store::default(), Some(Store::default())), false);
        let error = world.request(&world.queue(Config::default()), Request::Create(Box::new(params))).unwrap().unwrap_err();
        assert!(error.text.contains(text), "{error}");
    };
    fails(CreateParams { data_format: "qcow2".into(), ..flat(MIB) }, "'disk.raw': format 'qcow2' is not supported");
    fails(CreateParams { data_format: String::new(), ..flat(MIB) }, "format of the data file 'disk.raw' is missing");
    fails(CreateParams { data_name: String::new(), ..flat(MIB) }, "'raw' without a data file");
    fails(CreateParams { data_name: "x".repeat(1024), ..flat(MIB) }, "1024 bytes");
    let world = world(&(Store::default(), None), false);
    let error = world.request(&world.queue(Config::default()), Request::Create(Box::new(flat(MIB)))).unwrap().unwrap_err();
    assert!(error.text.contains("measuring the data file"), "{error}");
}
