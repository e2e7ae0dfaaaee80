// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rules of the tree that no compiler checks.

use crate::{Findings, top};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Files that tidy looks at: what git knows or would add.
fn files() -> Result<Vec<PathBuf>, String> {
    let output = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(top())
        .output()
        .map_err(|error| format!("git: {error}"))?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names.lines().map(PathBuf::from).filter(|path| top().join(path).is_file()).collect())
}

fn is_source(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    matches!(extension, "rs" | "c" | "h" | "cpp" | "sh" | "py")
}

/// One file's rules.
fn check_file(path: &Path, text: &str, findings: &mut Findings) {
    let name = path.display();
    if is_source(path) && !text.lines().take(8).any(|line| line.contains("SPDX-License-Identifier:")) {
        findings.push(format!("{name}:1: no SPDX-License-Identifier"));
    }
    // Patches quote other people's lines; Markdown may end lines in blanks.
    let whitespace = is_source(path) && !path.starts_with("qemu-patch");
    // Written in pieces, so that this file does not find itself.
    let machine = [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat()];
    for (at, line) in text.lines().enumerate() {
        let mut say = |what: &str| findings.push(format!("{name}:{}: {what}", at + 1));
        if whitespace && line.ends_with([' ', '\t']) {
            say("blanks at the end of the line");
        }
        if whitespace && path.extension().is_some_and(|e| e == "rs" || e == "c" || e == "h") && line.contains('\t') {
            say("a tab");
        }
        // Not in the middle of a path, as in "$tree" + such a name. A quote may end what comes before.
        let inside = |c: char| c.is_alphanumeric() || "._-}$/".contains(c);
        let starts = |at: usize| !line[..at].strip_suffix('"').unwrap_or(&line[..at]).ends_with(inside);
        if machine.iter().any(|start| line.match_indices(start.as_str()).any(|(at, _)| starts(at))) {
            say("a path of one machine");
        }
        if line.starts_with("<<<<<<< ") || line.starts_with(">>>>>>> ") {
            say("a merge conflict");
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        findings.push(format!("{name}: no newline at the end"));
    }
    let tests = path.components().any(|part| part.as_os_str() == "tests") || path.ends_with("tests.rs");
    let lines = text.lines().take_while(|line| !line.starts_with("mod tests {")).count();
    if path.extension().is_some_and(|e| e == "rs") && !tests && lines > 1000 {
        findings.push(format!("{name}: {lines} lines outside tests, at most 1000"));
    }
}

/// All `PREFIX<number>` in a text.
fn numbers(text: &str, prefix: &str) -> BTreeSet<u32> {
    let digits = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>();
    text.split(prefix).skip(1).filter_map(|rest| digits(rest).parse().ok()).collect()
}

/// Each numbered sentence of docs/c-api.md is cited by a C test, and each citation exists.
fn check_contract(texts: &BTreeMap<PathBuf, String>, findings: &mut Findings) {
    let Some(contract) = texts.get(Path::new("docs/c-api.md")) else {
        findings.push("docs/c-api.md is missing".to_owned());
        return;
    };
    let promised = numbers(contract, "**API-");
    let tests = texts.iter().filter(|(path, _)| path.starts_with("c-tests"));
    let cited: BTreeSet<u32> = tests.flat_map(|(_, text)| numbers(text, "API-")).collect();
    findings.extend(promised.difference(&cited).map(|n| format!("docs/c-api.md: no C test cites API-{n}")));
    findings.extend(cited.difference(&promised).map(|n| format!("c-tests: API-{n} is not in docs/c-api.md")));
    let expected: BTreeSet<u32> = (1..=promised.len() as u32).collect();
    if promised != expected {
        findings.push("docs/c-api.md: the numbers have gaps".to_owned());
    }
}

/// The version is in the workspace's Cargo.toml and in meson.build.
fn check_version(texts: &BTreeMap<PathBuf, String>, findings: &mut Findings) {
    let line = |file: &str, start: &str| -> Option<String> {
        let line = texts.get(Path::new(file))?.lines().find(|line| line.trim_start().starts_with(start))?;
        line.split(['"', '\'']).nth(1).map(str::to_owned)
    };
    let (cargo, meson) = (line("Cargo.toml", "version ="), line("meson.build", "version:"));
    if cargo.is_none() || cargo != meson {
        findings.push(format!("version: Cargo.toml says {cargo:?}, meson.build {meson:?}"));
    }
}

/// All rules.
pub fn check() -> Result<Findings, String> {
    let mut findings = Findings::new();
    let mut texts = BTreeMap::new();
    for path in files()? {
        // Not text: a test image, say, or a fuzzer's input that happens to be some.
        if path.starts_with("rust/fuzz/corpus") {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(top().join(&path)) else { continue };
        check_file(&path, &text, &mut findings);
        texts.insert(path, text);
    }
    check_contract(&texts, &mut findings);
    check_version(&texts, &mut findings);
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_files_are_found() {
        let mut findings = Findings::new();
        let text = format!("fn x() {{}} \n\tlet a = \"{}\";\n>>>>>>> theirs", ["/ro", "ot/x"].concat());
        check_file(Path::new("rust/a/src/x.rs"), &text, &mut findings);
        let found = findings.join("\n");
        for what in ["SPDX", ":1: blanks", ":2: a tab", ":2: a path", ":3: a merge", "newline"] {
            assert!(found.contains(what), "{what} in {found}");
        }
        findings.clear();
        check_file(Path::new("rust/a/src/x.rs"), "// SPDX-License-Identifier: MIT OR Apache-2.0\n", &mut findings);
        assert_eq!(findings, [""; 0]);
    }

    #[test]
    fn the_contract_and_its_tests_match() {
        let mut texts = BTreeMap::from([
            (PathBuf::from("docs/c-api.md"), "**API-1** a **API-2** b".to_owned()),
            (PathBuf::from("c-tests/x.c"), "/* API-1 API-3 */".to_owned()),
        ]);
        let mut findings = Findings::new();
        check_contract(&texts, &mut findings);
        assert_eq!(findings, ["docs/c-api.md: no C test cites API-2", "c-tests: API-3 is not in docs/c-api.md"]);
        texts.insert(PathBuf::from("c-tests/x.c"), "/* API-1 API-2 */".to_owned());
        findings.clear();
        check_contract(&texts, &mut findings);
        assert_eq!(findings, [""; 0]);
    }
}
