// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd convert`: what it writes, what it leaves out, and what it leaves behind when it fails.

use fvd_host::{Options, disk::Disk};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

mod common;
use common::Dir;

const MIB: u64 = 1 << 20;

/// Bytes that are nowhere zero, the same for the same seed.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8 | 1
    };
    (0..len).map(|_| next()).collect()
}

fn put(path: &Path, at: u64, data: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(data, at).unwrap();
}

fn stored(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

impl Dir {
    /// A raw disk of 24 MiB less 512 bytes: data from 1 to 3 MiB with 64 KiB of zeroes in it, something at
    /// odd places, an odd end, holes elsewhere.
    fn raw(&self, name: &str) -> Vec<u8> {
        let path = self.at(name);
        let file = File::create(&path).unwrap();
        file.set_len(24 * MIB - 512).unwrap();
        let mut data = noise(2 * MIB, 1);
        data[MIB as usize..MIB as usize + 65536].fill(0);
        put(&path, MIB, &data);
        put(&path, 10 * MIB + 1000, &noise(3000, 2));
        put(&path, 24 * MIB - 512 - 700, &noise(700, 3));
        std::fs::read(path).unwrap()
    }

    /// What the disk in an FVD image reads as.
    fn content(&self, name: &str) -> Vec<u8> {
        let options = Options { read_only: true, allow_base: true, ..Options::default() };
        let disk = Disk::open(&self.at(name), &options).unwrap();
        let mut bytes = vec![0xee; disk.info().unwrap().header.virtual_size as usize];
        disk.pread(&mut bytes, 0).unwrap();
        bytes
    }

    fn sound(&self, name: &str) {
        let text = self.good(&["check", name]);
        assert!(text.contains("No errors"), "{text}");
        assert_eq!(self.json(&["info", "--output=json", name])["dirty-flag"], false);
    }

    /// Start and length of every run that is at `place`.
    fn runs(&self, name: &str, place: &str) -> Vec<(u64, u64)> {
        let map = self.json(&["map", "--output=json", name]);
        let number = |run: &Value, key: &str| run[key].as_u64().unwrap();
        map.as_array().unwrap().iter().filter(|run| run["place"] == place).map(|run| (number(run, "start"), number(run, "length"))).collect()
    }
}

#[test]
fn there_and_back() {
    let dir = Dir::new();
    let raw = dir.raw("a.raw");
    let layouts: [&[&str]; 5] = [
        &[],
        &["--compact"],
        &["--compact", "--chunk-size", "64K", "--storage-grow-unit", "256K", "--journal-size", "1M"],
        &["--preallocation", "full"],
        &["-S", "512"],
    ];
    for layout in layouts {
        let out = dir.good(&[&["convert", "-f", "raw", "-O", "fvd"], layout, &["a.raw", "a.fvd"]].concat());
        assert!(out.contains("'a.raw' to 'a.fvd': 24 MiB, 1.9"), "{out}");
        assert!(dir.content("a.fvd") == raw, "{layout:?}");
        dir.sound("a.fvd");
        for (back, options) in [("b.raw", &["-O", "raw"][..]), ("c.raw", &["-f", "fvd", "-O", "raw", "-S", "64K"])] {
            dir.good(&[&["convert", "-q"], options, &["a.fvd", back]].concat());
            assert!(std::fs::read(dir.at(back)).unwrap() == raw, "{layout:?} {options:?}");
            assert!(stored(&dir.at(back)) < 3 * MIB, "holes are holes again");
        }
    }
    dir.good(&["convert", "-q", "-O", "fvd", "--compact", "a.fvd", "d.fvd"]);
    assert!(dir.content("d.fvd") == raw);
    let info = dir.json(&["info", "--output=json", "d.fvd"]);
    assert_eq!(info["format-specific"]["data"]["chunk-size"], MIB);
}

#[test]
fn what_is_zero_is_left_out() {
    let dir = Dir::new();
    dir.raw("a.raw");
    let compact = |sparse: &str, name: &str| {
        dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "--compact", "--chunk-size", "64K", "-S", sparse, "a.raw", name]);
        dir.runs(name, "data")
    };
    let data = [(MIB, MIB), (2 * MIB + 65536, MIB - 65536), (10 * MIB, 65536), (24 * MIB - 65536, 65536 - 512)];
    assert_eq!(compact("4K", "a.fvd"), data);
    // Zeroes that fill no whole unit are data.
    assert_eq!(compact("128K", "b.fvd")[0], (MIB, 2 * MIB));
    // What the source does not store, too.
    assert_eq!(compact("0", "c.fvd"), [(0, 24 * MIB - 512)]);
    // In the order of the disk: neighbours are neighbours in the file.
    let text = dir.good(&["check", "c.fvd"]);
    assert!(text.contains("384/384 chunks = 100.00% allocated, 0.00% fragmented"), "{text}");
    let text = dir.good(&["check", "a.fvd"]);
    assert!(text.contains("33/384 chunks = 8.59% allocated, 0.00% fragmented"), "{text}");
    dir.good(&["convert", "-q", "-O", "raw", "-S", "0", "a.fvd", "full.raw"]);
    assert!(stored(&dir.at("full.raw")) >= 24 * MIB - 512);
    // A flat disk that was never written where its file has holes: they are seen through a chain as well.
    dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "a.raw", "flat.fvd"]);
    dir.good(&["create", "-q", "-b", "flat.fvd", "-F", "fvd", "top.fvd"]);
    let out = dir.good(&["convert", "-O", "fvd", "-S", "1M", "top.fvd", "d.fvd"]);
    assert!(out.contains("24 MiB, 1.94 MiB"), "holes are not read: {out}");
}

#[test]
fn what_was_there_is_replaced() {
    let dir = Dir::new();
    let raw = dir.raw("a.raw");
    std::fs::write(dir.at("b.raw"), vec![0xff; 30 * MIB as usize]).unwrap();
    dir.good(&["convert", "-q", "-f", "raw", "-O", "raw", "a.raw", "b.raw"]);
    assert!(std::fs::read(dir.at("b.raw")).unwrap() == raw);
    std::fs::write(dir.at("b.fvd"), vec![0xff; 50 * MIB as usize]).unwrap();
    dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "a.raw", "b.fvd"]);
    assert!(dir.content("b.fvd") == raw);
    // An empty disk, and one whose file ends within a sector.
    std::fs::write(dir.at("empty.raw"), []).unwrap();
    std::fs::write(dir.at("odd.raw"), [7; 1000]).unwrap();
    for (from, size) in [("empty.raw", 0), ("odd.raw", 1024)] {
        dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", from, "c.fvd"]);
        assert_eq!(dir.json(&["info", "--output=json", "c.fvd"])["virtual-size"], size);
        dir.good(&["convert", "-q", "-O", "raw", "c.fvd", "c.raw"]);
        let mut wanted = std::fs::read(dir.at(from)).unwrap();
        wanted.resize(size, 0);
        assert!(std::fs::read(dir.at("c.raw")).unwrap() == wanted);
    }
}

/// Over `base.raw`: a disk that has blocks of its own, in one that has some as well.
fn chain(dir: &Dir) -> Vec<u8> {
    dir.raw("base.raw");
    dir.good(&["create", "-q", "-b", "base.raw", "-F", "raw", "--journal-size", "1M", "mid.fvd", "26M"]);
    let options = Options { allow_base: true, ..Options::default() };
    let disk = Disk::open(&dir.at("mid.fvd"), &options).unwrap();
    disk.pwrite(&noise(8192, 10), 2 * MIB, false).unwrap();
    disk.pwrite(&noise(8192, 11), 25 * MIB, false).unwrap();
    disk.close().unwrap();
    dir.good(&["create", "-q", "-b", "mid.fvd", "-F", "fvd", "--journal-size", "1M", "top.fvd"]);
    let disk = Disk::open(&dir.at("top.fvd"), &options).unwrap();
    disk.pwrite(&noise(4096, 12), 5 * MIB, false).unwrap();
    // As the base has it: nothing that a copy over the base needs.
    disk.pwrite(&std::fs::read(dir.at("base.raw")).unwrap()[MIB as usize..][..65536], MIB, false).unwrap();
    // Zeroes over data of the base, and over nothing.
    disk.write_zeroes(MIB + 131_072, 65536, true).unwrap();
    disk.write_zeroes(20 * MIB, MIB, true).unwrap();
    disk.close().unwrap();
    dir.content("top.fvd")
}

#[test]
fn a_chain_becomes_one_image() {
    let dir = Dir::new();
    let content = chain(&dir);
    dir.good(&["convert", "-q", "-O", "raw", "top.fvd", "flat.raw"]);
    assert!(std::fs::read(dir.at("flat.raw")).unwrap() == content);
    dir.good(&["convert", "-q", "-O", "fvd", "--compact", "top.fvd", "flat.fvd"]);
    assert!(dir.content("flat.fvd") == content);
    assert_eq!(dir.json(&["info", "--output=json", "flat.fvd"]).get("backing-filename"), None);
    dir.bad(&["convert", "-O", "raw", "top.fvd", "base.raw"], &["'base.raw'", "source"]);
    std::fs::remove_file(dir.at("base.raw")).unwrap();
    assert!(dir.content("flat.fvd") == content);
    dir.bad(&["convert", "-O", "raw", "top.fvd", "x.raw"], &["'base.raw'", "No such file"]);
    dir.good(&["create", "-q", "-u", "-b", "x.qcow2", "-F", "qcow2", "q.fvd", "1M"]);
    std::fs::write(dir.at("x.qcow2"), [0; 512]).unwrap();
    dir.bad(&["convert", "-O", "raw", "q.fvd", "x.raw"], &["x.qcow2", "qcow2", "not supported"]);
    assert!(!dir.at("x.raw").exists());
}

#[test]
fn a_base_of_the_target_keeps_what_it_has() {
    let dir = Dir::new();
    let content = chain(&dir);
    // Without holes: zeroes that only reading finds.
    std::fs::write(dir.at("copy.raw"), std::fs::read(dir.at("base.raw")).unwrap()).unwrap();
    let over = |from: &str, base: &str, format: &str, more: &[&str]| {
        dir.good(&[&["convert", "-q", "-O", "fvd", "-b", base, "-F", format], more, &[from, "new.fvd"]].concat());
        assert!(dir.content("new.fvd") == content, "{from} over {base}");
        dir.sound("new.fvd");
        assert_eq!(dir.json(&["info", "--output=json", "new.fvd"])["backing-filename"], base);
        let mut present: Vec<_> = dir.runs("new.fvd", "data").into_iter().chain(dir.runs("new.fvd", "zero")).filter(|run| run.0 < 24 * MIB - 512).collect();
        present.sort_unstable();
        present
    };
    let differs = [(MIB + 131_072, 65536), (2 * MIB, 8192), (5 * MIB, 4096)];
    // The base of all, one with its content, and with blocks of another size.
    assert_eq!(over("top.fvd", "base.raw", "raw", &[]), differs);
    assert_eq!(over("top.fvd", "copy.raw", "raw", &[]), differs);
    assert_eq!(over("top.fvd", "base.raw", "raw", &["--compact"]), differs);
    assert_eq!(over("top.fvd", "base.raw", "raw", &["--block-size", "64K"]), [(MIB + 131_072, 65536), (2 * MIB, 65536), (5 * MIB, 65536)]);
    // The very base of the source: what both leave to it is not even looked at. A block that the source
    // has though it is the same is found.
    assert_eq!(over("top.fvd", "mid.fvd", "fvd", &[]), [(MIB + 131_072, 65536), (5 * MIB, 4096)]);
    // A raw source over a base.
    std::fs::write(dir.at("whole.raw"), &content).unwrap();
    assert_eq!(over("whole.raw", "base.raw", "raw", &["-f", "raw"]), differs);
    // A base that has nothing to do with it costs space, no content; nor does a shorter one, or a longer.
    for len in [24 * MIB, MIB + 700, 40 * MIB] {
        std::fs::write(dir.at("other.raw"), noise(len, 77)).unwrap();
        over("top.fvd", "other.raw", "raw", &[]);
        over("top.fvd", "other.raw", "raw", &["--compact", "-S", "0"]);
    }
    dir.bad(&["convert", "-O", "fvd", "-b", "gone.raw", "-F", "raw", "top.fvd", "x.fvd"], &["'gone.raw'"]);
    dir.bad(&["convert", "-O", "fvd", "-b", "base.raw", "top.fvd", "x.fvd"], &["--backing-format"]);
    assert!(!dir.at("x.fvd").exists());
}

#[test]
fn direct_io() {
    let dir = Dir(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let raw = dir.raw("a.raw");
    let ran = dir.fvd(&["convert", "--direct", "-f", "raw", "-O", "fvd", "-S", "512", "a.raw", "a.fvd"]);
    assert!(ran.status == 0 || ran.err.contains("direct I/O") || ran.err.contains("Invalid argument"), "{}", ran.err);
    if ran.status != 0 {
        eprintln!("SKIPPED: no direct I/O here: {}", ran.err);
        return;
    }
    assert!(dir.content("a.fvd") == raw);
    for format in ["raw", "fvd"] {
        dir.good(&["convert", "-q", "--direct", "-O", format, "-S", "512", "a.fvd", "b"]);
        let got = if format == "raw" { std::fs::read(dir.at("b")).unwrap() } else { dir.content("b") };
        assert!(got == raw, "to {format}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let dir = Dir::new();
    dir.raw("a.raw");
    dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "a.raw", "a.fvd"]);
    dir.bad(&["convert", "-O", "fvd", "a.raw", "x"], &["'a.raw'", "not an FVD image", "-f raw"]);
    dir.bad(&["convert", "-f", "fvd", "-O", "fvd", "a.raw", "x"], &["'a.raw'", "not an FVD image"]);
    dir.bad(&["convert", "a.fvd", "x"], &["--target-format"]);
    dir.bad(&["convert", "-f", "qcow2", "-O", "fvd", "a.fvd", "x"], &["qcow2", "raw", "fvd"]);
    dir.bad(&["convert", "-O", "raw", "--compact", "a.fvd", "x"], &["'x'", "--compact", "raw"]);
    dir.bad(&["convert", "-O", "raw", "--preallocation", "off", "a.fvd", "x"], &["--preallocation"]);
    dir.bad(&["convert", "-O", "raw", "gone.fvd", "x"], &["'gone.fvd'", "No such file"]);
    dir.bad(&["convert", "-O", "raw", "a.fvd", "nodir/x"], &["'nodir/x'", "No such file"]);
    dir.bad(&["convert", "-O", "fvd", "--block-size", "5000", "-b", "a.raw", "-F", "raw", "a.fvd", "x"], &["'x'", "block_size", "5000"]);
    for sparse in ["3000", "2M", "256"] {
        dir.bad(&["convert", "-O", "raw", "-S", sparse, "a.fvd", "x"], &["sparse", "512"]);
    }
    dir.bad(&["convert", "-O", "raw", "a.fvd", "a.fvd"], &["'a.fvd'", "source"]);
    dir.bad(&["convert", "-U", "-O", "raw", "a.fvd", "./a.fvd"], &["'./a.fvd'", "source"]);
    std::os::unix::fs::symlink("a.fvd", dir.at("link")).unwrap();
    dir.bad(&["convert", "-U", "-O", "raw", "a.fvd", "link"], &["'link'", "source"]);
    assert!(!dir.at("x").exists(), "nothing is left behind");
    dir.sound("a.fvd");
}

#[test]
fn images_in_use() {
    let dir = Dir::new();
    let raw = dir.raw("a.raw");
    dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "a.raw", "a.fvd"]);
    dir.good(&["convert", "-q", "-O", "fvd", "a.fvd", "b.fvd"]);
    let open = Disk::open(&dir.at("a.fvd"), &Options::default()).unwrap();
    for to in ["raw", "fvd"] {
        dir.bad(&["convert", "-O", to, "b.fvd", "a.fvd"], &["'a.fvd'", "in use"]);
        dir.bad(&["convert", "-O", to, "a.fvd", "x"], &["'a.fvd'", "in use"]);
        // -U is about the source only.
        dir.bad(&["convert", "-U", "-O", to, "b.fvd", "a.fvd"], &["'a.fvd'", "in use"]);
    }
    assert!(!dir.at("x").exists());
    dir.good(&["convert", "-q", "-U", "-O", "raw", "a.fvd", "x"]);
    assert!(std::fs::read(dir.at("x")).unwrap() == raw);
    open.close().unwrap();
    dir.sound("a.fvd");
    // Who only reads the source is in nobody's way.
    let open = Disk::open(&dir.at("a.fvd"), &Options { read_only: true, ..Options::default() }).unwrap();
    dir.good(&["convert", "-q", "-O", "raw", "a.fvd", "x"]);
    drop(open);
}

#[test]
fn a_failure_leaves_nothing_that_passes_for_an_image() {
    let dir = Dir::new();
    let raw = dir.raw("a.raw");
    dir.good(&["convert", "-q", "-f", "raw", "-O", "fvd", "--compact", "--chunk-size", "64K", "--journal-size", "1M", "a.raw", "a.fvd"]);
    dir.good(&["convert", "-q", "-O", "fvd", "a.fvd", "was.fvd"]);
    std::fs::copy(dir.at("a.fvd"), dir.at("bad.fvd")).unwrap();
    // The only page of the table: read when the first chunk is looked for.
    let dump = dir.good(&["dump", "--header", "a.fvd"]);
    let line = dump.lines().find(|line| line.contains("region Table")).unwrap();
    let offset: u64 = line.split("offset ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    put(&dir.at("bad.fvd"), offset + 100, &[0x55; 8]);
    for to in ["raw", "fvd"] {
        dir.bad(&["convert", "-O", to, "bad.fvd", "x"], &["'bad.fvd'", "at byte 0", "damaged"]);
        assert!(!dir.at("x").exists());
        dir.bad(&["convert", "-O", to, "bad.fvd", "was.fvd"], &["'bad.fvd'", "'was.fvd'", "incomplete"]);
        dir.bad(&["info", "was.fvd"], &["not an FVD image"]);
    }
    // No room for all of it.
    let limited = |kib: u64, to: &str, target: &str| {
        let tool = env!("CARGO_BIN_EXE_fvd");
        let command = format!("trap '' XFSZ; ulimit -f {kib}; exec '{tool}' convert -O {to} --compact --journal-size 1M --chunk-size 64K --storage-grow-unit 64K a.fvd {target}");
        let out = Command::new("bash").args(["-c", &command]).current_dir(dir.0.path()).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        String::from_utf8(out.stderr).unwrap()
    };
    let error = limited(3 * 1024, "fvd", "x");
    assert!(error.contains("writing 'x' at byte ") && error.contains("too large"), "{error}");
    assert!(!dir.at("x").exists());
    std::fs::write(dir.at("y"), "something").unwrap();
    let error = limited(3 * 1024, "fvd", "y");
    assert!(error.contains("'y'") && error.contains("incomplete"), "{error}");
    dir.bad(&["info", "y"], &["not an FVD image"]);
    assert!(dir.content("a.fvd") == raw, "the source is as it was");
    dir.sound("a.fvd");
}

#[test]
fn a_signal_ends_it_in_order() {
    let dir = Dir::new();
    // Without -S 0 this were done in no time; with it, it never is.
    File::create(dir.at("huge.raw")).unwrap().set_len(1 << 40).unwrap();
    let start = |to: &str, target: &str| {
        let child = Command::new(env!("CARGO_BIN_EXE_fvd"))
            .args(["convert", "-q", "-p", "-f", "raw", "-O", to, "-S", "0", "huge.raw", target])
            .current_dir(dir.0.path())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        // Something of the disk is there.
        while !dir.at(target).exists() || stored(&dir.at(target)) < 64 * MIB {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing is copied");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    };
    let kill = |child: std::process::Child, signal: &str| {
        let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        child.wait_with_output().unwrap()
    };
    for (to, signal, number) in [("raw", "-INT", 2), ("fvd", "-INT", 2), ("fvd", "-TERM", 15)] {
        let out = kill(start(to, "x"), signal);
        assert_eq!(out.status.signal(), Some(number), "as any program that is ended by it: {out:?}");
        let text = String::from_utf8(out.stderr).unwrap();
        assert!(text.contains("'x': interrupted at"), "{text}");
        assert!(!dir.at("x").exists(), "{to} {signal}");
    }
    // Killed outright: what is there is no image, and can be overwritten.
    kill(start("fvd", "x"), "-KILL");
    // The kernel ends what it was told to write, and gives up the locks then.
    let begin = Instant::now();
    while dir.fvd(&["info", "x"]).err.contains("in use") {
        assert!(begin.elapsed() < Duration::from_secs(60), "locked for good");
        std::thread::sleep(Duration::from_millis(20));
    }
    dir.bad(&["info", "x"], &["not an FVD image"]);
    dir.good(&["create", "-q", "x", "1M"]);
    dir.sound("x");
}

#[test]
fn progress_is_told() {
    let dir = Dir::new();
    dir.raw("a.raw");
    for option in ["-p", "--progress"] {
        let ran = dir.fvd(&["convert", option, "-f", "raw", "-O", "fvd", "a.raw", "a.fvd"]);
        assert!(ran.status == 0 && ran.err.contains("converting 'a.raw': ") && ran.err.contains("s in all"), "{}", ran.err);
    }
}

#[test]
fn a_disk_in_a_data_file() {
    let dir = Dir::new();
    dir.good(&["create", "-q", "--compact", "--chunk-size", "64K", "--journal-size", "1M", "--data-file", "disk.raw", "disk.fvd", "8M"]);
    let data = noise(MIB, 5);
    let disk = Disk::open(&dir.at("disk.fvd"), &Options { allow_data: true, ..Options::default() }).unwrap();
    disk.pwrite(&data, 3 * MIB, true).unwrap();
    disk.close().unwrap();
    dir.good(&["convert", "-q", "-O", "raw", "disk.fvd", "copy.raw"]);
    let copy = std::fs::read(dir.at("copy.raw")).unwrap();
    assert!(copy.len() as u64 == 8 * MIB && copy[3 << 20..4 << 20] == data[..] && copy[..3 << 20].iter().all(|b| *b == 0));
    // Not onto its own content.
    dir.bad(&["convert", "-O", "raw", "disk.fvd", "disk.raw"], &["disk.raw"]);
    dir.bad(&["convert", "-U", "-O", "raw", "disk.fvd", "disk.raw"], &["disk.raw", "cannot be the target"]);
    // What is amended is the image; the content stays where it is.
    dir.good(&["amend", "-q", "--storage-grow-unit", "1M", "--size", "16M", "disk.fvd"]);
    dir.good(&["convert", "-q", "-O", "raw", "disk.fvd", "copy.raw"]);
    assert_eq!(std::fs::read(dir.at("copy.raw")).unwrap()[3 << 20..4 << 20], data[..]);
    std::fs::remove_file(dir.at("disk.raw")).unwrap();
    dir.bad(&["convert", "-O", "raw", "disk.fvd", "copy.raw"], &["disk.raw"]);
}
