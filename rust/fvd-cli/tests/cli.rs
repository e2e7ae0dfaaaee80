// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tool as a user meets it: command lines, output, exit status.

use fvd_host::{Options, disk::Disk};
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

mod common;
use common::Dir;

impl Dir {
    /// A base with a hole at the start, data at 1–2 MiB, and 4 MiB in all; a disk over it.
    fn disk(&self) -> PathBuf {
        let base = std::fs::File::create(self.at("base.raw")).unwrap();
        base.write_all_at(&vec![0xaa; MIB as usize], MIB).unwrap();
        base.set_len(4 * MIB).unwrap();
        self.good(&["create", "-q", "-b", "base.raw", "-F", "raw", "--journal-size", "1M", "disk.fvd", "8M"]);
        self.at("disk.fvd")
    }
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn create_and_info() {
    let dir = Dir::new();
    let out = dir.good(&["create", "plain.fvd", "1.5G"]);
    assert!(out.contains("'plain.fvd'") && out.contains("1.5 GiB"), "{out}");
    let info = dir.json(&["info", "--output=json", "plain.fvd"]);
    assert_eq!(info["virtual-size"], 3u64 << 29);
    assert_eq!((&info["format"], &info["dirty-flag"]), (&"fvd".into(), &false.into()));
    assert_eq!(info.get("backing-filename"), None);
    assert!(info["actual-size"].as_u64().unwrap() < MIB);
    dir.disk();
    let info = dir.json(&["info", "--output=json", "disk.fvd"]);
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    let data = &info["format-specific"]["data"];
    assert_eq!((&data["block-size"], &data["journal-size"]), (&4096.into(), &MIB.into()));
    assert_eq!((&data["base-length"], &data["covered"]), (&(4 * MIB).into(), &(4 * MIB).into()));
    let text = dir.good(&["info", "disk.fvd"]);
    for line in ["virtual size: 8 MiB (8388608 bytes)", "backing file: base.raw", "backing file format: raw", "block size: 4 KiB", "closed in good order"] {
        assert!(text.contains(line), "'{line}' in: {text}");
    }
    // From another directory the path of the base is spelled out.
    let elsewhere = dir.good(&["info", dir.at("disk.fvd").to_str().unwrap()]);
    assert!(elsewhere.contains(&format!("(actual path: {})", dir.at("base.raw").display())), "{elsewhere}");
    dir.good(&["create", "-q", "-b", "base.raw", "-F", "raw", "whole.fvd"]);
    assert_eq!(dir.json(&["info", "--output=json", "whole.fvd"])["virtual-size"], 4 * MIB, "the size of the base");
    dir.good(&["create", "-q", "-u", "-b", "nowhere.qcow2", "-F", "qcow2", "later.fvd", "1G"]);
    assert_eq!(dir.json(&["info", "--output=json", "later.fvd"])["format-specific"]["data"]["base-length"], Value::Null);
}

#[test]
fn create_says_what_is_wrong_with_which_value() {
    let dir = Dir::new();
    std::fs::write(dir.at("base.raw"), vec![0; 65536]).unwrap();
    let over = ["-b", "base.raw", "-F", "raw"];
    let with = |rest: &[&'static str]| [&["create"], &over[..], rest].concat();
    dir.bad(&["create", "x.fvd"], &["'x.fvd'", "size"]);
    dir.bad(&["create", "x.fvd", "1X"], &["1X"]);
    dir.bad(&["create", "x.fvd", "1000"], &["1000", "512", "1024"]);
    dir.bad(&["create", "x.fvd", "8E"], &["x.fvd", "9223372036854775808"]);
    dir.bad(&with(&["x.fvd", "--block-size", "5000"]), &["x.fvd", "5000"]);
    dir.bad(&with(&["x.fvd", "--block-size", "8G"]), &["8589934592"]);
    dir.bad(&with(&["x.fvd", "--journal-size", "3000"]), &["x.fvd", "3000"]);
    dir.bad(&with(&["x.fvd", "--preallocation", "some"]), &["some", "falloc"]);
    dir.bad(&["create", "-b", "base.raw", "x.fvd"], &["--backing-format"]);
    dir.bad(&["create", "-b", "gone.raw", "-F", "raw", "x.fvd"], &["gone.raw", "No such file"]);
    dir.bad(&["create", "-b", "base.raw", "-F", "vmdk", "x.fvd"], &["vmdk", "base.raw"]);
    dir.bad(&["create", "-b", "base.raw", "-F", "fvd", "x.fvd"], &["base.raw"]);
    dir.bad(&["create", "-u", "-b", "gone.raw", "-F", "raw", "x.fvd"], &["SIZE"]);
    dir.bad(&["create", "x.fvd", "1M", "--detect-sparse-hole", "on"], &["detect_sparse_hole", "base"]);
    dir.bad(&["create", "nodir/x.fvd", "1M"], &["nodir/x.fvd"]);
    assert!(!dir.at("x.fvd").exists(), "nothing is left behind");
    dir.bad(&["info", "base.raw"], &["base.raw", "not an FVD image"]);
    dir.bad(&["info", "gone"], &["'gone'"]);
    dir.bad(&["nonsense"], &["nonsense"]);
}

#[test]
fn an_image_in_use_is_left_alone() {
    let dir = Dir::new();
    let path = dir.disk();
    let open = Disk::open(&path, &Options::default()).unwrap();
    for command in [&["create", "disk.fvd", "1G"][..], &["info", "disk.fvd"], &["check", "disk.fvd"], &["map", "disk.fvd"]] {
        dir.bad(command, &["disk.fvd", "in use"]);
    }
    for command in [&["info", "-U", "disk.fvd"][..], &["check", "-U", "disk.fvd"], &["map", "-U", "disk.fvd"], &["dump", "disk.fvd"]] {
        dir.good(command);
    }
    open.close().unwrap();
    dir.good(&["create", "disk.fvd", "1G"]);
}

#[test]
fn map_shows_where_the_content_is() {
    let dir = Dir::new();
    let path = dir.disk();
    let disk = Disk::open(&path, &Options { allow_base: true, ..Options::default() }).unwrap();
    disk.pwrite(&[1; 8192], 65536, false).unwrap();
    disk.close().unwrap();
    let map = dir.json(&["map", "--output=json", "disk.fvd"]);
    let offset = dir.json(&["info", "--output=json", "disk.fvd"])["format-specific"]["data"]["data-offset"].as_u64().unwrap();
    let expect = format!(
        r#"[{{"start":0,"length":65536,"place":"base"}},
            {{"start":65536,"length":8192,"place":"data","offset":{}}},
            {{"start":73728,"length":{},"place":"base"}},
            {{"start":{},"length":{},"place":"data","offset":{}}}]"#,
        offset + 65536,
        4 * MIB - 73728,
        4 * MIB,
        4 * MIB,
        offset + 4 * MIB
    );
    assert_eq!(map, serde_json::from_str::<Value>(&expect).unwrap());
    let text = dir.good(&["map", "disk.fvd"]);
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(text.lines().nth(2).unwrap().starts_with("0x10000") && text.contains("data"), "{text}");
    // The bytes are where the map says.
    let mut bytes = [0; 8192];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut bytes, offset + 65536).unwrap();
    assert_eq!(bytes, [1; 8192]);
}

#[test]
fn detected_holes_are_known_to_be_zero_at_once() {
    let dir = Dir::new();
    dir.disk();
    dir.good(&["create", "-q", "-b", "base.raw", "-F", "raw", "--detect-sparse-hole", "on", "holes.fvd"]);
    let places = |name: &str| -> Vec<(u64, u64)> {
        let map = dir.json(&["map", "--output=json", name]);
        let base = |run: &&Value| run["place"] == "base";
        map.as_array().unwrap().iter().filter(base).map(|run| (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap())).collect()
    };
    assert_eq!(places("disk.fvd"), [(0, 4 * MIB)]);
    assert_eq!(places("holes.fvd"), [(MIB, MIB)], "only the data of the base is left in it");
}

#[test]
fn check_tells_sound_from_damaged_by_its_status() {
    let dir = Dir::new();
    let path = dir.disk();
    let disk = Disk::open(&path, &Options { allow_base: true, ..Options::default() }).unwrap();
    disk.pwrite(&[1; 4096], 0, false).unwrap();
    disk.close().unwrap();
    let text = dir.good(&["check", "disk.fvd"]);
    assert!(text.contains("No errors") && text.contains("1/1024 blocks"), "{text}");
    let report = dir.json(&["check", "--output=json", "disk.fvd"]);
    assert_eq!((&report["corruptions"], &report["present-blocks"]), (&0.into(), &1.into()));
    // A bit of the only stored bitmap page.
    let dump = dir.good(&["dump", "--header", "disk.fvd"]);
    let line = dump.lines().find(|line| line.contains("region Bitmap")).unwrap();
    let offset: u64 = line.split("offset ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    flip(&path, offset + 100);
    let ran = dir.fvd(&["check", "disk.fvd"]);
    assert_eq!(ran.status, 2, "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("bitmap page 0 is damaged"), "{}", ran.out);
    let ran = dir.fvd(&["check", "--output=json", "disk.fvd"]);
    assert_eq!((ran.status, serde_json::from_str::<Value>(&ran.out).unwrap()["corruptions"].as_u64()), (2, Some(1)));
    // Too short to be opened: damaged as well.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(300_000).unwrap();
    let ran = dir.fvd(&["check", "disk.fvd"]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("'disk.fvd'") && ran.err.contains("too short"), "{}", ran.err);
    dir.bad(&["check", "base.raw"], &["not an FVD image"]);
    dir.bad(&["check", "gone.fvd"], &["gone.fvd"]);
}

#[test]
fn check_repairs_what_it_is_told_to() {
    let dir = Dir::new();
    let path = dir.disk();
    let disk = Disk::open(&path, &Options { allow_base: true, ..Options::default() }).unwrap();
    disk.pwrite(&[1; 4096], 0, false).unwrap();
    disk.close().unwrap();
    let length = path.metadata().unwrap().len();
    let grow = || OpenOptions::new().write(true).open(&path).unwrap().set_len(length + (1 << 20)).unwrap();
    grow();
    assert_eq!(dir.fvd(&["check", "disk.fvd"]).status, 3);
    let text = dir.good(&["check", "-r", "leaks", "disk.fvd"]);
    assert!(text.contains("given back") && text.contains("No errors"), "{text}");
    assert_eq!(path.metadata().unwrap().len(), length);
    // Damage is no leak.
    let dump = dir.good(&["dump", "--header", "disk.fvd"]);
    let line = dump.lines().find(|line| line.contains("region Bitmap")).unwrap();
    let offset: u64 = line.split("offset ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    flip(&path, offset + 100);
    flip(&path, 4096 + 100);
    grow();
    let ran = dir.fvd(&["check", "-r", "leaks", "disk.fvd"]);
    assert_eq!((ran.status, path.metadata().unwrap().len()), (2, length), "{}{}", ran.out, ran.err);
    flip(&path, 4096 + 100);
    let report = dir.json(&["check", "-r", "all", "--output=json", "disk.fvd"]);
    assert_eq!((&report["corruptions"], &report["corruptions-fixed"], &report["lost"][0]["offset"]), (&0.into(), &2.into(), &0.into()), "{report}");
    let text = dir.good(&["check", "disk.fvd"]);
    assert!(text.contains("No errors") && text.contains("0/1024 blocks"), "{text}");
    dir.bad(&["check", "-U", "-r", "all", "disk.fvd"], &["cannot be used with"]);
}

#[test]
fn dump_shows_journal_and_pages() {
    let dir = Dir::new();
    let path = dir.disk();
    let disk = Disk::open(&path, &Options { allow_base: true, ..Options::default() }).unwrap();
    disk.pwrite(&[1; 8192], 65536, false).unwrap();
    disk.flush().unwrap();
    // As a program that dies: the commit is in the journal only.
    drop(disk);
    let header = dir.good(&["dump", "--header", "disk.fvd"]);
    for line in ["page 0: version 2", "header copy 1 at 4096:", "header copy 2 at 131072: the same", "state: open", "base name: \"base.raw\"", "region Journal"] {
        assert!(header.contains(line), "'{line}' in: {header}");
    }
    assert!(!header.contains("journal:"));
    let journal = dir.good(&["dump", "--journal", "disk.fvd"]);
    assert!(journal.contains("whole, replayed at the next open"), "{journal}");
    assert!(journal.contains("bits 16..=17 of Bitmap = 1"), "{journal}");
    Disk::open(&path, &Options::default()).unwrap().close().unwrap();
    let journal = dir.good(&["dump", "--journal", "disk.fvd"]);
    assert!(!journal.contains("replayed") && journal.contains("done with"), "{journal}");
    let pages = dir.good(&["dump", "--pages", "disk.fvd"]);
    assert!(pages.contains("Bitmap: 1 pages") && pages.contains("2 bits set"), "{pages}");
    assert!(pages.contains("page 0 of Bitmap: good"), "the double-write area: {pages}");
    let all = dir.good(&["dump", "disk.fvd"]);
    assert!(all.contains("page 0: ") && all.contains("journal: 256 units") && all.contains("PageMap: "), "{all}");
}

#[test]
fn dump_survives_any_damage() {
    let dir = Dir::new();
    let path = dir.disk();
    let disk = Disk::open(&path, &Options { allow_base: true, ..Options::default() }).unwrap();
    disk.pwrite(&[1; 8192], 65536, false).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let image = std::fs::read(&path).unwrap();
    let broken = dir.at("broken.fvd");
    let dump = || {
        let ran = dir.fvd(&["dump", "broken.fvd"]);
        assert!(ran.status <= 1, "status {}", ran.status);
        ran
    };
    for length in [0, 1, 64, 4096, 5000, 8192, 131_072, 140_000, 262_144, 300_000, 2_000_000, image.len() - 1] {
        std::fs::write(&broken, &image[..length.min(image.len())]).unwrap();
        dump();
    }
    // One bad header copy is reported and does no harm; two leave nothing to go by.
    std::fs::write(&broken, &image).unwrap();
    flip(&broken, 4096 + 45);
    let ran = dump();
    assert!(ran.status == 0 && ran.out.contains("header copy 1 at 4096: BAD") && ran.out.contains("bits 16..=17"), "{}", ran.out);
    flip(&broken, 131_072 + 45);
    let ran = dump();
    assert!(ran.status == 1 && ran.err.contains("broken.fvd"), "{}", ran.err);
    // Every region turned into noise, page 0 and headers kept.
    let mut noise = image.clone();
    let mut state = 88_172_645_463_325_252u64;
    for byte in &mut noise[262_144..] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    std::fs::write(&broken, &noise).unwrap();
    let ran = dump();
    assert!(ran.status == 0 && ran.out.contains("no valid unit") && ran.out.contains("no batch") && ran.out.contains("BAD"), "{}", ran.out);
    let ran = dir.fvd(&["dump", "base.raw"]);
    assert!(ran.status == 1 && ran.out.contains("not an FVD image"));
}

#[test]
fn text_from_an_image_cannot_steer_the_terminal() {
    let dir = Dir::new();
    dir.good(&["create", "-q", "-u", "-b", "evil\x1b[2J", "-F", "raw", "disk.fvd", "1M"]);
    for command in [&["info", "disk.fvd"][..], &["info", "--output=json", "disk.fvd"], &["dump", "disk.fvd"]] {
        let text = dir.good(command);
        assert!(text.contains("evil") && !text.contains('\x1b'), "{command:?}: {text:?}");
    }
}

#[test]
fn preallocation_allocates() {
    let dir = Dir::new();
    let allocated = |how: &str| {
        let name = format!("{how}.fvd");
        let ran = dir.fvd(&["create", "--progress", "--preallocation", how, &name, "16M"]);
        assert_eq!(ran.status, 0, "{}", ran.err);
        assert!(ran.err.contains(&format!("creating '{name}': ")), "progress was asked for: {:?}", ran.err);
        dir.json(&["info", "--output=json", &name])["actual-size"].as_u64().unwrap()
    };
    assert!(allocated("off") < 2 * MIB);
    assert!(allocated("falloc") >= 16 * MIB);
    assert!(allocated("full") >= 16 * MIB);
}

#[test]
fn compact_images() {
    let dir = Dir::new();
    let out = dir.good(&["create", "--compact", "--chunk-size", "64K", "--storage-grow-unit", "256K", "c.fvd", "64M"]);
    assert!(out.contains("compact, in chunks of 64 KiB"), "{out}");
    let info = dir.json(&["info", "--output=json", "c.fvd"]);
    let data = &info["format-specific"]["data"];
    assert_eq!((&data["chunk-size"], &data["storage-grow-unit"], &data["chunks"]), (&65536.into(), &262_144.into(), &1024.into()));
    let offset = data["data-offset"].as_u64().unwrap();
    let text = dir.good(&["info", "c.fvd"]);
    for line in ["chunk size: 64 KiB", "grows by: 256 KiB", "features: compact"] {
        assert!(text.contains(line), "'{line}' in: {text}");
    }
    let map = dir.json(&["map", "--output=json", "c.fvd"]);
    assert_eq!(map, serde_json::from_str::<Value>(r#"[{"start":0,"length":67108864,"place":"zero"}]"#).unwrap());
    let disk = Disk::open(&dir.at("c.fvd"), &Options::default()).unwrap();
    disk.pwrite(&[7; 4096], 10 * MIB, false).unwrap();
    disk.pwrite(&[8; 4096], 10 * MIB + 65536, false).unwrap();
    disk.pwrite(&[9; 4096], 10 * MIB - 65536, false).unwrap();
    disk.close().unwrap();
    assert_eq!(std::fs::metadata(dir.at("c.fvd")).unwrap().len(), offset + 262_144, "one growth step");
    let map = dir.json(&["map", "--output=json", "c.fvd"]);
    let expect = format!(
        r#"[{{"start":0,"length":{},"place":"zero"}},
            {{"start":{},"length":65536,"place":"data","offset":{}}},
            {{"start":{},"length":131072,"place":"data","offset":{offset}}},
            {{"start":{},"length":{},"place":"zero"}}]"#,
        10 * MIB - 65536,
        10 * MIB - 65536,
        offset + 131_072,
        10 * MIB,
        10 * MIB + 131_072,
        54 * MIB - 131_072
    );
    assert_eq!(map, serde_json::from_str::<Value>(&expect).unwrap());
    let text = dir.good(&["check", "c.fvd"]);
    assert!(text.contains("No errors") && text.contains("3/1024 chunks = 0.29% allocated, 33.33% fragmented"), "{text}");
    let report = dir.json(&["check", "--output=json", "c.fvd"]);
    assert_eq!((&report["total-clusters"], &report["allocated-clusters"], &report["fragmented-clusters"]), (&1024.into(), &3.into(), &1.into()));
    let pages = dir.good(&["dump", "--pages", "c.fvd"]);
    for line in ["Table: 2 pages", "3 chunks", "chunk 159: in storage chunk 2", "chunks 160..=161: in storage chunks 0..=1"] {
        assert!(pages.contains(line), "'{line}' in: {pages}");
    }
    assert!(dir.good(&["dump", "--header", "c.fvd"]).contains("storage grow unit: 262144"));
}

#[test]
fn compact_images_have_limits() {
    let dir = Dir::new();
    dir.bad(&["create", "c.fvd", "1M", "--chunk-size", "64K"], &["--compact"]);
    dir.bad(&["create", "c.fvd", "1M", "--storage-grow-unit", "64M"], &["--compact"]);
    dir.bad(&["create", "--compact", "c.fvd", "1M", "--chunk-size", "32K"], &["chunk_size", "32768"]);
    dir.bad(&["create", "--compact", "c.fvd", "1M", "--chunk-size", "8G"], &["chunk size", "8589934592"]);
    dir.bad(&["create", "--compact", "c.fvd", "1M", "--storage-grow-unit", "100K"], &["storage_grow_unit", "102400", "chunk_size"]);
    assert!(!dir.at("c.fvd").exists(), "nothing is left behind");
    // Every chunk with its place: the file is as long as it can get.
    dir.good(&["create", "-q", "--compact", "--preallocation", "metadata", "m.fvd", "16M"]);
    let text = dir.good(&["check", "m.fvd"]);
    assert!(text.contains("16/16 chunks = 100.00% allocated, 0.00% fragmented"), "{text}");
}

#[test]
fn a_reader_that_leaves_early_is_no_error_of_ours() {
    let dir = Dir::new();
    dir.disk();
    let command = format!("'{}' dump disk.fvd | head -n 1", env!("CARGO_BIN_EXE_fvd"));
    let out = Command::new("sh").args(["-c", &command]).current_dir(dir.0.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
}

#[test]
fn a_disk_in_a_data_file() {
    let dir = Dir::new();
    let out = dir.good(&["create", "--journal-size", "1M", "--data-file", "disk.raw", "disk.fvd", "3M"]);
    assert!(out.contains("data in 'disk.raw'"), "{out}");
    assert_eq!(std::fs::metadata(dir.at("disk.raw")).unwrap().len(), 3 * MIB);
    let options = Options { allow_data: true, ..Options::default() };
    let disk = Disk::open(&dir.at("disk.fvd"), &options).unwrap();
    disk.pwrite(&[5; 4096], 8192, true).unwrap();
    disk.close().unwrap();
    assert_eq!(std::fs::read(dir.at("disk.raw")).unwrap()[8192..12288], [5; 4096]);
    let text = dir.good(&["info", "disk.fvd"]);
    assert!(text.contains("data file: disk.raw\ndata file format: raw\n") && text.contains("data-file"), "{text}");
    assert_eq!(dir.json(&["info", "--output=json", "disk.fvd"])["format-specific"]["data"]["data-file"], "disk.raw");
    let map = dir.json(&["map", "--output=json", "disk.fvd"]);
    assert_eq!((&map[0]["offset"], &map[0]["file"]), (&0.into(), &"data".into()));
    assert!(dir.good(&["dump", "--header", "disk.fvd"]).contains("data file name: \"disk.raw\""));
    dir.good(&["check", "disk.fvd"]);
    // Too short, then missing: told, not repaired.
    for remove in [false, true] {
        if remove {
            std::fs::remove_file(dir.at("disk.raw")).unwrap();
        } else {
            std::fs::File::options().write(true).open(dir.at("disk.raw")).unwrap().set_len(MIB).unwrap();
        }
        let ran = dir.fvd(&["check", "disk.fvd"]);
        assert!(ran.status == 2 && ran.out.contains("the data file 'disk.raw' is"), "{}", ran.out);
        let ran = dir.fvd(&["check", "--repair", "all", "disk.fvd"]);
        assert!(ran.status != 0 && ran.err.contains("disk.raw"), "{}", ran.err);
        dir.good(&["info", "disk.fvd"]);
        dir.good(&["map", "disk.fvd"]);
    }
    dir.bad(&["create", "--data-file", "other.fvd", "other.fvd", "1M"], &["the image itself"]);
}

#[test]
fn amend_changes_what_can_change() {
    let dir = Dir::new();
    dir.good(&["create", "-q", "--compact", "--chunk-size", "64K", "--storage-grow-unit", "256K", "--journal-size", "1M", "c.fvd", "8M"]);
    let data = |name: &str| dir.json(&["info", "--output=json", name])["format-specific"]["data"].clone();
    let out = dir.good(&["amend", "--storage-grow-unit", "1M", "c.fvd"]);
    assert!(out.contains("'c.fvd'") && out.contains("grows by 1 MiB"), "{out}");
    assert_eq!(data("c.fvd")["storage-grow-unit"], MIB);
    // What it has is no change.
    let before = data("c.fvd");
    dir.good(&["amend", "-q", "--storage-grow-unit", "1M", "--chunk-size", "64K", "--journal-size", "1M", "--block-size", "0", "--compact", "--size", "8M", "c.fvd"]);
    assert_eq!(data("c.fvd"), before);
    // One that cannot change, and nothing does.
    for (option, value, name) in [("--chunk-size", "128K", "chunk_size"), ("--journal-size", "2M", "journal_size"), ("--block-size", "4K", "block_size")] {
        dir.bad(&["amend", "--storage-grow-unit", "2M", "--size", "16M", option, value, "c.fvd"], &["'c.fvd'", name, "cannot change"]);
    }
    dir.bad(&["amend", "--storage-grow-unit", "100K", "c.fvd"], &["storage_grow_unit", "102400", "65536"]);
    assert_eq!(data("c.fvd"), before);
    dir.good(&["amend", "-q", "--size", "16M", "c.fvd"]);
    assert_eq!(dir.json(&["info", "--output=json", "c.fvd"])["virtual-size"], 16 * MIB);
    dir.bad(&["amend", "--size", "4M", "c.fvd"], &["c.fvd", "4194304", "--shrink"]);
    dir.good(&["amend", "-q", "--size", "4M", "--shrink", "c.fvd"]);
    assert!(dir.good(&["check", "c.fvd"]).contains("No errors"));
    // A flat image, and its base.
    dir.disk();
    dir.bad(&["amend", "--storage-grow-unit", "1M", "disk.fvd"], &["disk.fvd", "storage_grow_unit", "not compact"]);
    dir.bad(&["amend", "--compact", "disk.fvd"], &["compact_image", "cannot change"]);
    dir.bad(&["amend", "-b", "moved.raw", "-F", "raw", "disk.fvd"], &["--unsafe-backing"]);
    dir.bad(&["amend", "-u", "-b", "moved.raw", "-F", "", "disk.fvd"], &["moved.raw", "format"]);
    std::fs::rename(dir.at("base.raw"), dir.at("moved.raw")).unwrap();
    dir.good(&["amend", "-q", "-u", "-b", "moved.raw", "-F", "raw", "disk.fvd"]);
    let info = dir.json(&["info", "--output=json", "disk.fvd"]);
    assert_eq!((&info["backing-filename"], &info["dirty-flag"]), (&"moved.raw".into(), &false.into()));
    let disk = Disk::open(&dir.at("disk.fvd"), &Options { allow_base: true, ..Options::default() }).unwrap();
    let mut bytes = [0; 512];
    disk.pread(&mut bytes, MIB).unwrap();
    assert_eq!(bytes, [0xaa; 512]);
    // In use, or not there.
    dir.bad(&["amend", "--size", "16M", "disk.fvd"], &["disk.fvd", "in use"]);
    dir.bad(&["amend", "--size", "16M", "gone.fvd"], &["gone.fvd", "No such file"]);
}
