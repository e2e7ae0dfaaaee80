// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block devices with sectors of 4,096 bytes: needs root and loop devices, and says so without.

use fvd_engine::host::{FileId, HostOp, OpKind, OwnBuf, Segment};
use fvd_engine::{CreateParams, Kind};
use fvd_host::convert::{Source, Target, convert};
use fvd_host::{FileIo, IoVecBuf, Options, disk::Disk};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// A loop device that goes when this does.
struct Loop {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    #[allow(clippy::explicit_write)] // The harness would keep a macro's text back.
    fn new() -> Option<Self> {
        use std::io::Write;
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = dir.path().join("backing");
        // Not zero: whoever takes fresh space for zero is found out.
        std::fs::write(&file, vec![0x5a; SIZE as usize]).unwrap();
        let made = Command::new("losetup").args(["--sector-size", "4096", "--find", "--show"]).arg(&file).output();
        match made {
            Ok(out) if out.status.success() => {
                let path = PathBuf::from(String::from_utf8(out.stdout).unwrap().trim());
                Some(Self { path, _dir: dir })
            }
            other => {
                writeln!(std::io::stderr(), "SKIPPED: no loop device can be made here: {other:?}").unwrap();
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let gone = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(gone.is_ok_and(|status| status.success()), "{} stays behind", self.path.display());
    }
}

fn one(io: &FileIo, op: HostOp<IoVecBuf>) -> (i64, Vec<u8>) {
    io.submit(1, op);
    loop {
        if let Some((_, ret, op)) = io.process(None).unwrap().pop() {
            let mut bytes = Vec::new();
            for segment in &op.segments {
                if let Segment::Own { buf, at, len } = segment {
                    bytes.extend(buf.to_vec(*at, *len));
                }
            }
            return (ret, bytes);
        }
    }
}

fn op(kind: OpKind, offset: u64, len: u64) -> HostOp<IoVecBuf> {
    HostOp { kind, file: FileId::Image, offset, len, segments: Vec::new() }
}

fn read(io: &FileIo, offset: u64, len: usize) -> Vec<u8> {
    let segments = vec![Segment::Own { buf: OwnBuf::zeroed(len), at: 0, len }];
    let (ret, bytes) = one(io, HostOp { segments, ..op(OpKind::Read, offset, len as u64) });
    assert_eq!(ret, 0);
    bytes
}

fn operations(path: &Path, direct: bool) {
    let io = FileIo::open(path, &Options { direct, ..Options::default() }).unwrap();
    let limits = io.limits(FileId::Image);
    assert_eq!(limits.request_alignment, if direct { 4096 } else { 1 });
    assert!(!limits.grows_zeroed && limits.write_granule >= 4096, "{limits:?}");
    assert_eq!(one(&io, op(OpKind::GetLength, 0, 0)).0, SIZE as i64);
    assert_eq!(one(&io, op(OpKind::Truncate, SIZE - 1, 0)).0, 0);
    assert_eq!(one(&io, op(OpKind::Truncate, SIZE + 4096, 0)).0, -i64::from(libc::ENOSPC));
    let fresh = |from: u64| {
        let segments = vec![Segment::Own { buf: OwnBuf::from_slice(&[0x5a; 65536]), at: 0, len: 65536 }];
        assert_eq!(one(&io, HostOp { segments, ..op(OpKind::Write { fua: true }, from, 65536) }).0, 0);
    };
    for may_unmap in [false, true] {
        fresh(MIB);
        // Where the host may take any alignment, zeroing does too.
        let (skip, len) = if direct { (4096, 8192) } else { (1000, 20_000) };
        assert_eq!(one(&io, op(OpKind::WriteZeroes { may_unmap }, MIB + skip, len)).0, 0);
        let bytes = read(&io, MIB, 65536);
        let (skip, end) = (skip as usize, (skip + len) as usize);
        assert!(bytes[..skip].iter().chain(&bytes[end..]).all(|&b| b == 0x5a), "direct {direct}: only the range");
        assert!(bytes[skip..end].iter().all(|&b| b == 0), "direct {direct}: all of the range");
    }
    fresh(MIB);
    assert_eq!(one(&io, op(OpKind::Discard, MIB, 65536)).0, 0);
    let bytes = read(&io, MIB, 65536);
    assert!(bytes.chunks(4096).all(|c| c.iter().all(|&b| b == 0) || c.iter().all(|&b| b == 0x5a)), "as before, or zero");
    assert_eq!(one(&io, op(OpKind::Flush, 0, 0)).0, 0);
    // The end of the device reads as zero beyond.
    let bytes = read(&io, SIZE - 4096, 8192);
    assert!(bytes[..4096].iter().all(|&b| b == 0x5a) && bytes[4096..].iter().all(|&b| b == 0));
}

fn image(device: &Path, direct: bool, threads: bool) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = dir.path().join("base.raw");
    let mut model: Vec<u8> = (0..4 * MIB).map(|i| (i >> 7) as u8).collect();
    std::fs::write(&base, &model).unwrap();
    let params = CreateParams {
        virtual_size: Some(4 * MIB),
        journal_size: MIB,
        base_name: base.to_str().unwrap().into(),
        base_format: "raw".into(),
        ..CreateParams::default()
    };
    let options = Options { direct, threads, allow_base: true, ..Options::default() };
    Disk::create(device, &params, true, &options, &mut |_| {}).unwrap();
    let disk = Disk::open(device, &options).unwrap();
    assert_eq!(Disk::open(device, &options).err().map(|e| e.kind), Some(Kind::Host(libc::EAGAIN)), "devices are locked too");
    // The kernel refuses every direct request that is not a multiple of 4096: none is made.
    for (i, (offset, len)) in [(0, 512), (5000, 100), (65_535, 70_001), (4 * MIB as usize - 513, 513)].into_iter().enumerate() {
        let data = vec![i as u8 + 1; len];
        disk.pwrite(&data, offset as u64, i % 2 == 0).unwrap();
        model[offset..offset + len].copy_from_slice(&data);
    }
    disk.write_zeroes(1_000_000, 77_777, true).unwrap();
    model[1_000_000..1_077_777].fill(0);
    disk.close().unwrap();
    let disk = Disk::open(device, &options).unwrap();
    let mut bytes = vec![0xee; model.len()];
    disk.pread(&mut bytes, 0).unwrap();
    assert!(bytes == model, "direct {direct}, threads {threads}");
    assert_eq!(disk.check(fvd_engine::Repair::None, &mut |_| {}).unwrap().corruptions, 0);
    let large = CreateParams { virtual_size: Some(SIZE), base_name: String::new(), base_format: String::new(), ..params };
    drop(disk);
    assert_eq!(Disk::create(device, &large, false, &options, &mut |_| {}).unwrap_err().kind, Kind::NoSpace);
    assert!(device.exists(), "a device is not removed");
}

/// Copies a disk that ends within a sector of the device onto it, and back.
fn copies(device: &Path, direct: bool) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (from, back) = (dir.path().join("from.raw"), dir.path().join("back.raw"));
    let size = 6 * MIB - 512;
    let mut model = vec![0; size as usize];
    for (at, len) in [(4096, 4096), (2 * MIB + 512, 100_000), (size - 512, 512)] {
        model[at as usize..][..len].fill(0x77);
    }
    std::fs::write(&from, &model).unwrap();
    let end = |path: &Path, params: &Option<CreateParams>| {
        let options = Options { direct, ..Options::default() };
        let source = Source { path: path.into(), raw: params.is_none(), options: options.clone() };
        (source, Target { path: path.into(), params: params.clone(), options, sparse: 4096 })
    };
    let flat = CreateParams { journal_size: MIB, ..CreateParams::default() };
    let compact = CreateParams { compact: true, chunk_size: 65536, storage_grow_unit: MIB, ..flat.clone() };
    let (file, copy) = (end(&from, &None).0, end(&back, &None).1);
    for params in [None, Some(flat), Some(compact)] {
        // What is not written is old content.
        std::fs::OpenOptions::new().write(true).open(device).unwrap().write_all_at(&vec![0x5a; SIZE as usize], 0).unwrap();
        let (source, target) = end(device, &params);
        let made = convert(&file, &target, &mut |_| true).unwrap();
        assert_eq!(made.size, size);
        assert!(made.written < MIB, "{made:?}");
        if params.is_none() {
            let bytes = std::fs::read(device).unwrap();
            assert!(bytes[..size as usize] == model, "direct {direct}: raw");
            assert!(bytes[size.next_multiple_of(4096) as usize..].iter().all(|&b| b == 0x5a), "nothing behind the disk's last sector");
            continue;
        }
        convert(&source, &copy, &mut |_| true).unwrap();
        assert!(std::fs::read(&back).unwrap() == model, "direct {direct}: {params:?}");
    }
    // The device as a raw source is all of it.
    convert(&end(device, &None).0, &copy, &mut |_| true).unwrap();
    assert!(std::fs::read(&back).unwrap() == std::fs::read(device).unwrap());
    let before = std::fs::read(device).unwrap();
    std::fs::File::create(&from).unwrap().set_len(SIZE + 512).unwrap();
    let error = convert(&file, &end(device, &None).1, &mut |_| true).unwrap_err();
    assert!(error.kind == Kind::NoSpace && error.text.contains(&(SIZE + 512).to_string()), "{error}");
    assert!(std::fs::read(device).unwrap() == before, "refused before anything was written");
}

#[test]
fn a_device_with_large_sectors() {
    let Some(device) = Loop::new() else { return };
    for direct in [false, true] {
        operations(&device.path, direct);
        copies(&device.path, direct);
    }
    for (direct, threads) in [(false, false), (true, false), (true, true)] {
        image(&device.path, direct, threads);
    }
}
