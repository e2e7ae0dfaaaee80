// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chores of the project. Run in the tree: `cargo run -p xtask -- COMMAND`.
//!
//! header [--check]    makes include/fvd.h, or says whether it is what would be made
//! symbols [LIBRARY…]  compares symbols.txt, the header and the exports of built libraries
//! tidy                rules of the tree that no compiler checks
#![forbid(unsafe_code)]

mod header;
mod symbols;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

/// What went wrong: one line each.
pub type Findings = Vec<String>;

/// The top of the tree.
pub fn top() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path.pop();
    path
}

fn run(arguments: &[&str]) -> Result<Findings, String> {
    match arguments {
        ["header"] => header::write(),
        ["header", "--check"] => header::check(),
        ["symbols", libraries @ ..] => symbols::check(libraries),
        ["tidy"] => tidy::check(),
        _ => Err("usage: cargo run -p xtask -- header [--check] | symbols [LIBRARY...] | tidy".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            for finding in &findings {
                eprintln!("{finding}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(2)
        }
    }
}
