// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole images through the blocking `Disk`: chains of bases, and what must be refused.

use fvd_engine::{CreateParams, Kind, Place};
use fvd_host::{Options, disk::Disk};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;

fn params(size: Option<u64>, base: &str, format: &str) -> CreateParams {
    CreateParams { virtual_size: size, base_name: base.into(), base_format: format.into(), journal_size: MIB, ..CreateParams::default() }
}

fn create(path: &Path, params: &CreateParams) -> Result<(), fvd_engine::Error> {
    Disk::create(path, params, true, &Options::default(), &mut |_| {})
}

fn with_base() -> Options {
    Options { allow_base: true, ..Options::default() }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i * 131) >> 5) as u8 ^ seed).collect()
}

fn all(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.info().unwrap().header.virtual_size as usize];
    disk.pread(&mut bytes, 0).unwrap();
    bytes
}

/// None, and a word about it, where the file system has no direct I/O.
fn open_or_skip(path: &Path, options: &Options) -> Option<Disk> {
    match Disk::open(path, options) {
        Ok(disk) => Some(disk),
        Err(error) if options.direct => {
            use std::io::Write;
            writeln!(std::io::stderr(), "SKIPPED: no direct I/O here: {error}").unwrap();
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
#[allow(clippy::explicit_write)] // The harness would keep a macro's text back.
fn an_image_over_a_raw_base_reads_writes_and_comes_back() {
    for (threads, direct) in [(false, false), (true, false), (false, true)] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.fvd"));
        // A base that ends within a block and within a sector.
        let mut model = pattern(3 * MIB as usize + 777, 1);
        std::fs::write(&base, &model).unwrap();
        model.resize(4 * MIB as usize, 0);
        create(&path, &params(Some(4 * MIB), "base.raw", "raw")).unwrap();
        let options = Options { threads, direct, ..with_base() };
        let Some(disk) = open_or_skip(&path, &options) else { continue };
        assert!(all(&disk) == model, "threads {threads}, direct {direct}: before any write");
        for (i, (offset, len)) in [(0, 512), (1000, 3), (70_000, 100_001), (3 * MIB as usize + 700, 9000), (4 * MIB as usize - 1, 1)].into_iter().enumerate() {
            let data = pattern(len, 100 + i as u8);
            model[offset..offset + len].copy_from_slice(&data);
            disk.pwrite(&data, offset as u64, i % 2 == 0).unwrap();
        }
        disk.write_zeroes(200_000, 50_000, true).unwrap();
        model[200_000..250_000].fill(0);
        assert!(all(&disk) == model, "threads {threads}, direct {direct}: after the writes");
        disk.flush().unwrap();
        // As a program that dies: the next open recovers.
        drop(disk);
        let disk = Disk::open(&path, &Options { read_only: true, ..options.clone() }).unwrap();
        assert!(all(&disk) == model, "read-only after a crash");
        drop(disk);
        let disk = Disk::open(&path, &options).unwrap();
        assert!(all(&disk) == model, "recovered");
        let report = disk.check(fvd_engine::Repair::None, &mut |_| {}).unwrap();
        assert_eq!((report.corruptions, report.findings), (0, Vec::new()));
        disk.close().unwrap();
        assert!(all(&Disk::open(&path, &options).unwrap()) == model, "closed and opened");
        assert!(std::fs::read(&base).unwrap() == pattern(3 * MIB as usize + 777, 1), "the base is never written");
    }
}

#[test]
fn a_chain_of_images() {
    for threads in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let options = Options { threads, ..with_base() };
        std::fs::create_dir(at("sub")).unwrap();
        let mut model = pattern(MIB as usize, 3);
        std::fs::write(at("sub/base.raw"), &model).unwrap();
        // Names are relative to the directory of the image that holds them.
        create(&at("sub/one.fvd"), &params(None, "base.raw", "raw")).unwrap();
        create(&at("two.fvd"), &params(Some(2 * MIB), "sub/one.fvd", "fvd")).unwrap();
        let one = Disk::open(&at("sub/one.fvd"), &options).unwrap();
        one.pwrite(&[7; 5000], 10_000, false).unwrap();
        model[10_000..15_000].fill(7);
        one.close().unwrap();
        model.resize(2 * MIB as usize, 0);
        let two = Disk::open(&at("two.fvd"), &options).unwrap();
        assert!(all(&two) == model);
        two.pwrite(&[8; 300], 14_900, false).unwrap();
        model[14_900..15_200].fill(8);
        two.pwrite(&[9; 10], MIB - 5, false).unwrap();
        model[MIB as usize - 5..MIB as usize + 5].fill(9);
        assert!(all(&two) == model);
        two.close().unwrap();
        create(&at("three.fvd"), &params(None, "two.fvd", "fvd")).unwrap();
        let three = Disk::open(&at("three.fvd"), &options).unwrap();
        assert!(all(&three) == model);
        // Reads that end past the end of the chain's lower images.
        let mut tail = [0xee; 4096];
        three.pread(&mut tail, MIB - 2048).unwrap();
        assert!(tail == model[MIB as usize - 2048..MIB as usize + 2048]);
        // While it is open, all below are read-locked.
        for name in ["sub/one.fvd", "two.fvd", "sub/base.raw"] {
            assert_eq!(Disk::open(&at(name), &Options::default()).err().map(|e| e.kind), Some(Kind::Host(libc::EAGAIN)), "{name}");
        }
    }
}

#[test]
fn a_second_thread_has_its_own_way_to_the_whole_chain() {
    use fvd_engine::host::{FileId, HostOp, OpKind, OwnBuf, STATUS_DATA, Segment};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = pattern(MIB as usize, 3);
    std::fs::write(at("base.raw"), &model).unwrap();
    create(&at("one.fvd"), &params(None, "base.raw", "raw")).unwrap();
    create(&at("two.fvd"), &params(None, "one.fvd", "fvd")).unwrap();
    let two = Disk::open(&at("two.fvd"), &with_base()).unwrap();
    let files = two.files().clone();
    let expect = model.clone();
    let other = std::thread::spawn(move || {
        let io = fvd_host::FileIo::new(files).unwrap();
        for step in 0..200u64 {
            // Every fourth near the end of the base, most of these past it.
            let offset = if step % 4 == 0 { MIB - 1 - step * 20 } else { step * 52_639 % MIB };
            let len = 1 + step as usize * 97 % 9000;
            let segments = vec![Segment::Own { buf: OwnBuf::from_slice(&vec![0xee; len]), at: 0, len }];
            io.submit(step + 1, HostOp { kind: OpKind::Read, file: FileId::Base, offset, len: len as u64, segments });
            io.submit(step + 1001, HostOp { kind: OpKind::BaseStatus, file: FileId::Base, offset, len: 1000, segments: Vec::new() });
            let mut left = 2;
            while left > 0 {
                for (token, ret, op) in io.process(None).unwrap() {
                    left -= 1;
                    if token > 1000 {
                        assert_eq!(ret, STATUS_DATA + (MIB - offset).min(1000) as i64);
                        continue;
                    }
                    assert_eq!(ret, 0);
                    let Segment::Own { buf, .. } = &op.segments[0] else { unreachable!() };
                    let inside = len.min((MIB - offset) as usize);
                    let got = buf.to_vec(0, len);
                    assert!(got[..inside] == expect[offset as usize..][..inside] && got[inside..].iter().all(|&b| b == 0));
                }
            }
        }
    });
    for _ in 0..20 {
        assert!(all(&two) == model);
    }
    other.join().unwrap();
}

#[test]
fn holes_of_a_chain_are_seen_at_creation() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base = std::fs::File::create(at("base.raw")).unwrap();
    base.set_len(8 * MIB).unwrap();
    base.write_all_at(&[1; 65536], MIB).unwrap();
    create(&at("one.fvd"), &params(None, "base.raw", "raw")).unwrap();
    let one = Disk::open(&at("one.fvd"), &with_base()).unwrap();
    one.pwrite(&[2; 4096], 4 * MIB, false).unwrap();
    one.close().unwrap();
    for (name, base, format) in [("raw.fvd", "base.raw", "raw"), ("two.fvd", "one.fvd", "fvd")] {
        create(&at(name), &CreateParams { detect_sparse_hole: 1, ..params(None, base, format) }).unwrap();
        let disk = Disk::open(&at(name), &with_base()).unwrap();
        let present = disk.check(fvd_engine::Repair::None, &mut |_| {}).unwrap().blocks_present;
        let data_blocks = if format == "raw" { 16 } else { 17 };
        assert_eq!(present, 8 * MIB / 4096 - data_blocks, "{name}: every block but those with data");
        let status = disk.status(MIB, MIB).unwrap();
        assert_eq!((status.place, status.len), (Place::Base, 65536));
        let mut bytes = vec![0; 8 * MIB as usize];
        disk.pread(&mut bytes, 0).unwrap();
        assert!(bytes[MIB as usize..][..65536].iter().all(|&b| b == 1));
        assert_eq!(bytes.iter().filter(|&&b| b == 2).count(), if format == "raw" { 0 } else { 4096 });
    }
}

#[test]
fn a_base_is_opened_only_when_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), vec![5; MIB as usize]).unwrap();
    create(&at("disk.fvd"), &params(None, "base.raw", "raw")).unwrap();
    let disk = Disk::open(&at("disk.fvd"), &Options::default()).unwrap();
    assert!(all(&disk).iter().all(|&b| b == 0), "without its base, what is in it reads as zero");
    drop(disk);
    std::fs::remove_file(at("base.raw")).unwrap();
    let missing = Disk::open(&at("disk.fvd"), &with_base()).err().unwrap();
    assert_eq!(missing.kind, Kind::Host(libc::ENOENT));
    assert!(missing.text.contains("base.raw") && missing.text.contains("disk.fvd"), "{missing}");
    assert!(Disk::open(&at("disk.fvd"), &Options::default()).is_ok());
    let (info, _) = Disk::inspect(&at("disk.fvd"), &Options::default()).unwrap();
    assert_eq!((info.header.base_name.as_str(), info.header.base_format.as_str()), ("base.raw", "raw"));
}

#[test]
fn circles_and_long_chains_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: String| dir.path().join(name);
    let unsafe_create = |name: String, base: String| {
        let params = params(Some(MIB), &base, "fvd");
        Disk::create(&at(name), &params, false, &Options::default(), &mut |_| {}).unwrap();
    };
    unsafe_create("a".into(), "b".into());
    unsafe_create("b".into(), "a".into());
    unsafe_create("self".into(), "./self".into());
    for name in ["a", "b", "self"] {
        for options in [with_base(), Options { read_only: true, ..with_base() }, Options { no_lock: true, read_only: true, ..with_base() }] {
            let error = Disk::open(&at(name.into()), &options).err().unwrap();
            assert!(error.kind == Kind::Invalid && error.text.contains("circle"), "{error}");
        }
    }
    // Overwriting an image by one that lies over it would lose both.
    assert!(create(&at("b".into()), &params(Some(MIB), "a", "fvd")).is_err());
    assert!(Disk::inspect(&at("b".into()), &Options::default()).is_ok(), "and it is still there");
    unsafe_create("c0".into(), "gone".into());
    for i in 1..70 {
        unsafe_create(format!("c{i}"), format!("c{}", i - 1));
    }
    // c0 names a base that is not there: opened without it, so that only the length counts.
    create(&at("c0".into()), &params(Some(MIB), "", "")).unwrap();
    assert!(Disk::open(&at("c63".into()), &with_base()).is_ok(), "64 images");
    let error = Disk::open(&at("c64".into()), &with_base()).err().unwrap();
    assert!(error.kind == Kind::Unsupported && error.text.contains("longer than 64"), "{error}");
    let error = Disk::open(&at("c5".into()), &Options { depth_max: 5, ..with_base() }).err().unwrap();
    assert!(error.text.contains("longer than 5"), "{error}");
    assert!(Disk::open(&at("c4".into()), &Options { depth_max: 5, ..with_base() }).is_ok());
}

#[test]
fn formats_are_believed_and_never_probed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create(&at("inner.fvd"), &params(Some(MIB), "", "")).unwrap();
    // Said to be raw: the guest sees the inner image's own bytes, as with any raw file.
    create(&at("outer.fvd"), &params(None, "inner.fvd", "raw")).unwrap();
    let outer = Disk::open(&at("outer.fvd"), &with_base()).unwrap();
    assert!(all(&outer)[..4] == *b"FVD\0");
    drop(outer);
    // Said to be fvd: a raw file is refused.
    std::fs::write(at("zero.raw"), vec![0; MIB as usize]).unwrap();
    let error = create(&at("x.fvd"), &params(None, "zero.raw", "fvd")).unwrap_err();
    assert!(error.text.contains("zero.raw"), "{error}");
    assert!(!at("x.fvd").exists(), "nothing is left of an image that could not be made");
    for (base, format) in [("zero.raw", "qcow2"), ("nbd://host/x", "raw"), ("json:{}", "raw")] {
        let error = create(&at("x.fvd"), &params(Some(MIB), base, format)).unwrap_err();
        assert_eq!(error.kind, Kind::Unsupported, "{error}");
    }
    // The name alone may be anything.
    Disk::create(&at("x.fvd"), &params(Some(MIB), "nbd://host/x", "raw"), false, &Options::default(), &mut |_| {}).unwrap();
}

#[test]
fn creation_refuses_what_is_wrong_and_spares_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.fvd");
    std::fs::write(&path, b"precious").unwrap();
    let bad = CreateParams { block_size: 5000, ..params(Some(MIB), "", "") };
    assert!(create(&path, &bad).unwrap_err().text.contains("5000"));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    create(&path, &params(Some(MIB), "", "")).unwrap();
    let open = Disk::open(&path, &Options::default()).unwrap();
    assert_eq!(create(&path, &params(Some(MIB), "", "")).unwrap_err().kind, Kind::Host(libc::EAGAIN), "an image in use");
    open.close().unwrap();
    create(&path, &params(Some(2 * MIB), "", "")).unwrap();
}

#[test]
fn images_and_files_may_be_shared_by_threads() {
    fn assert_shared<T: Send + Sync>() {}
    assert_shared::<fvd_host::Files>();
    assert_shared::<fvd_host::WakeHandle>();
}

#[test]
#[allow(clippy::explicit_write)] // The harness would keep a macro's text back.
fn a_data_file_is_opened_only_when_allowed_and_holds_the_disk() {
    for (threads, direct, compact) in [(false, false, false), (true, false, false), (false, true, false), (false, false, true)] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (path, data) = (dir.path().join("disk.fvd"), dir.path().join("disk.raw"));
        let made = CreateParams { data_name: "disk.raw".into(), data_format: "raw".into(), compact, ..params(Some(2 * MIB + 512), "", "") };
        create(&path, &made).unwrap();
        assert_eq!(std::fs::metadata(&data).unwrap().len(), if compact { 0 } else { 2 * MIB + 512 });
        let error = Disk::open(&path, &Options::default()).err().unwrap();
        assert!(error.text.contains("'disk.raw' is missing"), "{error}");
        let options = Options { allow_data: true, threads, direct, ..Options::default() };
        let Some(disk) = open_or_skip(&path, &options) else { continue };
        let mut model = vec![0; 2 * MIB as usize + 512];
        for (offset, len) in [(0, 512), (5000, 300_001), (2 * MIB as usize, 512)] {
            let bytes = pattern(len, 7);
            model[offset..offset + len].copy_from_slice(&bytes);
            disk.pwrite(&bytes, offset as u64, true).unwrap();
        }
        assert!(all(&disk) == model);
        // QEMU's locks are on both.
        let busy = Disk::open(&path, &Options { read_only: true, ..options.clone() }).err().unwrap();
        assert!(matches!(busy.kind, Kind::Host(libc::EAGAIN)), "{busy:?}");
        disk.close().unwrap();
        if !compact {
            let found = std::fs::read(&data).unwrap();
            assert!(found[..model.len()] == model && found.len() - model.len() < 4096);
        }
        // As a base of another image it is needed too.
        let over = dir.path().join("over.fvd");
        create(&over, &CreateParams { virtual_size: Some(2 * MIB), ..params(None, "disk.fvd", "fvd") }).err().unwrap();
        let both = Options { allow_base: true, allow_data: true, ..Options::default() };
        Disk::create(&over, &params(None, "disk.fvd", "fvd"), true, &both, &mut |_| {}).unwrap();
        assert!(all(&Disk::open(&over, &both).unwrap()) == model);
        // Gone: the metadata can be looked at, and nothing else.
        std::fs::remove_file(&data).unwrap();
        let error = Disk::open(&path, &options).err().unwrap();
        assert!(error.text.contains("disk.raw") && error.kind == Kind::Host(libc::ENOENT), "{error:?}");
        assert_eq!(Disk::inspect(&path, &options).unwrap().0.header.data_name, "disk.raw");
        let disk = Disk::open(&path, &Options { metadata_only: true, read_only: true, ..options }).unwrap();
        assert_eq!(disk.check(fvd_engine::Repair::None, &mut |_| {}).unwrap().corruptions, 1);
        assert!(disk.pread(&mut [0; 512], 0).is_err());
    }
}

#[test]
fn a_data_file_that_cannot_be_one_costs_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk.fvd");
    let with = |name: &str| CreateParams { data_name: name.into(), data_format: "raw".into(), ..params(Some(MIB), "", "") };
    for (name, text) in [("disk.fvd", "the image itself"), ("no/x.raw", "no/x.raw"), ("nbd:x.raw", "no plain path")] {
        let error = create(&path, &with(name)).unwrap_err();
        assert!(error.text.contains(text), "{error}");
        assert!(!path.exists());
    }
    // Parameters that the engine refuses leave neither file.
    let bad = CreateParams { block_size: 5000, ..with("disk.raw") };
    create(&path, &bad).unwrap_err();
    assert!(!path.exists() && !dir.path().join("disk.raw").exists());
    std::fs::write(dir.path().join("base.raw"), vec![1; MIB as usize]).unwrap();
    let error = create(&path, &CreateParams { data_name: "base.raw".into(), data_format: "raw".into(), ..params(None, "base.raw", "raw") }).unwrap_err();
    assert!(error.text.contains("chain of bases"), "{error}");
    assert_eq!(std::fs::read(dir.path().join("base.raw")).unwrap(), vec![1; MIB as usize]);
}
