// SPDX-License-Identifier: MIT OR Apache-2.0
//! `FileIo` against a plain byte model: io_uring and threads, buffered and direct, end of file, holes.

use fvd_engine::host::{FileId, HostOp, OpKind, OwnBuf, STATUS_DATA, Segment};
use fvd_host::{FileIo, IoVecBuf, Options};
use std::collections::HashMap;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

/// A small generator of our own: the same numbers for ever.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

#[allow(clippy::explicit_write)] // The harness would keep a macro's text back.
fn skipped(why: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {why}").unwrap();
}

fn open(path: &Path, threads: bool, direct: bool) -> FileIo {
    FileIo::open(path, &Options { threads, direct, ..Options::default() }).unwrap()
}

fn op(kind: OpKind, offset: u64, len: u64) -> HostOp<IoVecBuf> {
    HostOp { kind, file: FileId::Image, offset, len, segments: Vec::new() }
}

fn read(offset: u64, len: usize) -> HostOp<IoVecBuf> {
    // Dirty memory, so that bytes nobody filled are seen.
    let buf = OwnBuf::from_slice(&vec![0xee; len]);
    HostOp { segments: vec![Segment::Own { buf, at: 0, len }], ..op(OpKind::Read, offset, len as u64) }
}

fn write(offset: u64, data: &[u8], fua: bool) -> HostOp<IoVecBuf> {
    let segments = vec![Segment::Own { buf: OwnBuf::from_slice(data), at: 0, len: data.len() }];
    HostOp { segments, ..op(OpKind::Write { fua }, offset, data.len() as u64) }
}

fn bytes(op: &HostOp<IoVecBuf>) -> Vec<u8> {
    let mut all = Vec::new();
    for segment in &op.segments {
        match segment {
            Segment::Own { buf, at, len } => all.extend(buf.to_vec(*at, *len)),
            Segment::Guest { .. } => panic!("this test gave no guest memory"),
        }
    }
    all
}

/// Does one operation and returns its result and its bytes.
fn one(io: &FileIo, op: HostOp<IoVecBuf>) -> (i64, Vec<u8>) {
    io.submit(1, op);
    loop {
        if let Some((token, ret, op)) = io.process(None).unwrap().pop() {
            assert_eq!(token, 1);
            return (ret, bytes(&op));
        }
    }
}

/// Random operations, many at once but never two on the same slot of the file, against a model.
fn random_operations(io: &FileIo, path: &Path, seed: u64, align: u64) {
    const SLOT: u64 = 64 << 10;
    const SLOTS: u64 = 24;
    let mut rng = Rng(seed);
    let mut model = vec![0u8; (SLOT * SLOTS) as usize];
    let mut busy: HashMap<u64, (u64, Vec<u8>)> = HashMap::new();
    let mut token = 0;
    for length in [0, SLOT * SLOTS] {
        assert_eq!(one(io, op(OpKind::Truncate, length, 0)).0, 0);
    }
    for step in 0..3000 {
        let slot = rng.below(SLOTS);
        if !busy.values().any(|(taken, _)| *taken == slot) {
            let at = rng.below(SLOT / 2) / align * align;
            let len = (1 + rng.below(SLOT / 2) / align) * align;
            let len = len.min(SLOT - at);
            let offset = slot * SLOT + at;
            let range = offset as usize..(offset + len) as usize;
            token += 1;
            let (operation, expect) = match rng.below(8) {
                0..=2 => (read(offset, len as usize), model[range].to_vec()),
                3..=4 => {
                    let data: Vec<u8> = (0..len).map(|i| (rng.0.wrapping_add(i * 31) >> 3) as u8).collect();
                    model[range].copy_from_slice(&data);
                    rng.next();
                    (write(offset, &data, step % 5 == 0), Vec::new())
                }
                5 => {
                    model[range].fill(0);
                    (op(OpKind::WriteZeroes { may_unmap: step % 2 == 0 }, offset, len), Vec::new())
                }
                6 => {
                    // Contract: as before or zero. On the file systems tests run on: zero.
                    model[range].fill(0);
                    (op(OpKind::WriteZeroes { may_unmap: true }, offset, len), Vec::new())
                }
                _ => (op(OpKind::Flush, 0, 0), Vec::new()),
            };
            busy.insert(token, (slot, expect));
            io.submit(token, operation);
        }
        let full = busy.len() >= 12;
        for (token, ret, done) in io.process(Some(if full { Duration::from_secs(60) } else { Duration::ZERO })).unwrap() {
            let (_, expect) = busy.remove(&token).expect("completed once, and only what was started");
            assert_eq!(ret, 0, "{done:?}");
            if done.kind == OpKind::Read {
                assert!(bytes(&done) == expect, "step {step}: wrong data of {done:?}");
            }
        }
    }
    while !busy.is_empty() {
        for (token, ret, _) in io.process(None).unwrap() {
            assert_eq!(ret, 0);
            busy.remove(&token).unwrap();
        }
    }
    assert!(std::fs::read(path).unwrap() == model, "the file differs from the model");
}

#[test]
fn threads_do_what_a_plain_file_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"").unwrap();
    let io = open(&path, true, false);
    assert!(!io.uses_uring());
    random_operations(&io, &path, 1, 1);
}

#[test]
#[cfg(feature = "uring")]
fn uring_does_what_a_plain_file_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"").unwrap();
    let io = open(&path, false, false);
    if !io.uses_uring() {
        return skipped("this kernel or sandbox has no io_uring");
    }
    random_operations(&io, &path, 2, 1);
}

#[test]
fn direct_io_with_the_alignment_the_limits_tell() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"").unwrap();
    for threads in [false, true] {
        let io = match FileIo::open(&path, &Options { threads, direct: true, ..Options::default() }) {
            Ok(io) => io,
            Err(error) => {
                return skipped(&format!("no direct I/O here: {error}"));
            }
        };
        let limits = io.limits(FileId::Image);
        assert!(limits.request_alignment >= 512 && limits.request_alignment.is_power_of_two(), "{limits:?}");
        assert!(limits.write_granule >= 4096 && limits.memory_alignment.is_power_of_two(), "{limits:?}");
        random_operations(&io, &path, 3, u64::from(limits.request_alignment));
        // An end of file that no direct read can name.
        let align = limits.request_alignment as usize;
        drop(io);
        let odd = align + 100;
        std::fs::write(&path, vec![0x55; odd]).unwrap();
        let io = open(&path, threads, true);
        let (ret, data) = one(&io, read(0, 4 * align));
        assert_eq!(ret, 0);
        assert!(data[..odd].iter().all(|&b| b == 0x55) && data[odd..].iter().all(|&b| b == 0), "threads {threads}");
    }
}

#[test]
fn reads_past_the_end_are_zero_and_writes_extend() {
    let dir = tempfile::tempdir().unwrap();
    for threads in [false, true] {
        let path = dir.path().join(format!("f{threads}"));
        std::fs::write(&path, vec![7; 1000]).unwrap();
        let io = open(&path, threads, false);
        let (ret, data) = one(&io, read(900, 300));
        assert_eq!((ret, &data[..100], &data[100..]), (0, &[7; 100][..], &[0; 200][..]));
        assert_eq!(one(&io, read(1 << 40, 512)), (0, vec![0; 512]));
        assert_eq!(one(&io, op(OpKind::GetLength, 0, 0)).0, 1000);
        assert_eq!(one(&io, write(2000, b"abc", true)).0, 0);
        assert_eq!(one(&io, op(OpKind::GetLength, 0, 0)).0, 2003);
        assert_eq!(one(&io, op(OpKind::Truncate, 10, 0)).0, 0);
        assert_eq!(one(&io, op(OpKind::GetLength, 0, 0)).0, 10);
        // Beyond what a file can be: an error, not a wrapped offset.
        assert_eq!(one(&io, read(i64::MAX as u64 - 100, 512)).0, -i64::from(libc::EFBIG));
    }
}

#[test]
fn zeroing_keeps_or_extends_the_length_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    for may_unmap in [false, true] {
        let path = dir.path().join(format!("f{may_unmap}"));
        std::fs::write(&path, vec![7; 10_000]).unwrap();
        let io = open(&path, true, false);
        assert_eq!(one(&io, op(OpKind::WriteZeroes { may_unmap }, 100, 5000)).0, 0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 10_000);
        assert_eq!(one(&io, op(OpKind::WriteZeroes { may_unmap }, 9000, 100_000)).0, 0);
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len(), 109_000);
        assert!(data[..100].iter().all(|&b| b == 7) && data[100..5100].iter().all(|&b| b == 0));
        assert!(data[5100..9000].iter().all(|&b| b == 7) && data[9000..].iter().all(|&b| b == 0));
        // Wholly past the end.
        assert_eq!(one(&io, op(OpKind::WriteZeroes { may_unmap }, 200_000, 1000)).0, 0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 201_000);
    }
}

#[test]
fn discard_and_unmap_give_storage_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    for kind in [OpKind::Discard, OpKind::WriteZeroes { may_unmap: true }] {
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let io = open(&path, false, false);
        assert_eq!(one(&io, op(OpKind::Flush, 0, 0)).0, 0);
        let before = std::fs::metadata(&path).unwrap().blocks();
        assert_eq!(one(&io, op(kind, 1 << 20, 2 << 20)).0, 0);
        let after = std::fs::metadata(&path).unwrap();
        assert!(after.blocks() * 512 + (2 << 20) <= before * 512, "{kind:?}: {before} blocks, then {}", after.blocks());
        assert_eq!(after.len(), 4 << 20);
        assert_eq!(one(&io, read(1 << 20, 4096)), (0, vec![0; 4096]));
    }
}

#[test]
fn status_sees_holes_data_and_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(3 << 20).unwrap();
    file.write_all_at(&[1; 65536], 1 << 20).unwrap();
    let io = open(&path, false, false);
    let status = |offset, len| one(&io, op(OpKind::BaseStatus, offset, len)).0;
    let (hole, data) = (status(0, 1 << 30), status(1 << 20, 1 << 30));
    assert_eq!(hole, 1 << 20);
    assert_eq!(data, STATUS_DATA + 65536);
    assert_eq!(status((1 << 20) + 100, 1000), STATUS_DATA + 1000);
    assert_eq!(status(2 << 20, 1 << 30), 1 << 30, "a hole that reaches the end, and past it");
    assert_eq!(status(1 << 40, 77), 77);
}

#[test]
fn errors_arrive_as_results() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    for threads in [false, true] {
        let io = FileIo::open(&path, &Options { read_only: true, threads, ..Options::default() }).unwrap();
        assert_eq!(one(&io, write(0, b"x", false)).0, -i64::from(libc::EBADF));
        // Neither is there.
        for file in [FileId::Base, FileId::Data] {
            let mut op = read(0, 512);
            op.file = file;
            assert_eq!(one(&io, op).0, -i64::from(libc::ENOMEDIUM));
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 4096]);
    for wrong in ["/dev/null", "/", "/nonexistent/x"] {
        assert!(FileIo::open(Path::new(wrong), &Options::default()).is_err(), "{wrong}");
    }
}

#[test]
fn many_segments_in_one_operation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    for threads in [false, true] {
        std::fs::write(&path, b"").unwrap();
        let io = open(&path, threads, false);
        // More iovecs than the kernel takes at once.
        let mut memory: Vec<Vec<u8>> = (0..3000).map(|i| vec![i as u8; 1 + i % 7]).collect();
        let iov: Vec<libc::iovec> = memory.iter_mut().map(|m| libc::iovec { iov_base: m.as_mut_ptr().cast(), iov_len: m.len() }).collect();
        // SAFETY: `memory` and `iov` outlive the operations, which are waited for here.
        let buf = unsafe { IoVecBuf::new(iov.as_ptr(), iov.len()) }.unwrap();
        let total: usize = iov.iter().map(|v| v.iov_len).sum();
        let segments = || vec![Segment::Guest { buf, at: 0, len: total }];
        io.submit(5, HostOp { segments: segments(), ..op(OpKind::Write { fua: false }, 3, total as u64) });
        while io.process(None).unwrap().is_empty() {}
        let expect: Vec<u8> = (0..3000).flat_map(|i| vec![i as u8; 1 + i % 7]).collect();
        assert!(std::fs::read(&path).unwrap()[3..] == expect);
        for m in &mut memory {
            m.fill(0);
        }
        io.submit(6, HostOp { segments: segments(), ..op(OpKind::Read, 3, total as u64) });
        while io.process(None).unwrap().is_empty() {}
        assert!(memory.concat() == expect);
    }
}

#[test]
fn the_event_fd_tells_of_completions_wakes_and_timers() {
    use fvd_engine::host::Wake;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"").unwrap();
    for threads in [false, true] {
        let io = open(&path, threads, false);
        let readable = |wait_ms: i32| {
            let mut poll = libc::pollfd { fd: io.event_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&mut poll, 1, wait_ms) == 1 }
        };
        let _ = io.process(Some(Duration::ZERO)).unwrap();
        assert!(!readable(0), "nothing has happened yet");
        io.submit(1, op(OpKind::GetLength, 0, 0));
        assert!(readable(0), "an operation that completes at once");
        assert_eq!(io.process(Some(Duration::ZERO)).unwrap().len(), 1);
        io.submit(2, write(0, b"x", true));
        assert!(readable(10_000));
        while io.process(None).unwrap().is_empty() {}
        let handle = io.wake_handle();
        assert!(!io.take_wake());
        std::thread::spawn(move || handle.wake()).join().unwrap();
        assert!(readable(0));
        assert!(io.process(None).unwrap().is_empty());
        assert!(io.take_wake() && !io.take_wake());
        assert!(!readable(0));
        io.set_timer(fvd_host::now_ns() + 20_000_000);
        assert!(!io.take_timer());
        assert!(readable(10_000), "the timer");
        assert!(io.process(None).unwrap().is_empty());
        assert!(io.take_timer() && !io.take_timer());
        io.set_timer(fvd_host::now_ns() + 20_000_000);
        io.set_timer(u64::MAX);
        assert!(io.process(Some(Duration::from_millis(60))).unwrap().is_empty());
        assert!(!io.take_timer(), "a cancelled timer");
    }
}

#[test]
fn two_threads_share_opened_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"").unwrap();
    let io = open(&path, false, false);
    assert_eq!(one(&io, write(0, &[1; 4096], false)).0, 0);
    let files = io.files().clone();
    std::thread::spawn(move || {
        let other = FileIo::new(files).unwrap();
        assert_eq!(one(&other, read(0, 4096)), (0, vec![1; 4096]));
        assert_eq!(one(&other, write(4096, &[2; 4096], false)).0, 0);
    })
    .join()
    .unwrap();
    assert_eq!(one(&io, read(4096, 4096)), (0, vec![2; 4096]));
}

#[test]
fn dropping_waits_for_what_is_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    for threads in [false, true] {
        std::fs::write(&path, b"").unwrap();
        let io = open(&path, threads, false);
        for i in 0..64 {
            io.submit(i + 1, write(i * 65536, &vec![i as u8 + 1; 65536], false));
        }
        drop(io);
        let data = std::fs::read(&path).unwrap();
        assert!(data.len() == 64 * 65536 && data.chunks(65536).enumerate().all(|(i, c)| c.iter().all(|&b| b == i as u8 + 1)));
    }
}
