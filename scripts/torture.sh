#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# SIGKILL (tests/qemu/kill9.py) and power cuts (tests/qemu/powercut.py) in turn, each round with a
# fresh seed, for MINUTES (10): a round that has begun is finished. The first failure ends it, with
# the seed and the command to repeat; its files are kept. The seed decides what is asked and where
# it is cut, not how fast the machine answers: repeat a failure a few times (powercut.py --again judges
# the very file once more).
#
#   scripts/torture.sh [MINUTES]          SEED=n: the seed of the first round
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
minutes=${1:-${MINUTES:-10}}
[[ $minutes =~ ^[0-9]+$ ]] || { printf "torture.sh: '%s' is no number of minutes\n" "$minutes" >&2; exit 2; }
export CYCLES=${CYCLES:-60} CUTS=${CUTS:-240}
revision=$(git describe --always --dirty 2>/dev/null || echo unknown)

seed=${SEED:-} rounds=0
while [ "$SECONDS" -lt $((minutes * 60)) ] || [ "$rounds" -eq 0 ]; do
    for test in kill9 powercut; do
        now=${seed:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
        command="SEED=$now CYCLES=$CYCLES CUTS=$CUTS python3 -B tests/qemu/$test.py"
        printf -- '--- %s min, round %s: %s\n' $((SECONDS / 60)) $((rounds + 1)) "$command"
        if ! SEED=$now KEEP=failed python3 -B "tests/qemu/$test.py"; then
            printf '\nFAILED after %s rounds, revision %s, seed %s; to repeat:\n    %s\n' "$rounds" "$revision" "$now" "$command"
            exit 1
        fi
    done
    seed='' rounds=$((rounds + 1))
done
printf '\n%s rounds without a failure in %s min (each: %s kills, at least %s cut points), revision %s\n' \
    "$rounds" $((SECONDS / 60)) "$CYCLES" "$CUTS" "$revision"
