// SPDX-License-Identifier: MIT OR Apache-2.0
//! Builds some of the C tests with the system's C compiler and runs them against the cdylib that
//! cargo just made. All of them run by `meson test`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The cdylib is beside this test's own program.
fn library() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let library = exe.parent().unwrap().join("libfvd.so");
    assert!(library.is_file(), "{} is missing", library.display());
    library
}

fn smoke(test: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library(), dir.path().join("libfvd.so.0")).unwrap();
    let exe = dir.path().join(test);
    let compiler = cc::Build::new()
        .target(env!("FVD_TARGET"))
        .host(env!("FVD_TARGET"))
        .opt_level(1)
        .cargo_metadata(false)
        .std("gnu11")
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .include(top().join("include"))
        .get_compiler();
    let mut build = compiler.to_command();
    build.args([top().join("c-tests").join(test).with_extension("c"), top().join("c-tests/util.c")]);
    build.arg("-o").arg(&exe).arg(dir.path().join("libfvd.so.0"));
    build.args(["-D_GNU_SOURCE", "-pthread"]).arg(format!("-Wl,-rpath,{}", dir.path().display()));
    let built = build.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(&exe).env("TMPDIR", dir.path()).env("RUST_BACKTRACE", "0").output().unwrap();
    assert!(ran.status.success(), "{test}: {}\n{}", ran.status, String::from_utf8_lossy(&ran.stderr));
}

#[test]
fn open() {
    smoke("test-open");
}

#[test]
fn lifecycle() {
    smoke("test-lifecycle");
}

#[test]
fn lookup() {
    smoke("test-lookup");
}

#[test]
fn poisoned() {
    smoke("test-poisoned");
}

#[test]
fn errors_null() {
    smoke("test-errors-null");
}

#[test]
fn file_host() {
    smoke("test-file-host");
}

/// The check itself can fail.
#[test]
#[should_panic(expected = "no-such-test")]
fn a_test_that_does_not_compile_fails() {
    smoke("no-such-test");
}
