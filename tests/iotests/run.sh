#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Runs the upstream qemu-iotests of pass.txt with -fvd on the built programs.
# Each must pass; one that "cannot run" counts as failed, too.
#
#   tests/iotests/run.sh                     all of pass.txt
#   tests/iotests/run.sh NAME...             only these
#   tests/iotests/run.sh --compact [NAME...] all of pass-compact.txt, or these, with compact images
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
list=pass.txt
if [ "${1:-}" = --compact ]; then
    shift
    list=pass-compact.txt
    export IMGOPTS=compact_image=on
fi
. "$here/common.sh"

if [ $# -gt 0 ]; then tests=("$@"); else mapfile -t tests < <(names "$here/$list"); fi
[ ${#tests[@]} -gt 0 ] || die "$list is empty"

passed=0 failed=0 skipped=0
run_check fvd "${tests[@]}"
for name in "${tests[@]}"; do
    outcome=$(result "$name")
    if [ "$outcome" != pass ]; then
        cp "$scratch/log" "$scratch/first"
        # Once more, alone: a busy machine fails tests that count seconds.
        why=$(why "$name")
        jobs=1 run_check fvd "$name"
        again=$(result "$name")
        cp "$scratch/first" "$scratch/log"
        [ "$again" != pass ] || printf '# %s passed the second time only\n%s\n' "$name" "$why"
        outcome=$again
    fi
    case $outcome in
        pass) passed=$((passed + 1)); printf 'ok - %s\n' "$name" ;;
        *) failed=$((failed + 1)); printf 'not ok - %s: %s\n' "$name" "$outcome"; why "$name" ;;
    esac
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ]
