// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exports: rust/fvd-capi/symbols.txt is the list; header and libraries must match it.

use crate::{Findings, top};
use std::collections::BTreeSet;
use std::process::Command;

type Names = BTreeSet<String>;

fn differences(what: &str, expected: &Names, found: &Names) -> Findings {
    let missing = expected.difference(found).map(|name| format!("{what}: {name} is missing"));
    let extra = found.difference(expected).map(|name| format!("{what}: {name} is not in symbols.txt"));
    missing.chain(extra).collect()
}

/// Functions that the header declares: names right before a parenthesis, at the start of a
/// declaration.
fn declared(header: &str) -> Names {
    let functions = header.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()) && !line.starts_with("typedef"));
    functions
        .filter_map(|line| line.split_once('('))
        .filter_map(|(before, _)| before.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("fvd_"))
        .map(str::to_owned)
        .collect()
}

/// What a shared library defines for others, and whether all of it has version FVD_0.
fn exported(library: &str) -> Result<(Names, bool), String> {
    let output = Command::new("nm").args(["-D", "--defined-only", library]).output().map_err(|error| format!("nm: {error}"))?;
    if !output.status.success() {
        return Err(format!("nm {library}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // The version itself is listed as an absolute symbol.
    let symbols: Vec<(&str, &str)> =
        text.lines().filter_map(|line| line.rsplit_once(' ')).map(|(left, name)| (&left[left.len() - 1..], name)).filter(|(kind, _)| *kind != "A").collect();
    let versioned = !symbols.is_empty() && symbols.iter().all(|(_, name)| name.ends_with("@@FVD_0"));
    let names = symbols.iter().map(|(_, name)| name.split('@').next().unwrap_or(name).to_owned()).collect();
    Ok((names, versioned))
}

/// Compares the lists. A library with a version in its file name is the installed one and must
/// have symbol versions.
pub fn check(libraries: &[&str]) -> Result<Findings, String> {
    let read = |name: &str| std::fs::read_to_string(top().join(name)).map_err(|error| format!("{name}: {error}"));
    let list = read("rust/fvd-capi/symbols.txt")?;
    let allowed: Names = list.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(str::to_owned).collect();
    let mut findings = differences("include/fvd.h", &allowed, &declared(&read("include/fvd.h")?));
    for library in libraries {
        let (names, versioned) = exported(library)?;
        findings.extend(differences(library, &allowed, &names));
        if library.contains(".so.") && !versioned {
            findings.push(format!("{library}: not every symbol has version FVD_0"));
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_found() {
        let header = "typedef void fvd_done_fn(void *opaque);\nint fvd_one(void);\nconst char *fvd_two(int a,\n                    int b);\n/* fvd_three( */\n    void (*read)(void *q);\n";
        assert_eq!(declared(header), Names::from(["fvd_one".to_owned(), "fvd_two".to_owned()]));
    }

    #[test]
    fn differences_go_both_ways() {
        let (a, b) = (Names::from(["x".to_owned(), "y".to_owned()]), Names::from(["y".to_owned(), "z".to_owned()]));
        assert_eq!(differences("l", &a, &b), ["l: x is missing", "l: z is not in symbols.txt"]);
    }
}
