#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Line coverage of the engine and the format, file by file: their own tests, the fuzz corpus, and the
# simulator's random runs and fault loop. Planted faults stay off: they would show what a mistake runs,
# not what is right. Fails if a file that the crash rules live in is below 95 %; of those, the lines that
# nothing ran are printed. Also in $CARGO_TARGET_DIR/coverage/coverage.json.
#
#   SEEDS=n scripts/coverage.sh    so many seeds of the simulator
#
# Needs cargo-llvm-cov (`cargo install cargo-llvm-cov --locked`) and llvm-cov of the compiler's LLVM
# version: from the toolchain (`rustup component add llvm-tools`), Debian's llvm-NN, or LLVM_COV.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/coverage
PATH=$HOME/.cargo/bin:$PATH
host=$(rustc -vV | sed -n 's/^host: //p')
llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')

cargo llvm-cov --version >/dev/null 2>&1 || { echo "coverage.sh: cargo-llvm-cov is missing: cargo install cargo-llvm-cov --locked" >&2; exit 1; }
if [ -z "${LLVM_COV:-}" ]; then
    for dir in "$(rustc --print sysroot)/lib/rustlib/$host/bin" "/usr/lib/llvm-$llvm/bin"; do
        [ -x "$dir/llvm-cov" ] && [ -x "$dir/llvm-profdata" ] || continue
        LLVM_COV=$dir/llvm-cov LLVM_PROFDATA=$dir/llvm-profdata
        break
    done
fi
if [ -z "${LLVM_COV:-}" ]; then
    echo "coverage.sh: no llvm-cov of LLVM $llvm: rustup component add llvm-tools, or apt-get install llvm-$llvm" >&2
    exit 1
fi
export LLVM_COV LLVM_PROFDATA=${LLVM_PROFDATA:-$(dirname "$LLVM_COV")/llvm-profdata}
echo "coverage.sh: $LLVM_COV" >&2

cov() { cargo llvm-cov --no-report --locked -q "$@" >&2; }
cargo llvm-cov clean --workspace >&2
cov test -p fvd-format -p fvd-engine -- --skip planted_faults
cov test -p fvd-fuzz --test replay
# One range, so that two runs agree.
cov run -p fvd-sim -- run --seeds "0..${SEEDS:-300}" --jobs "$(nproc)"
cov run -p fvd-sim -- fault-loop --quick --jobs "$(nproc)"
json=$CARGO_TARGET_DIR/coverage.json
cargo llvm-cov report --json --output-path "$json" >&2
python3 -B - "$json" <<'END'
import json, sys

engine = "recovery replayed commit changes checkpoint header_update create resize relayout layout open bits bits_load space table check repair"
codec = "journal journal/scan page double_write header"
must = [f"fvd-engine/src/{name}.rs" for name in engine.split()] + [f"fvd-format/src/{name}.rs" for name in codec.split()]


def lines_of(segments):
    """Line -> how often it ran, the way llvm-cov counts: the most of what begins on it, and of what goes on."""
    counts, wrapped = {}, None
    by_line = {}
    for segment in segments:
        by_line.setdefault(segment[0], []).append(segment)
    for line in range(segments[0][0], segments[-1][0] + 1):
        here = by_line.get(line, [])
        # A segment is (line, column, count, has_count, is_region_entry, is_gap).
        entries = [s for s in here if s[3] and s[4] and not s[5]]
        skipped = here and not here[0][3] and here[0][4]
        if not skipped and (entries or (wrapped and wrapped[3])):
            counts[line] = max([s[2] for s in entries] + ([wrapped[2]] if wrapped and wrapped[3] else []))
        if here:
            wrapped = here[-1]
    return counts


def ranges(lines):
    out = []
    for line in lines:
        if out and line == out[-1][1] + 1:
            out[-1][1] = line
        else:
            out.append([line, line])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


bad, seen = [], set()
for file in sorted(json.load(open(sys.argv[1]))["data"][0]["files"], key=lambda f: f["filename"]):
    name = file["filename"].split("/rust/")[-1]
    if not name.startswith(("fvd-engine/src/", "fvd-format/src/")) or name.endswith("tests.rs"):
        continue
    lines = file["summary"]["lines"]
    counts = lines_of(file["segments"])
    missed = [line for line, count in sorted(counts.items()) if count == 0]
    seen.add(name)
    print(f"{lines['percent']:6.2f} % {lines['covered']:5}/{lines['count']:<5} {name}  {ranges(missed) if name in must else ''}".rstrip())
    if name in must and lines["percent"] < 95:
        bad.append(name)
missing = [name for name in must if name not in seen]
if bad or missing:
    sys.exit(f"below 95 %: {bad}; not measured: {missing}")
END
