#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Line coverage of the engine and the format by their own tests, file by file, and the lines that
# nothing ran. Fails if a file that the crash rules live in is below 95 %. Needs cargo-llvm-cov
# (`cargo install cargo-llvm-cov`) and llvm-cov of the compiler's LLVM version (Debian: llvm-NN).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/coverage
PATH=$HOME/.cargo/bin:$PATH
llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
export LLVM_COV=${LLVM_COV:-/usr/lib/llvm-$llvm/bin/llvm-cov} LLVM_PROFDATA=${LLVM_PROFDATA:-/usr/lib/llvm-$llvm/bin/llvm-profdata}
if ! cargo llvm-cov --version >/dev/null 2>&1 || [ ! -x "$LLVM_COV" ]; then
    echo "cargo-llvm-cov or llvm-cov $llvm is missing" >&2
    exit 1
fi
# Few seeds are enough here, and planted faults would show what a mistake runs, not what is right.
export FVD_SEEDS=${FVD_SEEDS:-40}
cargo llvm-cov --locked -q -p fvd-format -p fvd-engine -p fvd-fuzz --json --output-path "$CARGO_TARGET_DIR/coverage.json" -- --skip planted_faults >&2
python3 -B - "$CARGO_TARGET_DIR/coverage.json" <<'END'
import json, sys

most = ["recovery", "commit", "checkpoint", "header_update", "create", "resize"]
must = [f"fvd-engine/src/{name}.rs" for name in most] + ["fvd-format/src/journal.rs", "fvd-format/src/journal/scan.rs"]
data = json.load(open(sys.argv[1]))["data"][0]
bad = []
for file in sorted(data["files"], key=lambda f: f["filename"]):
    name = file["filename"].split("/rust/")[-1]
    if not name.startswith(("fvd-engine/src/", "fvd-format/src/")) or name.endswith("tests.rs"):
        continue
    lines = file["summary"]["lines"]
    # A segment is (line, column, count, has_count, is_region_entry, is_gap).
    missed = sorted({s[0] for s in file["segments"] if s[3] and s[4] and not s[5] and s[2] == 0})
    print(f"{lines['percent']:6.2f} % {lines['covered']:5}/{lines['count']:<5} {name}  {' '.join(map(str, missed)) if name in must else ''}")
    if name in must and lines["percent"] < 95:
        bad.append(name)
missing = [name for name in must if not any(f["filename"].endswith(name) for f in data["files"])]
if bad or missing:
    sys.exit(f"below 95 %: {bad}; not measured: {missing}")
END
