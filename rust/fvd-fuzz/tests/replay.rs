// SPDX-License-Identifier: MIT OR Apache-2.0
//! The corpus of every fuzz target, on the stable compiler: no body panics, no memory stays behind.

mod common;

use std::path::{Path, PathBuf};

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut found: Vec<(PathBuf, Vec<u8>)> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    found.sort();
    found
}

fn replay(target: &str) {
    let body = fvd_fuzz::TARGETS.iter().find(|t| t.0 == target).expect("a target").1;
    let inputs = inputs(target);
    assert!(inputs.len() >= 10, "{target}: a corpus of {} inputs", inputs.len());
    // What is made once, is made here.
    body(&[]);
    for (path, bytes) in &inputs {
        // Prefixes are inputs too, and reach states that end in the middle.
        for end in [bytes.len(), bytes.len() / 2] {
            let before = fvd_fuzz::heap::live();
            if std::panic::catch_unwind(|| body(&bytes[..end])).is_err() {
                panic!("{} (first {end} bytes) fails; run it alone: cargo run -p fvd-fuzz --example input -- {0}", path.display());
            }
            // A thread's texts of errors are kept till the next one: those were counted before.
            let left = fvd_fuzz::heap::live() - before;
            assert!(left.abs() < 4096, "{}: {left} bytes stay behind", path.display());
        }
    }
}

#[test]
fn header() {
    replay("header");
}

#[test]
fn journal_scan() {
    replay("journal_scan");
}

#[test]
fn pages() {
    replay("pages");
}

#[test]
fn image_open() {
    replay("image_open");
}

#[test]
fn capi_calls() {
    replay("capi_calls");
}

#[test]
fn every_corpus_has_its_target() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let mut found: Vec<String> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut expect: Vec<&str> = fvd_fuzz::TARGETS.iter().map(|t| t.0).collect();
    expect.sort_unstable();
    assert_eq!(found, expect);
}
