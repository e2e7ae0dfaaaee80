// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs inputs of fuzz targets by hand: `cargo run -p fvd-fuzz --example input -- PATH…`. The name of an
//! input's folder is the target's.

use std::path::Path;

fn main() {
    for argument in std::env::args_os().skip(1) {
        let path = Path::new(&argument);
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
        let target = fvd_fuzz::TARGETS.iter().find(|t| t.0 == folder).unwrap_or_else(|| panic!("no target '{folder}'"));
        target.1(&bytes);
        println!("{}: no failure", path.display());
    }
}
