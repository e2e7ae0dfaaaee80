// SPDX-License-Identifier: MIT OR Apache-2.0
//! The locks against another process: ourselves, and QEMU's own programs where they are installed.

use fvd_engine::Kind;
use fvd_host::{FileIo, Options};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

fn open(path: &Path, read_only: bool) -> Result<FileIo, fvd_engine::Error> {
    FileIo::open(path, &Options { read_only, ..Options::default() })
}

fn refused(path: &Path, read_only: bool) -> bool {
    match open(path, read_only) {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error.kind, Kind::Host(libc::EAGAIN), "{error}");
            assert!(error.text.contains("in use") && error.text.contains(path.to_str().unwrap()), "{error}");
            true
        }
    }
}

/// Another process that holds an image open until it is told to stop.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        self.child.wait().unwrap();
    }
}

const HOLD: &str = "FVD_TEST_HOLD";

/// Not a test of its own: the second process of the tests below.
#[test]
fn hold_for_another_process() {
    let Ok(what) = std::env::var(HOLD) else { return };
    let (mode, path) = what.split_once(':').unwrap();
    let _io = open(Path::new(path), mode == "r").unwrap();
    println!("\nholding");
    std::io::stdin().lines().for_each(drop);
}

fn hold(path: &Path, mode: &str) -> Holder {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hold_for_another_process", "--nocapture"])
        .env(HOLD, format!("{mode}:{}", path.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "holding"), "the second process could not open the image");
    std::thread::spawn(move || lines.for_each(drop));
    Holder { stdin: child.stdin.take(), child }
}

#[test]
fn one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    {
        let _other = hold(&path, "w");
        assert!(refused(&path, false) && refused(&path, true));
        let skipped = FileIo::open(&path, &Options { read_only: true, no_lock: true, ..Options::default() });
        assert!(skipped.is_ok(), "without locks a picture can be taken");
    }
    {
        let _other = hold(&path, "r");
        assert!(refused(&path, false));
        assert!(!refused(&path, true));
    }
    assert!(!refused(&path, false), "the locks go with the process");
}

#[allow(clippy::explicit_write)] // The harness would keep a macro's text back.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        writeln!(std::io::stderr(), "SKIPPED: {program} is not installed: the locks were not compared with QEMU's").unwrap();
    }
    found
}

fn qcow2(dir: &Path) -> PathBuf {
    let path = dir.join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status().unwrap();
    assert!(made.success());
    path
}

fn qemu_io_holds(path: &Path, format: &str, read_only: bool) -> Holder {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]).args(read_only.then_some("-r")).arg(path);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "read 0 512").unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("512/512")), "qemu-io could not open the image");
    std::thread::spawn(move || lines.for_each(drop));
    Holder { child, stdin: Some(stdin) }
}

#[test]
fn qemu_keeps_us_out() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    for format in ["qcow2", "raw"] {
        {
            let _vm = qemu_io_holds(&path, format, false);
            assert!(refused(&path, false), "{format}: writing");
            assert!(refused(&path, true), "{format}: reading");
        }
        let _vm = qemu_io_holds(&path, format, true);
        assert!(!refused(&path, true), "{format}: two readers");
    }
    let _vm = qemu_io_holds(&path, "qcow2", true);
    assert!(refused(&path, false), "writing while QEMU reads");
}

#[test]
fn we_keep_qemu_out() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let qemu = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        (out.status.success() && !text.contains("lock"), text)
    };
    let info: &[&str] = &["info", "-f", "qcow2"];
    let read: &[&str] = &["-r", "-f", "qcow2", "-c", "read 0 512"];
    let write: &[&str] = &["-f", "qcow2", "-c", "write 0 512"];
    {
        let _writer = open(&path, false).unwrap();
        for (program, args) in [("qemu-img", info), ("qemu-io", read), ("qemu-io", write)] {
            let (ran, text) = qemu(program, args);
            assert!(!ran && text.contains("lock"), "{program} {args:?} should be refused: {text}");
        }
        assert!(qemu("qemu-img", &["info", "-U", "-f", "qcow2"]).0);
    }
    {
        let _reader = open(&path, true).unwrap();
        for (program, args) in [("qemu-img", info), ("qemu-io", read)] {
            let (ran, text) = qemu(program, args);
            assert!(ran, "{program} {args:?} should run: {text}");
        }
        let (ran, text) = qemu("qemu-io", write);
        assert!(!ran && text.contains("lock"), "writing should be refused: {text}");
    }
    assert!(qemu("qemu-io", write).0, "nobody holds it any more");
}
