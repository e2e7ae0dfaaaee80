#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The simulator (docs/simulator.md): builds build/bin/fvd-sim and runs it.
#
#   scripts/sim.sh               only builds
#   scripts/sim.sh --test        what `make test` runs: regression seeds, two minutes of fresh ones,
#                                1,000 seeds twice, every operation made to fail, every sequence of two
#                                operations, each planted fault once
#   scripts/sim.sh --hours N     fresh seeds on all cores for N hours (`make sim HOURS=N`)
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/libfvd/target}
PATH=$HOME/.cargo/bin:$PATH
jobs=${JOBS:-$(nproc)}

FVD_REVISION=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown) cargo build -q --locked --release -p fvd-sim
mkdir -p build/bin
install -m 755 "$CARGO_TARGET_DIR/release/fvd-sim" build/bin/fvd-sim
sim=build/bin/fvd-sim

passed=0 failed=0
run() { # name, command...
    printf -- '--- %s\n' "$1"
    if "${@:2}"; then passed=$((passed + 1)); else failed=$((failed + 1)); printf 'FAILED: %s\n' "$1"; fi
}

case ${1:-} in
    '') exit 0 ;;
    --hours) exec "$sim" run --jobs "$jobs" --seconds "$(awk -v h="$2" 'BEGIN { printf "%d", h * 3600 }')" ;;
    --test)
        run seeds "$sim" run --jobs "$jobs" --seconds 120
        run fault-loop "$sim" fault-loop --jobs "$jobs"
        run determinism "$sim" determinism --seeds 0..1000
        run exhaustive "$sim" exhaustive --depth 2 --jobs "$jobs"
        # A minute is the figure (docs/simulator.md); a busy machine gets more.
        run faults "$sim" faults --ranges 1 --seconds 240 --jobs "$jobs"
        printf '%s passed, %s failed\n' "$passed" "$failed"
        [ "$failed" -eq 0 ] ;;
    *) printf "sim.sh: unknown argument '%s'\n" "$1" >&2; exit 2 ;;
esac
